"""`uvm gc` and `uvm repair` as commands; what they do to real VMs: tests/real/test_upkeep.py."""

from __future__ import annotations

import json
import os

import pytest

from utilityvm.errors import OutcomeUnknown
from utilityvm.machine import paths
from utilityvm.machine.processes import own_start
from utilityvm.store import Store
from utilityvm.vm import lifecycle

from .conftest import Uvm


@pytest.fixture
def dead(store: Store) -> None:
    """A dead VM with a socket and a log, and the overlays of a clone that is in no store."""
    vm = store.add("dead", uuid="00000000-0000-4000-8000-000000000001", config={})
    process = {"pid": os.getpid(), "started": "another@00000000", "name": "dead", "uuid": vm.uuid}
    store.set_process(vm, {**process, "folder": str(paths.vm_dir("dead")), "accelerator": "tcg"})
    paths.vm_dir("dead").mkdir(parents=True)
    (paths.vm_dir("dead") / "console.log").write_text("Linux\n")
    overlays = paths.overlays_dir("00000000-0000-4000-8000-000000000002")
    overlays.mkdir(parents=True)
    (overlays / "0-1.qcow2").write_bytes(bytes(8192))


def test_nothing_left_over_is_no_line(uvm: Uvm) -> None:
    result = uvm("gc")
    assert (result.exit_code, result.stdout) == (0, "")
    assert uvm("gc", "--json").stdout == "[]\n"


@pytest.mark.usefixtures("dead")
def test_gc_shows_first_and_removes_when_it_is_told_to(uvm: Uvm) -> None:
    shown = uvm("gc")
    assert shown.exit_code == 0
    assert [line.split("\t")[:2] for line in shown.stdout.splitlines()] == [
        ["VM", "dead"],
        ["overlays", "00000000-0000-4000-8000-000000000002"],
    ]
    assert uvm("gc").stdout == shown.stdout, "looking removes nothing"

    done = uvm("gc", "--apply")
    assert (done.exit_code, done.stdout) == (0, shown.stdout)
    assert uvm("ps").stdout == ""
    assert not paths.vm_dir("dead").exists()
    assert list(paths.overlays_dir("-").parent.iterdir()) == []
    assert uvm("gc").stdout == ""


@pytest.mark.usefixtures("dead")
def test_gc_tells_programs_what_it_removed(uvm: Uvm) -> None:
    assert [one["removed"] for one in json.loads(uvm("gc", "--json").stdout)] == [False, False]
    done = json.loads(uvm("gc", "--json", "--apply").stdout)
    assert [(one["kind"], one["removed"]) for one in done] == [("VM", True), ("overlays", True)]
    assert done[1]["size_bytes"] >= 8192
    assert uvm("gc", "--json").stdout == "[]\n"


@pytest.mark.usefixtures("dead")
def test_what_cannot_be_removed_does_not_keep_the_rest(uvm: Uvm, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: object) -> None:
        raise OutcomeUnknown("QEMU of VM dead was killed and does not end", remedy="its storage may hang")

    with monkeypatch.context() as patch:
        patch.setattr(lifecycle, "clear", refuse)
        result = uvm("gc", "--json", "--apply")
    assert result.exit_code == 5
    done = json.loads(result.stdout)
    assert [(one["kind"], one["removed"]) for one in done] == [("VM", False), ("overlays", True)]
    assert "does not end" in done[0]["error"]
    assert uvm("gc", "--apply").exit_code == 0


@pytest.mark.parametrize("apply", [[], ["--apply"]])
def test_repair_of_what_does_not_run_is_refused(uvm: Uvm, store: Store, apply: list[str]) -> None:
    gone = store.add("gone", uuid="u", config={})
    store.set_process(gone, {"pid": os.getpid(), "started": "another@00000000"})
    result = uvm("repair", "gone", *apply)
    assert result.exit_code == 7
    assert "uvm stop gone" in result.stderr
    assert uvm("repair", "nobody", *apply).exit_code == 3


def test_repair_of_a_record_that_lies_is_refused(uvm: Uvm, store: Store) -> None:
    forged = store.add("forged", uuid="u", config={})
    store.set_process(forged, {"pid": os.getpid(), "started": own_start()})
    result = uvm("repair", "forged", "--apply")
    assert result.exit_code == 6
    assert "not one that utilityvm wrote" in result.stderr
    assert "uvm stop forged" in result.stderr
    assert uvm("stop", "forged").exit_code == 0, "this process, which it names, is not ended"
    assert uvm("ps").stdout == ""
