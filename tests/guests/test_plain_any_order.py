"""Any order of requests, refusals, lost answers and breaks with hcsshim's gcs: what it does harm at is never sent."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from pathlib import Path, PurePosixPath

from hypothesis import given, settings
from hypothesis import strategies as st

from fake_gcs import FakeGcs
from utilityvm.errors import UtilityVMError
from utilityvm.guests.bridge_guest import BridgeGuest
from utilityvm.scsi.ports import MountConfig
from utilityvm.scsi.slot import Slot

SLOTS = [Slot(0, 0), Slot(0, 1), Slot(3, 63)]
PATHS = [PurePosixPath(path) for path in ("/run/mounts/a", "/run/mounts/a/below", "/run/mounts/b", "/mnt", "/etc")]
PLAIN = MountConfig()

slots, paths = st.sampled_from(SLOTS), st.sampled_from(PATHS)
STEPS = st.lists(
    st.tuples(st.just("mount"), slots, paths)
    | st.tuples(st.just("unmount"), slots, paths)
    | st.tuples(st.just("eject"), slots, paths)
    | st.tuples(st.just("look"), slots, paths)
    | st.tuples(st.sampled_from(["come", "cut", "refuse", "refuse slowly", "lose", "hear"]), slots, paths),
    min_size=5,
    max_size=25,
)


class VM:
    """A guest, our end of its connection, and a bus whose slots get another disk when the guest let go of theirs."""

    def __init__(self, guest: BridgeGuest, gcs: FakeGcs) -> None:
        self.guest = guest
        self.gcs = gcs
        self.gone: set[Slot] = set()  # the guest said that it let go, so the host took the disk off the bus

    async def take(self, what: str, slot: Slot, path: PurePosixPath) -> None:
        """Take one step, whatever comes of it."""
        timeout_s = 0.005 if self.gcs.silent.is_set() else 20.0
        with contextlib.suppress(UtilityVMError):
            match what:
                case "mount" if slot not in self.gone:
                    await self.guest.mount(slot, PLAIN, guest_path=path, timeout_s=timeout_s)
                case "unmount":
                    await self.guest.unmount(slot, PLAIN, guest_path=path, timeout_s=timeout_s, force=False)
                case "eject":
                    await self.guest.eject(slot, timeout_s=timeout_s, force=False)
                    self.gone.add(slot)
                case "look":
                    if await self.guest.probe_mount(slot, guest_path=path, timeout_s=timeout_s):
                        assert self.gcs.mounts[str(path)] == [slot]
                    if not await self.guest.probe_device(slot, timeout_s=timeout_s):
                        self.gone.add(slot)
                case "come" if slot in self.gone:
                    self.gone.discard(slot)
                    self.gcs.attached.add(slot)
                case "refuse":
                    self.gcs.refuse_next = "mounting: invalid argument"
                case "refuse slowly":
                    self.gcs.refuse_next = "context deadline exceeded"
                case "cut":
                    self.gcs.cut_next = True
                case "lose":
                    self.gcs.silent.set()
                case "hear":
                    self.gcs.silent.clear()
                case _:
                    pass


@settings(max_examples=150)
@given(STEPS)
async def test_gcs_is_never_sent_what_does_harm(steps: list[tuple[str, Slot, PurePosixPath]]) -> None:
    gcs = FakeGcs()
    gcs.attached = set(SLOTS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gcs"
        async with await asyncio.start_unix_server(gcs.serve, path) as server:
            guest = await BridgeGuest.connect(path, timeout_s=20)
            vm = VM(guest, gcs)
            for step in steps:
                await vm.take(*step)
            await guest.close()
            server.close()
            await server.wait_closed()
    assert not gcs.harm, gcs.harm
