"""Writes the parts of the docs that come from the code: tables of states, the picture of the rooms, both references.

`python docs/generate.py` writes them; `--check` says which are out of date and ends with 1. A test runs the check.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import enum
import importlib
import inspect
import itertools
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, get_args, get_origin, is_typeddict

import click
import msgspec
import rooms

import utilityvm
from utilityvm import DiskSettings, MountSettings, errors
from utilityvm.cli.commands import uvm
from utilityvm.scsi import transitions
from utilityvm.vm import state as vm_state

DOCS = Path(__file__).parent
MADE = "<!-- made by docs/generate.py: change the code, not this page -->\n"


def filled(page: str, name: str, content: str) -> str:
    """`page` with what stands between the marks of `name` replaced."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"no place for {name}")
    return pattern.sub(lambda _: f"{begin}\n{content.strip()}\n{end}", page)


def meanings(states: type[enum.StrEnum]) -> str:
    """A table of the states and what the code says beside each."""
    rows = re.findall(r'^    [A-Z_]+ = "([^"]+)"  # (.+)$', inspect.getsource(states), re.MULTILINE)
    assert len(rows) == len(states), f"{states.__name__}: a state without a comment"
    return "\n".join(["| state | what is true in it |", "|---|---|", *(f"| {name} | {what} |" for name, what in rows)])


def concepts() -> str:
    page = (DOCS / "concepts/README.md").read_text()
    page = filled(page, "disk meanings", meanings(transitions.DiskState))
    page = filled(page, "mount meanings", meanings(transitions.MountState))
    page = filled(page, "VM meanings", meanings(vm_state.State))
    page = filled(page, "VM states", vm_state.table_markdown())
    page = filled(page, "disk states", transitions.disk_table_markdown())
    return filled(page, "mount states", transitions.mount_table_markdown())


def doc(thing: object) -> str:
    return inspect.cleandoc(getattr(thing, "__doc__", None) or "")


def prose(text: str) -> str:
    """A docstring as Markdown: the sections of errors become lists."""
    if text.startswith("Raises:"):  # all of it is that section, and lost its indentation
        text = text.replace("\n", "\n    ")
    lines: list[str] = []
    in_section = False
    for line in text.splitlines():
        if re.fullmatch(r"(Raises|Returns|Yields|Source):.*", line):
            in_section = line.startswith(("Raises", "Returns", "Yields")) and line.endswith(":")
            lines += ["", f"**{line.split(':')[0]}:**{line.partition(':')[2]}", ""]
        elif in_section and (item := re.match(r"    (\w[\w.]*(?:, \w[\w.]*)*): (.*)", line)):
            names = ", ".join(word if word == "others" else f"`{word}`" for word in item[1].split(", "))
            lines.append(f"- {names}: {item[2]}")
        elif in_section and re.match(r"    \S", line) and not lines[-1]:
            lines.append(f"- {line.strip()}")
        elif in_section and line.startswith("    "):
            lines.append(f"  {line.strip()}")
        else:
            in_section = in_section and not line.strip()
            lines.append(line)
    return "\n".join(lines)


def signature(thing: object) -> str:
    """How it is called, as a reader would write it: types without quotes, enum members by name, no `self`."""
    try:
        shape = inspect.signature(thing)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return "(...)"
    parameters = [one for name, one in shape.parameters.items() if name not in ("self", "cls")]
    text = str(shape.replace(parameters=parameters))
    text = re.sub(r"<(\w+\.\w+): [^>]*>", r"\1", text)
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)


def constructor(cls: type) -> str:
    """How one is made; empty if the library alone makes them."""
    made_by_us = (getattr(cls.__init__, "__doc__", None) or "").startswith(("Use ", "Made by", "Returned by"))
    is_ours = "__init__" in vars(cls) or dataclasses.is_dataclass(cls) or issubclass(cls, msgspec.Struct)
    if made_by_us or not is_ours:
        return ""
    own = "" if dataclasses.is_dataclass(cls) and "__init__" not in source_names(cls) else prose(doc(cls.__init__))
    if issubclass(cls, msgspec.Struct):
        text = ", ".join(f"{one.name}: {kind}{default}" for one, kind, default in struct_fields(cls))
        return f"`{cls.__name__}(*, {text})`"
    text = re.sub(r" -> None$", "", signature(cls.__init__ if "__init__" in source_names(cls) else cls))
    own = "" if own.startswith("Initialize self") else own
    return f"`{cls.__name__}{text}`\n\n{own}\n" if own else f"`{cls.__name__}{text}`\n"


def struct_fields(cls: type[msgspec.Struct]) -> Iterator[tuple[msgspec.structs.FieldInfo, str, str]]:
    """Each field, its type without what is noted on it, and its default as it is written."""
    for one in msgspec.structs.fields(cls):
        kind = get_args(one.type)[0] if get_origin(one.type) is Annotated else one.type
        yield one, type_name(kind), "" if one.required else f" = {one.default!r}"


def source_names(cls: type) -> set[str]:
    """The methods that its source defines."""
    return set(re.findall(r"^    (?:async )?def (\w+)", inspect.getsource(cls), re.MULTILINE))


