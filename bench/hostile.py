"""A guest's agent that answers at random, for minutes: what it costs its owner, and a real VM beside it.

`./dev hostile [MINUTES]` (10 unless told). It fails if the owner grows by 20 MB, if an error is none of ours, or
if the other VM's agent is not answered. The agents are processes of their own; no VM is needed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import multiprocessing
import os
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Final

from memory import kib
from utilityvm import GENERATED, GuestImage, MountConfig, UtilityVM, UtilityVMError, VMConfig
from utilityvm.agent.serve import VERSION
from utilityvm.bridge import messages
from utilityvm.bridge.frame import Decoder, Frame, encode, guest_json
from utilityvm.guests.bridge_guest import BridgeGuest
from utilityvm.scsi.slot import Slot
from utilityvm.testing.images import ext4_image

MAY_GROW_KIB: Final = 20_000
_SLOT, _PATH, _T = Slot(0, 1), PurePosixPath("/data"), 0.5
_MEMBERS: Final = (
    "Result", "ErrorMessage", "Utilityvm", "MountPaths", "Mounts", "More", "Present", "Agent", "BootId", "Flushed",
    "Process", "Stream", "Data", "ExitCode", "Bytes", "Unclean", "Kernel", "UptimeMs", "Capabilities", "Version",
    "Program", "Programs", "Number", "Id", "At", "OutEnd", "ErrEnd", "Feeds", "TakenAt", "GivenAt",
)  # fmt: skip
_PROGRAM: Final = {
    "Number": 1, "Id": "a", "StartedMs": 1, "RingBytes": 4096, "Argv": ["true"], "OutBegin": 0, "OutEnd": 0,
    "ErrBegin": 0, "ErrEnd": 0, "Stdin": True,
}  # fmt: skip
_ABOUT: Final = {"Agent": VERSION, "Kernel": "6.1", "BootId": "b", "UptimeMs": 1}


def _anything(chance: random.Random, depth: int = 0) -> object:
    kind = chance.randrange(9 if depth < 3 else 6)
    if kind < 6:
        words = "\x1b]0;x\x07" + "y" * chance.randrange(2000)
        return (0, -1, chance.randrange(1 << 70), None, words, chance.choice(["out", "eHg=", "/data", True]))[kind]
    if kind < 8:
        return [_anything(chance, depth + 1) for _ in range(chance.randrange(5))]
    return {chance.choice(_MEMBERS): _anything(chance, depth + 1) for _ in range(chance.randrange(4))}


def _honest(asked: Frame) -> bytes:
    about = {"Result": 0, "Version": 4, "Capabilities": {"Utilityvm": _ABOUT}}
    body = {**about, "ActivityId": asked.body().get("ActivityId")}
    return encode(messages.response_to(asked.kind), asked.id, guest_json(body))


def _answer(chance: random.Random, asked: Frame) -> bytes:
    """Frames, or none, or what is no frame."""
    if asked.kind in (messages.NEGOTIATE, messages.PING) and chance.random() < 0.97:
        return _honest(asked)  # or it would be hung up on before it is asked anything else
    with suppress(ValueError):
        body: Any = {chance.choice(_MEMBERS): _anything(chance) for _ in range(chance.randrange(6))}
        body.setdefault("Result", chance.choice([0, 0, 0, -2147467259]))
        answer = encode(messages.response_to(asked.kind), asked.id, guest_json(body))
        match chance.randrange(12):
            case 0:
                return b""
            case 1:
                return os.urandom(chance.randrange(200))
            case 2:
                return answer * chance.randrange(1, 400)
            case 3:
                told = chance.choice([messages.RUN_OUTPUT, messages.RUN_EXIT, messages.RUN_CREDIT, messages.FOLLOW_END])
                return answer + encode(told, 0, guest_json(body)) * chance.randrange(1, 400)
            case 4 | 5 | 6 if asked.kind in (messages.START, messages.FOLLOW, messages.PROGRAMS, messages.RUN):
                return _of_a_program(chance, asked)
            case _:
                return answer
    return b""


def _of_a_program(chance: random.Random, asked: Frame) -> bytes:
    """It was started, or is there; and then output in pieces of one byte, with gaps or without."""
    told = {"Result": 0, "Program": _PROGRAM, "Programs": [_PROGRAM], "More": chance.random() < 0.5, "Feeds": True}
    about = asked.body()
    number = about.get("Process") or about.get("Follow", {}).get("Process", 1)
    begun = encode(messages.response_to(asked.kind), asked.id, guest_json(told))
    step = chance.randrange(3)
    pieces = [
        guest_json({"Process": number, "Stream": ("out", "err")[at & 1], "Data": "eA==", "At": (at // 2) * step})
        for at in range(chance.randrange(5000))
    ]
    return begun + b"".join(encode(messages.RUN_OUTPUT, 0, piece) for piece in pieces)


def _serve(path: str, seed: int) -> None:
    """A hostile agent at that socket."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(16)

    def talk(connection: socket.socket, chance: random.Random) -> None:
        decoder = Decoder()
        with suppress(OSError):
            while data := connection.recv(65536):
                for frame in decoder.feed(data):
                    if frame.kind & messages.KIND_MASK == messages.REQUEST:
                        connection.sendall(_answer(chance, frame))
                    if chance.random() < 0.02:
                        return connection.close()
        return None

    for number in range(1 << 62):
        chance = random.Random(seed + number)
        threading.Thread(target=talk, args=(listener.accept()[0], chance), daemon=True).start()


