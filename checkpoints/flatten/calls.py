"""Calls: which function runs in which worlds, which arguments it still takes, and whether its body is written here."""

import ast
import re
import types
from typing import Any

from torch import nn

from checkpoints.flatten.expressions import Expressions, atomic, is_config, literal
from checkpoints.flatten.sources import Code, dedented, formats, is_ours, nodes, parsed, stored
from checkpoints.flatten.values import OneOf, Run, World, known

# characters: a function that comes to a shorter expression is written where it is called
SHORT = 72


def one_line(text: str) -> str:
    """An expression of several lines in one."""
    return re.sub(r"(?<=[(\[]) ", "", " ".join(text.split()))


class Calls(Expressions):
    """The calls of one function."""

    def body(self) -> list[str]:
        """The statements of the function, rewrite.py."""
        raise NotImplementedError

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
            before = len(self.prelude)
            inlined = self.inlined(node, *next(iter(calls.items())), worlds)
            if inlined is not None:
                return inlined
            del self.prelude[before:]                           # its arguments are written once more below
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
        return one_line(ast.get_source_segment(text, made.body) or "")

    def said(self, node: ast.Call, code: Code, worlds: list[World]) -> None:
        """Note how a caller writes what it gives, where that is a constant expression and says more than its value."""
        names = [one.arg for one in code.parameters if one.arg != "self"]
        given = [*zip(names, node.args, strict=False), *((str(one.arg), one.value) for one in node.keywords)]
        for name, one in given:
            value = self.agreed(one, worlds) if not isinstance(one, ast.Starred) else Run()
            if isinstance(value, (int, float, tuple)) and not isinstance(value, bool) and literal(value):
                if (text := self.expr(one, worlds)) != literal(value):
                    self.program.spec(code).said.setdefault(name, set()).add(text)

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
        if formats(code):
            return None
        if code.owner != self.code.owner and "super()" in self.program.source_text(code):
            return None                                         # of another class than this one's base
        names = [one.arg for one in code.parameters if one.arg != "self"]
        given = dict(zip(names, node.args, strict=False)) | {str(one.arg): one.value for one in node.keywords}
        self.program.spec(code).calls.add((self.code.name, node.lineno, node.col_offset))
        inner_worlds = self.program.in_worlds(code, [bound for _, bound in bounds])
        texts = {name: self.expr(given[name], worlds) for name in given}
        rename = {name: text if atomic(text) else f"({text})" for name, text in texts.items()}
        for name in stored(code) & rename.keys():               # what was known of it ends there
            if all(known(world[name]) for world in inner_worlds):
                del rename[name]
        if "self" in [one.arg for one in code.parameters] and isinstance(node.func, ast.Attribute):
            rename["self"] = self.expr(node.func.value, worlds)
        alone = self.hoists >= 0 and rename.get("self", "self").isidentifier() and self.program.called_once(code) and (
            self.program.plain_enough(code, self.code))
        inner = self.program.rewriter(code, inner_worlds, rename)
        lines = inner.body()
        try:
            tree = parsed(dedented(lines))
        except SyntaxError:
            return None
        body = [one for one in tree.body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))]
        if len(body) == 1 and isinstance(body[0], ast.Return) and body[0].value is not None:
            text = ast.get_source_segment(dedented(lines), body[0].value) or ""
            if isinstance(body[0].value, ast.Tuple) and not text.startswith("("):
                text = f"({text})"
            twice = any(inner.reads.get(name, 0) > 1 and not re.fullmatch(r"[\w.]+", text)
                        for name, text in rename.items())
            return text if (len(text) <= SHORT or alone) and not twice and "\n" not in text else None
        plain = all(re.fullmatch(r"[\w.]+", rename[name]) for name, times in inner.reads.items() if times > 1)
        return self.hoisted(node, lines, rename, worlds) if alone and plain else None

    def read_later(self, name: str, call: ast.Call) -> bool:
        """Whether a variable is read behind a call, or beside it in its statement, with the value it had before."""
        sets = [one.targets for one in nodes(self.code) if isinstance(one, ast.Assign) and one.value is call]
        if any(isinstance(one, ast.Name) and one.id == name for targets in sets for target in targets
               for one in ast.walk(target)):
            return False                                        # the call's own statement sets it
        inside = {id(one) for one in ast.walk(call)}
        return any(isinstance(one, ast.Name) and one.id == name and isinstance(one.ctx, ast.Load)
                   and id(one) not in inside and one.lineno >= call.lineno for one in nodes(self.code))

    def hoisted(self, node: ast.Call, lines: list[str], rename: dict[str, str], worlds: list[World]) -> str | None:
        """A call of a function that nobody else calls: its body goes before this statement, what it returns is here."""
        tree = parsed(dedented(lines))
        returns = [one for one in ast.walk(tree) if isinstance(one, ast.Return)]
        last = tree.body[-1] if tree.body else None
        if len(returns) != 1 or returns[0] is not last or last.value is None:
            return None
        anew = {one.id for one in ast.walk(tree) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
        if any(name in anew and rename[name] != name for name in rename):
            return None                                         # a parameter that the function sets anew
        if any(self.read_later(name, node) for name in anew & worlds[0].keys()):
            return None                                         # a name that means something else here
        text = dedented(lines).splitlines()
        value = ast.get_source_segment("\n".join(text), last.value) or ""
        start = tree.body[0].end_lineno if ast.get_docstring(tree) else 0
        self.prelude.append(text[start : last.lineno - 1])
        value = one_line(value) if "\n" in value and "#" not in value else value
        return f"({value})" if isinstance(last.value, ast.Tuple) and not value.startswith("(") else value
