"""What a failed test keeps of its VMs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import evidence
from utilityvm.log import logger
from utilityvm.scsi.ports import Holder, ReservationRecord
from utilityvm.scsi.transitions import ReservationState
from utilityvm.store import SqliteJournal, Store

WIRE = "utilityvm.hosts.qemu.qmp"


async def test_console_transcript_and_journal_are_kept_under_the_vms_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UTILITYVM_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("UTILITYVM_RUNTIME_DIR", str(tmp_path / "run"))
    with Store.open() as store:
        vm = store.add("worker", uuid="u", config={}, owner=None)
        record = ReservationRecord(
            reservation="r1",
            attachment="a1",
            mount=None,
            holder=Holder(name="job"),
            state=ReservationState.HELD,
            since=1.0,
        )
        await SqliteJournal(store, vm).write([record])
    (tmp_path / "run/vms/worker").mkdir(parents=True)
    (tmp_path / "run/vms/worker/console.log").write_text("Kernel panic")
    with evidence.Transcripts() as transcripts:
        logger(WIRE, vm="worker").debug("--> %s", b"quit")
    kept = evidence.keep(tmp_path / "kept", tmp_path / "state/state.db", transcripts)
    texts = {path.name: path.read_text() for path in kept}
    assert texts.keys() == {"worker.journal", "worker.console", "worker.qmp"}
    assert "r1" in texts["worker.journal"]
    assert "quit" in texts["worker.qmp"]


def test_a_transcript_gives_other_handlers_no_more_than_they_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with evidence.Transcripts():
        logger(WIRE, vm="v").debug("--> a line of the wire")
        logger(WIRE, vm="v").warning("odd")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
