"""gpt-oss: 20b and 120b.

Llama's block with biases on q, k, v and o, and three things of its own:

    sinks      a learned score a head, in every softmax, with no value: a head can attend to nothing
               (nanollm/layers/attention.py)
    windows    every other layer sees 128 tokens, the first layer included; the others see all. YaRN, whose ramp has
               ends that are not rounded
    experts    32 or 128, 4 a token, with biases and a clipped gate (ClippedExperts in nanollm/layers/moe.py); the
               router has a bias too, and its softmax is over the chosen ones, which is that over all, renormalised

Norms round to the working dtype after the gain, and the chosen weights are rounded to it. `hidden_act` is not read by
the published code: the gate is always x·σ(1.702 x). On disk the experts of a layer are one tensor, transposed, columns
gate up gate up …, 4-bit (MXFP4) in the published folders: storage/quantized/fp4.py makes bfloat16 of it.
"""

import dataclasses

from checkpoints.families.llama import LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.names.config_rows import Periodic, RopeKeys
from checkpoints.names.config_table import Draft, count, field, flag, number, only, part, size
from checkpoints.names.expert_ops import Interleaved, Turned
from checkpoints.names.reader import Reader
from checkpoints.names.table import EXPERTS_GATE_UP, override, rule, under
from nanollm.config import ClippedGLU, MoE, Norm, Rope, Yarn

GPT_OSS_NAMES = override(
    LLAMA_NAMES,
    *under("model.layers.{i}", "layers.{i}", {"self_attn.sinks": "mixer.sinks", "mlp.router": "ffn.router"}),
    rule("model.layers.{i}.mlp.experts.gate_up_proj", EXPERTS_GATE_UP, Interleaved),
    rule("model.layers.{i}.mlp.experts.gate_up_proj_bias", [f"{name}_bias" for name in EXPERTS_GATE_UP], Interleaved),
    rule("model.layers.{i}.mlp.experts.down_proj", "layers.{i}.ffn.experts.down", Turned),
    rule("model.layers.{i}.mlp.experts.down_proj_bias", "layers.{i}.ffn.experts.down_bias"),
)


class OpenYarn(RopeKeys):
    """A config that says nothing of scaling means YaRN all the same."""

    def rope(self, r: Reader, draft: Draft) -> Rope:
        rope = super().rope(r, draft)
        said = r.get("rope_scaling", None) or r.get("rope_parameters", None)
        return rope if said else dataclasses.replace(rope, scaling=Yarn(32.0, 4096, truncate=False))


GPT_OSS = LLAMA_SHAPE.but(
    "gpt_oss", "GptOssForCausalLM", names=(GPT_OSS_NAMES,), norm=part(Norm, cast_after_gain=True),
    layer={"mixer.sinks": True,
           "ffn": part(MoE, expert=part(ClippedGLU), renormalize=True, router_bias=True, round_weights=True)},
    missing={"num_attention_heads": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5},
    keys={
        "num_key_value_heads": size("mixer.kv_heads", missing=8), "head_dim": size("mixer.head_dim", missing=64),
        "attention_bias": flag("mixer.qkv_bias", "mixer.out_bias", missing=True),
        "rope_parameters": OpenYarn(theta=150_000.0),
        "layer_types": Periodic(2, default=128),
        "hidden_act": only("silu", written=True),
        "num_local_experts": count("ffn.experts", missing=128), "num_experts_per_tok": size("ffn.top_k", missing=4),
        "experts_per_token": only(field("ffn.top_k")),  # the same again, in the published configs
        "intermediate_size": size("ffn.expert.hidden", missing=2880),
        "swiglu_alpha": number("ffn.expert.slope", missing=1.702),
        "swiglu_limit": number("ffn.expert.limit", missing=7.0),
    },
    irrelevant=frozenset({"initial_context_length"}),
)
FAMILIES = {"gpt_oss": GPT_OSS}
