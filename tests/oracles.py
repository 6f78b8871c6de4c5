"""Tiny models that transformers writes, loud enough that a mistake shows, and the logits that transformers gives for them.

Loud: matrices N(0, 0.25), gains and biases N(·, 0.3), ε = 1e-2, so that a dropped bias, a wrong norm or a wrong ε
moves the logits. Each fixture has key/value heads ≠ heads, head_dim ≠ dim / heads, or what its family has; tokens go past
every window and every original context; the vocabulary is no round number.
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

TOKENS = 48                                              # past every window and original context below
BASE = dict(vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8,
            num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-2, tie_word_embeddings=False)


@dataclass(frozen=True)
class Fixture:
    """A published shape in miniature: transformers' class, what to set, and what its hub folder does differently."""
    kind: str                                            # transformers' model_type
    keys: dict[str, Any] = field(default_factory=dict)
    edit: Callable[[dict[str, Any]], None] | None = None    # turns config.json as transformers writes it into the hub's
    rename: dict[str, str] = field(default_factory=dict)    # tensor names: transformers' → the hub's
    length_dependent: bool = False                       # frequencies follow the length: transformers' cache then differs from its full pass


def rope(kind: str, theta: float = 10_000.0, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def old_dialect(*gone: str) -> Callable[[dict[str, Any]], None]:
    """The hub's spelling of before transformers 5: rope_theta and rope_scaling, torch_dtype, and keys that were not there yet."""
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


YARN = dict(factor=4.0, original_max_position_embeddings=2048)          # with 32 channels a head, both ends of the ramp lie inside
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
MHA = dict(num_key_value_heads=8)
MAMBA = dict(vocab_size=131, hidden_size=48, num_hidden_layers=3, state_size=8, expand=2, conv_kernel=4, time_step_rank=5, layer_norm_epsilon=1e-2,
             intermediate_size=None, num_attention_heads=None, num_key_value_heads=None, max_position_embeddings=None, rms_norm_eps=None, tie_word_embeddings=True)

FIXTURES = {
    # Llama and what is exactly Llama
    "llama-1": Fixture("llama", MHA, old_dialect("rope_theta", "num_key_value_heads", "attention_bias", "mlp_bias", "rope_scaling")),
    "llama-2": Fixture("llama", MHA),
    "llama-2-70b": Fixture("llama", {"num_key_value_heads": 1}, old_dialect()),
    "llama-3": Fixture("llama", rope("default", 500_000.0)),
    "llama-3.1": Fixture("llama", {**rope("llama3", 500_000.0, **LLAMA3), "head_dim": 16}),
    "llama-3.2": Fixture("llama", {**rope("llama3", 500_000.0, **{**LLAMA3, "factor": 32.0}), "tie_word_embeddings": True}, old_dialect()),
    "codellama": Fixture("llama", {**MHA, **rope("default", 1e6), "vocab_size": 133}, old_dialect()),
    "vicuna-16k": Fixture("llama", {**MHA, **rope("linear", factor=4.0)}, old_dialect()),
    "alpaca": Fixture("llama", {**MHA, "vocab_size": 129}, old_dialect("rope_theta", "rope_scaling", "num_key_value_heads")),
    "orca-2": Fixture("llama", {**MHA, "vocab_size": 127}, old_dialect()),
    "deepseek-llm-67b": Fixture("llama", {}, old_dialect()),
    "deepseek-coder": Fixture("llama", {**MHA, **rope("linear", 100_000.0, factor=4.0)}, old_dialect()),
    "tinyllama": Fixture("llama", {"num_key_value_heads": 4, "num_hidden_layers": 2}, old_dialect("attention_bias")),
    "xgen": Fixture("llama", MHA, old_dialect("rope_theta", "rope_scaling", "num_key_value_heads")),
    "yi-34b-200k": Fixture("llama", {**rope("default", 5e6), "hidden_size": 70, "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 12, "max_position_embeddings": 64}),
    "yi-early": Fixture("llama", rope("default", 5e6), renamed("Yi"), {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}),
    "aquila-7b": Fixture("llama", MHA, renamed("aquila", "rope_theta", "rope_scaling", "num_key_value_heads")),
    "aquila-34b-16k": Fixture("llama", rope("linear", factor=4.0), renamed("aquila")),
    "xverse": Fixture("llama", MHA, renamed("xverse", "num_key_value_heads")),
    "llama-biases": Fixture("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "llama-dynamic": Fixture("llama", {**rope("dynamic", factor=2.0), "max_position_embeddings": 16}, length_dependent=True),
    "llama-yarn": Fixture("llama", {**rope("yarn", **YARN), "head_dim": 32}),
    "llama-yarn-open": Fixture("llama", {**rope("yarn", **YARN, attention_factor=1.4, beta_fast=8.0, beta_slow=2.0, truncate=False), "head_dim": 32}),
    # Mistral and Mixtral
    "mistral-v0.1": Fixture("mistral", {"sliding_window": 9}),
    "mistral-v0.2": Fixture("mistral", {"sliding_window": None, **rope("default", 1e6)}, old_dialect()),
    "mistral-nemo": Fixture("mistral", {"sliding_window": None, "head_dim": 12, **rope("default", 1e6)}),
    "zephyr": Fixture("mistral", {"sliding_window": 16}, old_dialect()),
    "mixtral-8x7b": Fixture("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None, **rope("default", 1e6)}, old_dialect()),
    "mixtral-8x22b": Fixture("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 11}),
    # Qwen
    "qwen1.5": Fixture("qwen2", {**MHA, "use_sliding_window": False, "sliding_window": 32768}, old_dialect("layer_types")),
    "qwen2-0.5b": Fixture("qwen2", {"tie_word_embeddings": True, **rope("default", 1e6)}),
    "qwen2-sliding": Fixture("qwen2", {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 10, "max_window_layers": 2}),
    "qwen2.5-128k": Fixture("qwen2", {**rope("yarn", 1e6, **YARN), "num_attention_heads": 2, "num_key_value_heads": 1}, old_dialect("layer_types")),
    "qwen3-0.6b": Fixture("qwen3", {"tie_word_embeddings": True, "head_dim": 16, **rope("default", 1e6)}),
    "qwen3-8b": Fixture("qwen3", {"head_dim": 12, **rope("default", 1e6)}, lambda c: (old_dialect()(c), c.update(head_dim=12), None)[-1]),
    "qwen3-sliding": Fixture("qwen3", {"num_hidden_layers": 4, "head_dim": 16, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "attention_bias": True}),
    # Mamba
    "mamba-130m": Fixture("mamba", MAMBA),
    "mamba-2.8b": Fixture("mamba", {**MAMBA, "hidden_size": 40, "time_step_rank": "auto", "state_size": 16, "tie_word_embeddings": False}),
    "mamba-biases": Fixture("mamba", {**MAMBA, "use_bias": True, "use_conv_bias": False, "residual_in_fp32": False, "conv_kernel": 3, "expand": 3}),
}


def hf_config(fixture: Fixture) -> transformers.PretrainedConfig:
    keys = {key: value for key, value in {**BASE, **fixture.keys}.items() if value is not None or key == "sliding_window"}
    return transformers.AutoConfig.for_model(fixture.kind, **keys, bos_token_id=1, eos_token_id=2, pad_token_id=None)


@torch.no_grad()
def make_loud(model: torch.nn.Module, seed: int = 0) -> None:
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
            p.copy_(0.25 * noise)


def write(fixture: Fixture, folder: Path, dtype: torch.dtype = torch.float32, **save: Any) -> transformers.PreTrainedModel:
    """Write the fixture as its hub folder would be; return transformers' model, eager attention, eval mode."""
    model = transformers.AutoModelForCausalLM.from_config(hf_config(fixture), attn_implementation="eager", experts_implementation="eager").eval()
    make_loud(model)
    model.to(dtype).save_pretrained(folder, **save)
    if dtype != torch.float32:                           # .to() also rounds the angles of RoPE, which from_pretrained does not
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager").eval()
    if fixture.edit is not None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        fixture.edit(config)
        path.write_text(json.dumps(config))
    if fixture.rename:
        tensors = load_file(folder / "model.safetensors")
        for old, new in fixture.rename.items():
            tensors = {name.replace(f".{old}.", f".{new}."): tensor for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def tokens(fixture: Fixture, batch: int = 2, length: int = TOKENS, seed: int = 1) -> Tensor:
    vocab = {**BASE, **fixture.keys}["vocab_size"]
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def reference_logits(model: transformers.PreTrainedModel, x: Tensor, attention: str = "eager") -> Tensor:
    """transformers' logits for the full pass. A deep copy: dynamic NTK keeps state between calls."""
    model = copy.deepcopy(model)
    if model.config.model_type != "mamba":
        model.set_attn_implementation(attention)
    return model(x, use_cache=False).logits


def difference(ours: Tensor, reference: Tensor) -> float:
    """Largest difference over the spread (largest less smallest) of the reference."""
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return ((ours.float() - reference.float()).abs().max() / (reference.max() - reference.min()).float()).item()
