"""GPT-NeoX-20B and Pythia; Dolly and RedPajama, which are Pythias trained on.

    parallel      x + attention(norm1(x)) + mlp(norm2(x))        use_parallel_residual true: GPT-NeoX, Pythia, Dolly
    sequential    x += attention(norm1(x));  x += mlp(norm2(x))  false: RedPajama-INCITE

LayerNorms with bias; biases on the MLP always, on attention by `attention_bias`; RoPE in the half layout on the first quarter of each
head (`rotary_pct`), base `rotary_emb_base`; MLP plain, exact GELU (Pythia) or its tanh form ("gelu_fast", GPT-NeoX-20B); the head is not tied
and is called `embed_out`. The rows of `query_key_value` are q k v of head 0, q k v of head 1 … (Groups, with as many key/value heads
as heads). Old folders hold the causal mask, and what stood in for −∞, as tensors.
"""

from typing import Any

from checkpoints.families.gpt2 import read_heads
from checkpoints.families.legacy import functions, write_decoder
from checkpoints.names.ops import Groups
from checkpoints.names.reader import Reader
from checkpoints.names.rope import read_rope, write_rope
from checkpoints.names.table import override, rule
from nanollm.config import MLP, Attention, Layer, ModelConfig, Norm, Rope
from nanollm.errors import ConfigError

NAMES = override(
    {},
    rule("gpt_neox.embed_in", "embed"),
    rule("gpt_neox.layers.{i}.input_layernorm", "layers.{i}.pre_mixer"),
    rule("gpt_neox.layers.{i}.attention.query_key_value", [f"layers.{{i}}.mixer.{part}" for part in "qkv"], Groups),
    rule("gpt_neox.layers.{i}.attention.dense", "layers.{i}.mixer.o"),
    rule("gpt_neox.layers.{i}.post_attention_layernorm", "layers.{i}.pre_ffn"),
    rule("gpt_neox.layers.{i}.mlp.dense_h_to_4h", "layers.{i}.ffn.up"),
    rule("gpt_neox.layers.{i}.mlp.dense_4h_to_h", "layers.{i}.ffn.down"),
    rule("gpt_neox.final_layer_norm", "norm"),
    rule("embed_out", "head"),
)
BUFFERS = frozenset(f"gpt_neox.layers.{{i}}.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq"))
IRRELEVANT = frozenset("attention_probs_dropout_prob classifier_dropout custom_pipelines gradient_checkpointing hidden_dropout_prob is_decoder".split())


def read(r: Reader) -> ModelConfig:
    """One layer, repeated; a missing rotary_pct means a quarter."""
    dim, context = r.size("hidden_size"), r.size("max_position_embeddings", 2048)
    heads, head_dim = read_heads(r, dim, "num_attention_heads")
    rope = read_rope(r, 10_000.0, context, fraction=0.25, theta_key="rotary_emb_base", fraction_key="rotary_pct")
    bias = r.flag("attention_bias", True)
    norm = Norm("layer", eps=r.number("layer_norm_eps", 1e-5), bias=True)
    layer = Layer(
        Attention(heads, heads, head_dim, rope, qkv_bias=bias, out_bias=bias),
        MLP(r.size("intermediate_size"), r.activation("hidden_act", "gelu"), gated=False, bias=True),
        norm, pre_ffn=norm, parallel=r.flag("use_parallel_residual", True),
    )
    return ModelConfig(
        vocab=r.size("vocab_size"), dim=dim, layers=(layer,) * r.count("num_hidden_layers"), final_norm=norm,
        tied=r.flag("tie_word_embeddings", False), context=context,
    )


def write_partial_rope(rope: Rope | None, theta_key: str = "rope_theta", fraction_key: str = "partial_rotary_factor") -> dict[str, Any]:
    """As write_rope, for families where a missing fraction does not mean a whole head, and that have names of their own."""
    if rope is None:
        raise ConfigError("layers[0].mixer.rope is None")
    objects = {key: value for key, value in write_rope(rope).items() if key in ("rope_scaling", "rope_parameters")}
    return {theta_key: rope.theta, fraction_key: rope.fraction} | objects


def write(config: ModelConfig) -> dict[str, Any]:
    """Fewer key/value heads than heads, one norm for both branches, or an MLP without biases do not read back."""
    values = write_decoder(config, "gpt_neox", "GPTNeoXForCausalLM", Attention, MLP)
    layer = config.layers[0]
    return values | {
        "num_attention_heads": layer.mixer.heads,
        "intermediate_size": layer.ffn.hidden,
        "hidden_act": "gelu_pytorch_tanh" if layer.ffn.activation == "gelu_tanh" else layer.ffn.activation,
        "layer_norm_eps": config.final_norm.eps,
        "max_position_embeddings": config.context,
        "use_parallel_residual": layer.parallel,
        "attention_bias": layer.mixer.out_bias,
    } | write_partial_rope(layer.mixer.rope, "rotary_emb_base", "rotary_pct")


GPT_NEOX = functions("gpt_neox", read, write, (NAMES,), BUFFERS, IRRELEVANT)
FAMILIES = {"gpt_neox": GPT_NEOX}
