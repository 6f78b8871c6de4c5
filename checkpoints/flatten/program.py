"""All functions that a model reaches, each with the worlds in which it is called, until nothing new turns up."""

import ast
import inspect
import itertools
import types
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from checkpoints.flatten import frame
from checkpoints.flatten.constants import Constants
from checkpoints.flatten.expressions import is_config, literal
from checkpoints.flatten.rewrite import Rewriter
from checkpoints.flatten.sources import Code, code_of, global_value, is_ours, source
from checkpoints.flatten.values import Evaluator, Run, World, annotated, known, same
from nanollm import cache, errors
from nanollm.config.checks import need
from nanollm.errors import ConfigError
from nanollm.init import init_weights
from nanollm.layers import chunked_attention, forward_context, mask, state
from nanollm.layers.linear import Linear
from nanollm.layers.positions import check_positions, demand
from nanollm.model import Decoder

# what stands in a flattened file for what the library has
IN_PLACE: dict[Any, Any] = {
    cache.Cache: frame.Cache, forward_context.ForwardContext: frame.ForwardContext, state.KVCache: frame.KVCache,
    state.RowLengths: frame.Cache, state.SlotMapping: int, mask.AttentionMask: frame.attention_mask,
    chunked_attention.ChunkMask: frame.chunk_mask,
}
CHECKS = (demand, check_positions, init_weights, need)


def origin(module: str, name: str) -> tuple[str, str]:
    """The module in which a constant is set, and its name there."""
    for node in source(module).tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for one in node.names:
                if (one.asname or one.name) == name:
                    return origin(node.module, one.name)
    return module, name


class Spec:
    """What is known of one function."""

    def __init__(self, code: Code) -> None:
        self.code = code
        self.worlds: dict[Any, World] = {}
        self.said: dict[str, set[str]] = {}                     # parameter → how callers write it, where it is constant
        self.unused: set[str] = set()                           # parameters that what is left of it does not read
        self.group: set[Code] = {code}                          # those that are called in the same places
        self.calls: set[tuple[str, int, int]] = set()           # places that call it
        self.runs: dict[Any, Run] = {}
        self.hints: dict[str, type | None] | None = None        # parameter → the class that its annotation says
        self.text: list[str] = []


