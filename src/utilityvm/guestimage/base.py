"""The base: Debian's packages as a tree of files, before the agent.

Fetched and unpacked by mmdebstrap, without any package's own scripts, so that neither root nor a user namespace is
needed; what those scripts would have made is in the recipe. Everything in the tree is root's and has one time, and no
program is set-user-id, so a tree made by root and one made by a user are the same.

Nothing of the builder's is in it. mmdebstrap puts files of the host into its tree (resolv.conf, hostname, apt's sources
with their proxies and passwords) before it unpacks the first package. All files that are there by then are left out.
"""

from __future__ import annotations

import functools
import json
import shlex
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from utilityvm.errors import InvalidRequest, SetupError
from utilityvm.guestimage import recipe, sources
from utilityvm.guestimage.recipe import Architecture
from utilityvm.machine import programs
from utilityvm.machine.programs import CommandFailed, find_program

ARCHIVE: Final = "root.tar"
PACKAGES: Final = "packages.json"
_LIST: Final = "packages.list"
_BUILDERS: Final = "builders.list"  # the files that were in the tree before any package was
_FETCH_S: Final = 3600.0
run: Final = functools.partial(programs.run, umask=0o022)  # what programs make is the same for every builder
_MODULE_SUFFIXES: Final = (".ko", ".ko.xz", ".ko.gz", ".ko.zst")


def make(
    folder: Path,
    *,
    arch: Architecture,
    suite: str,
    report: Callable[[str, float], None],
    packages: Sequence[str] = (),
    kernel: str | None = None,
) -> None:
    """Write the base's archive and the list of its packages into `folder`. Half done if it fails.

    `packages` come on top of the recipe's. A `kernel` in place of the recipe's keeps all its modules.

    Raises:
        SetupError: a program, a source or the network is missing.
    """
    report("fetching Debian packages", 0.02)
    fetched = folder / "fetched"
    fetched.mkdir()
    _fetch(fetched, [*recipe.PACKAGES, *packages, kernel or arch.kernel_package], arch=arch, suite=suite)
    report("leaving out what no VM needs", 0.5)
    versions = _versions((fetched / _LIST).read_text())
    builders = frozenset(line.removeprefix("./") for line in (fetched / _BUILDERS).read_text().splitlines())
    _trim(fetched / "all.tar", folder / "trimmed.tar", leave_out=builders, all_modules=kernel is not None)
    shutil.rmtree(fetched)
    root = folder / "root"
    unpack(folder / "trimmed.tar", root)
    (folder / "trimmed.tar").unlink()
    report("compiling the standard library", 0.55)
    _configure(root)
    compile_ahead(root, arch, library(root))
    run([find_program("depmod", package="kmod"), "-b", root, modules(root).name])
    report("packing", 0.75)
    _pack(root, folder / ARCHIVE)
    shutil.rmtree(root)
    (folder / PACKAGES).write_text(json.dumps(versions, indent=1))


def unpack(archive: Path, root: Path) -> None:
    """The tree of an archive that is ours, so its names need no check. Owned by whoever unpacks it."""
    root.mkdir()
    root.chmod(0o755)
    # GNU tar: the standard library's takes another set of arguments with every release of Python.
    run([find_program("tar", package="tar"), "-xpf", archive, "-C", root, "--no-same-owner"])


def library(root: Path) -> Path:
    """The guest's standard library of Python."""
    (found,) = (path for path in (root / "usr/lib").glob("python3.*") if path.is_dir())
    return found


def modules(root: Path) -> Path:
    """The guest's kernel modules."""
    (found,) = (root / "lib/modules").iterdir()
    return found


def compile_ahead(root: Path, arch: Architecture, folder: Path) -> None:
    """Compile `folder` with the guest's own python, which may be another than the host's."""
    loader = root / arch.loader
    libraries = [root / "lib" / loader.parent.name, root / "usr/lib" / loader.parent.name]
    python = root / "usr/bin" / library(root).name
    command: list[str | Path] = [loader, "--library-path", ":".join(map(str, libraries)), python]
    # -B: what it imports itself would be cached by time, be taken for done, and be stale in the guest.
    # Unchecked: nobody edits a source on a read-only disk, so none need be looked at.
    command += ["-B", "-S", "-s", "-P", "-m", "compileall", "-q", "-f", "--invalidation-mode", "unchecked-hash"]
    command += ["-s", root, "-p", "/", folder]
    run(command, env={"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"})


