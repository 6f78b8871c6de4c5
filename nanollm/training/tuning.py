"""Tuning with adapters: what --lora-rank, --adapter and --quantize do to a model before its first step.

                     stored as                          in a product as      gradient, optimizer's state, checkpoint
    W of a layer     the folder has it, or in           dtype of products,   none
                     8 or 4 bits (--quantize)           made twice a step
    embedding, head  the folder has it                  a copy for the step  none
    A, B, m          float32                            dtype of products    float32

LoRA (Hu et al. 2021, arXiv 2106.09685) is in lora_layer.py. QLoRA is LoRA beside W in NF4 (Dettmers et al. 2023, arXiv
2305.14314), here also in int8 and int4. Where W is made anew is layers/frozen.py.

Rank 0 reads the model, quantises it and draws A: `prepare`. What it is then, each module of it, is `blank`, the model
without its numbers, which every rank gets; the numbers follow one tensor at a time. FSDP2 shards parameters, so W in
the folder's dtype is in shards, and W in 8 or 4 bits, which are buffers, is whole on every rank.

A checkpoint has A, B, m alone. The rest is read again from --init, and `fingerprint` says whether it is the same.
"""

import argparse
import copy
import shlex
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanollm.errors import InputError, RunError
from nanollm.layers.frozen import FrozenLinear
from nanollm.layers.linear import Linear
from nanollm.model import Decoder
from nanollm.training import lora, low_memory, optim, reward
from nanollm.training.lora import LoRA

QUANTIZED = ("int8", "int4", "nf4")
READ = ("dt_proj", "kv_up")     # Linears whose weight a layer also reads, and multiplies itself
SAMPLE = 4096                   # numbers of a tensor that the fingerprint reads
# Options of LoRA that an adapter's own folder answers, and those that change the model under an adapter.
SHAPE = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "rslora", "dora", "lora_init")
FREEZE = ("expand", "freeze", "train_last")
OTHER = (*FREEZE, "grow_vocab", "add_tokens")


@dataclass(frozen=True)
class Source:
    """What a model was before the first step, and how it is written back."""
    name: str                       # --init as it was given: a folder, or a name on the hub
    origin: Any                     # of a model that was loaded: it is written back the same way
    blank: Decoder                  # the model on the meta device, as one that is whole will be
    frozen: str | None              # the fingerprint of what is frozen
    dtype: torch.dtype              # that the model is written in


def tunes(options: argparse.Namespace) -> bool:
    """Whether a run trains adapters."""
    return bool(options.lora_rank or options.adapter)


def given(options: argparse.Namespace, names: tuple[str, ...]) -> list[str]:
    """Those of these options that are set, as they are written."""
    return ["--" + name.replace("_", "-") for name in names if getattr(options, name, None)]


def check(options: argparse.Namespace) -> None:
    """Raise InputError for options that do not go together, before anything is read."""
    if not tunes(options):
        if alone := given(options, (*SHAPE, "lora_plus")):
            raise InputError(f"{alone[0]} is for adapters: give --lora-rank, 8 or 16, with it")
        if options.quantize:
            raise InputError(f"--quantize {options.quantize}: weights in so few bits are not trained; adapters beside "
                             "them are: give --lora-rank, 8 or 16, with it")
        return
    name = "--adapter" if options.adapter else "--lora-rank"
    if not options.init and not options.plan:
        raise InputError(f"{name} tunes a model that exists: name its folder with --init")
    if options.adapter and (twice := given(options, SHAPE)):
        raise InputError(f"{twice[0]} with --adapter: the adapter that goes on has its own; leave the option out, or "
                         "begin another adapter without --adapter")
    if options.optimizer == "muon":
        raise InputError(f"{name} with --optimizer muon: Muon makes the update of a whole weight orthogonal, and A and "
                         "B are factors of one; --optimizer adamw, the default, trains them")
    if other := given(options, OTHER):
        raise InputError(f"{name} with {other[0]}: an adapter is trained and written alone, for its base as it is; "
                         "what changes the base is a run of its own, whose folder --init can then name")
    if options.adapter and options.rope_scaling:
        raise InputError("--adapter with --rope-scaling: an adapter goes on beside the base that it is for; merge it "
                         "first (python -m checkpoints.convert BASE OUT --adapter FOLDER --merge), and begin another "
                         "beside OUT with --lora-rank")
    if options.lora_init == "loftq" and not options.quantize:
        raise InputError("--lora-init loftq makes up for what quantising loses: give --quantize nf4 or int4 with it")
    if options.quantize and options.offload:
        raise InputError("--offload moves parameters, and a quantised weight is none; leave one of --offload and "
                         "--quantize out")


