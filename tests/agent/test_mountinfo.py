"""What the agent reads from the kernel's list of mounts."""

from __future__ import annotations

from pathlib import Path

import pytest

from utilityvm.agent.mountinfo import is_mounted, lines_at, mount_lines, stands_alone, taken_along

LINES = r"""20 1 0:18 / / rw,relatime shared:1 - overlay overlay rw,lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work
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
40 20 0:50 / /over rw shared:13 - overlay over ro,lowerdir=/layers/a:/layers/b
41 20 8:64 / /layers/a ro shared:14 - ext4 /dev/sde ro
42 20 8:80 / /layers/b ro shared:15 - ext4 /dev/sdf ro
"""


@pytest.fixture
def mountinfo(tmp_path: Path) -> Path:
    path = tmp_path / "mountinfo"
    path.write_text(LINES)
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
        ("/layers/a", (8, 64), False),  # an overlay has it
        ("/layers/b", (8, 80), False),
    ],
)
def test_a_mount_stands_alone(mountinfo: Path, path: str, number: tuple[int, int], alone: bool) -> None:
    assert stands_alone(path, number, mountinfo) is alone


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
