"""`uvm doctor` names each fault and how to mend it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from utilityvm.store import Store, VMState

from .conftest import Uvm


def findings(uvm: Uvm) -> dict[str, dict[str, str]]:
    return {finding["what"]: finding for finding in json.loads(uvm("doctor", "--json").stdout)}


def test_a_missing_image_is_a_fault_with_its_fix(uvm: Uvm) -> None:
    result = uvm("doctor", "--json")
    assert result.exit_code == 1
    found = {finding["what"]: finding for finding in json.loads(result.stdout)}
    assert (found["guest image"]["verdict"], found["guest image"]["fix"]) == ("fault", "uvm image build")
    assert found["python"]["verdict"] == "ok"


def test_a_missing_qemu_is_a_fault_with_its_fix(uvm: Uvm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UTILITYVM_QEMU", "/nonexistent/qemu")
    found = findings(uvm)["qemu"]
    assert found["verdict"] == "fault"
    assert "UTILITYVM_QEMU" in found["detail"]
    assert "unset it" in found["fix"]


def test_a_folder_that_others_may_write_to_is_a_fault(uvm: Uvm, folders: Path) -> None:
    (folders / "runtime").mkdir()
    (folders / "runtime").chmod(0o777)
    found = findings(uvm)["runtime folder"]
    assert (found["verdict"], found["fix"]) == ("fault", f"chmod go-w {folders / 'runtime'}")


def test_a_folder_that_is_a_file_is_a_fault(uvm: Uvm, folders: Path) -> None:
    (folders / "state").touch()
    found = findings(uvm)["state folder"]
    assert found["verdict"] == "fault"
    assert "not a folder" in found["detail"]


def test_a_dead_vm_is_noted(uvm: Uvm, store: Store) -> None:
    vm = store.add("gone", uuid="u", config={})
    store.set_process(vm, {"pid": os.getpid(), "started": "1"})
    store.set_state(vm, VMState.RUNNING)
    found = findings(uvm)["store"]
    assert (found["verdict"], found["fix"]) == ("note", "uvm stop gone")


def test_the_table_names_what_was_found(uvm: Uvm) -> None:
    lines = uvm("doctor").stdout.splitlines()
    assert all(line.split("\t")[0] in ("ok", "note", "fault") for line in lines)
