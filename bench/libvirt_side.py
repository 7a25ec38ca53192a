"""The same work through libvirt and qemu-guest-agent. Runs under the system's Python, which has the bindings.

Reads one JSON object from standard input (see `Job`) and writes one with the times. The VM is the same kernel,
initramfs and root disk as the others'; qemu-guest-agent and its libraries come on a disk of their own, which our agent
mounts and starts. From then on our agent does nothing.
"""

from __future__ import annotations

import base64
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import libvirt
import libvirt_qemu

from by_hand import HandBridge


class Disk(TypedDict):
    path: str
    format: str


class Job(TypedDict):
    folder: str
    kernel: str
    initramfs: str
    root: str
    cmdline: str
    memory_mib: int
    accelerator: str
    qga_disk: str
    qga_start: str  # a frame in hex: our agent's message that starts qemu-ga
    one: list[Disk]
    many: list[Disk]


def domain_xml(job: Job) -> str:
    kind = "kvm" if job["accelerator"] == "kvm" else "qemu"
    controllers = "".join(
        f"<controller type='scsi' model='virtio-scsi' index='{i}'>"
        f"<address type='pci' domain='0' bus='0' slot='{0x10 + i:#x}' function='0'/></controller>"
        for i in range(4)
    )
    addresses = ",".join(f"0000:00:{0x10 + i:02x}.0" for i in range(4))
    return f"""
<domain type='{kind}'>
  <name>utilityvm-bench</name>
  <memory unit='MiB'>{job["memory_mib"]}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{job["kernel"]}</kernel>
    <initrd>{job["initramfs"]}</initrd>
    <cmdline>{job["cmdline"]} utilityvm.scsi={addresses}</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    {controllers}
    {disk_xml({"path": job["root"], "format": "raw"}, 0, read_only=True)}
    {disk_xml({"path": job["qga_disk"], "format": "raw"}, 1, read_only=True)}
    <channel type='unix'>
      <source mode='bind' path='{job["folder"]}/bridge.sock'/>
      <target type='virtio' name='org.utilityvm.bridge'/>
    </channel>
    <channel type='unix'>
      <source mode='bind' path='{job["folder"]}/qga.sock'/>
      <target type='virtio' name='org.qemu.guest_agent.0'/>
    </channel>
    <serial type='file'><source path='{job["folder"]}/libvirt-console.log'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>"""


def disk_xml(disk: Disk, lun: int, *, read_only: bool) -> str:
    # A target name is libvirt's own book-keeping; the guest sees the address.
    letters = chr(97 + lun // 26) + chr(97 + lun % 26)
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='{disk['format']}'/><source file='{disk['path']}'/>"
        f"<target dev='sd{letters}' bus='scsi'/>{'<readonly/>' if read_only else ''}"
        f"<address type='drive' controller='0' bus='0' target='0' unit='{lun}'/></disk>"
    )


class Guest:
    """qemu-guest-agent through libvirt."""

    def __init__(self, domain: Any) -> None:
        self._domain = domain

    def command(self, execute: str, **arguments: Any) -> Any:
        text = json.dumps({"execute": execute, "arguments": arguments})
        return json.loads(libvirt_qemu.qemuAgentCommand(self._domain, text, 30, 0))["return"]

    def execute(self, *words: str) -> bool:
        """Run a program to its end; did it end well?"""
        pid = self.command("guest-exec", path=words[0], arg=list(words[1:]), **{"capture-output": True})["pid"]
        while not (status := self.command("guest-exec-status", pid=pid))["exited"]:
            pass  # each round is a call that takes its time
        return bool(status["exitcode"] == 0)

    def mount(self, lun: int, path: str) -> None:
        """Mount by the name that the kernel gives the disk: they come in order here, which nobody promises."""
        while not self.execute("/bin/mount", "-o", "ro", f"/dev/{disk_name(lun)}", path):
            pass  # it has not come yet

    def unmount_and_eject(self, lun: int, path: str) -> None:
        if not self.execute("/bin/umount", path):
            raise RuntimeError(f"umount {path} failed")
        handle = self.command("guest-file-open", path=f"/sys/block/{disk_name(lun)}/device/delete", mode="w")
        self.command("guest-file-write", handle=handle, **{"buf-b64": base64.b64encode(b"1").decode()})
        self.command("guest-file-close", handle=handle)


def disk_name(lun: int) -> str:
    """The kernel's name of the disk at `lun`, when they were attached in order: sda, sdb, ... sdz, sdaa, ..."""
    first, second = divmod(lun, 26)
    return "sd" + (chr(96 + first) if first else "") + chr(97 + second)


def timed(work: Callable[..., object], *arguments: object) -> float:
    begun = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - begun


def main() -> None:
    job: Job = json.load(sys.stdin)
    connection = libvirt.open("qemu:///system")
    domain = connection.createXML(domain_xml(job), 0)
    try:
        bridge = HandBridge(Path(job["folder"], "bridge.sock"))
        bridge.negotiate(timeout_s=60)
        bridge.modify("Add", "MappedVirtualDisk", MountPath="/qga", Lun=1, ReadOnly=True)
        bridge.send_raw(bytes.fromhex(job["qga_start"]))
        guest = Guest(domain)
        deadline = time.monotonic() + 60
        while True:
            try:
                guest.command("guest-ping")
                break
            except libvirt.libvirtError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        print(json.dumps(measure(domain, guest, job)))
    finally:
        domain.destroy()
        connection.close()


def measure(domain: Any, guest: Guest, job: Job) -> dict[str, float]:
    attach, mount, release_guest, detach = [], [], [], []
    guest.execute("/bin/mkdir", "-p", "/mnt/one")
    for disk in job["one"]:
        xml = disk_xml(disk, 2, read_only=True)
        attach.append(timed(domain.attachDevice, xml))
        mount.append(timed(guest.mount, 2, "/mnt/one"))
        release_guest.append(timed(guest.unmount_and_eject, 2, "/mnt/one"))
        detach.append(timed(domain.detachDevice, xml))
        while "sdac" in domain.XMLDesc():  # detachDevice may return before the device is gone
            time.sleep(0.001)
    numbered = list(enumerate(job["many"], start=2))
    guest.execute("/bin/mkdir", "-p", *(f"/mnt/{lun}" for lun, _ in numbered))

    def attach_many() -> None:
        for lun, disk in numbered:
            domain.attachDevice(disk_xml(disk, lun, read_only=True))

    def mount_many() -> None:
        for lun, _ in numbered:
            guest.mount(lun, f"/mnt/{lun}")

    def unmount_many() -> None:
        for lun, _ in numbered:
            guest.unmount_and_eject(lun, f"/mnt/{lun}")

    def detach_many() -> None:
        for lun, disk in numbered:
            domain.detachDevice(disk_xml(disk, lun, read_only=True))

    return {
        "attach": statistics.median(attach),
        "mount": statistics.median(mount),
        "unmount_eject": statistics.median(release_guest),
        "detach": statistics.median(detach),
        "attach_many": timed(attach_many),
        "mount_many": timed(mount_many),
        "unmount_many": timed(unmount_many),
        "detach_many": timed(detach_many),
    }


if __name__ == "__main__":
    main()
