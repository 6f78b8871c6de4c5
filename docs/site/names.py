"""Where is a name defined? For each name in a file the file and line that define it, if that is sure.

    name of this file       a function, a class, a constant, an import: there, or in the file it is imported from
    local                   where the function first binds it: a parameter, an assignment, a loop
    x.name                  a module's name; or a member of a class of ours, where we know that x is of it

What x is: self; a parameter or an attribute with an annotation; something that a class or an annotated function of ours
has just made. Nothing else is guessed. What comes from torch or Python has no page here, and no link.

    sources = Sources(root, paths)
    sources.links(path)     {(line, column): Place}, lines from 1, columns from 0, in characters
"""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """A file, from the root, and a line of it; 1 is also the file as a whole."""
    path: str
    line: int
    title: str = ""             # the line itself, for whoever hovers


@dataclass
class Class:
    """A class of ours: its members, what its attributes are, and what it inherits from."""
    module: "Module"
    node: ast.ClassDef
    members: dict[str, int] = field(default_factory=dict)
    types: dict[str, ast.expr] = field(default_factory=dict)        # annotation, or the call that made it

    @cached_property
    def bases(self) -> list["Class"]:
        found = (self.module.sources.kind(base, self.module, {}) for base in self.node.bases)
        return [base.of for base in found if isinstance(base, Kind) and isinstance(base.of, Class)]

    def find(self, name: str) -> "tuple[Class, int] | None":
        """The class, this one or one above, that has a member, and its line."""
        if name in self.members:
            return self, self.members[name]
        return next((found for base in self.bases if base is not self and (found := base.find(name))), None)

    def type_of(self, name: str) -> "tuple[Class, ast.expr] | None":
        if name in self.types:
            return self, self.types[name]
        return next((found for base in self.bases if base is not self and (found := base.type_of(name))), None)


@dataclass(frozen=True)
class Kind:
    """What an expression is: a module, a class, a function; or, if `instance`, an object of a class."""
    of: "Module | Class | ast.FunctionDef"
    module: "Module"
    instance: bool = False


Types = dict[str, "Kind | None"]


class Module:
    """A file: its names, with the line of each, and what they are."""

    def __init__(self, sources: "Sources", path: str, text: str) -> None:
        self.sources, self.path, self.lines, self.tree = sources, path, text.splitlines(), ast.parse(text)
        self.name = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        self.names: dict[str, int] = {}
        self.imported: dict[str, tuple[str, str | None]] = {}           # name → module, name there
        self.nodes: dict[str, Class | ast.FunctionDef] = {}
        for node in walk_statements(self.tree.body):
            for name, line in bound_by(node):
                self.names.setdefault(name, line)
            if isinstance(node, ast.ClassDef):
                self.nodes.setdefault(node.name, members(Class(self, node)))
            elif isinstance(node, ast.FunctionDef):
                self.nodes[node.name] = node
        for each in ast.walk(self.tree):
            if isinstance(each, ast.ImportFrom) and each.module and not each.level:
                for alias in each.names:
                    self.imported[alias.asname or alias.name] = each.module, alias.name
            elif isinstance(each, ast.Import):
                for alias in each.names:
                    self.imported[alias.asname or alias.name.partition(".")[0]] = \
                        alias.name if alias.asname else alias.name.partition(".")[0], None

    def place(self, line: int) -> Place:
        return Place(self.path, line, self.lines[line - 1].strip() if line <= len(self.lines) else "")


