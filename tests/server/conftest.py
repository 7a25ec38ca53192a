from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from served import Running, serving

pytest.importorskip("uvicorn", reason="the extra [server]")


@pytest_asyncio.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    """A server with a VM in memory, `worker`, which has the disk /disks/a.raw at hand."""
    async with serving(tmp_path, monkeypatch) as running:
        yield running
