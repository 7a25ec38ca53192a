"""The kernel's side of a VM's cgroup. A guest has a tree of its own, so what we do on a host is done there."""

from __future__ import annotations

from pathlib import Path

import pytest

from utilityvm import UtilityVM
from utilityvm.machine import cgroups

pytestmark = pytest.mark.real

# A folder as systemd delegates it: nothing in it but the cgroup of its process.
SCRIPT = """
import subprocess, sys
top = _mounted() / "uvmtest.scope"
leaf = top / "leaf"
leaf.mkdir(parents=True)
(_mounted() / "cgroup.subtree_control").write_text("+memory +pids")
own = _mounted() / _own().lstrip("/")
sleeper = hog = None
try:
    (leaf / "cgroup.procs").write_text(str(os.getpid()))
    try:
        place()
    except Unavailable as error:
        print("not delegated:", error)
    os.setxattr(top, "trusted.delegate", b"1")
    print(place() == top)
    sleeper = subprocess.Popen(["sleep", "1000"])
    folder = put(sleeper.pid, memory_bytes=16 << 20, threads=3)
    print(Path(f"/proc/{sleeper.pid}/cgroup").read_text().strip().endswith(f"/uvmtest.scope/utilityvm-{sleeper.pid}"))
    remove(folder)
    print("with a process in it:", folder.exists())
    hog = subprocess.Popen([sys.executable, "-c", "input(); b'x' * (64 << 20); print('had it')"], stdin=-1)
    bounded = put(hog.pid, memory_bytes=16 << 20, threads=3)
    hog.communicate(b"\\n")
    print("too much memory:", hog.returncode)
    sleeper.kill()
    sleeper.wait()
    place() and sweep(top)
    print("left:", [entry.name for entry in os.scandir(top) if entry.is_dir()])
finally:
    (own / "cgroup.procs").write_text(str(os.getpid()))
    for folder in (leaf, top):
        folder.rmdir()
"""


async def test_the_kernel_bounds_what_was_put_into_a_delegated_cgroup(vm_booted: UtilityVM) -> None:
    source = Path(cgroups.__file__).read_text()
    done = await vm_booted.run(["python3", "-c", source + SCRIPT])
    assert done.exit_code == 0, done.stderr.decode()
    assert done.stdout.decode().splitlines() == [
        "not delegated: no cgroup is delegated to this process; name one with UTILITYVM_CGROUP",
        "True",
        "True",
        "with a process in it: True",
        "too much memory: -9",
        "left: ['leaf']",
    ]
