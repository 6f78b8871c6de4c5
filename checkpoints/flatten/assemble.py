"""The file: constants, records, functions and classes in the order of reading, then what loads, generates and trains."""

import ast
import contextlib
import functools
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from checkpoints.flatten import frame
from checkpoints.flatten.constants import Constants
from checkpoints.flatten.program import IN_PLACE, Spec
from checkpoints.flatten.sources import Code, code_of, global_value, is_ours, source
from checkpoints.flatten.values import World
from checkpoints.flatten.cleanup import WIDTH
from checkpoints.flatten.write import Writer
from nanollm.config import ModelConfig
from nanollm.layers.linear import Linear
from nanollm.layers.mask import AttentionMask
from nanollm.layers.state import ConvState, KVCache, NoState, State
from nanollm.model import Decoder

ORDER = """norm scaling rope alibi positions state frame mask attention ssd scan recurrent delta mamba mamba2
           latent_attention gated_attention""".split()
LAST = ["linear", "mlp", "xielu", "scaled_mlp", "moe", "input_weighted_moe", "block", "model"]


@contextlib.contextmanager
def recorded() -> Iterator[dict[int, dict[type, World]]]:
    """Note what the __init__ of each module class is given inside the block."""
    made: dict[int, dict[type, World]] = {}
    originals: dict[type, Any] = {}

    def subclasses(kind: type) -> Iterator[type]:
        for one in kind.__subclasses__():
            yield one
            yield from subclasses(one)

    def wrap(kind: type, init: Any) -> Any:
        signature = inspect.signature(init)

        @functools.wraps(init)
        def run(self: nn.Module, *args: Any, **named: Any) -> None:
            bound = signature.bind(self, *args, **named)
            bound.apply_defaults()
            made.setdefault(id(self), {})[kind] = {k: v for k, v in bound.arguments.items() if k != "self"}
            init(self, *args, **named)

        return run

    try:
        for kind in {one for one in subclasses(nn.Module) if is_ours(one) and one is not Linear}:
            if "__init__" in vars(kind):
                originals[kind] = vars(kind)["__init__"]
                kind.__init__ = wrap(kind, originals[kind])     # type: ignore[misc]  # restored below
        yield made
    finally:
        for kind, init in originals.items():
            kind.__init__ = init                                # type: ignore[misc]


def prepared(config: ModelConfig) -> Writer:
    """All that is left of the decoder of a config."""
    with recorded() as made, torch.device("meta"):
        model = Decoder(config)
    kinds = list(dict.fromkeys(config.layers))
    first = {kind: config.layers.index(kind) for kind in kinds}
    writer = Writer(model, [model.layers[first[kind]] for kind in kinds], made, Constants(config))
    writer.kind_of_layer = [kinds.index(layer) for layer in config.layers]
    writer.settle()
    return writer


