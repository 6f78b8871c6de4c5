"""What a careful writer would strike out of a function once branches are gone: values that nobody reads, detours."""

import ast
import functools
import re

from checkpoints.flatten.sources import dedented, parsed, unparsed

WIDTH = 120
Live = frozenset[str]


def reads(node: ast.AST) -> set[str]:
    """Names that a node reads, in functions inside it too."""
    found = set()
    for one in ast.walk(node):
        if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load):
            found.add(one.id)
        elif isinstance(one, ast.AugAssign) and isinstance(one.target, ast.Name):
            found.add(one.target.id)
    return found


@functools.cache
def loaded(lines: tuple[str, ...]) -> frozenset[str]:
    """The same of some lines."""
    return frozenset(reads(parsed(dedented(lines))))


def harmless(node: ast.expr) -> bool:
    """Whether nothing is lost where an expression is not worked out: it changes nothing in place."""
    return not any(isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute)
                   and re.search(r"[a-z]_$|^(advance|append|extend)$", one.func.attr) for one in ast.walk(node))


class Idle:
    """Finds assignments whose values nobody reads, from the last statement to the first."""

    def __init__(self, body: list[ast.stmt]) -> None:
        self.found: dict[ast.stmt, set[int]] = {}               # statement → which of its targets are idle
        self.block(body, frozenset())

    def block(self, body: list[ast.stmt], live: Live) -> Live:
        for node in reversed(body):
            live = self.statement(node, live)
        return live

    def statement(self, node: ast.stmt, live: Live) -> Live:
        match node:
            case ast.If():
                yes, no = self.block(node.body, live), self.block(node.orelse, live)
                return yes | no | reads(node.test)
            case ast.For():
                around = live | reads(node)
                self.block(node.body, around)
                return around
            case ast.Match():
                return frozenset().union(live, reads(node.subject), *(self.block(one.body, live)
                                                                      for one in node.cases))
            case ast.Return():
                return frozenset(reads(node))
            case ast.FunctionDef():
                if node.name not in live:
                    self.found[node] = {0}
                    return live
                self.block(node.body, frozenset())
                own = {one.arg for one in node.args.args}
                return (live - {node.name}) | (reads(node) - own)
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                if (name not in live and harmless(value)) or unparsed(value) == name:
                    self.found[node] = {0}
                    return live
                return (live - {name}) | reads(value)
            case ast.Assign(targets=[ast.Name(id=one), ast.Name(id=other)], value=value) if one != other:
                if idle := {i for i, name in enumerate((one, other)) if name not in live}:
                    self.found[node] = idle
                return (live - {one, other}) | reads(value)
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                if len(targets) == len(values):
                    idle = {i for i, (one, value) in enumerate(zip(targets, values, strict=True))
                            if (isinstance(one, ast.Name) and one.id not in live and harmless(value))
                            or unparsed(one) == unparsed(value)}
                    if idle:
                        self.found[node] = idle
                    live -= {one.id for one in targets if isinstance(one, ast.Name)}
                    kept = [i for i in range(len(values)) if i not in idle]
                    return live.union(*(reads(values[i]) | reads(targets[i]) for i in kept))
        stored = {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
        if isinstance(node, ast.AugAssign):
            stored = set()
        return (live - stored) | reads(node)


@functools.cache
def struck_out(lines: tuple[str, ...], join: bool, whole: bool) -> tuple[str, ...]:
    """All that this file does, to the body of a function. join, whole: `joined_up` too, and how."""
    out = straightened(without_idle(uncaptured([tidy(line) for line in lines])))
    return tuple(joined_up(out, whole) if join else out)


def without_idle(lines: list[str]) -> list[str]:
    """The lines of a function's body without assignments that nobody reads."""
    while True:
        text = dedented(lines)
        found = Idle(parsed(text).body).found
        if not found:
            return lines
        node = max(found, key=lambda one: one.lineno)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            assert isinstance(node.value, ast.Tuple)
            pairs = [pair for i, pair in enumerate(zip(node.targets[0].elts, node.value.elts, strict=True))
                     if i not in found[node]]
            lines = shortened(lines, node, pairs, text)
        elif isinstance(node, ast.Assign) and len(node.targets) == 2 and len(found[node]) == 1:    # x = h = …
            idle, at = node.targets[found[node].pop()], node.lineno - 1
            lines = [*lines[:at], lines[at].replace(f"{unparsed(idle)} = ", "", 1), *lines[at + 1 :]]
        else:
            lines = removed(lines, node.lineno, node.end_lineno or 0)


def uncaptured(lines: list[str]) -> list[str]:
    """`case Yarn(factor=f):` is `case Yarn():` where nobody reads f."""
    text = dedented(lines)
    for case in [one for one in ast.walk(parsed(text)) if isinstance(one, ast.match_case)]:
        if isinstance(case.pattern, ast.MatchClass):
            read = set().union(*map(reads, case.body))
            for field, part in zip(case.pattern.kwd_attrs, case.pattern.kwd_patterns, strict=True):
                if isinstance(part, ast.MatchAs) and part.name and part.name not in read:
                    at = case.pattern.lineno - 1
                    line = re.sub(rf"\b{field}={part.name}(, )?", "", lines[at]).replace(", )", ")")
                    lines = [*lines[:at], line, *lines[at + 1 :]]
    return lines


def removed(lines: list[str], first: int, last: int) -> list[str]:
    """Without a statement, and without the comment lines right above it."""
    start = first - 1
    while start > 0 and lines[start - 1].strip().startswith("#"):
        start -= 1
    rest = lines[:start] + lines[last:]
    indent = len(lines[first - 1]) - len(lines[first - 1].lstrip())
    above = next((line for line in reversed(rest[:start]) if line.strip()), "")
    below = next((line for line in rest[start:] if line.strip()), "")
    opens = above.split("#")[0].rstrip().endswith(":") and len(above) - len(above.lstrip()) < indent
    if opens and len(below) - len(below.lstrip()) < indent:     # its block is empty now
        rest.insert(start, " " * indent + "pass")
    return rest


def shortened(lines: list[str], node: ast.Assign, pairs: list[tuple[ast.expr, ast.expr]], text: str) -> list[str]:
    """An assignment of several values with fewer of them."""
    if not pairs:
        return removed(lines, node.lineno, node.end_lineno or 0)
    first, last = node.lineno - 1, node.end_lineno or 0
    indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
    names = ", ".join(ast.get_source_segment(text, one) or "" for one, _ in pairs)
    values = ", ".join(ast.get_source_segment(text, part) or "" for _, part in pairs)
    comment = re.search(r"\s{2,}#.*$", lines[last - 1])
    if len(pairs) == 1 and names.startswith("(") and values.startswith("("):
        names, values = names[1:-1], values[1:-1]
    return [*lines[:first], f"{indent}{names} = {values}{comment[0] if comment else ''}", *lines[last:]]


def straightened(lines: list[str]) -> list[str]:
    """`y = f(x)` before `return y` is `return f(x)`."""
    text = dedented(lines)
    body = parsed(text).body
    for one, other in zip(body, body[1:], strict=False):
        match one, other:
            case (ast.Assign(targets=[ast.Name(id=name)], value=value), ast.Return(value=ast.Name(id=again))):
                if name == again and one.lineno == one.end_lineno:
                    line = lines[one.lineno - 1]
                    start = line.index(name)
                    head = line[:start] + "return " + (ast.get_source_segment(text, value) or "")
                    comment = re.search(r"\s{2,}#.*$", line)
                    return [*lines[: one.lineno - 1], head + (comment[0] if comment else ""),
                            *lines[other.end_lineno or 0 :]]
    return lines


def joined_up(lines: list[str], whole: bool) -> list[str]:
    """A value that only the next statement reads, written there: an attribute, or, `whole`, any short one."""
    text = dedented(lines)
    found = parsed(text)
    for block in [one.body for one in ast.walk(found) if hasattr(one, "body") and isinstance(one.body, list)]:
        for one, other in zip(block, block[1:], strict=False):
            if not (isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Name)
                    and isinstance(other, (ast.Assign, ast.Return)) and one.lineno == one.end_lineno
                    and other.lineno == other.end_lineno and "#" not in lines[one.lineno - 1]):
                continue
            name, value = one.targets[0].id, ast.get_source_segment(text, one.value) or ""
            times = [node for node in ast.walk(found) if isinstance(node, ast.Name) and node.id == name
                     and isinstance(node.ctx, ast.Load) and node.lineno > one.lineno]
            stores = [node for node in ast.walk(found) if isinstance(node, ast.Name) and node.id == name
                      and isinstance(node.ctx, ast.Store) and node.lineno > one.lineno]
            before_next = [node for node in times if not stores or node.lineno <= stores[0].lineno]
            plain = re.fullmatch(r"[a-z]\w*\.[\w.]+(\[-?\d\])?|[a-z]\w*\(\w+\)", value) or whole
            lazy = [node for node in ast.walk(other) if isinstance(node, (ast.Lambda, ast.GeneratorExp, ast.ListComp))]
            if len(before_next) != 1 or before_next[0].lineno != other.lineno or not plain or lazy:
                continue
            if name == "x" and not (stores and stores[0].lineno == other.lineno):
                continue                                        # the stream keeps its own line
            at, line = before_next[0].col_offset, text.splitlines()[other.lineno - 1]
            column = len(line.encode()[:at].decode())
            new = line[:column] + value + line[column + len(name) :]
            new, mark, comment = new.partition("  # ")
            if len(new.rstrip()) > 100 or name == "x":
                continue
            if mark:                                            # the comment stays in its column
                new = f"{new.rstrip():<{line.index('  # ') + 2}}# {comment.lstrip()}"
            indent = len(lines[other.lineno - 1]) - len(line)
            out = [*lines[: one.lineno - 1], *lines[one.lineno : other.lineno - 1], " " * indent + new,
                   *lines[other.lineno :]]
            return joined_up(out, whole)
    return lines