_QUESTIONS: Final[tuple[Callable[[BridgeGuest], Awaitable[object]], ...]] = (
    lambda guest: guest.mount(_SLOT, MountConfig(), guest_path=_PATH, timeout_s=_T),
    lambda guest: guest.unmount(_SLOT, MountConfig(), guest_path=_PATH, timeout_s=_T, force=True),
    lambda guest: guest.eject(_SLOT, timeout_s=_T, force=False),
    lambda guest: guest.probe_mount(_SLOT, guest_path=_PATH, timeout_s=_T),
    lambda guest: guest.mounts(timeout_s=_T),
    lambda guest: guest.info(timeout_s=_T),
    lambda guest: guest.quiesce(timeout_s=_T),
    lambda guest: guest.run(["true"], timeout_s=_T),
    lambda guest: guest.kept.list(timeout_s=_T),
    lambda guest: guest.kept.kill(1, timeout_s=_T),
    lambda guest: _keep(guest),
)


async def _keep(guest: BridgeGuest) -> None:
    settings: dict[str, Any] = {"env": None, "cwd": None, "user": None, "limits": None, "name": None, "id": None}
    async with await guest.kept.start(
        ["true"], stdin=True, follow=True, ring_bytes=4096, timeout_s=_T, **settings
    ) as program:
        await program.communicate(b"x" * 10_000, timeout_s=_T)


async def _ask(path: Path, until: float, seen: Counter[str]) -> None:
    """Ask everything that an owner asks, again and again."""
    while time.monotonic() < until:
        guest = None
        try:
            guest = await BridgeGuest.connect(path, timeout_s=_T)
            for ask in _QUESTIONS:
                try:
                    await ask(guest)
                    seen["taken"] += 1
                except UtilityVMError as error:
                    seen[type(error).__name__] += 1
        except UtilityVMError as error:
            seen[type(error).__name__] += 1
        finally:
            if guest is not None:
                await guest.close()


async def _beside(vm: UtilityVM, disk: Path, until: float) -> list[float]:
    """What each round of work with the other VM took, in seconds: attach a disk, read from it, detach it."""
    took = []
    while time.monotonic() < until:
        begun = time.perf_counter()
        async with vm.add_scsi(disk, GENERATED, filesystem="ext4") as mount:
            read = await vm.run(["cat", f"{mount.guest_path}/greeting"], timeout_s=60)
            assert read.stdout == b"hello\n", read
        took.append(time.perf_counter() - begun)
        await asyncio.sleep(0.2)
    return took


async def _held_s(until: float) -> float:
    """The longest that the event loop was held, in time of its thread on a processor: others' work does not count."""
    longest, before = 0.0, time.thread_time()
    while time.monotonic() < until:
        await asyncio.sleep(0.005)
        now = time.thread_time()
        longest, before = max(longest, now - before), now
    return longest


async def _measure(folder: Path, minutes: float) -> dict[str, Any]:
    liar = folder / "liar"
    disk = ext4_image(folder / "disk.raw", {"greeting": "hello\n"})
    seen: Counter[str] = Counter()
    config = VMConfig(name=f"beside-{os.getpid()}", memory_mib=256)
    async with UtilityVM.start(config, image=GuestImage.build()) as vm:
        # Caches and pools come to be.
        begin = time.monotonic() + min(20, minutes * 15)
        await asyncio.gather(_beside(vm, disk, begin), *(_ask(liar, begin, seen) for _ in range(8)))
        seen.clear()
        alone = await _beside(vm, disk, time.monotonic() + min(20, minutes * 15))
        before, until = kib(os.getpid(), "VmRSS"), time.monotonic() + minutes * 60
        async with asyncio.TaskGroup() as tasks:
            working = tasks.create_task(_beside(vm, disk, until))
            held = tasks.create_task(_held_s(until))
            for _ in range(8):
                tasks.create_task(_ask(liar, until, seen))
        beside = working.result()
        grown = kib(os.getpid(), "VmRSS") - before
    return {
        "minutes": minutes,
        "questions": seen.total(),
        "outcomes": dict(seen),
        "grown_kib": grown,
        "rounds_beside": len(beside),
        "round_alone_s": round(statistics.median(alone), 3),
        "round_beside_s": round(statistics.median(beside), 3),
        "longest_beside_s": round(max(beside), 3),
        "loop_held_s": round(held.result(), 3),
    }


class _Said(logging.Handler):
    """What asyncio complains of: nothing of a guest's may make it."""

    lines = 0
    first = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += 1
        self.first = self.first or record.getMessage()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", nargs="?", type=float, default=10.0)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory(prefix="uvm-hostile-") as folder:
        for what in ("STATE", "RUNTIME"):  # nothing of this machine's own VMs is touched
            os.environ[f"UTILITYVM_{what}_DIR"] = f"{folder}/{what.lower()}"
        agent = multiprocessing.get_context("spawn").Process(target=_serve, args=(f"{folder}/liar", 1), daemon=True)
        agent.start()
        while not Path(folder, "liar").exists():
            time.sleep(0.05)
        said = _Said(logging.WARNING)
        logging.getLogger("asyncio").addHandler(said)
        try:
            found = asyncio.run(_measure(Path(folder), minutes))
        finally:
            agent.kill()
            agent.join()
    print(json.dumps({**found, "said_by_asyncio": said.lines, "first": said.first}, indent=1))
    is_right = found["grown_kib"] < MAY_GROW_KIB and found["outcomes"].get("taken") and found["rounds_beside"]
    return 0 if is_right and not said.lines else 1


if __name__ == "__main__":
    sys.exit(main())
