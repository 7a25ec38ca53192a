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

    def shell(self, script: str) -> str:
        pid = self.command("guest-exec", path="/bin/sh", arg=["-c", script], **{"capture-output": True})["pid"]
        while not (status := self.command("guest-exec-status", pid=pid))["exited"]:
            pass  # each round is a call that takes its time
        if status["exitcode"]:
            raise RuntimeError(base64.b64decode(status.get("err-data", "")).decode())
        return base64.b64decode(status.get("out-data", "")).decode()

    def mount(self, lun: int, path: str) -> None:
        self.shell(
            f"until d=$(echo /sys/bus/pci/devices/0000:00:10.0/virtio*/host*/target*/*:0:0:{lun}/block/sd*) &&"
            f" [ -e $d ]; do :; done; mkdir -p {path}; until mount -o ro /dev/${{d##*/}} {path} 2>/dev/null; do :; done"
        )

    def unmount_and_eject(self, lun: int, path: str) -> None:
        self.shell(
            f"umount {path} && d=$(echo /sys/bus/pci/devices/0000:00:10.0/virtio*/host*/target*/*:0:0:{lun})"
            " && echo 1 > $d/delete"
        )


def timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
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
    for disk in job["one"]:
        xml = disk_xml(disk, 2, read_only=True)
        attach.append(timed(lambda xml=xml: domain.attachDevice(xml)))
        mount.append(timed(lambda: guest.mount(2, "/mnt/one")))
        release_guest.append(timed(lambda: guest.unmount_and_eject(2, "/mnt/one")))
        detach.append(timed(lambda xml=xml: domain.detachDevice(xml)))
        while "sdac" in domain.XMLDesc():  # detachDevice may return before the device is gone
            time.sleep(0.001)
    numbered = list(enumerate(job["many"], start=2))

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
