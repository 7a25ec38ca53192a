"""`uvm gc` on a host that was reset with many VMs: how long it takes, and how soon Ctrl-C ends it."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import chdir
from pathlib import Path
from typing import Final

from figures import table
from utilityvm.machine import paths
from utilityvm.store import Store

DEAD: Final = 2000
UVM: Final = str(Path(sys.executable).with_name("uvm"))


def make_dead(count: int) -> None:
    """So many VMs whose QEMUs have ended, each with the sockets, the log and the overlay that a kill leaves."""
    with Store.open() as store:
        store.db.execute("BEGIN")
        for number in range(count):
            name, vm_uuid = f"dead{number}", str(uuid.UUID(int=number))
            folder, overlays = paths.vm_dir(name), paths.overlays_dir(vm_uuid)
            vm = store.add(name, uuid=vm_uuid, config={"root": "/none"})
            store.set_process(vm, _process(name, vm_uuid, folder))
            for made in (folder, overlays):
                made.mkdir(parents=True, mode=0o700)
            (folder / "console.log").write_text("booted\n")
            (overlays / "a.qcow2").write_bytes(bytes(256 << 10))
            with chdir(folder):  # the path of a socket is short
                for one in ("qmp0.sock", "qmp1.sock", "agent.sock"):
                    with socket.socket(socket.AF_UNIX) as listening:
                        listening.bind(one)
        store.db.execute("COMMIT")


def _process(name: str, vm_uuid: str, folder: Path) -> dict[str, object]:
    gone = {"pid": 1 << 30, "log_pid": 1 << 30, "started": "1", "log_started": "1", "uid": 0, "controllers": 4}
    told = {"keep": True, "accelerator": "tcg", "accelerator_reason": "", "qemu_version": "7.2.0", "machine": "pc"}
    return {**gone, **told, "name": name, "uuid": vm_uuid, "folder": str(folder)}


def _took_s(*arguments: str, interrupt_after_s: float | None = None) -> tuple[float, float]:
    """The whole command, or from Ctrl-C to its end; and the processor time of all of it."""
    begun, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen([UVM, "gc", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        if interrupt_after_s is not None:
            time.sleep(interrupt_after_s)
            process.send_signal(signal.SIGINT)
            begun = time.perf_counter()
        told = process.stderr.read()
    took, now = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode != (0 if interrupt_after_s is None else 130):
        raise SystemExit(f"uvm gc ended with {process.returncode}: {told[-500:]!r}")
    return took, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="uvm-gc-") as folder:
        for what in ("STATE", "RUNTIME", "CACHE"):
            os.environ[f"UTILITYVM_{what}_DIR"] = f"{folder}/{what.lower()}"
        make_dead(DEAD)
        listed = _took_s()
        removed = _took_s("--apply")
        make_dead(DEAD)
        interrupted = _took_s("--apply", interrupt_after_s=removed[0] / 2)
        with Store.open() as store:
            left = len(store.vms())
        rest = _took_s("--apply")
        with Store.open() as store:
            assert store.vms() == []
    table(
        (f"{DEAD:,} dead VMs", "time", "of a processor"),
        [
            (what, f"{took:.1f} s", f"{cpu:.1f} s")
            for what, (took, cpu) in (
                ("uvm gc", listed),
                ("uvm gc --apply", removed),
                (f"Ctrl-C half-way, with {left:,} left: to its end", interrupted),
                ("uvm gc --apply, of that rest", rest),
            )
        ],
    )


if __name__ == "__main__":
    asyncio.run(main())
