"""What is not a disk, though it lies where one was expected: archives, other tools' images, misnamed files.

A file in which no format is recognised is a raw disk, and a guest that writes to it destroys what it really was. So
what people have in place of a disk is recognised by its first bytes, and a name that promises a format must be true.
Neither is asked when the caller states the format.

Source: the specifications of the formats; file(1)'s magic for those that have none.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Final

from utilityvm.diskimage.source import SECTOR, Source
from utilityvm.scsi.ports import DiskFormat

_HEAD_BYTES: Final = 512
_STATE_RAW: Final = "or give the format raw if its bytes are the disk"


@dataclass(frozen=True, slots=True)
class NotADisk:
    """What a file is instead, as the end of "it is …", and how to make a disk of it."""

    title: str
    remedy: str


def _unpack(title: str, command: str) -> NotADisk:
    return NotADisk(title, f"unpack it first: {command}; {_STATE_RAW}")


def _convert(title: str, command: str = "qemu-img convert -O qcow2") -> NotADisk:
    return NotADisk(title, f"convert it: {command}; {_STATE_RAW}")


_TAR: Final = _unpack("a tar archive", "tar -xf (an OVA has the disk as a .vmdk, which qemu-img converts)")
_ZIP: Final = _unpack("a zip archive", "unzip")
_LZMA: Final = _unpack("compressed (lzma)", "xz -d --format=lzma")
_DMG: Final = _convert("an Apple disk image (dmg)", "qemu-img convert -f dmg -O qcow2")
_EXPERT_WITNESS: Final = _convert("an Expert Witness image (E01)", "ewfexport -f raw")
_PAGE: Final = NotADisk("a web page or an XML document, and not a disk", "download it again, and look at what came")

# The bytes at an offset, and what begins so. The longer of two that begin alike comes first.
_SIGNATURES: Final = (
    (0, b"\x1f\x8b\x08", _unpack("compressed (gzip)", "gunzip")),
    (0, b"\xfd7zXZ\x00", _unpack("compressed (xz)", "xz -d")),
    (0, b"\x28\xb5\x2f\xfd", _unpack("compressed (zstd)", "zstd -d")),
    (0, b"\x04\x22\x4d\x18", _unpack("compressed (lz4)", "lz4 -d")),
    (0, b"\x02\x21\x4c\x18", _unpack("compressed (lz4)", "lz4 -d")),
    (0, b"LZIP\x01", _unpack("compressed (lzip)", "lzip -d")),
    (0, b"\x89LZO\x00\r\n\x1a\n", _unpack("compressed (lzop)", "lzop -d")),
    (0, b"\x1f\x9d", _unpack("compressed (compress)", "gunzip")),
    (0, b"7z\xbc\xaf\x27\x1c", _unpack("a 7z archive", "7z x")),
    (0, b"Rar!\x1a\x07", _unpack("a rar archive", "unrar x")),
    (0, b"PK\x03\x04", _ZIP),
    (0, b"PK\x05\x06", _ZIP),
    (0, b"PK\x07\x08", _ZIP),
    (0, b"070701", _unpack("a cpio archive", "cpio -i")),
    (0, b"070707", _unpack("a cpio archive", "cpio -i")),
    (0, b"\xc7\x71", _unpack("a cpio archive", "cpio -i")),
    (0, b"\x71\xc7", _unpack("a cpio archive", "cpio -i")),
    (0, b"MSCF\0\0\0\0", _unpack("a cabinet (CAB)", "cabextract")),
    (0, b"xar!\x00\x1c", _unpack("a xar archive", "xar -xf")),
    (0, b"\xff\x06\0\0sNaPpY", _unpack("compressed (snappy)", "snzip -d")),
    (0, b"LRZI\0", _unpack("compressed (lrzip)", "lrzip -d")),
    (0, b"!<arch>\n", _unpack("an ar archive", "ar x")),
    (0, b"\xed\xab\xee\xdb", _unpack("an rpm package", "rpm2cpio")),
    (0, b"MSWIM\0\0\0", _unpack("a Windows image (WIM)", "wimlib-imagex apply")),
    (0, b"EVF\x09\x0d\x0a\xff\x00", _EXPERT_WITNESS),
    (0, b"EVF2\x0d\x0a\x81\x00", _EXPERT_WITNESS),
    (0, b"LVF\x09\x0d\x0a\xff\x00", _EXPERT_WITNESS),
    (0, b"LEF2\x0d\x0a\x81\x00", _EXPERT_WITNESS),
    (0, b"AFF10\r\n\0", _convert("an Advanced Forensic image (AFF)", "affconvert -r")),
    (0, b"encrcdsa", _convert("an encrypted Apple disk image (dmg)", "hdiutil convert -format UDTO, on a Mac")),
    (0, b"sprs", _convert("an Apple sparse image", "hdiutil convert -format UDTO, on a Mac")),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", _convert("a cloop image", "qemu-img convert -f cloop -O qcow2")),
    (0, b"\xbe\xba\xfe\xca\0\0\0\0", _convert("an ESX sparse extent (seSparse VMDK)")),
    (0, b"QED\0", _convert("a QED image")),
    (0x40, b"\x7f\x10\xda\xbe", _convert("a VirtualBox VDI image")),
    (0, b"WithoutFreeSpace", _convert("a Parallels image")),
    (0, b"WithouFreSpacExt", _convert("a Parallels image")),
    (0, b"Bochs Virtual HD Image", _convert("a Bochs image")),
    (0, b"\x3a\xff\x26\xed", _convert("an Android sparse image", "simg2img")),
    (0, b"partclone-image", _convert("a partclone image", "partclone.restore")),
    (0, b"\0ntfsclone-image", _convert("an ntfsclone image", "ntfsclone --restore-image")),
    (0, b"VMA\0", _convert("a Proxmox backup (VMA)", "vma extract")),
    (0, b"MComprHD", _convert("a MAME image (CHD)", "chdman extracthd")),
    (0, b"CISO", _convert("a compressed ISO image (CSO)", "ciso 0")),
    (0, b"IsZ!", _convert("a compressed ISO image (ISZ)", "iszedit, or isz2iso")),
    (0, b"version https://git-lfs.github.com/spec/", NotADisk("a pointer of Git LFS", "fetch the file: git lfs pull")),
)

_BZIP2_BLOCKS: Final = (b"\x31\x41\x59\x26\x53\x59", b"\x17\x72\x45\x38\x50\x90")
_ZSTD_SKIPPABLE: Final = range(0x184D2A50, 0x184D2A60)
_PAGE_STARTS: Final = (b"<!doctype", b"<html", b"<?xml")


def recognise(image: Source) -> NotADisk | None:
    """What the file is by its own bytes, if it is no disk and no image that is read here."""
    head = image.read_up_to(0, _HEAD_BYTES)
    for offset, magic, what in _SIGNATURES:
        if head.startswith(magic, offset):
            return what
    return next((what for test, what in _TESTS if test(head, image)), None)


def _is_bzip2(head: bytes, _image: Source) -> bool:
    return head.startswith(b"BZh") and head[3:4] in b"123456789" and head[4:10] in _BZIP2_BLOCKS


def _is_zstd(head: bytes, image: Source) -> bool:
    """Does it start with a frame to be skipped, as those of pzstd do, and go on within the file?"""
    if len(head) < 8:
        return False
    magic, length = struct.unpack_from("<II", head)
    return magic in _ZSTD_SKIPPABLE and image.read_up_to(8 + length, 4) == b"\x28\xb5\x2f\xfd"


def _is_lzma(head: bytes, _image: Source) -> bool:
    """There is no magic: properties of 0x5D, a usual dictionary, and a size that is unknown or below 256 GiB."""
    if len(head) < 13 or head[0] != 0x5D:
        return False
    dictionary, size = struct.unpack_from("<IQ", head, 1)
    usual = dictionary >= 1 << 12 and dictionary & (dictionary - 1) == 0
    return usual and (size == (1 << 64) - 1 or 0 < size < 1 << 38) and head[13:14] == b"\0"


def _is_tar(head: bytes, _image: Source) -> bool:
    """The first header's checksum is right: the sum of its bytes, with spaces for the sum itself."""
    if len(head) < _HEAD_BYTES or not head[0]:
        return False
    digits = head[148:156].strip(b" \0")
    if not digits or digits.strip(b"01234567"):
        return False
    return int(digits, 8) == sum(head) - sum(head[148:156]) + 8 * ord(" ")


