from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from utilityvm.errors import SetupError
from utilityvm.guestimage.cache import new_folder, one_builder, whole_folders
from utilityvm.machine.programs import CommandFailed, find_program, run


def test_a_folder_gets_its_name_when_it_is_done(tmp_path: Path) -> None:
    with new_folder(tmp_path, "a", space_bytes=0) as folder:
        (folder / "file").write_text("text")
        assert whole_folders(tmp_path) == []
    assert whole_folders(tmp_path) == [tmp_path / "a"]
    assert (tmp_path / "a/file").read_text() == "text"


def test_nothing_is_left_of_a_folder_that_failed(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed), new_folder(tmp_path, "a", space_bytes=0) as folder:
        run(["sh", "-c", f"echo text > {folder}/file; false"])
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_is_a_typed_error(tmp_path: Path) -> None:
    with (
        pytest.raises(SetupError, match=r"could not be written .* Is a directory") as caught,
        new_folder(tmp_path, "a", space_bytes=0) as folder,
    ):
        folder.write_text("text")
    assert isinstance(caught.value.__cause__, IsADirectoryError)


def test_what_a_build_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".new-old/root/deep").mkdir(parents=True)
    with new_folder(tmp_path, "a", space_bytes=0):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_a_folder_that_was_not_whole_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/damaged").write_text("x")
    with new_folder(tmp_path, "a", space_bytes=0) as folder:
        (folder / "new").write_text("y")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["new"]


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with (
        pytest.raises(SetupError, match="needs 9000000000 MB") as caught,
        new_folder(tmp_path, "a", space_bytes=9 * 10**15),
    ):
        pytest.fail("it went on")
    assert caught.value.remedy
    assert list(tmp_path.iterdir()) == []


_FILL = """
import sys
from pathlib import Path
from utilityvm.errors import SetupError
from utilityvm.guestimage.cache import new_folder
from utilityvm.machine.programs import run
parent = Path(sys.argv[1])
try:
    with new_folder(parent, "a", space_bytes=6_000_000) as folder:
        if sys.argv[2] == "self":
            (folder / "big").write_bytes(bytes(16 << 20))
        else:
            run(["dd", "if=/dev/zero", f"of={folder}/big", "bs=1M", "count=16"])
except SetupError as error:
    print(error, "|", error.remedy, "|", len(list(parent.iterdir())))
"""


@pytest.mark.parametrize("who", ["self", "program"])
def test_a_disk_that_fills_up_is_said_with_what_is_needed(tmp_path: Path, who: str) -> None:
    unshare = [str(find_program("unshare", package="util-linux")), "--mount"]
    if os.geteuid():
        unshare += ["--user", "--map-root-user"]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        if os.environ.get("CI"):
            pytest.fail("no namespaces")
        pytest.skip("no namespaces, and so no small file system to fill")
    script = 'mount -t tmpfs -o size=8M small "$1" && exec "$2" -c "$3" "$1" "$4"'
    said = run([*unshare, "sh", "-c", script, "sh", tmp_path, sys.executable, _FILL, who]).decode()
    assert "needs 6 MB to build" in said
    assert "make room" in said
    assert said.rstrip().endswith("| 0"), "something was left"


def _hold(lock: Path, held: Event) -> None:
    with one_builder(lock, waiting=lambda: None):
        held.set()
        signal.pause()


def test_a_second_builder_waits_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    holder = context.Process(target=_hold, args=(tmp_path / "lock", held))
    holder.start()
    assert held.wait(30)
    waited: list[bool] = []

    def end_the_other() -> None:
        waited.append(True)
        holder.kill()

    with one_builder(tmp_path / "lock", waiting=end_the_other):
        assert waited == [True]
    holder.join()


def test_a_cache_that_cannot_be_made_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(SetupError, match="cannot write to the cache") as caught,
        one_builder(tmp_path / "file/lock", waiting=lambda: None),
    ):
        pytest.fail("it went on")
    assert "XDG_CACHE_HOME" in (caught.value.remedy or "")
