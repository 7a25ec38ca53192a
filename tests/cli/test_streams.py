"""Where words go: the standard streams, also when they are closed, full, or no terminal; JSON stands alone."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from utilityvm.cli import output
from utilityvm.errors import VMGone
from utilityvm.log import logger
from utilityvm.store import Store
from utilityvm.text import count

from .conftest import Uvm

UVM = [sys.executable, "-c", "from utilityvm.cli import main; main()"]


@pytest.fixture
def vm(store: Store) -> str:
    """A VM that a table can show."""
    store.add("worker", uuid="u", config={"memory_mib": 256})
    return "worker"


@pytest.mark.usefixtures("vm")
@pytest.mark.parametrize("words", ["ps", "ps --json", "--help", "template --help", "completion fish", "--version"])
@pytest.mark.parametrize("where", ["full", "closed", "nobody reads"])
def test_an_output_that_cannot_be_written_is_one_error(words: str, where: str) -> None:
    command = [*UVM, *words.split()]
    if where == "closed":
        command = ["bash", "-c", '"$@" >&-', "bash", *command]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe, Path("/dev/full").open("wb") as full:
        stdout = pipe if where == "nobody reads" else full
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    told = json.loads(line)["message"] if "--json" in words else line
    assert "cannot write to the standard output: " in told
    assert ("No space left" if where == "full" else "it is closed") in told


def test_with_all_streams_closed_nothing_else_is_written_to(vm: str, folders: Path) -> None:
    """The store would be the next file to get the number of the standard output."""
    done = subprocess.run(["bash", "-c", '"$@" ps <&- >&- 2>&-', "bash", *UVM], check=False)
    assert done.returncode == 1
    assert b"worker\t" not in b"".join(path.read_bytes() for path in (folders / "state").iterdir())


def test_what_was_done_is_told_if_the_result_cannot_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    for as_json in (False, True):
        output.begin(as_json=as_json)
        output.done("job-1 is up")
        output.done("job-2 is up")
        failed = output.OutputFailed.because(OSError(28, "No space left on device"))
        output.tell_errors([output.Told("OutputFailed", str(failed), None)], 1)
    plain, document = said.getvalue().splitlines()
    assert plain.endswith("No space left on device; this was done: job-1 is up; job-2 is up")
    assert "job-1 is up; job-2 is up" in json.loads(document)["message"]


def test_with_json_warnings_are_in_the_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    output.begin(as_json=True)
    output.log_to_stderr(debug=False)
    logging.getLogger("utilityvm.x").warning("odd")
    output.say("a step")
    output.note("waiting")
    output.tell_errors([output.Told("GuestBusy", "busy", None), output.Told("VMOwned", "owned", "wait")], 4)
    document = json.loads(capsys.readouterr().err)
    assert document["message"] == "busy"
    assert document["exit_code"] == 4
    assert document["warnings"] == ["odd"]
    assert [other["error"] for other in document["others"]] == ["VMOwned"]


@pytest.mark.parametrize("as_json", [False, True])
def test_what_failed_is_told_once_though_the_library_logs_it_too(
    capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    output.begin(as_json=as_json)
    output.log_to_stderr(debug=False)
    log = logger("utilityvm.x", vm="a")
    log.error("the VM died: %s", VMGone("QEMU of VM a\nhung up"))
    log.error("a worker failed: %r", ZeroDivisionError("by zero"))
    log.error("odd")
    output.tell_errors([output.Told("VMGone", "QEMU of VM a\nhung up (rc 1)", None)], 7)
    said = capsys.readouterr().err
    assert said.count("hung up") == 1
    assert "died" not in said
    assert "a worker failed: ZeroDivisionError" in said
    assert "odd" in said


def test_what_failed_aside_of_a_command_that_succeeds_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    output.begin(as_json=False)
    output.log_to_stderr(debug=False)
    logger("utilityvm.x").error("the journal is behind: %r", OSError(28, "No space left on device"))
    assert not capsys.readouterr().err
    output.tell_warnings()
    assert capsys.readouterr().err.startswith("warning: the journal is behind: ")


def test_with_json_warnings_of_a_success_are_json(uvm: Uvm, folders: Path) -> None:
    (folders / "state").mkdir()
    (folders / "state/state.db").write_bytes(b"not a database, and longer than a header " * 40)
    result = uvm("ps", "--json")
    assert json.loads(result.stdout) == []
    (warning,) = json.loads(result.stderr)["warnings"]
    assert "the store" in warning


def test_each_of_several_errors_is_told_once(uvm: Uvm) -> None:
    result = uvm("stop", "one", "two")
    assert result.exit_code == 3
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == [
        "error: there is no VM named 'one'",
        "error: there is no VM named 'two'",
    ]
    result = uvm("stop", "one", "two", "one", "--json")
    document = json.loads(result.stderr)
    assert "'one'" in document["message"]
    assert ["'two'" in other["message"] for other in document["others"]] == [True]
    assert json.loads(result.stdout) == [{"name": "one", "stopped": False}, {"name": "two", "stopped": False}]


def on_a_terminal(*words: str, columns: int = 80, **variables: str) -> str:
    """What the command prints on a terminal of so many columns."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), **variables}
    with subprocess.Popen([*UVM, *words], stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        said = b""
        try:
            while data := os.read(leader, 65536):
                said += data
        except OSError:
            pass  # EIO: the last that had it open has closed it
        process.wait()
    os.close(leader)
    return said.decode().replace("\r\n", "\n")


@pytest.mark.usefixtures("vm")
def test_colours_are_left_out_where_they_are_not_wanted() -> None:
    for words in (("ps",), ("ls", "nobody")):
        assert "\x1b[" in on_a_terminal(*words, NO_COLOR="")
        assert "\x1b" not in on_a_terminal(*words, NO_COLOR="1")
        assert "\x1b" not in on_a_terminal(*words, NO_COLOR="", TERM="dumb")


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_table_fits_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
    path, wide = "/srv/images/" + "deep/" * 20 + "disk.qcow2", "名" * 30
    output.print_table(("SLOT", "DISK", "HOLDER"), [("0:1", path, wide), ("0:2", "/a", "cli")])
    _, first, second = capsys.readouterr().out.splitlines()
    assert output._width(first) <= columns
    assert first.startswith("0:1   /srv")
    if columns < 180:
        assert "…" in first
        assert "disk.qcow2" in first
    assert second.split() == ["0:2", "/a", "cli"]


@pytest.mark.parametrize(("number", "text"), [(0, "no disks"), (1, "1 disk"), (2, "2 disks")])
def test_things_are_counted_in_english(number: int, text: str) -> None:
    assert count(number, "disk") == text


@pytest.mark.parametrize("wait_for", ["utilityvm.cli.commands", "click", "utilityvm.cli.listing", "utilityvm.store"])
def test_ctrl_c_is_quiet_from_the_first_import_on(wait_for: str, folders: Path) -> None:
    """The import that it meets says so, and takes its time."""
    script = (
        "import builtins, sys, time\n"
        "real = builtins.__import__\n"
        "def slow(name, *rest):\n"
        f"    if name == {wait_for!r}:\n"
        "        print('here', flush=True)\n"
        "        time.sleep(60)\n"
        "    return real(name, *rest)\n"
        "from utilityvm.cli import main\n"
        "builtins.__import__ = slow\n"
        "import importlib\n"
        "importlib.import_module = lambda name: (slow(name, {}, {}, ['x']))\n"
        "sys.argv = ['uvm', 'ps']\n"
        "main()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert (process.wait(), said) == (130, b"")
