"""Feed every target with what libFuzzer comes up with, and say how much that was. `./dev fuzz [MINUTES] [TARGET...]`.

Each target is fed for that many minutes (1 unless told), guided by which code an input reaches. What was found to reach
new code is kept in a folder, `.fuzz` unless UTILITYVM_FUZZ says another, and is where the next run begins. A fault ends
its target: the input that does it is printed, and kept as a file to be run again.

Needs atheris (requirements.txt), which `./dev fuzz` installs beside the other things, and nothing else asks for.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "helpers")]
_RUNS: Final = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
_COVERED: Final = re.compile(r"cov: (\d+)")
_LIMITS: Final = ("-timeout=20", "-rss_limit_mb=1024", "-max_len=65536", "-print_final_stats=1")


def one(name: str, arguments: list[str]) -> None:
    """Feed one target, in this process, which atheris ends."""
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["utilityvm"]):
        targets: Any = importlib.import_module("fuzz_targets")
    atheris.Setup([sys.argv[0], *arguments], targets.TARGETS[name].feed)
    atheris.Fuzz()


def fed(name: str, *, minutes: float, kept: Path) -> tuple[bool, str]:
    """Did the target stand it; and a line about it."""
    import fuzz_seeds

    found, begun = kept / name, kept / f"{name}-seeds"
    for folder in (found, begun):
        folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(fuzz_seeds.of(name)):
        (begun / str(number)).write_bytes(seed)
    command = [sys.executable, str(HERE / "run.py"), "--one", name, f"-max_total_time={max(1, round(minutes * 60))}"]
    command += [*_LIMITS, f"-artifact_prefix={kept}/{name}-fault-", str(found), str(begun)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    runs, covered = _RUNS.search(done.stderr), _COVERED.findall(done.stderr)
    line = f"{name:14} {int(runs[1]) if runs else 0:>12,} runs  {covered[-1] if covered else '?':>6} places reached"
    if done.returncode:
        return False, f"{line}\n{done.stderr[-4000:]}"
    return True, line


def main() -> Iterator[bool]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", nargs="?", type=float, default=1.0, help="for each target")
    parser.add_argument("targets", nargs="*", help="which; all of them unless named")
    parser.add_argument("--jobs", type=int, default=1, help="how many at the same time")
    asked = parser.parse_args()
    from fuzz_targets import TARGETS

    if unknown := set(asked.targets) - set(TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    kept = Path(os.environ.get("UTILITYVM_FUZZ", ".fuzz")).resolve()
    with ThreadPoolExecutor(asked.jobs) as pool:
        for stood, line in pool.map(
            lambda name: fed(name, minutes=asked.minutes, kept=kept), asked.targets or list(TARGETS)
        ):
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
            yield stood


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(0 if all(list(main())) else 1)
