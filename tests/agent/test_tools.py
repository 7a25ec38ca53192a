"""The programs that make and check file systems: how they end is told, and want of memory is not the disk's fault."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from filesystem_devices import device, make, needs_xfs, soon, write
from utilityvm.agent import filesystems, tools
from utilityvm.agent.faults import Fault


def script(path: Path, text: str) -> list[str]:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return [str(path)]


def test_a_tool_that_fails_is_told_with_what_it_said(tmp_path: Path) -> None:
    tool = script(tmp_path / "mkfs", "echo it is no good >&2; echo Usage: mkfs >&2; exit 3")
    with pytest.raises(Fault, match=r"mkfs failed: it is no good$"):
        tools.run(tool, soon())
    assert tools.ask(tool, soon()) == (3, "it is no good")


def test_a_tool_that_crashes_is_told_with_its_signal(tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"mkfs ended with SIGSEGV$"):
        tools.run(script(tmp_path / "mkfs", "kill -SEGV $$"), soon())


def test_a_tool_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(Fault, match="was not done within the time given") as caught:
        tools.run(script(tmp_path / "mkfs", "exec sleep 1000"), time.monotonic() + 0.1)
    assert caught.value.kind == "timeout"


@pytest.mark.parametrize("end", ["kill -KILL $$", "echo mkfs: Cannot allocate memory >&2; exit 1"])
def test_a_tool_that_found_no_memory_is_run_once_more(tmp_path: Path, end: str) -> None:
    tool = script(tmp_path / "mkfs", f"[ -e {tmp_path}/again ] && exit 0; touch {tmp_path}/again; {end}")
    tools.run(tool, soon())


@pytest.mark.parametrize("end", ["kill -KILL $$", "echo Memory allocation failed while making it >&2; exit 1"])
def test_and_if_it_finds_none_again_the_guest_is_told_to_have_too_little(tmp_path: Path, end: str) -> None:
    tool = script(tmp_path / "mkfs", end)
    with pytest.raises(Fault, match=r"mkfs takes more memory than the guest has") as caught:
        tools.run(tool, soon())
    assert "--memory" in str(caught.value.remedy)


def test_the_kernel_may_end_a_tool_when_memory_runs_out(tmp_path: Path) -> None:
    tool = script(
        tmp_path / "mkfs", f"while ! grep -q 500 /proc/self/oom_score_adj; do :; done; echo > {tmp_path}/seen"
    )
    tools.run(tool, soon())
    assert (tmp_path / "seen").exists()


@needs_xfs
@pytest.mark.parametrize("how", ["kill -KILL $$", "exec sleep 1000"])
def test_a_check_without_memory_or_time_does_not_say_that_the_file_system_is_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    node = device(tmp_path / "device", 320)
    make(node, "xfs")
    size = Path(node).stat().st_size
    write(node, *filesystems._mark_of(size))  # type: ignore[misc]
    script(tmp_path / "xfs_repair", how)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(Fault, match=r"more memory|within the time") as caught:
        make(node, "xfs", deadline=time.monotonic() + 1)
    assert "whole" not in caught.value.message


@needs_xfs
def test_a_check_that_finds_it_damaged_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = device(tmp_path / "device", 320)
    make(node, "xfs")
    write(node, *filesystems._mark_of(Path(node).stat().st_size))  # type: ignore[misc]
    script(tmp_path / "xfs_repair", "echo bad >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(Fault, match=r"it is not whole: xfs_repair failed: bad$") as caught:
        make(node, "xfs")
    assert "reformat" in str(caught.value.remedy)
