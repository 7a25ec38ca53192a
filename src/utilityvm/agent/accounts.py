"""Users of the guest: the one that a program runs as."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass

from utilityvm.agent.faults import Fault

_MAX_ID = (1 << 32) - 2  # -1 means "as it is" to the kernel


@dataclass(frozen=True)
class Account:
    """A user, with the groups and the environment that a login would give it."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    env: Mapping[str, str]

    @classmethod
    def of(cls, user: object) -> Account:
        """The user of that name, or of that number, which need not have a name.

        Raises:
            Fault: there is no such user.
        """
        if isinstance(user, bool) or not isinstance(user, int | str):
            raise Fault("User must be a name or a number", kind="invalid")
        text = str(user)
        is_number = text.isascii() and text.isdigit()
        if is_number and int(text) > _MAX_ID:
            raise Fault(f"{text[:20]} is no user: the highest number is {_MAX_ID}", kind="invalid")
        try:
            found = pwd.getpwuid(int(text)) if is_number else pwd.getpwnam(text)
        except (KeyError, ValueError):
            if is_number:
                return cls(int(text), int(text), (), {"HOME": "/"})
            raise Fault(f"the guest has no user {text[:100]!r}", kind="invalid") from None
        groups = tuple(os.getgrouplist(found.pw_name, found.pw_gid))
        env = {"HOME": found.pw_dir, "USER": found.pw_name, "LOGNAME": found.pw_name, "SHELL": found.pw_shell}
        return cls(found.pw_uid, found.pw_gid, groups, env)

    def become(self) -> None:
        """Make the calling process this user's, for good. For between fork and exec: only system calls are made."""
        os.setgroups(self.groups)
        os.setgid(self.gid)
        os.setuid(self.uid)
