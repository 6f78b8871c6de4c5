"""One function, written anew for the worlds in which it is called: expressions folded, branches not taken left out.

A statement is its own lines of the source with the parts replaced that are known. So what is left of a function has the
comments, the alignment and the names that it had.
"""

import ast
import re
import textwrap
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from checkpoints.flatten.sources import Code, is_ours
from checkpoints.flatten.values import OneOf, Run, World, joined, known, same

if TYPE_CHECKING:
    from checkpoints.flatten.program import Program

# (function, expression) → what it is where a cache never begins again
INSTEAD = {
    ("Decoder.hidden", "x[:, -new:]"): "x",
    ("frequencies", "lengths.device"): "positions.device",      # it is written inside rotation_tables
    ("Decoder.hidden", "torch.arange(new, device=tokens.device).expand(tokens.shape)"):
        "torch.arange(tokens.shape[1], device=tokens.device)[None]",
}
SHORT = 72                      # characters: a function that comes to a shorter expression is written where it is called
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


def atomic(text: str) -> bool:
    """Whether an expression can stand in any other without parentheses."""
    try:
        node = ast.parse(text, mode="eval").body
    except SyntaxError:
        return False
    if isinstance(node, ast.Tuple):
        return text.startswith("(") and text.endswith(")")
    return isinstance(node, (ast.Name, ast.Constant, ast.Call, ast.Attribute, ast.Subscript, ast.List))


