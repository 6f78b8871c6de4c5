"""ERNIE-4.5-21B-A3B and 300B-A47B: Llama's block with a rotation in float32, and experts in most layers.

    rope      in neighbouring pairs (0,1) (2,3) …, in float32; base 5e5
    router    in float32: softmax over all experts; a correction counts for the choice; the chosen weights divided by
              their sum and rounded to the working dtype. 64 experts, 6 a token (300B: 8), and 2 for every token (none)
    layers    those from `moe_layer_start_index` to `moe_layer_end_index` have experts (−1 and null: to the last), every
              `moe_layer_interval`-th of them; the others have an MLP

`use_bias` is false in all that were published. The layers that predict ahead (model.mtp_block.…) are left out. A sum
below `moe_norm_min`, 1e-12, counts as that, which k softmax scores do not come near. ERNIE 4.5 Technical Report, 2025,
https://ernie.baidu.com/blog/publication/ERNIE_Technical_Report.pdf
"""

from typing import Any

from checkpoints.families.deepseek import SHARED, SharedExperts
from checkpoints.families.llama import LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.families.qwen_moe import with_experts
from checkpoints.names.config_rows import Kinds, RopeKeys, whole
from checkpoints.names.config_table import Draft, count, only, part, size
from checkpoints.names.expert_ops import Leading
from checkpoints.names.reader import Reader
from checkpoints.names.table import rule
from nanollm.config import MLP, MoE

CORRECTION = rule(
    "model.layers.{i}.mlp.moe_statics.e_score_correction_bias", "layers.{i}.ffn.router.correction", Leading)
AHEAD = " ".join(f"model.mtp_{name}.weight" for name in (
    "block.0.input_layernorm", "emb_norm.0", "hidden_norm.0", "linear_proj.0"))


def kinds(r: Reader, layers: int) -> list[str]:
    """The kind of each layer: experts in some of those from a first to a last, an MLP in the others."""
    first, every = whole(r, "moe_layer_start_index", 1), r.size("moe_layer_interval", 1)
    last = layers - 1 if r.get("moe_layer_end_index", -1) in (-1, None) else whole(r, "moe_layer_end_index", 0)
    return ["experts" if first <= i <= last and (i + 1) % every == 0 else "mlp" for i in range(layers)]


def keys(kinds: list[str]) -> dict[str, Any]:
    """The first and the last layer with experts, and the distance between two."""
    routed = [i for i, kind in enumerate(kinds) if kind == "experts"]
    if not routed:
        return {"moe_layer_start_index": len(kinds), "moe_layer_end_index": -1, "moe_layer_interval": 1}
    every = routed[1] - routed[0] if len(routed) > 1 else 1
    return {"moe_layer_start_index": routed[0], "moe_layer_end_index": routed[-1], "moe_layer_interval": every}


class SomeShared(SharedExperts):
    """As DeepSeek's, where 0 is none."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """One MLP, as wide as that many experts."""
        super().read(r.of(r.values | ({key: None} if r.get(key, None) == 0 else {})), draft, key)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """The width of the shared MLP in experts."""
        return {key: super().write(draft, key)[key] or 0}


ERNIE_MOE = LLAMA_SHAPE.but(
    "ernie4_5_moe", "Ernie4_5_MoeForCausalLM", names=with_experts(LLAMA_NAMES, CORRECTION, *SHARED),
    layer={"mixer.rope.layout": "interleaved", "mixer.rope.rounds": "result"},
    missing={"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
             "tie_word_embeddings": True},
    keys={
        "moe_layer_start_index": Kinds("ffn", {"mlp": part(MLP), "experts": part(
            MoE, expert=part(MLP), renormalize=True, correction=True, router_float32=True, round_weights=True)}, kinds,
            keys),
        "intermediate_size": size("ffn.hidden"), "moe_intermediate_size": size("ffn.expert.hidden", missing=1536),
        "moe_num_experts": count("ffn.experts", missing=64), "moe_k": size("ffn.top_k", missing=6),
        "moe_num_shared_experts": SomeShared(missing=2),
        "rope_parameters": RopeKeys(theta=500_000.0),
        "use_bias": only(False), "moe_norm_min": only(1e-12), "moe_use_aux_free": only(True),
        "moe_gate": only("topk"), "moe_gate_act": only("softmax"),
    },
    irrelevant=frozenset({"moe_capacity", "moe_aux_loss_lambda", "num_nextn_predict_layers", "multi_token_pred_lambda",
                          "moe_multimodal_dispatch_use_allgather"}),
    ahead=AHEAD,
)
FAMILIES = {"ernie4_5_moe": ERNIE_MOE}
