"""Starts QEMU, with no more rights than it needs, and knows it again later.

What is true of a QEMU started here: it opens no path of ours (the kernel, the root disk, its sockets and its log are
descriptors that it inherits), it cannot start programs or gain rights (seccomp, no-new-privileges, as root another user
id), and only its owner can reach its sockets. Its runtime folder holds::

    qmp0.sock    the monitor, for the VM's owner
    qmp1.sock    another one, for a person who looks in
    agent.sock   the port `org.utilityvm.bridge` of the guest
    console.log  the console and QEMU's own messages, bounded (console.py)
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
import stat
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from utilityvm.errors import HostRefused, InvalidRequest, OutcomeUnknown, SetupError, UtilityVMError, VMExists, VMGone
from utilityvm.hosts.qemu import accelerator as accelerators
from utilityvm.hosts.qemu import confinement, console, emulator, incoming, privileges, userids
from utilityvm.hosts.qemu.accelerator import Accelerator
from utilityvm.hosts.qemu.blockdev import FIRST_NUMBER, LOG_SET, ROOT_SET
from utilityvm.hosts.qemu.confinement import Inside, Layer, Walls
from utilityvm.hosts.qemu.emulator import Emulator
from utilityvm.hosts.qemu.incoming import Incoming
from utilityvm.hosts.qemu.lifetime import Watch
from utilityvm.hosts.qemu.privileges import Identity
from utilityvm.hosts.qemu.qmp import Qmp
from utilityvm.hosts.qemu.ram import Ram
from utilityvm.hosts.qemu.ram import find as find_ram
from utilityvm.log import logger
from utilityvm.machine import cgroups, hostpath, oserrors, runtime
from utilityvm.machine.oserrors import typed_errors
from utilityvm.machine.processes import is_ending, is_running
from utilityvm.machine.programs import find_program, spawn
from utilityvm.machine.sockets import Listener
from utilityvm.machine.threads import in_thread, to_the_end
from utilityvm.scsi.slot import MAX_CONTROLLERS
from utilityvm.tasks import Undo
from utilityvm.text import clean as clean_text

QMP_SOCKETS: Final = ("qmp0.sock", "qmp1.sock")
AGENT_SOCKET: Final = "agent.sock"
AGENT_PORT: Final = "org.utilityvm.bridge"
ROOT_SERIAL: Final = "utilityvm-root"
FIRST_CONTROLLER: Final = 0x10  # PCI slot of controller 0; the guest finds disks by it
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_COPY: Final = 1 << 20
# Of QEMU beside its guest's memory, in MiB: tables of 256 disks (32 each), the emulator's code (1024), QEMU itself.
_MEMORY_BESIDE_MIB: Final = 256 * 32 + 1024 + 1024
_LAST_WORDS, _LONGEST_LINE = 16 << 10, 500
_LOOK_AGAIN_S: Final = 0.01
_END_S: Final = 5.0  # a killed process ends in milliseconds, unless the kernel waits for its storage
_REMEDIES: Final = (
    ("KVM", "set UTILITYVM_ACCEL=tcg, or make /dev/kvm work: `uvm doctor` says what it lacks"),
    ("allocate memory", "give the VM less memory"),
    ("memory backend", "give the VM less memory"),
)

_log = logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuConfig:
    """What a VM is started with."""

    name: str
    kernel: Path | None = None
    initramfs: Path | None = None
    root: Path | None = None  # raw; read-only at slot 0:0
    cmdline: str = ""  # the guest image's; where the controllers are is appended to it
    memory_mib: int = 256
    cpus: int = 1
    controllers: int = MAX_CONTROLLERS
    keep: bool = False  # outlive the process (and the thread) that started it
    paused: bool = False  # run no processor until QemuHost.resume
    accelerator: str | None = None  # None: chosen by trying
    uuid: str | None = None  # None: a new one
    confinement: str | None = None  # auto, require or off; None: as UTILITYVM_CONFINEMENT says, else auto

    def check(self) -> None:
        """Raises:
        InvalidRequest: names the value that cannot be.
        """
        if not _NAME.fullmatch(self.name):
            raise InvalidRequest(
                f"{self.name!r} cannot be a VM's name",
                remedy="use 1 to 63 letters, digits, '.', '_' and '-', the first a letter or digit",
            )
        if not 16 <= self.memory_mib <= 1 << 20:
            raise InvalidRequest(
                f"a VM cannot have {self.memory_mib} MiB of memory", vm=self.name, remedy="give it 96 MiB to 1 TiB"
            )
        if not 1 <= self.cpus <= 255:
            raise InvalidRequest(f"a VM cannot have {self.cpus} processors", vm=self.name, remedy="give it 1 to 255")
        if not 0 <= self.controllers <= MAX_CONTROLLERS:
            raise InvalidRequest(
                f"a VM cannot have {self.controllers} SCSI controllers", vm=self.name, remedy=f"0 to {MAX_CONTROLLERS}"
            )
        confinement.mode(self.confinement)
        if self.root is not None and not self.controllers:
            raise InvalidRequest("a root disk, and no controller for it", vm=self.name, remedy="give it a controller")
        if (self.initramfs or self.cmdline) and self.kernel is None:
            raise InvalidRequest("an initramfs or a kernel command line, and no kernel", vm=self.name)


@typed_errors
@dataclass(frozen=True, slots=True, kw_only=True)
class QemuProcess:
    """A QEMU that runs, or ran. Pid, start time and UUID together name it for as long as the machine is up."""

    name: str
    pid: int
    started: str  # see `pids`
    uuid: str
    folder: Path
    uid: int
    controllers: int
    keep: bool
    accelerator: str
    accelerator_reason: str
    qemu_version: str
    machine: str
    log_pid: int  # the log's writer, which ends by itself when QEMU has
    log_started: str
    walls: tuple[str, ...] = ()  # the layers of its confinement
    without: Mapping[str, str] = field(default_factory=dict)  # those that it has not, and why
    ram: Ram | None = None  # None: it was not told when it was started
    cgroup: str = ""  # the folder of its cgroup, if it has one

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "folder": str(self.folder)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> QemuProcess:
        """The process that `to_json` wrote; KeyError or TypeError for another document."""
        walls = tuple(document.get("walls", ()))
        ram = Ram(**document["ram"]) if document.get("ram") else None
        fields: dict[str, Any] = {**document, "folder": Path(document["folder"]), "walls": walls, "ram": ram}
        return cls(**fields)

    @property
    def agent_socket(self) -> Path:
        return self.folder / AGENT_SOCKET

    @property
    def agent(self) -> Listener:
        """Where the guest's agent is reached, and who listens there."""
        return Listener(self.agent_socket, self.uid, self.pid)

    @property
    def monitor(self) -> Listener:
        """Where the owner reaches QEMU."""
        return Listener(self.folder / QMP_SOCKETS[0], self.uid, self.pid)

    def is_running(self) -> bool:
        """Is that very process alive? Asks /proc alone, so it is cheap, and QEMU may hang."""
        return is_running(self.pid, self.started)


