"""What is remembered of QEMU, and when it is forgotten. The programs here are stand-ins that count their starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from utilityvm.errors import SetupError
from utilityvm.hosts.qemu import emulator

SCRIPT = """#!/bin/sh
echo "$*" >> {log}
case "$*" in
    --version) echo "QEMU emulator version {version} (Debian)";;
    "-machine help") echo "pc  Standard PC"; echo "q35  Standard PC (Q35) (alias of pc-q35-{short})";;
    *) exit 1;;
esac
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UTILITYVM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Program:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "qemu"
        self._log = folder / "starts"

    def install(self, version: str) -> None:
        short = ".".join(version.split(".")[:2])
        self.path.write_text(SCRIPT.format(log=self._log, version=version, short=short))
        self.path.chmod(0o755)

    @property
    def starts(self) -> int:
        return len(self._log.read_text().splitlines()) if self._log.exists() else 0


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    made = Program(tmp_path)
    made.install("7.2.22")
    monkeypatch.setenv("UTILITYVM_QEMU", str(made.path))
    return made


async def test_version_and_machine_are_asked_once(program: Program) -> None:
    first = await emulator.find()
    starts = program.starts
    assert (first.version, first.machine) == ("7.2.22", "pc-q35-7.2")
    assert await emulator.find() == first
    assert program.starts == starts


async def test_another_program_is_asked_anew(program: Program) -> None:
    await emulator.find()
    program.install("10.0.1-longer")
    assert (await emulator.find()).machine == "pc-q35-10.0"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"other": 1}', "\0"])
async def test_a_cache_that_is_broken_is_no_cache(program: Program, cache: Path, content: str) -> None:
    cache.mkdir()
    (cache / "qemu.json").write_text(content)
    assert (await emulator.find()).version == "7.2.22"
    assert (await emulator.find()).version == "7.2.22"


async def test_a_cache_that_cannot_be_written_is_no_error(program: Program, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    assert (await emulator.find()).version == "7.2.22"


async def test_what_is_not_qemu_is_refused(program: Program) -> None:
    program.path.write_text("#!/bin/sh\necho hello\n")
    with pytest.raises(SetupError, match="is not a QEMU with a q35 machine"):
        await emulator.find()


async def test_a_program_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UTILITYVM_QEMU", str(tmp_path / "missing"))
    with pytest.raises(SetupError, match="which is no program"):
        await emulator.find()


def test_a_new_verdict_of_a_kind_takes_the_old_ones_place(cache: Path) -> None:
    emulator.remember("accelerator old", 1)
    emulator.remember("emulator x", 2)
    emulator.remember("accelerator new", 3)
    assert emulator.recall("accelerator old") is None
    assert (emulator.recall("emulator x"), emulator.recall("accelerator new")) == (2, 3)
    assert [file.name for file in cache.iterdir()] == ["qemu.json"]


def test_a_boot_that_has_no_name_is_one_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(emulator.boot_id()) == 36

    def hidden(_: object) -> str:
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", hidden)
    assert emulator.boot_id() == "unknown boot"
