"""The QEMU host: start a VM, put disks on its bus and take them off, end it.

::

    host = await QemuHost.start(QemuConfig(name="one", kernel=..., initramfs=..., root=...), folder=runtime / "one")
    disk = await host.open(DiskRequest(host_path="a.qcow2", read_only=False))
    await host.attach(Slot(0, 1), disk, attachment="a1", timeout_s=10)
    disk.close()
    ...
    await host.detach(Slot(0, 1), attachment="a1", timeout_s=10)
    await host.stop()

`host.process` is what a later owner needs for `QemuHost.connect`: keep it (`to_json`). `host.gone` resolves when the VM
dies; every call that waits then raises VMGone at once. A call that raises OutcomeUnknown may have been done: `probe`
tells, and finishes off what is half done. After HostRefused, or any RequestError, the bus is as it was.
"""

from utilityvm.hosts.qemu.accelerator import Accelerator
from utilityvm.hosts.qemu.host import Attachment, QemuHost
from utilityvm.hosts.qemu.launch import QemuConfig, QemuProcess

__all__ = ["Accelerator", "Attachment", "QemuConfig", "QemuHost", "QemuProcess"]
