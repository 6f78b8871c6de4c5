"""Cut the body of a function out of a source file, and put a student's in its place: both by name, with `ast`.

    excerpt    what a student gets: the head of the file, its imports, the functions without their bodies
    merge      the whole file again, with the student's functions where the blanks were

A name is "rms_norm", or "KVCache.extend" for a method. No line of the sources is kept here, so an exercise cannot drift
from them; a name that is no longer there is a LookupError, which a test finds.
"""

import ast
from typing import NamedTuple

Definition = ast.FunctionDef | ast.ClassDef
REMOVED = "\0"                                # a line of a body, until it is left out


class Merged(NamedTuple):
    """text: the whole file. places: (first line in it, first line at the student's, number of lines) of each piece."""
    text: str
    places: list[tuple[int, int, int]]

    def theirs(self, line: int) -> int | None:
        """The student's line that stands at this line of the text."""
        for start, own, count in self.places:
            if start <= line < start + count:
                return own + line - start
        return None


def find(tree: ast.Module, name: str) -> ast.FunctionDef:
    """The function of that name, or the method. Raises LookupError."""
    body: list[ast.stmt] = tree.body
    for part in name.split("."):
        found = [node for node in body if isinstance(node, Definition) and node.name == part]
        if not found:
            raise LookupError(f"there is no {name}")
        body = found[0].body
    if not isinstance(found[0], ast.FunctionDef):
        raise LookupError(f"{name} is no function")
    return found[0]


def first_line(node: Definition) -> int:
    """Where it begins, decorators included."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def body_lines(node: ast.FunctionDef) -> tuple[int, int]:
    """First and last line of what follows the docstring."""
    said = node.body[0] if ast.get_docstring(node) is not None else None
    if said is not None and node.body[1:]:
        return (said.end_lineno or 0) + 1, node.end_lineno or 0
    return node.body[0].lineno, node.end_lineno or 0


def names_in(nodes: list[ast.stmt]) -> set[str]:
    """Every name that they use, those of annotations in quotes included."""
    inside = [node for one in nodes for node in ast.walk(one)]
    quoted = {node.value for node in inside if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {node.id for node in inside if isinstance(node, ast.Name)} | quoted


def excerpt(source: str, module: str, blanks: tuple[str, ...], note: str) -> str:
    """The student's file: head, imports, note, and each blank; of a method its whole class, the rest to be read."""
    tree, lines = ast.parse(source), source.splitlines()
    tops = list(dict.fromkeys(name.partition(".")[0] for name in blanks))
    wanted = [node for name in tops for node in tree.body if isinstance(node, Definition) and node.name == name]
    functions = sorted((find(tree, name) for name in blanks), key=lambda node: -node.lineno)

    used = names_in(list(wanted))
    imports = [row for node in tree.body for row in used_of(node, used)]
    given = sorted(name for name in names_at_top(tree) if name in used and name not in tops)

    whole = list(lines)
    for node in functions:                              # from the last to the first: line numbers before stay right
        start, end = body_lines(node)
        indent = " " * (node.col_offset + 4)
        whole[start - 1 : end] = [f'{indent}raise NotImplementedError("{node.name}: your lines go here")',
                                  *[REMOVED] * (end - start)]
    head = tree.body[0]
    parts = [lines[head.lineno - 1 : head.end_lineno], [""]]
    parts += [imports]
    if given:
        parts += [[f"from {module} import {', '.join(given)}  # beside it in the file; yours to call"]]
    parts += [["", *note.splitlines()]]
    for top in sorted(wanted, key=first_line):
        parts += [["", ""], [line for line in whole[first_line(top) - 1 : top.end_lineno] if line is not REMOVED]]
    return "\n".join(line for part in parts for line in part) + "\n"


def used_of(node: ast.stmt, used: set[str]) -> list[str]:
    """An import as a line, without the names that are not used; no line where none is."""
    if not isinstance(node, ast.Import | ast.ImportFrom):
        return []
    names = [alias for alias in node.names if (alias.asname or alias.name).partition(".")[0] in used]
    kept = ast.Import(names) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, names, node.level)
    return [ast.unparse(kept)] if names else []


def names_at_top(tree: ast.Module) -> set[str]:
    """What a file defines: functions, classes, constants."""
    names = {node.name for node in tree.body if isinstance(node, Definition)}
    return names.union(*(assigned(node) for node in tree.body))


def imported(node: ast.stmt) -> set[tuple[str | None, str, str | None]]:
    """(module, name, as what) of each name that an import brings."""
    if not isinstance(node, ast.Import | ast.ImportFrom):
        return set()
    return {(getattr(node, "module", None), alias.name, alias.asname) for alias in node.names}


def assigned(node: ast.stmt) -> set[str]:
    """The names that an assignment gives a value."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def merge(source: str, student: str, module: str, blanks: tuple[str, ...]) -> Merged:
    """The file with the student's functions in it. Functions, constants and imports that a student added come along;
    decorators stay those of the file. Raises LookupError for a blank that the student's file no longer has."""
    tree, theirs = ast.parse(source), ast.parse(student)
    lines, written = source.splitlines(), student.splitlines()
    pieces = []                                         # (first line, last line) here, (first, last) at the student's
    for name in blanks:
        here, there = find(tree, name), find(theirs, name)
        pieces.append((here.lineno, here.end_lineno or 0, there.lineno, there.end_lineno or 0))
    tops = {name.partition(".")[0] for name in blanks}
    at = min(first_line(node) for node in tree.body if isinstance(node, Definition) and node.name in tops)
    for node in theirs.body:
        if not added(node, module, tree):
            continue
        start = first_line(node) if isinstance(node, Definition) else node.lineno
        pieces.append((at, at - 1, start, node.end_lineno or 0))

    text: list[str] = []
    places, done = [], 0
    for first, last, start, end in sorted(pieces):
        text += lines[done : first - 1]
        places.append((len(text) + 1, start, end - start + 1))
        text += written[start - 1 : end]
        done = last
    return Merged("\n".join([*text, *lines[done:]]) + "\n", places)


def added(node: ast.stmt, module: str, tree: ast.Module) -> bool:
    """Whether a statement of a student's file is one that the file itself, `tree`, does not have."""
    if isinstance(node, Definition):
        return node.name not in names_at_top(tree)
    if isinstance(node, ast.ImportFrom) and node.module in (module, "__future__"):
        return False                                    # the second would have to stand at the head
    if isinstance(node, ast.Import | ast.ImportFrom):
        ours = {name for one in tree.body for name in imported(one)}
        return not imported(node) <= ours
    if isinstance(node, ast.If):
        return False                                    # if __name__ == "__main__": a student's own trials
    return bool(assigned(node) - names_at_top(tree))
