"""What the lines of a solution use, told without them: read from the sources, so that it is what they are today.

    helpers     each function and constant of the project that the reference calls or reads: signature, first sentence
    fields      what the reference reads of an argument that is an object of the project: its line, with its comment

Both are found by name in the body that is blank, and followed through imports to the file that defines them.
"""

import ast
import textwrap
from pathlib import Path

from docs.exercises import ROOT, Exercise
from docs.exercises.blank import Definition, assigned, find

Found = tuple[Path, ast.stmt]


def told(exercise: Exercise) -> list[str]:
    """The lines of a student's file that tell it; none where the reference uses nothing but PyTorch."""
    file, tree = ROOT / exercise.file, ast.parse(exercise.source())
    functions = [find(tree, blank) for blank in exercise.blanks]
    tops = {blank.partition(".")[0] for blank in exercise.blanks}
    lines = [line for name in names_in_order(functions) if name not in tops for line in helper(file, name)]
    if lines:
        lines.insert(0, "Yours to call or to read:")
    for name, kinds, read in objects(functions):
        for kind in kinds:
            said = dict.fromkeys(line for attribute in read for line in field(file, kind, attribute))
            if said:
                lines += [f"{name}, a {kind}, has among others:", *said]
    return lines


def names_in_order(functions: list[ast.FunctionDef]) -> list[str]:
    """The names that their bodies read, each once, in the order of the lines."""
    nodes = [node for function in functions for one in function.body for node in ast.walk(one)]
    used = [node for node in nodes if isinstance(node, ast.Name)]
    return list(dict.fromkeys(node.id for node in sorted(used, key=lambda node: (node.lineno, node.col_offset))))


def objects(functions: list[ast.FunctionDef]) -> list[tuple[str, list[str], list[str]]]:
    """(an argument, the names in its annotation, what the bodies read of it), where they read something."""
    found: list[tuple[str, list[str], list[str]]] = []
    for function in functions:
        for argument in function.args.args:
            if argument.annotation is None:
                continue
            uses = [node for one in function.body for node in ast.walk(one) if isinstance(node, ast.Attribute)
                    and isinstance(node.value, ast.Name) and node.value.id == argument.arg]
            read = [node.attr for node in sorted(uses, key=lambda node: (node.lineno, node.col_offset))]
            words = ast.unparse(argument.annotation).strip("'").replace("|", " ").split()
            found.append((argument.arg, [word for word in words if word.isidentifier()], list(dict.fromkeys(read))))
    return [one for one in found if one[2]]


def resolve(file: Path, name: str) -> Found | None:
    """Where the project defines what a file knows by this name; None for what is not the project's."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, Definition) and node.name == name or name in assigned(node):
            return file, node
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    path = ROOT / node.module.replace(".", "/")
                    places = [path.with_suffix(".py"), path / "__init__.py"]
                    return next((resolve(place, alias.name) for place in places if place.exists()), None)
    return None


def helper(file: Path, name: str) -> list[str]:
    """A signature and what its docstring says first, or the line of a constant."""
    found = resolve(file, name)
    if found is None:
        return []
    place, node = found
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return [f"    {name}({ast.unparse(node.args)}){returns}", *sentence(node)]
    if isinstance(node, ast.ClassDef):
        return [f"    class {name}", *sentence(node)]
    rows = place.read_text().splitlines()[node.lineno - 1 : node.end_lineno]
    return [f"    {row}" for row in rows]


def sentence(node: Definition) -> list[str]:
    """The first paragraph of a docstring, as lines."""
    first = (ast.get_docstring(node) or "").partition("\n\n")[0]
    return [f"        {line}" for line in textwrap.wrap(" ".join(first.split()), 104)]


def field(file: Path, kind: str, attribute: str) -> list[str]:
    """The lines that declare an attribute, comments behind and below them included, or that set it."""
    found = resolve(file, kind)
    if found is None or not isinstance(found[1], ast.ClassDef):
        return []
    place, owner = found
    lines = place.read_text().splitlines()
    for node in owner.body:
        if attribute in assigned(node):
            rows = [lines[node.lineno - 1]]
            for row in lines[node.end_lineno or 0 :]:           # a comment that goes on below
                if not row.lstrip().startswith("#"):
                    break
                rows.append(row)
            return rows
    for node in ast.walk(owner):
        targets = [one for target in node.targets for one in ast.walk(target)] if isinstance(node, ast.Assign) else []
        if any(isinstance(one, ast.Attribute) and one.attr == attribute for one in targets):
            return [f"    {row.strip()}" for row in lines[node.lineno - 1 : node.end_lineno]]
    return []
