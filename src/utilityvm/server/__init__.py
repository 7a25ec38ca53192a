"""The server: one process owns the VMs that outlive commands, and any number of clients use them at the same time.

A VM has one owner (store/ownership.py). A command that owned a VM itself would keep every other command waiting until
it ends. So the commands are clients of one process, which owns the VM on their behalf:

* `types` and `problems` are what goes over the wire: the client reads them too, and they need msgspec alone;
* `routes` is the one table of calls, from which requests are dispatched and `openapi` is made;
* `keeper` takes VMs over when they are asked for, and lets go of one as soon as nobody uses it and another process
  waits for it. So `UtilityVM.open` in a process of its own works as it does without a server;
* `programs` are the programs that clients run;
* `app` is the ASGI application; `listening` serves it by uvicorn and says who may speak to it;
* `run` is the process: the lock that makes it the only one, its socket, its end.

The server may die at any time. What is attached is in the VMs' journals, and each reservation has an id that its client
made: the next server takes the VMs over, and the client asks again with the same id.

It needs the extra `utilityvm[server]`.
"""
