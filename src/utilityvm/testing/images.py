"""Real disk images with real file systems, made by the tools that everybody has: QEMU's and e2fsprogs'."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from utilityvm.machine.programs import find_program, run
from utilityvm.scsi.ports import DiskFormat

_SUFFIX = {DiskFormat.VHD: "vhd"}


def ext4_image(
    path: Path, files: Mapping[str, str], *, image_format: DiskFormat = DiskFormat.RAW, size_mib: int = 16
) -> Path:
    """Make an ext4 file system with `files` (path to text) as an image at `path`, and give `path`.

    Raises:
        SetupError: qemu-img or mkfs.ext4 is missing, or failed.
    """
    tree, raw = path.with_name(path.name + ".tree"), path.with_name(path.name + ".raw")
    tree.mkdir()
    try:
        for name, text in files.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_text(text)
        run([find_program("mkfs.ext4", package="e2fsprogs"), "-q", "-F", "-d", tree, raw, f"{size_mib}M"])
        convert(raw, path, source_format=DiskFormat.RAW, image_format=image_format)
    finally:
        shutil.rmtree(tree)
        raw.unlink(missing_ok=True)
    return path


def convert(source: Path, target: Path, *, source_format: DiskFormat, image_format: DiskFormat) -> None:
    """Make `target` an image of `image_format` with what `source` holds."""
    qemu_img = find_program("qemu-img", package="qemu-utils")
    # Without force_size the vpc driver rounds the size up to a whole cylinder.
    options = ["-o", "force_size=on"] if image_format is DiskFormat.VHD else []
    run([qemu_img, "convert", "-f", source_format, "-O", image_format, *options, source, target])


def read_file(image: Path, name: str, *, image_format: DiskFormat) -> str:
    """What the file `name` holds in the image's ext4 file system, read without mounting it."""
    raw = image.with_name(image.name + ".read")
    try:
        convert(image, raw, source_format=image_format, image_format=DiskFormat.RAW)
        # The journal is replayed first: what the guest wrote last may be there alone.
        run([find_program("e2fsck", package="e2fsprogs"), "-E", "journal_only", "-p", raw])
        return run([find_program("debugfs", package="e2fsprogs"), "-R", f"cat {name}", raw]).decode()
    finally:
        raw.unlink(missing_ok=True)


def suffix(image_format: DiskFormat) -> str:
    """The file name ending that people give to images of this format."""
    return _SUFFIX.get(image_format, image_format.value)
