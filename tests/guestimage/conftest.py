"""Real packages, fetched once; caches of each test's own, which share them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from utilityvm.errors import SetupError
from utilityvm.guestimage import build, recipe
from utilityvm.guestimage.build import GuestImage
from utilityvm.machine.paths import cache_dir

SOURCE = Path(__file__).parent.parent.parent / "src"

Builder = Callable[..., "subprocess.Popen[str]"]

_BUILD = """
from utilityvm.guestimage import build
image = build.ensure(progress=lambda what, done: print(what, flush=True))
print(image.key, flush=True)
"""


@pytest.fixture(scope="session")
def base() -> Path:
    """The folder of a base that is made of Debian's packages."""
    try:
        build.ensure()
        return cache_dir() / "bases" / f"{build.host_suite()}-{build.base_key(recipe.architecture())}"
    except SetupError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{error}: {error.remedy}")


@pytest.fixture
def cache(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the base, and without an image."""
    folder = tmp_path / "cache"
    (folder / "bases").mkdir(parents=True)
    (folder / "bases" / base.name).symlink_to(base)
    monkeypatch.setenv("UTILITYVM_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="session")
def built(base: Path, tmp_path_factory: pytest.TempPathFactory) -> GuestImage:
    """An image that was built by itself. Not to be touched: see `image`."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "bases").mkdir()
    (folder / "bases" / base.name).symlink_to(base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UTILITYVM_CACHE_DIR", str(folder))
        return build.ensure()


@pytest.fixture
def image(built: GuestImage, cache: Path) -> GuestImage:
    """An image in the test's cache, to do with as one likes."""
    shutil.copytree(built.kernel.parent, cache / "images" / built.key)
    image = build.find()
    assert image is not None
    return image


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the sources, to change or to have unchanged."""
    return Path(shutil.copytree(SOURCE, tmp_path / "src"))


@pytest.fixture
def builder(source: Path) -> Builder:
    """Start a process that builds the image of `source` in the test's cache; it says what it does and then the key."""

    def start() -> subprocess.Popen[str]:
        env = {**os.environ, "PYTHONPATH": str(source)}
        return subprocess.Popen([sys.executable, "-c", _BUILD], env=env, stdout=subprocess.PIPE, text=True)

    return start
