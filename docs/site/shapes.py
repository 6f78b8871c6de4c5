"""Shapes, measured: run something small, and look at what each line has just assigned.

    line        q, k, v = self.placed(q, k, v, ctx)
    after it    q (3, 8, 7, 10)   k (3, 2, 7, 10)   v (3, 2, 7, 10)             what a reader sees beside the line

Python calls a function before each line that it runs (sys.settrace). Then the statement before that line is done, and
the names that it assigns have values: of those that are tensors we note the shape. So we do of what a function is
given, at its signature, and of what it returns. Nothing is computed for it, and no source is changed.

The first call that comes to a line is the one that counts. A function's later calls only add the lines that it left
out, so what stands in one function belongs together wherever one call reaches all of it. Where lines come from another
run, they say so (the name of the scene, scenes.py).

A size gets a letter where that is sure. The head of the file declares the letter (`Shapes: B batch, T tokens`), or the
file writes the product (H·d); the scene knows its size; no other letter has that size; and all of this once more in a
second round, whose sizes are all others.
"""

import ast
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """A tensor that a line has assigned ("→": returned)."""
    name: str
    shape: tuple[int, ...]
    scene: str


@dataclass
class Statement:
    """Where it ends, and what it assigns: names, and attributes of self as self.name."""
    end: int
    names: tuple[str, ...]
    returns: bool = False