def tidy(line: str) -> str:
    """Without parentheses that say nothing: around a single name or number, or all that is returned or given."""
    whole, mark, comment = line.partition("  #")
    code = whole.rstrip()
    whole_value = r"(return |\s= )\(([^()]*(?:\([^()]*\)[^()]*)*)\)$"
    code = re.sub(whole_value, lambda found: found[0] if " for " in found[2] else found[1] + found[2], code)
    while code != (code := re.sub(r"(?<![\w\]])\(\(([^(),]*(?:\([^()]*\))?[^(),]*)\)\)", r"(\1)", code)):
        pass                                                    # ((x)), but not f((a, b))
    code = re.sub(r"(?<=\w=)\(([^(),]*)\)(?=[,)])", r"\1", code).replace(", enable_gqa=False", "")
    code = re.sub(r"(?<=\w\()\(([^(),]*(?:\([^()]*\)[^(),]*)?)\)(?=\))", r"\1", code)
    if '"' not in code:
        code = re.sub(r"(?<![\w)\]])\((\w+)\)(?! = )", r"\1", code)
    code = re.sub(r"(F\.linear\([^()]*?), None\)", r"\1)", code)
    code = re.sub(r"(?<= and )\(([\w.]+ [<>=]+ [\w.]+)\)", r"\1", code)
    code = re.sub(r"(super\(\).__init__\(.*), False\)$", r"\1, bias=False)", code)
    return code + (" " * max(0, len(whole) - len(code)) + mark + comment if mark else "")


