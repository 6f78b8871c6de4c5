"""Phi-3.5-MoE: 16 experts, 2 a token, and a router that weighs each of the two by itself.

    norms      LayerNorm with bias; `rms_norm_eps` is their ε all the same
    biases     on q, k, v and o (`attention_bias`), and on the head (`lm_head_bias`)
    router     SparseMixer, `sparse_route` in nanollm/layers/moe.py, with ε = `router_jitter_noise`: at inference there
               is no noise, but ε decides which experts come near the best. The two rounded weights need not add up to 1
    RoPE       LongRoPE with its temperature given twice, for short sequences and for long; published, they are equal

Expert names are Mixtral's. transformers 5.23 takes the short list of divisors whatever the length; the published code,
and this, the long one for sequences beyond the original context. In training the published code draws experts.
"""

from typing import Any

from checkpoints.families.llama import LAYER_NORM
from checkpoints.families.mixtral import MIXTRAL
from checkpoints.names.config_rows import Heads, RopeKeys
from checkpoints.names.config_table import Draft, count, field, flag, number, only, part, size
from checkpoints.names.reader import Reader
from checkpoints.names.rope import ORIGINAL, read_rope
from nanollm.config import MLP, MoE, Rope

MSCALES = ("short_mscale", "long_mscale")


class OneTemperature(RopeKeys):
    """None, or LongRoPE with its two temperatures, which must be one. What is left is said as in other families."""

    def rope(self, r: Reader, draft: Draft) -> Rope:
        """RoPE with the temperature as attention_factor. Raises ConfigError for two different ones."""
        values = dict(r.values)
        for key in ("rope_scaling", "rope_parameters"):
            inner = r.inside(key)
            if inner is None or inner.get("rope_type", inner.get("type", "default")) == "default":
                continue
            inner.must("rope_type" if "rope_type" in inner.values else "type", "longrope")
            short, long = map(inner.number, MSCALES)
            if short != long:
                raise inner.error("long_mscale", f"short_mscale ({short}): two temperatures are not implemented")
            rest = {name: value for name, value in inner.values.items() if name not in MSCALES}
            values[key] = rest | {"attention_factor": short}
        plain = r.of(values)
        rope = read_rope(plain, self.theta, draft["context"], original=plain.size(ORIGINAL, None))
        r.seen |= plain.seen
        return rope

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """RoPE's keys, with attention_factor as both temperatures."""
        values = super().write(draft, key)
        for each in (values.get("rope_scaling"), values.get("rope_parameters")):
            if each and "attention_factor" in each:
                each |= dict.fromkeys(MSCALES, each.pop("attention_factor"))
                values[ORIGINAL] = each[ORIGINAL]
        return values


PHIMOE = MIXTRAL.but(
    "phimoe", "PhimoeForCausalLM",
    norm=LAYER_NORM, layer={"ffn": part(MoE, expert=part(MLP), renormalize=False, top_k=2, round_weights=True)},
    keys={
        "num_attention_heads": Heads(alone=False, missing=32),
        "head_dim": size("mixer.head_dim", missing=field("mixer.head_dim"), null=field("mixer.head_dim")),
        "num_local_experts": count("ffn.experts", missing=16), "num_experts_per_tok": only(2, written=True),
        "router_jitter_noise": number("ffn.sparse", missing=0.01),
        "attention_bias": flag("mixer.qkv_bias", "mixer.out_bias", missing=False),
        "lm_head_bias": flag("head_bias", missing=False),
        "rope_parameters": OneTemperature(theta=1e6),
    },
    irrelevant=frozenset({"input_jitter_noise", "expert_dropout"}),
)
FAMILIES = {"phimoe": PHIMOE}