@dataclass
class Recorder:
    """Notes shapes while `watch` runs something. found: file → line → what was seen there."""
    files: frozenset[str]
    found: dict[str, dict[int, list[Seen]]] = field(default_factory=dict)
    statements: dict[str, dict[int, Statement]] = field(default_factory=dict)
    signatures: dict[str, dict[int, int]] = field(default_factory=dict)
    scene: str = ""

    def watch(self, scene: str, run: Callable[[], object]) -> None:
        """Run it, and note what its lines assign."""
        self.scene, before = scene, sys.gettrace()
        sys.settrace(self.enter)
        try:
            run()
        finally:
            sys.settrace(before)

    def enter(self, frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        """What Python calls at the start of a function: one of ours gets a tracer of its own."""
        code = frame.f_code
        if code.co_filename not in self.files or code.co_name.startswith("<"):
            return None
        if code.co_filename not in self.statements:
            self.read(code.co_filename)
        return Call(self, frame).step

    def read(self, name: str) -> None:
        """Which statement each line belongs to."""
        self.statements[name], self.signatures[name] = {}, {}
        for node in ast.walk(ast.parse(Path(name).read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
                self.signatures[name][first] = node.body[0].lineno - 1
            statement = read_statement(node)
            if statement is not None:
                for line in range(node.lineno, statement.end + 1):          # type: ignore[attr-defined]
                    self.statements[name][line] = statement

    def note(self, name: str, seen: dict[int, list[Seen]]) -> None:
        """Keep what a call has seen, of the lines that no call before has reached."""
        lines = self.found.setdefault(name, {})
        for line, values in seen.items():
            lines.setdefault(line, values)


class Call:
    """One call of one function, from line to line."""

    def __init__(self, recorder: Recorder, frame: FrameType) -> None:
        self.recorder, self.file = recorder, frame.f_code.co_filename
        self.statements = recorder.statements[self.file]
        self.seen: dict[int, list[Seen]] = {}
        self.last: Statement | None = None
        signature = recorder.signatures[self.file].get(frame.f_code.co_firstlineno)
        if signature is not None:
            self.add(signature, ((name, frame.f_locals[name]) for name in arguments(frame)))

    def step(self, frame: FrameType, event: str, value: object) -> Callable[..., Any]:
        """Before each line, and at the end: the statement before is done."""
        if event == "exception":
            self.last = None
            return self.step
        now = self.statements.get(frame.f_lineno) if event == "line" else None
        if event == "return" and self.last is not None and self.last.returns and value is not None:
            values = value if isinstance(value, tuple) else (value,)
            self.add(self.last.end, (("→", each) for each in values))
        elif self.last is not None and now is not self.last:
            self.add(self.last.end, ((name, look_up(name, frame)) for name in self.last.names))
        self.last = now
        if event == "return":
            self.recorder.note(self.file, self.seen)
        return self.step

    def add(self, line: int, values: Iterator[tuple[str, object]]) -> None:
        """Those of the values that are tensors; of a line that is run again, the first time."""
        found = [Seen(name, tuple(value.shape), self.recorder.scene) for name, value in values
                 if isinstance(value, Tensor)]
        if found:
            self.seen.setdefault(line, found)


def arguments(frame: FrameType) -> tuple[str, ...]:
    """What a function is given, by name."""
    return frame.f_code.co_varnames[: frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount]


def look_up(name: str, frame: FrameType) -> object:
    """The value of x or self.x; None where it has none."""
    first, _, rest = name.partition(".")
    value = frame.f_locals.get(first)
    return vars(value).get(rest) if rest and hasattr(value, "__dict__") else value


def read_statement(node: ast.AST) -> Statement | None:
    """What a node assigns, if it is a statement that can assign a tensor."""
    if isinstance(node, ast.Assign):
        targets, end = node.targets, node.end_lineno
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        targets, end = [node.target], node.end_lineno
    elif isinstance(node, ast.For):
        targets, end = [node.target], node.iter.end_lineno
    elif isinstance(node, ast.Return):
        return Statement(node.end_lineno or node.lineno, (), returns=True)
    elif isinstance(node, (ast.Expr, ast.Assert, ast.Raise)):
        return Statement(node.end_lineno or node.lineno, ())
    else:
        return None
    return Statement(end or node.lineno, tuple(dict.fromkeys(itertools.chain(*map(assigned, targets)))))


def assigned(target: ast.expr) -> Iterator[str]:
    """The names in the target of an assignment; an element of something is no name."""
    if isinstance(target, ast.Name):
        yield target.id
    elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
        yield f"self.{target.attr}"
    elif isinstance(target, (ast.Tuple, ast.List, ast.Starred)):
        for each in [target.value] if isinstance(target, ast.Starred) else target.elts:
            yield from assigned(each)


# ---- letters

LETTER = re.compile(r"(?:^|[,.;:]\s+|\band )([A-Za-z]) (= [A-Z]/[A-Z]|(?!and |or |is |of )[a-z][\w /-]*)")
PRODUCT = re.compile(r"(?<![\w·])([A-Za-z])([·/])([A-Za-z2])(?![\w·])")


def legend(head: str) -> dict[str, str]:
    """The letters that the head of a file declares, with their words: B → batch."""
    found: dict[str, str] = {}
    for paragraph in re.findall(r"Shapes[^:\n]*:(.*?)(?:\n\s*\n|\Z)", head, re.DOTALL):
        for letter, words in LETTER.findall(" ".join(paragraph.split())):
            found.setdefault(letter, words.strip())
    return found


def expressions(source: str, declared: dict[str, str]) -> list[str]:
    """What sizes of a file may be called: its letters, and the products and halves of them that it writes."""
    written = {"".join(parts) for parts in PRODUCT.findall(source) if parts[1:] == ("/", "2") or parts[1] == "·"}
    return [*declared, *sorted(each for each in written if each[0] in declared and each[2] in (*declared, "2"))]


def value(expression: str, sizes: dict[str, int]) -> int | None:
    """What a letter, H·d or r/2 is in a scene; None where the scene does not know it."""
    first = sizes.get(expression[0])
    if len(expression) == 1 or first is None:
        return first
    if expression.endswith("/2"):
        return first // 2
    other = sizes.get(expression[2])
    return None if other is None else first * other


def letters(size: int, sizes: dict[str, int], names: list[str]) -> set[str]:
    """Which of the names have that size."""
    return {name for name in names if value(name, sizes) == size}


def lettered(first: tuple[int, ...], second: tuple[int, ...], rounds: tuple[dict[str, int], dict[str, int]],
             names: list[str]) -> list[str | None]:
    """For each size of a shape the one name that fits in both rounds; else None."""
    if len(first) != len(second):
        return [None] * len(first)
    fits = [letters(one, rounds[0], names) & letters(other, rounds[1], names)
            for one, other in zip(first, second, strict=True)]
    return [each.pop() if len(each) == 1 else None for each in fits]


def unwatched(run: Callable[[], object]) -> None:
    """Run something inside of what is watched, and do not look."""
    before = sys.gettrace()
    sys.settrace(None)
    try:
        run()
    finally:
        sys.settrace(before)