def fitted(lines: list[str]) -> list[str]:
    """Lines within the width: a comment closes up, or goes above; code is broken at a comma, or no more broken."""
    out: list[str] = []
    for i in range(len(lines) - 1, 0, -1):                      # what fits one line again, of those that end in `in`
        if lines[i - 1].endswith(" in") and len(lines[i - 1]) + len(lines[i].strip()) < WIDTH:
            lines[i - 1 : i + 1] = [f"{lines[i - 1]} {lines[i].strip()}"]
    for line in lines:
        if len(line) <= WIDTH or line.lstrip().startswith("#") or "#" not in line:
            out += [line] if len(line) <= WIDTH else broken(line)
            continue
        at = line.rindex("#")
        code, comment = line[:at].rstrip(), line[at:]
        indent = line[: len(line) - len(line.lstrip())]
        short = f"{code}  {comment}"
        out += [short] if len(short) <= WIDTH else [indent + comment, *(broken(code) if len(code) > WIDTH else [code])]
    return out


def broken(line: str) -> list[str]:
    """A line in two, behind the last comma or before the last operator that fits, inside a bracket."""
    indent = len(line) - len(line.lstrip())
    goes_on = max(0, line.count(")") - line.count("("))         # brackets that a line above opened
    opened, best = [indent - 1] * goes_on, 0
    for i, letter in enumerate(line[:WIDTH]):
        if letter in "([{":
            opened.append(i)
        elif letter in ")]}" and opened:
            opened.pop()
        elif letter == "," and opened and not re.search(r"[\w)\]]\[$", line[: opened[-1] + 1]):     # not in x[…, None]
            best, at = i + 1, opened[0]
    if not best:
        head, equals, value = line.partition(" = ")
        cut = value.rfind(" ** ", 0, WIDTH - len(head) - 5)
        return [line] if cut < 0 else [f"{head} = ({value[:cut]}", " " * (len(head) + 4) + f"{value[cut + 1 :]})"]
    rest = " " * (at + 1) + line[best:].lstrip()
    return [line[:best], *(broken(rest) if len(rest) > WIDTH else [rest])]
