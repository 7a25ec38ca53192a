"""The table of what this agent mounted, and the requests that change it.

A guest path holds one mount at the most; a mount is known by its guest path, and unmounting needs only that. Nothing
below a mount point is ever deleted: folders that we made for it are removed again with rmdir(2), which takes only empty
ones. A lock for each slot keeps requests on one disk in order; no lock is held over another disk's wait.

The agent may die at any instruction, and the next one goes on with what is so. The table is a file, and what is made
for a mount (mappings, folders, the mount itself) is noted in another, one for each slot, before it is made. So what was
made and did not come into the table is found: a mount is taken over, and anything less is undone.
"""

from __future__ import annotations

import base64
import binascii
import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

from utilityvm.agent import content, dm, filesystems, holders, mountinfo, mounting
from utilityvm.agent.faults import Fault
from utilityvm.agent.find_disk import Bus, Device, write
from utilityvm.agent.folders import Folders
from utilityvm.bridge import guest_path
from utilityvm.bridge.mount_options import MountOptions

_STATE: Final = Path("/run/utilityvm/mounts.json")
_MAX_LUN: Final = 63
_BLKFLSBUF: Final = 0x1261  # linux/fs.h
_PASSING_S: Final = 5.0  # for a use that nobody can be named for, such as a child that was forked beside it
_PASSING_LOOKS: Final = 20  # and of a VM that gets hardly any processor: what lets go needs some as well
_LOOK_AGAIN_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class Entry:
    """One mount, or one published device."""

    path: str
    controller: int
    lun: int
    partition: int
    filesystem: str  # "" for a published device
    made: list[str]  # folders (and the file of a published device) that we made for it, the outermost first
    mappings: list[str]  # device-mapper names, the lowest first
    node: str  # what is mounted: the device, or the mapping on top of it
    flags: int = 0  # how it was mounted, so that it can be so again
    propagation: Sequence[int] = ()
    options: str = ""


