"""Builds the guest image, and finds it again.

In two steps, because they change at different times. The *base* is Debian's packages, fetched and unpacked by mmdebstrap
(some ten seconds, and the network); the *image* is a base with the agent, as a kernel, an initramfs and a root disk
(some seconds). Both are folders in the cache named after a hash of what went into them, so that a changed agent or
recipe is another image. A folder gets its name when it is complete and not before: a build that is cut short leaves
only a temporary folder, which the next build removes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from utilityvm.errors import SetupError
from utilityvm.guestimage import initramfs, recipe
from utilityvm.log import logger
from utilityvm.paths import cache_dir
from utilityvm.process import CommandFailed, find_program, run

_log = logger(__name__)

Progress = Callable[[str, float], None]  # what is being done, and how much of all of it is done (0 to 1)

BASE_SPACE_BYTES: Final = 1_200_000_000  # what a build needs at its widest, with room to spare
IMAGE_SPACE_BYTES: Final = 500_000_000
_FILES: Final = ("vmlinuz", "initramfs", "root.ext4")


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestImage:
    """A guest image in the cache. Nobody writes to these files; every VM shares them."""

    key: str
    arch: str
    kernel: Path
    initramfs: Path
    root: Path  # raw ext4, attached read-only at 0:0
    cmdline: str
    suite: str
    packages: int
    built_at: float
    size_bytes: int


def ensure(*, progress: Progress | None = None) -> GuestImage:
    """Give the image of this recipe and agent, and build it first if it is not there.

    Waits for another build of it rather than doing it twice. On failure nothing is left but the base, if that was done.

    Raises:
        SetupError: a program, space or a package is missing; the remedy says which.
    """
    if image := find():
        return image
    report = progress or (lambda what, done: None)
    arch = recipe.architecture()
    suite = host_suite()
    with _building(_images() / ".lock", report):
        if image := find():  # somebody else built it while we waited
            return image
        base = _ensure_base(arch, suite, report)
        key = image_key(arch, suite)
        with _new_folder(_images(), key, space_bytes=IMAGE_SPACE_BYTES) as folder:
            _make_image(base, folder, arch=arch, suite=suite, report=report)
        report("done", 1.0)
    image = find()
    assert image is not None
    return image


def find() -> GuestImage | None:
    """The image of this recipe and agent, if it is in the cache and whole."""
    return _load(_images() / image_key(recipe.architecture(), host_suite()))


def catalog() -> list[GuestImage]:
    """Every whole image in the cache, the newest first."""
    folders = _images().iterdir() if _images().is_dir() else []
    images = [image for folder in folders if not folder.name.startswith(".") and (image := _load(folder))]
    return sorted(images, key=lambda image: image.built_at, reverse=True)


def verify(image: GuestImage) -> None:
    """Compare the files with the hashes of their building.

    Raises:
        SetupError: a file is not what was built.
    """
    folder = image.kernel.parent
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in _FILES:
        if _sha256(folder / name) != manifest["files"][name]["sha256"]:
            raise SetupError(f"{folder / name} is not what was built", remedy=f"rm -r {folder}, then `uvm image build`")


def host_suite() -> str:
    """The Debian suite of this machine, whose packages the guest gets.

    Raises:
        SetupError: this is not Debian.
    """
    fields: dict[str, str] = {}
    try:
        for line in Path("/etc/os-release").read_text().splitlines():
            name, _, value = line.partition("=")
            fields[name] = value.strip('"')
    except OSError:
        pass
    if fields.get("ID") != "debian" or not (suite := fields.get("VERSION_CODENAME")):
        raise SetupError(
            "the guest image is built from the packages of the Debian that this runs on, and this is not Debian",
            remedy="build it on Debian 12 or 13 with the same utilityvm, and copy ~/.cache/utilityvm",
        )
    return suite


def image_key(arch: recipe.Architecture, suite: str) -> str:
    """What the image of this recipe and agent is called in the cache."""
    digest = hashlib.sha256(_base_key(arch, suite).encode())
    for name, data in agent_files():
        digest.update(name.encode() + b"\0" + data + b"\0")
    for module in (recipe, initramfs):
        digest.update(_source(module.__name__))
    digest.update(_source(__name__))
    return digest.hexdigest()[:16]


def agent_files() -> Iterator[tuple[str, bytes]]:
    """The parts of this package that run in the guest, by their path in it."""
    package = resources.files("utilityvm")
    yield "__init__.py", b""
    for room in ("bridge", "agent"):
        for entry in sorted((package / room).iterdir(), key=lambda entry: entry.name):
            if entry.name.endswith(".py"):
                yield f"{room}/{entry.name}", entry.read_bytes()


def _images() -> Path:
    return cache_dir() / "images"


def _source(module: str) -> bytes:
    return (resources.files("utilityvm.guestimage") / f"{module.rpartition('.')[2]}.py").read_bytes()


def _base_key(arch: recipe.Architecture, suite: str) -> str:
    return hashlib.sha256(_source(recipe.__name__) + f"{arch.debian} {suite}".encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(folder: Path) -> GuestImage | None:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name in _FILES:
            if (folder / name).stat().st_size != manifest["files"][name]["size"]:
                return None
        return GuestImage(
            key=folder.name,
            arch=manifest["arch"],
            kernel=folder / "vmlinuz",
            initramfs=folder / "initramfs",
            root=folder / "root.ext4",
            cmdline=manifest["cmdline"],
            suite=manifest["suite"],
            packages=len(manifest["packages"]),
            built_at=manifest["built_at"],
            size_bytes=sum(entry["size"] for entry in manifest["files"].values()),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _building(lock: Path, report: Progress) -> Iterator[None]:
    """Hold the builders' lock; the kernel drops it if we die."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another build", 0.0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _new_folder(parent: Path, name: str, *, space_bytes: int) -> Iterator[Path]:
    """A folder that gets its name when the block is done, and is gone if the block fails. Needs the builders' lock."""
    for stale in parent.glob(".new-*"):
        shutil.rmtree(stale, ignore_errors=True)
    free = shutil.disk_usage(parent).free
    if free < space_bytes:
        raise SetupError(
            f"{parent} has {free // 1_000_000} MB free, and the guest image needs {space_bytes // 1_000_000} MB to build",
            remedy="make room, or set XDG_CACHE_HOME to a folder on a larger disk",
        )
    folder = parent / f".new-{name}"
    folder.mkdir()
    try:
        yield folder
        for path in folder.iterdir():
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if (parent / name).exists():  # there, but not whole
            shutil.rmtree(parent / name)
        folder.rename(parent / name)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise SetupError(
            f"the guest image could not be written: {error.strerror or error}", remedy=f"is there room in {parent}?"
        ) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _ensure_base(arch: recipe.Architecture, suite: str, report: Progress) -> Path:
    bases = cache_dir() / "bases"
    bases.mkdir(parents=True, exist_ok=True)
    name = _base_key(arch, suite)
    if not (bases / name / "root.tar").exists():
        with _new_folder(bases, name, space_bytes=BASE_SPACE_BYTES) as folder:
            report("fetching Debian packages", 0.05)
            _fetch(folder / "all.tar", arch=arch, suite=suite)
            report("leaving out what no VM needs", 0.5)
            _trim(folder / "all.tar", folder / "root.tar")
            (folder / "all.tar").unlink()
    return bases / name / "root.tar"


