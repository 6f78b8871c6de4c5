"""OLMo-1, OLMo-2 and OLMoE: Llama's block with other norms.

                 before the mixer and the ffn    after them      on q and k                    final
    OLMo-1       LayerNorm with no parameters    –               –                             the same
    OLMo-2       –                               RMS             RMS over all heads at once    RMS
    OLMoE        RMS                             –               RMS over all heads at once    RMS

OLMo-2's norms round to the working dtype after the gain, OLMoE's before it; OLMo-1 and -2 rotate in float32. `clip_qkv` cuts q, k
and v off at ± its value (8.0 in OLMo-1.7-7B and OLMo-1B-0724, null in OLMo-1B and -7B), in OLMoE after the norm. OLMo-1 has no
tensor for its norms and no key for their ε, which is 1e-5. OLMoE: 64 experts, 8 a token, their weights not renormalised. The OLMo-1
uploads whose names do not end in -hf (fused `att_proj`, `ff_proj`, model_type "hf_olmo") are another layout.
"""

from checkpoints.families.llama import ATTENTION_BIAS, EPS, HEADS_SHARE_DIM, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.names.config_table import count, flag, number, part, size
from checkpoints.names.ops import Stack
from checkpoints.names.table import override, rule
from nanollm.config import MLP, MoE, Norm

QK_NORM_RULES = (
    rule("model.layers.{i}.self_attn.q_norm", "layers.{i}.mixer.q_norm"),
    rule("model.layers.{i}.self_attn.k_norm", "layers.{i}.mixer.k_norm"),
)
OLMO2_NAMES = override(
    {ours: each for ours, each in LLAMA_NAMES.items() if not ours.endswith((".pre_mixer", ".pre_ffn"))},
    rule("model.layers.{i}.post_attention_layernorm", "layers.{i}.post_mixer"),
    rule("model.layers.{i}.post_feedforward_layernorm", "layers.{i}.post_ffn"),
    *QK_NORM_RULES,
)
OLMOE_NAMES = override(
    LLAMA_NAMES,
    rule("model.layers.{i}.mlp.gate", "layers.{i}.ffn.router"),
    rule("model.layers.{i}.mlp.experts.{e}.gate_proj.weight", "layers.{i}.ffn.experts.gate", Stack),
    rule("model.layers.{i}.mlp.experts.{e}.up_proj.weight", "layers.{i}.ffn.experts.up", Stack),
    rule("model.layers.{i}.mlp.experts.{e}.down_proj.weight", "layers.{i}.ffn.experts.down", Stack),
    *QK_NORM_RULES,
)

OLMO = LLAMA_SHAPE.but(
    "olmo", "OlmoForCausalLM",
    norm=part(Norm, kind="layer", eps=1e-5, gain=False), layer={"mixer.rope.rounds": "result"},
    keys={"attention_bias": ATTENTION_BIAS, "clip_qkv": number("mixer.clip", missing=None)},
    without=("rms_norm_eps",),
    irrelevant=frozenset({"rms_norm_eps"}),  # some fine-tuned OLMo-1 carry Llama's key, which their norms do not read
)
ROUNDED_ONCE = part(Norm, cast_after_gain=True)
OLMO2 = LLAMA_SHAPE.but(
    "olmo2", "Olmo2ForCausalLM", names=(OLMO2_NAMES,),
    norm=ROUNDED_ONCE,
    layer={
        "mixer.rope.rounds": "result", "mixer.qk_norm": part(Norm, cast_after_gain=True, scope="all"),
        "pre_mixer": None, "post_mixer": ROUNDED_ONCE, "pre_ffn": None, "post_ffn": ROUNDED_ONCE,
    },
    keys={"attention_bias": ATTENTION_BIAS, "rms_norm_eps": number(*EPS, missing=1e-5)},
)
OLMOE = LLAMA_SHAPE.but(
    "olmoe", "OlmoeForCausalLM", names=(OLMOE_NAMES,),
    layer={"mixer.qk_norm": part(Norm, scope="all"), "ffn": part(MoE, expert=part(MLP), round_weights=True)},
    keys=HEADS_SHARE_DIM | {  # the norm of q is as wide as dim
        "rms_norm_eps": number(*EPS, missing=1e-5),
        "attention_bias": ATTENTION_BIAS,
        "clip_qkv": number("mixer.clip", missing=None),
        "max_position_embeddings": size("context", missing=4096),
        "num_experts": count("ffn.experts", missing=64),
        "num_experts_per_tok": size("ffn.top_k", missing=8),
        "norm_topk_prob": flag("ffn.renormalize", missing=False),
    },
)
FAMILIES = {"olmo": OLMO, "olmo2": OLMO2, "olmoe": OLMOE}