class DiskTable:
    """What the agent mounted. Thread-safe."""

    def __init__(self, controllers: list[str], *, state: Path = _STATE) -> None:
        self._bus = Bus(controllers)
        self._controllers = len(controllers)
        self._state = state
        self._lock = threading.Lock()  # guards the three below; never held over a wait
        self._entries: dict[str, Entry] = {}
        self._claimed: set[str] = set()  # paths that a request is working on
        self._slots: dict[tuple[int, int], threading.Lock] = {}
        self._mapping_number = 0
        self._folders = Folders()
        state.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._load()

    def add(self, settings: dict[str, Any], deadline: float) -> list[str]:
        """Mount what `settings` describes. On a fault everything is as it was. Gives what is to be said of it."""
        controller, lun, partition = self._where(settings)
        path = _guest_path(settings, to_mount=True)
        with self._slot(controller, lun, deadline), self._claim(path):
            device = self._bus.wait(controller, lun, partition, deadline)
            with ExitStack() as undo:
                undo.callback(self._notes(controller, lun).unlink, missing_ok=True)
                entry, notes = self._mount(device, path, settings, deadline, undo)
                with self._lock:
                    self._entries[entry.path] = entry
                    self._save()
                undo.pop_all()
                self._notes(controller, lun).unlink()
            return [*notes, *(self._notes_of_table(controller, lun) if partition else ())]

    def _notes_of_table(self, controller: int, lun: int) -> Sequence[str]:
        disk = self._bus.disk(controller, lun)
        return content.notes_of_table(disk.node) if disk else ()

    def remove(self, settings: dict[str, Any], deadline: float, *, force: bool = False) -> None:
        """Unmount what is at the path. Nothing there is done already."""
        path = _guest_path(settings, to_mount=False)
        with self._lock:
            entry = self._entries.get(str(path))
        if entry is None:
            if mountinfo.is_mounted(str(path)):
                raise Fault(f"{path} holds a mount that is not ours")
            return
        if ("Lun" in settings or "Controller" in settings) and (
            settings.get("Controller", 0),
            settings.get("Lun", 0),
        ) != (entry.controller, entry.lun):
            raise Fault(f"{path} holds the disk at {entry.controller}:{entry.lun}, which is another", kind="invalid")
        with self._slot(entry.controller, entry.lun, deadline), self._claim(path, known=True):
            with self._lock:
                if self._entries.get(entry.path) is not entry:
                    return  # somebody else was quicker
            self._unmount(entry, force=force)

    def eject(self, controller: int, lun: int, deadline: float, *, force: bool = False) -> None:
        """Flush, and have the kernel forget the device. No device is done already."""
        self._where({"Controller": controller, "Lun": lun})
        with self._slot(controller, lun, deadline):
            for entry in self._at(controller, lun):
                if not force:
                    raise Fault(
                        f"the disk is still mounted at {entry.path}", kind="busy", holders=[f"mounted at {entry.path}"]
                    )
                self._unmount(entry, force=True)
            if self._bus.scsi_device(controller, lun) is None:
                return
            disk = self._bus.disk(controller, lun)
            if disk:
                numbers = {disk.number, *(part.number for part in self._bus.partitions(disk))}
                users = holders.of_device(disk.node, disk.sysfs, numbers)
                if users and not force:
                    raise _busy("the disk", users)
                for line in reversed(holders.mounts_of(numbers) if users else []):
                    with suppress(OSError):
                        mounting.unmount(line.path, lazily=True)
                try:
                    _flush(disk)
                except OSError as error:
                    if not force:
                        text = f"what was written to the disk at {controller}:{lun} does not reach it: {error.strerror}"
                        raise Fault(text) from None
            self._bus.delete(controller, lun, deadline)

    def probe(self, controller: int, lun: int) -> dict[str, Any]:
        """What the kernel says of the slot: is there a device, how large, and what of ours is mounted."""
        disk = self._bus.disk(controller, lun)
        size = 0
        if disk:
            try:
                size = disk.size_bytes
            except OSError:
                disk = None
        mounted = {line.path for line in mountinfo.mount_lines()}
        paths = [entry.path for entry in self._at(controller, lun) if entry.path in mounted]
        present = disk is not None or self._bus.scsi_device(controller, lun) is not None
        return {"Present": present, "SizeBytes": size, "MountPaths": paths}

    def mounts(self) -> list[dict[str, Any]]:
        with self._lock:
            entries = list(self._entries.values())
        return [
            {
                "MountPath": entry.path,
                "Controller": entry.controller,
                "Lun": entry.lun,
                "Partition": entry.partition,
                "Filesystem": entry.filesystem,
            }
            for entry in entries
        ]

    def check_grow(self, controller: int, lun: int, size_bytes: int, deadline: float) -> None:
        """Refuse to grow what cannot be grown to so many bytes, before the host has grown the disk.

        Raises:
            Fault: names the mount.
        """
        with self._slot(controller, lun, deadline):
            for entry in self._growing(controller, lun):
                filesystems.check_grow(entry.node, entry.path, entry.filesystem, size_bytes)

    def grow(self, controller: int, lun: int, deadline: float) -> dict[str, Any]:
        """Read the disk's size anew, and grow the writable file systems that are mounted from the whole of it.

        One that does not grow keeps no other from growing.
        """
        with self._slot(controller, lun, deadline):
            scsi, disk = self._bus.scsi_device(controller, lun), self._bus.disk(controller, lun)
            if scsi is None or disk is None:
                raise Fault(f"there is no disk at {controller}:{lun}", kind="not_found")
            write(f"{scsi}/rescan", "1")
            growing, failures = self._growing(controller, lun), list[Fault]()
            for entry in self._at(controller, lun):
                try:
                    if not entry.partition:
                        for name in entry.mappings:
                            dm.grow(name, disk.size_bytes)
                    if entry in growing:
                        filesystems.grow(entry.node, entry.path, entry.filesystem, deadline)
                except Fault as fault:
                    failures.append(fault)
            if failures:
                first = failures[0]
                raise Fault("; ".join(fault.message for fault in failures), kind=first.kind, remedy=first.remedy)
            grown = [entry.path for entry in growing]
            left = [entry.path for entry in self._at(controller, lun) if entry not in growing]
            return {"SizeBytes": disk.size_bytes, "Grown": grown, "Left": left}

    def _growing(self, controller: int, lun: int) -> list[Entry]:
        """The mounts that grow with the disk: writable, of all of it."""
        entries = [entry for entry in self._at(controller, lun) if not entry.partition and entry.filesystem]
        return [entry for entry in entries if not mounting.is_read_only(entry.path)]

    def _where(self, settings: dict[str, Any]) -> tuple[int, int, int]:
        controller, lun, partition = (settings.get(name) or 0 for name in ("Controller", "Lun", "Partition"))
        if not 0 <= controller < self._controllers:
            raise Fault(f"there is no SCSI controller {controller}: the VM has {self._controllers}", kind="invalid")
        if not 0 <= lun <= _MAX_LUN:
            raise Fault(f"there is no LUN {lun}: they go from 0 to {_MAX_LUN}", kind="invalid")
        if not isinstance(partition, int) or partition < 0:
            raise Fault(
                f"partition {partition!r} is invalid: partitions count from 1, and 0 is the whole disk", kind="invalid"
            )
        return controller, lun, partition

    @contextmanager
    def _slot(self, controller: int, lun: int, deadline: float) -> Iterator[None]:
        with self._lock:
            lock = self._slots.setdefault((controller, lun), threading.Lock())
        if not lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise Fault(f"another request on the disk at {controller}:{lun} does not end", kind="timeout")
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _claim(self, path: PurePosixPath, *, known: bool = False) -> Iterator[None]:
        name = str(path)
        with self._lock:
            if name in self._claimed or (not known and name in self._entries):
                raise Fault(f"{name} is in use", kind="busy", holders=[f"a mount at {name}"])
            self._claimed.add(name)
        try:
            if not known and mountinfo.is_mounted(name):
                raise Fault(f"{name} holds a mount already", kind="busy", holders=[f"a mount at {name}"])
            yield
        finally:
            with self._lock:
                self._claimed.discard(name)

    def _at(self, controller: int, lun: int) -> list[Entry]:
        with self._lock:
            return [entry for entry in self._entries.values() if (entry.controller, entry.lun) == (controller, lun)]

    def _mount(
        self, device: Device, path: PurePosixPath, settings: dict[str, Any], deadline: float, undo: ExitStack
    ) -> tuple[Entry, list[str]]:
        controller, lun, partition = self._where(settings)
        extension = settings.get("Utilityvm") or {}
        read_only = bool(settings.get("ReadOnly"))
        how = mounting.words(settings.get("Options") or [], read_only=read_only)
        node, mappings, filesystem = device.node, list[str](), ""
        is_published = bool(settings.get("BlockDev"))

        def entry(made: Sequence[str]) -> Entry:
            where = str(path), controller, lun, partition
            return Entry(*where, filesystem, [*made], [*mappings], node, how.flags, how.propagation, how.data)

        def note(made: Sequence[str]) -> None:
            with open(self._notes(controller, lun), "a") as notes:
                notes.write(json.dumps(asdict(entry(made))) + "\n")

        def layer(open_mapping: Callable[[str], str]) -> str:
            mappings.append(self._new_mapping())
            note(made)
            opened = open_mapping(mappings[-1])
            undo.callback(dm.close, mappings[-1])
            return opened

        made = self._folders.make(path, as_file=is_published, note=note)  # before a file system is: this may be refused
        undo.callback(self._folders.give_back, str(path), made)
        is_ensured = bool(settings.get("EnsureFilesystem"))
        below = self._below(device, controller, lun, partition, extension.get("MayHold")) if is_ensured else None
        if (verity := extension.get("Verity")) is not None:
            if not read_only:
                raise Fault("dm-verity needs a read-only mount", kind="invalid")
            node = layer(lambda name: dm.open_verity(name, node, device.size_bytes, verity))
        key = _key(settings, extension)
        if key is not None:
            if below:
                users = below.users()  # while they are others than our own mapping
                below = replace(below, users=lambda: users)
            node = layer(lambda name: dm.open_crypt(name, node, device.size_bytes, key, read_only=read_only))
        filesystem = settings.get("Filesystem") or ""
        if below:
            if read_only:
                raise Fault("a file system cannot be made on a read-only disk", kind="invalid")
            filesystem = filesystem or "ext4"
            reformat = bool(extension.get("Reformat"))
            mounting.check_options(filesystem, how)
            filesystems.ensure(node, filesystem, below=below, reformat=reformat, deadline=deadline)
        if is_published:
            filesystem = ""
        else:
            filesystem = filesystem or _found(node, f"{controller}:{lun}", partition, deadline, has_key=key is not None)
            if not below:
                filesystems.refuse_unfinished(node, filesystem)
        note(made)
        said: list[str] = []
        if is_published:
            mounting.bind(node, str(path))
        else:
            said = mounting.mount(node, str(path), filesystem, how)
        undo.callback(mounting.unmount, str(path), lazily=True)
        return entry(made), said

    def _below(self, device: Device, controller: int, lun: int, partition: int, may_hold: object) -> filesystems.Below:
        """What a file system is to be made on."""
        disk = self._bus.disk(controller, lun) or device

        def users() -> list[str]:
            published = [
                f"published at {entry.path}"
                for entry in self._at(controller, lun)
                if not entry.filesystem and 0 in (partition, entry.partition, partition - entry.partition)
            ]
            parts = [] if partition else self._bus.partitions(disk)
            return published + holders.of_device(device.node, device.sysfs, {device.number, *(p.number for p in parts)})

        start = device.start_bytes if partition else 0
        ranges = None if disk.was_written else _ranges(may_hold, start=start, size=device.size_bytes)
        return filesystems.Below(device.node, users, ranges)

    def _new_mapping(self) -> str:
        with self._lock:
            self._mapping_number += 1
            return f"utilityvm-{os.getpid()}-{self._mapping_number}"

    def _unmount(self, entry: Entry, *, force: bool) -> None:
        """Unmount it, and undo all that was made for it. Busy, and not `force`: everything is as it was."""
        if not force:
            self._refuse_used(entry)
        if mountinfo.is_mounted(entry.path):
            if entry.filesystem:
                try:
                    mounting.sync_filesystem(entry.path)
                except OSError as error:
                    if not force:
                        text = f"what was written to {entry.path} does not reach the disk: {error.strerror}"
                        raise Fault(text) from None
            _let_go(entry.path, force=force)
            if not force:
                self._refuse_alive(entry)
        for name in reversed(entry.mappings):
            dm.close(name, deferred=force)
        self._folders.give_back(entry.path, entry.made)
        with self._lock:
            self._entries.pop(entry.path, None)
            self._save()

    def _refuse_used(self, entry: Entry) -> None:
        """Refuse to unmount what is used beside the mount: the disk could not be ejected, and the mount were gone."""
        if self._has_another(entry):
            return  # the device stays for that one
        if users := holders.beside_mount(entry.path, entry.node):
            raise _busy(entry.path, users)

    def _refuse_alive(self, entry: Entry) -> None:
        """Mount it again and refuse, if its file system lives on though it was unmounted: the device is still taken.

        What keeps it so shows in no list beforehand; see `holders.after_unmount`.
        """
        if not entry.filesystem or self._has_another(entry):
            return
        give_up = time.monotonic() + _PASSING_S
        while users := holders.after_unmount(entry.node):
            if time.monotonic() >= give_up:
                how = MountOptions(entry.flags, tuple(entry.propagation), entry.options)
                mounting.mount_again(entry.node, entry.path, entry.filesystem, how)
                raise _busy(entry.path, users)
            time.sleep(_LOOK_AGAIN_S)  # a namespace or a program that has just ended still lets go of it

    def _has_another(self, entry: Entry) -> bool:
        """Has the device of this mount another mount of ours?"""
        return any(other.node == entry.node and other is not entry for other in self._at(entry.controller, entry.lun))

    def _load(self) -> None:
        """After a restart of the agent: take over what is mounted, and undo what is left of what is not."""
        known: list[Entry] = []
        with suppress(OSError, ValueError, TypeError):
            known += [Entry(**fields) for fields in json.loads(self._state.read_text())]
        all_notes = list(self._state.parent.glob(f"{self._state.stem}-*.notes"))
        for notes in all_notes:
            with suppress(ValueError, TypeError, IndexError):
                # A line that was cut short was of something that was not made.
                known.append(Entry(**json.loads(notes.read_text().rpartition("\n")[0].splitlines()[-1])))
        mounted = {line.path for line in mountinfo.mount_lines()}
        for entry in known:
            if entry.path in mounted:
                self._entries[entry.path] = entry
                self._folders.use(entry.path)
        for entry in known:
            if entry.path not in mounted:
                for name in reversed(entry.mappings):
                    with suppress(Fault, OSError):
                        dm.close(name)
                self._folders.give_back(entry.path, entry.made)
        if known:
            self._save()
        for notes in all_notes:
            notes.unlink()

    def _notes(self, controller: int, lun: int) -> Path:
        return self._state.with_name(f"{self._state.stem}-{controller}-{lun}.notes")

    def _save(self) -> None:
        text = json.dumps([asdict(entry) for entry in self._entries.values()])
        new = f"{self._state}.new"
        with open(new, "w") as file:
            file.write(text)
        os.rename(new, self._state)


