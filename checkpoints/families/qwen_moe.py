"""Qwen1.5-MoE, Qwen2-57B-A14B and Qwen3-MoE: Qwen2's and Qwen3's block with experts in place of the MLP.

    qwen2_moe    bias on q, k and v (`qkv_bias`); softmax over all experts, the chosen weights as they are; a shared
                 expert, of a width of its own, times σ(w·x). A2.7B: 60 experts, 4 a token
    qwen3_moe    RMS norm on every query and key head, no shared expert, the chosen weights renormalised
                 (`norm_topk_prob`, false where it is missing). 30B-A3B and 235B-A22B: 128 experts, 8 a token

Layer i has experts unless `mlp_only_layers` names it or i + 1 is no multiple of `decoder_sparse_step`; then it has an
MLP of `intermediate_size`. The chosen weights are rounded to the working dtype.

`use_sliding_window` is false wherever it was published. If it were true, all layers of a qwen3_moe would slide, and in
a qwen2_moe without `layer_types` every other one of the first `max_window_layers`: not the last ones, as in qwen2.
transformers 5 writes Qwen3's `num_experts` as `num_local_experts`.
"""

from typing import Any

from checkpoints.families.llama import EXPERT, GATED, LLAMA_NAMES
from checkpoints.families.qwen import QWEN2, QWEN3, QWEN3_NAMES
from checkpoints.names.config_rows import Kinds, OneWindow, Windows, whole
from checkpoints.names.config_table import Part, activation, count, flag, only, part, size
from checkpoints.names.expert_ops import GateUp
from checkpoints.names.ops import Stack
from checkpoints.names.reader import Reader
from checkpoints.names.table import EXPERTS_GATE_UP, Rule, Table, override, rule, under
from nanollm.config import MLP, MoE

ROUTER = rule("model.layers.{i}.mlp.gate", "layers.{i}.ffn.router")
EACH_EXPERT = [ROUTER, *under("model.layers.{i}.mlp.experts.{e}", "layers.{i}.ffn.experts", EXPERT, Stack)]
FUSED_EXPERTS = [
    ROUTER, rule("model.layers.{i}.mlp.experts.down_proj", "layers.{i}.ffn.experts.down"),
    rule("model.layers.{i}.mlp.experts.gate_up_proj", EXPERTS_GATE_UP, GateUp),
]
SHARED = [
    *under("model.layers.{i}.mlp.shared_expert", "layers.{i}.ffn.shared", GATED),
    rule("model.layers.{i}.mlp.shared_expert_gate", "layers.{i}.ffn.shared_gate"),
]


def with_experts(base: Table, *rules: Rule) -> tuple[Table, Table]:
    """`base` and these rules, with a tensor an expert, as on the hub; and with all experts of a layer in one."""
    return override(base, *EACH_EXPERT, *rules), override(base, *FUSED_EXPERTS, *rules)


def sparse_steps(experts: Part) -> Kinds:
    """An MLP in the layers that `mlp_only_layers` names, and in those that `decoder_sparse_step` passes over."""

    def kinds(r: Reader, layers: int) -> list[str]:
        step, dense = r.size("decoder_sparse_step", 1), r.get("mlp_only_layers", None) or []
        if not isinstance(dense, list) or not all(type(i) is int and 0 <= i < layers for i in dense):
            raise r.error("mlp_only_layers", f"a list of layers from 0 to {layers - 1}")
        return ["experts" if i not in dense and (i + 1) % step == 0 else "mlp" for i in range(layers)]

    def keys(kinds: list[str]) -> dict[str, Any]:
        return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i, kind in enumerate(kinds) if kind == "mlp"]}

    return Kinds("ffn", {"mlp": part(MLP), "experts": experts}, kinds, keys)


class SomeFirstLayersSlide(Windows):
    """Every other layer of the first `max_window_layers`. transformers writes a sliding_window of 0 for none."""

    def pattern(self, r: Reader, layers: int) -> list[bool]:
        first = whole(r, "max_window_layers", 28)
        return [i % 2 == 0 and i < first for i in range(layers)]

    def pattern_keys(self, slides: list[bool]) -> dict[str, Any]:
        return {"max_window_layers": len(slides) if any(slides) else 0}


ROUTED = {  # what the two have in common
    "hidden_act": activation("ffn.activation", "ffn.expert.activation", "ffn.shared.activation", missing="silu"),
    "intermediate_size": size("ffn.hidden"), "moe_intermediate_size": size("ffn.expert.hidden"),
    "num_experts_per_tok": size("ffn.top_k"), "norm_topk_prob": flag("ffn.renormalize", missing=False),
}
QWEN2_MOE = QWEN2.but(
    "qwen2_moe", "Qwen2MoeForCausalLM", names=with_experts(LLAMA_NAMES, *SHARED), without=("use_mrope",),
    missing={"num_key_value_heads": 16, "intermediate_size": 5632, "moe_intermediate_size": 1408,
             "num_experts_per_tok": 4},
    keys=ROUTED | {
        "mlp_only_layers": sparse_steps(
            part(MoE, expert=part(MLP), shared=part(MLP), shared_gate=True, round_weights=True)),
        "shared_expert_intermediate_size": size("ffn.shared.hidden", missing=5632),
        "num_experts": count("ffn.experts", missing=60), "qkv_bias": flag("mixer.qkv_bias", missing=True),
        "layer_types": SomeFirstLayersSlide(switch=True),
    },
)
QWEN3_MOE = QWEN3.but(
    "qwen3_moe", "Qwen3MoeForCausalLM", names=with_experts(QWEN3_NAMES),
    missing={"num_key_value_heads": 4, "head_dim": None, "intermediate_size": 6144, "moe_intermediate_size": 768,
             "num_experts_per_tok": 8},
    keys=ROUTED | {
        "mlp_only_layers": sparse_steps(part(MoE, expert=part(MLP), round_weights=True)),
        "num_experts": count("ffn.experts", missing=128, also=("num_local_experts",)),
        "layer_types": OneWindow(),
        # Qwen3-Coder and Megatron's exports say what no key decides here
        "qkv_bias": only(False), "use_qk_norm": only(True), "shared_expert_intermediate_size": only(0, None),
    },
    irrelevant=frozenset({"max_window_layers"}),  # it stands in published configs, and nobody reads it
)
FAMILIES = {"qwen2_moe": QWEN2_MOE, "qwen3_moe": QWEN3_MOE}
