"""What is known of a value before the model runs, and how an expression is worked out as far as that goes.

A *world* is one way in which a function is called: a value for each of its variables, a `Run` for what only a run can
know, a tensor or a size that follows from one. A method has a world for each module that has it, so `self.config` is
known in each of them. `value(node, world, module)` is the expression's value in one world.
"""

import ast
import builtins
import dataclasses
import math
import operator
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from checkpoints.flatten.sources import global_value, is_ours, unparsed

World = dict[str, Any]


class Run:
    """A value that only a run knows. optional: it may be None. kind: its class, where that is one of ours.

    `a is b` for two of them means that they will be the same value."""

    def __init__(self, optional: bool = False, kind: type | None = None) -> None:
        self.optional, self.kind = optional, kind


class OneOf:
    """One of several functions; which of them only a run knows."""

    def __init__(self, functions: tuple[Callable[..., Any], ...]) -> None:
        self.functions = functions

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OneOf) and other.functions == self.functions

    def __hash__(self) -> int:
        return hash(self.functions)


BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.BitOr: operator.or_,
}
COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}
SAME = {ast.Eq: True, ast.LtE: True, ast.GtE: True, ast.Is: True,
        ast.NotEq: False, ast.Lt: False, ast.Gt: False, ast.IsNot: False}
UNARY: dict[type, Callable[[Any], Any]] = {ast.USub: operator.neg, ast.Not: operator.not_}
PURE = (min, max, int, float, bool, len, isinstance, type, tuple, sum, abs, str, dataclasses.replace)


def known(value: Any) -> bool:
    return not isinstance(value, Run)


def same(a: Any, b: Any) -> bool:
    """Whether two values are the same, 1 and 1.0 and True apart."""
    return a is b or (type(a) is type(b) and not isinstance(a, (Run, nn.Module)) and bool(a == b))


def settled(value: Any) -> Any:
    """A value that Python handed over: tensors, and lists that may grow, are for the run."""
    return Run() if isinstance(value, (Tensor, list, dict, nn.ModuleList)) else value


