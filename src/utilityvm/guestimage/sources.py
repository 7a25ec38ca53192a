"""The host's own package sources, as far as they are Debian's: what the guest's packages are fetched from.

Other vendors' sources may stand beside them in /etc/apt (node, docker, a cloud's tools) and have no place in the guest.
A source is Debian's if the release file that apt has verified says so; before the first `apt-get update` there is none,
and then the key that signs it, or its address, tells. No address is written here: mirrors and proxies are the host's.

Source: sources.list(5), apt.conf(5).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from utilityvm.errors import SetupError
from utilityvm.machine.programs import find_program, run

_OPTIONS: Final = ("Signed-By", "Trusted", "Check-Valid-Until", "Valid-Until-Max", "Check-Date", "Snapshot")
_NOT_OURS: Final = ("IndexTargets", "Changelogs", "Languages", "CompressionTypes", "GzipIndexes", "cdrom")
_ONE_LINE: Final = re.compile(r"deb\s+(?:\[(?P<options>[^]]*)\]\s*)?(?P<uri>\S+)\s+(?P<suite>\S+)(?P<components>.*)")
_ESCAPED: Final = re.compile(r'[\\|{}\[\]<>"^~_=!@#$%&*]')


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A place of packages, as apt knows it."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    options: dict[str, str] = field(default_factory=dict)

    def stanza(self) -> str:
        lines = {"Types": "deb", "URIs": " ".join(self.uris), "Suites": " ".join(self.suites), "Components": "main"}
        return "".join(f"{name}: {value}\n" for name, value in {**lines, **self.options}.items())


def debian_sources(suite: str, *, etc: Path = Path("/etc/apt"), lists: Path = Path("/var/lib/apt/lists")) -> str:
    """The sources of Debian's `suite`, with its updates, as the text of a `.sources` file.

    Raises:
        SetupError: the host has none.
    """
    wanted = {f"{name}{rest}" for name in (suite, "stable") for rest in ("", "-updates", "-security", "/updates")}
    stanzas = []
    for source in _all_sources(etc):
        if "main" not in source.components:
            continue
        for uri in source.uris:
            suites = tuple(s for s in source.suites if s in wanted and _is_debian(uri, s, source.options, lists))
            if suites:
                options = {name: value for name, value in source.options.items() if name in _OPTIONS}
                stanzas.append(Source(uris=(uri,), suites=suites, components=("main",), options=options).stanza())
    if not any(re.search(rf"^Suites:.*\b({suite}|stable)( |$)", stanza, re.MULTILINE) for stanza in stanzas):
        raise SetupError(
            f"{etc} has no package source of Debian {suite}", remedy=f"add Debian's {suite} main, then apt-get update"
        )
    return "\n".join(stanzas)


def apt_settings(etc: Path = Path("/etc/apt")) -> str:
    """How the host's apt reaches its sources (proxies, certificates, passwords), as the text of an `apt.conf`."""
    lines = []
    dump = run([find_program("apt-config", package="apt"), "dump", "--no-empty", "--format", '%f "%v";%n', "Acquire"])
    for line in dump.decode().splitlines():
        if line.startswith("Acquire::") and not line.removeprefix("Acquire::").startswith(_NOT_OURS):
            lines.append(line)
    for name, path in (("netrc", etc / "auth.conf"), ("netrcparts", etc / "auth.conf.d")):
        if path.exists():
            lines.append(f'Dir::Etc::{name} "{path}";')
    return "".join(f"{line}\n" for line in lines)


def _all_sources(etc: Path) -> Iterator[Source]:
    for path in (etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))):
        if not path.is_file():
            continue
        if path.suffix == ".list":
            yield from _read_lines(path.read_text())
        elif path.suffix == ".sources":
            yield from _read_stanzas(path.read_text())


def _read_lines(text: str) -> Iterator[Source]:
    for line in text.splitlines():
        if found := _ONE_LINE.fullmatch(line.partition("#")[0].strip()):
            pairs = (word.partition("=") for word in (found["options"] or "").split())
            yield Source(
                uris=(found["uri"],),
                suites=(found["suite"],),
                components=tuple(found["components"].split()),
                options={name.title(): value for name, _, value in pairs},
            )


def _read_stanzas(text: str) -> Iterator[Source]:
    for block in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in block.splitlines():
            if line.startswith("#"):
                continue
            if line[:1] in (" ", "\t"):
                fields[name] = f"{fields.get(name, '')}\n{line}"  # a key may stand in the file itself, on many lines
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().title().replace("Uris", "URIs")
                fields[name] = value.strip()
        if "deb" in fields.get("Types", "").split() and fields.get("Enabled", "yes").lower() not in ("no", "false"):
            yield Source(
                uris=tuple(fields.get("URIs", "").split()),
                suites=tuple(fields.get("Suites", "").split()),
                components=tuple(fields.get("Components", "").split()),
                options={name: value for name, value in fields.items() if name in _OPTIONS},
            )


def _is_debian(uri: str, suite: str, options: dict[str, str], lists: Path) -> bool:
    if origin := _verified_origin(uri, suite, lists):
        return origin == "Debian"
    if key := options.get("Signed-By"):
        return "debian-archive" in key
    return bool({"debian", "debian-security"} & set(urlsplit(uri).path.split("/")))


def _verified_origin(uri: str, suite: str, lists: Path) -> str | None:
    """What the release file of the source, which apt has verified, says of its origin; None if there is none yet."""
    parts = urlsplit(uri)
    place = f"{parts.netloc.rpartition('@')[2]}{parts.path}".strip("/") + f"/dists/{suite}/InRelease"
    name = _ESCAPED.sub(lambda found: f"%{ord(found[0]):02x}", place).replace("/", "_")
    try:
        text = (lists / name).read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"^Origin: *(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else None
