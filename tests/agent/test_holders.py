"""Who uses a mount or a device is found in /proc, /sys and the table of mounts, and named so that it can be ended."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fake_mounts import FakeMounts
from fake_proc import FakeProc
from utilityvm.agent import btrfs, holders, mountinfo

DISK, PART, OTHER = (8, 16), (8, 17), (8, 32)
_FILES, _IS_FREE, _MOUNT_ID, _NUMBER = holders._files, holders.is_free, holders._mount_id, holders._number


class Guest:
    """Disks sdb (with the partition sdb1) and sdc, a folder to mount at, and processes."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel = FakeMounts(folder).install(monkeypatch)
        self.proc = FakeProc(self.kernel.proc)
        self.sys = self.kernel.sys
        self.loops: dict[str, tuple[int, int]] = {}
        self.dev = folder / "dev"
        self.dev.mkdir()
        self.sdb, self.sdb1, self.sdc = (self._device(*one) for one in (("sdb", DISK), ("sdb1", PART), ("sdc", OTHER)))
        self.data = folder / "data"
        self.data.mkdir()
        self.path = str(self.data)
        monkeypatch.setattr(holders, "_number", lambda path: self.kernel.numbers.get(os.path.realpath(path)))
        monkeypatch.setattr(holders, "_mount_id", lambda path: self.kernel._mount_id(os.path.realpath(path)))
        monkeypatch.setattr(holders, "_files", _FILES)
        monkeypatch.setattr(holders, "_loop_info", lambda node: self.loops[Path(node).name])
        monkeypatch.setattr(btrfs, "fellows", lambda node: [])
        for name in ("block/sdb/sdb1", "block/sdc"):
            (self.sys / name).mkdir(parents=True)
        (self.sys / "block/sdb/sdb1/partition").write_text("1\n")
        for number, name in ((DISK, "sdb"), (OTHER, "sdc")):
            (self.sys / f"dev/block/{number[0]}:{number[1]}").symlink_to(self.sys / "block" / name)

    def _device(self, name: str, number: tuple[int, int]) -> str:
        node = self.dev / name
        node.touch()
        self.kernel.device(str(node), number)
        return str(node)

    def mount(self, node: str = "", path: str = "", filesystem: str = "ext4", **more: str) -> int:
        return self.kernel.add(path or self.path, filesystem, node or self.sdb, **more).id  # type: ignore[arg-type]

    def mount_btrfs(self, node: str, path: str) -> None:
        """A btrfs has a number of its own, and is known by one of the disks that it is on."""
        number = self.kernel.numbers.pop(node)
        self.mount(node, path, "btrfs")
        self.kernel.device(node, number)

    def loop(self, name: str, *, file_on: int = 0, device: tuple[int, int] = (0, 0)) -> None:
        """A loop device on a file of a file system, or on a device."""
        (self.sys / f"block/{name}/loop").mkdir(parents=True)
        self.loops[name] = file_on, os.makedev(*device)

    def mapping(self, disk: str, holder: str, name: str = "") -> None:
        (self.sys / f"block/{disk}/holders/{holder}").mkdir(parents=True)
        if name:
            (self.sys / f"block/{disk}/holders/{holder}/dm").mkdir()
            (self.sys / f"block/{disk}/holders/{holder}/dm/name").write_text(f"{name}\n")

    def of_disk(self) -> list[str]:
        return holders.of_device(self.sdb, str(self.sys / "block/sdb"), {DISK, PART})


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guest:
    return Guest(tmp_path, monkeypatch)


def line(
    number: tuple[int, int], path: str, *, filesystem: str = "ext4", source: str = "/dev/sdb", more: str = ""
) -> str:
    return f"900 1 {number[0]}:{number[1]} / {path} rw shared:1 - {filesystem} {source} rw{more}\n"


# Of a mount.


def test_a_path_where_nothing_is_mounted_is_used_by_nobody(guest: Guest) -> None:
    guest.proc.process(7, "sh", cwd=guest.path)
    assert holders.of_mount(guest.path) == []


def test_a_mount_that_nobody_uses_has_no_users(guest: Guest) -> None:
    guest.mount()
    guest.mount(guest.sdc, f"{guest.path}2")
    guest.proc.process(7, "sh", cwd=f"{guest.path}2", opened={3: (f"{guest.path}2/x", 99)})
    guest.proc.sockets(f"{guest.path}2/x", "")
    guest.proc.swaps("/dev/null")
    assert holders.of_mount(guest.path) == []


