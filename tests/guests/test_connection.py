from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from utilityvm.errors import DeadlineExceeded, NotSupported, UtilityVMError, VMGone
from utilityvm.guests.connection import Dial, Listen, VsockAddress


async def test_one_dials_and_the_other_listens(folder: Path) -> None:
    listen = Listen(folder / "a.sock")
    (one, one_writer), (other, other_writer) = await asyncio.gather(
        Dial(folder / "a.sock").open(timeout_s=20, vm=None), listen.open(timeout_s=20, vm=None)
    )
    one_writer.write(b"a")
    other_writer.write(b"b")
    assert (await other.readexactly(1), await one.readexactly(1)) == (b"a", b"b")
    for writer in (one_writer, other_writer):
        writer.close()
        await writer.wait_closed()
    listen.close()
    listen.close()
    assert not (folder / "a.sock").exists()


async def test_a_guest_that_does_not_dial_is_a_deadline(folder: Path) -> None:
    listen = Listen(folder / "a.sock")
    with pytest.raises(DeadlineExceeded, match=r"a\.sock within 0\.01 s"):
        await listen.open(timeout_s=0.01, vm="one")
    listen.close()


async def test_an_address_that_was_given_up_is_dialled_by_nobody(folder: Path) -> None:
    listen = Listen(folder / "a.sock")
    listen.close()
    with pytest.raises(VMGone, match=r"a\.sock"):
        await listen.open(timeout_s=20, vm="one")


async def test_an_address_that_is_taken_is_refused(folder: Path) -> None:
    listen = Listen(folder / "a.sock")
    with pytest.raises(OSError, match="in use"):
        Listen(folder / "a.sock")
    listen.close()


@pytest.fixture
def vsock() -> None:
    try:
        socket.socket(socket.AF_VSOCK).close()
    except (AttributeError, OSError):
        pytest.skip("this system has no vsock")


async def test_a_vsock_where_nobody_answers_is_an_error_in_time(vsock: None) -> None:
    with pytest.raises((VMGone, DeadlineExceeded), match="vsock 999:0x40000000"):
        await Dial(VsockAddress(999)).open(timeout_s=0.1, vm=None)


async def test_a_guest_that_does_not_dial_a_vsock_is_a_deadline(vsock: None) -> None:
    listen = Listen(VsockAddress(3, 0x40000123))
    with pytest.raises(DeadlineExceeded, match="vsock 3:0x40000123"):
        await listen.open(timeout_s=0.01, vm=None)
    listen.close()


async def test_one_dials_and_the_other_listens_on_vsock(vsock: None) -> None:
    local = 1  # linux/vm_sockets.h, VMADDR_CID_LOCAL
    listen = Listen(VsockAddress(local, 0x40000124))
    try:
        opening = asyncio.create_task(listen.open(timeout_s=1, vm=None))
        _, writer = await Dial(VsockAddress(local, 0x40000124)).open(timeout_s=1, vm=None)
    except UtilityVMError:
        opening.cancel()
        pytest.skip("this kernel has no vsock loopback")
    else:
        reader, other_writer = await opening
        writer.write(b"a")
        assert await reader.readexactly(1) == b"a"
        for each in (writer, other_writer):
            each.close()
            await each.wait_closed()
    finally:
        listen.close()


async def test_a_system_without_vsock_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "AF_VSOCK", raising=False)
    with pytest.raises(NotSupported, match="vsock"):
        Listen(VsockAddress(3))
    with pytest.raises(UtilityVMError, match="vsock"):
        await Dial(VsockAddress(3)).open(timeout_s=1, vm=None)