class Program:
    """A model's functions. `constants` names the numbers of its config."""

    def __init__(self, model: Decoder, layers: list[nn.Module], made: dict[int, dict[type, World]],
                 constants: Constants) -> None:
        """layers: one of each kind. made: module → class → the arguments that its __init__ was given."""
        self.model, self.layers, self.made, self.constants = model, layers, made, constants
        self.specs: dict[Code, Spec] = {}
        self.lifts: dict[type, dict[str, str]] = {}             # class → what differs → "field", "attribute" or "given"
        self.needs: set[tuple[type, str]] = set()               # attributes that are read
        self.texts: dict[tuple[type, str], str] = {}            # attributes that stand for a constant expression
        self.records: dict[type, set[str]] = {}                 # config classes that stay, and their fields
        self.ropes: dict[Any, str] = {}                         # (Rope, width) that layers ask for
        self.new_lifts: dict[type, dict[str, str]] = {}         # the same four, as this pass finds them
        self.new_needs: set[tuple[type, str]] = set()
        self.new_records: dict[type, set[str]] = {}
        self.new_ropes: dict[Any, str] = {}
        self.entered: set[Code] = set()                         # what this pass calls and does not write into a caller
        self.found: list[tuple[Callable[[], None], str]] = []   # what to note if a name is still there at the end
        self.names: dict[Any, str] = {}
        self.globals: dict[tuple[str, str], str] = {}           # (module, constant) that is read → its name
        self.mask = mask.AttentionMask
        self.in_place = IN_PLACE | {state.KVCache: frame.RingCache} if self.rings() else IN_PLACE
        self.final = False
        self.facts = self.worked_out()
        self.serial = itertools.count()

    def worked_out(self) -> dict[str, dict[str, Any]]:
        """Expressions that compare sizes of tensors: function → expression → what it comes to in this model."""
        owners = [*self.layers, self.model.shared]
        mixers = [module for owner in owners for module in owner.modules() if hasattr(module, "config")]
        attentions: list[Any] = [one.config for one in mixers if hasattr(one.config, "kv_heads")]
        turning = [one for one in self.constants.objects if type(one).__name__ == "Rope"]
        sparse = any(type(one).__name__ == "Indexer" for one in self.constants.objects)
        latent = any("kv_rank" in vars(one.config) for one in mixers)
        facts: dict[str, dict[str, Any]] = {"rotate": {}, "attend_fused": {}, "attend_plainly": {}}
        if all(int(rope.fraction) == 1 for rope in turning) and not sparse:
            facts["rotate"]["r == x.shape[-1]"] = True
        shared = {one.heads != one.kv_heads for one in attentions}
        if not latent and len(shared) == 1:
            facts["attend_fused"]["H != k.shape[1]"] = shared == {True}
        if not any(one.alibi for one in attentions):
            facts["attend_fused"]["given is not None and given.shape[1] == H"] = False
        if self.model.shared:
            facts["forward"] = {"ctx.shared": self.model.shared}
        return facts

    # ---- worlds

    def code_of(self, function: Any) -> Code:
        """The code of a function: of one whose class something stands in for, that of the other class."""
        found = code_of(function)
        owner = None if found.owner is None else global_value(found.module, found.owner)
        other = self.in_place.get(owner)
        if isinstance(other, type) and found.name.rpartition(".")[2] in vars(other):
            return Code(other.__module__, f"{other.__name__}.{found.name.rpartition('.')[2]}")
        return found

    def class_of(self, code: Code) -> Any:
        return None if code.owner is None else global_value(code.module, code.owner)

    def evaluator(self, code: Code) -> Evaluator:
        return Evaluator(code.module, self.facts.get(code.name.rpartition(".")[2], {}), self.in_place)

    def spec(self, code: Code) -> Spec:
        return self.specs.setdefault(code, Spec(code))

    def enter(self, code: Code, bounds: Iterable[dict[str, Any]]) -> None:
        """Note the worlds of some calls."""
        spec = self.spec(code)
        for world in self.in_worlds(code, bounds):
            self.entered.add(code)
            key = tuple((name, self.key(value)) for name, value in world.items() if name != "#")
            spec.worlds.setdefault(key, world)

    def in_worlds(self, code: Code, bounds: Iterable[dict[str, Any]]) -> list[World]:
        """Worlds for the parameters of a function: what the caller's run knows becomes what this one's does."""
        spec = self.spec(code)
        if spec.hints is None:
            spec.hints = {one.arg: annotated(self.annotation(one.annotation, code.module), code.module).kind
                          for one in code.parameters if one.annotation is not None}
        out: dict[Any, World] = {}
        for bound in bounds:
            world: World = {}
            for name, value in bound.items():
                if isinstance(value, tuple) and not all(map(known, value)):
                    value = Run()
                if isinstance(value, Run):
                    kind = spec.hints.get(name) or value.kind
                    value = spec.runs.setdefault((name, value.optional, kind), Run(value.optional, kind))
                world[name] = value
            key = tuple((name, self.key(value)) for name, value in world.items())
            out.setdefault(key, world | {"#": next(self.serial)})
        return list(out.values())

    def annotation(self, node: ast.expr, module: str) -> Any:
        """What an annotation means."""
        scope = {name: self.in_place.get(value, value) if isinstance(value, type) and value is not mask.AttentionMask
                 else value for name, value in vars(__import__(module, fromlist=["_"])).items()}
        try:
            return eval(ast.unparse(node), scope)
        except Exception:
            return None

    def key(self, value: Any) -> Any:
        """What tells two values of a world apart, hashable."""
        if isinstance(value, Run):
            return "run", value.optional, value.kind
        if isinstance(value, nn.Module):
            return id(value)
        try:
            hash(value)
        except TypeError:
            return id(value)
        return type(value), value

    # ---- what a rewriter asks

    def kept(self, codes: Iterable[Code]) -> set[str]:
        """Parameters that stay in functions that are called in one place."""
        group = set().union(*(self.spec(code).group for code in codes))
        for code in group:
            self.spec(code).group = group
        return {one.arg for code in group for one in code.parameters if not self.dropped(code, one.arg)} - {"self"}

    def dropped(self, code: Code, name: str) -> bool:
        """Whether a parameter is the same in all worlds of a function, or is not read."""
        spec = self.spec(code)
        if code.name == "Cache.__init__":                       # who makes one need not know the model
            return False
        if name in spec.unused or not spec.worlds:
            return True
        values = [world[name] for world in spec.worlds.values()]
        if not all(known(one) and same(one, values[0]) for one in values):
            return False
        first = values[0]
        return literal(first) is not None or is_config(first) or isinstance(first, (type, types.FunctionType))

    def called_once(self, code: Code) -> bool:
        """Whether one place in all calls a method, so that it may be written there."""
        return self.final and len(self.spec(code).calls) == 1

    def source_text(self, code: Code) -> str:
        return code.source.text(code.node)

    def plain_enough(self, code: Code, caller: Code) -> bool:
        """Whether a function reads well inside another: a method, or a helper of the same file without much to say."""
        says = ast.get_docstring(code.node) or ""
        return code.owner is not None or ("\n" not in says and code.module == caller.module)

    def rewriter(self, code: Code, worlds: list[World], rename: dict[str, str] | None = None) -> Rewriter:
        return Rewriter(self, code, worlds, rename)

    def special(self, writer: Any, node: ast.Call, functions: list[Any], worlds: list[World]) -> str | None:
        """Calls that are written in another way than they stand in the source, special.py."""
        raise NotImplementedError

    def rings(self) -> bool:
        """Whether a layer has a window."""
        return any(getattr(one, "window", None) for one in self.constants.objects)

    def is_check(self, function: Any) -> bool:
        return function in CHECKS

    def is_refusal(self, node: ast.If) -> bool:
        """if …: raise InputError(…)"""
        return not node.orelse and all(isinstance(one, ast.Raise) for one in node.body)

    def listed(self, evaluator: Any, node: ast.expr, world: World) -> list[nn.Module] | None:
        """The modules of an nn.ModuleList, one of each kind."""
        if not isinstance(node, ast.Attribute):
            return None
        owner = evaluator.value(node.value, world)
        found = getattr(owner, node.attr, None) if isinstance(owner, nn.Module) else None
        return self.layers if found is self.model.layers else None

    def built(self, module: Any, kind: Any) -> World:
        """The arguments that the __init__ of a class was given for a module."""
        made = self.made[id(module)]
        for one in [kind, *kind.__mro__]:
            if one in made:
                return made[one]
        return {}

    def need(self, modules: list[Any], name: str) -> None:
        """An attribute is read."""
        kinds = {(type(one), name) for one in modules}
        self.found.append((lambda: self.new_needs.update(kinds), name))

    def needed(self, kind: type, name: str) -> bool:
        return any(issubclass(one, kind) and attribute == name for one, attribute in self.needs)

    def lift(self, modules: list[Any], field: str, owner: Any) -> None:
        """A field of the modules' configs differs: it becomes an argument of the class that has the config."""
        for module in modules:
            kind = owner or next(one for one in type(module).__mro__ if self.sets(one, "config"))
            self.note_lift(kind, field, "read" if owner else "field")

    def note_lift(self, kind: type, name: str, where: str) -> None:
        def note() -> None:
            lifts = self.new_lifts.setdefault(kind, {})
            lifts[name] = "field" if "field" in (where, lifts.get(name)) else where

        self.found.append((note, name))

    def sets(self, kind: type, name: str) -> bool:
        """Whether the __init__ of a class itself sets an attribute."""
        init = vars(kind).get("__init__")
        if init is None or not is_ours(kind):
            return False
        return any(isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store) and one.attr == name
                   and ast.unparse(one.value) == "self" for one in ast.walk(code_of(init).node))

    def init_parameters(self, kind: type) -> dict[str, str]:
        """What the __init__ of a class still takes: parameter → where its value comes from."""
        for one in kind.__mro__:
            if not is_ours(one) or one is Linear:
                return {}
            if "__init__" in vars(one):
                code = code_of(vars(one)["__init__"])
                given = {each.arg: "given" for each in code.parameters
                         if each.arg not in ("self",) and not self.dropped(code, each.arg) and each.arg != "config"}
                return given | self.lifts.get(one, {})
        return {}

    def record(self, owners: list[Any], field: str) -> None:
        """A field of config objects that differ is read: something of their classes stays."""
        def note() -> None:
            for owner in owners:
                if owner is not None:
                    self.new_records.setdefault(type(owner), set()).add(field)
                    self.name(type(owner))

        self.found.append((note, field))

    def constant(self, owners: list[Any], field: str) -> str | None:
        return self.constants.name(owners, field)

    def parameter_text(self, name: str, value: Any) -> str | None:
        return self.constants.by_name(name.upper(), value)

    def attribute_text(self, module: nn.Module, name: str, value: Any) -> str | None:
        for kind in type(module).__mro__:
            text = self.texts.get((kind, name))
            if text is not None:
                return text if self.constants.gives(text, value) else None
        return None

    def name(self, thing: Any) -> str:
        """What a class or function is called in the file."""
        if thing is Linear:
            return "nn.Linear"
        if thing in self.names:
            return self.names[thing]
        plain = thing.__name__
        if plain in self.names.values():
            plain = f"{thing.__module__.rpartition('.')[2]}_{plain}"
            if isinstance(thing, type):
                plain = f"{thing.__name__}Config"
        self.names[thing] = plain
        return plain

    def global_text(self, module: str, name: str) -> str:
        """A name of the top of a module: of a class or function the one it has here, of a constant its own."""
        try:
            value = global_value(module, name)
        except KeyError:
            return name                                         # len, zip
        value = self.in_place.get(value, value) if isinstance(value, type) else value
        if inspect.isfunction(value) and is_ours(inspect.unwrap(value)):
            return self.name(inspect.unwrap(value))
        if isinstance(value, type) and is_ours(value):
            return self.name(value)
        if isinstance(value, (types.ModuleType, type)) or value is Tensor or inspect.isroutine(value):
            return name
        key = origin(module, name)
        if key not in self.globals:
            taken = {text for other, text in self.globals.items() if other != key} | set(self.constants.comments)
            self.globals[key] = name if name not in taken else f"{module.rpartition('.')[2].upper()}_{name}"
        return self.globals[key]

    def cannot(self, code: Code, what: str) -> ConfigError:
        return errors.ConfigError(f"this model cannot be flattened yet: {code.module}.{code.name} has {what}")