def _is_page(head: bytes, _image: Source) -> bool:
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_PAGE_STARTS)


def _is_dmg(_head: bytes, image: Source) -> bool:
    """A trailer of 512 bytes, of version 4. Source: QEMU block/dmg.c."""
    return image.read_up_to(max(0, image.size_bytes - SECTOR), 12) == b"koly" + struct.pack(">II", 4, SECTOR)


def _is_nero(_head: bytes, image: Source) -> bool:
    return image.read_up_to(max(0, image.size_bytes - 12), 4) == b"NER5"


_TESTS: Final[tuple[tuple[Callable[[bytes, Source], bool], NotADisk], ...]] = (
    (_is_bzip2, _unpack("compressed (bzip2)", "bunzip2")),
    (_is_zstd, _unpack("compressed (zstd)", "zstd -d")),
    (_is_lzma, _LZMA),
    (_is_tar, _TAR),
    (_is_page, _PAGE),
    (_is_dmg, _DMG),
    (_is_nero, _convert("a Nero image (NRG)", "nrg2iso")),
)

# What a name that ends so says of the file. `.img`, `.bin` and others say nothing: cloud images in qcow2 are named so.
_FORMATS: Final = {
    ".raw": DiskFormat.RAW,
    ".dd": DiskFormat.RAW,
    ".iso": DiskFormat.RAW,
    ".qcow2": DiskFormat.QCOW2,
    ".qcow": DiskFormat.QCOW2,
    ".vhd": DiskFormat.VHD,
    ".avhd": DiskFormat.VHD,
    ".vpc": DiskFormat.VHD,
    ".vhdx": DiskFormat.VHDX,
    ".avhdx": DiskFormat.VHDX,
    ".vmdk": DiskFormat.VMDK,
}
_OTHERS: Final = {
    ".vdi": "a VirtualBox VDI image",
    ".qed": "a QED image",
    ".hds": "a Parallels image",
    ".ova": "a tar archive with a VM",
    ".ovf": "the description of a VM",
    ".vbox": "the description of a VM",
    ".vmx": "the description of a VM",
    ".e01": "an Expert Witness image",
    ".ex01": "an Expert Witness image",
    ".aff": "an Advanced Forensic image",
    ".dmg": "an Apple disk image",
    ".wim": "a Windows image",
    ".esd": "a Windows image",
    ".gz": "compressed",
    ".tgz": "a compressed archive",
    ".xz": "compressed",
    ".txz": "a compressed archive",
    ".zst": "compressed",
    ".zstd": "compressed",
    ".gzip": "compressed",
    ".br": "compressed",
    ".sz": "compressed",
    ".bz2": "compressed",
    ".lz4": "compressed",
    ".lzma": "compressed",
    ".lz": "compressed",
    ".lzo": "compressed",
    ".z": "compressed",
    ".cpio": "a cpio archive",
    ".cab": "a cabinet",
    ".tar": "a tar archive",
    ".zip": "a zip archive",
    ".7z": "a 7z archive",
    ".rar": "a rar archive",
}
_FLAT: Final = "-flat.vmdk"  # the bytes of a disk, beside a descriptor that names them


def promised(name: str) -> DiskFormat | str | None:
    """What the file's name says that it is: a format, or something that is no disk here; None if it says nothing."""
    path = PurePath(name)
    if path.name.lower().endswith(_FLAT):
        return DiskFormat.RAW
    suffix = path.suffix.lower()
    return _FORMATS.get(suffix) or _OTHERS.get(suffix)
