"""Races that a hostile neighbour of root's runs, hundreds of times each. Inotify watches what must not be opened.

`./dev races [ROUNDS]` (500 unless told), as root. An image's header changes while it is attached, once behind the walls
and once without them; a folder on the way to a disk, and a VM's runtime folder, are swapped for those of another user.
Prints a row for each race, and fails if what nobody gave was opened, or was used.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/helpers"))

from figures import table
from utilityvm import UtilityVMError
from utilityvm.hosts.qemu import QemuConfig, QemuHost
from utilityvm.machine import runtime
from utilityvm.machine.programs import find_program, run
from utilityvm.scsi.ports import DiskFormat, DiskRequest
from utilityvm.scsi.slot import Slot
from watched import Watched

NOBODY: Final = 65534
HEAD: Final = 65536
SECRET: Final = b"SECRET OF THE HOST" * 60_000
_EXCHANGE: Final = 2  # renameat2: the two names change places
_T: Final = 60.0
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def running(act: Callable[[], None]) -> Iterator[None]:
    """`act` is done again and again, by a thread, until the block ends."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            act()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def exchange(one: Path, other: Path) -> None:
    at = -100  # AT_FDCWD
    if _libc.renameat2(at, os.fsencode(one), at, os.fsencode(other), _EXCHANGE) < 0:
        raise OSError(ctypes.get_errno(), "renameat2", str(one))


def qemu_img(*words: object) -> None:
    run([find_program("qemu-img", package="qemu-utils"), *map(str, words)])


def heads(kind: str, secret: Path, folder: Path) -> tuple[DiskFormat, Path, bytes]:
    """The format, a plain image of it, and the head that makes it one with the secret in it."""
    plain, other = folder / "plain", folder / "other"
    if kind == "qcow2 data file":
        qemu_img("create", "-q", "-f", "qcow2", plain, "1M")
        qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={secret},data_file_raw=on", other, "1M")
        secret.write_bytes(SECRET)  # which qemu-img made anew
        return DiskFormat.QCOW2, plain, other.read_bytes()[:HEAD]
    if kind == "qcow2 backing file":
        qemu_img("create", "-q", "-f", "qcow2", plain, "1M")
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", secret, "-F", "raw", other, "1M")
        return DiskFormat.QCOW2, plain, other.read_bytes()[:HEAD]
    assert kind == "VMDK extent"
    qemu_img("create", "-q", "-f", "vmdk", plain, "1M")
    text = '# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
    text += f'RW 2048 FLAT "{secret}" 0\n'
    return DiskFormat.VMDK, plain, text.encode().ljust(HEAD, b"\0")


async def headers(kind: str, confinement: str, rounds: int, folder: Path) -> list[object]:
    secret, disk = folder / "secret", folder / "disk"
    secret.write_bytes(SECRET)
    format, plain, bad = heads(kind, secret, folder)
    secret.chmod(0o666)
    shutil.copyfile(plain, disk)
    good, seen, used = disk.read_bytes()[:HEAD].ljust(HEAD, b"\0"), Counter[str](), 0
    fd = os.open(disk, os.O_RDWR)

    def flip() -> None:
        for head in (good, bad):
            os.pwrite(fd, head, 0)
            time.sleep(0.001)

    host = await QemuHost.start(
        QemuConfig(name="races", memory_mib=64, confinement=confinement), folder=folder / "races"
    )
    watched = Watched(secret)
    try:
        with running(flip):
            for number in range(rounds):
                name = f"r{number}"
                try:
                    taken = await host.open(DiskRequest(host_path=str(disk), read_only=True, format=format))
                    try:
                        await host.attach(Slot(0, 1), taken, attachment=name, timeout_s=_T)
                    finally:
                        taken.close()
                except UtilityVMError as error:
                    seen[type(error).__name__] += 1
                else:
                    seen["attached"] += 1
                    used += _has_open(host.process.pid, secret)
                    await host.detach(Slot(0, 1), attachment=name, timeout_s=_T)
                used += _has_open(host.process.pid, secret)
    finally:
        os.close(fd)
        await host.stop()
    # Without the walls QEMU opens what the header names; that it is undone at once is what is asked then.
    touched = watched.was_opened()
    walls = "without walls" if confinement == "off" else "behind the walls"
    failed = bool(used) or (touched and confinement != "off")
    return [f"{kind}, {walls}", rounds, _told(seen), _word(touched), used, _word(failed)]


