"""RecurrentGemma: Griffin's recurrent blocks, and local attention in every third place. 2B, 9B.

    block_types        "recurrent", "recurrent", "attention", over and over, the last round cut off where the layers end
    intermediate_size  counts the gate and the up projection together: the MLP is half as wide. Biases on all three, and on o
    attention          multi-query, a window of 2048, and half of each head turns
    embedding          times √hidden_size, which is rounded to bfloat16 whatever the weights are: 50.5 for 2560, not 50.596

As in Gemma the gains are stored less one, head and embedding are tied, and the logits have a soft cap.
"""

from typing import Any

import torch

from checkpoints.families.legacy import functions
from checkpoints.families.llama import LLAMA_NAMES
from checkpoints.names.reader import Reader
from checkpoints.names.rope import read_rope, write_rope
from checkpoints.names.table import override, rule
from nanollm.config import MLP, RGLRU, Attention, Layer, ModelConfig, Norm
from nanollm.errors import ConfigError

RECURRENT_GEMMA_NAMES = override(
    LLAMA_NAMES,
    rule("model.layers.{i}.temporal_pre_norm", "layers.{i}.pre_mixer"),
    rule("model.layers.{i}.channel_pre_norm", "layers.{i}.pre_ffn"),
    *(rule(f"model.layers.{{i}}.temporal_block.{name}_proj", f"layers.{{i}}.mixer.{name}") for name in "qkvo"),
    *(rule(f"model.layers.{{i}}.temporal_block.linear_{name}", f"layers.{{i}}.mixer.{name}_proj") for name in ("x", "y", "out")),
    rule("model.layers.{i}.temporal_block.conv_1d", "layers.{i}.mixer.conv1d"),
    *(rule(f"model.layers.{{i}}.temporal_block.rg_lru.{theirs}_{leaf}", f"layers.{{i}}.mixer.{ours}.{leaf}")
      for theirs, ours in (("input_gate", "input_gate"), ("recurrent_gate", "recurrence_gate")) for leaf in ("weight", "bias")),
    rule("model.layers.{i}.temporal_block.rg_lru.recurrent_param", "layers.{i}.mixer.Lambda"),
    *(rule(f"model.layers.{{i}}.mlp_block.{name}_proj", f"layers.{{i}}.ffn.{name}") for name in ("gate", "up", "down")),
    rule("model.final_norm", "norm"),
)


def root(dim: int) -> float:
    """√dim, rounded to bfloat16."""
    return torch.tensor(dim**0.5, dtype=torch.bfloat16).item()


def read_kinds(r: Reader) -> list[str]:
    """What each layer is. The first configs say `_block_types`."""
    round_ = r.get("block_types", r.get("_block_types", ["recurrent", "recurrent", "attention"]))
    if not isinstance(round_, list) or not round_ or not all(one in ("recurrent", "attention") for one in round_):
        raise r.error("block_types", "a list of recurrent and attention")
    return [round_[i % len(round_)] for i in range(r.count("num_hidden_layers"))]


def read(r: Reader) -> ModelConfig:
    """One attention, one recurrent block and one MLP; the layers choose among them."""
    dim, heads = r.size("hidden_size"), r.size("num_attention_heads")
    if dim % heads:
        raise r.error("num_attention_heads", f"a divisor of hidden_size ({dim})")
    r.must("head_dim", dim // heads)
    r.must("embeddings_scale_by_sqrt_dim", True)
    norm = Norm(eps=r.number("rms_norm_eps", 1e-6), offset=1.0, cast_after_gain=True)
    context = r.size("max_position_embeddings", None)
    attention = Attention(
        heads, r.size("num_key_value_heads", None) or heads, dim // heads,
        rope=read_rope(r, 10_000.0, context or 8192, fraction=0.5),
        window=r.size("attention_window_size", 2048),
        qkv_bias=r.flag("attention_bias", False),
        out_bias=True,
    )
    if attention.rope.scaling is not None:
        raise ConfigError(f"{r.where}: the rope_type is {type(attention.rope.scaling).__name__}; expected default, which is what is implemented")
    activation = r.activation("hidden_activation", "gelu_pytorch_tanh")
    recurrent = RGLRU(r.size("lru_width", dim, or_null=True) or dim, heads, r.size("conv1d_width", 4), activation)
    hidden = r.size("intermediate_size", 7680)
    if hidden % 2:
        raise r.error("intermediate_size", "an even number")
    mlp = MLP(hidden // 2, activation, bias=True)
    return ModelConfig(
        vocab=r.size("vocab_size"),
        dim=dim,
        layers=tuple(Layer(attention if kind == "attention" else recurrent, mlp, norm, pre_ffn=norm) for kind in read_kinds(r)),
        final_norm=norm,
        tied=r.flag("tie_word_embeddings", True),
        context=context,
        embed_scale=root(dim),
        head_softcap=r.number("logits_soft_cap", 30.0),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """There must be a layer of each kind, for its sizes."""
    mixers, mlp = [layer.mixer for layer in config.layers], config.layers[0].ffn
    attention = next((each for each in mixers if isinstance(each, Attention)), None)
    recurrent = next((each for each in mixers if isinstance(each, RGLRU)), None)
    if attention is None or recurrent is None or attention.rope is None or not isinstance(mlp, MLP):
        raise ConfigError("RecurrentGemma wants RG-LRU, attention with RoPE, and an MLP in each layer")
    return {
        "architectures": ["RecurrentGemmaForCausalLM"],
        "model_type": "recurrent_gemma",
        "vocab_size": config.vocab,
        "hidden_size": config.dim,
        "intermediate_size": 2 * mlp.hidden,
        "hidden_activation": "gelu_pytorch_tanh" if mlp.activation == "gelu_tanh" else mlp.activation,
        "num_hidden_layers": len(config.layers),
        "block_types": ["attention" if isinstance(each, Attention) else "recurrent" for each in mixers],
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "attention_window_size": attention.window,
        "attention_bias": attention.qkv_bias,
        "lru_width": recurrent.width,
        "conv1d_width": recurrent.conv,
        "rms_norm_eps": config.final_norm.eps,
        "logits_soft_cap": config.head_softcap,
        "max_position_embeddings": config.context,
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": None,
        "torch_dtype": None,
    } | write_rope(attention.rope)


RECURRENT_GEMMA = functions("recurrent_gemma", read, write, (RECURRENT_GEMMA_NAMES,),
                         irrelevant=frozenset({"w_init_variance_scale", "final_w_init_variance_scale"}))
FAMILIES = {"recurrent_gemma": RECURRENT_GEMMA}
