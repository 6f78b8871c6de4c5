"""Jamba: Mamba layers, attention in every eighth place, and experts in place of every second MLP.

    layer i has attention         iff  i mod attn_layer_period   = attn_layer_offset,   else Mamba
            experts               iff  i mod expert_layer_period = expert_layer_offset  and num_experts > 1,   else one MLP

No layer knows positions: the scans order the tokens (Lieber et al. 2024, arXiv 2403.19887, §6.5). Mamba's low-rank Δ, B and C
have RMS norms of their own, with gain. The router's softmax is over all experts and the chosen weights are not renormalised.
Jamba-v0.1, 1.5 Mini and Large, Jamba Reasoning 3B, which has no experts.
"""

from typing import Any

from checkpoints.families.legacy import functions, read_mlp
from checkpoints.families.llama import LLAMA_NAMES
from checkpoints.families.mamba import read_rank, whole_multiple
from checkpoints.names.ops import Stack
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, rule
from nanollm.config import MLP, Attention, Layer, Mamba, ModelConfig, MoE, Norm
from nanollm.errors import ConfigError

CONTEXT = 262_144                                        # what a missing max_position_embeddings means

JAMBA_NAMES = override(
    LLAMA_NAMES,
    *(rule(f"model.layers.{{i}}.mamba.{name}", f"layers.{{i}}.mixer.{name}")
      for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "out_proj")),
    *(rule(f"model.layers.{{i}}.mamba.{name}_layernorm", f"layers.{{i}}.mixer.{name}_norm") for name in ("dt", "b", "c")),
    rule("model.layers.{i}.pre_ff_layernorm", "layers.{i}.pre_ffn"),
    *(rule(f"model.layers.{{i}}.feed_forward.{name}_proj", f"layers.{{i}}.ffn.{name}") for name in ("gate", "up", "down")),
    rule("model.layers.{i}.feed_forward.router", "layers.{i}.ffn.router"),
    *(rule(f"model.layers.{{i}}.feed_forward.experts.{{e}}.{name}_proj.weight", f"layers.{{i}}.ffn.experts.{name}", Stack)
      for name in ("gate", "up", "down")),
    rule("model.final_layernorm", "norm"),
)


def read_places(r: Reader, kind: str, period: int, offset: int) -> list[bool]:
    """Which layers are the special ones; the numbers are the family's defaults."""
    period, first = r.size(f"{kind}_layer_period", period), r.get(f"{kind}_layer_offset", offset)
    if type(first) is not int or not 0 <= first < period:
        raise r.error(f"{kind}_layer_offset", f"a whole number from 0 to {kind}_layer_period - 1 ({period - 1})")
    return [i % period == first for i in range(r.count("num_hidden_layers"))]


def read(r: Reader) -> ModelConfig:
    """One attention, one Mamba, one MLP and one set of experts; the layers choose among them."""
    dim, heads = r.size("hidden_size"), r.size("num_attention_heads")
    if dim % heads:
        raise r.error("num_attention_heads", f"a divisor of hidden_size ({dim})")
    norm = Norm(eps=r.number("rms_norm_eps", 1e-6))
    r.must("sliding_window", None)
    r.must("mamba_inner_layernorms", True)
    attention = Attention(heads, r.size("num_key_value_heads", 8, or_null=True) or heads, dim // heads)
    mamba = Mamba(
        inner=r.size("mamba_expand", 2) * dim,
        state=r.size("mamba_d_state", 16),
        conv=r.size("mamba_d_conv", 4),
        dt_rank=read_rank(r, "mamba_dt_rank", dim),
        conv_bias=r.flag("mamba_conv_bias", True),
        bias=r.flag("mamba_proj_bias", False),
        inner_norm=norm,
    )
    mlp, experts, chosen = read_mlp(r), r.count("num_experts", 16), r.size("num_experts_per_tok", 2)
    r.must("hidden_act", "silu")                         # Mamba's too
    moe = MoE(experts, chosen, mlp, renormalize=False, round_weights=True) if experts > 1 else mlp
    places = zip(read_places(r, "attn", 8, 4), read_places(r, "expert", 2, 1))
    return ModelConfig(
        vocab=r.size("vocab_size"),
        dim=dim,
        layers=tuple(Layer(attention if attends else mamba, moe if routes else mlp, norm, pre_ffn=norm) for attends, routes in places),
        final_norm=norm,
        tied=r.flag("tie_word_embeddings", False),
        context=r.size("max_position_embeddings", CONTEXT),
    )


def places(kinds: list[bool], kind: str) -> dict[str, int]:
    """The period and the offset that say which layers are special. They need not exist: reading them back tells."""
    at = [i for i, special in enumerate(kinds) if special]
    period = at[1] - at[0] if len(at) > 1 else len(kinds)
    return {f"{kind}_layer_period": period, f"{kind}_layer_offset": at[0]}


def write(config: ModelConfig) -> dict[str, Any]:
    """There must be a layer of each kind, for its sizes; experts may be missing, then num_experts is 1."""
    mixers, feeds = [layer.mixer for layer in config.layers], [layer.ffn for layer in config.layers]
    attention = next((each for each in mixers if isinstance(each, Attention)), None)
    mamba = next((each for each in mixers if isinstance(each, Mamba)), None)
    if attention is None or mamba is None:
        raise ConfigError(f"Jamba wants attention and Mamba, and has no {'attention' if attention is None else 'Mamba'} here")
    moe = next((each for each in feeds if isinstance(each, MoE)), None)
    mlp = moe.expert if moe else feeds[0]
    if not isinstance(mlp, MLP):
        raise ConfigError(f"layers[0].ffn is {type(mlp).__name__}, not MLP")
    return {
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        "vocab_size": config.vocab,
        "hidden_size": config.dim,
        "intermediate_size": mlp.hidden,
        "hidden_act": mlp.activation,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.final_norm.eps,
        "tie_word_embeddings": config.tied,
        **places([isinstance(each, Attention) for each in mixers], "attn"),
        **(places([isinstance(each, MoE) for each in feeds], "expert") if moe else {}),
        "num_experts": moe.experts if moe else 1,
        "num_experts_per_tok": moe.top_k if moe else 1,
        "mamba_expand": whole_multiple(mamba.inner, config.dim),
        "mamba_d_state": mamba.state,
        "mamba_d_conv": mamba.conv,
        "mamba_dt_rank": mamba.dt_rank,
        "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.bias,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": None,
        "torch_dtype": None,
    }


JAMBA = functions(
    "jamba", read, write, (JAMBA_NAMES,),
    irrelevant=frozenset("calc_logits_for_entire_prompt n_ctx num_logits_to_keep use_associative_scan use_mamba_kernels use_mambapy".split()),
)
FAMILIES = {"jamba": JAMBA}
