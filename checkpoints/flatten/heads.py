"""The heads of functions: what is left of their parameters, and the annotations by the names that the file has."""

import ast
import re
import types
from typing import Any

from torch import nn

from checkpoints.flatten.cleanup import WIDTH
from checkpoints.flatten.sources import Code, global_value, is_ours, source
from checkpoints.flatten.write import Writer
from nanollm.layers.mask import AttentionMask
from nanollm.layers.state import ConvState, KVCache, NoState, State


class Heads:
    """classes: those of the file."""
    writer: Writer
    classes: set[type]

    def head(self, code: Code, indent: int) -> list[str]:
        """def f(…) -> …:"""
        writer, node = self.writer, code.node
        init = code.name.endswith("__init__") and issubclass(writer.class_of(code), nn.Module)
        defaults = code.defaults()
        kept = writer.init_parameters(writer.class_of(code)) if init else dict.fromkeys(sorted(writer.kept([code])), "")
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
                    text += f" = {code.source.text(defaults[one.arg])}" if one.annotation else ""
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
                 f"nn.{type(one).__name__}" if isinstance(one, nn.Module) else type(one).__name__ for one in values}
        return " | ".join(sorted(kinds, key=lambda one: (one == "None", one)))

    def annotation(self, node: ast.expr, module: str) -> str:
        """An annotation of the source by the names that the file has."""
        text = source(module).text(node)

        def new(match: re.Match[str]) -> str:
            try:
                value = global_value(module, match[0])
            except KeyError:
                return match[0]
            if isinstance(value, types.GenericAlias):           # Sums = tuple[…]
                return self.writer.global_text(module, match[0])
            return self.kind_name(value, match[0])

        return re.sub(r"(?<![\w.])[A-Za-z_]\w*", new, text.replace('"', ""))

    def kind_name(self, value: Any, name: str) -> str:
        """What a class of an annotation is called in the file; of a state, those that its layers have."""
        if value is State:
            found = [self.writer.in_place.get(kind, kind) for kind in (KVCache, ConvState)]
            return " | ".join(self.writer.name(kind) for kind in found if kind in self.classes) or "None"
        if value is AttentionMask or (isinstance(value, type) and issubclass(value, AttentionMask)):
            return "Tensor | str | None"
        if isinstance(value, type) and is_ours(value) and value is not NoState:
            value = self.writer.in_place.get(value, value)
            return value.__name__ if value in (int,) else self.writer.name(value)
        return name


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