def loading(options: argparse.Namespace) -> dict[str, Any]:
    """What checkpoints.load is asked for. Where the weights are needed as they are, they are quantised after that."""
    early = options.quantize and (options.lora_init or "zero") == "zero" and not options.rope_scaling
    return {"quantize": options.quantize if early else None, "adapter": options.adapter}


def prepare(model: Decoder, options: argparse.Namespace, quantise: Callable[[Tensor, Tensor | None, str], nn.Module],
            quantise_all: Callable[[Decoder, str], None]) -> Decoder:
    """Put adapters with their first values beside the weights of a model, which stay as they are, in place.

    quantise: one weight, for loftq; quantise_all: those that are not quantised yet; both by kind. Raises InputError."""
    if not options.adapter:
        rank, init = options.lora_rank, options.lora_init or "zero"
        config = LoRA(rank, options.lora_alpha or 2.0 * rank, options.lora_dropout or 0.0, options.rslora, options.dora,
                      tuple(options.lora_targets or ("all",)), init=init)
        one = (lambda W, bias: quantise(W, bias, options.quantize)) if init == "loftq" else None
        lora.add(model, config, options.seed, one)
        if options.quantize:
            quantise_all(model, options.quantize)
    trained = set(lora.adapters(model).values())
    if not trained:
        raise InputError(f"{options.adapter}: puts no adapter beside a weight, so there is nothing to train")
    for p in model.parameters():
        p.requires_grad_(p in trained)
    for name, module in list(model.layers.named_modules(prefix="layers")):
        if type(module) is Linear and not lora.has(name, READ):
            model.set_submodule(name, frozen(module))
    return model


def outline(model: Decoder, options: argparse.Namespace, quantise_all: Callable[[Decoder, str], None]) -> Decoder:
    """What `prepare` makes of a model, on the meta device and without a folder: for --plan. Raises InputError."""
    if not tunes(options):
        return model
    if options.adapter:
        raise InputError("--plan reads no adapter: give its --lora-rank in the place of --adapter")
    if options.quantize:
        quantise_all(model, options.quantize)
    return prepare(model, argparse.Namespace(**{**vars(options), "lora_init": "zero"}), no_weight, quantise_all)


def no_weight(weight: Tensor, bias: Tensor | None, kind: str) -> nn.Module:
    """The `quantise` of a model that has no numbers."""
    raise AssertionError("nothing begins with a weight here")


def frozen(linear: Linear) -> FrozenLinear:
    """The Linear that keeps no weight for the backward pass."""
    new = FrozenLinear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    new.weight, new.bias = linear.weight, linear.bias
    return new.train(linear.training)


def blank(model: Decoder, options: argparse.Namespace) -> Decoder | None:
    """The model on the meta device, where it has adapters: the same modules, dtypes and frozen parameters, without
    numbers or origin."""
    if not tunes(options):
        return None
    memo: dict[int, Any] = {id(getattr(model, "origin", None)): None}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def draws(model: Decoder) -> bool:
    """Whether adapters have dropout."""
    return any(module.dropout > 0 for module in lora.loras(model).values())


def share(model: Decoder, blank: Decoder) -> None:
    """Make parameters one again that are one in `blank`, as moving a model from the meta device makes each anew."""
    first: dict[nn.Parameter, str] = {}
    adapters = {f"{name}.A" for name in lora.loras(blank)}      # Decoder.tie has the others
    for name, p in blank.named_parameters(remove_duplicate=False):
        one = first.setdefault(p, name)
        if one != name and name in adapters:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, model.get_parameter(one))


