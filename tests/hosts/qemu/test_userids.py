from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path

import pytest

from descriptors import open_files
from utilityvm.errors import SetupError
from utilityvm.hosts.qemu import privileges, userids
from utilityvm.machine.programs import find_program, spawn

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change users")
SETPRIV = find_program("setpriv", package="util-linux")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(userids, "_FOLDER", tmp_path / "uids")
    return tmp_path / "uids"


async def choose() -> int:
    async with userids.identity(kvm=False) as who:
        return who.uid


def of_range(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("UTILITYVM_UIDS", text)


async def test_an_id_that_a_process_has_is_not_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    of_range(monkeypatch, "322000-322009")
    monkeypatch.setattr(userids, "REST_S", 0.0)
    async with userids.identity(kvm=False) as first:
        pid = spawn([*privileges.launcher(SETPRIV, first, dies_with_us=True), "/bin/sleep", "1000"], env={})
        while not privileges.is_used_by(pid, first):
            await asyncio.sleep(0)
    try:
        assert await choose() != first.uid
    finally:
        os.kill(pid, 9)


async def test_a_process_that_stands_still_while_it_chooses_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    of_range(monkeypatch, "321000-321001")
    async with userids.identity(kvm=False) as first, userids.identity(kvm=False) as second:
        assert {first.uid, second.uid} == {321000, 321001}
        with pytest.raises(SetupError, match="no free user id for the VM in 321000-321001"):
            await choose()


async def test_an_id_rests_before_it_is_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    of_range(monkeypatch, "321000-321002")
    assert [await choose() for _ in range(3)] == [321000, 321001, 321002]


async def test_when_all_are_tired_the_one_that_rested_longest_is_given(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    of_range(monkeypatch, "321000-321002")
    for _ in range(3):
        await choose()
    now = time.time()
    for uid, ago in ((321000, 5), (321001, 60), (321002, 30)):
        os.utime(folder / str(uid), (now - ago, now - ago))
    assert [await choose() for _ in range(3)] == [321001, 321002, 321000]


async def test_an_id_rests_from_the_end_of_its_vm(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    of_range(monkeypatch, "321000-321001")
    uid = await choose()
    long_ago = time.time() - 2 * userids.REST_S
    os.utime(folder / str(uid), (long_ago, long_ago))
    userids.rest(uid)
    assert await choose() != uid


async def test_a_rested_id_is_given_again(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    of_range(monkeypatch, "321000-321001")
    uid = await choose()
    long_ago = time.time() - 2 * userids.REST_S
    os.utime(folder / str(uid), (long_ago, long_ago))
    assert await choose() == uid


@pytest.mark.parametrize("text", ["x", "5-", "9-3", "0-5"])
async def test_a_range_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    of_range(monkeypatch, text)
    with pytest.raises(SetupError, match="UTILITYVM_UIDS"):
        await choose()


async def test_a_range_of_accounts_only_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    of_range(monkeypatch, "1-2")  # daemon and bin, on every Debian
    with pytest.raises(SetupError, match="no free user id for the VM in 1-2"):
        await choose()


async def test_an_id_that_was_claimed_for_a_caller_who_has_gone_is_free(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun, may_end = threading.Event(), threading.Event()
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)

    def claim() -> tuple[int, int]:
        begun.set()
        may_end.wait(20)
        return 70000, lock

    async def start() -> None:
        async with userids.identity(kvm=False):
            raise AssertionError("it was cancelled")

    monkeypatch.setattr(userids, "_claim", claim)
    starting = asyncio.create_task(start())
    while not begun.is_set():
        await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    may_end.set()
    async with asyncio.timeout(20):
        while str(tmp_path / "lock") in {path for _, path in open_files()}:
            await asyncio.sleep(0.01)
