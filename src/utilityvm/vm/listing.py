"""The VMs of this user, for readers that do not own them: from the store and /proc alone.

These functions read files and block for some milliseconds. In an event loop, call them by `asyncio.to_thread`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from utilityvm.errors import NotAttached, StoreError, VMNotRunning
from utilityvm.machine import paths
from utilityvm.machine.hostpath import HostPath, identity_of
from utilityvm.machine.names import check_text
from utilityvm.machine.oserrors import typed
from utilityvm.store import SqliteJournal, Store, StoredVM, VMState
from utilityvm.store.catalog import is_plain
from utilityvm.store.ownership import Owner, owner_of
from utilityvm.store.recover import open_store
from utilityvm.store.view import DiskInfo, slots


@dataclass(frozen=True, slots=True, kw_only=True)
class VMInfo:
    """A VM as it was when asked. What its record does not say, because it is damaged, is None."""

    name: str
    uuid: str
    state: VMState
    pid: int | None  # of its QEMU; None: it does not run
    memory_mib: int | None
    cpus: int | None
    keep: bool | None
    accelerator: str | None
    template: str | None  # that it is a clone of
    disks: tuple[DiskInfo, ...] | None  # None: its journal cannot be read
    owner: Owner | None
    created: float  # seconds since the epoch
    walls: tuple[str, ...] = ()  # the layers between its QEMU and this machine
    without: Mapping[str, str] = field(default_factory=dict, hash=False)  # those that it has not, and why


@typed
def list_vms() -> list[VMInfo]:
    """Every VM of this user, in the order of their names; also dead and damaged ones.

    Raises:
        StoreError, SetupError: the store cannot be read.
    """
    with open_store() as store:
        return [_info(store, vm) for vm in store.vms()]


@typed
def get_vm(name: str) -> VMInfo:
    """The VM of that name.

    Raises:
        VMNotFound: there is none.
        StoreError, SetupError: the store cannot be read.
    """
    check_text("VM", name)
    with open_store() as store:
        return _info(store, store.get(name))


@typed
def list_disks(name: str) -> list[DiskInfo]:
    """The disks of a VM that runs, in the order of slots; the VM's own root disk is not among them.

    Raises:
        VMNotFound, VMNotRunning: there is no such VM, or it has ended.
        StoreError, SetupError: the store, or the VM's journal in it, cannot be read.
    """
    check_text("VM", name)
    with open_store() as store:
        vm = store.get(name)
        if not vm.is_alive():
            raise VMNotRunning(
                f"VM {name} is {vm.seen_state}: its QEMU does not run",
                vm=name,
                remedy=f"see why: uvm log {name}; clear it away: uvm stop {name}",
            )
        return slots(SqliteJournal(store, vm).read())


@typed
def get_disk(name: str, disk: HostPath) -> DiskInfo:
    """The disk of a VM that runs, by any of its names: see `UtilityVM.find_scsi`.

    Raises:
        NotAttached: no disk has that name.
        InvalidRequest: it is a path of one disk's image, and the guest path of another.
        others: as `list_disks`.
    """
    from utilityvm.vm import naming

    rows = list_disks(name)
    try:
        return naming.find(rows, disk, identity_of(disk), aliases={}, vm=name)[0]
    except NotAttached:
        if (aliases := _aliases(name)) is None:
            raise
    return naming.find(rows, disk, None, aliases=aliases, vm=name)[0]


def _aliases(name: str) -> dict[str, str] | None:
    from utilityvm.templates import catalog  # late: most VMs are no clones
    from utilityvm.vm import naming

    with open_store() as store:
        vm = store.get(name)
    template = catalog.parent_of(vm.config)
    return None if template is None else naming.template_paths(template, vm.uuid)


@typed
def read_console(name: str) -> str:
    """The end of the VM's console and of QEMU's own messages: at least the last 512 KiB. Also of a VM that died.

    Raises:
        VMNotFound: there is no VM of that name.
    """
    check_text("VM", name)
    from utilityvm.hosts.qemu import console  # late: it loads all of the host's side

    with open_store() as store:
        store.get(name)
    return console.read(paths.vm_dir(name)).decode(errors="replace")


def _info(store: Store, vm: StoredVM) -> VMInfo:
    owner = owner_of(paths.vm_dir(vm.name), vm.owner) if is_plain(vm.name) else None
    clone = vm.config.get("clone")
    try:
        disks = tuple(slots(SqliteJournal(store, vm).read()))
    except StoreError:
        disks = None
    return VMInfo(
        name=vm.name,
        uuid=vm.uuid,
        state=_state(vm, owner),
        pid=vm.pid if vm.is_alive() else None,
        memory_mib=vm.config.get("memory_mib"),
        cpus=vm.config.get("cpus"),
        keep=vm.config.get("keep"),
        accelerator=vm.process.get("accelerator") if vm.process else None,
        template=clone.get("template") if isinstance(clone, dict) else None,
        disks=disks,
        owner=owner,
        created=vm.created,
        walls=tuple((vm.process or {}).get("walls", ())),
        without=dict((vm.process or {}).get("without", {})),
    )


def _state(vm: StoredVM, owner: Owner | None) -> VMState:
    """The state as it is: a VM that was being started or stopped by a process that died is dead."""
    is_left = vm.state in (VMState.STARTING, VMState.STOPPING) and owner is None and not vm.is_alive()
    return VMState.DEAD if is_left else vm.seen_state