def _has_open(pid: int, path: Path) -> int:
    found = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found += link.readlink() == path
        except FileNotFoundError:
            continue
    return found


async def paths(rounds: int, folder: Path) -> list[object]:
    """A folder on the way to the disk is ours, or a link of another user's that leads elsewhere."""
    ours, theirs, elsewhere = folder / "way", folder / "link", folder / "elsewhere"
    for one in (ours, elsewhere):
        one.mkdir()
        (one / "disk.raw").write_bytes(SECRET[: 1 << 20])
    theirs.symlink_to(elsewhere)
    os.lchown(theirs, NOBODY, NOBODY)
    watched, seen, wrong = Watched(elsewhere / "disk.raw"), Counter[str](), 0
    real = (ours / "disk.raw").stat().st_ino
    host = await QemuHost.start(QemuConfig(name="races", memory_mib=64), folder=folder / "races")
    try:
        with running(lambda: exchange(ours, theirs)):
            for _ in range(rounds):
                try:
                    taken = await host.open(DiskRequest(host_path=str(ours / "disk.raw"), read_only=True))
                except UtilityVMError as error:
                    seen[type(error).__name__] += 1
                else:
                    seen["opened ours"] += 1
                    wrong += f"{real}" not in taken.identity
                    taken.close()
    finally:
        await host.stop()
    touched = watched.was_opened()
    return ["a link of another user's on the way", rounds, _told(seen), _word(touched), wrong, _word(touched or wrong)]


async def runtime_folder(rounds: int, folder: Path) -> list[object]:
    """A VM's runtime folder is ours, or another user's with a record and a socket in it."""
    vms = folder / "vms"
    vms.mkdir(mode=0o700)
    ours, theirs = vms / "one", vms / "planted"
    listeners = []
    for one, text in ((ours, b"ours"), (theirs, b"planted")):
        one.mkdir(mode=0o700)
        (one / "vm.json").write_bytes(text)
        listener = socket.socket(socket.AF_UNIX)
        with runtime.entered(one) as here:
            listener.bind(str(here / "qmp0.sock"))
        listener.listen(1024)
        listener.setblocking(False)
        listeners.append(listener)
    for path in (theirs, *theirs.iterdir()):
        os.chown(path, NOBODY, NOBODY)
    watched, seen, wrong = Watched(theirs / "vm.json"), Counter[str](), 0
    with running(lambda: exchange(ours, theirs)):
        for _ in range(rounds):
            try:
                wrong += runtime.record(vms / "one", "vm.json") != b"ours"
                with socket.socket(socket.AF_UNIX) as client, runtime.socket_in(vms / "one/qmp0.sock") as path:
                    client.connect(str(path))
                seen["ours"] += 1
            except UtilityVMError as error:
                seen[type(error).__name__] += 1
    try:
        listeners[1].accept()
        wrong += 1
    except BlockingIOError:
        pass
    for listener in listeners:
        listener.close()
    touched = watched.was_opened()
    return ["a runtime folder of another user's", rounds, _told(seen), _word(touched), wrong, _word(touched or wrong)]


def _word(is_so: object) -> str:
    return "yes" if is_so else "no"


def _told(seen: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in seen.most_common())


async def main(rounds: int) -> int:
    rows: list[list[object]] = []

    async def add(race: Callable[[Path], Awaitable[list[object]]]) -> None:
        with tempfile.TemporaryDirectory(prefix="uvm-races-") as name:
            Path(name).chmod(0o755)  # or QEMU's user could not reach the secret, whatever it does
            rows.append(await race(Path(name)))

    for kind in ("qcow2 data file", "qcow2 backing file", "VMDK extent"):
        for confinement in ("auto", "off"):
            await add(partial(headers, kind, confinement, rounds))
    await add(partial(paths, rounds))
    await add(partial(runtime_folder, rounds))
    table(("race", "rounds", "outcomes", "the other was opened", "was kept or used", "failed"), rows)
    return 1 if any(row[-1] == "yes" for row in rows) else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=500)
    if os.geteuid() != 0:
        sys.exit("the races are of root and another user: run it as root")
    sys.exit(asyncio.run(main(parser.parse_args().rounds)))
