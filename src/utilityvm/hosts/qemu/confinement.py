"""The walls around QEMU: what it would still reach if its guest took it over.

A confined QEMU has a root folder with its own program, libraries and firmware, read-only, and nothing else. It has no
/proc, so it cannot open one of its descriptors again with other rights. It sees no other process, no network, no
message queue and no host name of ours. A second list of system calls (seccomp.py) refuses what it does not need.
Started by root it has a user id of its own (privileges.py); started by a plain user it is alone in a user namespace.

bubblewrap builds the walls. It forks twice: the process that we start stays outside and waits for process 1 of the new
namespace, which waits for QEMU; when one ends, so do those that wait for it. If QEMU must not outlive its owner, the
kernel's parent-death signal ends the one outside with the owner, process 1 with the one outside, and with process 1
its whole namespace. (QEMU could not have the signal itself: its user may not be signalled by a parent without rights.)
QEMU does not begin before these signals are set.

Source: bwrap(1); pid_namespaces(7); docs/decisions/0011-walls-around-qemu.md, which says what else was weighed.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Self, cast

from utilityvm.errors import DeadlineExceeded, InvalidRequest, SetupError
from utilityvm.hosts.qemu import seccomp
from utilityvm.hosts.qemu.emulator import Emulator, boot_id, recall, remember
from utilityvm.hosts.qemu.privileges import Identity, launcher
from utilityvm.machine import cgroups
from utilityvm.machine.programs import find_program, run, spawn
from utilityvm.machine.threads import in_thread, lent

ENVIRONMENT: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
# Where QEMU finds what it opens by name.
KERNEL: Final = "/boot/kernel"
INITRAMFS: Final = "/boot/initramfs"
MEMORY: Final = "/boot/memory"
_LIBRARIES: Final = ("/usr/lib", "/usr/lib64", "/usr/lib32")
_FIRMWARE: Final = ("/usr/share/qemu", "/usr/share/seabios", "/usr/share/ipxe", "/usr/share/qemu-efi-aarch64")
_FOLDERS: Final = ("/usr", "/usr/bin", "/usr/share", "/boot", "/dev")
_LINKS: Final = {"lib": "usr/lib", "lib64": "usr/lib64", "lib32": "usr/lib32", "bin": "usr/bin", "sbin": "usr/sbin"}
_FOR_SETPRIV: Final = ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP")
_LOOK_AGAIN_S: Final = 0.0002
_TRIAL_S: Final = 10.0
_TURNED_OFF: Final = "it was turned off"


class Layer(StrEnum):
    """One wall. The values are what `uvm doctor` and `uvm inspect` print."""

    USER = "user id of its own"
    USER_NAMESPACE = "user namespace"
    FILES = "no files but its own"
    PROCESSES = "no other processes"
    NETWORK = "no network"
    IPC = "no shared memory or queues of others"
    SYSTEM_CALLS = "second list of system calls"
    RIGHTS = "no capabilities, no new rights"
    CORES = "no core dumps"
    LIMITS = "limits on files and threads"
    CGROUP = "a cgroup with bounds on memory and threads"


class Mode(StrEnum):
    """What the walls are worth to whoever starts the VM."""

    AUTO = "auto"  # as many as this machine has
    REQUIRE = "require"  # all of them but the cgroup, or no VM
    OFF = "off"  # without bubblewrap: to tell whether a fault is one of the walls


@dataclass(frozen=True, slots=True)
class Walls:
    """Which layers a QEMU has here, and for each other one why it has not."""

    on: tuple[Layer, ...]
    off: Mapping[Layer, str] = field(default_factory=dict)

    @property
    def is_jail(self) -> bool:
        """Does bubblewrap build them?"""
        return Layer.FILES in self.on


@dataclass(frozen=True, slots=True)
class Inside:
    """A file that QEMU opens by name."""

    fd: int  # open for reading, and inherited
    path: str
    is_copied: bool = False  # QEMU's user may not read it: it gets a copy


def prepare(emulator: Emulator, setpriv: Path) -> list[str]:
    """The words of bubblewrap that give QEMU its program, libraries and firmware. Blocks.

    A program that the user named may be a script, or have files beside it: it gets its folder, and all of /usr.

    Raises:
        SetupError: bubblewrap is not installed.
        FilterUnavailable: there is no libseccomp.
    """
    seccomp.program()  # made now, and kept
    program = emulator.path
    if emulator.is_named:
        words = ["--ro-bind", "/usr", "/usr", "--dir", "/boot", "--dir", "/dev"]
        if not program.is_relative_to("/usr"):
            for folder in list(reversed(program.parents))[1:-1]:  # those that bubblewrap makes are for root alone
                words += ["--dir", str(folder)]
            words += ["--ro-bind", str(program.parent), str(program.parent)]
    else:
        words = [word for folder in _FOLDERS for word in ("--dir", folder)]
        there = [path for path in (*_LIBRARIES, *_FIRMWARE) if Path(path).is_dir()]
        for path in (str(program), "/usr/bin/sh", str(setpriv), *there):
            words += ["--ro-bind", path, path]
    for name, target in _LINKS.items():
        here = Path("/", name)
        if here.is_symlink():
            words += ["--symlink", target, str(here)]
        elif here.is_dir() and name != "sbin":
            words += ["--ro-bind", str(here), str(here)]
    bwrap = find_program("bwrap", package="bubblewrap")
    return [str(bwrap), *words, "--dev-bind", "/dev/null", "/dev/null"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Jail:
    """How one QEMU is confined."""

    base: Sequence[str]  # what `prepare` gave
    who: Identity
    setpriv: Path
    files: Sequence[Inside] = ()
    dies_with_us: bool = False
    kvm: bool = False

    @contextmanager
    def start(self, command: Sequence[str], *, log: int, inherited: Sequence[int]) -> Iterator[Launched]:
        """Start QEMU's jail. QEMU begins when `Launched.qemu` is asked for, in the block, and not otherwise.

        Raises:
            SetupError: bubblewrap cannot be started.
        """
        with ExitStack() as opened:
            filter_fd = opened.enter_context(_file_of(seccomp.program()))
            # A file and not a pipe: bubblewrap would leave a process behind if nobody read.
            info = opened.enter_context(_file_of(b""))
            gate, teller = (opened.enter_context(_Descriptor(end)) for end in os.pipe())
            words = [
                *self.words(filter_fd=filter_fd, info_fd=info),
                *launcher(self.setpriv, self.who, dies_with_us=False, is_told=True),
                *command,
            ]
            passed = [*inherited, filter_fd, info]
            outer = spawn(words, env=ENVIRONMENT, stdin=gate.number, stdout=log, stderr=log, pass_fds=passed)
            gate.close()
            yield Launched(outer, info, teller.number)

    def words(self, *, filter_fd: int, info_fd: int) -> list[str]:
        """The words of bubblewrap. `info_fd`: where it writes which process it confines."""
        # fmt: off
        words = [
            *self.base,
            "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try",
            "--hostname", "utilityvm",
            "--cap-drop", "ALL",
            "--info-fd", str(info_fd),
            "--seccomp", str(filter_fd),
        ]
        # fmt: on
        if self.who.drops:
            for right in _FOR_SETPRIV:
                words += ["--cap-add", right]
        else:
            words += ["--unshare-user", "--disable-userns"]
        if self.dies_with_us:
            words += ["--die-with-parent"]
        if self.kvm:
            words += ["--dev-bind", "/dev/kvm", "/dev/kvm"]
        for file in self.files:
            if file.path.startswith("/proc/"):
                words += ["--proc", "/proc"]
            elif file.is_copied:
                words += ["--perms", "0444", "--ro-bind-data", str(file.fd), file.path]
            else:
                words += ["--ro-bind", f"/proc/self/fd/{file.fd}", file.path]
        return [*words, "--remount-ro", "/", "--chdir", "/", "--"]


@dataclass(frozen=True, slots=True)
class Launched:
    """A jail that is being built. `outer` is the process outside."""

    outer: int
    _info: int
    _teller: int

    async def qemu(self, *, timeout_s: float) -> int:
        """The process that is QEMU from now on; `outer` if bubblewrap failed, and the log says why.

        Raises:
            DeadlineExceeded: bubblewrap took longer than `timeout_s` seconds. QEMU does not begin.
        """
        try:
            async with asyncio.timeout(timeout_s):
                pid = await in_thread(lent(self._info, _await_gate), self.outer)
        except TimeoutError:
            raise DeadlineExceeded(f"QEMU was not confined within {timeout_s:g} s", remedy="try again") from None
        if pid is None:
            return self.outer
        self._tell()
        return pid

    def _tell(self) -> None:
        with suppress(BrokenPipeError):
            os.write(self._teller, b"go\n")


def mode(wanted: str | None) -> Mode:
    """The mode that is `wanted`, else what UTILITYVM_CONFINEMENT says, else `AUTO`.

    Raises:
        InvalidRequest: there is no such mode.
    """
    text = wanted or os.environ.get("UTILITYVM_CONFINEMENT") or Mode.AUTO
    try:
        return Mode(text)
    except ValueError:
        source = "the VM's configuration" if wanted else "UTILITYVM_CONFINEMENT"
        raise InvalidRequest(f"{source} asks for confinement {text!r}", remedy=f"use {', '.join(Mode)}") from None


async def survey(emulator: Emulator, mode: Mode = Mode.AUTO) -> Walls:
    """Which walls a QEMU started now would have. What bubblewrap can do here is tried once a boot, and remembered.

    A cgroup is a bound on what QEMU takes and no wall around what it reaches: `REQUIRE` does without.

    Raises:
        SetupError: `mode` is `REQUIRE` and one is missing; says which, and why.
    """
    is_root = os.geteuid() == 0
    always: list[Layer] = [Layer.RIGHTS, Layer.CORES, Layer.LIMITS]
    if is_root:
        always.insert(0, Layer.USER)
    jailed = [Layer.FILES, Layer.PROCESSES, Layer.NETWORK, Layer.IPC, Layer.SYSTEM_CALLS]
    if not is_root:
        jailed.insert(0, Layer.USER_NAMESPACE)
    why: str | None = _TURNED_OFF
    unbounded: str | None = _TURNED_OFF
    if mode is not Mode.OFF:
        why, unbounded = await in_thread(lambda: (_why_no_jail(emulator), _why_no_cgroup()))
    off = {} if unbounded is None else {Layer.CGROUP: unbounded}
    if unbounded is None:
        always.append(Layer.CGROUP)
    if why is None:
        return Walls((*always, *jailed), off)
    if mode is Mode.REQUIRE:
        raise SetupError(
            f"QEMU would not be confined ({', '.join(jailed)}): {why}",
            remedy="mend that, or start the VM without confinement=require",
        )
    return Walls(tuple(always), {**dict.fromkeys(jailed, why), **off})


def _why_no_cgroup() -> str | None:
    try:
        cgroups.place()
    except cgroups.Unavailable as error:
        return str(error)
    return None


def _why_no_jail(emulator: Emulator) -> str | None:
    """What keeps bubblewrap from working here; None if it works. Blocks."""
    key = f"walls {emulator.key} {boot_id()} {os.geteuid()}"
    known = recall(key)
    if isinstance(known, dict) and cast(dict[str, Any], known).get("work"):
        return None
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        return "the kernel does not tell a process's children (CONFIG_PROC_CHILDREN)"
    try:
        setpriv = find_program("setpriv", package="util-linux")
        who = Identity(os.geteuid(), drops=os.geteuid() == 0)
        jail = Jail(base=prepare(emulator, setpriv), who=who, setpriv=setpriv)
        with _file_of(seccomp.program()) as filter_fd, _Descriptor(os.open(os.devnull, os.O_WRONLY)) as null:
            words = [*jail.words(filter_fd=filter_fd, info_fd=null.number), "/bin/sh", "-c", "exit 0"]
            run(words, timeout_s=_TRIAL_S, pass_fds=[filter_fd, null.number])
    except SetupError as error:
        return f"{error} ({error.remedy})" if error.remedy else str(error)
    except seccomp.FilterUnavailable as error:
        return str(error)
    remember(key, {"work": True})
    return None


def _await_gate(info: int, outer: int) -> int | None:
    """The process that waits to be told to become QEMU, once process 1 waits for it; None if they ended. Blocks."""
    while _state_of(outer) is not None:
        with suppress(OSError, ValueError, KeyError):
            first = int(json.loads(os.pread(info, 4096, 0))["child-pid"])
            pid = int(Path(f"/proc/{first}/task/{first}/children").read_text())
            is_waiting = Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"/bin/sh\0")
            if is_waiting and _state_of(first) == "S":  # asleep in wait(2): its signal is set
                return pid
        time.sleep(_LOOK_AGAIN_S)  # nobody tells
    return None


def _state_of(pid: int) -> str | None:
    """The letter of the process's state; None if it has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None
    return None if state in "ZX" else state


@contextmanager
def _file_of(content: bytes) -> Iterator[int]:
    """A descriptor of an anonymous file with that content, at its beginning."""
    with _Descriptor(os.memfd_create("utilityvm-launch", os.MFD_CLOEXEC)) as file:
        if content:
            os.write(file.number, content)
            os.lseek(file.number, 0, os.SEEK_SET)
        yield file.number


class _Descriptor:
    """A descriptor that is closed once: early, or with the block."""

    def __init__(self, number: int) -> None:
        self.number = number

    def close(self) -> None:
        number, self.number = self.number, -1
        if number >= 0:
            os.close(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
