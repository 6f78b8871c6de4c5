"""One function, written anew for the worlds in which it is called: expressions folded, branches not taken left out.

A statement is its own lines of the source with the parts replaced that are known. So what is left of a function has the
comments, the alignment and the names that it had.
"""

import ast
import re
from typing import Any

from checkpoints.flatten.calls import Calls
from checkpoints.flatten.expressions import literal
from checkpoints.flatten.values import Run, World, joined, known, same


class Rewriter(Calls):
    """Writes what is left of one function. do_If writes an ast.If, and so on: lines, and the worlds that go on."""

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
            given = node.args
            parts: list[Any] = [*given.args, *given.kwonlyargs, *given.defaults, *filter(None, [node.returns])]
            at = max([node.lineno, *(part.end_lineno for part in parts)])
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
        if mark and column > len(code.rstrip()) + 1:            # the comment stays in its column
            lines[-1] = f"{code.rstrip():<{column}}# {comment.lstrip()}"
        return lines

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
        if isinstance(node.target, ast.Attribute):
            edits.append((*self.source.span(node.target.value), self.expr(node.target.value, worlds)))
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
        """The lines of `else` or `elif`, with the keyword."""
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
