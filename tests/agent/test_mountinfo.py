"""What the agent reads from the kernel's list of mounts."""

from __future__ import annotations

from pathlib import Path

import pytest

from utilityvm.agent.mountinfo import (
    is_mounted,
    lines_at,
    mount_lines,
    overlay_folders,
    shows,
    stands_alone,
    taken_along,
)

ALONE = r"""20 1 0:18 / / rw,relatime shared:1 - overlay overlay rw,lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work
21 20 0:5 / /dev rw,nosuid shared:2 - devtmpfs devtmpfs rw,mode=755
30 20 8:16 / /data rw,relatime shared:9 - ext4 /dev/sdb rw
31 20 8:32 / /with\040space\011tab\012line\134slash ro,relatime shared:10 - ext4 /dev/sdc ro,noload
32 20 0:18 /opt /shown rw,relatime shared:1 - overlay overlay rw,lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work
33 20 0:40 / /near rw shared:11 - tmpfs near rw
34 20 0:40 / /far rw shared:11 - tmpfs near rw
35 33 8:48 / /near/disk rw shared:12 - ext4 /dev/sdd rw
36 34 8:48 / /far/disk rw shared:12 - ext4 /dev/sdd rw
37 20 8:48 / /bound rw shared:12 - ext4 /dev/sdd rw
38 20 0:40 / /slave rw master:11 - tmpfs near rw
39 38 8:48 / /slave/disk rw master:12 - ext4 /dev/sdd rw
"""
LINES = (
    ALONE
    + r"""40 20 0:50 / /over rw shared:13 - overlay over ro,lowerdir=/layers/a:/layers/b
41 20 8:64 / /layers/a ro shared:14 - ext4 /dev/sde ro
42 20 8:80 / /layers/b ro shared:15 - ext4 /dev/sdf ro
"""
)


@pytest.fixture
def mountinfo(tmp_path: Path) -> Path:
    path = tmp_path / "mountinfo"
    path.write_text(LINES)
    return path


@pytest.fixture
def without_overlay(tmp_path: Path) -> Path:
    """The same without the overlay at /over: the system's root is the only one."""
    path = tmp_path / "without"
    path.write_text(ALONE)
    return path


def test_a_line_is_taken_apart(mountinfo: Path) -> None:
    (line,) = lines_at("/with space\ttab\nline\\slash", mountinfo)
    assert (line.number, line.filesystem, line.source) == ((8, 32), "ext4", "/dev/sdc")
    assert line.read_only
    assert not line.is_written
    assert (line.id, line.parent, line.peers, line.master) == (31, 20, 10, 0)
    assert line.super_options == "ro,noload"


def test_a_mount_is_at_its_mount_point_and_not_where_it_comes_from(mountinfo: Path) -> None:
    assert is_mounted("/data", mountinfo)
    assert is_mounted("/with space\ttab\nline\\slash", mountinfo)
    assert is_mounted("/shown", mountinfo)
    for path in ("/opt", "/dat", "/data/below", "/with"):
        assert not is_mounted(path, mountinfo), path


@pytest.mark.parametrize(
    ("path", "number", "alone"),
    [
        ("/data", (8, 16), True),
        ("/with space\ttab\nline\\slash", (8, 32), True),
        ("/near/disk", (8, 48), False),  # the disk is mounted elsewhere
        ("/near", (0, 40), False),  # a mount is below it
    ],
)
def test_a_mount_stands_alone(without_overlay: Path, path: str, number: tuple[int, int], alone: bool) -> None:
    assert stands_alone(path, number, without_overlay) is alone


@pytest.mark.parametrize(("path", "number"), [("/layers/a", (8, 64)), ("/data", (8, 16))])
def test_no_mount_is_known_to_stand_alone_beside_an_overlay(
    mountinfo: Path, path: str, number: tuple[int, int]
) -> None:
    assert not stands_alone(path, number, mountinfo)


def test_names_with_unusual_blanks_are_one_name(tmp_path: Path) -> None:
    path = tmp_path / "mountinfo"
    name = "/a\rb\u00a0c\u2028d\x0be"
    path.write_bytes(f"42 20 8:96 / {name} rw,nosuid shared:16 - ext4 /dev/x\\043y rw\n".encode())
    (line,) = mount_lines(path)
    assert (line.path, line.source, line.peers) == (name, "/dev/x#y", 16)
    assert is_mounted(name, path)


@pytest.mark.parametrize(
    ("written", "folders"),
    [
        ("lowerdir=/a/l,upperdir=/a/u,workdir=/a/w", ["/a/l", "/a/u", "/a/w"]),
        ("lowerdir=/a:/b:/c", ["/a", "/b", "/c"]),
        (r"lowerdir=/a\134:b/l:/c", ["/a:b/l", "/c"]),  # a colon in a name
        (r"upperdir=/a\134\054b", ["/a,b"]),  # a comma
        (r"lowerdir=/a\134\134b:/c", [r"/a\b", "/c"]),  # a backslash
        (r"lowerdir=/a\040b", ["/a b"]),
        (r"upperdir=/a\134b", [r"/a\b"]),  # as the newer mount calls take it
        ("lowerdir+=/a:b,datadir+=/c", ["/a:b", "/c"]),
        ("lowerdir=l,upperdir=u", ["l", "u"]),
        ("redirect_dir=on,xino=off", []),
    ],
)
def test_the_folders_of_an_overlay_are_read_as_they_are_called(
    tmp_path: Path, written: str, folders: list[str]
) -> None:
    path = tmp_path / "mountinfo"
    path.write_text(f"40 20 0:50 / /over rw - overlay over rw,{written}\n")
    (line,) = mount_lines(path)
    assert set(folders) <= set(overlay_folders(line))


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/shown/x", "/opt/x"),
        ("/shown", "/opt/x"),
        ("/shown/x/below", "/opt/x"),
        ("/shown/y", None),
        ("/near/y", None),
        ("/far/sub", "/near/sub"),
        ("/data/dev", None),
        ("/opt/y", None),
    ],
)
def test_a_bind_mount_shows_a_folder_of_the_system(mountinfo: Path, path: str, shown: str | None) -> None:
    assert shows(path, ["/opt/x", "/near/sub", "/dev"], mountinfo) == shown


@pytest.mark.parametrize(
    ("ended", "with_it"),
    [
        ("/near/disk", {35, 36, 39}),  # the peer's and the slave's copies go, the bind mount stays
        ("/far/disk", {35, 36, 39}),
        ("/slave/disk", {39}),  # a slave tells nobody
        ("/bound", {37}),
        ("/data", {30}),
        ("/", {20}),
    ],
)
def test_what_ends_with_a_mount(mountinfo: Path, ended: str, with_it: set[int]) -> None:
    (target,) = lines_at(ended, mountinfo)
    assert taken_along(target, mount_lines(mountinfo)) == with_it
