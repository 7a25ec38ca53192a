"""Writes `classes.py` and `__init__.py` from the asynchronous classes: `python -m utilityvm.sync.generate`.

Each public method, property and operator of a class has its synchronous counterpart, with the same name, parameters and
docstring. `tests/sync` compares them, and `tests/test_exports.py` sees whether the files are up to date.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import utilityvm

HERE: Final = Path(__file__).parent
LEFT_OUT: Final = {"Acquiring", "Adding", "OutputSink", "serve"}  # of no use here
# Attributes that `__init__` sets: their types.
ATTRIBUTES: Final[dict[str, dict[str, str]]] = {
    "Program": {
        "number": "int",
        "id": "str",
        "info": "ProgramInfo",
        "stdin": "ProgramInput | None",
        "stdout": "ProgramOutput",
        "stderr": "ProgramOutput",
        "out_of_memory": "bool",
    },
    "ProgramOutput": {"lost": "int", "offset": "int"},
    "ProgramPieces": {"info": "ProgramInfo | None", "exit_code": "int | None", "out_of_memory": "bool"},
    "UtilityVM": {"config": "VMConfig", "findings": "list[str]", "uuid": "str"},
    "ClonePool": {"template": "str", "size": "int"},
    "RemotePieces": {"exit_code": "int | None"},
    "RemoteVM": {"name": "str", "uuid": "str", "findings": "tuple[str, ...]"},
}
DEPRECATED: Final = {("UtilityVM", "scsi")}
OPERATORS: Final = {"__aenter__", "__aexit__", "__anext__"}


def _has_async(kind: type) -> bool:
    """Has it a public method that is to be awaited?"""
    return any(
        inspect.iscoroutinefunction(getattr(thing, "__func__", thing))
        for name in dir(kind)
        for thing in [inspect.getattr_static(kind, name)]
        if not name.startswith("_") or name in OPERATORS
    )


def _classes() -> tuple[str, ...]:
    """The asynchronous classes, each after those that it is made from."""
    found = [getattr(utilityvm, name) for name in sorted(set(utilityvm.__all__) - LEFT_OUT)]
    kinds = [kind for kind in found if inspect.isclass(kind) and _has_async(kind)]
    return tuple(kind.__name__ for kind in sorted(kinds, key=lambda kind: (len(kind.__mro__), kind.__name__)))


CLASSES: Final = _classes()
FUNCTIONS: Final = (
    "connect",
    *(name for name in sorted(utilityvm.__all__) if inspect.iscoroutinefunction(getattr(utilityvm, name))),
)
_HEAD: Final = '''\
"""The asynchronous classes, synchronous. Do not edit: `generate.py` writes this file, which is why it is so long."""

# ruff: noqa: E501

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, overload

import utilityvm
from utilityvm.sync.portal import Synchronous, call, feed, sink, stands_for

if TYPE_CHECKING:
{imports}
'''
_INIT: Final = '''\
"""The same API without `async`: the same classes, names and docstrings.

::

    from utilityvm.sync import UtilityVM

    with UtilityVM.start("worker") as vm:
        with vm.add_scsi("tools.vhdx", "/tools", read_only=True):
            result = vm.run(["ls", "/tools"])

Calls may be made from any thread, several at a time, also where an event loop runs (Jupyter). One event loop in a
thread of its own does the work (`portal`). `classes` and this file are written by `generate`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from utilityvm import (
{values}
    )
    from utilityvm.sync.classes import (
{own}
    )

__all__ = [
{all}
]

_OWN = frozenset(
    [
{own_names}
    ]
)


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'utilityvm.sync' has no attribute {{name!r}}")
    module = importlib.import_module("utilityvm.sync.classes" if name in _OWN else "utilityvm")
    value: object = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({{*globals(), *__all__}})