def kernel_cmdline(config: QemuConfig) -> str:
    """The guest image's command line, and where in the guest each controller is: PCI addresses in their order."""
    addresses = [f"0000:00:{FIRST_CONTROLLER + index:02x}.0" for index in range(config.controllers)]
    return " ".join(filter(None, [config.cmdline, f"utilityvm.scsi={','.join(addresses)}"]))


def memory_backend(config: QemuConfig) -> str:
    """The VM's RAM, as a `-object`: a memfd, from whose descriptor the RAM of a paused VM is saved (memory.py)."""
    return f"memory-backend-memfd,id=ram,size={config.memory_mib}M,share=on"


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptors:
    """What QEMU inherits, by number."""

    qmp: tuple[int, int]
    agent: int
    log: int
    root: int | None
    kernel: Inside | None
    initramfs: Inside | None
    memory: Inside | None = None  # a clone's

    def files(self) -> list[Inside]:
        """What QEMU opens by name."""
        return [file for file in (self.kernel, self.initramfs, self.memory) if file is not None]

    def all(self) -> list[int]:
        numbers = [*self.qmp, self.agent, self.log, *(file.fd for file in self.files())]
        return numbers if self.root is None else [*numbers, self.root]


def command_line(
    config: QemuConfig,
    emulator: Emulator,
    accelerator: Accelerator,
    *,
    vm_uuid: str,
    fds: Descriptors,
    saved: Incoming | None = None,
) -> list[str]:
    """The words that start QEMU. Addresses are fixed: the guest, and the state of a template, know devices by them."""
    if saved is None:
        memory = memory_backend(config)
    else:
        assert fds.memory is not None, "a clone without memory"
        path, version = fds.memory.path, emulator.version
        memory = incoming.memory_backend(path, memory_mib=config.memory_mib, qemu_version=version)
    # fmt: off
    words = [
        str(emulator.path),
        "-name",    config.name,
        "-uuid",    vm_uuid,
        "-nodefaults", "-no-user-config", "-no-reboot",
        "-display", "none",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-machine", f"{emulator.machine},memory-backend=ram,sata=off,smbus=off,vmport=off,suppress-vmdesc=on,"
                    "dump-guest-core=off",
        "-accel",   accelerator.name,
        "-cpu",     accelerator.cpu,
        "-smp",     str(config.cpus),
        "-m",       str(config.memory_mib),
        "-object",  memory,
        "-global",  "migration.send-configuration=off",
        "-add-fd",  f"fd={fds.log},set={LOG_SET},opaque=log",
        "-chardev", f"file,id=log,path=/dev/fdset/{LOG_SET},append=on",
        "-serial",  "chardev:log",
        "-chardev", f"socket,id=qmp0,fd={fds.qmp[0]},server=on,wait=off",
        "-mon",     "chardev=qmp0,mode=control",
        "-chardev", f"socket,id=qmp1,fd={fds.qmp[1]},server=on,wait=off",
        "-mon",     "chardev=qmp1,mode=control",
        "-device",  "virtio-serial-pci,id=serial0,bus=pcie.0,addr=0x8,max_ports=4",
        "-chardev", f"socket,id=agent,fd={fds.agent},server=on,wait=off",
        "-device",  f"virtserialport,id=agent,bus=serial0.0,nr=1,chardev=agent,name={AGENT_PORT}",
        "-device",  "virtio-rng-pci,bus=pcie.0,addr=0x9",
        "-device",  "vmgenid,guid=auto",
    ]
    for index in range(config.controllers):
        words += ["-device", f"virtio-scsi-pci,id=scsi{index},bus=pcie.0,addr={FIRST_CONTROLLER + index:#x}"]
    if fds.root is not None:
        words += [
            "-add-fd",   f"fd={fds.root},set={ROOT_SET},opaque=root",
            "-blockdev", f"raw,node-name=n{ROOT_SET},read-only=on,"
                         f"file.driver=file,file.filename=/dev/fdset/{ROOT_SET},file.read-only=on",
            "-device",   f"scsi-hd,id=d{ROOT_SET},bus=scsi0.0,scsi-id=0,lun=0,drive=n{ROOT_SET},serial={ROOT_SERIAL}",
        ]
    if fds.kernel is not None:
        words += ["-kernel", fds.kernel.path, "-append", kernel_cmdline(config)]
    if fds.initramfs is not None:
        words += ["-initrd", fds.initramfs.path]
    words += ["-S"]  # until `start` has seen which memory it has
    # fmt: on
    if saved is not None:
        words += incoming.words(saved, first_number=FIRST_NUMBER)
    return words