class File:
    """Puts together what a Writer has left."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    def rank(self, module: str) -> tuple[int, str]:
        name = module.rpartition(".")[2]
        if name in ORDER:
            return ORDER.index(name), name
        return (100 + LAST.index(name), name) if name in LAST else (50, name)

    def used(self, code: Code) -> bool:
        """Whether a function is still called from somewhere."""
        return code in self.alive

    def sections(self) -> list[tuple[str, list[str]]]:
        """(module, lines) of each module that something is left of."""
        self.alive = self.reached()
        modules = sorted({code.module for code in self.alive} | {kind.__module__ for kind in self.writer.kinds()},
                         key=self.rank)
        found = []
        for module in modules:
            parts: list[list[str]] = []
            constants = []
            for name, node in source(module).defs.items():
                if "." in name:
                    continue
                lines = self.class_lines(module, node) if isinstance(node, ast.ClassDef) else (
                    self.function_lines(Code(module, name), 0))
                if lines:
                    parts.append(lines)
            text = "\n".join(line for part in parts for line in part)
            constants = self.constant_lines(module)
            if parts or constants:
                found.append((module, ["\n".join(constants)] * bool(constants) + ["\n".join(part) for part in parts]))
                del text
        return found

    def reached(self) -> set[Code]:
        """Functions that what is left speaks of, from the model and the cache on; and `self.classes` likewise."""
        writer = self.writer
        by_name: dict[str, list[Code]] = {}
        for code, spec in writer.specs.items():
            plain = code.name.rpartition(".")[2]
            if spec.worlds:
                by_name.setdefault(f".{plain}" if code.owner else writer.names.get(
                    inspect.unwrap(global_value(code.module, code.name)), plain), []).append(code)
        classes = {writer.name(kind): kind for kind in [*writer.kinds(), *writer.names] if isinstance(kind, type)}
        self.classes: set[type] = set()
        alive: set[Code] = set()
        todo: list[Code] = []

        def meet(kind: type) -> None:
            if kind in self.classes or not is_ours(kind):
                return
            self.classes.add(kind)
            for one in kind.__mro__:
                if is_ours(one):
                    meet(IN_PLACE.get(one, one) if isinstance(IN_PLACE.get(one, one), type) else one)
            todo.extend(code for code in writer.specs if writer.class_of(code) in kind.__mro__
                        and code.name.rpartition(".")[2] in ("__init__", "forward"))

        meet(Decoder)
        meet(frame.Cache)
        while todo:
            code = todo.pop()
            if code in alive or not writer.specs[code].worlds:
                continue
            alive.add(code)
            text = "\n".join(writer.specs[code].text)
            for node in ast.walk(ast.parse(textwrap.dedent(text))):
                if isinstance(node, ast.Name):
                    todo += by_name.get(node.id, [])
                    if node.id in classes:
                        meet(classes[node.id])
                elif isinstance(node, ast.Attribute):
                    todo += by_name.get(f".{node.attr}", [])
        return {code for code in alive if code.owner is None or writer.class_of(code) in self.classes}

    def constant_lines(self, module: str) -> list[str]:
        """Constants of a module that what is left reads."""
        found = source(module)
        lines = []
        text = "\n".join("\n".join(spec.text) for code, spec in self.writer.specs.items() if code in self.alive)
        for node in found.tree.body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if not isinstance(target, ast.Name) or (module, target.id) not in self.writer.globals:
                continue
            name = self.writer.globals[module, target.id]
            if re.search(rf"\b{name}\b", text):
                new = found.lines(node.lineno, node.end_lineno or 0)
                new[0] = re.sub(rf"^{target.id}(: Final)?\b", name, new[0])
                lines += new
        return lines

    def function_lines(self, code: Code, indent: int) -> list[str]:
        if not self.used(code):
            return []
        writer, node = self.writer, code.node
        spec = writer.specs[code]
        body = pruned(spec, writer) if spec.text else []
        grad = [" " * indent + "@torch.no_grad()" for one in node.decorator_list if "no_grad" in ast.unparse(one)]
        return grad + self.head(code, indent) + body

    def head(self, code: Code, indent: int) -> list[str]:
        """def f(…) -> …:"""
        writer, node = self.writer, code.node
        init = code.name.endswith("__init__") and issubclass(writer.class_of(code), nn.Module)
        defaults = code.defaults()
        if init:
            kept = writer.init_parameters(writer.class_of(code))
        else:
            kept = dict.fromkeys(sorted(writer.kept([code])))
        args = []
        hints = {one.arg: one for one in code.parameters}
        if code.owner is not None:
            args.append("self")
        for one in code.parameters:
            if one.arg != "self" and one.arg in kept:
                text = one.arg
                if one.annotation is not None:
                    text += f": {self.annotation(one.annotation, code.module)}"
                if one.arg in defaults:
                    text += f" = {writer_text(code, defaults[one.arg])}" if one.annotation else ""
                args.append(text)
        if init:
            args += [f"{name}: {self.hint(writer.class_of(code), name, kind)}" for name, kind in kept.items()
                     if name not in hints or name == "config"]
        returns = f" -> {self.annotation(node.returns, code.module)}" if node.returns else ""
        return wrapped(" " * indent + f"def {node.name}(", args, f"){returns}:")

    def hint(self, kind: type, name: str, where: str) -> str:
        """The type of what differs."""
        values = [getattr(one, name, None) if where.endswith("attribute") else
                  getattr(getattr(one, "config", None), name, None)
                  for one in self.writer.modules() if isinstance(one, kind)]
        kinds = {"nn.Module" if isinstance(one, nn.Module) and len({type(each) for each in values}) > 2 else
                 "None" if one is None else self.writer.name(type(one)) if is_ours(type(one)) else
                 type(one).__name__ for one in values}
        kinds = {f"nn.{one}" if hasattr(nn, one) else one for one in kinds}
        return " | ".join(sorted(kinds, key=lambda one: (one == "None", one)))

    def annotation(self, node: ast.expr, module: str) -> str:
        text = source(module).text(node)

        def new(match: re.Match[str]) -> str:
            try:
                value = global_value(module, match[0])
            except KeyError:
                return match[0]
            return self.kind_name(value, match[0])

        return re.sub(r"(?<![\w.])[A-Za-z_]\w*", new, text.replace('"', ""))

    def kind_name(self, value: Any, name: str) -> str:
        if value is State:
            alive = [kind for kind in (KVCache, ConvState) if kind in self.writer.names or IN_PLACE.get(kind) in
                     self.writer.names or (kind is KVCache and frame.RingCache in self.writer.names)]
            return " | ".join(self.writer.name(IN_PLACE.get(kind, kind)) for kind in alive) or "None"
        if value is AttentionMask or (isinstance(value, type) and issubclass(value, AttentionMask)):
            return "Tensor | str | None"
        if isinstance(value, type) and is_ours(value) and value is not NoState:
            value = IN_PLACE.get(value, value)
            return value.__name__ if value in (int,) else self.writer.name(value)
        return name

    def class_lines(self, module: str, node: ast.ClassDef) -> list[str]:
        kind = global_value(module, node.name)
        writer = self.writer
        here = [one for one in node.body if isinstance(one, ast.FunctionDef)
                and self.used(Code(module, f"{node.name}.{one.name}"))]
        if kind not in self.classes:
            return []
        bases = [self.kind_name(global_value(module, base.id), base.id) if isinstance(base, ast.Name)
                 else source(module).text(base) for base in node.bases]
        lines = [f"class {writer.name(kind)}{'(' + ', '.join(bases) + ')' if bases else ''}:"]
        first = node.body[0]
        if isinstance(first, ast.Expr):
            lines += source(module).lines(first.lineno, first.end_lineno or 0)
        fields = [one for one in node.body if isinstance(one, ast.AnnAssign) and "NamedTuple" in bases]
        for field in fields:
            lines += source(module).lines(field.lineno, field.end_lineno or 0)
        for one in here:
            body = self.function_lines(Code(module, f"{node.name}.{one.name}"), 4)
            if body:
                lines += [""] * (not (one.name == "__init__" and False)) + body
        if len(lines) == 1:
            lines.append("    pass")
        return lines


def writer_text(code: Code, node: ast.expr) -> str:
    return code.source.text(node)


def wrapped(head: str, args: list[str], tail: str) -> list[str]:
    """A head in as many lines as it takes."""
    lines, line = [], head
    for i, one in enumerate(args):
        piece = one + (", " if i < len(args) - 1 else tail)
        if len((line + piece).rstrip()) > WIDTH:
            lines.append(line.rstrip())
            line = " " * len(head) + piece
        else:
            line += piece
    if not args:
        line += tail
    return [*lines, line]


def pruned(spec: Spec, writer: Writer) -> list[str]:
    return spec.text


__all__ = ["File", "prepared", "types"]
