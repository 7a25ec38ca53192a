"""A guest's agent that answers at random, for minutes: what it costs its owner, and the VM beside it.

`./dev hostile [MINUTES]` (10 unless told). It fails if the owner grows by 20 MB, if an error is none of ours, or
if the other VM's agent is not answered. The agents are processes of their own; no VM is needed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import socket
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
from utilityvm import MountConfig, UtilityVMError
from utilityvm.bridge import messages
from utilityvm.bridge.frame import Decoder, Frame, encode, guest_json
from utilityvm.guests.bridge_guest import BridgeGuest
from utilityvm.scsi.slot import Slot

MAY_GROW_KIB: Final = 20_000
_SLOT, _PATH, _T = Slot(0, 1), PurePosixPath("/data"), 0.5
_MEMBERS: Final = (
    "Result", "ErrorMessage", "Utilityvm", "MountPaths", "Mounts", "More", "Present", "Agent", "BootId", "Flushed",
    "Process", "Stream", "Data", "ExitCode", "Bytes", "Unclean", "Kernel", "UptimeMs", "Capabilities", "Version",
)  # fmt: skip
_ABOUT: Final = {"Agent": 2, "Kernel": "6.1", "BootId": "b", "UptimeMs": 1}


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
    if asked.kind == messages.NEGOTIATE and chance.random() < 0.97:
        return _honest(asked)
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
                told = chance.choice([messages.RUN_OUTPUT, messages.RUN_EXIT])
                return answer + encode(told, 0, guest_json(body)) * chance.randrange(1, 400)
            case _:
                return answer
    return b""


def _serve(path: str, seed: int | None) -> None:
    """An agent at that socket; without a seed an honest one."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(16)

    def talk(connection: socket.socket, chance: random.Random) -> None:
        decoder = Decoder()
        with suppress(OSError):
            while data := connection.recv(65536):
                for frame in decoder.feed(data):
                    if seed is not None:
                        connection.sendall(_answer(chance, frame))
                        if chance.random() < 0.02:
                            return connection.close()
                    elif frame.kind & messages.KIND_MASK == messages.REQUEST:
                        connection.sendall(_honest(frame))
        return None

    for number in range(1 << 62):
        chance = random.Random(None if seed is None else seed + number)
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
)


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


async def _beside(path: Path, until: float) -> float:
    """The longest that the other VM's agent took to be heard, in seconds."""
    guest, longest = await BridgeGuest.connect(path, timeout_s=30), 0.0
    while time.monotonic() < until:
        begun = time.perf_counter()
        await guest.ping(timeout_s=30)
        longest = max(longest, time.perf_counter() - begun)
        await asyncio.sleep(0.05)
    await guest.close()
    return longest


async def _measure(folder: Path, minutes: float) -> dict[str, Any]:
    paths = [folder / name for name in ("liar", "honest")]
    seen: Counter[str] = Counter()
    await _ask(paths[0], time.monotonic() + min(20, minutes * 15), seen)  # caches and pools come to be
    seen.clear()
    before, until = kib(os.getpid(), "VmRSS"), time.monotonic() + minutes * 60
    longest, *_ = await asyncio.gather(_beside(paths[1], until), *(_ask(paths[0], until, seen) for _ in range(8)))
    grown = kib(os.getpid(), "VmRSS") - before
    return {
        "minutes": minutes,
        "questions": seen.total(),
        "outcomes": dict(seen),
        "grown_kib": grown,
        "beside_s": longest,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", nargs="?", type=float, default=10.0)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory(prefix="uvm-hostile-") as folder:
        agents = [
            multiprocessing.get_context("spawn").Process(target=_serve, args=(f"{folder}/{name}", seed), daemon=True)
            for name, seed in (("liar", 1), ("honest", None))
        ]
        for agent in agents:
            agent.start()
        while not all(Path(folder, name).exists() for name in ("liar", "honest")):
            time.sleep(0.05)
        found = asyncio.run(_measure(Path(folder), minutes))
        for agent in agents:
            agent.kill()
            agent.join()
    print(json.dumps(found, indent=1))
    return 0 if found["grown_kib"] < MAY_GROW_KIB and found["questions"] else 1


if __name__ == "__main__":
    sys.exit(main())
