"""Cohere's Command-R, Aya (cohere) and Command-R7B, Command-A (cohere2): attention and feed-forward beside each other.

    x += o(attention(h)) + down(silu(gate(h)) · up(h)),  h = norm(x)     one LayerNorm, with a gain; no bias anywhere
    logits = s · E h                                                     tied; s = logit_scale

    Command-R, Aya       RoPE in the interleaved layout, base 8e6 or 4e6; s = 1/16
    Command-R+           every head of q and k has a LayerNorm, with a gain of its own; base 7.5e7; s = 0.8333
    Command-R7B, -A      three layers slide (4096) and rotate, the fourth sees all, not rotated; base 5e4; s = 1/4

The rotation is computed in float32, from tables that were rounded, and rounded once more.
"""

from checkpoints.families.llama import ATTENTION_BIAS, EPS, HEADS_SHARE_DIM, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.families.qwen import QWEN3_NAMES
from checkpoints.names.config_rows import Periodic, RopeKeys
from checkpoints.names.config_table import Repeats, Switch, field, number, only, part
from nanollm.config import Norm

COHERE = LLAMA_SHAPE.but(
    "cohere", "CohereForCausalLM", names=(QWEN3_NAMES,), norm=part(Norm, kind="layer"),
    layer={"pre_ffn": None, "parallel": True, "mixer.rope.layout": "interleaved", "mixer.rope.rounds": "tables"},
    missing={"tie_word_embeddings": True, "max_position_embeddings": 8192},
    keys=HEADS_SHARE_DIM | {
        "use_qk_norm": Switch("mixer.qk_norm", part(Norm, kind="layer", scope="each")),
        "layer_norm_eps": number(*EPS, missing=1e-5), "attention_bias": ATTENTION_BIAS,
        "rope_parameters": RopeKeys(theta=500_000.0),
        "logit_scale": number("head_scale", missing=0.0625),
    },
    without=("rms_norm_eps",), irrelevant=frozenset({"model_max_length"}),
)
COHERE2 = COHERE.but(
    "cohere2", "Cohere2ForCausalLM", names=(LLAMA_NAMES,),
    keys={
        "rope_parameters": RopeKeys(theta=10_000.0),
        "layer_types": Periodic(4, "sliding_window_pattern", full={"mixer.rope": None}),
        "layer_switch": Repeats("sliding_window_pattern", missing=4),
        # what the class always does, and the hub's configs also say
        "use_qk_norm": only(False), "use_embedding_sharing": only(field("tied")), "rotary_pct": only(1.0),
        "use_parallel_block": only(True), "use_gated_activation": only(True),
        "order_of_interleaved_layers": only("local_attn_first"), "position_embedding_type": only("rope_gptj"),
    },
    irrelevant=COHERE.irrelevant | {"_sliding_window_pattern", "cache_implementation", "use_parallel_embedding"},
)
FAMILIES = {"cohere": COHERE, "cohere2": COHERE2}
