"""Builds the guest image, and finds it again.

In two steps, because they change at different times. The *base* is Debian's packages, fetched and unpacked (`base.py`;
some twenty seconds, and the network); the *image* is a base with the agent, as a kernel, an initramfs and a root disk
(some three seconds). Both are folders in the cache named after a hash of what went into them, so that a changed agent
or recipe is another image::

    <cache>/bases/<suite>-<hash>/     root.tar, packages.json
    <cache>/images/<suite>-<hash>/    vmlinuz, initramfs, root.ext4, manifest.json

Only the packages' versions are not in the name, for these are not known without the network; the manifest has them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

from utilityvm.errors import SetupError
from utilityvm.guestimage import base, initramfs, root_disk
from utilityvm.guestimage import recipe as built_in
from utilityvm.guestimage.cache import new_folder, no_builder, one_builder, whole_folders
from utilityvm.guestimage.custom import GuestRecipe
from utilityvm.guestimage.recipe import Architecture, architecture
from utilityvm.log import logger
from utilityvm.machine.oserrors import typed_errors
from utilityvm.machine.paths import cache_dir

_log = logger(__name__)

Progress = Callable[[str, float], None]  # what is being done, and how much of all of it is done (0 to 1)

BASE_SPACE_BYTES: Final = 1_200_000_000  # what a build needs at its widest, with room to spare
IMAGE_SPACE_BYTES: Final = 400_000_000
_FILES: Final = ("vmlinuz", "initramfs", "root.ext4")
_MANIFEST: Final = "manifest.json"


@typed_errors
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
    base: str = ""  # what it was made of, in the cache
    recipe: Mapping[str, Any] | None = None  # the user's own; None: that of every guest image

    @classmethod
    def build(
        cls,
        recipe: GuestRecipe | None = None,
        *,
        refresh: bool = False,
        progress: Callable[[str, float], None] | None = None,
    ) -> GuestImage:
        """The image of a recipe, built first if it is not there. It blocks: some seconds to minutes.

        With `refresh` it is built anew, of the newest packages; the old one stays for VMs and templates that use it.
        `progress` is told what is being done, and how much of the whole is done, from 0 to 1. If the build fails,
        nothing of it is left but the packages, for the next one.

        Raises:
            SetupError: a program, space, a package source or the network is missing; the remedy says which.
            InvalidRequest: a file of the recipe cannot be read.
        """
        return ensure(recipe, refresh=refresh, progress=progress)

    def verify(self) -> None:
        """Compare its files with the hashes of their building. It blocks for some seconds.

        Raises:
            SetupError: a file is not what was built, or cannot be read.
        """
        verify(self)

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.kernel.parent


def ensure(recipe: GuestRecipe | None = None, *, refresh: bool = False, progress: Progress | None = None) -> GuestImage:
    """Give the image of this recipe and agent, and build it first if it is not there.

    With `refresh` it is built anew, of the newest packages; the old one stays for those who use it. Waits for another
    build rather than doing it twice. If it fails nothing is left but the base, if that was done; call it again when the
    cause is gone.

    Raises:
        SetupError: a program, space, a package source or the network is missing; the remedy says which.
        InvalidRequest: a file of the recipe cannot be read.
    """
    own = recipe or GuestRecipe()
    if not refresh and (image := find(own)):
        return image
    report = progress or (lambda what, done: None)
    arch, suite = architecture(), host_suite()
    agent = dict(agent_files())  # read once: what is built is what the name says, also if somebody is changing it
    images, bases = cache_dir() / "images", cache_dir() / "bases"
    name = f"{suite}-{image_key(arch, agent, own)}"
    with one_builder(images / ".lock", waiting=lambda: report("waiting for another build", 0.0)):
        if not refresh and (image := _newest(images, name)):  # somebody else built it while we waited
            return image
        bases.mkdir(mode=0o700, exist_ok=True)
        base_name = f"{suite}-{base_key(arch, own)}"
        base_folder = _newest_base(bases, base_name)
        if refresh or base_folder is None:
            base_folder = bases / _unused(bases, base_name)
            with new_folder(bases, base_folder.name, space_bytes=BASE_SPACE_BYTES) as folder:
                base.make(folder, arch=arch, suite=suite, report=report, packages=own.packages, kernel=own.kernel)
            _log.info("made the guest image's base %s", base_folder.name)
        made = _unused(images, name) if refresh else name
        with new_folder(images, made, space_bytes=IMAGE_SPACE_BYTES) as folder:
            _make_image(base_folder, folder, agent=agent, key=name, arch=arch, suite=suite, own=own, report=report)
        _log.info("made the guest image %s", made)
        image = _load(images / made)
    if image is None:
        raise SetupError(
            f"the guest image {images / made} is not whole just after it was built",
            remedy="is something else writing there?",
        )
    report("done", 1.0)
    return image


def find(recipe: GuestRecipe | None = None) -> GuestImage | None:
    """The newest whole image of this recipe and agent in the cache. On another system, that of any Debian."""
    own = recipe or GuestRecipe()
    try:
        key = image_key(architecture(), dict(agent_files()), own)
    except SetupError:
        return None
    try:
        return _newest(cache_dir() / "images", f"{host_suite()}-{key}")
    except SetupError:
        return next((image for image in catalog() if image.key.partition(".")[0].endswith(f"-{key}")), None)


def _unused(parent: Path, name: str) -> str:
    """A name for a newer one of the same recipe: an image that is in use is never replaced."""
    names = (name, *(f"{name}.{number}" for number in range(2, 1000)))
    return next(each for each in names if not (parent / each).exists())


def _versions(parent: Path, name: str) -> list[Path]:
    """The folders of that name, the newest first."""
    found = [path for path in whole_folders(parent) if path.name.partition(".")[0] == name]
    return sorted(found, key=lambda path: int(path.name.partition(".")[2] or 1), reverse=True)


def _newest(images: Path, name: str) -> GuestImage | None:
    return next((image for path in _versions(images, name) if (image := _load(path))), None)


def _newest_base(bases: Path, name: str) -> Path | None:
    return next((path for path in _versions(bases, name) if (path / base.PACKAGES).exists()), None)


def catalog() -> list[GuestImage]:
    """Every whole image in the cache, the newest first."""
    images = [image for folder in whole_folders(cache_dir() / "images") if (image := _load(folder))]
    return sorted(images, key=lambda image: image.built_at, reverse=True)


@contextmanager
def alone() -> Iterator[None]:
    """Nobody builds during the block.

    Raises:
        SetupError: somebody is building.
    """
    with no_builder(cache_dir() / "images/.lock") as is_held:
        if not is_held:
            raise SetupError("a guest image is just being built", remedy="wait for that build, and try again")
        yield


def verify(image: GuestImage) -> None:
    """Compare the files with the hashes of their building.

    Raises:
        SetupError: a file is not what was built, or cannot be read.
    """
    folder = image.kernel.parent
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        bad = [name for name in _FILES if _sha256(folder / name) != manifest["files"][name]["sha256"]]
    except (OSError, ValueError, KeyError) as error:
        raise SetupError(f"{folder} cannot be read: {error}", remedy=_rebuild(folder)) from error
    if bad:
        raise SetupError(f"{folder / bad[0]} is not what was built", remedy=_rebuild(folder))


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
            remedy=f"build it on Debian 12 or 13 with the same utilityvm, and copy {cache_dir()}",
        )
    return suite


def base_key(arch: Architecture, own: GuestRecipe | None = None) -> str:
    """What a base of this recipe is called in the cache, behind its suite."""
    parts = own.base_parts() if own else []
    return _digest([arch.debian.encode(), *(_source(name) for name in ("recipe", "base", "sources")), *parts])


def image_key(arch: Architecture, agent: Mapping[str, bytes], own: GuestRecipe | None = None) -> str:
    """What the image of this recipe and `agent` is called in the cache, behind its suite.

    Raises:
        InvalidRequest: a file of the recipe cannot be read.
    """
    ours = (_source(name) for name in ("build", "custom", "initramfs", "root_disk"))
    files = (part for name, data in agent.items() for part in (name.encode(), data))
    return _digest([base_key(arch, own).encode(), *ours, *files, *(own.image_parts() if own else [])])


def agent_files() -> Iterator[tuple[str, bytes]]:
    """The parts of this package that run in the guest, by their path in it."""
    package = resources.files("utilityvm")
    yield "__init__.py", b""
    for room in ("bridge", "files", "agent"):
        for entry in sorted((package / room).iterdir(), key=lambda entry: entry.name):
            if entry.name.endswith(".py"):
                yield f"{room}/{entry.name}", entry.read_bytes()


def _source(module: str) -> bytes:
    return (resources.files("utilityvm.guestimage") / f"{module}.py").read_bytes()


def _digest(parts: list[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8) + part)
    return digest.hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rebuild(folder: Path) -> str:
    return f"rm -r {folder}, then `uvm image build`"


def _load(folder: Path) -> GuestImage | None:
    """The image in `folder`, or None. Sizes and times are compared; where a copy lost the times, the hashes are."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        if not all(_is_as_built(folder / name, manifest["files"][name]) for name in _FILES):
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
            built_at=(folder / _MANIFEST).stat().st_mtime,
            size_bytes=sum(manifest["files"][name]["size"] for name in _FILES),
            base=manifest.get("base", ""),
            recipe=manifest.get("recipe"),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_as_built(path: Path, built: dict[str, Any]) -> bool:
    status = path.stat()
    if status.st_size != built["size"]:
        return False
    return int(status.st_mtime) == built_in.TIME or _sha256(path) == built["sha256"]


