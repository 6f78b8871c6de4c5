"""Expressions, written anew for the worlds of their function: what is known is folded, the rest stays as it was."""

import ast
import functools
import re
import types
from typing import Any

import torch
from torch import nn

from checkpoints.flatten.sources import Code, children, unparsed
from checkpoints.flatten.values import Run, World, known, same

# (function, expression) → what it is where a cache never begins again
INSTEAD = {
    ("Decoder.hidden", "x[:, -new:]"): "x",
    ("frequencies", "lengths.device"): "positions.device",      # it is written inside rotation_tables
    ("Decoder.hidden", "torch.arange(new, device=tokens.device).expand(tokens.shape)"):
        "torch.arange(tokens.shape[1], device=tokens.device)[None]",
}
ROOMY = (ast.Call, ast.keyword, ast.Tuple, ast.List, ast.Subscript, ast.Dict)       # parents that need no parentheses


def is_config(value: Any) -> bool:
    """Whether a value is one of the frozen dataclasses of a config."""
    return type(value).__module__.startswith("nanollm.config") and hasattr(value, "__dataclass_fields__")


def literal(value: Any) -> str | None:
    """A value as Python writes it; None where it has to come from somewhere."""
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return "torch.inf" if value > 0 else "-torch.inf"
    if isinstance(value, str) and '"' not in value and "\\" not in repr(value):
        return f'"{value}"'
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return repr(value)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        parts = [literal(one) for one in value]
        if all(part is not None for part in parts):
            return f"({', '.join(map(str, parts))}{',' * (len(parts) == 1)})"
    return None


@functools.cache
def atomic(text: str) -> bool:
    """Whether an expression can stand in any other without parentheses."""
    try:
        node = ast.parse(text, mode="eval").body
    except SyntaxError:
        return False
    if isinstance(node, ast.Tuple):
        return text.startswith("(") and text.endswith(")")
    return isinstance(node, (ast.Name, ast.Constant, ast.Call, ast.Attribute, ast.Subscript, ast.List))


