"""A /proc of processes that are not there: what they have open, stand in and mapped, and their mount namespaces."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

INIT = 1


class FakeProc:
    """Processes below a folder that is written as proc(5) says. Process 1 is there from the beginning."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._threads: dict[int, list[int]] = {}  # the children of each
        self.process(INIT, "init", parent=0)

    def process(
        self,
        pid: int,
        name: str,
        *,
        parent: int = INIT,
        cwd: str = "/",
        root: str = "/",
        exe: str = "/bin/true",
        opened: Mapping[int, tuple[str, int]] | None = None,
        mapped: Sequence[str] = (),
        namespace: int = 1,
        mountinfo: str = "",
    ) -> None:
        """Start one; `opened` are its descriptors, each a path and the id of the mount that it was opened by."""
        base = self.folder / str(pid)
        for made in ("fd", "fdinfo", "map_files", "ns", f"task/{pid}"):
            (base / made).mkdir(parents=True)
        (base / "comm").write_text(f"{name}\n")
        (base / "mountinfo").write_text(mountinfo)
        (base / "ns/mnt").symlink_to(f"mnt:[{namespace}]")
        for link, to in (("cwd", cwd), ("root", root), ("exe", exe)):
            (base / link).symlink_to(to)
        for fd, (path, mount) in (opened or {}).items():
            (base / f"fd/{fd}").symlink_to(path)
            (base / f"fdinfo/{fd}").write_text(f"pos:\t0\nflags:\t02\nmnt_id:\t{mount}\nino:\t12\n")
        for number, path in enumerate(mapped):
            (base / f"map_files/{number}-{number + 1}").symlink_to(path)
        self._threads[pid] = []
        (base / f"task/{pid}/children").touch()
        if parent:
            self._threads[parent].append(pid)
            children = " ".join(map(str, self._threads[parent]))
            (self.folder / f"{parent}/task/{parent}/children").write_text(f"{children} ")

    def thread(self, pid: int, number: int, opened: Mapping[int, tuple[str, int]], *, is_last: bool = False) -> None:
        """Another thread of it, with files of its own; `is_last`: the first one has ended, and shows no files."""
        base = self.folder / f"{pid}/task/{number}"
        for made in ("fd", "fdinfo"):
            (base / made).mkdir(parents=True)
        (base / "children").touch()
        for fd, (path, mount) in opened.items():
            (base / f"fd/{fd}").symlink_to(path)
            (base / f"fdinfo/{fd}").write_text(f"pos:\t0\nflags:\t02\nmnt_id:\t{mount}\nino:\t12\n")
        if is_last:
            shutil.rmtree(self.folder / f"{pid}/fd")

    def swaps(self, *paths: str) -> None:
        """What is swapped to."""
        lines = "".join(f"{path}\tpartition\t1024\t0\t-2\n" for path in paths)
        (self.folder / "swaps").write_text(f"Filename\tType\tSize\tUsed\tPriority\n{lines}")

    def sockets(self, *paths: str) -> None:
        """The bound and the unbound ("") Unix sockets."""
        lines = "".join(f"0000000000000000: 00000002 00000000 00010000 0001 01 {99} {path}\n" for path in paths)
        (self.folder / "net").mkdir(exist_ok=True)
        (self.folder / "net/unix").write_text(f"Num       RefCount Protocol Flags    Type St Inode Path\n{lines}")

    def end(self, pid: int) -> None:
        """It has ended, though its parent's list still has it, as when it ends while somebody looks."""
        shutil.rmtree(self.folder / str(pid))
