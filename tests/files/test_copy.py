"""What is sent is what is made: kinds, names, modes, times, holes; and where cp(1) and docker cp would put it."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from utilityvm.files import receive, send
from utilityvm.files.receive import Receiver, Rules
from utilityvm.files.records import CopyFault, Counts

OLD_NS = 1_600_000_000_123_456_789


def copy(source: str | Path, target: str | Path, rules: Rules | None = None, *, cut: int = 1 << 20) -> Counts:
    """Copy as a host and a guest do, the stream cut into pieces of that size."""
    source = str(source)
    receiver = Receiver(
        str(target),
        base=source.rstrip("/").rpartition("/")[2],
        contents=source.endswith("/."),
        rules=rules or Rules(links=receive.KEEP, is_trusted=True),
    )
    try:
        for piece in send.send(source):
            for at in range(0, len(piece), cut):
                receiver.feed(piece[at : at + cut])
        return receiver.finish()
    finally:
        receiver.close()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / "a/b").mkdir(parents=True)
    (tree / "a/b/deep").write_bytes(b"deep")
    (tree / "empty").touch()
    (tree / "program").write_bytes(b"#!/bin/sh\n")
    (tree / "program").chmod(0o4751)
    (tree / "link").symlink_to("a/b/deep")
    (tree / "dangling").symlink_to("/nowhere/at/all")
    (tree / os.fsdecode(b"not-\xff-text")).write_bytes(b"\xff")
    (tree / "locked").mkdir()
    (tree / "locked/file").write_text("in it")
    (tree / "locked").chmod(0o555)
    os.utime(tree / "a", ns=(OLD_NS, OLD_NS))
    os.utime(tree / "program", ns=(OLD_NS, OLD_NS))
    os.utime(tree / "link", ns=(OLD_NS, OLD_NS), follow_symlinks=False)
    return tree


def seen(folder: Path) -> dict[str, tuple[object, ...]]:
    """All that is kept of what is below a folder."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content: object = None
        if stat.S_ISLNK(status.st_mode):
            content = path.readlink()
        elif stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        owner = status.st_uid, status.st_gid
        found[str(path.relative_to(folder))] = (status.st_mode, owner, status.st_mtime_ns, content)
    return found


