"""Eight processes use four VMs and their disks at the same time: no reference is lost, and no disk has two writers.

They go on for two seconds, in a long run (`./dev long`) for a minute; UTILITYVM_HAMMER_S says for how many.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import hammer
from hammer import WRITTEN
from points import rounds
from utilityvm import UtilityVM
from utilityvm.machine.programs import find_program, run
from utilityvm.scsi.ports import DiskFormat
from utilityvm.testing.images import ext4_image, read_file

pytestmark = pytest.mark.real

Uvm = Callable[..., "subprocess.CompletedProcess[str]"]

PROCESSES = 8
SECONDS = float(os.environ.get("UTILITYVM_HAMMER_S", rounds(2, long=60)))


async def test_eight_processes_share_four_vms_and_their_disks(booted: str, tmp_path: Path, uvm: Uvm) -> None:
    for number in range(3):
        ext4_image(tmp_path / f"shared{number}.raw", {"name": f"shared{number}"}, size_mib=8)
    ext4_image(tmp_path / WRITTEN, {})
    names = [f"hammered{number}" for number in range(4)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for name in names:
            await (await UtilityVM.clone(booted, name, keep=True)).close()
        command = [sys.executable, hammer.__file__]
        processes += [
            subprocess.Popen(
                [*command, str(me), str(SECONDS), tmp_path, *names], stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            for me in range(PROCESSES)
        ]
        shown: set[int] = set()
        while not shown and any(process.poll() is None for process in processes):
            told_by_ps = [vm for vm in json.loads(uvm("ps", "--json").stdout) if vm["name"] in names]
            assert [vm["name"] for vm in told_by_ps] == names
            shown = {vm["owner"]["pid"] for vm in told_by_ps if vm["owner"]} - {0}  # 0: it is just becoming the owner
        assert shown
        assert shown <= {process.pid for process in processes}, "`uvm ps` shows who owns each"
        ends = [process.communicate() for process in processes]
        assert [errors.decode() for _, errors in ends] == [""] * PROCESSES
        told = Counter(json.loads(line) for output, _ in ends for line in output.splitlines())
        assert told

        for name in names:
            vm = await UtilityVM.open(name)
            assert vm.scsi_slots() == [], "what dead processes held was given back"
            assert vm.scsi_reservations() == []
            await vm.close()
        image = tmp_path / WRITTEN
        run([find_program("e2fsck", package="e2fsprogs"), "-E", "journal_only", "-p", image])
        run([find_program("e2fsck", package="e2fsprogs"), "-fn", image])
        assert Counter(read_file(image, "/log", image_format=DiskFormat.RAW).splitlines()) == told
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for name in names:
            await UtilityVM.remove(name, force=True)
