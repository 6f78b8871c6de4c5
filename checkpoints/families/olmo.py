"""OLMo-1, OLMo-2, OLMo-3 and OLMoE: Llama's block with other norms.

                 before the mixer and the ffn    after them      on q and k                    final
    OLMo-1       LayerNorm with no parameters    –               –                             the same
    OLMo-2, -3   –                               RMS             RMS over all heads at once    RMS
    OLMoE        RMS                             –               RMS over all heads at once    RMS

OLMo-3 is OLMo-2 with a window (4096) on three layers of four, base 5e5, and YaRN, if any, on the full layers alone.
Without RoPE by kind of layer, `rope_theta` is the base of both kinds, as in the published code; transformers 5.23 gives
the sliding ones 5e5 then, which is what every published config says.

OLMo-2's norms round to the working dtype after the gain, OLMoE's before it; OLMo-1, -2 and -3 rotate in float32.
`clip_qkv` cuts q, k and v off at ± its value (8.0 in OLMo-1.7-7B and OLMo-1B-0724, null in OLMo-1B and -7B), in OLMoE
after the norm. OLMo-1 has no tensor for its norms and no key for their ε, which is 1e-5. OLMoE: 64 experts, 8 a token,
their weights not renormalised. The OLMo-1 uploads whose names do not end in -hf (fused `att_proj`, `ff_proj`,
model_type "hf_olmo") are another layout.
"""

from checkpoints.families.gemma import TwoRopes
from checkpoints.families.llama import ATTENTION_BIAS, HEADS_SHARE_DIM, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.families.qwen import QK_NORM, QWEN3_NAMES
from checkpoints.families.qwen_moe import EACH_EXPERT
from checkpoints.names.config_rows import FULL, SLIDING, Periodic
from checkpoints.names.config_table import count, flag, number, part, size
from checkpoints.names.table import override, under
from nanollm.config import MLP, MoE, Norm

OLMO2_NAMES = override(
    {ours: each for ours, each in LLAMA_NAMES.items() if not ours.endswith((".pre_mixer", ".pre_ffn"))},
    *under("model.layers.{i}", "layers.{i}", {
        "post_attention_layernorm": "post_mixer", "post_feedforward_layernorm": "post_ffn",
    }),
    *QK_NORM,
)

OLMO = LLAMA_SHAPE.but(
    "olmo", "OlmoForCausalLM",
    norm=part(Norm, kind="layer", eps=1e-5, gain=False), layer={"mixer.rope.rounds": "result"},
    keys={"attention_bias": ATTENTION_BIAS, "clip_qkv": number("mixer.clip", missing=None)}, without=("rms_norm_eps",),
    irrelevant=frozenset({"rms_norm_eps"}),  # some fine-tuned OLMo-1 carry Llama's key, which their norms do not read
)
ROUNDED_ONCE = part(Norm, cast_after_gain=True)
OLMO2 = LLAMA_SHAPE.but(
    "olmo2", "Olmo2ForCausalLM", names=(OLMO2_NAMES,), norm=ROUNDED_ONCE,
    layer={
        "mixer.rope.rounds": "result", "mixer.qk_norm": part(Norm, cast_after_gain=True, scope="all"),
        "pre_mixer": None, "post_mixer": ROUNDED_ONCE, "pre_ffn": None, "post_ffn": ROUNDED_ONCE,
    },
    missing={"rms_norm_eps": 1e-5}, keys={"attention_bias": ATTENTION_BIAS},
)


class OneBase(TwoRopes):
    """One base for the layers that slide and for the full ones, which alone are stretched."""
    BASES = dict.fromkeys((SLIDING, FULL), ("rope_theta", 5e5))


OLMO3 = OLMO2.but(
    "olmo3", "Olmo3ForCausalLM", keys={"layer_types": Periodic(4, or_null=True), "rope_parameters": OneBase()})
OLMOE = LLAMA_SHAPE.but(
    "olmoe", "OlmoeForCausalLM", names=(override(QWEN3_NAMES, *EACH_EXPERT),),
    layer={"mixer.qk_norm": part(Norm, scope="all"), "ffn": part(MoE, expert=part(MLP), round_weights=True)},
    missing={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    keys=HEADS_SHARE_DIM | {  # the norm of q is as wide as dim
        "attention_bias": ATTENTION_BIAS, "clip_qkv": number("mixer.clip", missing=None),
        "num_experts": count("ffn.experts", missing=64), "num_experts_per_tok": size("ffn.top_k", missing=8),
        "norm_topk_prob": flag("ffn.renormalize", missing=False),
    },
)
FAMILIES = {"olmo": OLMO, "olmo2": OLMO2, "olmo3": OLMO3, "olmoe": OLMOE}
