from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from utilityvm.agent import hooks
from utilityvm.agent.faults import Fault
from utilityvm.agent.processes import is_readable


def put(folder: Path, name: str, script: str, *, mode: int = 0o755) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(mode)
    return str(path)


def soon() -> float:
    return time.monotonic() + 20


def test_hooks_are_the_executables_in_the_order_of_their_names(tmp_path: Path) -> None:
    later, first = put(tmp_path, "20-b", ""), put(tmp_path, "10-a", "")
    put(tmp_path, "README", "", mode=0o644)
    put(tmp_path, ".10-a.swp", "")
    (tmp_path / "30-folder").mkdir()
    assert hooks.found(str(tmp_path)) == [first, later]


def test_without_a_folder_there_are_none(tmp_path: Path) -> None:
    assert hooks.found(str(tmp_path / "none")) == []


def test_each_is_run_with_the_word_and_the_environment(tmp_path: Path) -> None:
    paths = [put(tmp_path, name, f'echo "{name} $* $UTILITYVM_NAME" >> {tmp_path}/said') for name in ("a", "b")]
    hooks.run(paths, hooks.CLONE, soon(), env={"UTILITYVM_NAME": "one"})
    assert (tmp_path / "said").read_text() == "a clone one\nb clone one\n"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo no key >&2; exit 3", "save ended with 3: no key"),
        ("exit 1", "save ended with 1$"),
        ("kill -9 $$", "save was ended by SIGKILL"),
        ("yes | head -c 100000; exit 1", r"save ended with 1: (y\n){400,499}y$"),
    ],
)
def test_one_that_fails_is_named_and_the_next_is_not_run(tmp_path: Path, script: str, said: str) -> None:
    bad, after = put(tmp_path, "10-bad", script), put(tmp_path, "20-after", f"touch {tmp_path}/after")
    with pytest.raises(Fault, match=rf"the hook {bad} {said}"):
        hooks.run([bad, after], hooks.SAVE, soon())
    assert not (tmp_path / "after").exists()


def test_one_that_cannot_be_run_is_named(tmp_path: Path) -> None:
    path = tmp_path / "10-bad"
    path.write_text("#!/no/such/interpreter\n")
    path.chmod(0o755)
    with pytest.raises(
        Fault, match=f"the hook {path} save cannot be run: the interpreter .* /no/such/interpreter, is missing"
    ):
        hooks.run([str(path)], hooks.SAVE, soon())


def test_one_that_takes_too_long_is_killed_with_what_it_started(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "alive")
    # Nobody writes to the pipe any more when all that had it open are gone.
    path = put(tmp_path, "10-slow", f"exec 3> {tmp_path}/alive; echo begun; sleep 1000 & sleep 1000")
    reader = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(Fault, match=r"did not end in time and was killed") as caught:
        hooks.run([path], hooks.SAVE, time.monotonic() + 0.3)
    assert caught.value.kind == "timeout"
    os.set_blocking(reader, True)
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_a_daemon_that_a_hook_leaves_holds_up_nobody(tmp_path: Path) -> None:
    path = put(tmp_path, "10-daemon", f"setsid sleep 1000 & echo $! > {tmp_path}/pid")
    hooks.run([path], hooks.CLONE, soon())
    os.kill(int((tmp_path / "pid").read_text()), 9)


def test_one_that_takes_too_long_is_killed_with_what_left_its_session(tmp_path: Path) -> None:
    daemon = f"setsid sh -c 'echo $$ > {tmp_path}/pid; exec sleep 1000' &"
    path = put(tmp_path, "10-slow", f"{daemon} until [ -s {tmp_path}/pid ]; do :; done; sleep 1000")
    with pytest.raises(Fault, match="did not end in time"):
        hooks.run([path], hooks.SAVE, time.monotonic() + 5)
    pid = int((tmp_path / "pid").read_text())
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with os.fdopen(fd):
        assert is_readable(fd, 20)