async def start(
    config: QemuConfig, *, folder: Path, saved: Incoming | None = None, timeout_s: float = 30.0
) -> tuple[QemuProcess, Qmp]:
    """Start QEMU; give its record, and the owner's connection to its monitor, which has answered.

    With `saved` it continues from there: it is paused, and may still be loading.

    `folder` is made if it is missing, readable by its owner alone. Call it on the thread that is to own the VM: without
    `keep` the VM is killed when that thread ends. If this fails no process, socket or log is left behind, and the
    folder only if others put something there.

    Raises:
        InvalidRequest: the configuration cannot be.
        VMExists: a VM runs in that folder.
        SetupError: QEMU, a file, a right or an id is missing; or QEMU ended at once: the message has its last words.
        OutcomeUnknown: QEMU did not answer within `timeout_s` seconds and was killed.
    """
    config.check()
    program = await emulator.find()
    accelerator = await accelerators.choose(program, wanted=config.accelerator)
    walls = await confinement.survey(program, mode=confinement.mode(config.confinement))
    await in_thread(check_unused, folder, config.name)
    async with Undo() as undo:
        undo.add(to_the_end, clean, folder)
        await to_the_end(_make_folder, folder, config.name)
        children = _Children()
        undo.add(children.end)
        process = await _spawn(config, program, accelerator, walls, folder, children, saved, timeout_s=timeout_s)
        if Layer.CGROUP in walls.on:  # beside QEMU's own start, which takes longer
            children.cgroup = asyncio.ensure_future(to_the_end(_bound, process, config))
        try:
            qmp = await Qmp.connect(process.monitor, vm=config.name, timeout_s=timeout_s)
            undo.add(qmp.close)
            if children.cgroup is not None:
                process = await children.cgroup
            process = replace(process, ram=await in_thread(_ram_of, process, config))
            if not config.paused and saved is None:
                await qmp.execute("cont", timeout_s=timeout_s)
        except VMGone as error:
            await children.end()
            raise await in_thread(_failure, process, saved) from error
        children.close()
    _log.info("started QEMU %s as process %d (%s)", qmp.version, process.pid, accelerator.name, vm=config.name)
    return process, qmp