class Sources:
    """All files that have a page."""

    def __init__(self, root: Path, paths: Iterable[str]) -> None:
        self.modules = {path: Module(self, path, (root / path).read_text()) for path in paths}
        self.by_name = {module.name: module for module in self.modules.values()}

    def define(self, module: Module, name: str, depth: int = 0) -> tuple[Module, int, Kind | None] | None:
        """A name of a module: the file, line and kind of its definition, through imports."""
        if name in module.imported and depth < 8:
            source, original = module.imported[name]
            target = self.by_name.get(source if original is None else f"{source}.{original}")
            if original is not None and (owner := self.by_name.get(source)) is not None:
                found = self.define(owner, original, depth + 1)
                if found is not None:
                    return found
            return (target, 1, Kind(target, target)) if target is not None else None
        if name not in module.names:
            return None
        node = module.nodes.get(name)
        return module, module.names[name], Kind(node, module) if node is not None else None

    def kind(self, node: ast.expr | None, module: Module, local: Types) -> Kind | None:
        """What an expression is, as far as that can be read off."""
        if isinstance(node, ast.Name):
            if node.id in local:
                return local[node.id]
            found = self.define(module, node.id)
            return found[2] if found else None
        if isinstance(node, ast.Attribute):
            return self.kind_of_member(self.kind(node.value, module, local), node.attr)
        if isinstance(node, ast.Call):
            made = self.kind(node.func, module, local)
            if made is not None and isinstance(made.of, Class) and not made.instance:
                return Kind(made.of, made.of.module, True)
            if made is not None and isinstance(made.of, ast.FunctionDef):
                return self.annotated(made.of.returns, made.module)
        return None

    def kind_of_member(self, owner: Kind | None, name: str) -> Kind | None:
        """What owner.name is."""
        if owner is None:
            return None
        if isinstance(owner.of, Module):
            found = self.define(owner.of, name)
            return found[2] if found else self.submodule(owner.of, name)
        if not isinstance(owner.of, Class):
            return None
        typed = owner.of.type_of(name)
        if typed is not None:
            holder, said = typed
            return self.kind(said, holder.module, {}) if isinstance(said, ast.Call) else \
                self.annotated(said, holder.module)
        found_in = owner.of.find(name)
        method = found_in and next((each for each in found_in[0].node.body if isinstance(each, ast.FunctionDef)
                                    and each.name == name), None)
        if found_in is None or method is None:
            return None
        decorated = {each.id for each in method.decorator_list if isinstance(each, ast.Name)}
        if decorated & {"property", "cached_property"}:
            return self.annotated(method.returns, found_in[0].module)
        return Kind(method, found_in[0].module)

    def submodule(self, module: Module, name: str) -> Kind | None:
        target = self.by_name.get(f"{module.name}.{name}")
        return Kind(target, target) if target is not None else None

    def annotated(self, said: ast.expr | None, module: Module) -> Kind | None:
        """An object of the class that an annotation names: C, "C", C | None, Optional parts aside."""
        if isinstance(said, ast.Constant) and isinstance(said.value, str):
            try:
                said = ast.parse(said.value, mode="eval").body
            except SyntaxError:
                return None
        if isinstance(said, ast.BinOp) and isinstance(said.op, ast.BitOr):
            sides = [side for side in (said.left, said.right) if ast.unparse(side) != "None"]
            return self.annotated(sides[0], module) if len(sides) == 1 else None
        found = self.kind(said, module, {}) if isinstance(said, (ast.Name, ast.Attribute)) else None
        return Kind(found.of, found.of.module, True) if found is not None and isinstance(found.of, Class) else None

    def links(self, path: str) -> dict[tuple[int, int], Place]:
        """For each name of the file that is defined in one of ours, where."""
        from docs.site.linking import Linker  # which asks this file for kinds
        linker = Linker(self, self.modules[path])
        linker.visit(linker.module.tree)
        return linker.found


# ---- what binds a name

def walk_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a block, with those inside if, for, with, try; not those of functions and classes."""
    for node in body:
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            for part in ("body", "orelse", "finalbody"):
                yield from walk_statements(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from walk_statements(handler.body)
            for case in getattr(node, "cases", []):
                yield from walk_statements(case.body)


def bound_by(node: ast.stmt) -> Iterator[tuple[str, int]]:
    """The names that a statement itself binds, each with its line."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name, node.lineno
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        for alias in node.names:
            yield alias.asname or alias.name.partition(".")[0], alias.lineno
    else:
        inner = [child for child in ast.iter_child_nodes(node) if not isinstance(child, (ast.stmt, ast.excepthandler))]
        for each in inner:
            for found in ast.walk(each):
                if isinstance(found, ast.Name) and isinstance(found.ctx, ast.Store):
                    yield found.id, found.lineno
        for handler in getattr(node, "handlers", []):
            if handler.name:
                yield handler.name, handler.type.end_lineno or handler.lineno


def members(found: Class) -> Class:
    """Fill in what a class and its methods bind: x = …, def x, self.x = …."""
    for node in walk_statements(found.node.body):
        for name, line in bound_by(node):
            found.members.setdefault(name, line)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.types.setdefault(node.target.id, node.annotation)
    for method in found.node.body:
        if not isinstance(method, ast.FunctionDef):
            continue
        given = {each.arg: each.annotation for each in every_argument(method.args)}
        for statement in ast.walk(method):
            if not isinstance(statement, (ast.Assign, ast.AnnAssign)):
                continue
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target, value in (pair for each in targets for pair in paired(each, statement.value)):
                if not (isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"):
                    continue
                found.members.setdefault(target.attr, target.lineno)
                said: ast.expr | None = value if isinstance(value, ast.Call) else None      # self.x = Class(…)
                if isinstance(statement, ast.AnnAssign):                    # self.x: Class = …
                    said = statement.annotation
                elif isinstance(value, ast.Name):                           # self.x = x, a parameter with an annotation
                    said = given.get(value.id)
                if said is not None:
                    found.types.setdefault(target.attr, said)
    return found


def paired(target: ast.expr, value: ast.expr | None) -> list[tuple[ast.expr, ast.expr | None]]:
    """The targets of an assignment, each with what it gets: a, b = x, y. Of a, b = f() that is not known: None."""
    if not isinstance(target, ast.Tuple):
        return [(target, value)]
    same = isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts)
    return list(zip(target.elts, value.elts if same else [None] * len(target.elts), strict=True))   # type: ignore


def every_argument(arguments: ast.arguments) -> list[ast.arg]:
    """All parameters, in the order of their writing."""
    return [*arguments.posonlyargs, *arguments.args, *([arguments.vararg] if arguments.vararg else []),
            *arguments.kwonlyargs, *([arguments.kwarg] if arguments.kwarg else [])]