def fingerprint(model: Decoder, options: argparse.Namespace) -> str | None:
    """A CRC-32 of all but the adapters, as --init gives it: names, dtypes, shapes, and of each tensor 4,096 numbers,
    evenly spaced. None for a run that trains every parameter, whose checkpoints have them all.

    Other weights of the same model, from another run or another quantisation, differ in nearly every number. A tensor
    in which somebody changed a few numbers may pass."""
    if not tunes(options) and not given(options, FREEZE):
        return None
    own = lora.adapters(model)
    held = {name: p.detach() for name, p in model.named_parameters() if name not in own}
    held |= dict(model.named_buffers())
    value = 0
    for name, tensor in held.items():
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        flat = tensor.reshape(-1)
        some = flat[:: -(-len(flat) // SAMPLE)].contiguous().cpu()
        value = zlib.crc32(some.view(torch.uint8).numpy().tobytes(), value)
    return f"{value:08x}"


def optimizers(model: Decoder, options: argparse.Namespace, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """AdamW for adapters, or what takes its place, where there are any; else those of optim.py. Weight decay is for A
    and B. With --lora-plus λ the learning rate of B is λ times that of A (Hayou et al. 2024, arXiv 2402.12354)."""
    there, numbers = lora.adapters(model), low_memory.numbers(options)
    if not there:
        return optim.build(model, options.optimizer, options.weight_decay, dtype, options.betas, **numbers)
    parts: dict[str, list[nn.Parameter]] = {"A": [], "B": [], "magnitude": []}
    for name, p in there.items():
        parts[name.rpartition(".")[2]].append(p)
    parts["rest"] = [p for name, p in model.named_parameters() if p.requires_grad and name not in there]   # a score
    decay, faster = options.weight_decay, options.lora_plus or 1.0
    found = optim.of_groups(model, options.optimizer, [
        {"params": parts["A"], "weight_decay": decay, "lr_scale": 1.0},
        {"params": parts["B"], "weight_decay": decay, "lr_scale": faster},
        {"params": parts["magnitude"] + parts["rest"], "weight_decay": 0.0, "lr_scale": 1.0}], options.betas,
        numbers["every"])
    optim.init_state(found)
    return found


def need_trainable(model: Decoder, options: argparse.Namespace) -> None:
    """Raise RunError where weights have too few bits to be trained, and no adapter is asked for."""
    if not tunes(options) and any(hasattr(module, "dense") for module in model.modules()):
        raise RunError(f"{options.init}: its weights are quantised, and those are not trained; --lora-rank trains "
                       f"adapters beside them, or python -m checkpoints.convert {options.init} OUT writes them in 16 "
                       "bits")


def other_base(options: argparse.Namespace) -> str | None:
    """What makes the weights beside the adapter others than those of --init: then the whole model is written, with the
    adapter in its weights."""
    if options.rope_scaling:
        return f"--rope-scaling {options.rope_scaling} changes the model of"
    if options.quantize and options.lora_init in ("pissa", "loftq"):
        return f"--lora-init {options.lora_init} quantises other weights than those of"
    return None


def how_to_use(options: argparse.Namespace, name: str) -> str:
    """What the run folder will be, and the commands for it. `name` is that of --init."""
    if reason := other_base(options):
        return f"{options.out}: will be a whole model with the adapter in its weights, as {reason} {name}"
    base, out = shlex.quote(name), shlex.quote(str(options.out))
    if options.reward:
        return (f"{options.out}: will be a reward model: an adapter, as peft has them, and {reward.FILE}:\n"
                f"  python train.py --init {base} --grpo PROMPTS --reward-model {out}")
    kind = f" --quantize {options.quantize}" if options.quantize else ""
    template = f" --template {shlex.quote(options.template)}" if options.template else ""
    chats = options.chat or options.preference or options.grpo or options.ppo
    ask = f"--chat{template}" if chats else f"--prompt {shlex.quote(options.prompt or 'Once upon a time')}"
    return (f"{options.out}: will be an adapter, as peft has them:\n"
            f"  python generate.py --model {base} --adapter {out}{kind} {ask}\n"
            f"  python -m checkpoints.convert {base} OUT --adapter {out} --merge")


def export(whole: Decoder, folder: Path, options: argparse.Namespace, source: Source,
           save: Callable[[Decoder, Path], None], save_adapter: Callable[..., None]) -> None:
    """Write the model; of one with adapters those alone, which name their base as source.name, or the model with them
    in it, in source.dtype. The score of a reward model is a file of its own beside it."""
    score = reward.taken_off(whole)
    if not tunes(options):
        save(whole, folder)
    elif other_base(options) is None:
        save_adapter(whole, folder, base=source.name)
    else:
        save(lora.merge(whole).to(source.dtype), folder)
    reward.write(score, folder)