def fields_of(cls: type) -> str:
    """Each field, its type, and what the source says beside it."""
    said = dict(re.findall(r"^    (\w+): [^#\n]*?  # (.+)$", inspect.getsource(cls), re.MULTILINE))
    if is_typeddict(cls):
        names = {**(MountSettings.__annotations__ if cls is DiskSettings else {}), **cls.__annotations__}
        rows = [(one, getattr(kind, "__forward_arg__", str(kind))) for one, kind in names.items()]
    elif issubclass(cls, msgspec.Struct):
        rows = [(one.name, kind) for one, kind, _ in struct_fields(cls)]
        for one in msgspec.structs.fields(cls):
            for meta in get_args(one.type)[1:]:
                said[one.name] = getattr(meta, "description", None) or said.get(one.name, "")
    else:
        rows = [(one.name, str(one.type)) for one in dataclasses.fields(cls) if one.repr]  # type: ignore[arg-type]
    return "\n".join(f"- `{name}: {kind}`" + (f": {said[name]}" if said.get(name) else "") for name, kind in rows)


def type_name(kind: object) -> str:
    text = kind.__name__ if type(kind) is type else str(kind)
    text = re.sub(r"<\w+\.(\w+): [^>]*>", r"\1", text)
    return re.sub(r"\b(?:utilityvm|pathlib|typing|collections|os)\.(?:[a-z_]+\.)*", "", text)


def said_below(name: str) -> str:
    """The text below an assignment in the source: what it says of a constant, or of a name of a type."""
    module = utilityvm._MODULE_OF.get(name)
    body = ast.parse(inspect.getsource(importlib.import_module(module))).body if module else []
    for one, below in itertools.pairwise(body):
        targets = [one.target] if isinstance(one, ast.AnnAssign) else []
        is_it = any(isinstance(target, ast.Name) and target.id == name for target in targets)
        if is_it and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            return inspect.cleandoc(str(below.value.value))
    return ""


def own_members(cls: type) -> dict[str, object]:
    """Its members, and those of the classes that it is put together from and that are not public themselves."""
    found: dict[str, object] = {}
    for part in cls.__mro__:
        if part is cls or (part.__module__.startswith("utilityvm.") and part.__name__ not in utilityvm.__all__):
            found |= {name: member for name, member in vars(part).items() if name not in found}
    return found


def members(cls: type) -> Iterator[str]:
    for name, member in own_members(cls).items():
        if name.startswith("_"):
            continue
        raw = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if isinstance(raw, property):
            yield f"#### `{cls.__name__}.{name}`\n\n{prose(doc(raw))}\n"
        elif inspect.isfunction(raw):
            kind = "async " if inspect.iscoroutinefunction(raw) else ""
            yield f"#### `{kind}{cls.__name__}.{name}{signature(raw)}`\n\n{prose(doc(raw))}\n"


def section(name: str, thing: object) -> str:
    if isinstance(thing, type) and issubclass(thing, enum.Enum):
        values = "\n".join(f"- `{item.name}` = `{item.value!r}`" for item in thing)
        return f"### `{name}`\n\n{prose(doc(thing))}\n\n{values}\n"
    if isinstance(thing, type):
        has_fields = dataclasses.is_dataclass(thing) or issubclass(thing, msgspec.Struct)
        parts = [prose(doc(thing)), constructor(thing), fields_of(thing) if has_fields or is_typeddict(thing) else ""]
        return "\n\n".join(part.strip() for part in [f"### `{name}`", *filter(None, parts), *members(thing)]) + "\n"
    if not inspect.isroutine(thing):
        what = f"The type `{type_name(thing)}`." if get_origin(thing) or isinstance(thing, types.UnionType) else ""
        return "\n\n".join(filter(None, [f"### `{name}`", said_below(name), what])) + "\n"
    return f"### `{name}{signature(thing)}`\n\n{prose(doc(thing))}\n"


def api() -> str:
    public = {name: getattr(utilityvm, name) for name in utilityvm.__all__}
    is_error = {n for n, t in public.items() if isinstance(t, type) and issubclass(t, errors.UtilityVMError)}
    parts = ["# Python API\n", MADE, doc(utilityvm), ""]
    parts += [section(name, thing) for name, thing in public.items() if name not in is_error and name != "errors"]
    parts += ["## Errors\n", prose(doc(errors)), ""]
    parts += [f"### `{name}`\n\n{prose(doc(public[name]))}\n" for name in public if name in is_error]
    return "\n".join(parts)


def commands(command: click.Command, context: click.Context) -> Iterator[str]:
    usage = command.get_usage(context).removeprefix("Usage: ")
    yield f"## `{context.command_path}`\n\n```\n{usage}\n```\n\n{inspect.cleandoc(command.help or '')}\n"
    records = (parameter.get_help_record(context) for parameter in command.get_params(context))
    options = [record for record in records if record is not None]
    if options:
        yield "\n".join(f"- `{name}`: {text}" for name, text in options) + "\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from commands(inner, click.Context(inner, info_name=name, parent=context))


def cli() -> str:
    context = click.Context(uvm, info_name="uvm", max_content_width=100)
    return "\n".join(["# Command line\n", MADE, *commands(uvm, context)])


def architecture() -> str:
    return filled((DOCS / "architecture.md").read_text(), "rooms", rooms.table())


PAGES = {
    "architecture.md": architecture,
    "rooms.svg": rooms.svg,
    "concepts/README.md": concepts,
    "reference/api.md": api,
    "reference/cli.md": cli,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 if a page is out of date")
    check = parser.parse_args().check
    stale = []
    for name, make in PAGES.items():
        text = "\n".join(line.rstrip() for line in make().splitlines()) + "\n"
        path = DOCS / name
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    for name in stale:
        print(f"{name}: {'out of date; run python docs/generate.py' if check else 'written'}", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
