"""On a Python without fcntl and AF_UNIX, as Windows' is, everything imports, and the pure parts pass their tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]

PURE = ["test_gojson.py", "test_documents.py", "test_gob.py", "test_clone.py", "test_winpath.py", "test_savedstate.py"]

WITHOUT_UNIX = """
import socket, sys
for name in ("fcntl", "grp", "pwd", "termios", "resource"):
    sys.modules[name] = None
for name in ("AF_UNIX", "SCM_RIGHTS", "send_fds", "recv_fds"):
    vars(socket).pop(name, None)
"""

IMPORT_ALL = """
import importlib, pkgutil
import utilityvm.hcs, utilityvm.hosts.hcs
for package in (utilityvm.hcs, utilityvm.hosts.hcs):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
        print(module.name)
importlib.import_module("utilityvm.testing.hcs")
"""

RUN_TESTS = """
import pytest
sys.exit(pytest.main(["-q", "--noconftest", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def run_without_unix(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_UNIX + code, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_module_imports() -> None:
    done = run_without_unix(IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    assert {"utilityvm.hosts.hcs.computecore", "utilityvm.hcs.gob"} <= set(done.stdout.split())


def test_what_only_unix_has_is_named() -> None:
    code = """
import utilityvm
print(utilityvm.ScsiState.__name__, utilityvm.Slot(0, 1), utilityvm.errors.__name__)
for name in ("UtilityVM", "VMConfig", "Template"):
    try:
        getattr(utilityvm, name)
    except utilityvm.SetupError as error:
        print(error, error.remedy)
"""
    done = run_without_unix(code)
    assert done.returncode == 0, done.stderr
    first, *refusals = done.stdout.splitlines()
    assert first == "ScsiState 0:1 utilityvm.errors"
    assert len(refusals) == 3
    assert all("needs a Unix system" in line and "utilityvm.hosts.hcs" in line for line in refusals)


def test_the_pure_parts_pass_their_tests() -> None:
    done = run_without_unix(RUN_TESTS, *(str(HERE / name) for name in PURE))
    assert done.returncode == 0, done.stdout


def test_what_is_taken_away_is_really_gone() -> None:
    done = run_without_unix("import fcntl")
    assert "ModuleNotFoundError" in done.stderr or "ImportError" in done.stderr
