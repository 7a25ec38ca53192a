"""Every example of the guide to mounts does what the guide says."""

from __future__ import annotations

import ast
import inspect
import re
import types
from pathlib import Path

import pytest

from filesystem_images import filesystem_image, gpt_disk
from utilityvm import UtilityVM
from utilityvm.machine.programs import run
from utilityvm.testing.images import ext4_image

pytestmark = pytest.mark.real

GUIDE = Path(__file__).parents[3] / "docs/guides/mounts.md"


async def test_the_guides_examples_work(vm: UtilityVM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"greeting": "hello\n"}
    ext4_image(tmp_path / "data.raw", files)
    for kind in ("squashfs", "erofs"):
        filesystem_image(kind, tmp_path / f"{'tools' if kind == 'squashfs' else 'layer'}.{kind}", files)
    gpt_disk(tmp_path / "disk.raw", [ext4_image(tmp_path / f"{n}.part", files) for n in (1, 2)])
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```(python|sh)\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(examples) > 10
    for language, text in examples:
        if language == "sh":
            run(["sh", "-ec", f"PATH=$PATH:/usr/sbin:/sbin\n{text}"])
            continue
        code = compile(text, str(GUIDE), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        done = types.FunctionType(code, {"vm": vm, "__builtins__": __builtins__})()
        if inspect.iscoroutine(done):
            await done
        assert not vm.scsi_slots(), text
    assert (tmp_path / "data.raw").stat().st_size == 64 << 20
