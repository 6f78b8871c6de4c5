"""Jamba: Mamba layers, attention in every eighth place, and experts in place of every second MLP.

    layer i has attention   iff  i mod attn_layer_period   = attn_layer_offset,   else Mamba
            experts         iff  i mod expert_layer_period = expert_layer_offset  and num_experts > 1,   else one MLP

No layer knows positions: the scans order the tokens (Lieber et al. 2024, arXiv 2403.19887, §6.5). Mamba's low-rank Δ, B
and C have RMS norms of their own, with gain. The router's softmax is over all experts and the chosen weights are not
renormalised. Jamba-v0.1, 1.5 Mini and Large, Jamba Reasoning 3B, which has no experts.
"""

from typing import Any

from checkpoints.families.llama import EPS, EXPERT, GATED, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.families.mamba import SCAN
from checkpoints.names.config_rows import Expand, Heads, Kinds, Rank, ReadKinds, WriteKinds
from checkpoints.names.config_table import count, flag, number, only, part, size
from checkpoints.names.expert_ops import GateUp
from checkpoints.names.ops import Stack
from checkpoints.names.reader import Reader
from checkpoints.names.table import EXPERTS_GATE_UP, override, rule, under
from nanollm.config import MLP, Attention, Mamba, MoE, Norm
from nanollm.errors import ConfigError

JAMBA_NAMES = override(
    LLAMA_NAMES,
    *under("", "", {"model.final_layernorm": "norm", "model.layers.{i}.pre_ff_layernorm": "layers.{i}.pre_ffn"}),
    *under("model.layers.{i}.mamba", "layers.{i}.mixer", SCAN),
    *under("model.layers.{i}.mamba", "layers.{i}.mixer", {
        "dt_layernorm": "dt_norm", "b_layernorm": "b_norm", "c_layernorm": "c_norm",
    }),
    *under("model.layers.{i}.feed_forward", "layers.{i}.ffn", {**GATED, "router": "router"}),
    *under("model.layers.{i}.feed_forward.experts.{e}", "layers.{i}.ffn.experts", EXPERT, Stack),
)

IN_MEMORY = override(  # as transformers 5 has it in memory
    JAMBA_NAMES, rule("model.layers.{i}.feed_forward.experts.down_proj", "layers.{i}.ffn.experts.down"),
    rule("model.layers.{i}.feed_forward.experts.gate_up_proj", EXPERTS_GATE_UP, GateUp),
)


def places(name: str, usual: str, special: str, period: int, offset: int) -> tuple[ReadKinds, WriteKinds]:
    """How `Kinds` reads and writes them: layer i is special iff i mod period = offset; the numbers are the defaults."""
    period_key, offset_key = f"{name}_layer_period", f"{name}_layer_offset"

    def read(r: Reader, layers: int) -> list[str]:
        every, first = r.size(period_key, period), r.get(offset_key, offset)
        if type(first) is not int or not 0 <= first < every:
            raise r.error(offset_key, f"a whole number from 0 to {period_key} - 1 ({every - 1})")
        return [special if i % every == first else usual for i in range(layers)]

    def write(kinds: list[str]) -> dict[str, Any]:
        """There need not be such numbers: reading them back tells."""
        at = [i for i, kind in enumerate(kinds) if kind == special]
        if not at:
            raise ConfigError(f"no layer has {special}; one must have it, for its sizes")
        return {period_key: at[1] - at[0] if len(at) > 1 else len(kinds), offset_key: at[0]}

    return read, write


def expert_places() -> tuple[ReadKinds, WriteKinds]:
    """The same for experts. One expert is none: then all layers have an MLP."""
    read, write = places("expert", "mlp", "experts", 2, 1)

    def read_experts(r: Reader, layers: int) -> list[str]:
        kinds = read(r, layers)
        return kinds if r.count("num_experts", 16) > 1 else ["mlp"] * layers

    return read_experts, lambda kinds: write(kinds) if "experts" in kinds else {"num_experts": 1}


MIXERS = {"mamba": part(Mamba, inner_norm=part(Norm)), "attention": part(Attention)}
FEEDS = {"mlp": part(MLP), "experts": part(MoE, expert=part(MLP), renormalize=False, round_weights=True)}
JAMBA = LLAMA_SHAPE.but(
    "jamba", "JambaForCausalLM", names=(JAMBA_NAMES, IN_MEMORY), ignorable=frozenset(),
    missing={"num_key_value_heads": 8, "max_position_embeddings": 262144},
    keys={
        "attn_layer_period": Kinds("mixer", MIXERS, *places("attn", "mamba", "attention", 8, 4)),
        "expert_layer_period": Kinds("ffn", FEEDS, *expert_places()),
        "num_attention_heads": Heads(alone=False),
        "hidden_act": only("silu", written=True),  # Mamba's too
        "rms_norm_eps": number(*EPS, "mixer.inner_norm.eps", missing=1e-6),
        "num_experts": count("ffn.experts", missing=16), "num_experts_per_tok": size("ffn.top_k", missing=2),
        "mamba_expand": Expand(missing=2), "mamba_dt_rank": Rank(),
        "mamba_d_state": size("mixer.state", missing=16), "mamba_d_conv": size("mixer.conv", missing=4),
        "mamba_conv_bias": flag("mixer.conv_bias", missing=True), "mamba_proj_bias": flag("mixer.bias", missing=False),
        "mamba_inner_layernorms": only(True), "sliding_window": only(None),
    },
    without=("head_dim", "rope_parameters"),
    irrelevant=frozenset({"calc_logits_for_entire_prompt", "num_logits_to_keep", "n_ctx",
                          "use_associative_scan", "use_mamba_kernels", "use_mambapy"}),
)
FAMILIES = {"jamba": JAMBA}