def _fetch(folder: Path, packages: Sequence[str], *, arch: Architecture, suite: str) -> None:
    program = find_program("mmdebstrap", package="mmdebstrap")
    (folder / "debian.sources").write_text(sources.debian_sources(suite))
    (folder / "apt.conf").write_text(sources.apt_settings())
    command: list[str | Path] = [
        program,
        "--mode=chrootless",  # nothing is run in the tree; this mode alone needs neither root nor namespaces
        "--skip=check/chrootless",  # newer ones refuse it to root, for what packages might run: here nothing is
        "--variant=extract",
        f"--architectures={arch.debian}",
        f"--include={','.join(dict.fromkeys(packages))}",
        f"--aptopt={folder / 'apt.conf'}",
        f'--setup-hook=cd "$1" && find . -type f > {shlex.quote(str(folder / _BUILDERS))}',
        f'--extract-hook=ls "$1/var/cache/apt/archives" > {shlex.quote(str(folder / _LIST))}',
        suite,
        folder / "all.tar",
        folder / "debian.sources",
    ]
    try:
        # Its tree, some 700 MB, is made where TMPDIR says: /tmp may be small, or memory.
        run(command, env={"TMPDIR": str(folder), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, timeout_s=_FETCH_S)
    except CommandFailed as error:
        said = [line for line in error.output.splitlines() if line.startswith("E:")]
        if unknown := [line.split()[-1] for line in said if "Unable to locate package" in line]:
            raise InvalidRequest(
                f"there is no package {unknown[0]} in Debian {suite}",
                remedy="see apt-cache search; or fetch the newest lists: apt-get update",
            ) from error
        raise SetupError(
            f"the guest's packages could not be fetched: {said[0] if said else error}",
            remedy=f"does `apt-get update` work? mmdebstrap was run as: {error.command}",
        ) from error


def _is_kept(name: str, *, all_modules: bool) -> bool:
    if name.startswith(recipe.LEFT_OUT):
        return False
    _, found, inside = name.partition("/kernel/")
    if "lib/modules/" in name and found and not all_modules and name.endswith(_MODULE_SUFFIXES):
        return inside.startswith(recipe.MODULE_FOLDERS) and not inside.startswith(recipe.MODULES_LEFT_OUT)
    return True


def _trim(source: Path, target: Path, *, leave_out: frozenset[str], all_modules: bool) -> None:
    """Copy what the recipe keeps."""
    with tarfile.open(source) as everything, tarfile.open(target, "w") as kept:
        for member in everything:
            member.name = member.name.removeprefix("./").rstrip("/")
            if member.name in ("", ".") or member.isdev() or member.name in leave_out:
                continue
            if not _is_kept(member.name, all_modules=all_modules):
                continue
            member.mode = member.mode & 0o1777 | (0o700 if member.isdir() else 0o400)  # the builder has to read it
            if member.islnk():
                member.linkname = member.linkname.removeprefix("./")
            kept.addfile(member, everything.extractfile(member) if member.isreg() else None)


def _versions(listing: str) -> dict[str, str]:
    """From the names of package files: `name_version_architecture.deb`, the version with its colon as %3a."""
    parts = (line.removesuffix(".deb").split("_") for line in listing.split() if line.endswith(".deb"))
    packages = {name: unquote(version) for name, version, _ in parts}
    if not packages:
        raise SetupError("mmdebstrap did not say which packages it fetched", remedy="report this, with its version")
    return packages


def _configure(root: Path) -> None:
    for name, mode in recipe.FOLDERS.items():
        make_folder(root, name, mode)
    for name, (text, mode) in recipe.FILES.items():
        (root / name).unlink(missing_ok=True)
        (root / name).write_text(text)
        (root / name).chmod(mode)
    for name, link in recipe.LINKS.items():
        path = root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(link)
    for unused in recipe.LIBRARIES_LEFT_OUT:
        shutil.rmtree(library(root) / unused, ignore_errors=True)
    for applet in run([busybox(root), "--list"]).decode().split():
        places = [root / folder / applet for folder in ("usr/bin", "usr/sbin", "bin", "sbin")]
        if applet not in recipe.APPLETS_LEFT_OUT and not any(place.is_symlink() or place.exists() for place in places):
            places[0].symlink_to("/bin/busybox")


def make_folder(root: Path, name: str, mode: int | None = None) -> None:
    """A folder below `root`, of this mode if one is given. What is missing is made, whatever the builder's umask."""
    path = root / name
    for missing in [each for each in (*reversed(path.parents), path) if not each.exists()]:
        missing.mkdir()
        missing.chmod(0o755)
    if mode is not None:
        path.chmod(mode)


def busybox(root: Path) -> Path:
    """The guest's static busybox, which also runs on the host."""
    return next(path for path in (root / "usr/bin/busybox", root / "bin/busybox") if path.exists())


def _pack(root: Path, target: Path) -> None:
    same = ("--sort=name", f"--mtime=@{recipe.TIME}", "--owner=0", "--group=0", "--numeric-owner", "--format=gnu")
    names = sorted(path.name for path in root.iterdir())
    run([find_program("tar", package="tar"), *same, "-cf", target, "-C", root, *names])