def _bound(process: QemuProcess, config: QemuConfig) -> QemuProcess:
    """Put QEMU into a cgroup of its own, before its guest runs. If the kernel refuses, the record says so."""
    most = (config.memory_mib + _MEMORY_BESIDE_MIB) << 20
    try:
        folder = cgroups.put(process.pid, memory_bytes=most, threads=privileges.THREADS)
    except cgroups.Unavailable as error:
        _log.warning("QEMU's memory is not bounded: %s", error, vm=config.name)
        walls = tuple(layer for layer in process.walls if layer != Layer.CGROUP)
        return replace(process, walls=walls, without={**process.without, str(Layer.CGROUP): str(error)})
    return replace(process, cgroup=str(folder))


def _ram_of(process: QemuProcess, config: QemuConfig) -> Ram | None:
    """What its RAM is, while its guest has not run. None if it cannot be told: then it cannot become a template."""
    try:
        return find_ram(process.pid, config.memory_mib << 20, vm=config.name)
    except (OSError, HostRefused) as error:
        _log.info("the VM cannot become a template: %s", error, vm=config.name)
        return None


def clean(folder: Path, *, keep_log: bool = False) -> None:
    """Remove what a VM left in its runtime folder, and the folder if it is empty then. Its QEMU must have ended.

    Nothing is removed of a folder where a QEMU listens: it is another VM's by now, of a later start or another store.
    """
    try:
        if _somebody_listens(folder / QMP_SOCKETS[1]):
            _log.warning("%s is in use by another VM, and is left alone", folder)
            return
        with runtime.entered(folder) as here:
            for name in (*QMP_SOCKETS, AGENT_SOCKET):
                (here / name).unlink(missing_ok=True)
            if not keep_log:
                console.remove(here)
    except (FileNotFoundError, NotADirectoryError):
        return
    except SetupError as error:
        _log.warning("%s is left alone: %s", folder, error)
        return
    try:
        folder.rmdir()
    except OSError:
        return  # not there, or it holds what others put there


async def destroy(process: QemuProcess, *, keep_log: bool = False) -> None:
    """`end` that QEMU, see its log's writer end, and remove its runtime folder. Calling it again is no error.

    Raises:
        OutcomeUnknown: the kernel does not let it go: its storage hangs. Its folder stays; call again.
        SetupError: it cannot be told whether it runs.
    """
    await end(process)
    await to_the_end(partial(clean, process.folder, keep_log=keep_log))


async def end(process: QemuProcess) -> None:
    """Kill that QEMU, and see it and its log's writer end. Calling it again is no error.

    A process is killed only if pid, start time and user are the recorded ones; what it says of itself counts for
    nothing: a QEMU that its guest has taken over can write what it likes on its command line.

    Raises:
        OutcomeUnknown: the kernel does not let it go: its storage hangs; call again.
        SetupError: it cannot be told whether it runs.
    """
    watch = _watch(process.pid, process.started)
    if watch is not None:
        try:
            if await in_thread(is_proven, process):
                watch.kill()
            elif not await in_thread(is_ending, process.pid):  # then it has no command line any more, and is waited for
                return
            if not await watch.wait(timeout_s=_END_S):
                raise does_not_end(process.name, process.pid)
        finally:
            watch.close()
    await in_thread(userids.rest, process.uid)
    if process.cgroup:
        await in_thread(cgroups.remove, Path(process.cgroup))
    await logged(process)


def does_not_end(name: str, pid: int) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"QEMU of VM {name} (process {pid}) was killed and does not end",
        vm=name,
        remedy="its storage may hang: see `dmesg`; then stop the VM again",
    )


