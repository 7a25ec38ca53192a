"""The client of the server: the verbs of a VM from any number of processes at the same time.

::

    async with utilityvm.connect() as client:
        vm = await client.vm("worker")
        async with vm.add_scsi("tools.vhdx", "/tools", read_only=True):
            result = await vm.run(["ls", "/tools"])

`remote` has the verbs; `api` has a method for each call of the server; `wire` speaks HTTP/1.1 over the server's socket;
`starting` finds the server, or starts one. A request whose answer was lost is sent
again, to the next server if need be: each has an id by which what it did is found.

It needs the extra `utilityvm[client]`, and `[server]` where it is to start the server.
"""
