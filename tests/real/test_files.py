"""Files on their way to a real guest and back."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from real_vms import Start, Uvm
from utilityvm import GuestRefused, SCSIMount, UnsafePath, UtilityVM

pytestmark = pytest.mark.real


async def test_a_tree_goes_there_and_back_as_it_is(vm_booted: UtilityVM, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "a/b").mkdir(parents=True)
    (tree / "a/b/run").write_text("#!/bin/sh\necho ran\n")
    (tree / "a/b/run").chmod(0o751)
    (tree / "link").symlink_to("a/b/run")
    with (tree / "sparse").open("wb") as file:
        file.seek(32 << 20)
        file.write(b"end")
    os.utime(tree / "a", ns=(1, 1_500_000_000_123_456_789))
    sent = await vm_booted.put(tree, "/tmp")
    assert (sent.files, sent.folders, sent.links) == (2, 3, 1)
    look = "/tmp/tree/link; stat -c %a /tmp/tree/a/b/run; stat -c %.9Y /tmp/tree/a; du -k /tmp/tree/sparse | cut -f1"
    looked = (await vm_booted.run(["sh", "-c", look], text=True, check=True)).stdout.split()
    assert looked[:3] == ["ran", "751", "1500000000.123456789"]
    assert int(looked[3]) < 1024
    await vm_booted.get("/tmp/tree", tmp_path / "back")
    assert (tmp_path / "back/a").stat().st_mtime_ns == 1_500_000_000_123_456_789
    assert (tmp_path / "back/a/b/run").read_text() == "#!/bin/sh\necho ran\n"
    assert (tmp_path / "back/sparse").stat().st_size == (32 << 20) + 3
    assert (tmp_path / "back/sparse").stat().st_blocks * 512 < 1 << 20
    await vm_booted.run(["ln", "-s", "/etc/passwd", "/tmp/tree/out"], check=True)
    with pytest.raises(UnsafePath):
        await vm_booted.get("/tmp/tree", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    await vm_booted.run(["rm", "-r", "/tmp/tree"], check=True)


async def test_a_full_disk_in_the_guest_leaves_nothing_of_the_copy(
    vm_booted: UtilityVM, vm_with_disk: SCSIMount
) -> None:
    data = os.urandom(1 << 20)
    with pytest.raises(GuestRefused, match="No space left"):
        await vm_booted.write_bytes("/data/much", data * 20)
    listed = await vm_booted.run(["ls", "-A", "/data"], text=True)
    assert set(listed.stdout.split()) == {"greeting", "lost+found"}
    assert await vm_booted.read_bytes("/data/greeting") == b"hello\n"


async def test_the_command_copies_and_pipes(start: Start, uvm: Uvm, tmp_path: Path) -> None:
    vm = await start("copying", keep=True)
    await vm.close()
    (tmp_path / "file").write_text("from here")
    done = await asyncio.to_thread(uvm, "cp", tmp_path / "file", "copying:/tmp/")
    assert (done.returncode, done.stderr) == (0, "")
    done = await asyncio.to_thread(uvm, "cp", "-", "copying:/tmp/piped", input="from a pipe")
    assert done.returncode == 0, done.stderr
    done = await asyncio.to_thread(uvm, "cp", "copying:/tmp/piped", "-")
    assert done.stdout == "from a pipe"
    done = await asyncio.to_thread(uvm, "cp", "copying:/tmp/.", tmp_path / "all")
    assert (tmp_path / "all/file").read_text() == "from here", done.stderr
    done = await asyncio.to_thread(uvm, "cp", "copying:/nowhere", tmp_path / "none")
    assert done.returncode == 1
    assert "/nowhere: No such file" in done.stderr