def restore_sockets(process: QemuProcess) -> None:
    """Have the sockets in the runtime folder again, if somebody removed or replaced them while QEMU runs.

    QEMU listens as before, only the names are gone. The log's writer keeps each socket's file open, and a link to
    that leads to the same socket. Nothing is done if they are there.

    Raises:
        SetupError: they are gone for good: the log's writer has ended as well.
    """
    kept = _kept_sockets(process)
    for path in (process.folder / name for name in (*QMP_SOCKETS, AGENT_SOCKET)):
        there, ours = _file_of(path), _file_of(kept.get(path.name))
        if there and (ours is None or os.path.samestat(there, ours) or _somebody_listens(path)):
            continue
        if ours is None:
            raise SetupError(
                f"the runtime folder {process.folder} was removed while the VM runs, and with it {path.name}, at which "
                f"its QEMU (process {process.pid}) is reached",
                vm=process.name,
                remedy="shut the guest down from inside, if you can reach it; to end it without what it has not "
                f"written out yet: uvm stop --force {process.name}",
            )
        _make_folder(process.folder, process.name)
        with runtime.entered(process.folder) as here:
            (here / path.name).unlink(missing_ok=True)
            (here / path.name).symlink_to(kept[path.name])
        _log.warning("%s was removed while the VM runs, and leads to its socket again", path, vm=process.name)


def was_restored(process: QemuProcess) -> bool:
    """Did `restore_sockets` have something to do, now or before?"""
    return any((process.folder / name).is_symlink() for name in (*QMP_SOCKETS, AGENT_SOCKET))


def _file_of(path: Path | None) -> os.stat_result | None:
    try:
        return None if path is None else path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _kept_sockets(process: QemuProcess) -> dict[str, Path]:
    """The sockets' files that the log's writer has open, by name. Source: proc(5), /proc/PID/fd."""
    if not is_running(process.log_pid, process.log_started):
        return {}
    folder = Path(f"/proc/{process.log_pid}/fd")
    found = {}
    try:
        for entry in folder.iterdir():
            name = Path(str(entry.readlink()).removesuffix(" (deleted)")).name
            if stat.S_ISSOCK(entry.stat().st_mode) and name in (*QMP_SOCKETS, AGENT_SOCKET):
                found[name] = entry
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return {}
    return found


async def logged(process: QemuProcess) -> None:
    """Wait until the log holds everything that the exited QEMU wrote."""
    writer = _watch(process.log_pid, process.log_started)
    if writer is not None:
        if not await writer.wait(timeout_s=_END_S):
            _log.warning("the writer of %s does not end", process.folder / console.NAME, vm=process.name)
        writer.close()


async def _spawn(
    config: QemuConfig,
    program: Emulator,
    accelerator: Accelerator,
    walls: Walls,
    folder: Path,
    children: _Children,
    saved: Incoming | None,
    *,
    timeout_s: float,
) -> QemuProcess:
    vm_uuid = config.uuid or str(uuid.uuid4())
    kvm = accelerator.name == "kvm"
    async with AsyncExitStack() as opened:
        who = await opened.enter_async_context(userids.identity(kvm=kvm))
        boot = await in_thread(_open_boot, config, program, who, walls, late=_Boot.close)
        opened.push_async_callback(partial(in_thread, boot.close, always=True))
        ports = await to_the_end(_open_ports, folder, late=_Ports.abandon)
        opened.push_async_callback(partial(in_thread, ports.close, always=True))
        children.log = Watch.child(ports.log_pid)
        fds = Descriptors(
            qmp=ports.qmp,
            agent=ports.agent,
            log=ports.log,
            kernel=boot.kernel,
            initramfs=boot.initramfs,
            root=boot.root,
            memory=None if saved is None else _memory(walls, saved, program),
        )
        words = command_line(config, program, accelerator, vm_uuid=vm_uuid, fds=fds, saved=saved)
        inherited = fds.all() + (saved.fds() if saved else [])
        dies = not config.keep
        # In this thread and no other: without `keep` the VM ends with the thread that started it.
        if walls.is_jail:
            jail = confinement.Jail(
                base=boot.jail, who=who, setpriv=boot.setpriv, files=fds.files(), dies_with_us=dies, kvm=kvm
            )
            with jail.start(words, log=ports.log, inherited=inherited) as launched:
                children.jail = Watch.child(launched.outer)
                pid = await launched.qemu(timeout_s=timeout_s)
        else:
            words = [*privileges.launcher(boot.setpriv, who, dies_with_us=dies), *words]
            pid = spawn(words, env=confinement.ENVIRONMENT, stdout=ports.log, stderr=ports.log, pass_fds=inherited)
        children.qemu = Watch.child(pid)
        if who.drops:
            await in_thread(privileges.await_use, pid, who)
    return QemuProcess(
        name=config.name,
        pid=pid,
        started=children.qemu.started if children.qemu else "",
        uuid=vm_uuid,
        folder=folder,
        uid=who.uid,
        controllers=config.controllers,
        keep=config.keep,
        accelerator=accelerator.name,
        accelerator_reason=accelerator.reason,
        qemu_version=program.version,
        machine=program.machine,
        log_pid=ports.log_pid,
        log_started=children.log.started if children.log else "",
        walls=tuple(walls.on),
        without={str(layer): why for layer, why in walls.off.items()},
    )


