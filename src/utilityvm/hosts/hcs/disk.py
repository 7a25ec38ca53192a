"""A disk on a Windows host: what it is, and how HCS is told of it.

HCS opens the file itself, by the path in the document. So the path goes there as the caller wrote it, and we only look:
which file it is (volume and file id, so that every spelling of a path and every link is one disk), in which format,
how large. A file that a VM has open cannot be read beside it; what it is does not change then, and is remembered.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from typing import Any, Final, Protocol

from utilityvm.diskimage import headers
from utilityvm.diskimage.source import Source
from utilityvm.errors import (
    AccessDenied,
    ConfigDiffers,
    DiskInUse,
    DiskNotFound,
    HostRefused,
    InvalidRequest,
    NotSupported,
    SetupError,
    UtilityVMError,
)
from utilityvm.hosts.hcs import winpath
from utilityvm.hosts.hcs.documents import Attachment, encode, parse_evd
from utilityvm.machine import fileid
from utilityvm.scsi.ports import AttachmentType, DiskFormat, DiskRequest

FORMATS: Final = (DiskFormat.VHD, DiskFormat.VHDX)

# Of the rules for images those that hold for Windows' own readers; the others are about QEMU.
_RULES: Final = frozenset({headers.Rule.PARENT, headers.Rule.CORRUPT, headers.Rule.EMPTY, headers.Rule.TABLE_OUTSIDE})

_ERROR_SHARING_VIOLATION: Final = 32
_IOCTL_DISK_GET_LENGTH_INFO: Final = 0x0007405C
_GENERIC_READ: Final = 0x80000000
_FILE_SHARE_READ_WRITE: Final = 0x3
_OPEN_EXISTING: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFacts:
    """What a disk is. `size_bytes` is 0 for an extensible virtual disk: only its driver knows."""

    format: DiskFormat
    size_bytes: int


class HcsDisk:
    """A disk that was looked at. Nothing of it is held open."""

    def __init__(self, request: DiskRequest, attachment: Attachment, identity: str, facts: DiskFacts) -> None:
        self.request = request
        self.attachment = attachment
        self.identity = identity
        self.facts = facts
        self.format = facts.format
        self.size_bytes = facts.size_bytes

    def close(self) -> None:
        pass


class Disks(Protocol):
    """The disks of a host. The calls block as long as the storage does."""

    def identity(self, request: DiskRequest) -> str:
        """The same text for the same disk, also while a VM has it open.

        Raises:
            RequestError: there is no such disk, or no right to look.
        """
        ...

    def read(self, request: DiskRequest) -> DiskFacts:
        """What the disk is.

        Raises:
            RequestError, ImageError: it cannot be attached as asked.
        """
        ...


def attachment_for(request: DiskRequest) -> Attachment:
    """How HCS is told of the disk.

    Raises:
        InvalidRequest: the path is empty or relative, cannot be a disk of this kind, or is not valid Unicode.
        NotSupported: a format that HCS does not attach.
    """
    path = request.host_path
    if request.sector_size_bytes is not None:
        raise NotSupported(
            f"{path}: HCS gives a disk the sectors that its image says",
            host_path=path,
            remedy="leave the sector size out; Convert-VHD -LogicalSectorSizeBytes changes it in a VHDX",
        )
    if request.kind is AttachmentType.EXTENSIBLE_VIRTUAL_DISK:
        evd_type, mount_path = parse_evd(path)
        attachment = Attachment(
            type=request.kind.value,
            path=mount_path,
            read_only=request.read_only,
            extensible_virtual_disk_type=evd_type,
        )
    else:
        _check_path(request)
        attachment = Attachment(type=request.kind.value, path=path, read_only=request.read_only)
    encode(attachment)
    return attachment


def _check_path(request: DiskRequest) -> None:
    path = request.host_path
    if not path or "\0" in path:
        raise InvalidRequest(f"the host path {path!r} names no file", host_path=path, remedy="give an absolute path")
    if not winpath.is_absolute(path) and not (os.name == "posix" and path.startswith("/")):
        raise InvalidRequest(
            f"the host path {path!r} is relative: HCS would look for it in its own folder",
            host_path=path,
            remedy="give an absolute path, such as C:\\disks\\data.vhdx",
        )
    physical = request.kind is AttachmentType.PASS_THRU
    if physical and not winpath.is_device(path):
        raise InvalidRequest(
            f"{path} is no physical disk",
            host_path=path,
            remedy=r"give a device such as \\.\PHYSICALDRIVE2, or add it as a virtual disk",
        )
    if not physical and winpath.is_device(path):
        raise InvalidRequest(f"{path} is a device", host_path=path, remedy="add it as a physical disk")
    if physical and request.format not in (None, DiskFormat.RAW):
        raise ConfigDiffers(
            f"{path}: asked for as {request.format}, and a physical disk is raw",
            host_path=path,
            remedy="leave the format out",
        )
    if not physical and request.format not in (None, *FORMATS):
        raise _wrong_format(path, request.format)


def _wrong_format(path: str, format: DiskFormat | None) -> NotSupported:
    return NotSupported(
        f"{path}: HCS attaches no {format} images",
        host_path=path,
        remedy="convert it: qemu-img convert -O vhdx",
    )


class LocalDisks:
    """The disks of this machine."""

    def __init__(self, *, allow_parents: bool = False) -> None:
        """`allow_parents`: differencing images too. Windows opens their parents, whatever the image says they are."""
        self._allow_parents = allow_parents

    def identity(self, request: DiskRequest) -> str:
        """See `Disks.identity`. A file whose volume gives no file ids is known by its path."""
        path = request.host_path
        if request.kind is AttachmentType.EXTENSIBLE_VIRTUAL_DISK:
            return f"evd:{'/'.join(parse_evd(path))}"
        if request.kind is AttachmentType.PASS_THRU:
            return f"device:{winpath.same_file_key(path)}"
        try:
            status = os.stat(path)  # noqa: PTH116 - the path goes on as it was written
        except (OSError, ValueError) as error:
            raise _cannot_open(path, error) from error
        if status.st_ino:
            return fileid.identity(status)
        return f"path:{winpath.same_file_key(path)}"

    def read(self, request: DiskRequest) -> DiskFacts:
        """See `Disks.read`."""
        path = request.host_path
        if request.kind is AttachmentType.EXTENSIBLE_VIRTUAL_DISK:
            return DiskFacts(format=DiskFormat.RAW, size_bytes=0)
        if request.kind is AttachmentType.PASS_THRU:
            return DiskFacts(format=DiskFormat.RAW, size_bytes=_physical_size_bytes(path))
        try:
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123

                def pread(length: int, offset: int) -> bytes:
                    file.seek(offset)
                    return file.read(length)

                source = Source(pread, size_bytes=os.fstat(file.fileno()).st_size, name=path)
                header = headers.read_source(source, expected=request.format)
        except OSError as error:
            raise _cannot_open(path, error) from error
        if header.format not in FORMATS:
            raise _wrong_format(path, header.format)
        for problem in headers.problems(header, read_only=request.read_only):
            if problem.rule in _RULES and not (problem.rule is headers.Rule.PARENT and self._allow_parents):
                raise problem.error(f"{path}: {problem.reason}", host_path=path, remedy=problem.remedy)
        return DiskFacts(format=header.format, size_bytes=header.virtual_size_bytes)


def _cannot_open(path: str, error: OSError | ValueError) -> UtilityVMError:
    code = error.errno if isinstance(error, OSError) else None
    if getattr(error, "winerror", None) == _ERROR_SHARING_VIOLATION:
        return DiskInUse(f"{path} is in use by another VM, or by this host", host_path=path)
    if code in (errno.EACCES, errno.EPERM):
        return AccessDenied(f"{path}: this user may not read it", host_path=path)
    if code in (errno.ENOENT, errno.ENOTDIR):
        return DiskNotFound(f"{path}: there is no such file", host_path=path)
    return InvalidRequest(f"{path}: it cannot be opened: {error}", host_path=path)


def _physical_size_bytes(path: str) -> int:
    """The size of a physical disk. Source: Microsoft, IOCTL_DISK_GET_LENGTH_INFO. Never run on Windows."""
    loader = getattr(ctypes, "WinDLL", None)
    if loader is None:
        raise SetupError(f"{path}: physical disks by this name are Windows'", host_path=path)
    kernel32: Any = loader("kernel32.dll", use_last_error=True)
    kernel32.CreateFileW.restype = ctypes.c_void_p
    kernel32.CreateFileW.argtypes = (
        ctypes.c_wchar_p,
        ctypes.c_uint32,
        ctypes.c_uint32,
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_uint32,
        ctypes.c_void_p,
    )
    kernel32.DeviceIoControl.restype = ctypes.c_int32
    kernel32.DeviceIoControl.argtypes = (
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.POINTER(ctypes.c_uint32),
        ctypes.c_void_p,
    )
    kernel32.CloseHandle.argtypes = (ctypes.c_void_p,)
    last_error: Any = getattr(ctypes, "get_last_error", int)
    handle = kernel32.CreateFileW(path, _GENERIC_READ, _FILE_SHARE_READ_WRITE, None, _OPEN_EXISTING, 0, None)
    if handle in (None, ctypes.c_void_p(-1).value):
        raise AccessDenied(
            f"{path} cannot be opened: error {last_error()}",
            host_path=path,
            remedy="be an administrator, and take the disk offline on the host",
        )
    try:
        size = ctypes.c_int64()
        returned = ctypes.c_uint32()
        done = kernel32.DeviceIoControl(
            handle,
            _IOCTL_DISK_GET_LENGTH_INFO,
            None,
            0,
            ctypes.byref(size),
            ctypes.sizeof(size),
            ctypes.byref(returned),
            None,
        )
        if not done:
            raise HostRefused(f"{path} does not tell its size: error {last_error()}", host_path=path)
        return size.value
    finally:
        kernel32.CloseHandle(handle)
