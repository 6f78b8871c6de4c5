"""A model with adapters, written as the folder that peft loads over transformers' model.

Where one stored weight is several of ours (qkv_proj, gate_up_proj), their adapters become one:

    one A for all       A as it is, and their B one under another                                   rank r
    an A for each       A one under another, B in blocks:  | B_q  0  |                              rank 2 r, the same s
                                                           |  0  B_k |
    none for some       rows of 0 in B; of DoRA m = ‖W‖, which changes nothing

PiSSA's W is not the base's any more; what was taken out of it goes back in with a minus: A over A₀, B beside −B₀, which
is a plain LoRA of rank 2 r (Meng et al. 2024, appendix C). What is trained whole, beside adapters, is saved whole.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from checkpoints import export
from checkpoints.adapters import described
from checkpoints.adapters.described import CONFIG, Described
from checkpoints.adapters.reading import PREFIX, SAFE
from checkpoints.adapters.rows import Arrangement, arrangement
from checkpoints.names import table
from checkpoints.names.ops import Stack
from checkpoints.names.table import Step
from checkpoints.storage import stream, writing
from nanollm.errors import CheckpointError, InputError
from nanollm.model import Decoder
from nanollm.training.lora import LoRA, LoRALinear, adapters, loras


class Fused(NamedTuple):
    """The adapter of one stored weight, as peft has it."""
    stored: str
    parts: dict[str, Tensor]                     # by peft's names: lora_A.weight …
    rank: int
    scale: float
    experts: bool                                # it is a parameter with three dimensions
    transposed: bool

    @property
    def name(self) -> str:
        """Of the module, or of the parameter."""
        return self.stored if self.experts else self.stored.removesuffix(".weight")


def save(model: Decoder, folder: Path, base: str | None = None) -> None:
    """Write the adapters of a model. `base` is what adapter_config.json names as the model that they are for.

    The folder appears whole, or not at all. Raises InputError where there is no adapter, CheckpointError where a weight
    is stored so that peft has no place for its adapter."""
    config, origin = getattr(model, "lora", None), getattr(model, "origin", None)
    if not isinstance(config, LoRA) or not loras(model):
        raise InputError(f"{folder}: not written: the model has no adapter; lora.add puts one there")
    with torch.device("meta"):
        plain = dict(Decoder(model.config).named_parameters())
    steps = _steps(model, export.peft_tables(model.config, origin), plain)
    fused = list(_all_fused(model, steps, plain, folder))
    whole = _whole(model, steps)
    said = _described(config, fused, base or (str(origin.folder) if origin else None), folder)
    every = [name.removesuffix(".weight") for step in steps for name in step.theirs]
    values = described.write(
        said, _short([one.name for one in fused if not one.experts], every, 1),
        _short([one.name for one in fused if one.experts], every, 2),
        sorted({name.rpartition(".")[0] for _, keys in whole for name, key in keys.items() if key == PREFIX + name}),
        transposed=any(one.transposed and not one.experts for one in fused))
    tensors = {f"{PREFIX}{module}.{part}": value for module, one in _modules(fused)
               for part, value in one.parts.items()}
    trained = {plain_name(name): p.data for name, p in model.named_parameters()}
    laid = {name: (one.dtype, tuple(one.shape)) for name, one in tensors.items()}
    for step, keys in whole:
        laid |= {keys[name]: (trained[step.ours[0]].dtype, shape) for name, shape in step.shapes(plain).items()}
    with writing.new_folder(folder) as draft:
        writing.write_json(draft / CONFIG, values)
        places = writing.lay_out(draft, laid, 1 << 62, SAFE)
        with stream.Writer() as out:
            for name, one in tensors.items():
                stream.write(places[name], 0, one, name, out)
            for step, keys in whole:
                stream.save_step(step, trained, {name: places[key] for name, key in keys.items()}, out)


def _steps(model: Decoder, tables: Collection[table.Table], plain: Mapping[str, Tensor]) -> list[Step]:
    """How transformers has each of our parameters in memory: the experts of a layer in one tensor."""
    found: dict[str, Step] = {}
    for names in tables:
        for step in table.expand(names, plain, model.config):
            for ours in step.ours:
                if ours not in found or found[ours].op is Stack:
                    found[ours] = step
    return list({step.ours: step for step in found.values()}.values())


def _all_fused(model: Decoder, steps: Collection[Step], plain: Mapping[str, Tensor], folder: Path) -> Iterator[Fused]:
    modules = loras(model)
    for step in steps:
        ours = {j: model.get_submodule(name.removesuffix(".weight")) for j, name in enumerate(step.ours)
                if name.removesuffix(".weight") in modules or name.endswith(".weight")}
        if not any(isinstance(each, LoRALinear) for each in ours.values()):
            continue
        arranged = arrangement(step, plain)
        if arranged is None or step.op is Stack:
            raise CheckpointError(f"{folder}: not written: {step.ours[0]} is {' and '.join(step.theirs[:3])} for "
                                  "transformers, where peft has no place for its adapter")
        for k, stored in enumerate(step.theirs):
            yield _fuse(arranged, k, stored, ours)


def _fuse(arranged: Arrangement, k: int, stored: str, ours: Mapping[int, nn.Module]) -> Fused:
    """The adapters of the weights of ours that are the k-th stored tensor of a step, as one."""
    *E, N, K = arranged.shapes[k]
    places = {j: [(e, place) for (i, e), place in arranged.places.items() if i == j and place.stored == k]
              for j in ours}
    own = {j: each for j, each in ours.items() if places[j] and isinstance(each, LoRALinear)}
    pairs = {j: _factors(each) for j, each in own.items()}
    scale = next(iter(own.values())).scale
    first = next(iter(pairs.values()))[0]
    one_A = all(torch.equal(A, first) for A, _ in pairs.values())
    rank = first.shape[-2] if one_A else sum(A.shape[-2] for A, _ in pairs.values())
    A, B, at = torch.zeros(*E, rank, K), torch.zeros(*E, N, rank), 0
    for j, (own_A, own_B) in pairs.items():
        columns = slice(at, at + own_A.shape[-2])
        at += 0 if one_A else own_A.shape[-2]
        A[..., columns, :] = own_A
        if own[j].scale != scale:
            own_B = own_B * (own[j].scale / scale)
        for e, place in places[j]:
            into, value = (B, own_B) if e is None else (B[place.expert], own_B[e])
            into[place.rows, columns] = value
    parts = {"lora_A.weight": A.flatten(0, -2), "lora_B.weight": B.permute(1, 2, 0).flatten(1) if E else B}
    if any(each.magnitude is not None for each in own.values()):
        m = torch.zeros(N)
        for j, each in ours.items():
            magnitude = own[j].magnitude if j in own else each.get_parameter("weight").float().norm(dim=1)
            for _, place in places[j]:
                m[place.rows] = magnitude.detach().float().cpu()  # type: ignore[union-attr]  # all have one, or none
        parts["lora_magnitude_vector"] = m
    return Fused(stored, {name: part.contiguous() for name, part in parts.items()}, rank, scale, bool(E),
                 arranged.transposed)


def _factors(module: LoRALinear) -> tuple[Tensor, Tensor]:
    """A and B of what stands beside the base's own W, float32."""
    A, B = module.A.detach().float().cpu(), module.B.detach().float().cpu()
    if module.taken is not None:
        A, B = torch.cat([A, module.taken[0].cpu()], -2), torch.cat([B, -module.taken[1].cpu()], -1)
    return A, B


