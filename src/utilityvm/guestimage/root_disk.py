"""The root disk: an ext4 file system, made from a tree of files without mounting anything.

What went in decides what comes out: times, ids and seeds are the recipe's, and everything in it is root's. mkfs copies
the owners and change times that it sees, and a plain user's tree is the user's. So debugfs writes these afterwards,
which needs no privilege and no user namespace (both may be denied; the mkfs of Debian 12 cannot read an archive).
"""

from __future__ import annotations

import os
import re
import stat
import uuid
from pathlib import Path
from typing import Final

from utilityvm.errors import SetupError
from utilityvm.guestimage import recipe
from utilityvm.machine.programs import find_program, run

_BLOCK: Final = 4096
_SPARE_KIB: Final = 4096
# Not the host's /etc/mke2fs.conf, which its owner may change.
_MKE2FS_CONF: Final = """\
[defaults]
    base_features = sparse_super,large_file,filetype,dir_index,ext_attr
    default_mntopts = acl,user_xattr
    inode_size = 256
[fs_types]
    ext4 = {
        features = extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize
    }
"""


def write(root: Path, target: Path, *, key: str) -> None:
    """Make `target` a file system with the tree `root`. The same tree and `key` give the same bytes.

    Raises:
        SetupError: mkfs.ext4 is missing or failed.
    """
    paths = sorted(root.rglob("*"))
    for path in (root, *paths):
        os.utime(path, (recipe.TIME, recipe.TIME), follow_symlinks=False)
    used_kib = sum(_blocks(path) * _BLOCK // 1024 + 1 for path in paths)
    ids = str(uuid.uuid5(uuid.NAMESPACE_OID, key))
    # fmt: off
    command: list[str | Path] = [
        find_program("mkfs.ext4", package="e2fsprogs"), "-q", "-F",
        "-L", recipe.ROOT_LABEL,
        "-U", ids,
        "-b", str(_BLOCK),
        "-m", "0",
        "-N", str(len(paths) + 64),
        "-O", "^has_journal,^resize_inode",
        "-E", f"root_owner=0:0,hash_seed={ids},lazy_itable_init=0,nodiscard",
        "-d", root,
        target, f"{used_kib * 105 // 100 + _SPARE_KIB}k",
    ]
    # fmt: on
    config = target.with_name(f"{target.name}.mke2fs.conf")
    config.write_text(_MKE2FS_CONF)
    env = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "E2FSPROGS_FAKE_TIME": str(recipe.TIME),
        "MKE2FS_CONFIG": str(config),
        "LC_ALL": "C",  # mkfs takes the files of a folder in the order of their names
    }
    run(command, env=env)
    config.unlink()
    _make_the_same([path.relative_to(root) for path in paths], target, env)


def _blocks(path: Path) -> int:
    """How many blocks the file takes. What a folder's size says is the builder's file system's own affair."""
    status = path.lstat()
    return -(-status.st_size // _BLOCK) if stat.S_ISREG(status.st_mode) else 1


def _make_the_same(names: list[Path], target: Path, env: dict[str, str]) -> None:
    # As root too, whose files they are already: the superblock counts what is written.
    fields = {"ctime": f"@{recipe.TIME}", "uid": "0", "gid": "0"}
    lines = [f'set_inode_field "/{name}" {field} {value}' for name in names for field, value in fields.items()]
    debugfs = find_program("debugfs", package="e2fsprogs")
    run([debugfs, "-w", "-f", "-", target], stdin="\n".join(lines).encode(), env=env)
    # debugfs ends with 0 whatever it did: look at what was to be done last.
    done = run([debugfs, "-R", f'stat "/{names[-1]}"', target], env=env).decode() if names else ""
    if names and not re.search(r"User: +0 +Group: +0 ", done):
        raise SetupError(f"debugfs could not give the files in {target} to root", remedy="build the image as root")