'''


class _Types(ast.NodeTransformer):
    """An annotation, as it is without `async`."""

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        node = ast.Subscript(self.visit(node.value), self.visit(node.slice))
        match node.value:
            case ast.Name("Acquiring"):
                return node.slice
            case ast.Name("AsyncIterator" | "AsyncIterable"):
                return ast.Subscript(ast.Name("Iterable"), node.slice)
        return node

    def visit_Name(self, node: ast.Name) -> Any:
        match node.id:
            case "Adding":
                return ast.Name("RemoteMount")
            case "OutputSink":
                return ast.parse("Callable[[bytes], object]", mode="eval").body
        return node


class _Module:
    """A source file, and where the names in it come from."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tree = ast.parse(Path(inspect.getsourcefile(importlib.import_module(name)) or "").read_text())
        self.imported = {
            alias.asname or alias.name: (node.module or "", alias.name)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }

    def named(self, name: str) -> Any:
        return next(node for node in self.tree.body if getattr(node, "name", None) == name)


class _Writer:
    def __init__(self) -> None:
        self.modules: dict[str, _Module] = {}
        self.imports: set[tuple[str, str]] = {("collections.abc", "Callable"), ("collections.abc", "Iterable")}
        self.lines: list[str] = []

    def module(self, name: str) -> _Module:
        return self.modules.setdefault(name, _Module(name))

    def write(self) -> str:
        for name in CLASSES:
            self._class(name)
        for name in FUNCTIONS:
            thing = getattr(utilityvm, name)
            module = self.module(thing.__module__)
            self.lines += ["", ""]
            self._function(module, module.named(name), owner=None, indent="")
        imports = "\n".join(f"    from {module} import {name}" for module, name in sorted(self.imports))
        return _HEAD.format(imports=imports) + "\n".join(self.lines) + "\n"

    def _class(self, name: str) -> None:
        kind = getattr(utilityvm, name)
        public = kind.__mro__[1].__name__ if kind.__mro__[1].__name__ in CLASSES else None
        self.lines += ["", "", f"@stands_for(utilityvm.{name})", f"class {name}({public or 'Synchronous'}):"]
        self.lines += _quoted(_docstring(kind.__doc__), "    ")
        written: set[str] = set()
        parts = [kind] if public else [one for one in kind.__mro__ if one.__module__.startswith("utilityvm.")]
        for part in parts:
            module = self.module(part.__module__)
            for node in module.named(part.__name__).body:
                self._member(module, name, node, written)
        for attribute, text in ATTRIBUTES.get(name, {}).items():
            if attribute not in written:
                self._types(self.module(kind.__module__), ast.parse(text, mode="eval").body)
                self._property(attribute, text, None)
                written.add(attribute)
        if inspect.isclass(kind) and hasattr(kind, "__anext__"):
            self.lines += ["", "    def __iter__(self) -> Self:", "        return self"]

    def _member(self, module: _Module, owner: str, node: ast.AST, written: set[str]) -> None:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        is_public = not node.name.startswith("_") or node.name in OPERATORS
        if node.name == "__init__" and (node.args.args[1:] and owner == "ClonePool"):
            self._constructor(module, owner, node)
        decorators = [ast.unparse(one) for one in node.decorator_list]
        if not is_public or (owner, node.name) in DEPRECATED:
            return
        if node.name in written and "overload" not in decorators and f"{node.name}@" not in written:
            return
        written.add(node.name)
        if "property" in decorators:
            self._property(node.name, self._types(module, node.returns), ast.get_docstring(node))
        elif "overload" in decorators:
            written.add(f"{node.name}@")
            self._function(module, node, owner=owner, indent="    ", is_overload=True)
        else:
            written.discard(f"{node.name}@")
            self._function(module, node, owner=owner, indent="    ", is_class="classmethod" in decorators)

    def _property(self, name: str, kind: str, docstring: str | None) -> None:
        self.lines += ["", "    @property", f"    def {name}(self) -> {kind}:", *_quoted(docstring, "        ")]
        self.lines += [f"        result: {kind} = self._get({name!r})", "        return result"]

    def _constructor(self, module: _Module, owner: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        signature, values = self._parameters(module, node, owner=owner)
        self.lines += ["", f"    def __init__({signature}) -> None:", *_quoted(ast.get_docstring(node), "        ")]
        self.lines += [f"        self._async = call(lambda: utilityvm.{owner}({values}))"]

    def _function(
        self,
        module: _Module,
        node: ast.FunctionDef | ast.AsyncFunctionDef,
        *,
        owner: str | None,
        indent: str,
        is_overload: bool = False,
        is_class: bool = False,
    ) -> None:
        signature, values = self._parameters(module, node, owner=owner, is_class=is_class)
        name = {"__aenter__": "__enter__", "__aexit__": "__exit__", "__anext__": "__next__", "aclose": "close"}.get(
            node.name, node.name
        )
        returns = self._types(module, node.returns) if node.returns else "None"
        self.lines.append("")
        if indent and is_overload:
            self.lines.append(f"{indent}@overload")
        if is_class:
            self.lines.append(f"{indent}@classmethod")
        if not indent:
            self.lines.pop()
        self.lines.append(f"{indent}def {name}({signature}) -> {returns}:" + (" ..." if is_overload else ""))
        if is_overload:
            return
        self.lines += _quoted(ast.get_docstring(node), f"{indent}    ")
        target = f"utilityvm.{node.name}" if owner is None else f"utilityvm.{owner}.{node.name}" if is_class else None
        made = f"call({target or f'self._async.{node.name}'}{', ' if values else ''}{values})"
        body = [made] if returns == "None" else [f"result: {returns} = {made}", "return result"]
        if node.name == "__aenter__":
            body = [made, "return self"]
        elif node.name == "__anext__":
            body[:1] = ["try:", f"    {body[0]}", "except StopAsyncIteration:", "    raise StopIteration from None"]
        self.lines += [f"{indent}    {line}" for line in body]

    def _parameters(
        self,
        module: _Module,
        node: ast.FunctionDef | ast.AsyncFunctionDef,
        *,
        owner: str | None,
        is_class: bool = False,
    ) -> tuple[str, str]:
        """The parameters as they are written, and what is passed on of them."""
        arguments, values = node.args, []
        named = [*arguments.posonlyargs, *arguments.args]
        for one in [*named, *arguments.kwonlyargs, *filter(None, (arguments.vararg, arguments.kwarg))]:
            if one.annotation is None:
                continue
            original = ast.unparse(one.annotation)
            one.annotation = ast.parse(self._types(module, one.annotation), mode="eval").body
            value = one.arg
            if "AsyncItera" in original:
                value = f"feed({value})"
            elif "OutputSink" in original:
                value = f"sink({value})"
            values.append(
                f"*{value}"
                if one is arguments.vararg
                else f"**{value}"
                if one is arguments.kwarg
                else value
                if one in named
                else f"{one.arg}={value}"
            )
        defaults = [*arguments.defaults, *arguments.kw_defaults]
        for at, default in enumerate(defaults):
            if isinstance(default, ast.Name):  # a constant of the module's
                value = getattr(importlib.import_module(module.name), default.id)
                text = f"utilityvm.{default.id}" if default.id in utilityvm.__all__ else repr(value)
                constant = ast.parse(text, mode="eval").body
                if at < len(arguments.defaults):
                    arguments.defaults[at] = constant
                else:
                    arguments.kw_defaults[at - len(arguments.defaults)] = constant
        return ast.unparse(arguments), ", ".join(values)

    def _types(self, module: _Module, annotation: ast.expr | None) -> str:
        """An annotation as it is written here; its names are imported."""
        assert annotation is not None
        text = ast.unparse(_Types().visit(ast.parse(ast.unparse(annotation), mode="eval").body))
        for node in ast.walk(ast.parse(text, mode="eval")):
            if not isinstance(node, ast.Name) or node.id in CLASSES or hasattr(builtins, node.id):
                continue
            if node.id in ("Self", "Any", "overload", "Callable", "Iterable"):
                continue
            if node.id in utilityvm.__all__:
                self.imports.add(("utilityvm", node.id))
            else:
                self.imports.add(module.imported.get(node.id, (module.name, node.id)))
        return text


def _docstring(text: str | None) -> str | None:
    return None if text is None else inspect.cleandoc(text)


_WORDS: Final = (
    ("async with", "with"),
    ("async for", "for"),
    ("`aclose`", "`close`"),
    ("Await it, or enter", "Call it, or enter"),
    ("Await `drain`", "Call `drain`"),
    (" For one event loop.", ""),
    ("; for the event loop that made it", ""),
    ("Owned by the event loop, and the thread, that entered it. ", ""),
    (
        "Call it on the thread that is to own the VM: without `keep` the VM ends with that thread.",
        "Without `keep` the VM ends with this process.",
    ),
    ("await vm.", "vm."),
    ("await pool.", "pool."),
)


def _quoted(text: str | None, indent: str) -> list[str]:
    if text is None:
        return []
    for word, other in _WORDS:
        text = text.replace(word, other)
    quoted = f'"""{text}\n"""' if "\n" in text else f'"""{text}"""'
    return textwrap.indent(quoted, indent).split("\n")


def files() -> dict[Path, str]:
    """What the files should hold."""
    own = sorted((*CLASSES, *FUNCTIONS))
    values = sorted(set(utilityvm.__all__) - set(own) - LEFT_OUT)

    def listed(names: Sequence[str], form: str, indent: str) -> str:
        return "\n".join(f"{indent}{form.format(name)}," for name in names)

    head = _INIT.format(
        values=listed(values, "{0} as {0}", "        "),
        own=listed(own, "{0} as {0}", "        "),
        all=listed(sorted({*own, *values}), '"{}"', "    "),
        own_names=listed(own, '"{}"', "        "),
    )
    return {HERE / "classes.py": _formatted(_Writer().write()), HERE / "__init__.py": _formatted(head)}


def _formatted(text: str) -> str:
    for command in (["check", "--fix", "--quiet", "--select", "I,F401,RUF022,RUF100"], ["format", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(HERE / "file.py"), "-"]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout
    return text


def main() -> None:
    for path, text in files().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