def _make_image(
    base_folder: Path,
    folder: Path,
    *,
    agent: Mapping[str, bytes],
    key: str,
    arch: Architecture,
    suite: str,
    own: GuestRecipe,
    report: Progress,
) -> None:
    root = folder / "root"
    report("unpacking", 0.8)
    base.unpack(base_folder / base.ARCHIVE, root)
    (kernel,) = (root / "boot").glob("vmlinuz-*")
    kernel.rename(folder / "vmlinuz")
    own.apply(root)
    report("compiling the agent", 0.84)
    library = base.library(root)
    for name, data in agent.items():
        path = library / "utilityvm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for path in (library / "utilityvm", *(library / "utilityvm").rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)  # the same for every builder's umask
    base.compile_ahead(root, arch, library / "utilityvm")
    report("writing the initramfs", 0.88)
    tree = base.modules(root)
    modules = initramfs.in_load_order(
        built_in.BOOT_MODULES, initramfs.module_files(tree), initramfs.builtin_modules(tree)
    )
    # -I -S: nothing but the standard library; -B: a cache of bytecode would be memory, and it is all compiled.
    script = built_in.init_script(modules, agent=f"/usr/bin/{library.name} -I -S -B -m utilityvm.agent")
    archive = initramfs.build(busybox=base.busybox(root).read_bytes(), modules=modules, script=script)
    (folder / "initramfs").write_bytes(archive)
    report("writing the root disk", 0.9)
    root_disk.write(root, folder / "root.ext4", key=key)
    shutil.rmtree(root)
    for name in _FILES:
        (folder / name).chmod(0o644)
        os.utime(folder / name, (built_in.TIME, built_in.TIME))
    manifest = {
        "arch": arch.debian,
        "suite": suite,
        "cmdline": f"console={arch.console} {built_in.KERNEL_COMMAND_LINE}",
        "files": {n: {"size": (folder / n).stat().st_size, "sha256": _sha256(folder / n)} for n in _FILES},
        "packages": json.loads((base_folder / base.PACKAGES).read_text()),
        "base": base_folder.name,
        "recipe": None if own.is_empty else own.document(),
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1))
