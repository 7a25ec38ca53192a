"""SCSI's INQUIRY: what a disk says of itself, asked of the disk and not of what the kernel remembers.

Source: SPC-4, 6.4 INQUIRY; scsi/sg.h, sg_io_hdr.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from typing import Final

_SG_IO: Final = 0x2285
_SG_DXFER_FROM_DEV: Final = -3
_INQUIRY: Final = 0x12
_LENGTH: Final = 36  # of the standard data
_REVISION: Final = slice(32, 36)
_TIMEOUT_MS: Final = 5000


class _SgIoHdr(ctypes.Structure):
    _fields_ = (
        ("interface_id", ctypes.c_int),
        ("dxfer_direction", ctypes.c_int),
        ("cmd_len", ctypes.c_ubyte),
        ("mx_sb_len", ctypes.c_ubyte),
        ("iovec_count", ctypes.c_ushort),
        ("dxfer_len", ctypes.c_uint),
        ("dxferp", ctypes.c_void_p),
        ("cmdp", ctypes.c_void_p),
        ("sbp", ctypes.c_void_p),
        ("timeout", ctypes.c_uint),
        ("flags", ctypes.c_uint),
        ("pack_id", ctypes.c_int),
        ("usr_ptr", ctypes.c_void_p),
        ("status", ctypes.c_ubyte),
        ("masked_status", ctypes.c_ubyte),
        ("msg_status", ctypes.c_ubyte),
        ("sb_len_wr", ctypes.c_ubyte),
        ("host_status", ctypes.c_ushort),
        ("driver_status", ctypes.c_ushort),
        ("resid", ctypes.c_int),
        ("duration", ctypes.c_uint),
        ("info", ctypes.c_uint),
    )


def revision(node: str) -> str | None:
    """The revision that the disk behind `node` tells now; None if it does not answer."""
    command = (ctypes.c_ubyte * 6)(_INQUIRY, 0, 0, 0, _LENGTH, 0)
    data = (ctypes.c_ubyte * _LENGTH)()
    header = _SgIoHdr(
        interface_id=ord("S"),
        dxfer_direction=_SG_DXFER_FROM_DEV,
        cmd_len=len(command),
        dxfer_len=_LENGTH,
        dxferp=ctypes.addressof(data),
        cmdp=ctypes.addressof(command),
        timeout=_TIMEOUT_MS,
    )
    try:
        fd = os.open(node, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.ioctl(fd, _SG_IO, header)
    except OSError:
        return None
    finally:
        os.close(fd)
    if header.status or header.host_status:
        return None
    return bytes(data)[_REVISION].decode(errors="replace").strip(" \0")
