"""Runs inside the VM, as its init and only service. Standard library only.

`init` prepares the system; `serve` answers the bridge; `run` runs programs; `disks` keeps the table of mounts;
`find_disk`, `mounting` and `dm` do the work on the kernel.
"""
