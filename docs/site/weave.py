"""A source file as rows: what is said about some lines at the left, those lines at the right.

    row begins at                       it says
    the first line of the code          nothing
    a function or class                 its docstring, which the code then lacks
    lines that are a comment            them, which the code then lacks

The docstring of the file, its head, stands above all rows.
"""

import ast
import inspect
import re
from dataclasses import dataclass, field

KEPT = re.compile(r"#\s*(type:|noqa|!)")                # comments that tools read stay in the code


@dataclass
class Row:
    """title: the function or class that begins here. prose: what is said. lines: those of the code, from 1."""
    start: int
    title: str = ""
    prose: str = ""
    heading: bool = False                               # the prose is the title of a part: # ---- letters
    lines: list[int] = field(default_factory=list)


def weave(source: str) -> tuple[str, list[Row]]:
    """The head of a file, and its rows."""
    tree, lines = ast.parse(source), source.splitlines()
    head, hidden = ast.get_docstring(tree, clean=False) or "", set(docstring_lines(tree))
    rows = {row.start: row for row in comments(lines, strings(tree))}
    for row in rows.values():
        hidden |= set(row.lines)
    for node, title in definitions(tree):
        start = min([node.lineno, *(each.lineno for each in node.decorator_list)])
        said = ast.get_docstring(node, clean=False)
        if said is None and "." in title:
            continue
        above = next((row for row in rows.values() if row.lines[-1:] == [start - 1] and not row.heading), None)
        prose = inspect.cleandoc(said) if said else ""
        if above is not None:                           # a comment right above belongs to it
            rows.pop(above.start)
            prose = f"{above.prose}\n\n{prose}"
        rows[start] = Row(start, title, prose)
        hidden |= set(docstring_lines(node))
    rows.setdefault(1, Row(1))
    starts = sorted(rows)
    for start, end in zip(starts, [*starts[1:], len(lines) + 1], strict=True):
        rows[start].lines = trimmed([n for n in range(start, end) if n not in hidden], lines)
    return head, [rows[start] for start in starts if rows[start].lines or rows[start].prose]


def trimmed(numbers: list[int], lines: list[str]) -> list[int]:
    """Without the blank lines at either end."""
    while numbers and not lines[numbers[0] - 1].strip():
        numbers = numbers[1:]
    while numbers and not lines[numbers[-1] - 1].strip():
        numbers = numbers[:-1]
    return numbers


def definitions(tree: ast.Module) -> list[tuple[ast.FunctionDef | ast.ClassDef, str]]:
    """Functions and classes of the file, and the methods of those, with their names."""
    found: list[tuple[ast.FunctionDef | ast.ClassDef, str]] = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.append((node, node.name))
            if isinstance(node, ast.ClassDef):
                found += [(each, f"{node.name}.{each.name}") for each in node.body if isinstance(each, ast.FunctionDef)]
    return found


def docstring_lines(node: ast.Module | ast.FunctionDef | ast.ClassDef) -> range:
    """The lines of its docstring, if they are its alone."""
    if ast.get_docstring(node) is None:
        return range(0)
    return range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)


def strings(tree: ast.Module) -> set[int]:
    """Lines inside of strings that run over several: a # there begins no comment."""
    return {line for node in ast.walk(tree) if isinstance(node, (ast.Constant, ast.JoinedStr))
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1) if node.end_lineno != node.lineno}


def comments(lines: list[str], inside: set[int]) -> list[Row]:
    """Runs of lines that are nothing but a comment, at one indentation."""
    found: list[Row] = []
    for number, line in enumerate(lines, 1):
        text = line.lstrip()
        if not text.startswith("#") or number in inside or KEPT.match(text):
            continue
        indent = len(line) - len(text)
        last = found[-1] if found else None
        said = text.lstrip("#").removeprefix(" ").rstrip()
        if said.startswith(("----", "====")) or last is None or last.lines[-1] != number - 1 or last.heading \
                or len(lines[number - 2]) - len(lines[number - 2].lstrip()) != indent:
            title = said.strip("-= ")
            found.append(Row(number, prose=title if said.startswith(("----", "====")) else said,
                             heading=said.startswith(("----", "====")), lines=[number]))
        else:
            last.prose += f"\n{said}"
            last.lines.append(number)
    return found
