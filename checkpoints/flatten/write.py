"""What is left of functions and classes, as text: their heads, their bodies without what nobody reads, their order."""

import ast
import re
from typing import Any

import torch
from torch import nn

from checkpoints.flatten import frame
from checkpoints.flatten.cleanup import loaded, struck_out, without_idle
from checkpoints.flatten.expressions import is_config, literal
from checkpoints.flatten.program import Spec
from checkpoints.flatten.rewrite import Rewriter
from checkpoints.flatten.sources import code_of, is_ours, unparsed
from checkpoints.flatten.special import SpecialCalls
from checkpoints.flatten.values import Run, World, known, same
from nanollm.config import Rope
from nanollm.layers.linear import Linear
from nanollm.layers.scaling import length_key
from nanollm.model import Embedding, Head

PLACE = "number"                        # the attribute of a module with HAS_PLACE, and the word for it in the file


class InitWriter(Rewriter):
    """Writes the __init__ of a module class: attributes that are constants are left out, those that differ come as
    arguments."""

    def do_Assign(self, node: ast.Assign, worlds: list[World], shift: int) -> tuple[list[str], list[World]]:
        pairs: list[tuple[ast.expr, ast.expr | None]] = []
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs += zip(target.elts, node.value.elts, strict=True)
            elif isinstance(target, ast.Tuple):
                pairs += [(one, None) for one in target.elts]
            else:
                pairs.append((target, node.value))
        if not any(isinstance(one, ast.Attribute) for one, _ in pairs):
            return super().do_Assign(node, worlds, shift)
        comment = re.search(r"\s{2,}#.*$", self.source.lines(node.end_lineno or 0, node.end_lineno or 0)[0])
        lines = []
        apart = [] if isinstance(node.value, ast.Tuple) else self.values(node.value, worlds)
        for i, (target, value) in enumerate(pairs):
            if isinstance(target, ast.Name) and value is None:  # rows, self.first = table_of(config)
                parts = [one[i] if isinstance(one, tuple) else Run() for one in apart]
                worlds = [world | {target.id: part} for world, part in zip(worlds, parts, strict=True)]
            elif isinstance(target, ast.Attribute):
                lines += self.attribute(target, value, node, worlds)
            else:
                inner = ast.copy_location(ast.Assign([target], value or node.value), node)
                texts = dict(self.texts)
                if isinstance(target, ast.Name) and value is not None:
                    found = self.agreed(value, worlds)
                    if known(found) and literal(found):
                        texts[target.id] = self.expr(value, worlds)
                        lines.append(f"{target.id} = {texts[target.id]}")
                worlds = [self.assigned(inner.targets, one, world)
                          for one, world in zip(self.values(inner.value, worlds), worlds, strict=True)]
                self.texts = texts
        indent = " " * (node.col_offset - shift)
        out = [indent + line for line in lines]
        if comment and len(out) == 1:
            out[0] += comment[0]
        return out, worlds

    def attribute(self, target: ast.Attribute, value: ast.expr | None, node: ast.Assign,
                  worlds: list[World]) -> list[str]:
        """The line that sets self.name, if it is still needed."""
        name, program = target.attr, self.program
        if unparsed(target.value) != "self":
            return [f"{unparsed(target)} = {self.expr(value, worlds)}"] if value else []
        modules = [world["self"] for world in worlds]
        found = [getattr(one, name, None) for one in modules]
        if name == "config":
            fields = program.lifts.get(self.owner, {})
            return [f"self.{field} = {field}" for field, kind in sorted(fields.items()) if kind == "field"]
        if isinstance(found[0], nn.ModuleDict):                 # what layers share
            parts = ", ".join(f'"{key}": {program.construct(one)}' for key, one in found[0].items())
            return [f"self.{name} = nn.ModuleDict({{{parts}}})"] if parts else []
        if isinstance(found[0], nn.ModuleList):
            return [f"self.{name} = {program.layer_list()}"]
        if all(one is None for one in found):
            return []
        if any(isinstance(one, nn.Module) for one in found):
            said = self.numbers(value, worlds)
            texts = {None if one is None else program.construct(one, said) for one in found}
            plain = all(type(one) in (nn.Linear, Linear) for one in found) and value is not None
            if plain or (len(texts) == 1 and not any(program.has_place(one) for one in found)):
                return [f"self.{name} = {self.expr(value, worlds) if plain and value else texts.pop()}"]
            program.note_lift(self.owner, name, "attribute")
            return [f"self.{name} = {name}"]
        if any(isinstance(one, nn.Parameter) for one in found):
            return [f"self.{name} = {self.created(value, node, worlds)}"]
        if isinstance(found[0], list) and value is not None:
            return [f"self.{name} = {self.expr(value, worlds)}"] if program.needed(self.owner, name) else []
        agreed = all(same(one, found[0]) for one in found) and literal(found[0]) is not None
        if agreed and value is not None:
            program.texts[self.owner, name] = self.expr(value, worlds)
        if not program.needed(self.owner, name):
            return []
        if agreed:
            return [f"self.{name} = {literal(found[0])}"]
        program.note_lift(self.owner, name, "attribute")
        return [f"self.{name} = {name}"]

    def numbers(self, value: ast.expr | None, worlds: list[World]) -> dict[int, str]:
        """The numbers that a module is given, each as the source writes it. Its __init__ is told, too."""
        if isinstance(value, ast.IfExp):
            return self.numbers(value.body if self.agreed(value.test, worlds) else value.orelse, worlds)
        if not isinstance(value, ast.Call):
            return {}
        kind = self.agreed(value.func, worlds)
        if isinstance(kind, type) and is_ours(kind):
            self.said(value, code_of(kind.__init__), worlds)    # type: ignore[misc]  # of the class itself
        said: dict[int, set[str]] = {}
        for one in value.args:
            if type(number := self.agreed(one, worlds)) is int:
                said.setdefault(number, set()).add(self.expr(one, worlds))
        return {number: texts.pop() for number, texts in said.items() if len(texts) == 1}

    def created(self, value: ast.expr | None, node: ast.Assign, worlds: list[World]) -> str:
        if value is None:
            assert isinstance(node.value, ast.GeneratorExp)
            value = node.value.elt
        return self.expr(value, worlds)

    def do_Expr(self, node: ast.Expr, worlds: list[World], shift: int) -> tuple[list[str], list[World]]:
        if unparsed(node) == "self.tie()":
            tied = worlds[0]["self"].config.tied
            return ([" " * (node.col_offset - shift) + "self.head.weight = self.embed.weight"] if tied else []), worlds
        return super().do_Expr(node, worlds, shift)

    def do_AnnAssign(self, node: ast.AnnAssign, worlds: list[World], shift: int) -> tuple[list[str], list[World]]:
        if isinstance(node.target, ast.Attribute):
            node_alike = ast.Assign([node.target], node.value)  # type: ignore[arg-type]  # its value may be None
            lines = self.attribute(node.target, node.value, node_alike, worlds)
            return [" " * (node.col_offset - shift) + line for line in lines], worlds
        return super().do_AnnAssign(node, worlds, shift)

    def do_AugAssign(self, node: ast.AugAssign, worlds: list[World], shift: int) -> tuple[list[str], list[World]]:
        if isinstance(node.target, ast.Attribute):
            return [], worlds                                   # of an attribute, whose last value is known
        return super().do_AugAssign(node, worlds, shift)


