"""Random bytes and real headers with random changes: typed errors only, few bytes read, and QEMU sees what we see."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utilityvm.diskimage import headers
from utilityvm.errors import ConfigDiffers, ImageError, NotSupported
from utilityvm.scsi.ports import DiskFormat

if TYPE_CHECKING:
    from tests.diskimage.conftest import Bytes, Maker

MOST_BYTES = 4 << 20
MOST_READS = 64
# The same examples each time, unless told to look for new ones.
EXAMPLES = int(os.environ.get("UTILITYVM_FUZZ_EXAMPLES", "0"))

# Where the bytes lie that decide something: (from, to); negative counts from the end.
PLACES = {
    "qcow2": [(0, 112), (112, 700)],
    "qcow2-v2": [(0, 72), (72, 200)],
    "qcow2-backing": [(0, 112), (112, 700)],
    "vpc-dynamic": [(0, 90), (512, 600), (-512, -422)],
    "vpc-fixed": [(0, 90), (-512, -422)],
    "vhdx": [
        (65536, 65616),
        (131072, 131152),
        (196608, 196688),
        (3 << 20, (3 << 20) + 192),
        ((3 << 20) + 65536, (3 << 20) + 65576),
        (1 << 20, (1 << 20) + 128),
    ],
    "vmdk": [(0, 80), (512, 1000)],
    "vmdk-stream": [(0, 80), (512, 1000)],
}
KINDS = sorted(PLACES)
TEXTS = [
    b"QFI\xfb",
    b"conectix",
    b"cxsparse",
    b"KDMV",
    b"loge",
    b"desc",
    b"zero",
    b'parentFileNameHint="/etc/passwd"\n',
    b"parentCID=12345678\n",
    b'RW 16 FLAT "/etc/passwd" 0\n',
    b'createType="monolithicFlat"\n',
    b"json:{}\0",
    b"\xe2\x79\x2a\xca\0\0\0\5qcow2\0\0\0",
    b"\x44\x41\x54\x41\0\0\0\x0b/etc/passwd\0\0\0\0\0",
]
numbers = st.sampled_from([0, 1, 2, 3, 4, 7, 8, 9, 16, 20, 72, 104, 112, 512, 4096, 65535, 65536, 1 << 20, 1 << 31])
patches = st.one_of(
    st.builds(
        lambda number, delta, width, order: ((number + delta) % (1 << 8 * width)).to_bytes(width, order),
        st.one_of(numbers, st.integers(0, (1 << 64) - 1)),
        st.integers(-2, 2),
        st.sampled_from([1, 2, 4, 8]),
        st.sampled_from(["big", "little"]),
    ),
    st.sampled_from(TEXTS),
    st.binary(min_size=1, max_size=16),
)
changes = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 1 << 20), patches), min_size=1, max_size=5)
quiet = settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
Reseal = dict[str, Callable[["Bytes"], "Bytes"]]


def changed(seed: Bytes, kind: str, what: list[tuple[int, int, bytes]]) -> Bytes:
    image = seed.copy()
    for place, offset, data in what:
        start, end = (bound + seed.size if bound < 0 else bound for bound in PLACES[kind][place % len(PLACES[kind])])
        image.write(min(start + offset % (end - start), seed.size - len(data)), data)
    return image


def judge(image: Bytes, expected: DiskFormat | None, *, allow_backing: bool = False) -> headers.ImageHeader | None:
    """The header if the image may be attached, None if it may not, and a failed test for anything else."""
    try:
        header = image.read(expected)
        headers.check_safe(header, read_only=True, allow_backing=allow_backing)
        remedy: str | None = "none needed"
    except (ImageError, NotSupported, ConfigDiffers) as refusal:
        header, remedy = None, refusal.remedy
    assert remedy
    assert image.reads <= MOST_READS
    log_bytes = 16 << 20 if image.get(0, 8) == b"vhdxfile" else 0
    assert image.bytes_read <= MOST_BYTES + log_bytes
    return header


@quiet
@given(data=st.binary(max_size=2000), size=st.integers(0, 1 << 63), expected=st.sampled_from([None, *DiskFormat]))
def test_random_bytes(memory: type[Bytes], data: bytes, size: int, expected: DiskFormat | None) -> None:
    judge(memory.of(data, size=max(size, len(data))), expected)


@quiet
@given(
    magic=st.sampled_from([b"QFI\xfb\0\0\0\2", b"QFI\xfb\0\0\0\3", b"conectix", b"vhdxfile", b"KDMV\1\0\0\0", b"COWD"]),
    data=st.binary(max_size=2000),
    size=st.integers(0, 1 << 63),
)
def test_random_bytes_behind_a_magic(memory: type[Bytes], magic: bytes, data: bytes, size: int) -> None:
    judge(memory.of(magic + data, size=max(size, len(magic + data))), None)


@pytest.mark.parametrize("kind", KINDS)
@quiet
@given(what=changes, sealed=st.booleans(), size=st.none() | st.integers(0, 1 << 40))
def test_changed_headers(
    seeds: dict[str, Bytes],
    reseal: Reseal,
    kind: str,
    what: list[tuple[int, int, bytes]],
    sealed: bool,
    size: int | None,
) -> None:
    image = changed(seeds[kind], kind, what)
    if sealed:
        image = reseal[kind.split("-")[0]](image)
    if size is not None:
        image.size = size
    judge(image, None)


@pytest.mark.parametrize("kind", KINDS)
@quiet
@given(what=changes)
def test_qemu_sees_the_disk_that_we_see_or_refuses_it(
    maker: Maker, seeds: dict[str, Bytes], reseal: Reseal, kind: str, what: list[tuple[int, int, bytes]]
) -> None:
    """The parser differential: what we let pass may not be another disk, or several files, to QEMU."""
    format = kind.split("-")[0]
    image = reseal[format](changed(seeds[kind], kind, what))
    header = judge(image, DiskFormat(format), allow_backing=True)
    if header is None:
        return
    told = maker.try_info(image.save(maker.folder / f"changed.{format}"), format)
    if told is None:
        return
    assert told["virtual-size"] == header.virtual_size_bytes
    backing = header.backing
    assert told.get("backing-filename") == backing or (backing is not None and not backing.isascii())
    details = told.get("format-specific", {}).get("data", {})
    assert "data-file" not in details
    assert [extent["filename"] for extent in details.get("extents", [])] in ([], [told["filename"]])
    assert bool(told.get("encrypted")) is (header.encryption is not None)
