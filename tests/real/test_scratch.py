"""Scratch disks: made, used, and removed with their last release or with the VM."""

from __future__ import annotations

from pathlib import Path

import pytest

from real_vms import Start, Uvm
from utilityvm import GuestPathInUse, InvalidRequest, NotAttached, UtilityVM
from utilityvm.machine import paths


def images(vm: UtilityVM) -> list[Path]:
    return sorted(paths.overlays_dir(vm.uuid).glob("scratch-*"))


async def output(vm: UtilityVM, command: str) -> str:
    return (await vm.run(["sh", "-c", command], text=True, check=True)).stdout


async def test_a_scratch_disk_is_empty_and_goes_with_its_last_release(vm_booted: UtilityVM) -> None:
    async with vm_booted.add_scratch(32 << 20, "/data") as scratch:
        assert await output(vm_booted, "ls /data; echo 1 > /data/one; stat -f -c %T /data") == "lost+found\next2/ext3\n"
        assert images(vm_booted) == [scratch.host_path]
        shared = await vm_booted.add_scsi(scratch.host_path, "/data", ensure_filesystem=True)
    assert images(vm_booted) == [scratch.host_path], "somebody else still has it"
    await vm_booted.remove_scsi("/data")
    assert not vm_booted.scsi_slots()
    assert not images(vm_booted)
    assert shared.ref_count == 0


async def test_a_scratch_disk_that_is_refused_leaves_no_image(vm_booted: UtilityVM) -> None:
    for size_bytes, guest_path in ((1000, "/data"), (0, "/data"), (32 << 20, "/etc"), (32 << 20, "relative")):
        with pytest.raises(InvalidRequest):
            await vm_booted.add_scratch(size_bytes, guest_path)
    async with vm_booted.add_scratch(32 << 20, "/data"):
        with pytest.raises(GuestPathInUse):
            await vm_booted.add_scratch(32 << 20, "/data")
        assert len(images(vm_booted)) == 1
    assert not images(vm_booted)


async def test_the_next_owner_keeps_what_is_used_and_a_clone_has_what_was_saved(start: Start, uvm: Uvm) -> None:
    vm = await start("scratch", keep=True)
    await vm.add_scratch(32 << 20, "/data", holder="job")
    (image,) = images(vm)
    await vm.close()
    left = image.with_name("scratch-left.raw")  # of an owner that died before it was attached
    left.touch()
    made = uvm("attach", "scratch", "scratch:16M:/more")
    assert made.returncode == 0, made.stderr
    assert len(images(vm)) == 2
    assert not left.exists()
    assert uvm("path", "scratch", "/more").stdout == "/more\n"
    assert uvm("detach", "scratch", "/more").returncode == 0
    assert images(vm) == [image]

    async with UtilityVM.open("scratch") as vm:
        await output(vm, "echo kept > /data/file; sync /data/file")
        template = await vm.save_as_template("scratched")
    assert not image.parent.exists()
    try:
        ((saved, *_),) = [disk.host_paths for disk in template.disks]
        async with UtilityVM.clone("scratched", "cloned") as clone:
            assert await output(clone, "cat /data/file") == "kept\n"
            assert str(clone.scsi_guest_path(saved)) == "/data", "known by the template's path"
            assert uvm("path", "cloned", saved).stdout == "/data\n"
            await clone.remove_scsi(saved)
            with pytest.raises(NotAttached):
                await clone.find_scsi(saved)
    finally:
        assert uvm("template", "rm", "scratched").returncode == 0
