"""The receiving end of a copy. It believes nothing that the other end says: that may be a hostile guest.

A name is one component, and the names of a folder come in ascending order, so that none comes twice. Every folder is
opened once, through the one that it is in and without following a link, and what is made is made through its
descriptor: nothing outside of the destination can be reached, whatever is put in the way meanwhile.

Nothing has its final name before it is complete. A file gets it by link(2) or rename(2) when its end has come; a new
folder is filled under a name of its own (`.NAME.uvm-…`) and gets its name with all that is in it. An end without its
`DONE`, an error or a cancellation removes what has no final name yet. What was complete before stays, if it was
copied into a folder that was there.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NamedTuple

from utilityvm.files.records import (
    DATA,
    FILE,
    FILE_END,
    FOLDER,
    LINK,
    MAX_DEPTH,
    OFFSET,
    CopyFault,
    Counts,
    Decoder,
    Head,
    kind_of,
    read_head,
)

KEEP, REFUSE, SKIP = "keep", "refuse", "skip"
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_TMPFILE: Final = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT, errno.EPERM)
_ALREADY: Final = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)


@dataclass(slots=True)
class Rules:
    """What a receiver makes of what it is sent."""

    links: str = REFUSE  # that lead out of what is copied: KEEP, REFUSE or SKIP
    is_trusted: bool = False  # else set-user-id, set-group-id and sticky bits are dropped
    is_durable: bool = False  # a name survives a crash of the system only with its content
    max_bytes: int | None = None  # of data: holes do not count
    max_entries: int | None = None


class _Folder(NamedTuple):
    fd: int
    head: Head | None  # what is to be set when it is complete; None: it was there
    is_new: bool  # all of it is below a name that is not the final one
    shown: str


class _NewTree(NamedTuple):
    """The new folder that has not got its name yet."""

    parent: int
    temporary: bytes
    name: bytes


class NewFile:
    """A file that has no name, or not its final one, until it is `named`."""

    def __init__(self, folder: int, name: bytes, *, at_once: bool = False) -> None:
        """With `at_once` it has its name from the beginning: the folder itself has none yet."""
        self._folder = folder
        self._name = name
        self._temporary: bytes | None = None
        self._is_named = at_once
        if at_once:
            self.fd = os.open(name, _NEW, 0o600, dir_fd=folder)
            return
        try:
            self.fd = os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=folder)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
            self._temporary = temporary_name(name)
            self.fd = os.open(self._temporary, _NEW, 0o600, dir_fd=folder)

    def write(self, data: bytes | memoryview, at: int) -> None:
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self.fd, rest, at)
            rest, at = rest[written:], at + written

    def named(self, *, is_durable: bool) -> None:
        """It is complete: give it its name, in place of a file or link of that name.

        Raises:
            CopyFault: a folder has that name.
        """
        if self._is_named:
            os.close(self.fd)
            self.fd = -1
            return
        if is_durable:
            os.fdatasync(self.fd)
        if self._temporary is None:
            source = f"/proc/self/fd/{self.fd}"
            try:
                os.link(source, self._name, dst_dir_fd=self._folder, follow_symlinks=True)
                self._is_named = True
            except FileExistsError:
                temporary = temporary_name(self._name)
                os.link(source, temporary, dst_dir_fd=self._folder, follow_symlinks=True)
                self._temporary = temporary
        if self._temporary is not None:
            rename(self._folder, self._temporary, self._name)
            self._temporary = None
        os.close(self.fd)
        self.fd = -1

    def drop(self) -> None:
        """It is not going to be complete. Named before is nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self._temporary is not None:
            with suppress(OSError):
                os.unlink(self._temporary, dir_fd=self._folder)


