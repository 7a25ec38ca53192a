"""The templates of this user: a folder for each, which appears whole or not at all.

::

    <state>/templates/NAME/manifest.json   what it is (manifest.py)
                           memory          the RAM, sparse
                           state           the devices' state
                           disks/          what were the overlays of a clone that became a template

Who uses a template holds a shared lock on its manifest while he begins with it; who removes it needs it alone. After
that the store says which VMs are its clones. A disk that a template is made of must not change: `frozen_by` is asked
before any disk is attached for writing.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Final

from utilityvm.errors import (
    InvalidRequest,
    TemplateDamaged,
    TemplateExists,
    TemplateInUse,
    TemplateNotFound,
)
from utilityvm.log import logger
from utilityvm.machine import forks, paths
from utilityvm.machine.oserrors import typed_errors
from utilityvm.scsi.slot import Slot
from utilityvm.store import Store
from utilityvm.store.recover import open_store
from utilityvm.templates import manifest as manifests
from utilityvm.templates.manifest import Fingerprint, Manifest

MANIFEST: Final = "manifest.json"
MEMORY: Final = "memory"
STATE: Final = "state"
DISKS: Final = "disks"
NEW: Final = ".new-"
_OLD: Final = ".old-"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_READ: Final = 1 << 20

_log = logger(__name__)
_known: dict[Path, tuple[Fingerprint, Manifest]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateDisk:
    """A disk of a template: each clone has it at the same slot and guest paths."""

    slot: Slot
    read_only: bool  # clones share it; a writable one is an overlay of each clone's own
    size_bytes: int
    host_paths: tuple[str, ...]  # the files that it is made of, the top one first
    guest_paths: tuple[PurePosixPath, ...]


@typed_errors
@dataclass(frozen=True, slots=True)
class Template:
    """A template as it lies in its folder. `list_templates` and `UtilityVM.save_as_template` give it."""

    folder: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def uuid(self) -> str:
        return self.manifest.uuid

    @property
    def vm(self) -> str:
        """The VM that was saved."""
        return self.manifest.vm

    @property
    def created(self) -> float:
        """When it was saved, in seconds since the epoch."""
        return self.manifest.created

    @property
    def memory_mib(self) -> int:
        return self.manifest.memory_mib

    @property
    def cpus(self) -> int:
        return self.manifest.cpus

    @property
    def controllers(self) -> int:
        return self.manifest.controllers

    @property
    def accelerator(self) -> str:
        """What ran its processors; its clones need the same."""
        return self.manifest.accelerator

    @property
    def qemu_version(self) -> str:
        return self.manifest.qemu_version

    @property
    def machine(self) -> str:
        """QEMU's machine type."""
        return self.manifest.machine

    @property
    def kernel(self) -> str:
        """The release of the kernel that runs in it."""
        return self.manifest.kernel

    @property
    def parent(self) -> str | None:
        """The template that its VM was a clone of."""
        return self.manifest.parent.name if self.manifest.parent else None

    @property
    def disks(self) -> tuple[TemplateDisk, ...]:
        """Its disks, the root disk not among them."""
        return tuple(
            TemplateDisk(
                slot=disk.slot,
                read_only=disk.read_only,
                size_bytes=disk.size_bytes,
                host_paths=tuple(layer.path for layer in disk.layers),
                guest_paths=tuple(PurePosixPath(mount.guest_path) for mount in disk.mounts),
            )
            for disk in self.manifest.disks
        )

    @property
    def memory(self) -> Path:
        return self.folder / MEMORY

    @property
    def state(self) -> Path:
        return self.folder / STATE

    @property
    def root(self) -> Path:
        """The guest image's root disk."""
        return Path(self.manifest.root.path)

    def disk_bytes(self) -> int:
        """What its own files take on the storage."""
        files = (path.stat() for path in self.folder.rglob("*") if path.is_file())
        return sum(status.st_blocks * 512 for status in files)

    def users(self) -> list[str]:
        """What depends on it, as a message names it: `VM worker-1`, `template child`. Reads the store, so it blocks."""
        with open_store() as store:
            return users(self, store)

    def verify(self) -> list[str]:
        """Compare every file with what was saved; a line for each that differs. Reads all of it, so it blocks.

        The template's own files are compared whole, the disks under it by size and time of their last change.
        """
        return verify(self)

    def remove(self) -> None:
        """Remove the template. The disks under it stay, and may be written to again. It blocks.

        Raises:
            TemplateNotFound: it is gone.
            TemplateInUse: clones or other templates depend on it; nothing was removed.
        """
        with open_store() as store:
            remove(self.name, store)