class _Children:
    """QEMU and its log's writer while they are being started; None for one that has ended already."""

    def __init__(self) -> None:
        self.jail: Watch | None = None  # what waits for a confined QEMU, and ends with it
        self.qemu: Watch | None = None
        self.log: Watch | None = None
        self.cgroup: asyncio.Task[QemuProcess] | None = None  # puts QEMU into one

    async def end(self) -> None:
        """Kill QEMU and see all end: the jail of one that never began, and the writer, do by themselves."""
        if self.qemu is not None:
            self.qemu.kill()
        for watch in (self.qemu, self.jail, self.log):
            if watch is not None and not await watch.wait(timeout_s=_END_S):
                _log.warning("process %d did not end within %s s", watch.pid, _END_S)
        if self.cgroup is not None:
            await asyncio.wait([self.cgroup])
            if not self.cgroup.cancelled() and self.cgroup.exception() is None:
                await in_thread(cgroups.remove, Path(self.cgroup.result().cgroup))
        self.close()

    def close(self) -> None:
        for watch in (self.qemu, self.jail, self.log):
            if watch is not None:
                watch.close()


def _failure(process: QemuProcess, saved: Incoming | None) -> UtilityVMError:
    """Why QEMU ended, in its own words."""
    lines = console.read(process.folder)[-_LAST_WORDS:].decode(errors="replace").splitlines()
    lines = [clean_text(line, _LONGEST_LINE) for line in lines]
    said = [line.partition(": ")[2] or line for line in lines if line.strip()]
    last = said[-1] if said else "it said nothing"
    if saved is not None and any("load of migration failed" in line for line in said):
        return incoming.not_taken("; ".join(said[-2:]), vm=process.name)
    remedy = next((remedy for part, remedy in _REMEDIES if part in last), "run `uvm doctor`, and mend what it names")
    return SetupError(f"QEMU did not start VM {process.name}: {last}", vm=process.name, remedy=remedy)


def _watch(pid: int, started: str) -> Watch | None:
    try:
        return Watch(pid, started)
    except VMGone:
        return None


def is_proven(process: QemuProcess) -> bool:
    """Is the process of that pid the one that was recorded? By what it cannot change: its start, and its user."""
    return process.is_running() and process.uid in privileges.user_ids_of(f"/proc/{process.pid}")


def _make_folder(folder: Path, vm: str) -> None:
    try:
        runtime.make(folder)
        with runtime.entered(folder) as here:
            here.chmod(0o700)
    except OSError as error:
        raise SetupError(
            f"cannot make the runtime folder {folder}: {error.strerror}",
            vm=vm,
            remedy="set UTILITYVM_RUNTIME_DIR to a folder that you may write to",
        ) from error


def check_unused(folder: Path, vm: str) -> None:
    """Sockets that nobody listens at are left from a VM that ended; a VM that runs is not pushed out of its folder.

    Raises:
        VMExists: a VM runs there.
        SetupError: it cannot be told.
    """
    if _somebody_listens(folder / QMP_SOCKETS[1]):
        raise VMExists(f"a VM runs in {folder}", vm=vm, remedy="stop it first, or start this one under another name")


def _somebody_listens(path: Path) -> bool:
    try:
        with socket.socket(socket.AF_UNIX) as sock, runtime.socket_in(path) as here:
            sock.setblocking(False)
            sock.connect(str(here))
    except BlockingIOError:
        return True  # somebody is there, and is busy
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        return False
    except OSError as error:
        if error.errno is None or error.errno == errno.ENXIO:
            return False  # a path that no socket can have, or a link to one that is gone
        raise oserrors.as_ours(error, f"cannot tell whether somebody listens at {path}") from error
    return True


