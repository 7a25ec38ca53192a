"""Runs inside the VM, as its init and only service. Standard library only.

`serve` answers the bridge; `disks` keeps the table of mounts; `find_disk`, `mounting` and `dm` do the work on the kernel.
"""
