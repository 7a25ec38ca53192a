"""What a device holds: the one file system that is there, or what else, in words and with what to do.

Nothing is guessed. What libblkid finds counts if its superblock makes sense, as for some file systems libblkid looks at
two or four bytes alone. If more than one thing is left, none of them is taken, and all are named:

* a RAID's, a volume manager's or an encryption's signature goes before a file system's: that lies on top of it;
* of UDF and ISO 9660 on one disc UDF counts, as on every Windows installation disc the other is a stub;
* a disc image may have a partition table beside it (a hybrid, for USB sticks), and FAT, exFAT and NTFS have boot code
  where an MBR has its entries: such a table does not count. Beside any other file system it does.

Source: libblkid 2.38; the file systems' structures: Linux fs/ext4/ext4.h, include/uapi/linux/btrfs_tree.h,
fs/erofs/erofs_fs.h, include/linux/f2fs_fs.h; ECMA-119, 8.4; UEFI specification 2.10, 5.3.2.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

from utilityvm.agent import blkid
from utilityvm.agent.blkid import Look, Superblock, Table
from utilityvm.agent.faults import Fault

# What the guest's kernel calls it, where that is another word than libblkid's.
_KERNELS_WORD: Final = {"ext2": "ext4", "ext3": "ext4", "ext4dev": "ext4", "ntfs": "ntfs3"}
_DISC: Final = ("udf", "iso9660")  # the first of them counts
_OWN_BOOT_CODE: Final = ("vfat", "exfat", "ntfs")
_TABLES: Final = {"gpt": "GPT", "dos": "MBR"}
_BELOW: Final = ("raid", "crypto")  # usages of what a file system lies on top of

_WORDS: Final = {
    "crypto_LUKS": "a LUKS volume",
    "BitLocker": "a BitLocker volume",
    "LVM2_member": "a physical volume of LVM",
    "LVM1_member": "a physical volume of LVM",
    "linux_raid_member": "a member of a Linux RAID (md)",
    "zfs_member": "a member of a ZFS pool",
    "bcache": "a bcache device",
    "swap": "swap space",
    "swsuspend": "the memory of a suspended system",
    "jbd": "the journal of an ext file system",
    "xfs_external_log": "the log of an XFS",
    "DM_verity_hash": "a dm-verity hash tree",
}
_IN_GUEST: Final = "attach it without a guest path, and {how} in the guest"
_SAID_WITH_AN: Final = ("a", "e", "f2", "hf", "i", "ls", "mp", "nt", "nv", "o", "xf")  # how libblkid's words begin
_REMEDIES: Final = {
    "crypto_LUKS": _IN_GUEST.format(how="open it with cryptsetup")
    + "; an encryption key given here (--key-file) is for a disk without a header",
    "BitLocker": _IN_GUEST.format(how="open it with cryptsetup (bitlkOpen)"),
    "LVM2_member": _IN_GUEST.format(how="activate its volume group (vgchange -ay)"),
    "linux_raid_member": "attach all its members without a guest path, and assemble it in the guest (mdadm --assemble)",
    "zfs_member": _IN_GUEST.format(how="import its pool"),
    "swap": _IN_GUEST.format(how="run swapon on its device"),
}
_PUBLISH: Final = "use its device: attach it without a guest path, or with block_device=True"

_ENDS: Final = 1 << 20  # so much of each end is looked at for whether there is anything
_GPT_SIGNATURE: Final = b"EFI PART"
_ISO_SECTOR: Final = 2048
_POWERS: Final = frozenset(1 << bit for bit in range(9, 17))


class Content(NamedTuple):
    """What is on a device, and what can be done with it."""

    filesystem: str | None  # the one that is there, by the kernel's word; None if there is none, or more than one thing
    names: tuple[str, ...]  # of all that is there: "an ext4 file system"
    remedy: str | None  # None if nothing is there

    def __str__(self) -> str:
        return " and ".join(self.names)


def of(node: str, deadline: float, *, partition: int = 0) -> Content:
    """What `node` holds, which is that partition of a disk.

    Raises:
        Fault: it cannot be found out; see `blkid.look`.
        OSError: the device cannot be read.
    """
    return judge(blkid.look(node, deadline), _reader(node), partition=partition)


def judge(look: Look, read: Callable[[int, int], bytes], *, partition: int = 0) -> Content:
    """What is there, of what libblkid found; `read` gives bytes at an offset."""
    whole = [one for one in look.superblocks if not one.is_damaged and fits(one.kind, read)]
    below = [one for one in whole if one.usage in _BELOW]
    systems = _without_stubs([one for one in whole if one.usage == "filesystem"])
    others = [one for one in whole if one.usage not in (*_BELOW, "filesystem")]
    table = look.table if look.table and look.table.partitions else None
    if table and not below and len(systems) == 1 and not others and _is_no_table(table, systems[0]):
        table = None
    found = [*below, *others, *systems]
    names = [*map(name, found), *([name_table(table)] if table else [])]
    if len(names) == 1 and systems and not systems[0].is_damaged:
        return Content(_KERNELS_WORD.get(systems[0].kind, systems[0].kind), tuple(names), None)
    if below:
        return Content(None, tuple(names), _REMEDIES.get(below[0].kind, _PUBLISH))
    if len(names) > 1:
        return Content(None, tuple(names), _ambiguous(systems, table))
    if table:
        return Content(None, tuple(names), _mount_a_partition(table, partition))
    if others:
        return Content(None, tuple(names), _REMEDIES.get(others[0].kind, _PUBLISH))
    return _remains(look)


def _remains(look: Look) -> Content:
    """What is left when nothing whole is there."""
    if damaged := [one for one in look.superblocks if one.is_damaged]:
        names = tuple(f"{name(one)} whose checksum is wrong" for one in damaged)
        return Content(None, names, "repair it (fsck) while it is attached without a guest path, or read its device")
    if look.superblocks:
        names = tuple(f"the signature of {name(one)}, without a superblock that fits" for one in look.superblocks)
        return Content(None, names, "it is damaged, or chance: name the file system if you know it (filesystem)")
    if hidden := look.hidden or look.table:
        if not hidden.partitions:
            return Content(None, (name_table(hidden),), "partition it in the guest: attach it without a guest path")
        return Content(None, (name_table(hidden),), _hidden_remedy(hidden))
    return Content(None, (), None)


def refusal(content: Content, where: str, node: str, *, has_key: bool) -> Fault:
    """Why the device is not mounted."""
    key = " with this key" if has_key else ""
    if len(content.names) > 1:
        text = f"it cannot be told which file system{key} is on {where}: it holds {content}"
        return Fault(text, remedy=content.remedy)
    if content.names:
        text = f"no file system to mount is on {where}{key}: it holds {content}"
        return Fault(text, remedy=content.remedy)
    if has_key:
        text = f"no file system that we know shows on {where} with this key: it is another key, or none was made there"
        return Fault(text, remedy="give the key that it was made with, or have a file system made on a blank disk")
    if _ends_are_blank(node):
        return Fault(f"no file system that we know is on {where}: it looks blank", kind="no_filesystem")
    text = f"no file system that we know is on {where}, and it is not blank"
    remedy = "name its file system if you know it (filesystem); if it is encrypted without a header, give the key"
    return Fault(text, remedy=f"{remedy} (--key-file); or {_PUBLISH}")


def instead_of_partitions(disk: str, deadline: float) -> tuple[str, str] | None:
    """What a disk has on which the kernel found no partition, and what to do; None if there is nothing to tell."""
    try:
        _, sector_bytes = blkid.sizes(disk)
        look = blkid.look(disk, deadline)
    except (Fault, OSError):
        return None
    for table in (look.table, look.hidden):
        if not table or not table.partitions:
            continue
        if table.sector_bytes != sector_bytes:
            what = f"it has {name_table(table)}, which counts in sectors of {table.sector_bytes} bytes"
            return f"{what}, and the disk has sectors of {sector_bytes}", _hidden_remedy(table)
        if table.kind == "gpt" and not is_gpt_at(_reader(disk), sector_bytes):
            what = f"the first copy of {name_table(table)} is damaged, and the backup at the end of the disk is whole"
            return what, "have the first copy made from the backup: run fdisk on the disk or its image, and type w"
        return f"it has {name_table(table)} that the guest's kernel does not take", _hidden_remedy(table)
    content = judge(look, _reader(disk))
    if not content.names:
        return None
    what = f"it has no partition table that we know, and holds {content}"
    return what, "mount the whole disk: leave the partition out" if content.filesystem else content.remedy or _PUBLISH


def notes_of_table(disk: str) -> Sequence[str]:
    """What is to be said of a disk with a partition table that works, and not as it should."""
    read, fdisk = _reader(disk), "run fdisk on the disk or its image, and type w"
    with suppress(OSError, struct.error):
        size, sector = blkid.sizes(disk)
        if not is_gpt_at(read, sector):
            return ()
        (backup,) = struct.unpack("<Q", read(sector + 32, 8))
        last = size // sector - 1
        if backup < last:
            text = f"the backup of the partition table (GPT) is in sector {backup}, and the disk now ends with {last}"
            return (f"{text}: to move it to the end, {fdisk}",)
        if backup > last or read(last * sector, 8) != _GPT_SIGNATURE:
            return (f"the partition table (GPT) has no backup at the end of the disk: to make it anew, {fdisk}",)
    return ()


def is_gpt_at(read: Callable[[int, int], bytes], sector_bytes: int) -> bool:
    """Is there the first header of a GPT?"""
    return read(sector_bytes, 8) == _GPT_SIGNATURE


def name(one: Superblock) -> str:
    """What a superblock is, in words."""
    if one.kind in _WORDS:
        return _WORDS[one.kind]
    article = "an" if one.kind.startswith(_SAID_WITH_AN) else "a"
    match one.usage:
        case "filesystem":
            return f"{article} {one.kind} file system"
        case "raid":
            return f"a member of a RAID or a pool ({one.kind})"
        case "crypto":
            return f"an encrypted volume ({one.kind})"
        case _:
            return f"something that is no file system ({one.kind})"


def name_table(table: Table) -> str:
    """What a partition table is, in words, with its partitions."""
    kind = _TABLES.get(table.kind, table.kind)
    numbers = [str(part.number) for part in table.partitions]
    if not numbers:
        return f"a partition table ({kind}) without partitions"
    return f"a partition table ({kind}) with partition{'s' if len(numbers) > 1 else ''} {_listed(numbers)}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _without_stubs(systems: list[Superblock]) -> list[Superblock]:
    if len(systems) > 1 and {one.kind for one in systems} <= set(_DISC):
        return [min(systems, key=lambda one: _DISC.index(one.kind))]
    return systems


def _is_no_table(table: Table, system: Superblock) -> bool:
    """Is it one that a file system of this kind has beside it, or that its boot code is taken for?"""
    if system.kind in _DISC:
        return True
    return table.kind != "gpt" and (system.kind in _OWN_BOOT_CODE or table.kind not in _TABLES)


def _ambiguous(systems: Sequence[Superblock], table: Table | None) -> str:
    ways = [f"filesystem={_KERNELS_WORD.get(one.kind, one.kind)}" for one in systems]
    ways += [f"partition={table.partitions[0].number}"] if table else []
    if not ways:
        return _PUBLISH
    return f"say which: {' or '.join(ways)}; the others' signatures are what is left of earlier use: see wipefs(8)"


def _mount_a_partition(table: Table, partition: int) -> str:
    if partition:
        return f"it is a disk within a partition: {_PUBLISH}"
    first = table.partitions[0].number
    return f"mount one of its partitions: partition={first} (--partition {first})"


def _hidden_remedy(table: Table) -> str:
    if table.sector_bytes != blkid.UNIT:
        size = table.sector_bytes
        return f"attach the disk with sectors of {size} bytes: sector_size_bytes={size} (--sector-size {size})"
    return "repair the table with fdisk or gdisk, on the device or on the image"


def _reader(node: str) -> Callable[[int, int], bytes]:
    def read(offset: int, length: int) -> bytes:
        fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(fd, length, offset)
        finally:
            os.close(fd)

    return read


def _ends_are_blank(node: str) -> bool:
    read, (size, _) = _reader(node), blkid.sizes(node)
    return not any(read(0, _ENDS).strip(b"\0") + read(max(0, size - _ENDS), _ENDS).strip(b"\0"))


# libblkid takes the kinds below by their signature, or by little more.


def fits(kind: str, read: Callable[[int, int], bytes]) -> bool:
    """Has the superblock what every file system of the kind has in it? True for kinds that libblkid looks at well."""
    try:
        return _CHECKS[kind](read) if kind in _CHECKS else True
    except (struct.error, OSError):
        return False  # the device ends in it


def _ext(read: Callable[[int, int], bytes]) -> bool:
    inodes, blocks, first, log_size, per_group, inodes_per_group = struct.unpack("<II 12x II 4x I 4x I", read(1024, 44))
    return bool(inodes and blocks and first <= 1 and log_size <= 6 and per_group and inodes_per_group)


def _btrfs(read: Callable[[int, int], bytes]) -> bool:
    own, total, disks, sector, node = struct.unpack("<Q 56x Q 16x QII", read(65536 + 48, 104))
    return bool(own == 65536 and total and disks and sector in _POWERS and node in _POWERS)


def _erofs(read: Callable[[int, int], bytes]) -> bool:
    block_bits, inodes, blocks = struct.unpack("<12x B 3x Q 12x I", read(1024, 40))
    return bool(9 <= block_bits <= 16 and inodes and blocks)


def _f2fs(read: Callable[[int, int], bytes]) -> bool:
    log_sector, log_block, blocks = struct.unpack("<8x I 4x I 16x Q", read(1024, 44))
    return bool(9 <= log_sector <= 12 and 12 <= log_block <= 16 and blocks)


def _squashfs(read: Callable[[int, int], bytes]) -> bool:
    inodes, block, log, major = struct.unpack("<4x I 4x I 6x H 4x H", read(0, 30))
    return bool(inodes and major and (block == 1 << log if major >= 4 else True))


def _iso9660(read: Callable[[int, int], bytes]) -> bool:
    for number in range(16, 32):
        volume = read(number * _ISO_SECTOR, _ISO_SECTOR)
        if volume[1:6] != b"CD001":
            return number == 16 and volume[9:14] == b"CDROM"  # High Sierra, which came before it
        if volume[0] == 1:
            blocks, size = volume[80:88], volume[128:132]
            both = blocks[:4] == blocks[:3:-1] and size[:2] == size[:1:-1]
            return both and any(blocks) and volume[156] >= 34
    return False


_CHECKS: Final[dict[str, Callable[[Callable[[int, int], bytes]], bool]]] = {
    **dict.fromkeys(("ext2", "ext3", "ext4", "ext4dev"), _ext),
    "btrfs": _btrfs,
    "erofs": _erofs,
    "f2fs": _f2fs,
    "squashfs": _squashfs,
    "iso9660": _iso9660,
}