@dataclass(slots=True)
class _Boot:
    """What QEMU boots from, open; and the program that starts it."""

    closing: ExitStack
    setpriv: Path
    jail: Sequence[str]  # the beginning of bubblewrap's words, where there is a jail
    kernel: Inside | None
    initramfs: Inside | None
    root: int | None

    def close(self) -> None:
        self.closing.close()


def _open_boot(config: QemuConfig, program: Emulator, who: Identity, walls: Walls) -> _Boot:
    """Blocks for as long as the storage of the guest image does."""
    with ExitStack() as opened:
        setpriv = find_program("setpriv", package="util-linux")
        return _Boot(
            setpriv=setpriv,
            jail=confinement.prepare(program, setpriv) if walls.is_jail else (),
            kernel=_named(who, walls, config.kernel, confinement.KERNEL, opened),
            initramfs=_named(who, walls, config.initramfs, confinement.INITRAMFS, opened),
            root=_open(config.root, opened),
            closing=opened.pop_all(),
        )


@dataclass(slots=True)
class _Ports:
    """The ends in the runtime folder of what goes in and out of QEMU."""

    closing: ExitStack
    qmp: tuple[int, int]
    agent: int
    log: int
    log_pid: int

    def close(self) -> None:
        self.closing.close()

    def abandon(self) -> None:
        """Nobody came for them. See the log's writer end, which they end: it makes its file only as it begins."""
        self.close()
        ends = time.monotonic() + _END_S
        with suppress(ChildProcessError):
            while os.waitpid(self.log_pid, os.WNOHANG) == (0, 0) and time.monotonic() < ends:
                time.sleep(_LOOK_AGAIN_S)


def _open_ports(folder: Path) -> _Ports:
    with ExitStack() as opened:
        qmp0, qmp1, agent = (_listen(folder / name, opened) for name in (*QMP_SOCKETS, AGENT_SOCKET))
        kept = []
        for name in (*QMP_SOCKETS, AGENT_SOCKET):
            with runtime.socket_in(folder / name) as path:
                kept.append(os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC))
            opened.callback(os.close, kept[-1])
        log_pid, log = console.start_writer(folder, keeps=kept)
        opened.callback(os.close, log)
        return _Ports(qmp=(qmp0, qmp1), agent=agent, log=log, log_pid=log_pid, closing=opened.pop_all())


def _listen(path: Path, opened: ExitStack) -> int:
    """A listening socket at `path`, in place of what an earlier VM left there."""
    sock = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
    with runtime.entered(path.parent) as here:  # by which its path may also be longer than a socket's
        (here / path.name).unlink(missing_ok=True)
        sock.bind(str(here / path.name))
        (here / path.name).chmod(0o600)
    sock.listen(1)
    return sock.fileno()


def _open(path: Path | None, opened: ExitStack) -> int | None:
    if path is None:
        return None
    try:
        descriptor = hostpath.open_file(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise SetupError(
            f"cannot open {path}: {error.strerror}", host_path=path, remedy="build the guest image: uvm image build"
        ) from error
    opened.callback(os.close, descriptor)
    return descriptor


def _named(who: Identity, walls: Walls, path: Path | None, inside: str, opened: ExitStack) -> Inside | None:
    """A file that QEMU opens by name: it takes no descriptor of a kernel. Its user may have no right to read it."""
    descriptor = _open(path, opened)
    if descriptor is None:
        return None
    is_readable = not who.drops or bool(os.fstat(descriptor).st_mode & stat.S_IROTH)
    if walls.is_jail:
        return Inside(descriptor, inside, is_copied=not is_readable)
    if not is_readable:
        copy = os.memfd_create("utilityvm-boot", os.MFD_CLOEXEC)
        opened.callback(os.close, copy)
        while os.sendfile(copy, descriptor, None, _COPY):
            pass
        descriptor = copy
    return Inside(descriptor, f"/proc/self/fd/{descriptor}")


def _memory(walls: Walls, saved: Incoming, program: Emulator) -> Inside:
    """The file of a template's memory, which a clone maps privately."""
    if walls.is_jail and not incoming.needs_writable_memory(program.version):
        return Inside(saved.memory, confinement.MEMORY)
    return Inside(saved.memory, f"/proc/self/fd/{saved.memory}")
