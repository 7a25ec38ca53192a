"""A connection that is closed while another thread uses it ends no process."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from utilityvm.store import Store
from utilityvm.store.connection import Connection

COUNT = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 100000) SELECT told(x) FROM c"

# What a caller does that was cancelled, beside its work. It dies of a signal where that is not allowed for.
CLOSES = """
import sys, threading
from pathlib import Path
from utilityvm.store import Store

store = Store.open(Path(sys.argv[1]))
for number in range(20):
    store.add(f"vm{number}", uuid=str(number), config={})
is_working = threading.Event()

def work():
    while True:
        for vm in store.vms():
            store.set_owner(vm, {"pid": 1})
            is_working.set()

for worker in [threading.Thread(target=work, daemon=True) for _ in range(3)]:
    worker.start()
is_working.wait()
store.close()
"""


def test_a_store_may_be_closed_while_threads_write_to_it(tmp_path: Path) -> None:
    for number in range(4):
        command = [sys.executable, "-c", CLOSES, str(tmp_path / f"{number}.db")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("steps", ["execute", "cursor", "rows"])
def test_closing_waits_for_the_statement_that_is_under_way(steps: str) -> None:
    db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False, factory=Connection)
    begun, may_end, seen = threading.Event(), threading.Event(), list[str]()

    def told(number: int) -> int:
        if number == 2:
            begun.set()
            may_end.wait(20)
            seen.append("statement")
        return number

    def work() -> None:
        match steps:
            case "execute":
                assert len(db.execute(COUNT).fetchall()) == 100_000
            case "cursor":
                assert len(db.cursor().execute(COUNT).fetchall()) == 100_000
            case _:
                with suppress(sqlite3.ProgrammingError):  # the next row, when it is closed
                    for _ in db.execute(COUNT):
                        pass

    def close() -> None:
        db.close()
        seen.append("closed")

    db.create_function("told", 1, told)
    threads = [threading.Thread(target=work), threading.Thread(target=close)]
    threads[0].start()
    assert begun.wait(20)
    threads[1].start()
    may_end.set()
    for one in threads:
        one.join(20)
    assert seen == ["statement", "closed"]
    with pytest.raises(sqlite3.ProgrammingError):
        db.execute("SELECT 1")


async def test_a_cancelled_callers_work_is_finished_before_the_store_is_closed(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "state.db")
    begun, may_end, done = asyncio.Event(), threading.Event(), list[str]()
    loop = asyncio.get_running_loop()

    def work() -> None:
        loop.call_soon_threadsafe(begun.set)
        may_end.wait(20)
        store.add("one", uuid="u", config={})
        done.append("added")

    working = asyncio.create_task(store.lane.run(work))
    await begun.wait()
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    closing = asyncio.create_task(store.lane.run(store.close))
    await asyncio.sleep(0)
    may_end.set()
    await closing
    assert done == ["added"]
