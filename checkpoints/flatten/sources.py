"""The sources of a function or class as they were written: the tree of its module, and the characters of each node.

`ast` says where a node begins and ends, in bytes of UTF-8. What is written out later is cut from the source itself, so
comments, alignment and line breaks stay.
"""

import ast
import functools
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Def = ast.FunctionDef | ast.ClassDef


class Source:
    """One module."""

    def __init__(self, module: str) -> None:
        self.module = importlib.import_module(module)
        self.bytes = Path(str(self.module.__file__)).read_bytes()
        self.tree = ast.parse(self.bytes)
        self.starts = [0]                                       # byte at which each line begins
        for line in self.bytes.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.defs = {name: node for name, node in _defs(self.tree, "")}

    def span(self, node: Any) -> tuple[int, int]:
        """(first byte, byte past the last) of a node."""
        return (self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset)

    def text(self, node: Any) -> str:
        """A node as it was written."""
        first, end = self.span(node)
        return self.bytes[first:end].decode()

    def lines(self, first: int, last: int) -> list[str]:
        """Lines by their numbers, both included."""
        return self.bytes[self.starts[first - 1] : self.starts[last]].decode().splitlines()

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self.tree) or ""

    @functools.cached_property
    def words(self) -> set[str]:
        """Strings in its functions that are a word: kinds of things."""
        texts = {one.value for node in self.defs.values() if isinstance(node, ast.FunctionDef) for one in ast.walk(node)
                 if isinstance(one, ast.Constant) and isinstance(one.value, str)}
        return {text for text in texts if re.fullmatch(r"[a-z]\w{3,}", text)}


def _defs(tree: ast.Module | ast.ClassDef, prefix: str) -> list[tuple[str, Def]]:
    found: list[tuple[str, Def]] = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.append((prefix + node.name, node))
            if isinstance(node, ast.ClassDef):
                found += _defs(node, f"{prefix}{node.name}.")
    return found


@functools.cache
def source(module: str) -> Source:
    """The source of a module of that name."""
    return Source(module)


@dataclass(frozen=True)
class Code:
    """A function or method as it was written."""
    module: str
    name: str                                                   # Attention.forward

    @property
    def source(self) -> Source:
        return source(self.module)

    @property
    def node(self) -> ast.FunctionDef:
        found = self.source.defs[self.name]
        assert isinstance(found, ast.FunctionDef)
        return found

    @property
    def owner(self) -> str | None:
        """The class of a method."""
        return self.name.rpartition(".")[0] or None

    @property
    def parameters(self) -> list[ast.arg]:
        args = self.node.args
        assert args.vararg is None and args.kwarg is None, f"{self.name}: *args and **kwargs are not followed"
        return [*args.posonlyargs, *args.args, *args.kwonlyargs]

    def defaults(self) -> dict[str, ast.expr]:
        """Parameter → what it is where the caller says nothing."""
        args = self.node.args
        plain = [*args.posonlyargs, *args.args]
        found = dict(zip([one.arg for one in plain[len(plain) - len(args.defaults) :]], args.defaults, strict=True))
        return found | {one.arg: value for one, value in zip(args.kwonlyargs, args.kw_defaults, strict=True) if value}


@functools.cache
def nodes(code: Code) -> tuple[ast.AST, ...]:
    """All that a function is made of."""
    return tuple(ast.walk(code.node))


@functools.cache
def stored(code: Code) -> frozenset[str]:
    """The variables that a function sets."""
    return frozenset(one.id for one in nodes(code) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store))


@functools.cache
def formats(code: Code) -> bool:
    """Whether a function has an f-string, but in an error: names inside one are not followed."""
    raised = {id(part) for one in nodes(code) if isinstance(one, ast.Raise) for part in ast.walk(one)}
    return any(isinstance(one, ast.JoinedStr) and id(one) not in raised for one in nodes(code))


@functools.cache
def children(node: ast.AST) -> tuple[ast.AST, ...]:
    """What stands right inside a node."""
    return tuple(ast.iter_child_nodes(node))


def dedented(lines: Iterable[str]) -> str:
    """The text of some lines, as far to the left as it goes."""
    return textwrap.dedent("\n".join(lines))


unparsed = functools.lru_cache(10_000)(ast.unparse)             # of a node that nobody changes
parsed = functools.lru_cache(1_000)(ast.parse)                  # of a text whose nodes nobody changes


def code_of(function: Callable[..., Any]) -> Code:
    """The code of a function, below its decorators."""
    plain = inspect.unwrap(function)
    return Code(plain.__module__, plain.__qualname__)


def module_of(value: Any) -> str:
    """The module that a class or function comes from."""
    return getattr(value, "__module__", None) or ""


def is_ours(value: Any) -> bool:
    """Whether a class or function is one of those that are followed into their source."""
    module = module_of(value)
    return module.startswith("nanollm.") or module == f"{__package__}.frame"


def global_value(module: str, name: str) -> Any:
    """What a name means at the top of a module. Raises KeyError."""
    return vars(sys.modules[module])[name]
