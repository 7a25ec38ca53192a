"""Every benchmark, in one run, as ratios against baselines of the same run: `./dev bench [NAME...]`.

Timings on a busy machine are noise; a ratio of medians from one run says something. Nothing here is a test.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import sys
import time

BENCHES = ("manager", "disks", "templates", "walls", "adoption", "cli", "server", "memory", "leftovers")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", choices=[*BENCHES, []], help="only these; all without")
    names = parser.parse_args().name or BENCHES
    for name in names:
        print(f"## {name}\n", flush=True)
        begun = time.perf_counter()
        asyncio.run(importlib.import_module(name).main())
        print(f"\n({time.perf_counter() - begun:.0f} s)\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
