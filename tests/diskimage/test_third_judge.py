"""oslo.utils' format inspector, which OpenStack trusts with foreign images, and our readers say the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from utilityvm.diskimage import headers
from utilityvm.errors import ImageError
from utilityvm.scsi.ports import DiskFormat

if TYPE_CHECKING:
    from tests.diskimage.conftest import Maker, Reader

NAMES = {"vpc": "vhd"}  # theirs for ours


@pytest.fixture(scope="module")
def judge() -> Any:
    return pytest.importorskip("oslo_utils.imageutils.format_inspector")


@pytest.mark.parametrize(
    ("image_format", "size", "options"),
    [
        ("qcow2", "64M", {}),
        ("qcow2", "1G", {"compat": "0.10"}),
        ("qcow2", "20M", {"cluster_size": "512"}),
        ("vpc", "64M", {"force_size": "on"}),
        ("vhdx", "64M", {}),
        ("vmdk", "64M", {}),
        ("vmdk", "64M", {"subformat": "streamOptimized"}),
    ],
)
def test_format_and_size_are_those_that_it_finds(
    judge: Any, maker: Maker, read: Reader, image_format: str, size: str, options: dict[str, str]
) -> None:
    path = maker.create(image_format, size, options)
    found, header = judge.detect_file_format(str(path)), read(path)
    assert str(found) == NAMES.get(image_format, image_format)
    assert header.format == image_format
    if not (image_format == "vmdk" and options):  # of that one it knows no size
        assert found.virtual_size == header.virtual_size_bytes


def test_what_it_calls_unsafe_we_refuse(judge: Any, maker: Maker, read: Reader) -> None:
    """An overlay makes QEMU open another file; an external data file as well."""
    base = maker.create("qcow2")
    with_data_file = maker.path("qcow2")
    data_file = f"data_file={maker.path('data')},data_file_raw=on"
    maker.run("create", "-q", "-f", "qcow2", "-o", data_file, with_data_file, "1M")
    for path in (maker.create("qcow2", backing=base), with_data_file):
        with pytest.raises(judge.SafetyCheckFailed):
            judge.detect_file_format(str(path)).safety_check()
        with pytest.raises(ImageError):
            headers.check_safe(read(path, DiskFormat.QCOW2), read_only=False)