def _guest_path(settings: dict[str, Any], *, to_mount: bool) -> PurePosixPath:
    text = settings.get("MountPath")
    if not isinstance(text, str) or not text:
        raise Fault("a MountPath is needed", kind="invalid")
    try:
        path = (guest_path.mountable if to_mount else guest_path.spelled)(text)
    except ValueError as why:
        raise Fault(f"the guest path {text!r} {why}", kind="invalid") from None
    if to_mount and (hidden := mountinfo.shows(str(path), guest_path.SYSTEM_FOLDERS)):
        text = f"the guest path {path} belongs to the guest's system: a bind mount shows {hidden} there"
        raise Fault(text, kind="invalid")
    return path


def _key(settings: dict[str, Any], extension: dict[str, Any]) -> bytes | None:
    """The key to encrypt with: the caller's, or a fresh random one, which is GCS's `Encrypted`."""
    if "Key" in extension:
        try:
            key = base64.b64decode(extension["Key"], validate=True)
        except (binascii.Error, TypeError, ValueError):
            raise Fault("Key is not base64", kind="invalid") from None
        if len(key) not in (32, 64):
            raise Fault(f"a key of {len(key)} bytes: 32 or 64 are needed", kind="invalid")
        return key
    return os.urandom(64) if settings.get("Encrypted") or extension.get("Scratch") else None


