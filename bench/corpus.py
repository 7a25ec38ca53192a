"""Makes images of every kind that people have, attaches each to one VM, and writes `docs/images.md` of what came of it.

`./dev corpus` runs it. Every image is made here, by the tools that make such images; nothing is downloaded. What the
guest sees is compared with what was put in, and with what other readers of the format say: `qemu-img`, and the
libraries libvhdi, libvmdk and libqcow where they are installed; for file systems `blkid` and the file system's own
check. A judge that is not installed is left out of the table.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from utilityvm import GENERATED, GuestImage, UtilityVM, UtilityVMError, VMConfig

MIB: Final = 1 << 20
DISK_MIB: Final = 16
PAGE: Final = Path(__file__).parent.parent / "docs/images.md"
TEXT: Final = "what was put in"


@dataclass
class Image:
    """An image of the corpus: how it is made, and what its format's other readers are."""

    name: str
    make: Callable[[Path, Path], object]  # the disk as raw bytes, and the image to make of it
    suffix: str = ".img"
    judge: str | None = None  # the program that tells its size
    sector: int | None = None


@dataclass
class FileSystem:
    """A file system of the corpus."""

    name: str
    make: str  # a shell command; $D is the image, $T a folder with a file in it
    check: str | None = None  # the file system's own check
    mib: int = 64
    has_file: bool = False  # mkfs put the file of $T into it


@dataclass
class Row:
    name: str
    cells: list[str] = field(default_factory=list)


def convert(format: str, options: str = "") -> Callable[[Path, Path], object]:
    words = ["-o", options] if options else []
    return lambda disk, image: tool("qemu-img", "convert", "-f", "raw", "-O", format, *words, disk, image)