@functools.cache
def shape(text: str) -> str:
    """What kind of expression a text is, as far as parentheses go."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        return text
    return type(node).__name__ + type(getattr(node, "op", None)).__name__


class Expressions:
    """Of one function. program: the Writer (write.py) of all of them, which asks for this one. rename: what its
    parameters are called, where it is written inside another. write_Call writes an ast.Call, and so on."""

    def __init__(self, program: Any, code: Code, worlds: list[World], rename: dict[str, str] | None = None):
        self.program, self.code, self.worlds, self.rename = program, code, worlds, rename or {}
        self.source = code.source
        self.owner = program.class_of(code)
        self.evaluator = program.evaluator(code)
        self.texts: dict[str, str] = {}                         # local → the constant expression that it stands for
        self.reads: dict[str, int] = {}                         # renamed parameter → times that it is read
        self.prelude: list[list[str]] = []                      # lines that go before the statement being written
        self.hoists = 0
        self.dropped_lead = False

    # ---- expressions

    def values(self, node: ast.expr, worlds: list[World]) -> list[Any]:
        return [self.evaluator.value(node, world) for world in worlds]

    def agreed(self, node: ast.expr, worlds: list[World]) -> Any:
        """The value in all worlds, or a Run."""
        values = self.values(node, worlds)
        return values[0] if all(known(one) and same(one, values[0]) for one in values) else Run()

    def expr(self, node: ast.expr, worlds: list[World]) -> str:
        """An expression as it is written for these worlds."""
        value = self.agreed(node, worlds)
        if known(value) and literal(value) is not None and not isinstance(node, (ast.Tuple, ast.JoinedStr)):
            return self.folded(node, value, worlds)
        if isinstance(node, (ast.Name, ast.Call, ast.BoolOp, ast.IfExp)):
            for name in self.aliases(node, worlds):
                return self.write_Name(ast.Name(name), worlds)
        return self.unfolded(node, worlds)

    def aliases(self, node: ast.expr, worlds: list[World]) -> list[str]:
        """Variables that have the value of an expression, whatever it may be."""
        first, *rest = self.values(node, worlds)
        if known(first):
            return []
        found = [name for name, value in worlds[0].items() if value is first and name != "self" and all(
            world.get(name) is other for world, other in zip(worlds[1:], rest, strict=True))][:1]
        return [] if isinstance(node, ast.Name) and found == [node.id] else found

    def folded(self, node: ast.expr, value: Any, worlds: list[World]) -> str:
        """A known value: numbers by the constants that they come from, where that says more than the number."""
        plain = str(literal(value))
        if isinstance(node, ast.Constant):
            return self.source.text(node)
        if isinstance(value, str) and isinstance(node, ast.Name) and node.id not in worlds[0]:
            return self.program.global_text(self.code.module, node.id)
        if value is None or isinstance(value, (bool, str)):
            return plain
        if isinstance(node, ast.Name) and node.id in self.rename:
            return self.rename[node.id]
        match node:
            case ast.Attribute():
                owners = self.values(node.value, worlds)
                if all(map(is_config, owners)):
                    return self.program.constant(owners, node.attr) or plain
                if all(isinstance(one, nn.Module) for one in owners):
                    return self.program.attribute_text(owners[0], node.attr, value) or plain
                return self.source.text(node) if isinstance(owners[0], types.ModuleType) else plain
            case ast.Name(id=name) if name in self.texts:
                return self.texts[name]
            case ast.Name(id=name) if name not in worlds[0]:
                return self.program.global_text(self.code.module, name)
            case ast.Name(id=name):
                said = self.program.spec(self.code).said.get(name, set())
                if len(said) == 1 and self.program.constants.gives(next(iter(said)), value):
                    return next(iter(said))
                return self.program.parameter_text(name, value) or plain
            case ast.Call(func=ast.Name(id="int"), args=[inner]):
                text = self.expr(inner, worlds)
                return text if self.program.constants.gives(text, value) else plain
            case ast.IfExp():
                return self.expr(node.body if self.agreed(node.test, worlds) else node.orelse, worlds)
            case ast.BoolOp():
                for one in node.values:
                    found = self.agreed(one, worlds)
                    if known(found) and bool(found) is isinstance(node.op, ast.Or):
                        return self.expr(one, worlds)
                return self.expr(node.values[-1], worlds)
            case ast.BinOp() | ast.UnaryOp():
                text = self.unfolded(node, worlds)
                return text if re.search("[A-Za-z]{2}", text) and len(text) < 40 else plain
        return plain

    def unfolded(self, node: ast.expr, worlds: list[World]) -> str:
        instead = INSTEAD.get((self.code.name, self.source.text(node)))
        if instead is not None and (self.rename or self.code.owner):    # of a function, where it is written in another
            self.dropped_lead = True
            return instead
        method = getattr(self, f"write_{type(node).__name__}", None)
        return method(node, worlds) if method else self.plain(node, worlds)

    def plain(self, node: ast.AST, worlds: list[World]) -> str:
        """The node's own text, with what is inside it rewritten."""
        return self.spliced(*self.source.span(node), self.edits(node, worlds))

    def spliced(self, first: int, end: int, edits: list[tuple[int, int, str]]) -> str:
        out, at = [], first
        for start, stop, text in sorted(edits):
            out += [self.source.bytes[at:start], text.encode()]
            at = stop
        return b"".join([*out, self.source.bytes[at:end]]).decode()

    def edits(self, node: ast.AST, worlds: list[World]) -> list[tuple[int, int, str]]:
        """(first byte, byte past the last, new text) for each expression right inside a node."""
        found: list[tuple[int, int, str]] = []
        for child in children(node):
            if isinstance(getattr(child, "ctx", None), ast.Store):
                found += self.edits(child, worlds) if not isinstance(child, ast.Name) else []
            elif isinstance(child, ast.expr):
                text = self.source.text(child) if isinstance(child, ast.JoinedStr) else self.expr(child, worlds)
                found.append((*self.source.span(child), self.fitting(text, child, node)))
            elif isinstance(child, ast.keyword):
                found += self.edits(child, worlds)
        return found

    def fitting(self, text: str, child: ast.AST, parent: ast.AST) -> str:
        """In parentheses, where an expression has become another that needs them inside its parent."""
        changed = isinstance(parent, ast.expr) and text != self.source.text(child) and shape(text) != shape(
            self.source.text(child))
        callee = isinstance(parent, (ast.Call, ast.Subscript)) and child in (
            getattr(parent, "func", None), getattr(parent, "value", None))
        loose = isinstance(parent, ROOMY) and not callee
        first, end = self.source.span(child)
        enclosed = self.source.bytes[first - 1 : first] == b"(" and self.source.bytes[end : end + 1] == b")"
        return f"({text})" if changed and not loose and not enclosed and not atomic(text) else text

    def write_Name(self, node: ast.Name, worlds: list[World]) -> str:
        if node.id in self.rename:
            self.reads[node.id] = self.reads.get(node.id, 0) + 1
            return self.rename[node.id]
        return node.id if node.id in worlds[0] else self.program.global_text(self.code.module, node.id)

    def write_Attribute(self, node: ast.Attribute, worlds: list[World]) -> str:
        owners = self.values(node.value, worlds)
        if node.attr in ("dense", "chosen") and isinstance(owners[0], Run) and owners[0].kind is self.program.mask:
            return self.expr(node.value, worlds)
        if all(map(is_config, owners)):
            return self.config_field(node, owners, worlds)
        if isinstance(node.value, ast.Name) and node.value.id == "self" and isinstance(owners[0], nn.Module):
            if node.attr == "config":
                return "self"
            self.program.need(owners, node.attr)
        return self.plain(node, worlds)

    def config_field(self, node: ast.Attribute, owners: list[Any], worlds: list[World]) -> str:
        """A field that the layers do not agree on: of the module's own config an attribute of the module."""
        modules = [world.get("self") for world in worlds]
        if self.code.name.endswith("__init__"):
            given = [self.program.built(module, self.owner).get("config") for module in modules]
            if all(owner is one for owner, one in zip(owners, given, strict=True)):
                self.program.lift(modules, node.attr, self.owner)
                return node.attr
        if all(isinstance(one, nn.Module) and owner is getattr(one, "config", None)
               for owner, one in zip(owners, modules, strict=True)):
            self.program.lift(modules, node.attr, None)
            return f"self.{node.attr}"
        self.program.record(owners, node.attr)
        return f"{self.expr(node.value, worlds)}.{node.attr}"

    def write_BinOp(self, node: ast.BinOp, worlds: list[World]) -> str:
        if isinstance(node.op, ast.Mult):                       # times one
            for one, other in ((node.left, node.right), (node.right, node.left)):
                value = self.agreed(one, worlds)
                if isinstance(value, (int, float)) and not isinstance(value, bool) and value == 1:
                    return self.expr(other, worlds)
        return self.plain(node, worlds)

    def write_IfExp(self, node: ast.IfExp, worlds: list[World]) -> str:
        test = self.agreed(node.test, worlds)
        if known(test):
            return self.expr(node.body if test else node.orelse, worlds)
        yes = self.split(node.test, worlds, True)
        no = self.split(node.test, worlds, False)
        before, self.hoists = self.hoists, -1000
        parts = {node.body: self.expr(node.body, yes), node.test: self.test(node.test, worlds),
                 node.orelse: self.expr(node.orelse, no)}
        self.hoists = before
        return self.spliced(*self.source.span(node), [(*self.source.span(one), text) for one, text in parts.items()])

    def test(self, node: ast.expr, worlds: list[World]) -> str:
        return self.expr(node, worlds)

    def split(self, test: ast.expr, worlds: list[World], holds: bool) -> list[World]:
        """The worlds in which a test comes out so, or may."""
        found = []
        for world in worlds:
            value = self.evaluator.value(test, world)
            if not known(value) or bool(value) is holds:
                found.append(self.evaluator.narrowed(test, world, holds))
        return found

    def write_BoolOp(self, node: ast.BoolOp, worlds: list[World]) -> str:
        stops = isinstance(node.op, ast.Or)
        kept: list[str] = []
        for i, one in enumerate(node.values):
            value = self.agreed(one, worlds)
            if known(value) and bool(value) is not stops and i < len(node.values) - 1:
                continue
            if known(value) and value is (not stops) and kept:
                continue
            kept.append(self.expr(one, worlds))
            if known(value) and bool(value) is stops:
                break
            worlds = [self.evaluator.narrowed(one, world, not stops) for world in worlds]
        if len(kept) == len(node.values):
            edits = [(*self.source.span(one), self.fitting(text, one, node)) for one, text in
                     zip(node.values, kept, strict=True)]
            return self.spliced(*self.source.span(node), edits)
        return (" or " if stops else " and ").join(kept)

    def write_GeneratorExp(self, node: Any, worlds: list[World]) -> str:
        edits = []
        before, self.hoists = self.hoists, -1000
        for one in node.generators:
            edits.append((*self.source.span(one.iter), self.expr(one.iter, worlds)))
            worlds = [inner for world in worlds for inner in self.bound(one.target, one.iter, world)]
            edits += [(*self.source.span(test), self.expr(test, worlds)) for test in one.ifs]
        edits.append((*self.source.span(node.elt), self.expr(node.elt, worlds)))
        self.hoists = before
        return self.spliced(*self.source.span(node), edits)

    write_ListComp = write_SetComp = write_GeneratorExp

    def bound(self, target: ast.expr, iterated: ast.expr, world: World) -> list[World]:
        """The worlds inside a loop: one for each module of a list of them, else one whose targets are for the run."""
        names = [one.id for one in ast.walk(target) if isinstance(one, ast.Name)]
        lists = iterated.args if isinstance(iterated, ast.Call) and unparsed(iterated.func) == "zip" else [iterated]
        targets = target.elts if isinstance(target, ast.Tuple) else [target]
        inner = world | {name: Run() for name in names}
        for one, part in zip(targets, lists, strict=False):
            modules = self.program.listed(self.evaluator, part, world)
            if modules is not None and isinstance(one, ast.Name):
                state = Run(optional=True) if self.program.cached else None
                return [inner | {other.id: state for other in targets
                                 if isinstance(other, ast.Name)} | {one.id: module} for module in modules]
        return [inner]

    def write_Lambda(self, node: ast.Lambda, worlds: list[World]) -> str:
        names = [one.arg for one in node.args.args]
        worlds = [world | {name: Run() for name in names} for world in worlds]
        before, self.hoists = self.hoists, -1000
        text = self.expr(node.body, worlds)
        self.hoists = before
        return self.spliced(*self.source.span(node), [(*self.source.span(node.body), text)])
