"""The gate to the runtime folder: nothing in it is used that is not ours."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from utilityvm.errors import SetupError
from utilityvm.machine import runtime, sockets
from utilityvm.machine.sockets import Listener

STRANGER = 5555

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run/vms/one"
    folder.mkdir(parents=True, mode=0o700)
    (folder / "vm.json").write_text("{}")
    return folder


@pytest.fixture
def listening(folder: Path) -> Iterator[Path]:
    path = folder / "qmp0.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(4)
        yield path


async def uses(folder: Path) -> None:
    """All ways in."""
    for use in (runtime.vm_folders, lambda one: runtime.record(one, "vm.json")):
        with pytest.raises(SetupError):
            use(folder)
    with pytest.raises(SetupError):
        await sockets.connect(folder / "qmp0.sock", timeout_s=1)


async def test_what_is_ours_is_used(folder: Path, listening: Path) -> None:
    assert runtime.record(folder, "vm.json") == b"{}"
    assert runtime.vm_folders(folder.parent) == [folder]
    (await sockets.connect(listening, timeout_s=5)).close()


@as_root
@pytest.mark.parametrize("part", [".", "..", "../.."])
async def test_a_folder_of_another_user_is_not_entered(folder: Path, listening: Path, part: str) -> None:
    os.chown(folder / part, STRANGER, STRANGER)
    await uses(folder)


@pytest.mark.parametrize("part", [".", "..", "../.."])
async def test_a_folder_that_others_may_write_to_is_not_entered(folder: Path, listening: Path, part: str) -> None:
    (folder / part).chmod(0o777)
    await uses(folder)


async def test_a_link_in_the_place_of_the_folder_is_not_entered(folder: Path, listening: Path) -> None:
    link = folder.with_name("two")
    link.symlink_to(folder)
    await uses(link)


@as_root
async def test_a_file_or_socket_of_another_user_is_not_used(folder: Path, listening: Path) -> None:
    for path in (folder / "vm.json", listening):
        os.chown(path, STRANGER, STRANGER)
    with pytest.raises(SetupError):
        runtime.record(folder, "vm.json")
    with pytest.raises(SetupError):
        await sockets.connect(listening, timeout_s=1)


def test_nothing_is_made_where_others_could_replace_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(SetupError):
        runtime.make(tmp_path / "run/vms/one")
    assert not list(tmp_path.iterdir())


def test_a_record_behind_a_link_is_not_read(folder: Path) -> None:
    (folder / "linked").symlink_to("vm.json")
    with pytest.raises(OSError, match="symbolic links"):
        runtime.record(folder, "linked")


@as_root
@pytest.mark.parametrize("known", [False, True])
async def test_a_process_of_another_user_is_not_talked_to_unless_it_is_the_vms(folder: Path, known: bool) -> None:
    path = folder / "agent.sock"
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            os.setuid(STRANGER)
            listener.listen(1)
            os.write(told, b"x")
            while True:
                listener.accept()
    await asyncio.to_thread(os.read, ready, 1)
    try:
        if known:
            (await sockets.connect(Listener(path, STRANGER, pid), timeout_s=5)).close()
        else:
            for expected in (Listener(path), Listener(path, STRANGER, pid + 1), Listener(path, STRANGER + 1)):
                with pytest.raises(SetupError, match=f"user {STRANGER}"):
                    await sockets.connect(expected, timeout_s=5)
    finally:
        os.kill(pid, 9)
        await asyncio.to_thread(os.waitpid, pid, 0)
        os.close(ready)
        os.close(told)
