"""What is made for mounts, and stays as long as one of them needs it."""

from __future__ import annotations

import threading
from pathlib import Path, PurePosixPath

import pytest

from utilityvm.agent.faults import Fault
from utilityvm.agent.folders import Folders


def make(folders: Folders, path: Path, *, as_file: bool = False) -> list[str]:
    noted: list[list[str]] = []
    made = folders.make(PurePosixPath(path), as_file=as_file, note=noted.append)
    assert noted == [made]
    return made


def test_what_was_missing_is_made_and_removed(tmp_path: Path) -> None:
    folders, path = Folders(), tmp_path / "a/b"
    made = make(folders, path)
    assert made == [str(tmp_path / "a"), str(path)]
    assert path.is_dir()
    folders.give_back(str(path), made)
    folders.give_back(str(path), made)
    assert list(tmp_path.iterdir()) == []


def test_a_device_is_published_over_an_empty_file(tmp_path: Path) -> None:
    folders, path = Folders(), tmp_path / "a/disk"
    made = make(folders, path, as_file=True)
    assert path.is_file()
    folders.give_back(str(path), made)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_what_two_share_goes_with_the_last_of_them_whoever_made_it(tmp_path: Path, order: tuple[int, ...]) -> None:
    folders, paths = Folders(), [tmp_path / "a/b/1", tmp_path / "a/b/2", tmp_path / "a/3"]
    made = [make(folders, path) for path in paths]
    for number in order[:-1]:
        folders.give_back(str(paths[number]), made[number])
        assert all(paths[other].is_dir() for other in order[order.index(number) + 1 :])
    folders.give_back(str(paths[order[-1]]), made[order[-1]])
    assert list(tmp_path.iterdir()) == []


def test_what_somebody_put_there_stays_and_what_was_there_before(tmp_path: Path) -> None:
    folders, path = Folders(), tmp_path / "theirs/ours/disk"
    (tmp_path / "theirs").mkdir()
    made = make(folders, path)
    (tmp_path / "theirs/ours/file").write_text("theirs")
    folders.give_back(str(path), made)
    assert sorted(str(one.relative_to(tmp_path)) for one in tmp_path.rglob("*")) == [
        "theirs",
        "theirs/ours",
        "theirs/ours/file",
    ]
    other = make(folders, tmp_path / "theirs/ours/other")
    (tmp_path / "theirs/ours/file").unlink()
    folders.give_back(str(tmp_path / "theirs/ours/other"), other)
    assert (tmp_path / "theirs/ours").is_dir()  # it was theirs by then


def test_a_mount_of_the_agent_before_keeps_what_is_above_it(tmp_path: Path) -> None:
    folders, path = Folders(), tmp_path / "a/old"
    path.mkdir(parents=True)
    folders.use(str(path))
    folders.give_back(str(tmp_path / "a/new"), [str(tmp_path / "a")])
    assert path.is_dir()
    folders.give_back(str(path), [str(path)])
    assert list(tmp_path.iterdir()) == []


def test_a_link_and_what_is_of_the_other_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for name, as_file, match in (
        ("link/a", False, "symbolic link"),
        ("file", False, "no folder"),
        ("folder", True, "a folder"),
    ):
        with pytest.raises(Fault, match=match):
            make(Folders(), tmp_path / name, as_file=as_file)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    folders = Folders()
    with pytest.raises(OSError, match="too long"):
        make(folders, tmp_path / "a/b" / ("x" * 300))
    assert list(tmp_path.iterdir()) == []


def test_many_come_and_go_at_once(tmp_path: Path) -> None:
    folders, failures = Folders(), list[BaseException]()

    def come_and_go(number: int) -> None:
        path = tmp_path / f"a/b/{number}"
        try:
            for _ in range(300):
                made = make(folders, path)
                assert path.is_dir()
                folders.give_back(str(path), made)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=come_and_go, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(tmp_path.iterdir()) == []
