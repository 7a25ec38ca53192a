"""What `from utilityvm import ...` gives."""

from __future__ import annotations

import builtins
import collections.abc
import dataclasses
import importlib
import inspect
import pkgutil
import re
import traceback
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import utilityvm

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", utilityvm.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    thing = getattr(utilityvm, name)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert inspect.getdoc(thing), f"{name} has no docstring"


def test_every_error_is_public() -> None:
    from utilityvm import errors

    kinds = {name for name, thing in vars(errors).items() if inspect.isclass(thing) and issubclass(thing, Exception)}
    assert kinds <= set(utilityvm.__all__)


def test_the_tree_at_the_top_of_errors_is_the_tree() -> None:
    """Each kind of error once, under its parent."""
    from utilityvm import errors

    drawn: dict[str, str] = {}
    above: list[tuple[int, str]] = [(-1, "Exception")]
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"    ([│├└─ ]*)([A-Z]\w+)  ", line):
            depth, name = len(found[1]), found[2]
            while above[-1][0] >= depth:
                above.pop()
            assert name not in drawn, f"{name} is drawn twice"
            drawn[name] = above[-1][1]
            above.append((depth, name))
    kinds = [thing for thing in vars(errors).values() if inspect.isclass(thing) and issubclass(thing, Exception)]
    assert drawn == {kind.__name__: kind.__mro__[1].__name__ for kind in kinds}


def test_every_error_of_another_module_is_of_a_kind_in_the_tree() -> None:
    """It may say more to the module's own callers; to users it is its parent."""
    from utilityvm import errors

    for module in pkgutil.walk_packages(utilityvm.__path__, "utilityvm."):
        if module.name.endswith("__main__"):
            continue
        for thing in vars(importlib.import_module(module.name)).values():
            if not inspect.isclass(thing) or not issubclass(thing, errors.UtilityVMError):
                continue
            if thing.__module__ != errors.__name__ and not thing.__module__.startswith("utilityvm.cli"):
                base = thing.__mro__[1]
                assert base is not errors.UtilityVMError, thing
                assert base.__module__ == errors.__name__, thing


def test_an_uncaught_error_shows_its_remedy() -> None:
    from utilityvm.errors import InvalidRequest

    shown = "".join(
        traceback.format_exception(InvalidRequest("guest path 'data' is not absolute", remedy="write '/data'"))
    )
    assert "hint: write '/data'" in shown
    assert "hint" not in "".join(traceback.format_exception(InvalidRequest("no")))


# Members whose signatures name a type that is not public, each with the reason. This list only gets shorter.
NOT_PUBLIC = {
    "QemuProcess.agent": {"Listener"},  # for connecting, which is ours
    "QemuProcess.monitor": {"Listener"},
    "DiskSpec.request": {"AddRequest"},  # for the rooms below
    "QemuProcess.__init__": {"Ram"},  # made where QEMU is started
    "SavedDisk.of": {"Disk"},
    "SavedDisk.records": {"Record"},
    "SavedDisk.request": {"DiskRequest"},
    "ScsiState.of": {"Disk"},
    "Template.__init__": {"Manifest"},
    "UtilityVM.scsi": {"ScsiManager"},  # deprecated
    "VMConfig.for_clone": {"QemuConfig"},
    "VMConfig.for_qemu": {"QemuConfig"},
}
NOT_A_NAME = re.compile(r"'[^']*'|<class.*>|T_co|utilityvm\.\w+\.|inspect\._empty")  # literals, and noise
STANDARD = {*dir(builtins), *dir(collections.abc), *dir(typing), "Path", "PurePosixPath", "TracebackType"}


def annotations_of(kind: type) -> Iterator[tuple[str, str]]:
    """Every annotation of the public members of a class; constructors only where callers use them."""
    for name, member in inspect.getmembers_static(kind):
        made_by_us = (
            name == "__init__" and not dataclasses.is_dataclass(kind) and "Use `" in (inspect.getdoc(member) or "")
        )
        if (name.startswith("_") and name != "__init__") or made_by_us:
            continue
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if inspect.isfunction(function) and function.__module__.startswith("utilityvm"):
            signature = inspect.signature(function)
            yield from ((name, str(one.annotation)) for one in signature.parameters.values())
            yield name, str(signature.return_annotation)


def annotations_of_function(thing: object) -> Iterator[tuple[str, str]]:
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        yield from (("()", str(one.annotation)) for one in signature.parameters.values())
        yield "()", str(signature.return_annotation)


@pytest.mark.parametrize("name", utilityvm.__all__)
def test_every_type_in_a_public_signature_is_public(name: str) -> None:
    kind = getattr(utilityvm, name)
    hidden: dict[str, set[str]] = {}
    for member, annotation in annotations_of(kind) if inspect.isclass(kind) else annotations_of_function(kind):
        words = set(re.findall(r"[A-Za-z_]\w*", NOT_A_NAME.sub("", annotation)))
        if unknown := words - STANDARD - set(utilityvm.__all__):
            hidden.setdefault(f"{name}.{member}", set()).update(unknown)
    assert hidden == {member: types for member, types in NOT_PUBLIC.items() if member.startswith(f"{name}.")}


def test_the_synchronous_classes_are_made_from_the_asynchronous_ones() -> None:
    from utilityvm.sync import generate

    for path, text in generate.files().items():
        assert path.read_text() == text, "the public API changed; run: python -m utilityvm.sync.generate"