def test_mounts_below_a_mount_are_named_first(guest: Guest) -> None:
    guest.mount()
    guest.mount(guest.sdc, f"{guest.path}/in/it", "xfs")
    guest.proc.process(7, "sh", cwd=guest.path)
    assert holders.of_mount(guest.path) == [
        f"xfs mounted at {guest.path}/in/it",
        f"process 7 (sh) has its working folder there: {guest.path}",
    ]


@pytest.mark.parametrize(
    ("link", "said"), [("cwd", "its working folder"), ("root", "its root"), ("exe", "its program")]
)
def test_a_process_that_stands_in_it_or_runs_from_it_uses_it(guest: Guest, link: str, said: str) -> None:
    guest.mount()
    links: Any = {link: guest.path}
    guest.proc.process(7, "a (b", **links)
    assert holders.of_mount(guest.path) == [f"process 7 (a (b) has {said} there: {guest.path}"]


def test_what_a_process_has_open_or_mapped_is_named_once(guest: Guest) -> None:
    mount = guest.mount()
    opened = {3: (f"{guest.path}/b", mount), 4: ("/etc/passwd", 1), 5: (f"{guest.path}/a", mount)}
    mapped = [f"{guest.path}/{name}" for name in ("lib", "a", "prog", "lib")]
    guest.proc.process(7, "cat", exe=f"{guest.path}/prog", opened=opened, mapped=[*mapped, "/lib/libc.so"])
    has = "process 7 (cat) has"
    assert holders.of_mount(guest.path) == [
        f"{has} its program there: {guest.path}/prog",
        f"{has} {guest.path}/a open",
        f"{has} {guest.path}/b open",
        f"{has} {guest.path}/lib in its memory",
    ]


def test_of_two_mounts_at_a_path_the_users_are_of_the_one_that_is_seen(guest: Guest) -> None:
    below = guest.mount()
    above = guest.mount(guest.sdc)
    guest.proc.process(7, "old", opened={3: (f"{guest.path}/a", below)})
    guest.proc.process(8, "new", opened={3: (f"{guest.path}/a", above)})
    assert holders.of_mount(guest.path) == [f"process 8 (new) has {guest.path}/a open"]


def test_a_descendant_is_looked_at_and_we_ourselves_are_not(guest: Guest) -> None:
    mount = guest.mount()
    opened = {3: (f"{guest.path}/a", mount)}
    guest.proc.process(os.getpid(), "agent", opened=opened)
    guest.proc.process(3_000_001, "sh", parent=os.getpid())
    guest.proc.process(3_000_002, "cat", parent=3_000_001, opened=opened)
    assert holders.of_mount(guest.path) == [f"process 3000002 (cat) has {guest.path}/a open"]


def test_a_process_that_ends_meanwhile_hides_no_other(guest: Guest) -> None:
    mount = guest.mount()
    guest.proc.process(7, "gone", opened={3: (f"{guest.path}/a", mount)})
    guest.proc.process(8, "here", opened={3: (f"{guest.path}/a", mount)})
    guest.proc.end(7)
    assert holders.of_mount(guest.path) == [f"process 8 (here) has {guest.path}/a open"]


@pytest.mark.parametrize("is_last", [False, True])
def test_a_thread_that_has_files_of_its_own_is_found(guest: Guest, is_last: bool) -> None:
    mount = guest.mount()
    guest.proc.process(7, "worker", opened={3: ("/etc/passwd", 1)})
    guest.proc.thread(7, 70, {3: (f"{guest.path}/a", mount)}, is_last=is_last)
    assert holders.of_mount(guest.path) == [f"process 7 (worker) has {guest.path}/a open"]


def test_a_device_that_only_a_later_thread_has_open_is_found(guest: Guest) -> None:
    guest.proc.process(7, "worker")
    guest.proc.thread(7, 70, {3: (guest.sdb, 1)}, is_last=True)
    assert guest.of_disk() == [f"process 7 (worker) has {guest.sdb} open"]


