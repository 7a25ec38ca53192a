"""hcsshim's guest agent behind a connection, as its recordings and its code show it: what it serves, and how it fails.

What it does to disks and files is `utilityvm.testing.gcs`. A test drives our host side against it and looks at `harm`,
which must stay empty. Source: tests/vectors/gcs.json.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

from utilityvm.bridge import messages
from utilityvm.bridge.frame import Decoder, Frame, encode, guest_json
from utilityvm.scsi.slot import Slot
from utilityvm.testing.gcs import Content, Failed, Gcs, NoAnswer

# Every member that the real one knows; what is sent beyond them it would not understand.
_KNOWN = {
    "MappedVirtualDisk": [
        "MountPath", "Lun", "Controller", "Partition", "ReadOnly", "Encrypted", "Options", "BlockDev",
        "EnsureFilesystem", "Filesystem",
    ],
    "SCSIDevice": ["Controller", "Lun"],
}  # fmt: skip


class FakeGcs(Gcs):
    """One guest. `attached` is its bus: put slots in and take them out."""

    def __init__(self) -> None:
        self.contents: dict[Slot, Content] = defaultdict(Content)
        super().__init__(lambda slot: self.contents[slot], is_read_only=lambda _: False)
        self.silent = asyncio.Event()  # set: it does what it is told and says nothing
        self.hold_next: asyncio.Event | None = None  # the answer to the next request waits for it, and is overtaken
        self.cut_next = False  # it does the next thing that it is told, and the connection breaks
        self.received: list[Frame] = []
        self.was_negotiated = False
        self.takes_no_negotiate = False
        self.silent_to_negotiates = False

    @property
    def attached(self) -> set[Slot]:
        return self.devices

    @attached.setter
    def attached(self, slots: set[Slot]) -> None:
        self.devices = slots

    def start_again(self) -> None:
        """It died, and a supervisor started it behind the same port: what it had mounted is, and nobody negotiated."""
        self.was_negotiated = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        decoder = Decoder()
        answering: set[asyncio.Task[None]] = set()
        try:
            while data := await reader.read(65536):
                for frame in decoder.feed(data):
                    self.received.append(frame)
                    answer = self._answer(frame)
                    if self.cut_next and frame.kind == messages.MODIFY:
                        self.cut_next = False
                        return
                    if answer and not self.silent.is_set():
                        held, self.hold_next = self.hold_next, None
                        task = asyncio.create_task(self._send(writer, frame, answer, held))
                        answering.add(task)
                        task.add_done_callback(answering.discard)
        except OSError:
            pass
        finally:
            for task in answering:
                task.cancel()
            writer.close()

    async def _send(
        self, writer: asyncio.StreamWriter, frame: Frame, answer: dict[str, Any], held: asyncio.Event | None
    ) -> None:
        """Answer one request, in a thread of its own."""
        if held is not None:
            await held.wait()
        writer.write(encode(messages.response_to(frame.kind), frame.id, guest_json(answer)))

    def _answer(self, frame: Frame) -> dict[str, Any] | None:
        body = frame.body()
        if frame.kind == messages.NEGOTIATE and self.silent_to_negotiates:
            return None
        if frame.kind == messages.NEGOTIATE and not (self.was_negotiated or self.takes_no_negotiate):
            self.was_negotiated = True
            return messages.success(Version=4, Capabilities={"RuntimeOsType": "linux"})
        if frame.kind != messages.MODIFY or not self.was_negotiated:
            what = "ComputeSystemModifySettingsV1" if frame.kind == messages.MODIFY else f"{frame.kind:#x}"
            text = f"HRESULT 0x80004001: bridge: function not supported, header type: {what}"
            return messages.failure(messages.E_NOT_IMPLEMENTED, text)
        request = body["Request"]
        settings = request["Settings"]
        known = _KNOWN[request["ResourceType"]]
        if list(body) != ["ContainerId", "ActivityId", "Request"] or [n for n in known if n in settings] != [*settings]:
            self.harm.append(f"sent what is no message of GCS: {body}")
        try:
            self.modify(request["RequestType"], request["ResourceType"], settings)
        except NoAnswer:
            return None
        except Failed as error:
            return messages.failure(messages.E_FAIL, str(error))
        return messages.success()
