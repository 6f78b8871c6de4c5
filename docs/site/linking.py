"""Walk a file and say of each name where it is defined: the scopes of Python, and the types of names.py.

A function's names are its parameters and all that it binds anywhere in its body; a comprehension has its own; a class's
body is seen from itself alone, not from its methods. A name that no scope has is the module's, or Python's.
"""

import ast
import re
from dataclasses import dataclass, field

from docs.site.names import (
    Class,
    Kind,
    Module,
    Place,
    Sources,
    Types,
    bound_by,
    every_argument,
    paired,
    walk_statements,
)

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)


@dataclass
class Scope:
    """The lines that bind the names of a function, and what those are."""
    lines: dict[str, int] = field(default_factory=dict)
    types: Types = field(default_factory=dict)
    of_class: bool = False


class Linker(ast.NodeVisitor):
    """found: (line, column) → place."""

    def __init__(self, sources: Sources, module: Module) -> None:
        self.sources, self.module = sources, module
        self.found: dict[tuple[int, int], Place] = {}
        self.scopes: list[Scope] = []
        self.classes: list[Class] = []

    # ---- what is written down

    def add(self, line: int, byte: int, place: Place | None, *, shift: int = 0) -> None:
        """A link from the name that begins there; ast counts in bytes, we in characters."""
        if place is not None:
            column = len(self.module.lines[line - 1].encode()[:byte].decode()) + shift
            self.found.setdefault((line, column), place)

    def types(self) -> Types:
        """What the names in sight are, the inner scopes over the outer."""
        seen: Types = {}
        for scope in self.scopes:
            if not scope.of_class or scope is self.scopes[-1]:
                seen |= {name: scope.types.get(name) for name in scope.lines}
        return seen

    def place(self, name: str) -> Place | None:
        """Where a name that is read here is bound."""
        for scope in reversed(self.scopes):
            if name in scope.lines and (not scope.of_class or scope is self.scopes[-1]):
                return self.module.place(scope.lines[name])
        found = self.sources.define(self.module, name)
        return None if found is None else found[0].place(found[1])

    # ---- nodes

    def visit_Name(self, node: ast.Name) -> None:
        self.add(node.lineno, node.col_offset, self.place(node.id))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.visit(node.value)
        owner = self.sources.kind(node.value, self.module, self.types())
        place = self.member(owner, node.attr)
        if place is not None and node.end_lineno is not None and node.end_col_offset is not None:
            self.add(node.end_lineno, node.end_col_offset - len(node.attr.encode()), place)

    def member(self, owner: Kind | None, name: str) -> Place | None:
        """Where owner.name is defined."""
        if owner is None:
            return None
        if isinstance(owner.of, Class):
            found = owner.of.find(name)
            return None if found is None else found[0].module.place(found[1])
        if isinstance(owner.of, Module):
            defined = self.sources.define(owner.of, name)
            below = self.sources.submodule(owner.of, name)
            return defined[0].place(defined[1]) if defined else below.module.place(1) if below else None
        return None

    def visit_keyword(self, node: ast.keyword) -> None:
        self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        made = self.sources.kind(node.func, self.module, self.types())
        for keyword in node.keywords:                               # f(name=…): the parameter, or the field
            if keyword.arg is None or made is None:
                continue
            if isinstance(made.of, Class) and not made.instance and "__init__" not in made.of.members:
                self.add(keyword.lineno, keyword.col_offset, self.member(made, keyword.arg))
            function = made.of if isinstance(made.of, ast.FunctionDef) else None
            if isinstance(made.of, Class) and not made.instance:
                function = next((each for each in made.of.node.body
                                 if isinstance(each, ast.FunctionDef) and each.name == "__init__"), None)
            for each in every_argument(function.args) if function else []:
                if each.arg == keyword.arg:
                    self.add(keyword.lineno, keyword.col_offset, made.module.place(each.lineno))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level or not node.module:
            return
        self.dotted(node.module, node.lineno, node.col_offset)
        owner = self.sources.by_name.get(node.module)
        for alias in node.names:
            target = self.sources.by_name.get(f"{node.module}.{alias.name}")
            found = self.sources.define(owner, alias.name) if owner is not None else None
            place = found[0].place(found[1]) if found else target.place(1) if target else None
            self.add(alias.lineno, alias.col_offset, place)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            target = self.sources.by_name.get(alias.name)
            self.add(alias.lineno, alias.col_offset, target.place(1) if target else None)

    def dotted(self, name: str, line: int, byte: int) -> None:
        """The module after `from`."""
        target = self.sources.by_name.get(name)
        at = re.search(rf"from\s+{re.escape(name)}\b", self.module.lines[line - 1][byte:])
        if target is not None and at is not None:
            self.add(line, byte, target.place(1), shift=at.end() - len(name))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for each in [*node.decorator_list, *node.bases, *node.keywords]:
            self.visit(each)
        known = self.module.nodes.get(node.name)
        at_top = isinstance(known, Class) and known.node is node
        self.classes.append(known if at_top else Class(self.module, node))          # type: ignore[arg-type]
        self.scopes.append(self.scope(node.body, of_class=True))
        for each in node.body:
            self.visit(each)
        self.scopes.pop()
        self.classes.pop()

    def visit_FunctionDef(self, node: Function) -> None:
        given = every_argument(node.args)
        for each in [*getattr(node, "decorator_list", []), *node.args.defaults, *node.args.kw_defaults,
                     *(argument.annotation for argument in given), getattr(node, "returns", None)]:
            if each is not None:
                self.visit(each)
        body = [ast.Expr(node.body)] if isinstance(node, ast.Lambda) else node.body
        inner = Scope() if isinstance(node, ast.Lambda) else self.scope(node.body)
        for argument in given:
            inner.lines[argument.arg] = argument.lineno
            inner.types[argument.arg] = self.sources.annotated(argument.annotation, self.module)
        if self.classes and given and self.scopes and self.scopes[-1].of_class and given[0].arg in ("self", "cls"):
            inner.types[given[0].arg] = Kind(self.classes[-1], self.module, given[0].arg == "self")
        self.scopes.append(inner)
        if not isinstance(node, ast.Lambda):
            self.read_types(node.body, inner)
        for each in body:
            self.visit(each)
        self.scopes.pop()

    visit_AsyncFunctionDef = visit_FunctionDef                                      # type: ignore[assignment]
    visit_Lambda = visit_FunctionDef                                                # type: ignore[assignment]

    def scope(self, body: list[ast.stmt], of_class: bool = False) -> Scope:
        """All names that a body binds, each at its first line; what it imports or calls global is not its own."""
        lines: dict[str, int] = {}
        for node in walk_statements(body):
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                for name, line in bound_by(node):
                    lines.setdefault(name, line)
        for node in walk_statements(body):
            if isinstance(node, (ast.Global, ast.Nonlocal)):
                for name in node.names:
                    lines.pop(name, None)
        return Scope(lines, of_class=of_class)

    def read_types(self, body: list[ast.stmt], scope: Scope) -> None:
        """x = Class(…), x = self.part, x: Class: where all that binds x agrees."""
        for node in walk_statements(body):
            pairs: list[tuple[ast.expr, ast.expr | None]] = []
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                pairs = paired(node.targets[0], node.value)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                scope.types.setdefault(node.target.id, self.sources.annotated(node.annotation, self.module))
            for target, value in pairs:
                if isinstance(target, ast.Name):
                    found = self.sources.kind(value, self.module, self.types())
                    scope.types[target.id] = found if scope.types.get(target.id, found) == found else None

    def comprehension(self, node: ast.expr) -> None:
        inner = Scope()
        for generator in node.generators:                                           # type: ignore[attr-defined]
            for found in ast.walk(generator.target):
                if isinstance(found, ast.Name):
                    inner.lines.setdefault(found.id, found.lineno)
        self.visit(node.generators[0].iter)                                         # type: ignore[attr-defined]
        self.scopes.append(inner)
        self.generic_visit(node)
        self.scopes.pop()

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = comprehension
