from __future__ import annotations

from pathlib import Path

import pytest

from utilityvm.errors import SetupError
from utilityvm.guestimage.sources import apt_settings, debian_sources

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    (tmp_path / "apt/sources.list.d").mkdir(parents=True)
    return tmp_path / "apt"


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    (tmp_path / "lists").mkdir()
    return tmp_path / "lists"


def stanzas(text: str) -> list[dict[str, str]]:
    return [dict(line.split(": ", 1) for line in block.splitlines() if ": " in line) for block in text.split("\n\n")]


def test_a_deb822_file_is_read(etc: Path, lists: Path) -> None:
    (etc / "sources.list.d/debian.sources").write_text(
        f"# a comment\nTypes: deb deb-src\nURIs: http://mirror.example/debian\n# another\n"
        f"Suites: bookworm bookworm-updates\nComponents: main contrib\nSigned-By: {KEYRING}\n\n"
        f"Types: deb\nURIs: http://mirror.example/debian-security\nSuites: bookworm-security\n"
        f"Components: main\nSigned-By: {KEYRING}\n"
    )
    assert stanzas(debian_sources("bookworm", etc=etc, lists=lists)) == [
        {"Types": "deb", "URIs": "http://mirror.example/debian", "Suites": "bookworm bookworm-updates",
         "Components": "main", "Signed-By": KEYRING},
        {"Types": "deb", "URIs": "http://mirror.example/debian-security", "Suites": "bookworm-security",
         "Components": "main", "Signed-By": KEYRING},
    ]  # fmt: skip


def test_a_one_line_file_is_read(etc: Path, lists: Path) -> None:
    (etc / "sources.list").write_text(
        f"# deb http://off.example/debian bookworm main\n"
        f"deb [arch=amd64 signed-by={KEYRING}] http://mirror.example/debian bookworm main non-free # ours\n"
        f"deb-src http://mirror.example/debian bookworm main\n"
        f"deb http://mirror.example/debian bookworm-updates main\n"
    )
    assert stanzas(debian_sources("bookworm", etc=etc, lists=lists)) == [
        {"Types": "deb", "URIs": "http://mirror.example/debian", "Suites": "bookworm", "Components": "main",
         "Signed-By": KEYRING},
        {"Types": "deb", "URIs": "http://mirror.example/debian", "Suites": "bookworm-updates", "Components": "main"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        "deb [signed-by=/etc/apt/keyrings/other.asc] http://other.example/linux/debian bookworm main",
        "deb http://other.example/linux/debian bookworm stable",
        "deb http://other.example/packages bookworm main",
        "deb http://other.example/debian nodistro main",
        "deb http://other.example/debian bookworm-pgdg main",
        "deb http://mirror.example/debian trixie main",
    ],
)
def test_what_is_not_this_debian_is_left_out(etc: Path, lists: Path, line: str) -> None:
    (etc / "sources.list").write_text("deb http://mirror.example/debian bookworm main\n" + line + "\n")
    (stanza,) = stanzas(debian_sources("bookworm", etc=etc, lists=lists))
    assert stanza["URIs"] == "http://mirror.example/debian"
    assert stanza["Suites"] == "bookworm"


def test_the_verified_release_file_decides_what_is_debian(etc: Path, lists: Path) -> None:
    (etc / "sources.list").write_text(
        "deb [signed-by=/etc/apt/keyrings/company.asc] http://user:word@mirror.example/all_of-it/deb bookworm main\n"
        "deb http://other.example/debian bookworm main\n"
    )
    (lists / "mirror.example_all%5fof-it_deb_dists_bookworm_InRelease").write_text("Hash: x\n\nOrigin: Debian\n")
    (lists / "other.example_debian_dists_bookworm_InRelease").write_text("Origin: Somebody else\n")
    (stanza,) = stanzas(debian_sources("bookworm", etc=etc, lists=lists))
    assert stanza["URIs"] == "http://user:word@mirror.example/all_of-it/deb"
    assert stanza["Signed-By"] == "/etc/apt/keyrings/company.asc"


def test_a_source_that_is_switched_off_is_left_out(etc: Path, lists: Path) -> None:
    (etc / "sources.list.d/a.sources").write_text(
        "Enabled: no\nTypes: deb\nURIs: http://mirror.example/debian\nSuites: bookworm\nComponents: main\n"
    )
    with pytest.raises(SetupError, match="no package source of Debian bookworm"):
        debian_sources("bookworm", etc=etc, lists=lists)


def test_a_key_in_the_file_is_kept_whole(etc: Path, lists: Path) -> None:
    key = "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQINBGPL0\n -----END PGP PUBLIC KEY BLOCK-----\n"
    (etc / "sources.list.d/a.sources").write_text(
        f"Types: deb\nURIs: http://mirror.example/debian/\nSuites: bookworm\nComponents: main\n{key}"
    )
    (lists / "mirror.example_debian_dists_bookworm_InRelease").write_text("Origin: Debian\n")
    assert " .\n mQINBGPL0\n -----END" in debian_sources("bookworm", etc=etc, lists=lists)


def test_updates_alone_are_not_a_suite(etc: Path, lists: Path) -> None:
    (etc / "sources.list").write_text("deb http://mirror.example/debian bookworm-updates main\n")
    with pytest.raises(SetupError, match="no package source"):
        debian_sources("bookworm", etc=etc, lists=lists)


def test_files_that_apt_does_not_read_are_not_read(etc: Path, lists: Path) -> None:
    (etc / "sources.list.d/debian.sources.off").write_text(
        "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm\nComponents: main\n"
    )
    with pytest.raises(SetupError):
        debian_sources("bookworm", etc=etc, lists=lists)


def test_the_proxy_and_the_passwords_of_apt_are_used(
    etc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "apt.conf"
    config.write_text('Acquire::http::Proxy "http://proxy.example:3142";\nAcquire::Languages "de";\n')
    monkeypatch.setenv("APT_CONFIG", str(config))
    (etc / "auth.conf.d").mkdir()
    lines = apt_settings(etc).splitlines()
    assert 'Acquire::http::Proxy "http://proxy.example:3142";' in lines
    assert f'Dir::Etc::netrcparts "{etc}/auth.conf.d";' in lines
    assert not any("Languages" in line or "IndexTargets" in line for line in lines)
