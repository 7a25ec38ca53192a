"""What programs find in the VM."""

from __future__ import annotations

import pytest

from utilityvm import UtilityVM

pytestmark = pytest.mark.real

COMMANDS = (
    "awk basename bash blkid cat chmod cp cut date dd df diff dirname du env find free grep gzip head id kill less ln "
    "ls lsblk mkdir mkfs.ext4 mkfs.xfs modprobe mount mv nc od ps python3 readlink rm sed sh sha256sum sort stat sync "
    "tail tar tee test top touch tr umount uname unzip vi wc wget which xargs"
)


async def output(vm: UtilityVM, script: str) -> str:
    result = await vm.run(["sh", "-c", script])
    assert result.exit_code == 0, result.stderr.decode()
    return result.stdout.decode()


async def test_the_usual_commands_are_there(vm_booted: UtilityVM) -> None:
    assert await output(vm_booted, f"for name in {COMMANDS}; do which $name > /dev/null || echo $name; done") == ""


async def test_the_root_is_writable_and_its_disk_is_not(vm_booted: UtilityVM) -> None:
    await output(vm_booted, "echo text > /usr/written && cat /usr/written && rm /usr/written")
    assert (await output(vm_booted, "cat /sys/block/sda/ro")).strip() == "1"


async def test_every_user_may_write_to_tmp_and_nobody_gains_rights(vm_booted: UtilityVM) -> None:
    assert await output(vm_booted, "stat -c %a /tmp /var/tmp") == "1777\n1777\n"
    assert await output(vm_booted, "find / -xdev -perm /6000 -type f") == ""
    await output(vm_booted, "setpriv --reuid 65534 --regid 65534 --clear-groups sh -c 'echo x > /tmp/a'; rm /tmp/a")


async def test_the_modules_for_disks_load(vm_booted: UtilityVM) -> None:
    await output(
        vm_booted, "modprobe -a dm-mod dm-crypt dm-verity loop xfs btrfs erofs squashfs isofs vfat nls_ascii fuse"
    )


async def test_python_is_whole_and_compiled(vm_booted: UtilityVM) -> None:
    names = "asyncio, ctypes, decimal, hashlib, json, lzma, socket, sqlite3, ssl, subprocess, tarfile, zoneinfo"
    await output(vm_booted, f"python3 -c 'import {names}'")
    script = "python3 -v -c 'import json, subprocess' 2>&1 | grep -c 'code object from /usr/lib' || true"
    assert await output(vm_booted, script) == "0\n", "a module was compiled in the VM"
    script = "python3 -v -c 'import json, subprocess' 2>&1 | grep -c 'code object from .*pyc' || true"
    assert int(await output(vm_booted, script)) > 5


async def test_users_and_hosts_have_names(vm_booted: UtilityVM) -> None:
    assert await output(vm_booted, "id -un; id -un 65534; cat /etc/hostname") == f"root\nnobody\n{vm_booted.name}\n"
    assert "127.0.0.1" in await output(vm_booted, "getent hosts localhost || cat /etc/hosts")


async def test_a_small_vm_boots_and_works(start: object) -> None:
    vm: UtilityVM = await start("small", memory_mib=128)  # type: ignore[operator]
    free = int((await output(vm, "awk '/MemAvailable/ {print $2}' /proc/meminfo")).strip())
    assert free > 32 * 1024