def check_name(name: str) -> None:
    """Raises:
    InvalidRequest: it cannot be a template's name.
    """
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name!r} cannot be a template's name",
            remedy="use 1 to 63 letters, digits, '.', '_' and '-', the first a letter or digit",
        )


def names() -> list[str]:
    """Every template's name, in order."""
    try:
        with os.scandir(paths.templates_dir()) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith("."))
    except FileNotFoundError:
        return []


def load(name: str) -> Template:
    """Raises:
    TemplateNotFound: names those that there are.
    TemplateDamaged: its manifest is not one.
    """
    check_name(name)
    folder = paths.templates_dir() / name
    try:
        return Template(folder, _manifest(folder / MANIFEST))
    except FileNotFoundError:
        others = ", ".join(names())
        remedy = f"the templates: {others}" if others else "save a VM as one: uvm template save VM NAME"
        raise TemplateNotFound(f"there is no template {name!r}", remedy=remedy) from None


def every() -> list[Template]:
    """Every whole template, by name; what is damaged is left out, with a warning."""
    found = []
    for name in names():
        try:
            found.append(load(name))
        except (TemplateNotFound, TemplateDamaged, InvalidRequest) as error:
            _log.warning("%s", error)
    return found


@contextmanager
def in_use(name: str) -> Iterator[Template]:
    """The template, which nobody removes meanwhile.

    Raises:
        TemplateNotFound, TemplateDamaged: as `load`.
        TemplateInUse: it is just being removed.
    """
    template = load(name)
    with _locked(template, fcntl.LOCK_SH, refusal="it is just being removed"):
        yield template


def frozen_by(fd: int) -> str | None:
    """The template that is made of this disk; None if none is. One of which it cannot be told counts.

    Raises:
        TemplateDamaged: a template cannot say of what it is made, so any disk may be.
    """
    every_name = names()
    now = Fingerprint.of(fd) if every_name else None
    for name in every_name:
        try:
            template = load(name)
        except TemplateNotFound:
            continue  # removed meanwhile
        if now and any(layer.fingerprint.is_file(now) is not False for layer in template.manifest.chain()):
            return name
    return None


def refuse_taken(name: str) -> None:
    """Raises:
    InvalidRequest: it cannot be a template's name.
    TemplateExists: the name is taken.
    """
    check_name(name)
    if (paths.templates_dir() / name).exists():
        raise taken(name)


def users(template: Template, store: Store) -> list[str]:
    """What depends on the template: VMs that are clones of it, and templates that were."""
    vms = [f"VM {vm.name}" for vm in store.vms() if clone_of(vm.config) == template.uuid]
    children = [
        f"template {other.name}"
        for other in every()
        if other.manifest.parent and other.manifest.parent.uuid == template.uuid
    ]
    return vms + children


def clone_of(config: object) -> str | None:
    """The UUID of the template that a VM is a clone of, by the config that the store has of it."""
    clone = config.get("clone") if isinstance(config, dict) else None
    return str(clone["template_uuid"]) if isinstance(clone, dict) else None


def parent_of(config: object) -> Template | None:
    """The template that a VM is a clone of; it is there for as long as the VM is.

    Raises:
        TemplateNotFound, TemplateDamaged: somebody removed or changed its folder.
    """
    clone = config.get("clone") if isinstance(config, dict) else None
    return load(str(clone["template"])) if isinstance(clone, dict) else None


def made_of(vm_uuid: str) -> str | None:
    """The template that was made of the VM of this UUID; None if none was."""
    return next((one.name for one in every() if one.manifest.vm_uuid == vm_uuid), None)