class Writer(SpecialCalls):
    """Runs through all functions until no world is new, then writes them down."""

    def settle(self) -> None:
        """Find all worlds, all that differs, all that nobody reads."""
        before = None
        for number in range(30):
            self.final = number >= 2                            # all calls are known, and which functions have just one
            self.pass_over()
            before, last = self.state(), before
            if self.final and before == last:
                return
        raise AssertionError("no end")

    @property
    def cached(self) -> bool:
        """Whether what was computed for a token stays: not where the angles of RoPE follow the length."""
        ropes = (one for one in self.constants.objects if isinstance(one, Rope))
        return all(length_key(rope, torch.zeros(1)) is None for rope in ropes)

    def state(self) -> Any:
        return ({code: (len(spec.worlds), frozenset(spec.unused), frozenset(spec.group), len(spec.calls))
                 for code, spec in self.specs.items()}, len(self.needs), str(sorted(map(str, self.lifts.items()))),
                str(sorted((one.__name__, sorted(fields)) for one, fields in self.records.items())), dict(self.texts))

    def pass_over(self) -> None:
        """Write every function once. What differs and what is read is gathered anew, beside that of the last pass."""
        for spec in self.specs.values():
            spec.calls = set()
        self.new_lifts, self.new_needs, self.new_records, self.new_ropes, self.found = {}, set(), {}, {}, []
        self.entered = set()
        cache = Run(True) if self.cached else None
        self.enter(code_of(type(self.model).forward), [
            {"self": self.model, "tokens": Run(), "positions": None, "cache": cache}])
        if self.cached:
            self.enter(code_of(frame.Cache.__init__), [{"self": Run(kind=frame.Cache), "model": self.model,
                                                        "batch": Run(), "length": Run()}])
        kinds = self.kinds()
        for kind in kinds:
            if "__init__" in vars(kind):
                code = code_of(vars(kind)["__init__"])
                modules = [one for one in self.modules() if kind in self.made.get(id(one), {})]
                self.enter(code, [{"self": one, **self.built(one, kind)} for one in modules])
        todo, done = list(self.specs.values()), 0
        while todo:                                             # also those that this pass comes upon
            for spec in todo:
                if spec.worlds:
                    self.rewrite(spec)
            done += len(todo)
            todo = list(self.specs.values())[done:]
        for note, _ in self.found:
            note()
        self.lifts, self.needs, self.records = self.new_lifts, self.new_needs, self.new_records
        self.ropes = self.new_ropes

    def modules(self) -> list[nn.Module]:
        """One of each kind of layer, and what is around them."""
        rest = [one for name, one in self.model.named_modules() if not name.startswith("layers.")]
        return rest + [one for layer in self.layers for one in layer.modules()]

    def kinds(self) -> list[type]:
        """The module classes of the file, bases first."""
        found = {kind for one in self.modules() for kind in type(one).__mro__
                 if is_ours(kind) and kind is not Linear}
        return sorted(found, key=lambda kind: (len(kind.__mro__), kind.__module__, kind.__name__))

    def rewrite(self, spec: Spec) -> None:
        code = spec.code
        owner = self.class_of(code)
        init = code.name.endswith("__init__") and isinstance(owner, type) and issubclass(owner, nn.Module)
        writer = (InitWriter if init else Rewriter)(self, code, list(spec.worlds.values()))
        before = self.found
        self.found = []
        whole_files = ("nanollm.block", "nanollm.layers.rope", frame.__name__)
        join = code.module in whole_files or code.name.endswith((".forward", ".new_state"))
        lines = [*struck_out(tuple(writer.body()), join, code.module == "nanollm.block")]
        if not self.cached:                                     # no layer has a state
            zipped = "for layer, state in zip(self.layers, states, strict=True):"
            lines = without_idle([line.replace(zipped, "for layer in self.layers:") for line in lines])
        spec.text, read = lines, loaded(tuple(lines))
        words = set(re.findall(r"\w+", "\n".join(line.partition("  # ")[0] for line in lines)))
        before += [(note, word) for note, word in self.found if word in words]     # not of what was struck out since
        self.found = before
        spec.unused = {one.arg for one in code.parameters if one.arg not in read and one.arg != "self"}

    def construct(self, module: nn.Module, said: dict[int, str] | None = None) -> str:
        """The call that makes a module. said: how the source writes numbers."""
        if type(module) in (nn.Linear, Linear):
            bias = "" if module.bias is not None else ", bias=False"
            sizes = ", ".join(self.constants.of_number(one) for one in (module.in_features, module.out_features))
            return f"nn.Linear({sizes}{bias})"
        if isinstance(module, Embedding):
            return f"nn.Embedding({', '.join(self.sizes(module.weight.shape))})"
        if isinstance(module, Head) and module.scale == 1 and module.softcap is None and not module.unit:
            bias = "" if module.bias is not None else ", bias=False"
            return f"nn.Linear({', '.join(self.sizes(module.weight.shape[::-1]))}{bias})"
        args = []
        for name, kind in self.init_parameters(type(module)).items():
            bases = [one for one in type(module).__mro__[1:] if "__init__" in vars(one)]
            given = self.built(module, bases[0] if kind.startswith("base ") else type(module))
            kind = kind.removeprefix("base ")
            owner: Any = {"attribute": module, "field": getattr(module, "config", None), "read": given.get("config")}
            value = given.get(name) if kind == "given" else getattr(owner[kind], name)
            if name == PLACE and self.has_place(module):        # it is told where its layer stands
                args.append(f"{name}={PLACE}")
                continue
            text = said[value] if said and type(value) is int and value in said else self.value_text(value)
            args.append(text if kind == "given" else f"{name}={text}")
        return f"{self.name(type(module))}({', '.join(args)})"

    def sizes(self, shape: Any) -> list[str]:
        """Of the vocabulary and the stream."""
        names = {self.model.config.vocab: "VOCAB", self.model.config.dim: "DIM"}
        return [self.constants.by_name(names[one], one) or str(one) for one in shape]

    def value_text(self, value: Any) -> str:
        if isinstance(value, nn.Module):
            return self.construct(value)
        if is_config(value):
            fields = sorted(self.records.get(type(value), set()), key=list(vars(value)).index)
            return f"{self.name(type(value))}({', '.join(self.value_text(getattr(value, one)) for one in fields)})"
        if isinstance(value, int) and not isinstance(value, bool):
            return self.constants.of_number(value)
        return str(literal(value))

    def layer_list(self) -> str:
        """The layers: how many of which kind."""
        texts = [self.construct(self.layers[self.kind_of_layer[i]]) for i in range(len(self.model.layers))]
        if len(set(texts)) == 1:
            return f"nn.ModuleList({texts[0]} for {PLACE if self.counts_layers else '_'} in range(LAYERS))"
        if self.counts_layers:
            return f"nn.ModuleList(layer(kind, {PLACE}) for {PLACE}, kind in enumerate(LAYERS))"
        return "nn.ModuleList(layer(kind) for kind in LAYERS)"

    def has_place(self, module: nn.Module | None) -> bool:
        """Whether a module reads which of the layers it stands in: no config says it, and alike layers differ in it."""
        return getattr(type(module), "HAS_PLACE", False) and PLACE in self.init_parameters(type(module))

    @property
    def counts_layers(self) -> bool:
        """Whether any does."""
        return any(map(self.has_place, self.modules()))

    kind_of_layer: list[int]