def _debian_sources() -> list[Path]:
    """The host's own package sources that speak of Debian: other vendors' have no place in the guest."""
    found = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    good = []
    for path in found:
        if path.suffix not in (".list", ".sources") or not path.is_file():
            continue
        lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
        if lines and "/debian" in "\n".join(lines):
            good.append(path)
    if not good:
        raise SetupError("no Debian package source in /etc/apt", remedy="add one, then apt-get update")
    return good


def _fetch(target: Path, *, arch: recipe.Architecture, suite: str) -> None:
    program = find_program("mmdebstrap", package="mmdebstrap")
    packages = ",".join((*recipe.PACKAGES, arch.kernel_package))
    command: list[str | Path] = [
        program,
        "--variant=extract",
        f"--architectures={arch.debian}",
        f"--include={packages}",
    ]
    command += [suite, target, *_debian_sources()]
    try:
        run(command, timeout_s=1800)
    except CommandFailed as error:
        raise SetupError(
            f"mmdebstrap could not fetch the guest's packages: {error}",
            remedy=f"is the network up? It was run as: {error.command}",
        ) from error


def _kept(name: str) -> bool:
    if any(name.startswith(prefix) for prefix in recipe.LEFT_OUT):
        return False
    parts = name.split("/")
    if "modules" in parts and "kernel" in parts:  # lib/modules/<version>/kernel/...
        inside = "/".join(parts[parts.index("kernel") + 1 :])
        return not name.endswith((".ko", ".ko.xz", ".ko.gz", ".ko.zst")) or inside.startswith(recipe.MODULE_FOLDERS)
    return True


def _trim(source: Path, target: Path) -> None:
    with tarfile.open(source) as all_files, tarfile.open(target, "w") as kept:
        for member in all_files:
            name = member.name.removeprefix("./")
            if not name or name == "." or member.isdev() or not _kept(name):
                continue
            member.name = name
            kept.addfile(member, all_files.extractfile(member) if member.isreg() else None)


