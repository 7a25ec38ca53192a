"""What runs the VM's processors: KVM, else Apple's hvf, else QEMU's own translator (TCG). Chosen by trying.

That `/dev/kvm` opens says little: under some hypervisors QEMU then aborts ("failed to set MSR"), under others the guest
crawls or never runs. So a machine of our kind is started with a kernel of three instructions that asks QEMU to
exit with a status of its own. It has 2 seconds, which is 25 times of what TCG needs.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from utilityvm.errors import SetupError
from utilityvm.hosts.qemu import emulator as emulators
from utilityvm.hosts.qemu import privileges, userids
from utilityvm.hosts.qemu.emulator import Emulator
from utilityvm.hosts.qemu.privileges import Identity
from utilityvm.log import logger
from utilityvm.machine.programs import CommandFailed, find_program, run
from utilityvm.machine.threads import in_thread

NAMES: Final = ("kvm", "hvf", "tcg")
CPU: Final = {"kvm": "host", "hvf": "host", "tcg": "max"}
TRIAL_S: Final = 2.0
_RAN: Final = 33  # isa-debug-exit: (16 << 1) | 1, which QEMU never ends with by itself
_LOAD: Final = 0x100000

_log = logger(__name__)


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What was chosen, and why."""

    name: str
    reason: str

    @property
    def cpu(self) -> str:
        return CPU[self.name]


async def choose(emulator: Emulator, *, wanted: str | None = None) -> Accelerator:
    """The accelerator to use: the `wanted` one, else what UTILITYVM_ACCEL says, else the best that works.

    The last is found out once for each boot of this machine and each QEMU, and remembered.

    Raises:
        SetupError: another name than kvm, hvf or tcg; or not even TCG runs.
    """
    if wanted is not None:
        return Accelerator(_checked(wanted, "the VM's configuration"), "asked for by the VM's configuration")
    if named := os.environ.get("UTILITYVM_ACCEL"):
        return Accelerator(_checked(named, "UTILITYVM_ACCEL"), "asked for by UTILITYVM_ACCEL")
    key, known = await in_thread(_recall, emulator)
    if known is not None:
        return known
    chosen = await _try_all(emulator)
    await in_thread(emulators.remember, key, {"name": chosen.name, "reason": chosen.reason})
    return chosen


def _recall(emulator: Emulator) -> tuple[str, Accelerator | None]:
    key = f"accelerator {emulator.key} {emulators.boot_id()} {os.geteuid()}"
    known = emulators.recall(key)
    if not isinstance(known, dict):
        return key, None
    fields = cast(dict[str, Any], known)
    return key, Accelerator(str(fields["name"]), str(fields["reason"]))


async def attempt(emulator: Emulator, name: str, *, timeout_s: float = TRIAL_S) -> str | None:
    """Run the trial program under an accelerator. None: it ran; else why not.

    Raises:
        SetupError: QEMU cannot be started at all.
    """
    async with userids.identity(kvm=name == "kvm") as who:
        return await in_thread(_attempt, emulator, name, who, timeout_s)


def _attempt(emulator: Emulator, name: str, who: Identity, timeout_s: float) -> str | None:
    setpriv = find_program("setpriv", package="util-linux")
    with _trial_kernel() as kernel:
        # fmt: off
        command: list[str | Path] = [
            *privileges.launcher(setpriv, who, dies_with_us=False), emulator.path,
            "-nodefaults", "-no-user-config", "-no-reboot",
            "-display", "none",
            "-machine", f"{emulator.machine},sata=off,smbus=off",
            "-accel",   name,
            "-cpu",     CPU[name],
            "-m",       "32",
            "-kernel",  f"/proc/self/fd/{kernel}",
            "-device",  "isa-debug-exit,iobase=0xf4,iosize=1",
        ]
        # fmt: on
        try:
            run(command, timeout_s=timeout_s, pass_fds=[kernel])
        except CommandFailed as error:
            if error.status == _RAN:
                return None
            if error.status == -9:
                return f"nothing ran within {timeout_s:g} s"
            return _why(error, emulator.path.name)
        return "QEMU ended before the trial program ran"


async def _try_all(emulator: Emulator) -> Accelerator:
    failures: list[str] = []
    for name in NAMES:
        if name == "kvm" and not await in_thread(os.access, "/dev/kvm", os.F_OK):
            why: str | None = "there is no /dev/kvm"
        elif name == "hvf" and os.uname().sysname != "Darwin":
            continue
        else:
            # TCG always runs; on a busy machine it may only take its time.
            why = await attempt(emulator, name, timeout_s=TRIAL_S if name != "tcg" else 10 * TRIAL_S)
        if why is None:
            return Accelerator(name, "; ".join([*failures, f"{name} ran the trial program"]))
        _log.info("accelerator %s does not work: %s", name, why)
        failures.append(f"{name}: {why}")
    raise SetupError(
        f"no accelerator works: {'; '.join(failures)}",
        remedy=f"try {emulator.path} by hand, or apt-get install --reinstall qemu-system-x86",
    )


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise SetupError(f"{source} asks for accelerator {name!r}", remedy=f"there are {', '.join(NAMES)}")
    return name


def _why(error: CommandFailed, program: str) -> str:
    lines = [line.removeprefix(f"{program}: ") for line in error.output.splitlines() if "warning:" not in line]
    ending = f"killed by signal {-error.status}" if error.status < 0 else f"status {error.status}"
    return f"{lines[0]} ({ending})" if lines else f"QEMU ended with {ending}"


@contextmanager
def _trial_kernel() -> Generator[int]:
    """A descriptor of the smallest multiboot kernel: it writes 16 to QEMU's exit port.

    Source: Multiboot Specification 0.6.96, section 3.1.
    """
    magic, has_addresses = 0x1BADB002, 0x10000
    checksum = -(magic + has_addresses) & 0xFFFFFFFF
    header = struct.pack("<8I", magic, has_addresses, checksum, _LOAD, _LOAD, 0, 0, _LOAD + 32)
    code = bytes.fromhex("b010 e6f4 f4 ebfe")  # mov al, 16 · out 0xf4, al · hlt · jmp to itself
    descriptor = os.memfd_create("utilityvm-trial", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, (header + code).ljust(64, b"\0"))
        yield descriptor
    finally:
        os.close(descriptor)
