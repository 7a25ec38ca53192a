"""A guest that freezes to become a template, and a clone that becomes itself, on the real kernel.

What needs a second VM that goes on from the first one's memory is in test_templates.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from filesystem_images import blank, filesystem_image
from in_guest import output
from utilityvm import ScratchKey, UtilityVM
from utilityvm.errors import GuestRefused, OutcomeUnknown
from utilityvm.machine.programs import find_program, run
from utilityvm.testing.images import ext4_image

Start = Callable[..., Awaitable[UtilityVM]]

pytestmark = pytest.mark.real

SEED = bytes(range(64))
MACHINE_ID = "0123456789abcdef" * 2
HOOKS = "/etc/utilityvm/template.d"
# A daemon: no program of the host's, so that it may go on in a template. It counts in memory what it wrote to the disk.
WRITER = """
setsid sh -c 'n=0; while :; do n=$((n + 1)); echo $n >> /data/log; echo $n > /tmp/written; done' > /dev/null 2>&1 &
while ! [ -e /tmp/written ]; do :; done
"""


async def put_hook(vm: UtilityVM, name: str, script: str) -> None:
    await output(
        vm, f"mkdir -p {HOOKS}; printf '#!/bin/sh\\n%s\\n' '{script}' > {HOOKS}/{name}; chmod +x {HOOKS}/{name}"
    )


def superblock(image: Path) -> str:
    return run([find_program("dumpe2fs", package="e2fsprogs"), "-h", image]).decode()


def check(image: Path) -> None:
    """The image is whole as it is, with nothing to replay. Raises CommandFailed."""
    assert "needs_recovery" not in superblock(image)
    run([find_program("e2fsck", package="e2fsprogs"), "-f", "-n", image])


def content(image: Path, name: str) -> str:
    """A file as it is on the disk itself: no journal is replayed."""
    return run([find_program("debugfs", package="e2fsprogs"), "-R", f"cat {name}", image]).decode()


def written_at(image: Path) -> int:
    return image.stat().st_mtime_ns


async def test_what_is_frozen_is_whole_on_the_host_and_its_writers_wait_until_it_is_thawed(
    vm_booted: UtilityVM, tmp_path: Path
) -> None:
    vm, image = vm_booted, ext4_image(tmp_path / "data.raw", {}, size_mib=64)
    mount = await vm.add_scsi(image, "/data")
    # A file system in a file of the other: frozen in the wrong order it would wait for itself.
    inner = "modprobe loop && truncate -s 16M /data/inner.img && mkfs.ext4 -q /data/inner.img && mkdir /tmp/inner"
    await output(vm, f"{inner} && mount -o loop /data/inner.img /tmp/inner && echo deep > /tmp/inner/file")
    await output(vm, WRITER)
    assert "needs_recovery" in superblock(image)
    await vm._guest.quiesce(timeout_s=60)
    frozen = tmp_path / "frozen.raw"
    shutil.copyfile(image, frozen)
    check(frozen)
    run([find_program("debugfs", package="e2fsprogs"), "-R", f"dump /inner.img {tmp_path}/inner.raw", frozen])
    check(tmp_path / "inner.raw")
    assert content(tmp_path / "inner.raw", "/file") == "deep\n"
    log = content(frozen, "/log").split()
    assert log == [str(number) for number in range(1, len(log) + 1)]
    await vm._guest.ping()
    check(image)
    assert content(image, "/log").split() == log, "somebody wrote to a disk that was frozen"
    await vm._guest.thaw(timeout_s=60)
    await output(vm, f"until [ $(cat /tmp/written) -gt {len(log)} ] 2> /dev/null; do :; done")
    await output(vm, "pkill -f /tmp/writte[n]; while pgrep -f /tmp/writte[n] > /dev/null; do :; done")
    await output(vm, "umount /tmp/inner; rm -r /tmp/written /tmp/inner")
    await mount.release()
    assert len(content(image, "/log").split()) > len(log)


async def test_every_kind_of_file_system_waits_but_one_that_cannot_and_is_told_of(
    vm_booted: UtilityVM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vm = vm_booted
    kinds = ("btrfs", "vfat")
    images = {kind: filesystem_image(kind, tmp_path / kind, {"some": "thing\n"}) for kind in kinds}
    mounts = [await vm.add_scsi(image, f"/{kind}") for kind, image in images.items()]
    images["crypt"] = blank(tmp_path / "crypt", 32)
    mounts.append(
        await vm.add_scsi(images["crypt"], "/crypt", encryption=ScratchKey(), ensure_filesystem=True, filesystem="ext4")
    )
    for kind in images:
        writing = f"n=0; while :; do n=$((n+1)); echo $n > /{kind}/count; sync /{kind}/count; touch /tmp/{kind}; done"
        await output(vm, f"setsid sh -c '{writing}' > /dev/null 2>&1 & while ! [ -e /tmp/{kind} ]; do :; done")
    await vm._guest.quiesce(timeout_s=60)
    told = [record.message for record in caplog.records if "cannot be frozen" in record.message]
    assert len(told) == 1
    assert told[0].startswith("/vfat ")
    before = {kind: written_at(image) for kind, image in images.items()}
    async with asyncio.timeout(60):
        while written_at(images["vfat"]) == before["vfat"]:
            await vm._guest.ping()
    assert [kind for kind, image in images.items() if written_at(image) != before[kind]] == ["vfat"]
    await vm._guest.thaw(timeout_s=60)
    async with asyncio.timeout(60):
        while any(written_at(image) == before[kind] for kind, image in images.items()):
            await vm._guest.ping()
    await output(vm, "pkill -f /coun[t]; while pgrep -f /coun[t] > /dev/null; do :; done")
    for mount in mounts:
        await mount.release()


async def test_hooks_are_told_and_one_that_refuses_leaves_the_vm_as_it_was(vm_booted: UtilityVM, disk: Path) -> None:
    vm = vm_booted
    mount = await vm.add_scsi(disk, "/data")
    await put_hook(vm, "10-note", "echo $1 >> /tmp/told")
    await put_hook(vm, "20-refuse", "[ $1 != save ] || { echo the database is busy; exit 7; }")
    with pytest.raises(GuestRefused, match=f"the hook {HOOKS}/20-refuse save ended with 7: the database is busy"):
        await vm._guest.quiesce(timeout_s=60)
    assert await output(vm, "echo more > /data/greeting; cat /tmp/told") == "save\nthaw\n"
    await output(vm, f"rm {HOOKS}/20-refuse")
    await vm._guest.quiesce(timeout_s=60)
    await vm._guest.thaw(timeout_s=60)
    assert await output(vm, f"cat /tmp/told; rm -r {HOOKS} /tmp/told") == "save\nthaw\nsave\nthaw\n"
    await mount.release()


async def test_a_clone_becomes_itself_as_programs_see_it_and_its_disks_stay(start: Start, disk: Path) -> None:
    vm = await start("becomes-itself")
    await vm.add_scsi(disk, "/data")
    ids = "cat /etc/machine-id /proc/sys/kernel/random/boot_id"
    before = (await output(vm, ids)).split()
    await put_hook(vm, "10-keys", '[ $1 = save ] || echo "$1 $UTILITYVM_NAME $UTILITYVM_MACHINE_ID" > /run/keys')
    await vm._guest.quiesce(timeout_s=60)
    assert (await vm._guest.mounts())[0]["MountPath"] == "/data"
    year_2033 = 2_000_000_000
    await vm._guest.make_unique(
        seed=SEED, hostname="clone-1", machine_id=MACHINE_ID, clock_ns=year_2033 * 10**9, timeout_s=60
    )
    machine_id, boot_id = (await output(vm, ids)).split()
    assert machine_id == MACHINE_ID
    assert boot_id == vm._guest.boot_id == (await vm._guest.info())["BootId"] not in before
    look_up = "python3 -c 'import socket; print(socket.gethostbyname(socket.gethostname()))'"
    assert await output(vm, f"hostname; cat /etc/hostname; {look_up}") == "clone-1\nclone-1\n127.0.0.1\n"
    assert await output(vm, "cat /run/keys") == f"clone clone-1 {MACHINE_ID}\n"
    assert 0 <= int(await output(vm, "date +%s")) - year_2033 < 3600
    await output(vm, "cat /data/greeting && echo more > /data/more && sync /data/more")

    # Once more, as for a clone that had waited: now with the host's clock, and no second mount over the boot id.
    await vm._guest.make_unique(seed=SEED, hostname="clone-2", machine_id=MACHINE_ID[::-1], timeout_s=60)
    assert (await output(vm, ids)).split() == [MACHINE_ID[::-1], vm._guest.boot_id]
    assert await output(vm, "hostname; grep -c boot_id /proc/self/mountinfo") == "clone-2\n1\n"
    assert abs(int(await output(vm, "date +%s")) - time.time()) < 3600

    # An agent that dies while all is frozen is started again, and thaws.
    await output(
        vm,
        "setsid sh -c 'until grep -q 1 /run/utilityvm/frozen; do :; done; kill -9 '$PPID > /dev/null 2>&1 &",
    )
    with contextlib.suppress(OutcomeUnknown):
        await vm._guest.quiesce(timeout_s=60)
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(GuestRefused, OutcomeUnknown):  # the old one, while it lives, and its end
                assert await output(vm, "echo again > /data/again; sync /data/again; cat /data/more") == "more\n"
                break


async def test_who_the_system_is_stands_in_files_that_need_no_disk(vm_booted: UtilityVM, tmp_path: Path) -> None:
    look = (
        "import os; from utilityvm.agent.identity import ThisKernel;"
        "print([ThisKernel().is_in_memory(os.open(path, os.O_RDONLY)) for path in"
        " ('/etc/hostname', '/run/utilityvm/mounts.json', '/data')])"
    )
    async with vm_booted.add_scsi(ext4_image(tmp_path / "disk.raw", {}), "/data"):
        done = await vm_booted.run(["python3", "-c", look])
    assert done.stdout == b"[True, True, False]\n", done.stderr