def _modules(fused: Collection[Fused]) -> Iterator[tuple[str, Fused]]:
    """Each adapter and the module of peft that has it: those of one module's parameters are wrapped one in the other,
    the first one innermost."""
    owners = [one.name.rpartition(".")[0] for one in fused if one.experts]
    for one in fused:
        if one.experts:
            owner = owners.pop(0)
            yield owner + ".base_layer" * owners.count(owner), one
        else:
            yield one.name, one


def _described(config: LoRA, fused: Collection[Fused], base: str | None, folder: Path) -> Described:
    if config.init == "loftq":
        warnings.warn(f"{folder}: the adapter is for the quantised weights that LoftQ made, not for those of {base}",
                      stacklevel=4)
    dropout = config.dropout
    if dropout and any(one.experts for one in fused):
        warnings.warn(f"{folder}: lora_dropout is written as 0, as peft has none for experts", stacklevel=4)
        dropout = 0.0
    alphas = {one.name: one.scale * (one.rank ** 0.5 if config.rslora else one.rank) for one in fused}
    return Described(
        "", config.rank, config.alpha, dropout, config.rslora, config.dora, False,
        {one.name: one.rank for one in fused if one.rank != config.rank},
        {name: alpha for name, alpha in alphas.items() if abs(alpha - config.alpha) > 1e-9 * config.alpha}, base)


def _whole(model: Decoder, steps: Collection[Step]) -> list[tuple[Step, dict[str, str]]]:
    """The steps of what is trained beside adapters, and of all that is in the same modules of transformers, with the
    names that peft has for their tensors."""
    known, adapted = adapters(model), set(loras(model))
    trained = {plain_name(name) for name, p in model.named_parameters() if p.requires_grad and name not in known}
    if both := [name for name in trained if name.removesuffix(".weight") in adapted]:
        raise InputError(f"{both[0]} is trained, and has an adapter beside it: peft saves the one or the other")
    found = []
    biases = {step.ours for step in steps if trained.intersection(step.ours)
              and not adapted.isdisjoint(ours.rpartition(".")[0] for ours in step.ours)}
    modules = {name.rpartition(".")[0] for step in steps if trained.intersection(step.ours) and step.ours not in biases
               for name in step.theirs}
    for step in steps:
        if step.ours in biases:                  # of a module with an adapter its bias alone
            found.append((step, {name: PREFIX + name.removesuffix("bias") + "base_layer.bias" for name in step.theirs}))
        elif any(name.rpartition(".")[0] in modules for name in step.theirs):
            found.append((step, {name: PREFIX + name for name in step.theirs}))
    return found


def plain_name(name: str) -> str:
    """The name that a frozen parameter has without an adapter beside it: layers.0.mixer.q.base.weight → ….q.weight"""
    return name.replace(".base.", ".")


def _short(names: Collection[str], every: Collection[str], parts: int) -> list[str]:
    """Names by their last parts, where all that end so are among them; otherwise in full. A number is no name: layers
    end so too."""
    def end(name: str) -> str:
        return ".".join(name.split(".")[-parts:])

    others = {end(name) for name in every if name not in names}
    return sorted({name if end(name) in others or end(name).isdigit() else end(name) for name in names})
