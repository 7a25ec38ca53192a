"""The second list of system calls that QEMU may not make, beside the one of its own `-sandbox`.

QEMU's list stops what its authors wanted to stop: new programs, new rights. A QEMU that its guest has taken over can
still reach other machines, look at its neighbours and use the kernel's newest and least tried parts. This list takes
that away. A refused call fails with EPERM, as if QEMU had no right to it. The list names what is refused, not what is
allowed: which calls an accelerator of another machine needs cannot be tried here, and a VM that stops is no safer.

Source: seccomp(2); libseccomp's seccomp_rule_add(3), seccomp_export_bpf(3), which knows each processor's numbers.
"""

from __future__ import annotations

import errno
import functools
import os
from typing import Any, Final

# Each group is a row of docs/security.md, and tests/real/qemu/test_confinement.py tries it from inside QEMU.
DENIED: Final[dict[str, tuple[str, ...]]] = {
    "io_uring": ("io_uring_setup", "io_uring_enter", "io_uring_register"),
    "other processes": (
        "ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "process_mrelease", "kcmp",
        "pidfd_open", "pidfd_getfd", "pidfd_send_signal", "kill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo",
    ),
    "new namespaces and mounts": (
        "unshare", "setns", "mount", "umount2", "pivot_root", "chroot", "open_tree", "move_mount", "fsopen", "fsconfig",
        "fsmount", "fspick", "mount_setattr", "statmount", "listmount",
    ),
    "files by handle": ("open_by_handle_at", "name_to_handle_at", "fanotify_init", "fanotify_mark"),
    "modes and owners": (
        "chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat",
        "setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr", "setxattrat",
        "mknod", "mknodat", "link", "linkat", "symlink", "symlinkat",
    ),
    "keys": ("add_key", "request_key", "keyctl"),
    "programs in the kernel": ("bpf", "perf_event_open", "userfaultfd", "lookup_dcookie"),
    "the machine": (
        "init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "swapon", "swapoff",
        "acct", "quotactl", "quotactl_fd", "syslog", "sethostname", "setdomainname", "settimeofday", "clock_settime",
        "clock_adjtime", "adjtimex", "iopl", "ioperm", "modify_ldt", "vhangup", "nfsservctl", "personality",
    ),
    "message queues and shared memory": (
        "mq_open", "mq_unlink", "msgget", "semget", "shmget", "shmat", "shmctl", "msgctl", "semctl",
    ),
    "memory that cannot be looked at": ("memfd_secret",),
}  # fmt: skip

_LIBRARY: Final = "libseccomp.so.2"  # QEMU needs it too: where `-sandbox` works it is there
_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000
_NOT_EQUAL, _MASKED_EQUAL = 1, 7  # enum scmp_compare
_UNKNOWN: Final = -1
_NEW_NAMESPACES: Final = (
    0x02000000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
    0x00020000,
)  # CLONE_NEW*


class FilterUnavailable(Exception):
    """libseccomp is missing, or refuses; the text says what."""


@functools.cache
def program() -> bytes:
    """The filter as the kernel takes it.

    Raises:
        FilterUnavailable: there is no libseccomp here.
    """
    import ctypes  # late: only who starts a VM needs it

    class Compare(ctypes.Structure):
        _fields_ = (
            ("arg", ctypes.c_uint),
            ("op", ctypes.c_int),
            ("a", ctypes.c_uint64),
            ("b", ctypes.c_uint64),
        )

    try:
        library: Any = ctypes.CDLL(_LIBRARY, use_errno=True)
    except OSError as error:
        raise FilterUnavailable(f"{_LIBRARY} is missing") from error
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(_ALLOW)))
    if not context:
        raise FilterUnavailable(f"{_LIBRARY} makes no filter")

    def refuse(name: str, *conditions: tuple[int, int, int, int], error: int = errno.EPERM) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == _UNKNOWN:
            return  # newer than this libseccomp
        compares = (Compare * max(1, len(conditions)))(*(Compare(*one) for one in conditions))
        done = library.seccomp_rule_add_array(
            context, ctypes.c_uint32(_ERRNO | error), number, len(conditions), compares
        )
        if done < 0 and done != -errno.EDOM:  # EDOM: not a call of this processor
            raise FilterUnavailable(f"{_LIBRARY} refuses a rule for {name}: {os.strerror(-done)}")

    try:
        for names in DENIED.values():
            for name in names:
                refuse(name)
        refuse("socket", (0, _NOT_EQUAL, 1, 0))  # AF_UNIX alone
        refuse("socketpair", (0, _NOT_EQUAL, 1, 0))
        for flag in _NEW_NAMESPACES:
            refuse("clone", (0, _MASKED_EQUAL, flag, flag))
        refuse("clone3", error=errno.ENOSYS)  # its flags are in memory, which no filter sees; the C library uses clone
        return _exported(library, context)
    finally:
        library.seccomp_release(context)


def _exported(library: Any, context: Any) -> bytes:
    file = os.memfd_create("utilityvm-seccomp", os.MFD_CLOEXEC)
    try:
        if (done := library.seccomp_export_bpf(context, file)) < 0:
            raise FilterUnavailable(f"{_LIBRARY} exports no filter: {os.strerror(-done)}")
        return os.pread(file, 1 << 20, 0)
    finally:
        os.close(file)
