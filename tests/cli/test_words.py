"""What is typed: whose word it is, how sizes and times are written, and where a disk ends and its place begins."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utilityvm.cli import vm, words
from utilityvm.cli.commands import uvm as command
from utilityvm.cli.values import MEMORY, SECONDS, SIZE, WAIT, Place, place

from .conftest import Uvm


def parsed(*typed: str) -> Mapping[str, Any]:
    """What `uvm exec` understands."""
    with vm.exec_command.make_context("exec", list(typed), parent=click.Context(command, info_name="uvm")) as context:
        return context.params


@pytest.mark.parametrize(
    ("typed", "program"),
    [
        ("v sort -n --", "sort -n --"),
        ("v grep -n -- x", "grep -n -- x"),
        ("v echo --json -- c", "echo --json -- c"),
        ("v -- echo --json", "echo --json"),
        ("v -- -- x", "-- x"),
        ("v -n -- sort -n", "sort -n"),
        ("v -n sort -n --", "sort -n --"),
        ("-n v sort --help", "sort --help"),
        ("-n -- v sort -n", "sort -n"),
        ("v -e A=B --cwd /x env -e --wait 3", "env -e --wait 3"),
        ("v -eA=B env", "env"),
        ("v -ne A=B env -n", "env -n"),
        ("v -neA=B env", "env"),
        ("v --env A=-- env -- -e", "env -- -e"),
        ("v --cwd=-- ls --", "ls --"),
        ("v -", "-"),
        ("v - -n", "- -n"),
        ("-- v -- ls", "ls"),
    ],
)
def test_what_follows_the_program_is_the_program_s(typed: str, program: str) -> None:
    found = parsed(*typed.split())
    assert (found["name"], " ".join(found["program"])) == ("v", program)
    own = typed.removesuffix(program)
    assert found["no_stdin"] is any(word.startswith("-n") for word in own.split())


@given(st.lists(st.sampled_from(["-n", "--", "-e", "A=B", "--json", "--help", "-", "--wait", "x", ""]), max_size=6))
def test_no_word_of_the_program_is_ours_whatever_follows_it(rest: list[str]) -> None:
    assert parsed("v", "prog", *rest)["program"] == ("prog", *rest)
    assert parsed("v", "--", *rest, "x")["program"] == (*rest, "x")


@pytest.mark.parametrize(
    "typed", ["exec v -e", "exec v --wait", "exec --cwd", "exec", "exec v", "exec v --", "exec v -n"]
)
def test_what_is_missing_is_said(uvm: Uvm, typed: str) -> None:
    result = uvm(*typed.split())
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "requires an argument" in result.stderr or "missing argument" in result.stderr


def test_a_variable_without_a_value_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "a=b")
    assert [vm._variable(text) for text in ("TOKEN", "A=", "B=c=d")] == [("TOKEN", "a=b"), ("A", ""), ("B", "c=d")]


@pytest.mark.parametrize(
    ("text", "disk", "guest_path", "mode"),
    [
        ("disk.raw", "disk.raw", None, None),
        ("disk.raw:/data", "disk.raw", "/data", None),
        ("disk.raw:/data:ro", "disk.raw", "/data", "ro"),
        ("disk.raw:/data:rw", "disk.raw", "/data", "rw"),
        ("disk.raw:ro", "disk.raw", None, "ro"),
        ("there:rw", "there", None, "rw"),
        ("a:b:/c:/data", "a:b:/c", "/data", None),
        ("a:b", "a:b", None, None),
        ("there:data", "there", "data", None),
        ("there:", "there", "", None),
        ("with:/colon", "with:/colon", None, None),
        ("with:/colon:/data:ro", "with:/colon", "/data", "ro"),
        ("named:ro", "named:ro", None, None),
        ("named:ro:/data", "named:ro", "/data", None),
        ("named:ro:ro", "named:ro", None, "ro"),
        ("disk.raw:/", "disk.raw", "/", None),
        ("disk.raw://data", "disk.raw", "//data", None),
    ],
)
def test_a_disk_its_guest_path_and_its_mode_are_told_apart(
    folders: Path, text: str, disk: str, guest_path: str | None, mode: str | None
) -> None:
    for name in ("there", "named:ro"):
        (folders / name).touch()
    (folders / "with:").mkdir()
    (folders / "with:/colon").touch()
    assert place(text) == Place(disk, guest_path, mode)


@pytest.mark.parametrize("mode", ["RO", "ro,z", "Z", "readonly", "ro:ro", "", "noexec", "rw,noexec", "x/y"])
def test_what_is_no_mode_is_not_taken_as_a_name(uvm: Uvm, folders: Path, mode: str) -> None:
    (folders / "disk.raw").touch()
    result = uvm("attach", "v", f"disk.raw:/q:{mode}")
    assert result.exit_code == 2
    assert "neither 'ro' nor 'rw'" in result.stderr
    assert "--option" in result.stderr
    assert "--guest-path" in result.stderr


@pytest.mark.parametrize("words", [["d.raw:/q,ro"], ["d.raw", "--guest-path", "/q:ro"], ["d.raw:/a,rw"]])
def test_a_guest_path_that_ends_like_a_mode_is_not_taken_as_a_name(uvm: Uvm, words: list[str]) -> None:
    result = uvm("attach", "v", *words)
    assert result.exit_code == 2
    assert "--read-only" in result.stderr


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30))
def test_a_guest_path_given_is_found_whatever_the_disk_is_called(name: str) -> None:
    assert place(f"{name}:/data") == Place(name, "/data")
    assert place(f"{name}:/data:ro") == Place(name, "/data", "ro")


def test_modes_and_paths_that_contradict_are_refused(uvm: Uvm) -> None:
    assert "contradicts" in uvm("attach", "v", "d.raw:/q:rw", "--read-only").stderr
    assert "--mount chooses" in uvm("attach", "v", "d.raw", "--guest-path", "/x", "--mount").stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("512B", 512),
        ("1K", 1 << 10),
        ("256M", 256 << 20),
        ("256m", 256 << 20),
        ("64MiB", 64 << 20),
        ("64mib", 64 << 20),
        ("1G", 1 << 30),
        ("1.5G", 3 << 29),
        ("0.5K", 512),
        ("2T", 2 << 40),
        ("1TiB", 1 << 40),
    ],
)
def test_a_size_is_written_in_one_way_everywhere(text: str, size: int) -> None:
    assert SIZE.convert(text, None, None) == size
    if size % (1 << 20) == 0:
        assert MEMORY.convert(text, None, None) == size >> 20


def test_memory_without_a_unit_is_in_mib() -> None:
    assert MEMORY.convert("256", None, None) == 256
    assert SIZE.convert("256", None, None) == 256


@pytest.mark.parametrize(
    "text", ["", "M", "-1", "1e9", "1,5G", "64 M", "64MB", "0x10", "1.G", ".5G", "٤G", "1P", "nan", "1.3"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter) as refused:
        SIZE.convert(text, None, None)
    assert repr(text) in refused.value.message


def test_memory_is_whole_mebibytes() -> None:
    with pytest.raises(click.BadParameter, match="whole number of MiB"):
        MEMORY.convert("1.5K", None, None)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30", 30.0), ("0.5", 0.5), (".5", 0.5), ("90s", 90.0), ("5m", 300.0), ("1h", 3600.0)]
)
def test_times_have_units(text: str, seconds: float) -> None:
    assert SECONDS.convert(text, None, None) == seconds


def test_a_time_may_be_nothing_only_where_one_waits() -> None:
    assert WAIT.convert("0", None, None) == 0
    for text in ("0", "-1", "inf", "nan", "1d", ""):
        with pytest.raises(click.BadParameter):
            SECONDS.convert(text, None, None)


def test_the_library_s_arguments_are_called_by_their_options() -> None:
    attach = command.get_command(click.Context(command), "attach")
    assert attach is not None
    words.speak_of(attach.params)
    for said, spoken in (
        ("reformat without ensure_filesystem makes no sense", "reformat without --ensure-filesystem makes no sense"),
        ("try again with read_only=True", "try again with --read-only"),
        ("filesystem='xfs' or filesystem=ext4", "--filesystem xfs or --filesystem ext4"),
        ("give timeout_s more", "give --timeout more"),
        ('format="raw".', "--format raw."),
        ("the partition is read_only_file.raw", "the partition is read_only_file.raw"),
        ("an option of the mount", "an option of the mount"),
        ("/srv/read_only/x=1", "/srv/read_only/x=1"),
    ):
        assert words.spoken(said) == spoken


def test_a_bare_command_prints_its_help(uvm: Uvm) -> None:
    for typed in ((), ("template",), ("image",)):
        result = uvm(*typed)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == uvm(*typed, "--help").stdout


def test_the_json_option_of_a_program_is_the_program_s(uvm: Uvm) -> None:
    for typed in (("nobody", "prog", "--json", "--"), ("nobody", "--", "prog", "--json"), ("nobody", "prog", "--json")):
        assert uvm("exec", *typed).stderr.startswith("error: ")
    for typed in (("nobody", "--json", "prog"), ("--json", "nobody", "--", "prog")):
        assert json.loads(uvm("exec", *typed).stderr)["exit_code"] == 125


def test_a_process_is_known_to_others_without_its_arguments(uvm: Uvm, monkeypatch: pytest.MonkeyPatch) -> None:
    from utilityvm.machine import processes

    monkeypatch.setattr(processes, "_introduced", None)
    monkeypatch.setattr("sys.argv", ["/srv/job.py", "--token", "s3cr3t"])
    assert processes.own_command().endswith(" /srv/job.py")
    uvm("exec", "nobody", "-e", "TOKEN=s3cr3t", "--", "prog", "s3cr3t")
    assert processes.own_command() == "uvm exec"


def test_values_are_shown_in_help_as_they_are_written(uvm: Uvm) -> None:
    assert "256M" in uvm("start", "--help").stdout
    assert "x>" not in "".join(uvm(name, "--help").stdout for name in command.list_commands(click.Context(command)))