def shape(text: str) -> str:
    """What kind of expression a text is, as far as parentheses go."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        return text
    return type(node).__name__ + type(getattr(node, "op", None)).__name__


class Rewriter:
    """Writes what is left of one function. rename: what parameters are called, where it is written inside another."""

    def __init__(self, program: "Program", code: Code, worlds: list[World], rename: dict[str, str] | None = None):
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
        values = self.values(node, worlds)
        found = [] if known(values[0]) else [
            name for name in worlds[0] if name != "self" and all(
                world.get(name) is value for world, value in zip(worlds, values, strict=True))][:1]
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
        if instead is not None:
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
        for child in ast.iter_child_nodes(node):
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
        stops, kept = isinstance(node.op, ast.Or), []
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
        lists = iterated.args if isinstance(iterated, ast.Call) and ast.unparse(iterated.func) == "zip" else [iterated]
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

    # ---- calls

    def write_Call(self, node: ast.Call, worlds: list[World]) -> str:
        if isinstance(node.func, ast.Name) and self.rename.get(node.func.id, "").startswith("(lambda"):
            return self.applied(node, self.rename[node.func.id], worlds)
        functions = self.values(node.func, worlds)
        text = self.program.special(self, node, functions, worlds)
        if text is not None:
            return text
        targets = [self.targets(one) for one in functions]
        if not all(targets):
            return self.plain(node, worlds)
        calls: dict[Code, list[tuple[World, dict[str, Any]]]] = {}
        for world, found in zip(worlds, targets, strict=True):
            for code, first in found or ():
                calls.setdefault(code, []).append((world, self.arguments(node, code, first, world)))
        if len(calls) == 1:
            inlined = self.inlined(node, *next(iter(calls.items())), worlds)
            if inlined is not None:
                return inlined
        for code, bounds in calls.items():
            self.program.enter(code, [bound for _, bound in bounds])
            self.said(node, code, worlds)
        kept = self.program.kept(calls)
        return f"{self.callee(node, functions, worlds)}({', '.join(self.passed(node, calls, kept, worlds))})"

    def applied(self, node: ast.Call, text: str, worlds: list[World]) -> str:
        """A lambda that is called: its arguments by name before this statement, and here what it gives."""
        made = ast.parse(text, mode="eval").body
        assert isinstance(made, ast.Lambda)
        for one, given in zip(made.args.args, node.args, strict=True):
            value = self.expr(given, worlds)
            if value != one.arg:
                self.prelude.append([f"{one.arg} = {value}"])
        return " ".join((ast.get_source_segment(text, made.body) or "").split())

    def said(self, node: ast.Call, code: Code, worlds: list[World]) -> None:
        """Note how a caller writes what it gives, where that is a constant expression."""
        names = [one.arg for one in code.parameters if one.arg != "self"]
        given = [*zip(names, node.args, strict=False), *((str(one.arg), one.value) for one in node.keywords)]
        for name, one in given:
            value = self.agreed(one, worlds) if not isinstance(one, ast.Starred) else Run()
            if isinstance(value, (int, float, tuple)) and not isinstance(value, bool) and literal(value):
                self.program.spec(code).said.setdefault(name, set()).add(self.expr(one, worlds))

    def callee(self, node: ast.Call, functions: list[Any], worlds: list[World]) -> str:
        if isinstance(node.func, ast.Name) and isinstance(functions[0], type):
            return self.program.name(functions[0])
        text = self.unfolded(node.func, worlds)
        return text if atomic(text) else f"({text})"

    def passed(self, node: ast.Call, codes: Any, kept: set[str], worlds: list[World]) -> list[str]:
        """The arguments that the function still takes."""
        code = next(iter(codes))
        names = [one.arg for one in code.parameters if one.arg != "self"]
        args = [part for one in node.args for part in ([one, None] if isinstance(one, ast.Starred) else [one])]
        out = [self.expr(one, worlds) for one, name in zip(args, names, strict=False) if name in kept and one]
        return out + [f"{one.arg}={self.expr(one.value, worlds)}" for one in node.keywords if one.arg in kept]

    def targets(self, function: Any) -> list[tuple[Code, Any]] | None:
        """What a call runs, of what is ours, with its first argument where that is an object."""
        if isinstance(function, OneOf):
            return [(self.program.code_of(one), None) for one in function.functions]
        if isinstance(function, nn.Module):
            method = getattr(type(function), "forward", None)
            return [(self.program.code_of(method), function)] if method is not None and is_ours(method) else None
        if isinstance(function, type) and is_ours(function) and not is_config(function):
            method = function.__init__                          # type: ignore[misc]  # of the class itself
            return [(self.program.code_of(method), Run(kind=function))] if is_ours(method) else None
        if isinstance(function, types.MethodType) and is_ours(function.__func__):
            return [(self.program.code_of(function.__func__), function.__self__)]
        if isinstance(function, types.FunctionType) and is_ours(function) and "<locals>" not in function.__qualname__:
            return [(self.program.code_of(function), None)]
        return None

    def arguments(self, node: ast.Call, code: Code, first: Any, world: World) -> dict[str, Any]:
        """Parameter → value, in one world."""
        names = [one.arg for one in code.parameters]
        outer = self.program.evaluator(code)
        bound = {name: outer.value(default, {}) for name, default in code.defaults().items()}
        given = [first] if first is not None else []
        for one in node.args:                                   # *ctx.rotation(…) are two
            given += [Run(), Run()] if isinstance(one, ast.Starred) else [self.evaluator.value(one, world)]
        bound |= dict(zip(names, given, strict=False))
        bound |= {str(one.arg): self.evaluator.value(one.value, world) for one in node.keywords}
        assert bound.keys() == set(names), f"{code.name} takes {names}, is given {sorted(bound)}"
        return bound

    def inlined(self, node: ast.Call, code: Code, bounds: list[tuple[World, dict[str, Any]]],
                worlds: list[World]) -> str | None:
        """A call as the expression that the function comes to, where that is short; else None."""
        if code.name.endswith(("forward", "__init__")) or any(isinstance(one, ast.Starred) for one in node.args):
            return None
        names = [one.arg for one in code.parameters if one.arg != "self"]
        given = dict(zip(names, node.args, strict=False)) | {str(one.arg): one.value for one in node.keywords}
        self.program.spec(code).calls.add((self.code.name, node.lineno, node.col_offset))
        inner_worlds = self.program.in_worlds(code, [bound for _, bound in bounds])
        texts = {name: self.expr(given[name], worlds) for name in given}
        rename = {name: text if atomic(text) else f"({text})" for name, text in texts.items()}
        anew = {one.id for one in ast.walk(code.node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
        for name in anew & rename.keys():                       # what was known of it ends there
            if all(known(world[name]) for world in inner_worlds):
                del rename[name]
        if "self" in [one.arg for one in code.parameters] and isinstance(node.func, ast.Attribute):
            rename["self"] = self.expr(node.func.value, worlds)
        alone = self.program.called_once(code) and self.program.plain_enough(code, self.code) and self.hoists >= 0 and rename.get("self", "self") == "self"
        inner = Rewriter(self.program, code, inner_worlds, rename)
        lines = inner.body()
        try:
            tree = ast.parse(textwrap.dedent("\n".join(lines)))
        except SyntaxError:
            return None
        body = [one for one in tree.body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))]
        if len(body) == 1 and isinstance(body[0], ast.Return) and body[0].value is not None:
            text = ast.get_source_segment(textwrap.dedent("\n".join(lines)), body[0].value) or ""
            if isinstance(body[0].value, ast.Tuple) and not text.startswith("("):
                text = f"({text})"
            twice = any(inner.reads.get(name, 0) > 1 and not re.fullmatch(r"[\w.]+", text)
                        for name, text in rename.items())
            return text if (len(text) <= SHORT or alone) and not twice and "\n" not in text else None
        plain = all(re.fullmatch(r"[\w.]+", rename[name]) for name, times in inner.reads.items() if times > 1)
        return self.hoisted(node, lines, rename, worlds) if alone and plain else None

    def read_later(self, name: str, call: ast.Call) -> bool:
        """Whether a variable is read behind a call, or beside it in its statement."""
        inside = {id(one) for one in ast.walk(call)}
        return any(isinstance(one, ast.Name) and one.id == name and isinstance(one.ctx, ast.Load)
                   and id(one) not in inside and one.lineno >= call.lineno for one in ast.walk(self.code.node))

    def hoisted(self, node: ast.Call, lines: list[str], rename: dict[str, str], worlds: list[World]) -> str | None:
        """A call of a function that nobody else calls: its body goes before this statement, what it returns is here."""
        tree = ast.parse(textwrap.dedent("\n".join(lines)))
        returns = [one for one in ast.walk(tree) if isinstance(one, ast.Return)]
        last = tree.body[-1] if tree.body else None
        if len(returns) != 1 or returns[0] is not last or last.value is None:
            return None
        stored = {one.id for one in ast.walk(tree) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
        if any(name in stored and rename[name] != name for name in rename):
            return None                                         # a parameter that the function sets anew
        if any(self.read_later(name, node) for name in stored & worlds[0].keys()):
            return None                                         # a name that means something else here
        text = textwrap.dedent("\n".join(lines)).splitlines()
        value = ast.get_source_segment("\n".join(text), last.value) or ""
        first = 1 if ast.get_docstring(ast.parse("def f():\n" + textwrap.indent("\n".join(text), " "))
                                       .body[0]) else 0        # type: ignore[arg-type]  # a function
        start = tree.body[0].end_lineno if first else 0
        self.prelude.append(text[start : last.lineno - 1])
        value = value.replace("\n", " ") if "#" not in value else value
        return f"({value})" if isinstance(last.value, ast.Tuple) and not value.startswith("(") else value

    # ---- statements

    def body(self) -> list[str]:
        """The statements of the function."""
        node = self.code.node
        lines, _ = self.block(node.body, self.worlds, node.lineno, 0, header=True)
        return lines

    def block(self, body: list[ast.stmt], worlds: list[World], before: int, shift: int,
              header: bool = False) -> tuple[list[str], list[World]]:
        """Lines of some statements, and the worlds that go on behind them. before: the line above the first."""
        out: list[str] = []
        at = before
        if header:                                              # the end of `def f(…) -> …:`
            node = self.code.node
            ends = [one.end_lineno or 0 for one in [*node.args.args, *node.args.kwonlyargs, *node.args.defaults,
                                                   *([node.returns] if node.returns else [])]]
            at = max([node.lineno, *ends])
            if self.source.lines(at, at)[0].strip() not in (")", "):") and at + 1 < body[0].lineno and \
                    self.source.lines(at + 1, at + 1)[0].strip().startswith(")"):
                at += 1
        for one in body:
            if not worlds:
                break
            lead = self.source.lines(at + 1, one.lineno - 1) if one.lineno - 1 > at else []
            self.dropped_lead = False
            lines, worlds = self.statement(one, worlds, shift)
            if lines and self.dropped_lead:
                lead = []                                       # it speaks of what is gone
            if lines:
                out += [line[shift:] if line.strip() else "" for line in lead] + lines
            at = one.end_lineno or at
        return out, worlds

    def statement(self, node: ast.stmt, worlds: list[World], shift: int) -> tuple[list[str], list[World]]:
        outer, self.prelude = self.prelude, []
        before, self.hoists = self.hoists, 0
        method = getattr(self, f"do_{type(node).__name__}", self.do_other)
        lines, worlds = method(node, worlds, shift)
        indent = " " * (node.col_offset - shift)
        lines = [indent + line if line.strip() else "" for part in self.prelude for line in part] + lines
        self.prelude, self.hoists = outer, before
        return lines, worlds

    def lines(self, node: ast.AST, worlds: list[World], shift: int, last: int = 0) -> list[str]:
        """The whole lines of a statement, trailing comment included, with what is inside rewritten."""
        edits = self.edits(node, worlds)
        first, end = self.source.starts[node.lineno - 1], self.source.starts[last or node.end_lineno]  # type: ignore
        lines = [line[shift:] for line in self.spliced(first, end, edits).splitlines()]
        column = self.source.lines(node.end_lineno, node.end_lineno)[0].find("  # ") + 2 - shift    # type: ignore
        code, mark, comment = lines[-1].partition("  # ")
        return [*lines[:-1], f"{code.rstrip():<{column}}# {comment.lstrip()}" if mark and column > len(code.rstrip()) + 1
                else lines[-1]]

    def do_other(self, node: ast.stmt, worlds: list[World], shift: int) -> tuple[list[str], list[World]]:
        return self.lines(node, worlds, shift), worlds

    def do_Expr(self, node: ast.Expr, worlds: list[World], shift: int) -> tuple[list[str], list[World]]:
        if isinstance(node.value, ast.Call) and self.program.is_check(self.values(node.value.func, worlds)[0]):
            return [], worlds
        if isinstance(node.value, ast.Constant):
            return [line[shift:] for line in self.source.lines(node.lineno, node.end_lineno or 0)], worlds
        return self.lines(node, worlds, shift), worlds

    def do_Assert(self, node: ast.Assert, worlds: list[World], shift: int) -> tuple[list[str], list[World]]:
        return [], worlds

    def do_Raise(self, node: ast.Raise, worlds: list[World], shift: int) -> tuple[list[str], list[World]]:
        return [], []

    def do_Return(self, node: ast.Return, worlds: list[World], shift: int) -> tuple[list[str], list[World]]:
        return self.lines(node, worlds, shift), []

    def do_Assign(self, node: ast.Assign, worlds: list[World], shift: int) -> tuple[list[str], list[World]]:
        if isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute) and (
                node.value.func.attr == "add" and isinstance(node.targets[0], ast.Tuple)):
            return self.added(node, node.value, worlds, shift)
        values = self.values(node.value, worlds)
        parts: list[tuple[ast.expr, ast.expr | None]] = []
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                parts += zip(target.elts, node.value.elts, strict=True)
            else:
                parts.append((target, node.value if isinstance(target, ast.Name) else None))
        lines = self.lines(node, worlds, shift)
        texts = {}
        for target, value in parts:
            if isinstance(target, ast.Name):
                self.texts.pop(target.id, None)
                if value is not None and known(self.agreed(value, worlds)) and literal(self.agreed(value, worlds)):
                    texts[target.id] = self.expr(value, worlds)
        after = [self.assigned(node.targets, value, world) for value, world in zip(values, worlds, strict=True)]
        self.texts |= texts
        return lines, after

    def added(self, node: ast.Assign, call: ast.Call, worlds: list[World], shift: int) -> tuple[list[str], list[World]]:
        """x, h = norm.add(x, y) in two lines: one kernel does both, and there are none here."""
        total, normed = node.targets[0].elts                    # type: ignore[attr-defined]  # a tuple
        assert isinstance(call.func, ast.Attribute)
        norm = ast.copy_location(ast.Call(call.func.value, [total], []), call)
        indent = " " * (node.col_offset - shift)
        one, other = (self.expr(part, worlds) for part in call.args)
        lines = [f"{indent}{ast.unparse(total)} = {one} + {other}"]
        worlds = self.assigned_all([total], worlds)
        total.ctx = ast.Load()                                  # type: ignore[attr-defined]
        lines.append(f"{indent}{ast.unparse(normed)} = {self.expr(norm, worlds)}")
        total.ctx = ast.Store()                                 # type: ignore[attr-defined]
        return lines, self.assigned_all([normed], worlds)

    def assigned_all(self, targets: list[ast.expr], worlds: list[World]) -> list[World]:
        return [self.assigned(targets, Run(), world) for world in worlds]

    def assigned(self, targets: list[ast.expr], value: Any, world: World) -> World:
        """The world after an assignment."""
        for target in targets:
            if isinstance(target, ast.Name):
                world = {name: one for name, one in world.items() if name != target.id} | {target.id: value}
            elif isinstance(target, ast.Tuple):
                whole = isinstance(value, tuple) and len(value) == len(target.elts)
                for i, one in enumerate(target.elts):
                    world = self.assigned([one], value[i] if whole else Run(), world)
        return world

    def do_AnnAssign(self, node: ast.AnnAssign, worlds: list[World], shift: int) -> tuple[list[str], list[World]]:
        value = [] if node.value is None else [(*self.source.span(node.value), self.expr(node.value, worlds))]
        first, end = self.source.starts[node.lineno - 1], self.source.starts[node.end_lineno or 0]
        lines = [line[shift:] for line in self.spliced(first, end, value).splitlines()]
        names = [node.target.id] if isinstance(node.target, ast.Name) else []
        return lines, [world | {name: Run() for name in names} for world in worlds]

    def do_AugAssign(self, node: ast.AugAssign, worlds: list[World], shift: int) -> tuple[list[str], list[World]]:
        edits = [(*self.source.span(node.value), self.expr(node.value, worlds))]
        first, end = self.source.starts[node.lineno - 1], self.source.starts[node.end_lineno or 0]
        names = [node.target.id] if isinstance(node.target, ast.Name) else []
        return ([line[shift:] for line in self.spliced(first, end, edits).splitlines()],
                [world | {name: Run() for name in names} for world in worlds])

    def do_If(self, node: ast.If, worlds: list[World], shift: int) -> tuple[list[str], list[World]]:
        if self.program.is_refusal(node):
            return [], worlds
        tests = self.values(node.test, worlds)
        yes, no = self.split(node.test, worlds, True), self.split(node.test, worlds, False)
        top, inner = node.test.end_lineno or 0, node.body[0].col_offset - node.col_offset
        if all(map(known, tests)) and (not yes or not no):
            if not yes and not node.orelse:
                return [], worlds
            body, above = (node.body, top) if yes else (node.orelse, (node.body[-1].end_lineno or 0) + 1)
            chained = not yes and isinstance(body[0], ast.If) and body[0].col_offset == node.col_offset
            if chained:
                return self.statement(body[0], no, shift)
            return self.block(body, yes or no, above, shift + inner)
        head = self.spliced(self.source.starts[node.lineno - 1], self.source.starts[top],
                            [(*self.source.span(node.test), self.expr(node.test, worlds))]).splitlines()
        head = [re.sub(r"^(\s*)elif\b", r"\1if", head[0][shift:]), *(line[shift:] for line in head[1:])]
        held, self.prelude = self.prelude, []
        texts = dict(self.texts)
        lines, after_yes = self.block(node.body, yes, top, shift)
        self.texts = dict(texts)
        other, after_no = self.orelse(node, no, shift) if node.orelse else ([], no)
        self.texts = {name: text for name, text in texts.items() if self.texts.get(name) == text}
        self.prelude = held
        if not lines and not other:
            return [], self.merged(after_yes, after_no)
        indent = " " * (node.col_offset - shift)
        lines = head + (lines or [f"{indent}    pass"])
        return lines + other, self.merged(after_yes, after_no)

    def orelse(self, node: ast.If, worlds: list[World], shift: int) -> tuple[list[str], list[World]]:
        indent = " " * (node.col_offset - shift)
        first = node.orelse[0]
        if isinstance(first, ast.If) and first.col_offset == node.col_offset and len(node.orelse) == 1:
            lines, after = self.statement(first, worlds, shift)
            if lines and re.match(r"\s*if\b", lines[0]):
                return [re.sub(r"^(\s*)if\b", r"\1elif", lines[0]), *lines[1:]], after
            return ([f"{indent}else:", *(f"    {line}" for line in lines)] if lines else []), after
        above = first.lineno - 1
        lines, after = self.block(node.orelse, worlds, above, shift)
        return ([f"{indent}else:", *lines] if lines else []), after

    def merged(self, one: list[World], other: list[World]) -> list[World]:
        """Worlds that come together again: what differs between two that were one is for the run."""
        if not one or not other:
            return one or other
        groups: dict[int, World] = {}
        for world in [*one, *other]:
            key = world["#"]
            if key in groups:
                groups[key] = {name: joined(groups[key][name], world[name]) if name in groups[key] else world[name]
                               for name in world} | {name: v for name, v in groups[key].items() if name not in world}
            else:
                groups[key] = world
        return list(groups.values())

    def do_For(self, node: ast.For, worlds: list[World], shift: int) -> tuple[list[str], list[World]]:
        stored = {one.id for part in node.body for one in ast.walk(part) if isinstance(one, ast.Name)
                  and isinstance(one.ctx, ast.Store)}
        after = [world | {name: Run() for name in stored & world.keys()} for world in worlds]
        for name in stored:
            self.texts.pop(name, None)
        inside = [inner for world in after for inner in self.bound(node.target, node.iter, world)]
        top = node.iter.end_lineno or 0
        head = self.spliced(self.source.starts[node.lineno - 1], self.source.starts[top],
                            [(*self.source.span(node.iter), self.expr(node.iter, after))]).splitlines()
        held, self.prelude = self.prelude, []
        lines, _ = self.block(node.body, inside, top, shift)
        self.prelude = held
        return [line[shift:] for line in head] + lines, after

    def do_FunctionDef(self, node: ast.FunctionDef, worlds: list[World], shift: int) -> tuple[list[str], list[World]]:
        names = [one.arg for one in node.args.args]
        inside = [world | {name: Run() for name in names} for world in worlds]
        held, self.prelude = self.prelude, []
        texts = dict(self.texts)
        lines, _ = self.block(node.body, inside, node.lineno, shift)
        self.texts, self.prelude = texts, held
        head = [line[shift:] for line in self.source.lines(node.lineno, node.body[0].lineno - 1)]
        return head[:1] + lines, [world | {node.name: Run()} for world in worlds]

    def do_Match(self, node: ast.Match, worlds: list[World], shift: int) -> tuple[list[str], list[World]]:
        chosen = []
        for world in worlds:
            subject = self.evaluator.value(node.subject, world)
            if not known(subject):
                raise self.program.cannot(self.code, "a match of what only a run knows")
            found = ((case, taken) for case in node.cases
                     if (taken := self.matched(case.pattern, subject)) is not None)
            chosen.append(next(found, None))
        cases = list(dict.fromkeys(one[0] if one else None for one in chosen))
        if cases == [None]:
            return [], worlds
        if len(cases) == 1 and cases[0] is not None:
            inside = [world | (one[1] if one else {}) for one, world in zip(chosen, worlds, strict=True)]
            self.captured(cases[0].pattern, node.subject, inside)
            return self.block(cases[0].body, inside, cases[0].pattern.end_lineno or 0, shift + 8)
        lines, after = self.lines_of_cases(node, chosen, worlds, shift)
        return lines, after

    def captured(self, pattern: ast.pattern, subject: ast.expr, worlds: list[World]) -> None:
        """Names that a pattern binds stand for fields of the subject."""
        if isinstance(pattern, ast.MatchClass):
            kind = self.agreed(subject, worlds)
            fields = [*type(kind).__match_args__][: len(pattern.patterns)] if known(kind) else []
            for field, one in [*zip(fields, pattern.patterns, strict=False),
                               *zip(pattern.kwd_attrs, pattern.kwd_patterns, strict=True)]:
                if isinstance(one, ast.MatchAs) and one.name:
                    value = worlds[0][one.name]
                    text = self.program.constant([kind], field) if isinstance(value, (int, float)) else None
                    self.texts[one.name] = text or str(literal(value))

    def matched(self, pattern: ast.pattern, subject: Any) -> World | None:
        """What a pattern binds where it fits, else None."""
        match pattern:
            case ast.MatchValue(value=value):
                return {} if same(self.evaluator.value(value, {}), subject) else None
            case ast.MatchClass(cls=cls, patterns=patterns, kwd_attrs=names, kwd_patterns=named):
                kind = self.evaluator.value(cls, {})
                if not isinstance(subject, kind):
                    return None
                out: World = {}
                for field, one in [*zip(kind.__match_args__, patterns, strict=False), *zip(names, named, strict=True)]:
                    assert isinstance(one, ast.MatchAs) and one.name, "patterns that bind a name"
                    out[one.name] = getattr(subject, field)
                return out
        return None

    def lines_of_cases(self, node: ast.Match, chosen: list[Any], worlds: list[World],
                       shift: int) -> tuple[list[str], list[World]]:
        """The cases that some worlds take."""
        out = [line[shift:] for line in self.spliced(
            self.source.starts[node.lineno - 1], self.source.starts[node.subject.end_lineno or 0],
            [(*self.source.span(node.subject), self.unfolded(node.subject, worlds))]).splitlines()]
        after: list[World] = []
        used = list(dict.fromkeys(one[0] for one in chosen if one))
        for case in node.cases:
            if case not in used:
                continue
            inside = [world | {name: Run() for name in one[1]} for one, world in zip(chosen, worlds, strict=True)
                      if one and one[0] is case]
            if isinstance(case.pattern, ast.MatchClass):
                subjects = [self.evaluator.value(node.subject, world) for world in inside]
                for field in [*type(subjects[0]).__match_args__[: len(case.pattern.patterns)], *case.pattern.kwd_attrs]:
                    self.program.record(subjects, field)
                inside = [world | one[1] for one, world in zip(chosen, worlds, strict=True) if one and one[0] is case]
                self.program.name(type(subjects[0]))
            lines, ended = self.block(case.body, inside, case.pattern.end_lineno or 0, shift)
            out += [line[shift:] for line in self.source.lines(case.pattern.lineno, case.pattern.end_lineno or 0)]
            out += lines
            after += ended
        after += [world for one, world in zip(chosen, worlds, strict=True) if one is None]
        return out, after

    def do_With(self, node: ast.With, worlds: list[World], shift: int) -> tuple[list[str], list[World]]:
        raise self.program.cannot(self.code, "a with statement")

    do_Try = do_While = do_With
