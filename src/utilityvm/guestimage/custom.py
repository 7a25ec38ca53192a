"""A user's own recipe: what a guest image has beside what every guest image has."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

from utilityvm.errors import InvalidRequest, SetupError
from utilityvm.guestimage import base
from utilityvm.machine import hostpath
from utilityvm.machine.oserrors import typed_errors
from utilityvm.machine.programs import CommandFailed

_PACKAGE: Final = re.compile(r"[a-z0-9][a-z0-9.+-]+")  # Debian Policy, 5.6.1
_HOOK_S: Final = 600.0


@typed_errors
@dataclass(frozen=True, slots=True, kw_only=True)
class GuestRecipe:
    """What a guest image has besides what each has. Another recipe, or another content of a file, is another image.

    `packages` are names of Debian packages. They are unpacked with all that they depend on, and none of their scripts
    runs: users, alternatives and caches that those would make are for `files` and `hook`. `kernel` is the package of
    another kernel, such as `linux-image-amd64`; all its modules are kept. `files` gives paths in the guest and the
    files of this host that go there, as root's, executable if they are here. `hook` is a program of this host that is
    run with the folder of the guest's tree as its argument, after the files, and may change anything in it.
    """

    packages: tuple[str, ...] = ()
    kernel: str | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    hook: Path | None = None

    def __post_init__(self) -> None:
        """Raises:
        InvalidRequest: a name that no package has, or a path that is not absolute.
        """
        for name in (*self.packages, *(() if self.kernel is None else (self.kernel,))):
            if not _PACKAGE.fullmatch(name):
                raise InvalidRequest(f"{name!r} is not the name of a Debian package", remedy="see apt-cache search")
        for name in self.files:
            path = PurePosixPath(name)
            if not path.is_absolute() or ".." in path.parts or str(path) != name or name == "/":
                raise InvalidRequest(f"{name!r} is not the absolute path of a file", remedy="such as /etc/motd")

    @property
    def is_empty(self) -> bool:
        """Is it the recipe of every guest image?"""
        return self == GuestRecipe()

    def base_parts(self) -> list[bytes]:
        """What of it makes another base."""
        if not self.packages and self.kernel is None:
            return []
        return [
            b"own",
            *(name.encode() for name in sorted(set(self.packages))),
            b"kernel",
            (self.kernel or "").encode(),
        ]

    def image_parts(self) -> list[bytes]:
        """What of it makes another image of the same base: names, contents and modes.

        Raises:
            InvalidRequest: a file cannot be read.
        """
        parts: list[bytes] = []
        for name, path in sorted(self.files.items()):
            parts += [b"file", name.encode(), oct(_mode(path)).encode(), _content(path)]
        if self.hook is not None:
            content = _content(self.hook)
            if not os.access(self.hook, os.X_OK):
                raise InvalidRequest(f"the hook {self.hook} is not executable", remedy=f"chmod +x {self.hook}")
            parts += [b"hook", content]
        return parts

    def apply(self, root: Path) -> None:
        """Put the files into the tree, and run the hook on it.

        Raises:
            SetupError: the hook failed; the message has its last words.
        """
        for name, path in sorted(self.files.items()):
            target = root / name.removeprefix("/")
            _check_inside(root, target, name)
            base.make_folder(root, str(target.parent.relative_to(root)))
            target.unlink(missing_ok=True)
            target.write_bytes(_content(path))
            target.chmod(_mode(path))
        if self.hook is None:
            return
        try:
            base.run(
                [self.hook.absolute(), root],
                cwd=root,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": str(root.parent)},
                timeout_s=_HOOK_S,
            )
        except CommandFailed as error:
            raise SetupError(f"the hook {self.hook} failed: {error}", remedy="run it on a folder by hand") from error

    def document(self) -> dict[str, object]:
        """What the image's manifest says of it."""
        return {
            "packages": sorted(set(self.packages)),
            "kernel": self.kernel,
            "files": sorted(self.files),
            "hook": None if self.hook is None else self.hook.name,
        }


def _content(path: Path) -> bytes:
    try:
        with os.fdopen(hostpath.open_file(path, os.O_RDONLY), "rb") as file:
            return file.read()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}", remedy="give a file of this host") from error


def _mode(path: Path) -> int:
    return 0o755 if os.access(path, os.X_OK) else 0o644


def _check_inside(root: Path, target: Path, name: str) -> None:
    """The tree has links such as /var/run, and one to an absolute path would lead to this host's files."""
    if not target.parent.resolve().is_relative_to(root.resolve()):
        raise InvalidRequest(f"{name} is behind a link in the guest", remedy="give the path that it leads to")
