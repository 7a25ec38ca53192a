"""Every order of what callers of one VM do at the same time, as far as there is time; or faults put back, to be found.

`./dev explore [ORDERS]`: that many orders of each scenario at the most. `./dev explore --faults [WORDS]`: each fault in
`FAULTS`, or those with one of the words in their names, is put into a copy of the source, and something has to find it.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests/helpers"))

from known_faults import EXPLORER, FAULTS, Fault  # noqa: E402
from scsi_orders import Tried, try_orders  # noqa: E402
from scsi_scenarios import SCENARIOS, SHARE  # noqa: E402

ORDERS: Final = 6_500


def explore(at_most: int) -> None:
    begun, worked, orders = time.perf_counter(), _cpu_s(), 0
    with ProcessPoolExecutor() as processes:
        found = {processes.submit(_explored, name, at_most): name for name in SCENARIOS}
        try:
            for one in as_completed(found):
                tried = one.result()
                orders += tried.orders
                print(f"{found[one]}: {tried}", flush=True)
        except BaseException:
            processes.shutdown(cancel_futures=True)
            raise
    seconds, of_cpu = time.perf_counter() - begun, _cpu_s() - worked
    print(
        f"{orders:,} distinct schedules of {len(SCENARIOS)} scenarios in {seconds:.0f} s ({of_cpu:.0f} s of CPU); "
        "no promise was broken"
    )


def _explored(name: str, at_most: int) -> Tried:
    return try_orders(name, SCENARIOS[name], at_most)


def _cpu_s() -> float:
    """Of the processes that have ended; this one does nothing."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def find(fault: Fault) -> str | None:
    """What finds the fault, once it is put into a copy of the source; None if nothing does."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "src")
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        for file, old, new in fault.edits:
            path = source / "utilityvm" / file
            text = path.read_text()
            if text.count(old) != 1:
                sys.exit(f"{fault.name}: {file} has {text.count(old)} of {old!r}, and not one")
            path.write_text(text.replace(old, new))
        explorer = [sys.executable, __file__, str(SHARE)]
        tests = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", fault.found_by]
        done = subprocess.run(
            explorer if fault.found_by == EXPLORER else tests,
            env={**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 1:
        return None
    if fault.found_by == EXPLORER:
        return next(line.split(", choices")[0] for line in done.stdout.splitlines() if ", choices" in line)
    return next(line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="./dev explore", description=__doc__)
    parser.add_argument("orders", nargs="?", type=int, default=ORDERS)
    parser.add_argument("--faults", nargs="*", metavar="WORD")
    options = parser.parse_args()
    if options.faults is None:
        explore(options.orders)
        return
    missed = 0
    for fault in FAULTS:
        if not options.faults or any(word in fault.name for word in options.faults):
            found = find(fault)
            missed += found is None
            print(f"{fault.name}: {found or 'NOT FOUND'}", flush=True)
    sys.exit(missed and f"{missed} faults were not found")


if __name__ == "__main__":
    main()
