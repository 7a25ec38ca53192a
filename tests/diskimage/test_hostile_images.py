"""Images and paths that were made to harm are refused before QEMU sees them. `./dev corpus hostile` has QEMU too."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import hostile_images
from hostile_images import Hostile
from utilityvm.errors import UtilityVMError
from utilityvm.hosts.qemu.disk import open_disk
from utilityvm.scsi.ports import DiskRequest
from watched import Watched


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Hostile]]:
    folder = tmp_path_factory.mktemp("hostile")
    return folder, list(hostile_images.made(folder))


def outcome(one: Hostile, *, read_only: bool) -> str:
    try:
        open_disk(DiskRequest(host_path=one.path, read_only=read_only, format=one.format)).close()
    except UtilityVMError as refusal:
        error = refusal
    else:
        return "data"
    assert error.remedy, one.name
    assert len(str(error)) < 2000, one.name
    assert str(error).isprintable(), one.name
    return "refused"


def test_each_is_refused_or_data_and_leads_nowhere(corpus: tuple[Path, list[Hostile]]) -> None:
    folder, made = corpus
    assert len(made) > 150
    with Watched(folder / "secret") as secret:
        for one in made:
            for read_only in (True, False):
                begun = time.process_time()
                found = outcome(one, read_only=read_only)
                assert one.must in (found, "either"), one.name
                assert time.process_time() - begun < 5, one.name
                assert not secret.was_opened(), one.name


def test_what_is_watched_is_seen_to_be_opened(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with Watched(path) as watched:
        assert not watched.was_opened()
        path.read_bytes()
        assert watched.was_opened()
        assert not watched.was_opened()
