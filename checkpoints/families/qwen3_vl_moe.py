"""Qwen3-VL-30B-A3B and 235B-A22B: a vision tower, which is left out, and a Qwen3-MoE, which is loaded and saved.

For text its RoPE ("mrope") is the plain one, as in qwen_vl.py; how the channels are shared among time, row and column
(`mrope_section`, `mrope_interleaved`) matters for pictures only, and so do the features of the tower's middle layers
("DeepStack"). The chosen weights are always renormalised. Seven missing keys mean something else than in Qwen3-MoE. Bai
et al. 2025 (arXiv 2511.21631).

On the hub the experts of a layer are one tensor, transposed, the gate's columns left of up's: (E, D, 2F) and (E, F, D).
transformers 5 writes the same names for (E, 2F, D) and (E, D, F); the shapes say which it is.
"""

from typing import Any

from checkpoints.families.multimodal import TextInside
from checkpoints.families.qwen import QWEN3_NAMES
from checkpoints.families.qwen_moe import FUSED_EXPERTS, QWEN3_MOE, ROUTER, sparse_steps
from checkpoints.names.config_rows import RopeKeys
from checkpoints.names.config_table import Draft, only, part
from checkpoints.names.expert_ops import Turned, TurnedGateUp
from checkpoints.names.reader import Reader
from checkpoints.names.table import EXPERTS_GATE_UP, moved, override, rule
from nanollm.config import MLP, MoE, Rope

MROPE = {"mrope_section", "mrope_interleaved"}
TURNED_EXPERTS = [
    ROUTER, rule("model.layers.{i}.mlp.experts.gate_up_proj", EXPERTS_GATE_UP, TurnedGateUp),
    rule("model.layers.{i}.mlp.experts.down_proj", "layers.{i}.ffn.experts.down", Turned),
]


class TextRope(RopeKeys):
    """RoPE without how it divides the channels for pictures."""

    def rope(self, r: Reader, draft: Draft) -> Rope:
        """What is said beside that."""
        def plain(value: Any) -> Any:
            return {key: one for key, one in value.items() if key not in MROPE} if isinstance(value, dict) else value

        ropes = {key: plain(r.get(key, None)) for key in ("rope_scaling", "rope_parameters")}
        inner = r.of(r.values | ropes)
        rope = super().rope(inner, draft)
        r.seen |= inner.seen
        return rope


QWEN3_VL_MOE = TextInside.of(
    QWEN3_MOE, "qwen3_vl_moe_text",
    keys=QWEN3_MOE.but(
        "", missing={
            "num_key_value_heads": 16, "max_position_embeddings": 128000, "intermediate_size": 5632,
            "moe_intermediate_size": 1408, "num_experts_per_tok": 4, "num_experts": 60,
        },
        keys={
            "rope_parameters": TextRope(theta=500_000.0), "norm_topk_prob": only(True),
            "mlp_only_layers": sparse_steps(part(MoE, expert=part(MLP), renormalize=True, round_weights=True)),
        },
        without=("layer_types",),
    ).keys,
    layer=QWEN3_MOE.layer,
    names=tuple(moved(override(QWEN3_NAMES, *experts), "model.", "model.language_model.")
                for experts in (TURNED_EXPERTS, FUSED_EXPERTS)),
    irrelevant=frozenset({"sliding_window", "vision_config"}),
    left_out=("model.visual.",),
)
FAMILIES = {"qwen3_vl_moe": QWEN3_VL_MOE}
