"""The disks of one VM: who has reserved what, and the steps that make it so.

    manager = ScsiManager(host, guest, journal, controllers=4)
    disk = DiskRequest(host_path="/srv/a.qcow2", read_only=False)
    held = await manager.add(disk, mount=MountConfig(), holder=Holder(name="ci"))
    ...                                 # held.slot, held.guest_path
    await manager.release(held)         # the last release unmounts, ejects and detaches

Entry points, all on `manager.ScsiManager`:

* `add`, `release`, `remove`, `resize`, and `add_many`, `remove_many` for several at once;
* `restore` takes over from an owner that died; `export_state`, `import_state` and `resume` move to another owner;
* `held_still` refuses changes while a save runs; `mark_gone` tells all callers that the VM died.

How it works. Callers enter *claims* in the `book`. Each disk that is not as its claims want it has one `worker`, which
takes `steps` until it is. A step is written to the `ledger` before it is sent, and takes three answers: done, refused,
none. After none, the next step looks. `transitions` has the two tables of states; nothing else changes a state.

    reservation, mount, disk   what is held, and the state of each
    slot                       where a disk sits, and which slots are free
    views, events              what callers see
    document, migration        an exported state, and how another owner takes it up
    ports                      what the room asks of the world: HostBackend, GuestBackend, Journal

What may be retried. Every call may be made again after any error. An `add` that failed is undone. A `release` that was
refused and changed nothing is held as before; one that changed something goes on, when it is called again, with the
step that failed. A disk that could not be settled stays in `slots` until a caller, or `repair`, goes on with it.

The room knows no hypervisor. `hosts`, `guests` and `store` implement its ports, `testing` has fakes of them, and
`tests/contract` holds the fakes and the real ones to the same rules.
"""
