"""A pid with its start time names one process."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from descriptors import descriptors_left
from utilityvm.errors import SetupError
from utilityvm.machine import processes
from utilityvm.machine.processes import Life


def test_this_process_runs_and_knows_itself() -> None:
    assert processes.is_running(os.getpid(), processes.own_start())
    assert not processes.is_running(os.getpid(), "1")


def test_without_a_free_descriptor_it_cannot_be_told_whether_a_process_runs() -> None:
    started = processes.own_start()
    assert processes.life_of(os.getpid(), started) is Life.RUNS
    assert processes.life_of(os.getpid(), "1") is Life.ENDED
    with descriptors_left(0):
        assert processes.life_of(os.getpid(), started) is Life.UNKNOWN
        with pytest.raises(SetupError, match="Too many open files"):
            processes.process_with("-uuid", "x")


@pytest.mark.parametrize("pid", [0, -5, 1 << 22])
def test_a_pid_that_nobody_can_have_has_ended(pid: int) -> None:
    assert processes.life_of(pid, "1@00000000") is Life.ENDED


def test_a_process_tells_its_program_and_none_of_its_arguments(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text("from utilityvm.machine import processes; print(processes.own_command())")
    command = [sys.executable, str(script), "--token", "s3cr3t"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert said == f"{Path(sys.executable).name} {script}"


def test_a_zombie_does_not_run() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = processes.started_at(process.pid)
        assert started is not None
        assert processes.is_running(process.pid, started)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has reaped it
        assert not processes.is_running(process.pid, started)


def test_a_process_is_found_by_words_of_its_command_line() -> None:
    word = str(uuid.uuid4())
    assert processes.process_with("-uuid", word) is None
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()", "-uuid", word], stdin=-1, stdout=-1
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert processes.process_with("-uuid", word) == (process.pid, processes.started_at(process.pid))
        assert processes.process_with("-uuid", word[:-1]) is None, "whole words, not parts of them"
        assert processes.process_with("uuid", word) is None
        assert processes.process_with(word, "-uuid") is None, "in this order"
        process.kill()