def remove(name: str, store: Store) -> None:
    """Remove the template; the disks that it is made of stay, and may be written to again.

    Raises:
        TemplateNotFound: there is none.
        TemplateInUse: it has clones, or they are just being made; nothing was removed.
    """
    template = load(name)
    with _locked(template, fcntl.LOCK_EX, refusal="a clone of it is just being started"):
        if dependents := users(template, store):
            raise TemplateInUse(
                f"template {name} is needed by {', '.join(dependents)}",
                users=dependents,
                remedy="stop those VMs and remove those templates first",
            )
        gone = template.folder.with_name(f"{_OLD}{template.uuid}")
        template.folder.rename(gone)
    shutil.rmtree(gone)


def leftovers() -> list[Path]:
    """Folders of templates whose saving or removing was cut short, and that nobody works on."""
    parent = paths.templates_dir()
    if not parent.is_dir():
        return []
    folders = [path for path in sorted(parent.iterdir()) if path.name.startswith((NEW, _OLD))]
    return [folder for folder in folders if not _is_held(folder)]


def remove_leftover(folder: Path) -> None:
    """Remove a folder that `leftovers` named. Calling it again is no error."""
    assert folder.name.startswith((NEW, _OLD)), folder
    shutil.rmtree(folder, ignore_errors=True)


def verify(template: Template) -> list[str]:
    """Compare every file with what it was when the template was saved; a line for each that differs.

    The template's own files are compared whole, the disks under it by size and time of their last change.
    """
    manifest = template.manifest
    found = []
    for path, entry in ((template.memory, manifest.memory), (template.state, manifest.state)):
        try:
            if digest(path) != entry.digest:
                found.append(f"{path} is not what was saved")
        except OSError as error:
            found.append(f"{path}: {error.strerror}")
    for layer in manifest.chain():
        if (difference := difference_of(layer)) is not None:
            found.append(difference)
    return found


def difference_of(layer: manifests.LayerEntry) -> str | None:
    """How the file differs from what it was; None if it does not."""
    try:
        now = Fingerprint.at(Path(layer.path))
    except OSError as error:
        return f"{layer.path}: {error.strerror}"
    if layer.fingerprint.is_unchanged(now):
        return None
    is_file = layer.fingerprint.is_file(now)
    if is_file is None:
        return f"{layer.path} may be another disk than before the last boot: nothing but its number names it"
    if not is_file:
        return f"{layer.path} is another file than when the template was saved"
    return f"{layer.path} was written to since the template was saved"


def digest(path: Path, stop: Event | None = None) -> str:
    """BLAKE2b-256 of the file's content. Blocks. Once `stop` is set it ends soon, with a digest of nothing."""
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb", buffering=0) as file:
        while (chunk := file.read(_READ)) and not (stop and stop.is_set()):
            digest.update(chunk)
    return digest.hexdigest()


def _manifest(path: Path) -> Manifest:
    """The manifest, read again only if it is another file: `frozen_by` asks often."""
    try:
        now = Fingerprint.at(path)
    except NotADirectoryError as error:
        raise FileNotFoundError(str(path)) from error
    known = _known.get(path)
    if known is None or known[0] != now:
        _known[path] = known = (now, manifests.read(path))
    return known[1]


@contextmanager
def _locked(template: Template, kind: int, *, refusal: str) -> Iterator[None]:
    path = template.folder / MANIFEST
    try:
        fd = forks.keep_from(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except FileNotFoundError:
        raise TemplateNotFound(f"template {template.name} was just removed") from None
    try:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TemplateInUse(f"template {template.name}: {refusal}", remedy="try again") from None
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(fd)):
            raise TemplateNotFound(f"template {template.name} was just removed")
        yield
    finally:
        os.close(fd)


def _is_held(folder: Path) -> bool:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True  # it just became a template
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def taken(name: str) -> TemplateExists:
    return TemplateExists(
        f"there is a template {name!r} already", remedy=f"choose another name, or remove it: uvm template rm {name}"
    )