@pytest.mark.parametrize("cut", [1 << 20, 7])
def test_a_tree_arrives_as_it_is(tree: Path, tmp_path: Path, cut: int) -> None:
    counts = copy(tree, tmp_path / "copy", cut=cut)
    assert seen(tmp_path / "copy") == seen(tree)
    assert (counts.files, counts.folders, counts.links) == (5, 4, 2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["copy", "tree"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_root_keeps_owners(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of another")
    os.chown(tmp_path / "file", 1234, 4321)
    copy(tmp_path / "file", tmp_path / "copy")
    assert ((tmp_path / "copy").stat().st_uid, (tmp_path / "copy").stat().st_gid) == (1234, 4321)


def test_a_sparse_file_stays_sparse(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.write(b"begin")
        file.seek(64 << 20)
        file.write(b"middle")
        file.truncate(256 << 20)
    counts = copy(tmp_path / "sparse", tmp_path / "copy")
    status = (tmp_path / "copy").stat()
    assert status.st_size == 256 << 20
    assert status.st_blocks * 512 < 1 << 20
    assert counts.bytes < 1 << 20
    with (tmp_path / "copy").open("rb") as file:
        assert file.read(5) == b"begin"
        file.seek(64 << 20)
        assert file.read(7) == b"middle\0"


def test_files_of_procfs_and_sysfs_are_read_to_their_end(tmp_path: Path) -> None:
    """One says that it is empty, the other that it has a page."""
    copy("/proc/version", tmp_path / "version")
    assert (tmp_path / "version").read_text() == Path("/proc/version").read_text()
    copy("/sys/kernel/mm/transparent_hugepage/enabled", tmp_path / "enabled")
    assert 0 < (tmp_path / "enabled").stat().st_size < 4096


def test_what_is_no_file_is_left_out_and_told(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    os.mkfifo(tmp_path / "tree/fifo")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "tree/socket"))
        counts = copy(tmp_path / "tree", tmp_path / "copy")
    assert counts.skipped == [f"{tmp_path}/tree/fifo: a FIFO", f"{tmp_path}/tree/socket: a socket"]
    assert list((tmp_path / "copy").iterdir()) == []
    with pytest.raises(CopyFault, match="a FIFO, which cannot be copied"):
        copy(tmp_path / "tree/fifo", tmp_path / "fifo")


class TestWhere:
    """The destination, as cp -r and docker cp have it."""

    @pytest.fixture
    def target(self, tmp_path: Path) -> Path:
        (tmp_path / "target").mkdir()
        (tmp_path / "target").chmod(0o1777)
        (tmp_path / "target/old").write_text("old")
        return tmp_path / "target"

    def test_in_a_folder_it_keeps_its_name(self, tree: Path, target: Path) -> None:
        copy(tree, target)
        copy(tree / "program", f"{target}/")
        assert seen(target / "tree") == seen(tree)
        assert (target / "program").read_bytes() == b"#!/bin/sh\n"

    def test_else_it_has_the_name_that_was_given(self, tree: Path, target: Path) -> None:
        copy(tree, target / "other")
        copy(tree, f"{target}/third/")
        copy(tree / "program", target / "run")
        assert seen(target / "other") == seen(target / "third") == seen(tree)
        assert (target / "run").exists()

    @pytest.mark.parametrize("ending", ["/.", "/./"])
    def test_a_dot_means_what_is_in_the_folder(self, tree: Path, target: Path, ending: str) -> None:
        copy(f"{tree}{ending}", target) if ending == "/." else copy(f"{tree}/.", f"{target}/")
        assert {*seen(tree), "old"} == {*seen(target)}
        assert stat.S_IMODE(target.stat().st_mode) == 0o1777  # what was there is not changed
        copy(f"{tree}/.", target / "new")
        assert seen(target / "new") == seen(tree)

    def test_folders_are_merged_and_files_replaced(self, tree: Path, target: Path) -> None:
        (target / "tree/a").mkdir(parents=True)
        (target / "tree/a/mine").write_text("mine")
        (target / "tree/program").symlink_to(target / "old")
        (target / "tree/link").write_text("a file")
        copy(tree, target)
        assert (target / "tree/a/mine").read_text() == "mine"
        assert (target / "tree/program").read_bytes() == b"#!/bin/sh\n"
        assert (target / "old").read_text() == "old"  # the link was replaced, and not followed
        assert (target / "tree/link").readlink() == Path("a/b/deep")
        assert not [path for path in target.rglob("*") if ".uvm-" in path.name]

    def test_a_folder_does_not_replace_a_file_nor_a_file_a_folder(self, tree: Path, target: Path) -> None:
        (target / "tree").write_text("a file")
        with pytest.raises(CopyFault, match="tree is there already, and is no folder"):
            copy(tree, target)
        (target / "program").mkdir()
        with pytest.raises(CopyFault, match="program is there already, and is a folder"):
            copy(tree / "program", target)
        with pytest.raises(CopyFault, match=r"old is there already, and is no folder|old is no folder"):
            copy(tree, target / "old")
        assert (target / "tree").read_text() == "a file"

    def test_devices_and_the_like_stay_what_they_are(self, tree: Path, target: Path) -> None:
        """As root `cp file /dev/null` would make that a file, for everybody."""
        os.mkfifo(target / "fifo")
        (target / "null").symlink_to("/dev/null")
        for name, what in (("fifo", "a FIFO"), ("null", "a device")):
            with pytest.raises(CopyFault, match=f"{name} is there already, and is {what}"):
                copy(tree / "program", target / name)
        assert (target / "null").readlink() == Path("/dev/null")

    def test_the_folder_above_has_to_be_there(self, tree: Path, target: Path) -> None:
        with pytest.raises(FileNotFoundError) as raised:
            copy(tree, target / "no/where")
        assert raised.value.filename == f"{target}/no"
        with pytest.raises(CopyFault, match="nowhere/ is no folder"):
            copy(tree / "program", f"{target}/nowhere/")

    def test_a_link_is_copied_as_a_link_and_followed_with_a_slash(self, tree: Path, target: Path) -> None:
        (target / "to-tree").symlink_to(tree)
        copy(target / "to-tree", target / "copy")
        assert (target / "copy").readlink() == tree
        copy(f"{target}/to-tree/", target / "followed")
        copy(f"{target}/to-tree/.", target / "contents")
        assert seen(target / "followed") == seen(target / "contents") == seen(tree)

    def test_a_folder_behind_a_link_is_a_folder(self, tree: Path, target: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(target)
        copy(tree / "program", tmp_path / "link")
        assert (target / "program").exists()