def vhd(creator: bytes, *, kind: str) -> Callable[[Path, Path], object]:
    """As other programs write it: the footer says the disk's size, and the geometry is rounded down."""

    def make(disk: Path, image: Path) -> None:
        convert("vpc", f"subformat={kind},force_size")(disk, image)
        data = bytearray(image.read_bytes())
        sectors = disk.stat().st_size // 512
        for at in {0 if data[:8] == b"conectix" else len(data) - 512, len(data) - 512}:
            struct.pack_into(">4s", data, at + 28, creator)
            struct.pack_into(">HBB", data, at + 56, sectors // (4 * 17), 4, 17)
            struct.pack_into(">I", data, at + 64, 0)
            struct.pack_into(">I", data, at + 64, ~sum(data[at : at + 512]) & 0xFFFFFFFF)
        image.write_bytes(data)

    return make


def by(command: str) -> Callable[[Path, Path], object]:
    return lambda disk, image: tool("sh", "-c", command, D=str(disk), I=str(image))


def cut(format: str, bytes_left: int) -> Callable[[Path, Path], object]:
    def make(disk: Path, image: Path) -> None:
        convert(format, "subformat=fixed,force_size" if format == "vpc" else "")(disk, image)
        with image.open("r+b") as file:
            file.truncate(image.stat().st_size + bytes_left)

    return make


IMAGES: Final = [
    Image("raw", by('cp "$D" "$I"')),
    Image("raw, sectors of 4096 bytes", by('cp "$D" "$I"'), sector=4096),
    *(
        Image(f"qcow2, {options or 'as qemu-img makes it'}", convert("qcow2", options), ".qcow2", "qcowinfo")
        for options in (
            "",
            "compat=0.10",
            "cluster_size=512",
            "cluster_size=2M",
            "lazy_refcounts=on",
            "extended_l2=on",
            "compression_type=zstd",
            "preallocation=metadata",
            "refcount_bits=1",
        )
    ),
    Image("qcow2, compressed", by('qemu-img convert -c -f raw -O qcow2 "$D" "$I"'), ".qcow2", "qcowinfo"),
    Image("qcow2 over a backing file", by('qemu-img create -q -f qcow2 -F raw -b "$D" "$I"'), ".qcow2"),
    Image("qcow version 1", convert("qcow"), ".img"),
    *(
        Image(
            f"VHD fixed, creator {creator.decode()!r}", vhd(creator.ljust(4, b"\0"), kind="fixed"), ".vhd", "vhdiinfo"
        )
        for creator in (b"vpc ", b"win ", b"qemu", b"qem2", b"vbox", b"wa", b"dutl", b"vs", b"d2v ", b"CTXS", b"tap")
    ),
    *(
        Image(
            f"VHD dynamic, creator {creator.decode()!r}",
            vhd(creator.ljust(4, b"\0"), kind="dynamic"),
            ".vhd",
            "vhdiinfo",
        )
        for creator in (b"vpc ", b"win ", b"qemu", b"qem2", b"vbox", b"wa", b"d2v ", b"CTXS", b"tap")
    ),
    Image("VHD fixed, cut short by 4096 bytes", cut("vpc", -4096), ".vhd"),
    Image("VHD fixed, 4096 bytes behind its footer", cut("vpc", 4096), ".vhd"),
    *(
        Image(f"VHDX, {options or 'as qemu-img makes it'}", convert("vhdx", options), ".vhdx")
        for options in ("", "subformat=fixed", "block_size=1M", "block_size=256M")
    ),
    *(
        Image(f"VMDK, {subformat}", convert("vmdk", f"subformat={subformat}"), ".vmdk", "vmdkinfo")
        for subformat in ("monolithicSparse", "streamOptimized", "monolithicFlat", "twoGbMaxExtentSparse")
    ),
    Image("VDI", convert("vdi"), ".vdi"),
    Image("QED", convert("qed"), ".qed"),
    Image("Parallels", convert("parallels"), ".hds"),
    Image("gzip", by('gzip -c "$D" > "$I"'), ".raw.gz"),
    Image("xz", by('xz -0 -c "$D" > "$I"'), ".raw.xz"),
    Image("zstd", by('zstd -q -c "$D" > "$I"'), ".raw.zst"),
    Image("bzip2", by('bzip2 -c "$D" > "$I"'), ".raw.bz2"),
    Image("lz4", by('lz4 -q -c "$D" > "$I"'), ".raw.lz4"),
    Image("zip", by('zip -q - "$D" > "$I"'), ".zip"),
    Image("tar", by('tar -cf "$I" "$D" 2> /dev/null'), ".tar"),
    Image("raw bytes named .qcow2", by('cp "$D" "$I"'), ".qcow2"),
    Image("qcow2 named .raw", convert("qcow2"), ".raw"),
]

FILE_SYSTEMS: Final = [
    FileSystem("ext4", "mkfs.ext4 -q -F -d $T $D", "e2fsck -fn $D", has_file=True),
    FileSystem("ext3", "mkfs.ext3 -q -F -d $T $D", "e2fsck -fn $D", has_file=True),
    FileSystem("ext2", "mkfs.ext2 -q -F -d $T $D", "e2fsck -fn $D", has_file=True),
    FileSystem("ext4 with quota", "mkfs.ext4 -q -F -O quota -d $T $D", "e2fsck -fn $D", has_file=True),
    FileSystem("ext4 without a journal", "mkfs.ext4 -q -F -O ^has_journal -d $T $D", "e2fsck -fn $D", has_file=True),
    FileSystem("xfs", "mkfs.xfs -q -f $D", "xfs_repair -n $D", mib=320),
    FileSystem("btrfs", "mkfs.btrfs -q -f -r $T $D", "btrfs check $D", mib=128, has_file=True),
    FileSystem("vfat (FAT32)", "mkfs.vfat -F 32 $D", "fsck.vfat -n $D"),
    FileSystem("vfat (FAT16)", "mkfs.vfat -F 16 $D", "fsck.vfat -n $D"),
    FileSystem("vfat (FAT12)", "mkfs.vfat -F 12 $D", "fsck.vfat -n $D", mib=4),
    FileSystem("exfat", "mkfs.exfat $D", "fsck.exfat -n $D"),
    FileSystem("erofs", "rm $D; mkfs.erofs $D $T", has_file=True),
    FileSystem("squashfs", "rm $D; mksquashfs $T $D -quiet -no-progress", has_file=True),
    FileSystem("iso9660", "rm $D; xorriso -as mkisofs -quiet -o $D $T", has_file=True),
    FileSystem("iso9660 with Joliet and Rock Ridge", "rm $D; xorriso -as mkisofs -quiet -J -R -o $D $T", has_file=True),
    FileSystem("UDF 2.01", "mkudffs --utf8 $D"),
    FileSystem("ntfs", "mkntfs -q -F $D", "ntfsfix -n $D"),
    FileSystem("f2fs", "mkfs.f2fs -q $D", "fsck.f2fs --dry-run $D", mib=128),
    FileSystem("jfs", "mkfs.jfs -q $D", "fsck.jfs -n $D"),
    FileSystem("reiserfs", "mkreiserfs -q -f -f $D", "reiserfsck --check -y $D"),
    FileSystem("nilfs2", "mkfs.nilfs2 -q $D", mib=160),
    FileSystem("swap", "mkswap -q $D"),
    FileSystem("LUKS2", "printf key | cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 $D -"),
    FileSystem("partitioned (GPT), nothing in it", "printf 'label: gpt\\n,,L\\n' | sfdisk -q $D"),
    FileSystem("nothing at all", "true"),
]


class Missing(Exception):
    """A program that makes an image is not installed, or does not make it."""


def tool(*words: str | Path, **env: str) -> str:
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/nowhere", **env}
    try:
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, check=False, timeout=120, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise Missing(f"{words[0]} is not installed") from error
    if done.returncode:
        raise Missing((done.stderr or done.stdout).strip().splitlines()[-1] if done.stderr or done.stdout else "failed")
    return done.stdout


def digest(path: Path, size: int) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        sha.update(file.read(size))
    return sha.hexdigest()


async def inside(vm: UtilityVM, command: str) -> str:
    done = await vm.run(["sh", "-c", command], timeout_s=60)
    if done.exit_code:
        raise RuntimeError(f"{command}: {done.stderr.decode()}")
    return done.stdout.decode().strip()


async def newest(vm: UtilityVM) -> str:
    """The guest's name of the one disk that is attached beside its root disk."""
    return await inside(vm, "ls /sys/block | grep ^sd | sort | tail -1")


def said(error: UtilityVMError, folder: Path) -> str:
    text = re.sub(rf"{re.escape(str(folder))}/[^ :]*:? ?", "", str(error)).replace(f"{folder.parent}/", "")
    text = re.sub(r"^\d+:\d+ at \S+: ", "", text)  # where it was to be mounted: the same in each row
    return text.replace("|", "\\|").replace("\n", " ")


def told_by_judge(image: Image, path: Path) -> str:
    """What another reader says that its size is; empty if there is none, or it does not read it."""
    if image.judge is None or shutil.which(image.judge) is None:
        return ""
    try:
        text = tool(image.judge, path)
    except Missing:
        return f"{image.judge}: does not read it"
    found = re.search(r"(?i)media size\s*:.*?\((\d+) bytes\)", text) or re.search(
        r"(?i)media size\s*:.*?(\d+) bytes", text
    )
    return f"{image.judge}: {found[1]}" if found else f"{image.judge}: no size"


def told_by_qemu(path: Path) -> str:
    """Its format is found by qemu-img, but for a VHD: a fixed one looks like a raw disk to it."""
    format = ["-f", "vpc"] if path.suffix == ".vhd" else []
    try:
        found = re.search(r'"virtual-size": (\d+)', tool("qemu-img", "info", *format, "--output=json", path))
    except Missing:
        return "qemu-img: does not read it"
    return f"qemu-img: {found[1]}" if found else "qemu-img: no size"


async def try_image(vm: UtilityVM, image: Image, disk: Path, folder: Path) -> Row:
    path = folder / f"image{image.suffix}"
    try:
        image.make(disk, path)
    except Missing as error:
        return Row(image.name, [f"not made: {error}", "", ""])
    size = disk.stat().st_size
    judges = "; ".join(filter(None, (told_by_qemu(path), told_by_judge(image, path))))
    before = digest(path, path.stat().st_size)
    try:
        async with vm.add_scsi(path, read_only=True, sector_size_bytes=image.sector):
            device = await newest(vm)
            seen = int(await inside(vm, f"blockdev --getsize64 /dev/{device}"))
            same = (await inside(vm, f"head -c {size} /dev/{device} | sha256sum")).split()[0] == digest(disk, size)
    except UtilityVMError as error:
        return Row(image.name, [f"refused: {said(error, folder)}", "", judges])
    assert digest(path, path.stat().st_size) == before, f"{image.name}: a read-only attach changed it"
    read = f"{seen} bytes, {'the same' if same else 'OTHER'} content"
    return Row(image.name, [read, await try_to_write(vm, image, path, folder), judges])


async def try_to_write(vm: UtilityVM, image: Image, path: Path, folder: Path) -> str:
    """The guest writes to it, and qemu-img must read the same afterwards."""
    try:
        async with vm.add_scsi(path, sector_size_bytes=image.sector):
            device = await newest(vm)
            await inside(vm, f"dd if=/dev/urandom of=/dev/{device} bs=1M seek=3 count=2 conv=fsync 2>/dev/null")
            seen = (await inside(vm, f"sha256sum /dev/{device}")).split()[0]
            size = int(await inside(vm, f"blockdev --getsize64 /dev/{device}"))
    except UtilityVMError as error:
        return f"refused: {said(error, folder)}"
    kind = {".vhd": "vpc", ".img": "raw"}.get(image.suffix, image.suffix[1:])
    source = ["--image-opts", f"driver={kind},file.filename={path}"]
    if kind == "vpc":
        source[1] += ",force_size_calc=current_size"
    raw = folder / "read-back.raw"
    try:
        tool("qemu-img", "convert", *source, "-O", "raw", raw)
        if kind in ("qcow2", "vhdx", "vmdk"):
            tool("qemu-img", "check", "-q", "-f", kind, path)
    except Missing as error:
        return f"BAD: {error}"
    return "the same in qemu-img" if digest(raw, size) == seen else "OTHER in qemu-img"


async def try_file_system(vm: UtilityVM, kind: FileSystem, folder: Path) -> Row:
    path, tree = folder / "image.raw", folder / "tree"
    tree.mkdir(exist_ok=True)
    (tree / "file").write_text(TEXT)
    with path.open("wb") as file:
        file.truncate(kind.mib * MIB)
    try:
        tool("sh", "-c", kind.make, D=shlex.quote(str(path)), T=shlex.quote(str(tree)))
    except Missing as error:
        return Row(kind.name, [f"not made: {error}", "", ""])
    try:
        judges = "blkid: " + tool("blkid", "-p", "-s", "TYPE", "-s", "PTTYPE", "-o", "value", path).strip().replace(
            "\n", ", "
        )
    except Missing:
        judges = "blkid: nothing"
    try:
        async with vm.add_scsi(path, GENERATED, read_only=True) as mount:
            name = await inside(vm, f"findmnt -n -o FSTYPE {mount.guest_path} || stat -f -c %T {mount.guest_path}")
            found = await inside(vm, f"cat {mount.guest_path}/[Ff][Ii][Ll][Ee]* 2>/dev/null || true")
    except UtilityVMError as error:
        return Row(kind.name, [f"refused: {said(error, folder)}", "", judges])
    read = f"as {name}" + ((", with its file" if TEXT in found else ", WITHOUT its file") if kind.has_file else "")
    try:
        async with vm.add_scsi(path, GENERATED) as mount:
            await inside(vm, f"cd {mount.guest_path} && dd if=/dev/urandom of=new bs=64k count=16 2>/dev/null && sync")
        written = "written"
    except UtilityVMError as error:
        return Row(kind.name, [read, f"refused: {said(error, folder)}", judges])
    except RuntimeError:
        return Row(kind.name, [read, "read-only", judges])
    if kind.check:
        try:
            tool("sh", "-c", kind.check, D=shlex.quote(str(path)))
            judges += f"; {kind.check.split()[0]}: clean"
        except Missing as error:
            judges += f"; {kind.check.split()[0]}: {error}"
    return Row(kind.name, [read, written, judges])


def table(titles: list[str], rows: list[Row]) -> str:
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    return "\n".join([*lines, *(f"| {' | '.join([row.name, *row.cells])} |" for row in rows)])


def page(images: list[Row], systems: list[Row]) -> str:
    version = tool("qemu-img", "--version").splitlines()[0].partition("(")[0].strip()
    return f"""# Images that were tried

<!-- made by `./dev corpus` (bench/corpus.py): run it, do not edit this page -->

Each row was made by the tool that makes such images, and attached to a VM ({version}).
Read: what the guest saw of it, attached read-only, compared with what was put in; the file was compared too, and no
read-only attach changed one. Written: the guest wrote to it, and another reader read it afterwards. The last column is
what other readers say.

## Formats

A disk of {DISK_MIB * MIB} bytes in each.

{table(["image", "read", "written", "judges"], images)}

## File systems

On raw images.

{table(["file system", "read", "written", "judges"], systems)}
"""


async def main() -> int:
    parser = argparse.ArgumentParser(description="Make the corpus of images, try each, and write docs/images.md.")
    parser.add_argument("--output", type=Path, default=PAGE, help="where to write the page")
    output: Path = parser.parse_args().output
    with tempfile.TemporaryDirectory(prefix="utilityvm-corpus-") as name:
        top = Path(name)
        for what in ("STATE", "RUNTIME"):  # nothing of this machine's own VMs is touched
            os.environ[f"UTILITYVM_{what}_DIR"] = str(top / what.lower())
        disk = top / "disk.raw"
        disk.write_bytes(hashlib.shake_128(b"utilityvm").digest(DISK_MIB * MIB))
        images: list[Row] = []
        systems: list[Row] = []
        config = VMConfig(name=f"corpus-{top.name[-6:].replace('_', 'x')}")
        async with UtilityVM.start(config, image=GuestImage.build()) as vm:
            for number, image in enumerate(IMAGES):
                (folder := top / f"i{number}").mkdir()
                images.append(await try_image(vm, image, disk, folder))
                print(images[-1].name, *images[-1].cells, sep=" | ", file=sys.stderr, flush=True)
                shutil.rmtree(folder)
            for number, kind in enumerate(FILE_SYSTEMS):
                (folder := top / f"f{number}").mkdir()
                systems.append(await try_file_system(vm, kind, folder))
                print(systems[-1].name, *systems[-1].cells, sep=" | ", file=sys.stderr, flush=True)
                shutil.rmtree(folder)
    output.write_text(page(images, systems))
    bad = [
        row
        for row in images + systems
        if any(word in cell for cell in row.cells for word in ("OTHER", "BAD:", "WITHOUT"))
    ]
    for row in bad:
        print(f"bad: {row.name}: {'; '.join(row.cells)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