class Receiver:
    """Makes at `target` what a stream says. Feed it, `finish` it, and `close` it whatever happened.

    If `target` is a folder and the stream holds no `contents`, what is sent gets the name `base` in it; else `target`
    is its name. `contents` are those of a folder, and go into `target`, which is made if it is not there.
    """

    def __init__(self, target: str, *, base: str, contents: bool, rules: Rules) -> None:
        self.counts = Counts()
        self._target = target
        self._base = os.fsencode(base)
        self._contents = contents or self._base in (b"", b".", b"..")
        self._rules = rules
        self._is_root = os.geteuid() == 0
        self._decoder = Decoder()
        self._folders: list[_Folder] = []
        self._names: list[bytes] = []  # the last one in each of them
        self._tree: _NewTree | None = None
        self._file: NewFile | None = None
        self._file_is_open = False  # else its end has come, and it waits for its name
        self._file_head = Head(0, 0, 0, 0)
        self._file_end = 0
        self._top = -1  # the folder that the first entry is made in
        self._entries = 0
        self._has_begun = False
        self._is_done = False

    def feed(self, data: bytes) -> None:
        """Take some of the stream.

        Raises:
            CopyFault: it is none, or something of it may not be made.
            OSError: something of it cannot be made; has its path.
        """
        for kind, payload in self._decoder.feed(data):
            if self._is_done:
                raise CopyFault("broken", "the stream goes on after its end")
            self._take(kind, payload)

    def finish(self) -> Counts:
        """The stream has ended, and its sender has not failed: what was the first entry gets its name.

        Raises:
            CopyFault: it ended in the middle; or somebody else has made something of that name meanwhile.
            OSError: it cannot get its name.
        """
        if not self._is_done:
            raise CopyFault("broken", "the stream ended before all was said")
        try:
            self._name_tree()
            if self._file:
                self._file.named(is_durable=self._rules.is_durable)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._target) from None
        return self.counts

    def close(self) -> None:
        """Let go of everything, and remove what is not complete."""
        if self._file:
            self._file.drop()
            self._file = None
        for folder in self._folders:
            os.close(folder.fd)
        self._folders.clear()
        if self._tree:
            shutil.rmtree(os.fsdecode(self._tree.temporary), ignore_errors=True, dir_fd=self._tree.parent)
            self._tree = None
        if self._top >= 0:
            os.close(self._top)
            self._top = -1

    def _take(self, kind: bytes, payload: bytes) -> None:
        if self._file is not None and self._file_is_open:
            if kind == DATA:
                self._data(self._file, payload)
            elif kind == FILE_END:
                self._end_file(self._file, payload)
            else:
                raise CopyFault("broken", "the stream leaves a file before its end")
            return
        match kind:
            case b"f" | b"d" | b"l":
                self._count_one()
                self._entry(kind, *read_head(payload))
            case b"u" if self._folders:
                self._end_folder()
            case b"s":
                self._count_one()
                self.counts.skip(os.fsdecode(payload))
            case b"Z" if self._has_begun and not self._folders:
                self._is_done = True
            case _:
                raise CopyFault("broken", f"the stream has {kind!r} where that cannot be")

    def _count_one(self) -> None:
        self._entries += 1
        if self._rules.max_entries is not None and self._entries > self._rules.max_entries:
            raise CopyFault("limit", f"there are more than {self._rules.max_entries} files, folders and links")

    # Where an entry is made.

    def _entry(self, kind: bytes, head: Head, rest: bytes) -> None:
        target, _, name = rest.partition(b"\0") if kind == LINK else (b"", b"", rest)
        if not self._has_begun:
            if name:
                raise CopyFault("broken", "the first entry of the stream has a name")
            self._has_begun = True
            self._first(kind, head, target)
            return
        if not self._folders:
            raise CopyFault("broken", "the stream has two first entries")
        if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
            raise CopyFault("unsafe", f"{_shown(name)} is no name of a file, and may lead out of the destination")
        if name <= self._names[-1]:
            raise CopyFault("broken", f"{_shown(name)} comes twice, or out of order")
        self._names[-1] = name
        folder = self._folders[-1]
        shown = f"{folder.shown}/{os.fsdecode(name)}"
        self._make(kind, head, target, folder.fd, name, shown, is_new=folder.is_new)

    def _first(self, kind: bytes, head: Head, target: bytes) -> None:
        try:
            folder = os.open(self._target, _FOLDER)
        except (FileNotFoundError, NotADirectoryError) as error:
            self._first_is_target(kind, head, target, error)
            return
        if self._contents:
            if kind != FOLDER:
                os.close(folder)
                raise CopyFault("broken", "what was sent is no folder")
            self._enter(_Folder(folder, None, False, self._target.rstrip("/")))
            return
        self._top = folder
        shown = f"{self._target.rstrip('/')}/{os.fsdecode(self._base)}"
        self._make(kind, head, target, folder, self._base, shown, is_new=False)

    def _first_is_target(self, kind: bytes, head: Head, target: bytes, error: OSError) -> None:
        """The destination is no folder: it is the new name."""
        parent, name = os.path.split(self._target.rstrip("/"))
        if self._target.endswith("/") and (kind != FOLDER or isinstance(error, NotADirectoryError)):
            raise CopyFault("refused", f"{self._target} is no folder")
        try:
            self._top = os.open(parent or ".", _FOLDER)
        except OSError as reason:
            raise OSError(reason.errno, reason.strerror, parent or ".") from None
        self._make(kind, head, target, self._top, os.fsencode(name), self._target.rstrip("/"), is_new=False)

    # What is made.

    def _make(
        self, kind: bytes, head: Head, target: bytes, folder: int, name: bytes, shown: str, *, is_new: bool
    ) -> None:
        try:
            if kind == FILE:
                if not is_new:
                    refuse_others(folder, name, shown)
                self._file = NewFile(folder, name, at_once=is_new)
                self._file_is_open, self._file_head, self._file_end = True, head, 0
            elif kind == FOLDER:
                self._new_folder(head, folder, name, shown, is_new=is_new)
            else:
                self._link(head, target, folder, name, shown, is_new=is_new)
        except OSError as error:
            raise OSError(error.errno, error.strerror, shown) from None

    def _enter(self, folder: _Folder) -> None:
        if len(self._folders) >= MAX_DEPTH:
            os.close(folder.fd)
            raise CopyFault("limit", f"{folder.shown} is in more than {MAX_DEPTH} folders")
        self._folders.append(folder)
        self._names.append(b"")

    def _new_folder(self, head: Head, parent: int, name: bytes, shown: str, *, is_new: bool) -> None:
        if is_new:
            os.mkdir(name, 0o700, dir_fd=parent)
            self._enter(_Folder(os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=parent), head, True, shown))
            self.counts.folders += 1
            return
        try:
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            temporary = temporary_name(name)
            os.mkdir(temporary, 0o700, dir_fd=parent)
            self._tree = _NewTree(parent, temporary, name)
            self._enter(_Folder(os.open(temporary, _FOLDER | os.O_NOFOLLOW, dir_fd=parent), head, True, shown))
            self.counts.folders += 1
            return
        if not stat.S_ISDIR(status.st_mode):
            raise CopyFault("refused", f"{shown} is there already, and is no folder")
        self._enter(_Folder(os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=parent), None, False, shown))

    def _end_folder(self) -> None:
        folder = self._folders.pop()
        self._names.pop()
        try:
            if folder.head is not None:
                self._set(folder.fd, folder.head)
            if self._folders and not self._folders[-1].is_new:
                self._name_tree()
        except OSError as error:
            raise OSError(error.errno, error.strerror, folder.shown) from None
        finally:
            os.close(folder.fd)

    def _name_tree(self) -> None:
        """A new folder is complete, if there is one."""
        if self._tree:
            if self._rules.is_durable:
                _sync_filesystem(self._tree.parent)
            rename(self._tree.parent, self._tree.temporary, self._tree.name)
            self._tree = None

    def _link(self, head: Head, target: bytes, folder: int, name: bytes, shown: str, *, is_new: bool) -> None:
        if self._rules.links != KEEP and leads_out(target, depth=max(len(self._folders) - 1, 0)):
            text = f"the link {shown} leads out of what is copied, to {_shown(target)}"
            if self._rules.links == REFUSE:
                raise CopyFault("unsafe", text)
            self.counts.skip(text)
            return
        made = name if is_new else temporary_name(name)
        if not is_new:
            refuse_others(folder, name, shown)
        os.symlink(target, made, dir_fd=folder)
        try:
            if self._is_root:
                os.chown(made, head.uid, head.gid, dir_fd=folder, follow_symlinks=False)
            os.utime(made, ns=(head.mtime_ns, head.mtime_ns), dir_fd=folder, follow_symlinks=False)
            if not is_new:
                rename(folder, made, name)
        except BaseException:
            with suppress(OSError):
                os.unlink(made, dir_fd=folder)
            raise
        self.counts.links += 1

    def _data(self, file: NewFile, payload: bytes) -> None:
        at = OFFSET.unpack_from(payload)[0] if len(payload) > OFFSET.size else -1
        size = len(payload) - OFFSET.size
        if at < self._file_end or at + size >= 1 << 63:
            raise CopyFault("broken", "the data of a file is out of order, or none")
        self.counts.bytes += size
        if self._rules.max_bytes is not None and self.counts.bytes > self._rules.max_bytes:
            raise CopyFault("limit", f"it is more than {self._rules.max_bytes} bytes")
        try:
            file.write(memoryview(payload)[OFFSET.size :], at)
        except OSError as error:
            raise self._of_file(error) from None
        self._file_end = at + size

    def _end_file(self, file: NewFile, payload: bytes) -> None:
        size = OFFSET.unpack(payload)[0] if len(payload) == OFFSET.size else -1
        if not self._file_end <= size < 1 << 63:
            raise CopyFault("broken", "a file ends before its data")
        try:
            if size > self._file_end:
                os.ftruncate(file.fd, size)
            self._set(file.fd, self._file_head)
            if self._folders:
                file.named(is_durable=self._rules.is_durable)
                self._file = None
        except OSError as error:
            raise self._of_file(error) from None
        self._file_is_open = False
        self.counts.files += 1

    def _of_file(self, error: OSError) -> OSError:
        where = self._target
        if self._folders:
            where = f"{self._folders[-1].shown}/{os.fsdecode(self._names[-1])}"
        return OSError(error.errno, error.strerror, where)

    def _set(self, fd: int, head: Head) -> None:
        """Owner, mode and time; the owner first, for that takes bits out of the mode."""
        if self._is_root:
            with suppress(PermissionError):  # a file system without owners, such as vfat
                os.fchown(fd, head.uid, head.gid)
        with suppress(PermissionError):
            os.fchmod(fd, head.mode if self._rules.is_trusted else head.mode & 0o777)
        os.utime(fd, ns=(head.mtime_ns, head.mtime_ns))


