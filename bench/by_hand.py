"""The baseline: what a careful person writes by hand. Raw QMP and raw bridge frames over blocking sockets.

It checks nothing, shares nothing and remembers nothing; it is the floor that the machine itself sets.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ZERO = "00000000-0000-0000-0000-000000000000"
NEGOTIATE, MODIFY = 0x10100B01, 0x10100A01
FIRST_CONTROLLER = 0x10


class HandQmp:
    """QMP, one command after the other, and the events that came in between."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")
        self._file.readline()
        self.gone: set[str] = set()
        self.execute("qmp_capabilities")

    def send(self, command: str, **arguments: Any) -> None:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")

    def _read(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._file.readline())
        if message.get("event") == "DEVICE_DELETED" and "device" in message["data"]:
            self.gone.add(message["data"]["device"])
        return message

    def answer(self) -> Any:
        while True:
            message = self._read()
            if "error" in message:
                raise RuntimeError(message["error"]["desc"])
            if "return" in message:
                return message["return"]

    def execute(self, command: str, **arguments: Any) -> Any:
        self.send(command, **arguments)
        return self.answer()

    def wait_gone(self, devices: Sequence[str]) -> None:
        while not self.gone.issuperset(devices):
            self._read()

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class HandBridge:
    """GCS frames, one request after the other."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._next = 0

    def negotiate(self, *, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        request = {"ContainerId": "", "ActivityId": ZERO, "MinimumVersion": 4, "MaximumVersion": 4}
        while True:  # the port drops what is sent before the guest has opened it
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(str(self._path))
            self._socket.settimeout(0.5)
            try:
                self.request(NEGOTIATE, request)
            except TimeoutError:
                self._socket.close()
                if time.monotonic() > deadline:
                    raise
            else:
                self._socket.settimeout(None)
                return

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise EOFError("the guest hung up")
            data += part
        return data

    def request(self, kind: int, body: dict[str, Any]) -> dict[str, Any]:
        payload = json.dumps(body, separators=(",", ":")).encode() + b"\n"
        self._socket.sendall(struct.pack("<IIQ", kind, 16 + len(payload), self._next) + payload)
        while True:
            _, size, number = struct.unpack("<IIQ", self._exactly(16))
            answer: dict[str, Any] = json.loads(self._exactly(size - 16))
            if number == self._next:
                break
        self._next += 1
        if answer["Result"]:
            raise RuntimeError(answer.get("ErrorMessage", answer))
        return answer

    def modify(self, request_type: str, resource: str, **settings: Any) -> None:
        request = {"RequestType": request_type, "ResourceType": resource, "Settings": settings}
        self.request(MODIFY, {"ContainerId": ZERO, "ActivityId": ZERO, "Request": request})

    def send_raw(self, frame: bytes) -> None:
        """Send a frame that somebody else made, and read one frame of whatever comes back."""
        self._socket.sendall(frame)
        _, size, _ = struct.unpack("<IIQ", self._exactly(16))
        self._exactly(size - 16)

    def close(self) -> None:
        self._socket.close()


class HandVM:
    """A VM started with a command line of one's own, and disks by path."""

    def __init__(
        self,
        *,
        folder: Path,
        kernel: Path,
        initramfs: Path,
        root: Path,
        cmdline: str,
        memory_mib: int,
        machine: str,
        accelerator: str,
    ) -> None:
        controllers = [f"0000:00:{FIRST_CONTROLLER + i:02x}.0" for i in range(4)]
        # fmt: off
        command = [
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none",
            "-machine", machine, "-accel", accelerator,
            "-m", str(memory_mib), "-smp", "1",
            "-kernel", str(kernel), "-initrd", str(initramfs),
            "-append", f"{cmdline} utilityvm.scsi={','.join(controllers)}",
            "-qmp", f"unix:{folder}/hand-qmp.sock,server=on,wait=off",
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=agent,path={folder}/hand-agent.sock,server=on,wait=off",
            "-device", "virtserialport,chardev=agent,name=org.utilityvm.bridge",
            "-serial", f"file:{folder}/hand-console.log",
        ]
        # fmt: on
        for number in range(4):
            command += ["-device", f"virtio-scsi-pci,id=scsi{number},bus=pcie.0,addr={FIRST_CONTROLLER + number:#x}"]
        command += [
            "-blockdev",
            f"raw,node-name=root,read-only=on,file.driver=file,file.filename={root},file.read-only=on",
        ]
        command += ["-device", "scsi-hd,bus=scsi0.0,channel=0,scsi-id=0,lun=0,drive=root,serial=utilityvm-root"]
        self._started = time.perf_counter()
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self._generation = 0
        try:
            while not (folder / "hand-agent.sock").exists():
                if self.process.poll() is not None:
                    raise RuntimeError("QEMU did not start")
                time.sleep(0.002)
            self.qmp = HandQmp(folder / "hand-qmp.sock")
            self.bridge = HandBridge(folder / "hand-agent.sock")
            self.bridge.negotiate(timeout_s=60)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        self.boot_s = time.perf_counter() - self._started

    def attach(self, path: Path, lun: int, *, file_format: str, read_only: bool) -> str:
        self._generation += 1
        device = f"hand{self._generation}"
        self.qmp.execute(
            "blockdev-add",
            **{
                "driver": file_format,
                "node-name": f"n{device}",
                "read-only": read_only,
                "file": {"driver": "file", "filename": os.fspath(path), "read-only": read_only},
            },
        )
        self.qmp.execute(
            "device_add",
            **{
                "driver": "scsi-hd",
                "id": device,
                "bus": "scsi0.0",
                "channel": 0,
                "scsi-id": 0,
                "lun": lun,
                "drive": f"n{device}",
            },
        )
        return device

    def mount(self, lun: int, guest_path: str, *, read_only: bool) -> None:
        settings: dict[str, Any] = {"MountPath": guest_path, "Lun": lun}
        self.bridge.modify("Add", "MappedVirtualDisk", **settings, **({"ReadOnly": True} if read_only else {}))

    def unmount_and_eject(self, lun: int, guest_path: str) -> None:
        self.bridge.modify("Remove", "MappedVirtualDisk", MountPath=guest_path, Lun=lun)
        self.bridge.modify("Remove", "SCSIDevice", Lun=lun)

    def detach(self, devices: Sequence[str]) -> None:
        for device in devices:
            self.qmp.execute("device_del", id=device)
        self.qmp.wait_gone(devices)
        for device in devices:
            self.qmp.execute("blockdev-del", **{"node-name": f"n{device}"})

    def stop(self) -> None:
        self.bridge.close()
        self.qmp.close()
        self.process.kill()
        self.process.wait()
