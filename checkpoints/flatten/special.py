"""Calls that are not written as they stand in the source: what a flattened file has another thing for."""

import ast
import re
import types
from typing import Any

from torch import nn

from checkpoints.flatten import frame
from checkpoints.flatten.cleanup import without_idle
from checkpoints.flatten.program import Program
from checkpoints.flatten.rewrite import Rewriter
from checkpoints.flatten.sources import Code, code_of, is_ours, unparsed
from checkpoints.flatten.values import Run, World
from nanollm.layers import sparse_attention
from nanollm.layers.linear import Linear

STATE = ("batch", "length", "dtype", "device")                  # what a state is made from, beside a config


class SpecialCalls(Program):
    """The one door is `special`; each of the others writes one kind of call."""

    def special(self, writer: Rewriter, node: ast.Call, functions: list[Any], worlds: list[World]) -> str | None:
        """Calls that are written in another way than they stand in the source."""
        first = functions[0]
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Call) and (
                unparsed(node.func.value) == "super()"):
            return self.super_call(writer, node, worlds)
        if isinstance(first, types.FunctionType) and first.__name__ == "new_state":
            return self.new_state(writer, node, functions, worlds)
        if first is Linear:
            args = [writer.expr(one, worlds) for one in node.args]
            named = {str(one.arg): writer.expr(one.value, worlds) for one in node.keywords}
            bias = named.get("bias", args[2] if len(args) > 2 else "True")
            return f"nn.Linear({', '.join(args[:2])}{'' if bias == 'True' else f', bias={bias}'})"
        if isinstance(node.func, ast.Attribute) and node.func.attr == "rotation":
            return self.rotation(writer, node, worlds)
        if first is frame.ForwardContext:
            return self.context(writer, node, worlds)
        if first is sparse_attention.ChosenKeys:
            return writer.expr(node.args[0], worlds)
        if first in (frame.KVCache, frame.RingCache):           # which of the two was settled for all layers
            node.keywords = [one for one in node.keywords if one.arg != "ring"]
        if writer.code.module in ("nanollm.block", "nanollm.model") and not self.model.config.float32_residual and (
                unparsed(node).endswith(".to(ctx.dtype)")):
            assert isinstance(node.func, ast.Attribute)
            return writer.expr(node.func.value, worlds)
        return None

    def rotation(self, writer: Rewriter, node: ast.Call, worlds: list[World]) -> str | None:
        """Where all layers turn alike, the tables are made once, and ctx.rotation has them."""
        for world in worlds:
            rope, width = (writer.evaluator.value(one, world) for one in node.args)
            self.new_ropes[rope, width] = writer.expr(node.args[1], worlds)
        if len(self.ropes) == 1:
            return f"{writer.expr(node.func.value, worlds)}.rotation"     # type: ignore[attr-defined]  # ctx.rotation
        several = ast.copy_location(ast.Call(ast.copy_location(ast.Attribute(
            node.func.value, "rotations", ast.Load()), node.func), node.args, []), node)    # type: ignore[attr-defined]
        code = code_of(frame.ForwardContext.rotations)
        self.enter(code, [writer.arguments(several, code, Run(kind=frame.ForwardContext), world) for world in worlds])
        args = writer.passed(several, [code], self.kept([code]), worlds)
        return f"{writer.expr(node.func.value, worlds)}.rotations({', '.join(args)})"       # type: ignore[attr-defined]

    def context(self, writer: Rewriter, node: ast.Call, worlds: list[World]) -> str:
        """ForwardContext(…), with the one rotation of a model that has just one."""
        code = code_of(frame.ForwardContext.__init__)
        rope, width = next(iter(self.ropes)) if len(self.ropes) == 1 else (None, 0)
        spec = self.spec(code)
        bounds = [writer.arguments(node, code, Run(kind=frame.ForwardContext), world) for world in worlds]
        spec.worlds.clear()
        self.enter(code, [bound | {"rope": rope, "head_dim": width} for bound in bounds])
        if rope is not None:
            spec.said["head_dim"] = {self.ropes[rope, width]}
        return f"{self.name(frame.ForwardContext)}({', '.join(writer.passed(node, [code], self.kept([code]), worlds))})"

    def super_call(self, writer: Rewriter, node: ast.Call, worlds: list[World]) -> str | None:
        """super().forward(…), or super().__init__(…), whose arguments are what the base's __init__ still takes."""
        assert isinstance(node.func, ast.Attribute)
        name = node.func.attr
        base = next((one for one in writer.owner.__mro__[1:] if name in vars(one)), None)
        if base is None or not is_ours(base) or base is Linear:
            return None
        if name != "__init__" or not issubclass(base, nn.Module):
            code = code_of(vars(base)[name])
            self.enter(code, [writer.arguments(node, code, world["self"], world) for world in worlds])
            writer.said(node, code, worlds)
            kept = self.kept([code])
            return f"super().{name}({', '.join(writer.passed(node, [code], kept, worlds))})"
        code = code_of(vars(base)[name])
        given = dict(zip([one.arg for one in code.parameters][1:], node.args, strict=False))
        out = []
        for parameter, kind in self.init_parameters(base).items():
            out.append(writer.expr(given[parameter], worlds) if kind == "given" else parameter)
            if kind != "given":
                self.note_lift(writer.owner, parameter, f"base {kind.removeprefix('base ')}")
        return f"super().__init__({', '.join(out)})"

    def new_state(self, writer: Rewriter, node: ast.Call, functions: list[Any], worlds: list[World]) -> str | None:
        """new_state(config, …) is a method here, of the module whose config that is."""
        assert isinstance(node.func, ast.Attribute)
        owner = node.func.value
        modules = writer.values(owner, worlds)
        if not isinstance(modules[0], type):
            text = writer.expr(owner, worlds)
        else:                                                   # Attention.new_state(config.attention, …)
            parts = [next((name for name, one in world["self"].named_children() if isinstance(one, kind)), "")
                     for world, kind in zip(worlds, modules, strict=True)]
            if "" in parts:                                     # of a part that stands elsewhere: written here
                return None
            modules = [getattr(world["self"], part) for world, part in zip(worlds, parts, strict=True)]
            text = f"self.{parts[0]}"
        args = node.args if writer.code.module == frame.__name__ else node.args[1:]
        for module in modules:
            code = self.new_state_code(module)
            bound: dict[str, Any] = {"self": module, "config": self.built(module, self.class_of(code))["config"]}
            self.enter(code, [bound | {name: Run() for name in STATE}])
        codes = {self.new_state_code(module) for module in modules}
        if writer.code.module == frame.__name__ and len(codes) == 1:    # one kind for all layers: Cache makes it itself
            code = codes.pop()
            state = without_idle(self.rewriter(code, [*self.spec(code).worlds.values()]).body())
            if len(state) == 1 and not re.search(r"\b(self|config)\b", state[0]):
                return state[0].partition("  #")[0].strip().removeprefix("return ")
        kept = self.kept([code for code in self.specs if code.name.endswith(".new_state")])     # all are called alike
        given = [ast.Name(name) for name in STATE] if isinstance(args[0], ast.Starred) else args
        rest = [writer.write_Name(one, worlds) if isinstance(one, ast.Name) else writer.expr(one, worlds)
                for name, one in zip(STATE, given, strict=True) if name in kept]
        return f"{text}.new_state({', '.join(rest)})"

    def new_state_code(self, module: nn.Module) -> Code:
        """That of its class, or of the base whose state it shares."""
        for kind in type(module).__mro__:
            if "new_state" in vars(kind):
                code = code_of(vars(kind)["new_state"].__func__)
                last = code.node.body[-1]
                forwards = isinstance(last, ast.Return) and "new_state" in ast.unparse(last) and any(
                    ast.unparse(last.value.func) == f"{base.__name__}.new_state"    # type: ignore[union-attr]
                    for base in kind.__mro__[1:])
                if not forwards:
                    return code
        raise AssertionError(type(module))
