"""Runs a program at this process's terminal, as `uvm exec -t` does: AT_TERMINAL SOCKET WORDS...

There is no VM: the other end of the socket is an agent. It ends with the program's exit code.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from utilityvm.cli.options import run
from utilityvm.cli.terminal import at_terminal
from utilityvm.errors import UtilityVMError
from utilityvm.guests.bridge_guest import BridgeGuest

SETTINGS = {"cwd": None, "user": None, "limits": None, "name": None, "id": None, "ring_bytes": 1 << 20}


async def main(socket: str, command: list[str]) -> int:
    guest = await BridgeGuest.connect(Path(socket), timeout_s=20, vm="one")

    async def start_program(words: list[str], **how: Any) -> Any:
        return await guest.kept.start(words, stdin=True, follow=True, timeout_s=20, **SETTINGS | how)

    try:
        return await at_terminal(SimpleNamespace(start_program=start_program), command, {"env": {"PS1": "ready> "}})  # type: ignore[arg-type]
    finally:
        await guest.close()


if __name__ == "__main__":
    try:
        code = run(main(sys.argv[1], sys.argv[2:]))
    except (UtilityVMError, KeyboardInterrupt) as error:
        sys.stderr.write(f"error: {error!r}\n")
        code = 1
    sys.exit(128 - code if code < 0 else code)
