"""The storage of a Linux guest as hcsshim's gcs runs it, in memory: what it does with a request, harm included.

It is asked in gcs's words and does what gcs does, to the disks and to the guest's own files. What a right client never
asks for is noted in `harm`; options that it took and ignored are in `ignored`.

Source: hcsshim internal/guest/storage/scsi/scsi.go, internal/guest/storage/mount.go and
internal/guest/storage/crypt/crypt.go, and what the real one was seen to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

from utilityvm.scsi.slot import MAX_CONTROLLERS, Slot

PROPAGATION: Final = frozenset(
    prefix + flag for prefix in ("", "r") for flag in ("private", "shared", "slave", "unbindable")
)

# Files that some guest has: a mount above or at one of them removes it.
FILES: Final = frozenset(
    {
        "/bin/sh",
        "/etc/passwd",
        "/home/u/file",
        "/lib64/ld.so",
        "/media/cd/file",
        "/mnt/data/file",
        "/opt/app/run",
        "/run/gcs/c/c1/config.json",
        "/run/gcs/c/c1/rootfs/bin/sh",
        "/run/lock/file",
        "/srv/site/index.html",
        "/tmp/file",
        "/usr/lib/x/file",
        "/usr/local/bin/file",
        "/var/lib/app/state",
        "/var/log/app/log",
    }
)


class Failed(Exception):
    """gcs answers that it failed, with this text."""


class NoAnswer(Exception):
    """gcs never answers: it waits for a device, or has panicked."""


@dataclass(kw_only=True)
class Content:
    """What is on a disk."""

    filesystem: str = "ext4"  # "": none
    has_data: bool = True  # somebody would miss what is there


class Gcs:
    """One guest. `devices` is what it has; `mounts` are the disks at each path, the topmost last."""

    def __init__(self, content_at: Callable[[Slot], Content], *, is_read_only: Callable[[Slot], bool]) -> None:
        """`content_at` and `is_read_only` say what the disk at a slot is."""
        self.content_at = content_at
        self._is_read_only = is_read_only
        self.devices: set[Slot] = set()
        self.mounts: dict[str, list[Slot]] = {}
        self.files = set(FILES)
        self.busy: set[str] = set()  # paths that a program uses
        self.refuse_next: str | None = None  # the next thing that it is told fails with this text
        self.harm: list[str] = []
        self.ignored: list[str] = []

    def modify(self, request_type: str, resource_type: str, settings: Mapping[str, Any]) -> None:
        """Do what the request says.

        Raises:
            Failed, NoAnswer: it did not, or not all of it.
        """
        slot = Slot(settings.get("Controller", 0), settings.get("Lun", 0))
        path = settings.get("MountPath", "")
        if slot.controller >= MAX_CONTROLLERS:
            self.harm.append("it panics: a controller above 3")
            raise NoAnswer("panic")
        match resource_type, request_type:
            case "SCSIDevice", "Remove":
                self._fail_if_told()
                self._eject(slot)
            case "MappedVirtualDisk", "Add" | "Remove":
                self._need_device(slot)
                if path and request_type == "Add":
                    self._mount(slot, path, settings)
                elif path:
                    self._unmount(slot, path)
            case _:
                raise Failed(f'the RequestType "{request_type}" is not supported')

    def _fail_if_told(self) -> None:
        if self.refuse_next is not None:
            text, self.refuse_next = self.refuse_next, None
            raise Failed(text)

    def _need_device(self, slot: Slot) -> None:
        if slot not in self.devices:
            self.harm.append(f"it waits for ever for the disk at {slot}")
            raise NoAnswer(f"no device at {slot}")

    def _mount(self, slot: Slot, path: str, settings: Mapping[str, Any]) -> None:
        with self._removing_if_it_fails(path):
            self._fail_if_told()
            if not settings.get("BlockDev"):
                self._make_mountable(slot, settings)
            if slot in self.mounts.get(path, ()):
                raise Failed("mounting: device or resource busy")
            self._note_overlaps(path)
        if self.mounts.get(path):
            self.harm.append(f"the disk at {slot} was stacked on another at {path}")
        self.mounts.setdefault(path, []).append(slot)
        self.ignored += [option for option in settings.get("Options", ()) if option not in PROPAGATION]

    def _make_mountable(self, slot: Slot, settings: Mapping[str, Any]) -> None:
        content, wanted = self.content_at(slot), settings.get("Filesystem", "")
        found = content.filesystem if content.filesystem == "ext4" else ""  # it knows no other
        if settings.get("Encrypted"):
            self._format(slot, "crypto_LUKS")
            found, content.filesystem = "", ""  # within
        elif not found and not wanted:
            raise Failed("getting device's filesystem: could not get device filesystem type")
        if settings.get("EnsureFilesystem") and found != wanted:
            if wanted not in ("ext4", "xfs"):
                raise Failed(f"unsupported filesystem {wanted} requested for device")
            self._format(slot, wanted)
        if not content.filesystem or content.filesystem != (wanted or found):
            raise Failed("mounting: invalid argument")
        if self._is_read_only(slot) and not settings.get("ReadOnly"):
            raise Failed("mounting: permission denied")

    def _format(self, slot: Slot, filesystem: str) -> None:
        content = self.content_at(slot)
        if any(slot in stack for stack in self.mounts.values()) or self._is_read_only(slot):
            raise Failed(f"{filesystem} format: exit status 1")
        if content.has_data:
            self.harm.append(f"the data of the disk at {slot} was lost: it was formatted with {filesystem}")
        content.filesystem, content.has_data = filesystem, False

    def _unmount(self, slot: Slot, path: str) -> None:
        self._fail_if_told()
        if path in self.busy:
            raise Failed(f"unmount failed: {path}: failed to unmount path '{path}': device or resource busy")
        stack = self.mounts.get(path, [])
        self.mounts[path] = []
        if stack and stack[-1] != slot:
            self.harm.append(f"{path} of the disk at {stack[-1]} was unmounted for the one at {slot}")
        if len(stack) > 1:
            self.harm.append(f"every file of the disk at {stack[-2]} was deleted")
        self._remove_all(path)

    def _eject(self, slot: Slot) -> None:
        if any(slot in stack for stack in self.mounts.values()):
            self.harm.append(f"the disk at {slot} was ejected while it was mounted")
        self.devices.discard(slot)

    @contextmanager
    def _removing_if_it_fails(self, path: str) -> Iterator[None]:
        try:
            yield
        except Failed:
            self._remove_all(path)
            raise

    def _remove_all(self, path: str) -> None:
        """The path goes, with all that is at it and below it: the files of mounted disks as well."""
        for other, stack in self.mounts.items():
            if stack and (_is_within(other, path) or _is_within(path, other)):
                self.harm.append(f"files of the disk at {stack[-1]} were deleted, with {path}")
        for file in sorted(file for file in self.files if _is_within(file, path)):
            self.harm.append(f"the guest's own {file} was deleted, with {path}")
            self.files.discard(file)

    def _note_overlaps(self, path: str) -> None:
        for other, stack in self.mounts.items():
            if stack and other != path and (_is_within(other, path) or _is_within(path, other)):
                self.harm.append(f"{path} was mounted above or below {other}, whose files go with it")


def _is_within(path: str, folder: str) -> bool:
    return PurePosixPath(path).is_relative_to(PurePosixPath(folder))