def leads_out(target: bytes, *, depth: int) -> bool:
    """May a link to `target`, which is so many folders deep in what is copied, lead out of that?

    One that goes up after it went down does so if what it went down is a link; so none of these stays for certain.
    """
    if target.startswith(b"/"):
        return True
    parts = [part for part in target.split(b"/") if part not in (b"", b".")]
    ups = next((at for at, part in enumerate(parts) if part != b".."), len(parts))
    return ups > depth or b".." in parts[ups:]


def temporary_name(name: bytes) -> bytes:
    """A name that nothing has, for what is to be called `name`."""
    return b".%s.uvm-%s" % (name[:200], os.urandom(6).hex().encode())


def refuse_others(folder: int, name: bytes, shown: str) -> None:
    """Only a file or a link is replaced, and no link to a device: `/dev/null` and `/dev/stdout` stay what they are.

    Raises:
        CopyFault: something else is where a file or a link is to be.
    """
    try:
        mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        try:
            mode = os.stat(name, dir_fd=folder).st_mode
        except OSError:
            return  # it leads nowhere
        if stat.S_ISDIR(mode):
            return
    if not stat.S_ISREG(mode):
        raise CopyFault("refused", f"{shown} is there already, and is {kind_of(mode)}")


def rename(folder: int, old: bytes, new: bytes) -> None:
    """Raises:
    CopyFault: something else of another kind has got the new name meanwhile.
    """
    try:
        os.rename(old, new, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError as error:
        if error.errno in _ALREADY:
            raise CopyFault("refused", f"{_shown(new)} was made by somebody else meanwhile") from None
        raise


def _sync_filesystem(fd: int) -> None:
    import ctypes  # late: only the guest needs it

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(fd):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _shown(name: bytes) -> str:
    return repr(os.fsdecode(name[:200]))