def _ranges(told: object, *, start: int, size: int) -> list[tuple[int, int]] | None:
    """The host's ranges of the whole disk that may hold data, as those of the part that begins at `start`."""
    if not isinstance(told, list):
        return None
    ranges = []
    for one in told:
        match one:
            case [int(offset), int(length)] if offset >= 0 and length >= 0:
                begin, end = max(offset - start, 0), min(offset + length - start, size)
                if begin < end:
                    ranges.append((begin, end - begin))
            case _:
                return None
    return ranges


def _found(node: str, slot: str, partition: int, deadline: float, *, has_key: bool) -> str:
    """The file system that is there."""
    where = f"the disk at {slot}" + (f" partition {partition}" if partition else "")
    found = content.of(node, deadline, partition=partition)
    if not found.filesystem:
        if filesystems.is_half_made(node, deadline):
            text = f"making a file system on {where} was cut short: it holds none"
            raise Fault(text, kind="no_filesystem", remedy="ask for it with ensure_filesystem: it is made again")
        raise content.refusal(found, where, node, has_key=has_key)
    return found.filesystem


def _busy(what: str, users: list[str]) -> Fault:
    more = f", and {len(users) - 1} more" if len(users) > 1 else ""
    return Fault(f"{what} is in use: {users[0]}{more}", kind="busy", holders=users)


def _let_go(path: str, *, force: bool) -> None:
    """Unmount what is at `path`; `force` takes it off the tree, and the kernel lets go when its last user does."""
    while force and mountinfo.is_mounted(path):
        mounting.unmount(path, lazily=True)
    give_up, looks = time.monotonic() + _PASSING_S, 0
    while mountinfo.is_mounted(path):
        looks += 1
        try:
            mounting.unmount(path)
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            if users := holders.of_mount(path):
                raise _busy(path, users) from None
        if time.monotonic() >= give_up and looks >= _PASSING_LOOKS:
            raise _busy(path, ["something in the kernel has it"])
        time.sleep(_LOOK_AGAIN_S)  # a program that has just ended still lets go of its files


def _flush(disk: Device) -> None:
    import fcntl

    try:
        fd = os.open(disk.node, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENOENT, errno.ENODEV, errno.ENOMEDIUM):
            return  # it has not come far enough to be read, so nothing was written to it
        raise
    try:
        os.fsync(fd)
        fcntl.ioctl(fd, _BLKFLSBUF, 0)
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EROFS, errno.EACCES):
            raise
    finally:
        os.close(fd)