def test_what_a_process_without_its_first_thread_has_open_is_found(tmp_path: Path) -> None:
    """As the kernel shows it: the folder of such a process has no files."""
    script = """
import ctypes, sys, threading
file = open(sys.argv[1], "w")
threading.Thread(target=sys.stdin.read).start()
print("open", flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        until = time.monotonic() + 20
        while holders._entries(f"/proc/{process.pid}/fd") and time.monotonic() < until:
            time.sleep(0.01)
        found = [
            use for base in holders._bases(process.pid) for use in holders._uses(base, holders._mount_id(str(tmp_path)))
        ]
        process.kill()
    assert f"{tmp_path}/file open" in found


def test_a_loop_device_on_a_file_of_it_uses_it_and_one_elsewhere_does_not(guest: Guest) -> None:
    guest.mount()
    guest.loop("loop1", file_on=os.makedev(*DISK))
    guest.loop("loop0", file_on=guest.data.stat().st_dev)
    guest.loop("loop2", file_on=os.makedev(*OTHER))
    (guest.sys / "block/loop3").mkdir()  # without a file
    said = "a loop device on a file of it"
    assert holders.of_mount(guest.path) == [f"loop0, {said}", f"loop1, {said}"]


def test_a_swap_file_on_it_uses_it(guest: Guest) -> None:
    guest.mount()
    (guest.data / "swap file").touch()
    guest.proc.swaps(f"{guest.path}/swap\\040file", f"{guest.path}/none", guest.path)
    assert holders.of_mount(guest.path) == [f"swap in {guest.path}/swap file"]


def test_a_socket_with_a_name_in_it_uses_it(guest: Guest) -> None:
    guest.mount()
    guest.proc.sockets("", "@abstract", f"{guest.path}/a b.sock", f"{guest.path}.sock")
    assert holders.of_mount(guest.path) == [f"a socket at {guest.path}/a b.sock"]


def test_not_more_than_twenty_users_are_named(guest: Guest) -> None:
    guest.mount()
    for pid in range(100, 130):
        guest.proc.process(pid, "sh", cwd=guest.path)
    assert len(holders.of_mount(guest.path)) == 20


# Beside a mount.


def test_a_mount_of_its_own_alone_has_nobody_beside_it(guest: Guest) -> None:
    guest.mount()
    guest.proc.process(7, "sh", cwd=guest.path, opened={3: (guest.sdc, 1)})
    guest.proc.swaps(guest.sdc)
    guest.loop("loop0", device=OTHER)
    assert holders.beside_mount(guest.path, guest.sdb) == []


def test_what_is_no_device_has_nobody_beside_it(guest: Guest) -> None:
    guest.mount()
    assert holders.beside_mount(guest.path, f"{guest.sdb}gone") == []


def test_a_mount_of_the_device_at_another_path_would_stay(guest: Guest) -> None:
    guest.mount()
    guest.mount(path="/elsewhere")
    assert holders.beside_mount(guest.path, guest.sdb) == ["mounted at /elsewhere"]


def test_a_mount_over_ours_is_named(guest: Guest) -> None:
    guest.mount()
    guest.mount("tmpfs", filesystem="tmpfs")
    assert holders.beside_mount(guest.path, guest.sdb) == [f"tmpfs mounted at {guest.path}, over it"]


def test_a_mount_in_another_namespace_would_stay_and_each_namespace_is_looked_at_once(guest: Guest) -> None:
    guest.mount()
    there = line(DISK, "/inside") + line(OTHER, "/more")
    for pid, namespace in ((7, 2), (8, 2), (9, 1)):
        guest.proc.process(pid, "box", namespace=namespace, mountinfo=there)
    (told,) = holders.beside_mount(guest.path, guest.sdb)
    assert told.replace("8", "7") == "mounted at /inside in the mount namespace of process 7 (box)"


@pytest.mark.parametrize("name", ["lowerdir", "upperdir", "workdir"])
@pytest.mark.parametrize("folder", ["/x", ""])
def test_an_overlay_that_has_a_folder_of_it_would_stay(guest: Guest, name: str, folder: str) -> None:
    guest.mount()
    guest.mount("overlay2", "/merged", "overlay", options=f"{name}={guest.path}{folder}")
    assert holders.beside_mount(guest.path, guest.sdb) == ["overlay mounted at /merged"]


def test_an_overlay_of_other_folders_would_not(guest: Guest) -> None:
    guest.mount()
    guest.mount("overlay2", "/merged", "overlay", options=f"lowerdir={guest.path}2,upperdir=/run")
    assert holders.beside_mount(guest.path, guest.sdb) == []


def test_nor_would_what_is_no_overlay_and_names_the_folder(guest: Guest) -> None:
    guest.mount()
    guest.mount("none", "/other", "fuse", options=f"lowerdir={guest.path}")
    guest.mount("overlay2", "/merged", "overlay", options="lowerdir=/run")
    assert holders.beside_mount(guest.path, guest.sdb) == []


def test_an_overlay_in_another_namespace_would_stay_too(guest: Guest) -> None:
    guest.mount()
    more = f",lowerdir={guest.path}/a"
    there = line((0, 77), "/merged", filesystem="overlay", source="overlay", more=more)
    not_one = line((0, 78), "/fuse", filesystem="fuse", source="x", more=more)
    guest.proc.process(8, "box", namespace=2, mountinfo=there + not_one)
    assert holders.beside_mount(guest.path, guest.sdb) == [
        "overlay mounted at /merged in the mount namespace of process 8 (box)"
    ]


def test_a_published_device_is_known_by_its_name(guest: Guest) -> None:
    guest.mount("devtmpfs", filesystem="devtmpfs", root="/sdb")
    guest.mount(path="/elsewhere")
    assert holders.beside_mount(guest.path, guest.sdb) == ["mounted at /elsewhere"]


def test_what_has_the_device_itself_is_named(guest: Guest) -> None:
    guest.mount()
    guest.mapping("sdb", "dm-0", "secret")
    guest.mapping("sdb", "md0")
    guest.loop("loop0", device=DISK)
    guest.proc.swaps(guest.sdb, guest.sdc)
    guest.proc.process(7, "dd", opened={3: (guest.sdb, 1), 4: (guest.sdc, 1), 5: (f"{guest.sdb}gone", 1)})
    assert sorted(holders.beside_mount(guest.path, guest.sdb)) == sorted(
        [
            "dm-0 (secret)",
            "md0",
            "loop0, a loop device on it",
            f"swap on {guest.sdb}",
            f"process 7 (dd) has {guest.sdb} open",
        ]
    )


def test_another_disk_of_its_btrfs_is_the_same_file_system(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(btrfs, "fellows", lambda node: [guest.sdc])
    guest.mount_btrfs(guest.sdb, guest.path)
    guest.mount_btrfs(guest.sdc, "/elsewhere")
    assert holders.beside_mount(guest.path, guest.sdb) == ["mounted at /elsewhere"]


def test_and_of_another_file_system_it_is_not_asked(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(btrfs, "fellows", lambda node: [guest.sdc])
    guest.mount()
    guest.mount(guest.sdc, f"{guest.path}/below")
    assert holders.beside_mount(guest.path, guest.sdb) == []


def test_not_more_than_twenty_are_named_beside_it(guest: Guest) -> None:
    guest.mount()
    for pid in range(100, 130):
        guest.proc.process(pid, "dd", opened={3: (guest.sdb, 1)})
    assert len(holders.beside_mount(guest.path, guest.sdb)) == 20
    assert len(guest.of_disk()) == 20


# After an unmount.


def test_what_is_free_after_an_unmount_has_no_users(guest: Guest) -> None:
    guest.mount("overlay2", "/merged", "overlay")
    assert holders.after_unmount(guest.sdb) == []


def test_what_lives_on_is_told_with_the_overlays_that_may_have_it(guest: Guest) -> None:
    guest.kernel.pinned[guest.sdb] = ""
    assert holders.after_unmount(guest.sdb) == [
        "something that has no mount, such as an open file of one that was taken off the tree"
    ]
    guest.mount("overlay2", "/merged", "overlay")
    guest.mount(guest.sdc, "/other")
    assert holders.after_unmount(guest.sdb) == ["something without a mount, which may be the overlay at /merged"]


# Of a disk.


def test_a_free_disk_is_used_by_whoever_has_it_open(guest: Guest) -> None:
    assert guest.of_disk() == []
    guest.loop("loop0", device=DISK)
    guest.loop("loop1", device=PART)
    guest.loop("loop2", device=OTHER)
    guest.proc.process(7, "dd", opened={3: (guest.sdb1, 1), 4: (guest.sdc, 1)})
    assert guest.of_disk() == [
        "loop0, a loop device on it",
        "loop1, a loop device on it",
        f"process 7 (dd) has {guest.sdb1} open",
    ]


def test_what_the_kernel_has_of_a_disk_and_its_parts_is_named(guest: Guest) -> None:
    guest.mount(guest.sdb1, "/part")
    guest.mount(guest.sdc, "/other")
    guest.mapping("sdb", "dm-0", "whole")
    guest.mapping("sdb/sdb1", "dm-1", "part")
    guest.proc.swaps(guest.sdb, guest.sdc)
    guest.proc.process(8, "box", namespace=2, mountinfo=line(PART, "/inside"))
    guest.kernel.pinned[guest.sdb] = ""
    assert guest.of_disk() == [
        "mounted at /part",
        "mounted at /inside in the mount namespace of process 8 (box)",
        "dm-0 (whole)",
        "dm-1 (part)",
        f"swap on {guest.sdb}",
    ]


def test_a_btrfs_is_known_by_what_it_was_mounted_from(guest: Guest) -> None:
    guest.kernel.pinned[guest.sdb] = ""
    guest.mount_btrfs(guest.sdb, "/data")
    assert guest.of_disk() == ["mounted at /data"]
    assert [one.path for one in holders.mounts_of({DISK})] == ["/data"]
    assert holders.mounts_of({OTHER}) == []


def test_a_disk_of_a_btrfs_that_was_mounted_from_another_is_used_by_it(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(btrfs, "fellows", lambda node: [guest.sdc, f"{guest.sdb}gone"])
    guest.mount(guest.sdc, "/data", "btrfs")
    guest.kernel.pinned[guest.sdb] = ""
    assert guest.of_disk() == ["a disk of the btrfs that is mounted at /data"]
    guest.mount(guest.sdb1, "/own")
    assert guest.of_disk() == ["mounted at /own"]


def test_a_disk_that_something_has_and_that_shows_nowhere_is_used_all_the_same(guest: Guest) -> None:
    guest.kernel.pinned[guest.sdb] = ""
    assert guest.of_disk() == ["something in the kernel has it"]


# What is read.


@pytest.mark.parametrize(("number", "free"), [(errno.EBUSY, False), (errno.ENOENT, True), (errno.ENXIO, True)])
def test_a_device_is_free_unless_the_kernel_says_that_it_is_taken(
    monkeypatch: pytest.MonkeyPatch, number: int, free: bool
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.open", refuse)
    assert _IS_FREE("/dev/sdb") is free


def test_a_device_that_can_be_had_alone_is_free(tmp_path: Path) -> None:
    (tmp_path / "device").touch()
    before = len([*Path("/proc/self/fd").iterdir()])
    assert _IS_FREE(str(tmp_path / "device"))
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_the_mount_of_what_a_link_leads_to_is_that_of_the_mount_table(tmp_path: Path) -> None:
    ids = {one.id: one for one in mountinfo.mount_lines()}
    assert ids[_MOUNT_ID("/proc/self/root/proc/self/status")].path == "/proc"
    assert _MOUNT_ID(str(tmp_path)) in ids


def test_only_block_devices_have_a_number(tmp_path: Path) -> None:
    assert _NUMBER("/dev/null") is None
    assert _NUMBER(str(tmp_path / "none")) is None


def test_without_a_list_of_swaps_sockets_and_loops_there_are_none(guest: Guest) -> None:
    guest.mount()
    assert holders.swap_paths() == []
    (guest.sys / "block").rename(guest.sys / "gone")
    assert holders.loop_names() == []
    assert holders.of_mount(guest.path) == []


def test_swaps_are_read_as_they_are_written(guest: Guest) -> None:
    guest.proc.swaps("/dev/sda2", "/a\\040b", "/c\\011d")
    assert holders.swap_paths() == ["/dev/sda2", "/a b", "/c\td"]


def test_this_machine_can_be_read(tmp_path: Path) -> None:
    """As root's processes hide from others, only that it ends well, and finds what is ours."""
    assert os.getppid() in set(holders._pids()) | {0, 1}
    assert holders._name(os.getpid()) not in ("", "?")
    assert holders._name(1 << 30) == "?"


def test_a_name_that_the_kernel_cut_in_the_middle_of_a_character_is_told(guest: Guest) -> None:
    guest.mount()
    guest.proc.process(7, "x", cwd=guest.path)
    (guest.kernel.proc / "7/comm").write_bytes("fünfzehn Bäume".encode()[:-4] + b"\n")
    (guest.sys / "block/sdb/holders/dm-0/dm").mkdir(parents=True)
    (guest.sys / "block/sdb/holders/dm-0/dm/name").write_bytes(b"\xff\n")
    assert "process 7 (fünfzehn B\N{REPLACEMENT CHARACTER}) has" in holders.of_mount(guest.path)[0]
    assert holders.beside_mount(guest.path, guest.sdb) == ["dm-0 (\N{REPLACEMENT CHARACTER})"]
