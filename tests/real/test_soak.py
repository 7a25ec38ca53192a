"""A process that goes on and on leaves nothing behind: some rounds of what `./dev soak` does by the thousand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from points import rounds
from utilityvm.guestimage.build import GuestImage

pytestmark = pytest.mark.real

SOAK = Path(__file__).parents[2] / "bench" / "soak.py"


def test_rounds_of_adding_and_of_cloning_leave_nothing_behind(guest_image: GuestImage) -> None:
    done = subprocess.run([sys.executable, SOAK, str(rounds(2, long=100))], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| nothing |") == 2
