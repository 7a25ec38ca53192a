"""What this host knows of its VMs, in one SQLite file; it outlives every process that writes to it.

::

    with Store.open() as store:
        vm = store.add("worker", uuid=..., config={...})
        journal = SqliteJournal(store, vm)
        await journal.write([DiskRecord(...)])  # true on return, also if we are killed the next instant
        store.set_process(vm, process, state=VMState.RUNNING)

`database` opens the file, and moves a damaged one aside; `catalog` has the VMs; `journal` has a VM's disks, mounts and
reservations; `ownership` says which process may write for a VM. Every write may be tried again after a StoreError: it
was not done.
"""

from utilityvm.store.catalog import Store, StoredVM, VMState
from utilityvm.store.journal import SqliteJournal

__all__ = ["SqliteJournal", "Store", "StoredVM", "VMState"]