class Evaluator:
    """Works out expressions in the worlds of one function.

    facts: expressions that are known otherwise. in_place: classes of the library → what stands in for them."""

    def __init__(self, module: str, facts: dict[str, Any], in_place: dict[Any, Any]) -> None:
        self.module, self.facts, self.in_place = module, facts, in_place
        self.memo: dict[tuple[ast.expr, int], tuple[Any, World]] = {}           # what was worked out, in which world

    def value(self, node: ast.expr, world: World) -> Any:
        """The value of an expression, or a Run."""
        if self.facts:
            text = unparsed(node)
            if text in self.facts:
                return self.facts[text]
        key = node, id(world)
        if key not in self.memo:
            method: Callable[[Any, World], Any] | None = getattr(self, type(node).__name__, None)
            self.memo[key] = Run() if method is None else method(node, world), world
        return self.memo[key][0]

    def Constant(self, node: ast.Constant, world: World) -> Any:
        return node.value

    def Name(self, node: ast.Name, world: World) -> Any:
        if node.id in world:
            return world[node.id]
        try:
            value = settled(global_value(self.module, node.id))
        except KeyError:
            return getattr(builtins, node.id, Run())
        return self.in_place.get(value, value) if isinstance(value, type) else value

    def Attribute(self, node: ast.Attribute, world: World) -> Any:
        owner = self.value(node.value, world)
        if isinstance(owner, Run):
            return self.of_run(owner, node.attr)
        if isinstance(owner, OneOf):
            return Run()
        try:
            return settled(getattr(owner, node.attr))
        except AttributeError:
            return Run()

    def of_run(self, owner: Run, name: str) -> Any:
        """An attribute of a value that only a run knows: what its class says, or what kind it is."""
        kind = self.in_place.get(owner.kind, owner.kind)
        if not isinstance(kind, type):                          # a mask is a tensor here
            return Run(optional=True)
        found = vars(kind).get(name) if kind in self.in_place.values() else getattr(kind, name, None)
        if isinstance(found, types.FunctionType):
            return types.MethodType(found, owner)
        if kind in self.in_place.values() and name in vars(kind) and not hasattr(found, "__get__"):
            return found                                        # a constant of the class
        return Run(optional=name in vars(kind) and found is None)

    def Tuple(self, node: ast.Tuple, world: World) -> Any:
        if any(isinstance(one, ast.Starred) for one in node.elts):
            return Run()
        return tuple(self.value(one, world) for one in node.elts)

    def Subscript(self, node: ast.Subscript, world: World) -> Any:
        owner, index = self.value(node.value, world), self.value(node.slice, world)
        if isinstance(owner, (tuple, str)) and isinstance(index, int):
            return owner[index]
        if isinstance(owner, nn.ModuleDict) and isinstance(index, str):
            return owner[index]
        return Run()

    def UnaryOp(self, node: ast.UnaryOp, world: World) -> Any:
        value = self.value(node.operand, world)
        return UNARY[type(node.op)](value) if known(value) and type(node.op) in UNARY else Run()

    def BinOp(self, node: ast.BinOp, world: World) -> Any:
        left, right = self.value(node.left, world), self.value(node.right, world)
        plain = (int, float, str, tuple)
        if isinstance(left, plain) and isinstance(right, plain) and type(node.op) in BINARY:
            return BINARY[type(node.op)](left, right)
        return Run()

    def BoolOp(self, node: ast.BoolOp, world: World) -> Any:
        stops = isinstance(node.op, ast.Or)
        found: Any = None
        unknown: list[Any] = []
        for one in node.values:
            found = self.value(one, world)
            if known(found) and bool(found) is stops:
                return Run() if unknown and stops and not isinstance(found, bool) else found
            if not known(found):
                unknown.append(found)
            world = self.narrowed(one, world, not stops)
        return (unknown[0] if len(unknown) == 1 and unknown[0] is found else Run()) if unknown else found

    def Compare(self, node: ast.Compare, world: World) -> Any:
        if len(node.ops) > 1:
            return Run()
        left, right, kind = self.value(node.left, world), self.value(node.comparators[0], world), type(node.ops[0])
        if known(left) and known(right):
            return COMPARE[kind](left, right)
        if left is right and kind in SAME:
            return SAME[kind]
        if kind in (ast.Is, ast.IsNot) and (left is None or right is None):
            other = right if left is None else left
            return Run() if other.optional else kind is ast.IsNot
        return Run()

    def IfExp(self, node: ast.IfExp, world: World) -> Any:
        test = self.value(node.test, world)
        if known(test):
            return self.value(node.body if test else node.orelse, world)
        one = self.value(node.body, self.narrowed(node.test, world, True))
        other = self.value(node.orelse, self.narrowed(node.test, world, False))
        return joined(one, other)

    def Call(self, node: ast.Call, world: World) -> Any:
        if any(isinstance(one, ast.Starred) for one in node.args) or any(one.arg is None for one in node.keywords):
            return Run()
        function = self.value(node.func, world)
        args = [self.value(one, world) for one in node.args]
        named = {str(one.arg): self.value(one.value, world) for one in node.keywords}
        values = [*args, *named.values()]
        if function in (min, max) and len(args) == 2 and args[0] is args[1]:
            return args[0]
        whole = all(known(one) and not (isinstance(one, tuple) and not all(map(known, one))) for one in values)
        if isinstance(function, (types.FunctionType, types.BuiltinFunctionType, type)) and whole and (
                function in PURE or is_ours(function) or getattr(function, "__module__", "") == math.__name__):
            return self.call(function, args, named)
        return self.returned(function)

    def call(self, function: Callable[..., Any], args: list[Any], named: dict[str, Any]) -> Any:
        """What a function of known values gives, worked out by itself."""
        if isinstance(function, type) and issubclass(function, nn.Module):
            return Run(kind=function)
        try:
            return settled(function(*args, **named))
        except (TypeError, ValueError, AttributeError, ZeroDivisionError):
            return Run()

    def returned(self, function: Any) -> Any:
        """What is known of what a call gives: whether it may be None, and its class, by its annotation."""
        if isinstance(function, type) and is_ours(function):
            return Run(kind=function)
        plain = function.__func__ if isinstance(function, types.MethodType) else function
        if not isinstance(plain, types.FunctionType) or not is_ours(plain):
            return Run()
        return annotated(plain.__annotations__.get("return"), plain.__module__)

    def narrowed(self, test: ast.expr, world: World, holds: bool) -> World:
        """The world in which a test came out so: what is not None is known to be there."""
        match test:
            case ast.Compare(left=ast.Name(id=name), ops=[ast.Is() | ast.IsNot() as op],
                             comparators=[ast.Constant(value=None)]):
                found = world.get(name)
                if isinstance(found, Run) and found.optional:
                    none = isinstance(op, ast.Is) == holds
                    return world | {name: None if none else Run(kind=found.kind)}
            case ast.BoolOp(op=ast.And(), values=values) if holds:
                for one in values:
                    world = self.narrowed(one, world, True)
            case ast.BoolOp(op=ast.Or(), values=values) if not holds:
                for one in values:
                    world = self.narrowed(one, world, False)
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                return self.narrowed(inner, world, not holds)
        return world


def joined(one: Any, other: Any) -> Any:
    """What is known of a value that is one of two."""
    if same(one, other):
        return one
    functions = [value.functions if isinstance(value, OneOf) else (value,) for value in (one, other)
                 if isinstance(value, (OneOf, types.FunctionType))]
    if len(functions) == 2:
        return OneOf(tuple(dict.fromkeys(functions[0] + functions[1])))
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return tuple(map(joined, one, other))
    for value in (one, other):
        if isinstance(value, tuple):                            # of as many that only a run knows
            return tuple(joined(part, Run()) for part in value)
    optional = any(value is None or (isinstance(value, Run) and value.optional) for value in (one, other))
    kinds = {value.kind for value in (one, other) if isinstance(value, Run)}
    return Run(optional, kinds.pop() if len(kinds) == 1 else None)


def annotated(annotation: Any, module: str) -> Run:
    """What an annotation says of a value that only a run knows."""
    if isinstance(annotation, str):
        annotation = eval(annotation, vars(__import__(module, fromlist=["_"])))
    parts = annotation.__args__ if isinstance(annotation, types.UnionType) else (annotation,)
    kinds = [one for one in parts if isinstance(one, type) and is_ours(one)]
    return Run(type(None) in parts or None in parts, kinds[0] if len(kinds) == 1 else None)
