"""hcsshim's guest agent as its recordings and its code show it: what it serves, how it fails, and the harm it does.

A test drives our host side against it and looks at `harm`, which must stay empty. Source: tests/vectors/gcs.json.
"""

from __future__ import annotations

import asyncio
from pathlib import PurePosixPath
from typing import Any

from utilityvm.bridge import messages
from utilityvm.bridge.frame import Decoder, Frame, encode, guest_json

# Every member that the real one knows; what is sent beyond them it would not understand.
_KNOWN = {
    "MappedVirtualDisk": [
        "MountPath", "Lun", "Controller", "Partition", "ReadOnly", "Encrypted", "Options", "BlockDev",
        "EnsureFilesystem", "Filesystem",
    ],
    "SCSIDevice": ["Controller", "Lun"],
}  # fmt: skip


class FakeGcs:
    """One guest. `attached` is its bus: put slots in and take them out."""

    def __init__(self) -> None:
        self.attached: set[tuple[int, int]] = set()
        self.mounts: dict[str, list[tuple[int, int]]] = {}  # the disks stacked at a path
        self.busy: set[str] = set()
        self.silent = asyncio.Event()  # set: it does what it is told and says nothing
        self.refuse_next: str | None = None
        self.cut_next = False  # it does the next thing that it is told, and the connection breaks
        self.harm: list[str] = []
        self.received: list[Frame] = []
        self.was_negotiated = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        decoder = Decoder()
        try:
            while data := await reader.read(65536):
                for frame in decoder.feed(data):
                    self.received.append(frame)
                    answer = self._answer(frame)
                    if self.cut_next and frame.kind == messages.MODIFY:
                        self.cut_next = False
                        return
                    if answer and not self.silent.is_set():
                        writer.write(encode(messages.response_to(frame.kind), frame.id, guest_json(answer)))
        except OSError:
            pass
        finally:
            writer.close()

    def _answer(self, frame: Frame) -> dict[str, Any] | None:
        body = frame.body()
        if frame.kind == messages.NEGOTIATE and not self.was_negotiated:
            self.was_negotiated = True
            return messages.success(Version=4, Capabilities={"RuntimeOsType": "linux"})
        if frame.kind != messages.MODIFY or not self.was_negotiated:
            return messages.failure(messages.E_NOT_IMPLEMENTED, "bridge: function not supported")
        request = body["Request"]
        settings = request["Settings"]
        known = _KNOWN[request["ResourceType"]]
        if list(body) != ["ContainerId", "ActivityId", "Request"] or [n for n in known if n in settings] != [*settings]:
            self.harm.append(f"sent what is no message of GCS: {body}")
        if self.refuse_next:
            text, self.refuse_next = self.refuse_next, None
            if (request["RequestType"], request["ResourceType"]) == ("Add", "MappedVirtualDisk"):
                self._clean_up(PurePosixPath(settings["MountPath"]))
            return messages.failure(messages.E_FAIL, text)
        return self._modify(request["RequestType"], request["ResourceType"], settings)

    def _clean_up(self, path: PurePosixPath) -> None:
        """As after a mount that failed: the path goes, with all that is below it."""
        for other, stack in self.mounts.items():
            if stack and (path in PurePosixPath(other).parents or PurePosixPath(other) in path.parents):
                self.harm.append(f"files of the disk at {other} were deleted, because a mount at {path} failed")
        if len(path.parts) < 3:
            self.harm.append(f"the guest's own {path} was deleted")

    def _modify(self, what: str, resource: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        slot = (settings.get("Controller", 0), settings.get("Lun", 0))
        path = settings.get("MountPath", "")
        if slot[0] > 3:
            self.harm.append("it panics: a controller above 3")
            return None
        if resource == "SCSIDevice":
            if any(slot in stack for stack in self.mounts.values()):
                self.harm.append(f"a mounted disk was ejected: {slot}")
            self.attached.discard(slot)
            return messages.success()
        if slot not in self.attached:
            self.harm.append(f"it waits for ever for the disk at {slot}")
            return None
        stack = self.mounts.setdefault(path, [])
        if what == "Remove":
            if path in self.busy:
                return messages.failure(messages.E_FAIL, f"failed to unmount {path}: device or resource busy")
            del stack[:]
        elif slot in stack:
            self.harm.append(f"every file of the disk at {slot} was deleted")
            return messages.failure(messages.E_FAIL, "mounting: device or resource busy")
        else:
            if stack:
                self.harm.append(f"stacked at {path}")
            stack.append(slot)
        return messages.success()
