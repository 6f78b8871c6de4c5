"""Tiny models that transformers writes, loud enough that a mistake shows, and the logits that transformers gives for
them.

The fixtures themselves are in tests/fixtures/, a file a lineage.

Loud: matrices N(0, 0.25), gains and biases N(·, 0.3), ε = 1e-2, so that a dropped bias, a wrong norm or a wrong ε
moves the logits. Each fixture has key/value heads ≠ heads, head_dim ≠ dim / heads, or what its family has; tokens go
past every window and every original context; the vocabulary is no round number.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TOKENS = 48                                              # past every window and original context
BASE = dict(vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8,
            num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-2, tie_word_embeddings=False)
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Fixture:
    """A published shape in miniature: transformers' class, what to set, and what its hub folder does differently.

    Where transformers has no class for a family, `kind` is the class that computes the same when it is given the
    same weights: `prepare` makes its loud weights such that they can be said in the family's layout, `edit`,
    `rename` and `rearrange` turn its folder into the family's, and `logits` runs it where more than a plain call
    is needed. None of that uses our tables."""
    kind: str                                            # transformers' model_type
    keys: dict[str, Any] = field(default_factory=dict)   # None drops a key of BASE
    edit: Callable[[dict[str, Any]], None] | None = None  # turns config.json as transformers writes it into the hub's
    rename: dict[str, str] = field(
        default_factory=dict
    )  # parts of tensor names between dots: transformers' → the hub's
    rearrange: Callable[[Tensors], Tensors] | None = (
        None  # after the renaming: all tensors of the folder, in the hub's arrangement
    )
    prepare: Callable[[torch.nn.Module], None] | None = None  # a last change to the loud weights of transformers' model
    logits: Callable[[Any, Tensor], Tensor] | None = (
        None  # transformers' logits, where model(x) alone does not give them
    )
    gain: float = 0.25                                   # standard deviation of the matrices
    bound: float = 1e-5                                  # largest difference; another only with the reason beside it
    bit_equal: bool = True  # in bfloat16 too, every logit of the sdpa pass; False only with the reason beside it
    attention: tuple[str, ...] = (
        "eager", "sdpa",
    )  # transformers' implementations that are right; () where there is no attention
    length_dependent: bool = False  # frequencies follow the length: each length is a pass of its own
    oracle: str = "native"  # where it is another class: which, and how it is made to compute the same


def rope(kind: str, theta: float = 10_000.0, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def old_dialect(*gone: str) -> Callable[[dict[str, Any]], None]:
    """The hub's spelling of before transformers 5: rope_theta and rope_scaling, torch_dtype, and keys that were
    not there yet."""
    def edit(config: dict[str, Any]) -> None:
        parameters = config.pop("rope_parameters")
        config["rope_theta"] = parameters.pop("rope_theta")
        kind = parameters.pop("rope_type")
        config["rope_scaling"] = None if kind == "default" else {"type": kind, **parameters}
        config["torch_dtype"] = config.pop("dtype")
        for key in ("head_dim", *gone):
            config.pop(key, None)
    return edit


def renamed(model_type: str, *gone: str) -> Callable[[dict[str, Any]], None]:
    def edit(config: dict[str, Any]) -> None:
        old_dialect(*gone)(config)
        config["model_type"] = model_type
        config["architectures"] = [model_type.capitalize() + "ForCausalLM"]
    return edit


YARN = dict(
    factor=4.0, original_max_position_embeddings=2048
)  # with 32 channels a head, both ends of the ramp lie inside
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
MHA = dict(num_key_value_heads=8)


def hf_config(fixture: Fixture) -> transformers.PretrainedConfig:
    keys = {
        key: value for key, value in {**BASE, **fixture.keys}.items() if value is not None or key == "sliding_window"
    }
    return transformers.AutoConfig.for_model(fixture.kind, **keys, bos_token_id=1, eos_token_id=2, pad_token_id=None)


@torch.no_grad()
def make_loud(model: torch.nn.Module, seed: int = 0, gain: float = 0.25) -> None:
    """Draw every parameter so that it matters. Nothing here knows our code."""
    draw = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=draw)
        if name.endswith("A_log"):
            p.copy_(torch.log(1 + 4 * torch.rand(p.shape, generator=draw)))
        elif name.endswith("dt_proj.bias"):
            p.copy_(noise - 2)
        elif "norm" in name or name.endswith("mixer.D"):
            p.copy_(1 + 0.3 * noise)
        elif name.endswith("bias"):
            p.copy_(0.3 * noise)
        else:
            p.copy_(gain * noise)


def write(
    fixture: Fixture, folder: Path, dtype: torch.dtype = torch.float32, **save: Any
) -> transformers.PreTrainedModel:
    """Write the fixture as its hub folder would be; return transformers' model, eager attention, eval mode."""
    model = transformers.AutoModelForCausalLM.from_config(
        hf_config(fixture), attn_implementation="eager", experts_implementation="eager"
    ).eval()
    make_loud(model, gain=fixture.gain)
    if fixture.prepare is not None:
        with torch.no_grad():
            fixture.prepare(model)
    model.to(dtype).save_pretrained(folder, **save)
    if dtype != torch.float32:  # .to() also rounds the angles of RoPE, which from_pretrained does not
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        ).eval()
    if fixture.edit is not None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        fixture.edit(config)
        path.write_text(json.dumps(config))
    if fixture.rename or fixture.rearrange:
        tensors = load_file(folder / "model.safetensors")
        for old, new in fixture.rename.items():
            tensors = {
                f".{name}.".replace(f".{old}.", f".{new}." if new else ".").strip("."): tensor
                for name, tensor in tensors.items()
            }
        if fixture.rearrange is not None:
            tensors = {name: tensor.contiguous() for name, tensor in fixture.rearrange(tensors).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def tokens(fixture: Fixture, batch: int = 2, length: int = TOKENS, seed: int = 1) -> Tensor:
    vocab = {**BASE, **fixture.keys}["vocab_size"]
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def reference_logits(
    fixture: Fixture, model: transformers.PreTrainedModel, x: Tensor, attention: str | None = None
) -> Tensor:
    """transformers' logits for the full pass, by the first of the implementations that are right. The model stays
    as it was."""
    if fixture.length_dependent or fixture.logits is not None:
        model = copy.deepcopy(
            model
        )  # dynamic NTK keeps state between calls, and what a fixture does may change weights
    before = model.config._attn_implementation
    try:
        if fixture.attention:
            choose(model, attention or fixture.attention[0])
        return model(x, use_cache=False).logits if fixture.logits is None else fixture.logits(model, x)
    finally:
        if fixture.attention:
            choose(model, before)


def choose(model: transformers.PreTrainedModel, attention: str) -> None:
    model.set_attn_implementation(attention)
    model.config._attn_implementation = attention  # what all layers read; Falcon passes over the call before in silence


def difference(ours: Tensor, reference: Tensor) -> float:
    """Largest difference over the spread (largest less smallest) of the reference."""
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return ((ours.float() - reference.float()).abs().max() / (reference.max() - reference.min()).float()).item()