def _make_image(base: Path, folder: Path, *, arch: recipe.Architecture, suite: str, report: Progress) -> None:
    root = folder / "root"
    root.mkdir(mode=0o755)
    report("unpacking", 0.55)
    with tarfile.open(base) as packed:
        # Everything is root's in the image: see _write_root.
        for member in packed:
            member.mode |= 0o700 if member.isdir() else 0o400
            packed.extract(member, root, set_attrs=True, numeric_owner=True, filter=_as_builder)
    _configure(root)
    (modules_of,) = (root / "lib/modules").iterdir()
    (kernel,) = (root / "boot").glob("vmlinuz-*")
    kernel.rename(folder / "vmlinuz")
    run([find_program("depmod", package="kmod"), "-b", root, modules_of.name])
    report("compiling the agent ahead", 0.75)
    python = _install_agent(root, arch)
    report("writing the initramfs", 0.85)
    modules = initramfs.in_load_order(recipe.BOOT_MODULES, initramfs.module_files(modules_of))
    script = recipe.INIT.replace("@MODULES@", " ".join(f"{name}.ko" for name in modules)).replace(
        "@AGENT@", f"/usr/bin/{python} -I -S -B -m utilityvm.agent"
    )
    busybox = (root / "bin/busybox") if (root / "bin/busybox").exists() else root / "usr/bin/busybox"
    (folder / "initramfs").write_bytes(
        initramfs.build(busybox=busybox.read_bytes(), modules=modules, script=script, folders=())
    )
    report("writing the root disk", 0.9)
    packages = _packages(root)
    _write_root(root, folder / "root.ext4")
    shutil.rmtree(root)
    for name in _FILES:
        (folder / name).chmod(0o644)
    manifest = {
        "arch": arch.debian,
        "suite": suite,
        "built_at": time.time(),
        "cmdline": f"console={arch.console} {recipe.KERNEL_COMMAND_LINE}",
        "packages": packages,
        "files": {n: {"size": (folder / n).stat().st_size, "sha256": _sha256(folder / n)} for n in _FILES},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _as_builder(member: tarfile.TarInfo, target: str) -> tarfile.TarInfo:
    safe = tarfile.tar_filter(member, target)
    safe.uid, safe.gid, safe.uname, safe.gname = os.getuid(), os.getgid(), "", ""
    if member.issym():
        safe.linkname = member.linkname
    return safe


def _configure(root: Path) -> None:
    for name in recipe.FOLDERS:
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "tmp").chmod(0o1777)
    for name, text in recipe.FILES.items():
        (root / name).unlink(missing_ok=True)
        (root / name).write_text(text)
    (root / "etc/shadow").chmod(0o600)
    for name, target in recipe.LINKS.items():
        path = root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(target)


def _install_agent(root: Path, arch: recipe.Architecture) -> str:
    """Put the agent into the guest's standard library and compile all of that with the guest's own python."""
    (library,) = (path for path in (root / "usr/lib").glob("python3.*") if path.is_dir())
    for name, data in agent_files():
        path = library / "utilityvm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for unused in ("test", "idlelib", "lib2to3", "ensurepip", "pydoc_data", "turtledemo"):
        shutil.rmtree(library / unused, ignore_errors=True)
    loader = root / arch.loader
    folders = [root / "lib" / loader.parent.name, root / "usr/lib" / loader.parent.name]
    command: list[str | Path] = [loader, "--library-path", ":".join(map(str, folders)), root / "usr/bin" / library.name]
    # Unchecked: the guest need not look at the sources' times, which a read-only disk cannot change.
    command += ["-S", "-E", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash"]
    command += ["-s", root, "-p", "/", library]
    run(command, env={"PYTHONHOME": str(root / "usr"), "PATH": "/usr/bin:/bin"})
    return library.name


def _packages(root: Path) -> dict[str, str]:
    packages: dict[str, str] = {}
    name = ""
    status = root / "var/lib/dpkg/status"
    for line in status.read_text().splitlines() if status.exists() else []:
        key, _, value = line.partition(": ")
        if key == "Package":
            name = value
        elif key == "Version":
            packages[name] = value
    return packages


def _write_root(root: Path, target: Path) -> None:
    used_kib = sum((path.lstat().st_size + 4095) // 4096 * 4 + 1 for path in root.rglob("*"))
    mkfs = find_program("mkfs.ext4", package="e2fsprogs")
    command: list[str | Path] = [
        mkfs,
        "-q",
        "-F",
        "-L",
        recipe.ROOT_LABEL,
        "-m",
        "0",
        "-O",
        "^has_journal,^resize_inode",
    ]
    command += [
        "-E",
        "root_owner=0:0,lazy_itable_init=0,nodiscard",
        "-d",
        root,
        target,
        f"{used_kib * 110 // 100 + 8192}k",
    ]
    if os.getuid():
        # mkfs copies the owners that it sees: in a user namespace of our own these are root.
        command = [find_program("unshare", package="util-linux"), "--user", "--map-root-user", *command]
    run(command)
