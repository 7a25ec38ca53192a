"""How large a VM's disks are to its guest, and how they grow.

QEMU asks for the size of a file when it opens it, and then remembers that. If another program makes the file larger,
`block_resize` to a size between the two would cut it. So a disk is never set to less than QEMU's size or its file's.

Source: QEMU block.c, bdrv_co_nb_sectors; block/file-posix.c, raw_co_truncate.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, cast

from utilityvm.diskimage import headers
from utilityvm.errors import (
    DeadlineExceeded,
    HostRefused,
    InvalidRequest,
    NotAttached,
    NotSupported,
    UtilityVMError,
)
from utilityvm.hosts.qemu import blockdev
from utilityvm.hosts.qemu.launch import QemuProcess
from utilityvm.hosts.qemu.qmp import Qmp, QmpRefused
from utilityvm.machine.threads import in_thread
from utilityvm.scsi.ports import SECTOR_SIZES, DiskFormat
from utilityvm.scsi.slot import Slot

_RESIZABLE: Final = {"file": DiskFormat.RAW, "qcow2": DiskFormat.QCOW2}  # by driver


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownDevice:
    """What the guest sees of a disk."""

    serial: str
    size_bytes: int
    logical_block_bytes: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of the disks of one QEMU. `numbers`, by attachment, is its host's, which changes it."""

    qmp: Qmp
    process: QemuProcess
    numbers: Mapping[str, int]

    async def grow(self, slot: Slot, *, attachment: str, size_bytes: int, timeout_s: float) -> int:
        """See `QemuHost.resize`."""
        number = self._number(slot, attachment)
        sector = await self._sector_bytes(number, timeout_s=timeout_s) if size_bytes % max(SECTOR_SIZES) else 1
        if size_bytes % sector:
            raise InvalidRequest(
                f"{size_bytes} bytes are not whole sectors", slot=slot, remedy=f"use a multiple of {sector}"
            )
        node = await self._node(slot, attachment, timeout_s=timeout_s)
        if node["drv"] not in _RESIZABLE:
            kind = "fixed vpc" if node["drv"] == "raw" else node["drv"]  # see `driver_options`
            raise NotSupported(
                f"QEMU cannot grow a {kind} disk",
                vm=self.process.name,
                slot=slot,
                remedy="convert the image to qcow2 or raw; grow a physical disk by its own tools",
            )
        if node["ro"]:
            raise NotSupported(
                "a read-only disk cannot grow", vm=self.process.name, slot=slot, remedy="attach it writable"
            )
        has_bytes = int(node["image"]["virtual-size"])
        if size_bytes <= has_bytes:
            return has_bytes
        await self._check_file(slot, number, _RESIZABLE[node["drv"]], size_bytes, has_bytes, timeout_s=timeout_s)
        arguments = {"node-name": node["node-name"], "size": size_bytes}
        try:
            await self.qmp.execute("block_resize", arguments, timeout_s=timeout_s)
        except QmpRefused as error:
            raise HostRefused(
                f"block_resize at {slot}: {error.description}", vm=self.process.name, slot=slot
            ) from error
        return size_bytes

    async def of(self, slot: Slot, *, attachment: str, timeout_s: float) -> int:
        """The bytes that QEMU says the guest's device has.

        Raises:
            NotAttached: it is not on the bus.
        """
        node = await self._node(slot, attachment, timeout_s=timeout_s)
        return int(node["image"]["virtual-size"])

    async def all(self, *, timeout_s: float) -> dict[str, int]:
        """The bytes of each disk as the guest sees it, by attachment."""
        blocks = await self.qmp.execute("query-block", timeout_s=timeout_s)
        sizes = {one["node-name"]: one["image"]["virtual-size"] for block in blocks if (one := block.get("inserted"))}
        nodes = {attachment: blockdev.node_name(number) for attachment, number in self.numbers.items()}
        return {attachment: sizes[node] for attachment, node in nodes.items() if node in sizes}

    async def shown(self, *, timeout_s: float) -> dict[str, ShownDevice]:
        """What the guest sees of each disk, by attachment."""
        blocks = await self.qmp.execute("query-block", timeout_s=timeout_s)
        nodes = {inserted["node-name"]: inserted for one in blocks if (inserted := one.get("inserted"))}
        questions = [
            ("qom-get", {"path": f"/machine/peripheral/{blockdev.device_id(number)}", "property": name})
            for number in self.numbers.values()
            for name in ("serial", "logical_block_size")
        ]
        answers = await self.qmp.execute_all(questions, timeout_s=timeout_s)
        for answer in answers:
            if isinstance(answer, QmpRefused):
                raise HostRefused(f"looking at the disks: {answer}", vm=self.process.name) from answer
        return {
            attachment: ShownDevice(
                serial=str(serial),
                size_bytes=nodes[blockdev.node_name(number)]["image"]["virtual-size"],
                logical_block_bytes=cast(int, block) or blockdev.DEFAULT_BLOCK_BYTES,
            )
            for (attachment, number), serial, block in zip(
                self.numbers.items(), answers[::2], answers[1::2], strict=True
            )
        }

    async def _check_file(
        self, slot: Slot, number: int, format: DiskFormat, size_bytes: int, has_bytes: int, *, timeout_s: float
    ) -> None:
        """Refuse a size that would cut what somebody else has made of the file since QEMU opened it.

        Raises:
            HostRefused: says the three sizes; or the file cannot be looked at.
            DeadlineExceeded: its storage did not answer; nothing was sent.
        """
        sets = await self.qmp.execute("query-fdsets", timeout_s=timeout_s)
        fds = [one["fd"] for each in sets if each["fdset-id"] == number for one in each["fds"]]
        try:
            async with asyncio.timeout(timeout_s):
                now_bytes = await in_thread(_file_size, self.process.pid, fds, format)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"the disk's storage did not answer within {timeout_s:g} s", vm=self.process.name, slot=slot
            ) from error
        except (OSError, UtilityVMError) as error:
            raise HostRefused(
                f"the size of the disk's file cannot be read, so growing it could cut it: {error}",
                vm=self.process.name,
                slot=slot,
                remedy="detach the disk, and resize its file with qemu-img",
            ) from error
        if now_bytes > size_bytes:
            raise HostRefused(
                f"the disk was made larger outside of the VM: it has {now_bytes} bytes, the VM sees {has_bytes}, and"
                f" {size_bytes} would cut it",
                vm=self.process.name,
                slot=slot,
                remedy=f"resize it to at least {now_bytes} bytes; or detach it and attach it again",
            )

    async def _node(self, slot: Slot, attachment: str, *, timeout_s: float) -> dict[str, Any]:
        name = blockdev.node_name(self._number(slot, attachment))
        nodes = await self.qmp.execute("query-named-block-nodes", {"flat": True}, timeout_s=timeout_s)
        for node in cast(list[dict[str, Any]], nodes):
            if node["node-name"] == name:
                return node
        raise self._not_attached(slot, attachment)

    def _number(self, slot: Slot, attachment: str) -> int:
        if (number := self.numbers.get(attachment)) is None:
            raise self._not_attached(slot, attachment)
        return number

    def _not_attached(self, slot: Slot, attachment: str) -> NotAttached:
        return NotAttached(f"attachment {attachment} is not on the bus", vm=self.process.name, slot=slot)

    async def _sector_bytes(self, number: int, *, timeout_s: float) -> int:
        question = {"path": f"/machine/peripheral/{blockdev.device_id(number)}", "property": "logical_block_size"}
        return int(await self.qmp.execute("qom-get", question, timeout_s=timeout_s)) or blockdev.DEFAULT_BLOCK_BYTES


def _file_size(pid: int, fds: list[int], format: DiskFormat) -> int:
    """The size of the disk in the file that process `pid` has as one of `fds`, as the file says now. Blocks.

    QEMU's descriptor leads to the file under whatever name it has by now. If the guest has taken QEMU over it may lead
    anywhere, so only a regular file is opened.
    """
    if not fds:
        raise FileNotFoundError("QEMU has no descriptor of it")
    with ExitStack() as stack:
        pinned = os.open(f"/proc/{pid}/fd/{fds[0]}", os.O_PATH | os.O_CLOEXEC)
        stack.callback(os.close, pinned)
        status = os.fstat(pinned)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"descriptor {fds[0]} of process {pid} is no file")
        if format is DiskFormat.RAW:
            return status.st_size
        fd = os.open(f"/proc/self/fd/{pinned}", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        return headers.read(fd, name="the image", expected=format).virtual_size_bytes
