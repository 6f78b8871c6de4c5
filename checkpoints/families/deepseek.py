"""DeepSeekMoE-16B, DeepSeek-V2 and V2-Lite, DeepSeek-V3 and R1, Kimi-K2.

    model_type     attention        scores     experts chosen                        weights                    block
    deepseek       Llama's          softmax    the k best                            as they are                Llama's
    deepseek_v2    latent           softmax    the k best; of the best groups        × routed_scaling_factor
                                               ("group_limited_greedy")
    deepseek_v3    latent           sigmoid    the k best of the best groups, with   renormalised,
                                               a learned correction ("noaux_tc")     × routed_scaling_factor

The first `first_k_dense_replace` layers have an MLP of `intermediate_size`, the others many small experts and
`n_shared_experts` that every token visits, stored as one MLP of that many times the width. Latent attention is
nanollm/layers/latent_attention.py; its two inner norms have ε 1e-6 whatever `rms_norm_eps` is. The rotated part is
interleaved (V3: unless `rope_interleave` is false), in V2 in float32. YaRN has two temperatures: cos and sin times
t(mscale) / t(mscale_all_dim), as in rope.py, and the scores times t(mscale_all_dim)².

Where the published code and transformers differ:

- V2 with `norm_topk_prob` true, which no checkpoint has: published, renormalised weights are not scaled; transformers
  5.23 ignores the key. This follows the published code.
- V3's experts outside the kept groups count as −∞ in transformers and in later copies of the published file, as here,
  and as 0 in its first, which differs only where a kept expert's corrected score is below 0.

V3 has one more layer on disk, number 61, which predicts the token after the next; it is left out, which load says. Its
weights are 8-bit with a scale for each block of 128 × 128: storage/quantized/fp8.py. Moonlight is V3 in other
numbers, and so is Kimi-K2, whose model_type is kimi_k2: the published code is V3's, and so are its defaults.
"""

import math
from collections.abc import Callable
from typing import Any

from checkpoints.families.llama import ATTENTION_BIAS, GATED, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.families.qwen_moe import with_experts
from checkpoints.names.config_rows import Kinds, RopeKeys, roundest, whole
from checkpoints.names.config_table import Draft, Follows, Row, choice, count, field, flag, number, only, part, size
from checkpoints.names.reader import Reader
from checkpoints.names.rope import temperature
from checkpoints.names.table import override, rule, under
from nanollm.config import MLP, ExpertGroups, LatentAttention, MoE, Rope, Yarn
from nanollm.errors import ConfigError

SHARED = under("model.layers.{i}.mlp.shared_experts", "layers.{i}.ffn.shared", GATED)
LATENT_NAMES = override(
    {ours: each for ours, each in LLAMA_NAMES.items() if not ours.endswith((".k", ".v"))},  # q is V2-Lite's
    *under("model.layers.{i}.self_attn", "layers.{i}.mixer", {
        "q_a_proj": "q_down", "q_a_layernorm": "q_norm", "q_b_proj": "q_up",
        "kv_a_proj_with_mqa": "kv_down", "kv_a_layernorm": "kv_norm", "kv_b_proj": "kv_up",
    }),
)
CORRECTION = rule("model.layers.{i}.mlp.gate.e_score_correction_bias", "layers.{i}.ffn.router.correction")
AHEAD = "model.layers.{i}.eh_proj.weight"  # of the layer behind the last, which predicts the token after the next
V3_EXPERTS = dict(score="sigmoid", correction=True, router_float32=True)


class FirstDense(Kinds):
    """How many of the first layers have an MLP; the others have experts, of which `experts` is what no key says."""

    def __init__(self, missing: int, **experts: Any) -> None:
        self.missing = missing
        parts = {"mlp": part(MLP), "experts": part(MoE, expert=part(MLP), **experts)}
        super().__init__("ffn", parts, self.kinds, self.keys)

    def kinds(self, r: Reader, layers: int) -> list[str]:
        """The kind of each layer: an MLP in the first ones, experts in the others."""
        first = whole(r, "first_k_dense_replace", self.missing)
        return ["mlp" if i < first else "experts" for i in range(layers)]

    def keys(self, kinds: list[str]) -> dict[str, Any]:
        """The number of layers before the first with experts."""
        return {"first_k_dense_replace": [*kinds, "experts"].index("experts")}


class EveryFew(Row):
    """Among those, experts only in the layers whose number is a multiple of it."""
    shapes = True

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """Put an MLP in place of the experts in layers whose number is no multiple."""
        every = r.size(key, 1)
        for i, layer in enumerate(draft.layers):
            if i % every:
                layer.set("ffn", part(MLP))

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """The distance between the first two layers with experts."""
        routed = [i for i, layer in enumerate(draft.layers) if layer.get("ffn").kind is MoE]
        return {key: routed[1] - routed[0] if len(routed) > 1 else 1}


class SharedExperts(Row):
    """How many experts every token visits: one MLP of that many times the width."""

    def __init__(self, missing: int) -> None:
        self.missing = missing

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """One MLP, as wide as that many experts; none where the key is null."""
        number, one = r.size(key, self.missing, or_null=True), draft["ffn.expert"]
        if number and "ffn.expert" in draft:
            draft["ffn.shared"] = part(MLP, hidden=number * one.get("hidden"), activation=one.get("activation"))

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """The width of the shared MLP in experts, or null."""
        shared = "ffn.shared.hidden" in draft
        return {key: draft["ffn.shared.hidden"] // draft["ffn.expert.hidden"] if shared else None}


class Groups(Row):
    """How many groups experts are in, and in how many of them (`topk_group`) a token's may be; one group is none.

    count, kept    what missing keys mean
    best           a group is as good as the sum of so many of its best experts
    """

    def __init__(self, count: int | None, kept: int | None, best: int) -> None:
        self.count, self.kept, self.best = count, kept, best

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """Read both keys; one group, and null, mean no groups."""
        number, kept = r.size(key, self.count, or_null=True) or 1, r.size("topk_group", self.kept, or_null=True) or 1
        if number == 1 < kept and "topk_group" in r.values:
            raise r.error("topk_group", f"1, or {key} of at least as many")
        draft["ffn.groups"] = part(ExpertGroups, count=number, kept=kept, best=self.best) if number > 1 else None

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """Both keys; both are 1 where there are no groups."""
        if "ffn.groups.count" not in draft:
            return {key: 1, "topk_group": 1}
        return {key: draft["ffn.groups.count"], "topk_group": draft["ffn.groups.kept"]}


class GreedyOrGroups(Groups):
    """Groups that count only where `topk_method` says so."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """Read the groups; where the method is greedy there are none, whatever sizes stand there."""
        if r.must("topk_method", "greedy", "group_limited_greedy") == "group_limited_greedy":
            super().read(r, draft, key)
        else:
            draft["ffn.groups"] = None
            for unused in (key, "topk_group"):
                r.size(unused, None)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """The keys of the groups, and the method; greedy where there are no groups."""
        values = super().write(draft, key)
        return values | {"topk_method": "greedy" if values[key] == 1 else "group_limited_greedy"}


class TemperedRope(RopeKeys):
    """RoPE, and the scale of the scores: 1/√width, and with YaRN twice the temperature of mscale_all_dim."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """RoPE, and the scale of the scores where mscale_all_dim changes it."""
        super().read(r, draft, key)
        inner, yarn = r.inside("rope_scaling") or r.inside("rope_parameters"), draft["mixer.rope.scaling"]
        mscale = inner.number("mscale_all_dim", None, above=-1) if yarn and inner else None
        draft["mixer.scale"] = tempered(draft, yarn.factor, mscale) if mscale else None

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """RoPE's keys, with the mscale and mscale_all_dim that give the scale and the attention factor."""
        values, scale, yarn = super().write(draft, key), draft["mixer.scale"], draft["mixer.rope"].build().scaling
        if scale is None:
            return values
        if not isinstance(yarn, Yarn) or yarn.factor <= 1:
            raise ConfigError("a scale of the scores is known here with YaRN only")
        factor, own, heat = yarn.factor, yarn.attention_factor, math.sqrt(scale * math.sqrt(width(draft)))
        all_dim = solved(lambda m: tempered(draft, factor, m), scale, heat, factor)
        shared, mscale = temperature(factor, all_dim), None
        if own is not None:
            mscale = solved(lambda m: temperature(factor, m) / shared, own, own * shared, factor)
        for each in (values["rope_scaling"], values["rope_parameters"]):
            each.pop("attention_factor", None)
            each |= {"mscale": mscale, "mscale_all_dim": all_dim}
        return values


def width(draft: Draft) -> int:
    """Of a query or key."""
    return draft["mixer.nope"] + draft["mixer.rope_dim"]


def tempered(draft: Draft, factor: float, mscale: float) -> float:
    """The scale of the scores: 1/√width, and YaRN's temperature twice."""
    return width(draft) ** -0.5 * temperature(factor, mscale) ** 2


def solved(function: Callable[[float], float], wanted: float, heat: float, factor: float) -> float:
    """The roundest m with function(m) exactly `wanted`, where temperature(factor, m) is `heat` but for rounding."""
    found = roundest(function, wanted, (heat - 1) / (0.1 * math.log(factor)))
    if found is None:
        raise ConfigError(f"no mscale is exactly a temperature of {heat:g}")
    return found


DEEPSEEK = LLAMA_SHAPE.but(
    "deepseek", "DeepseekForCausalLM", names=with_experts(LLAMA_NAMES, *SHARED),
    keys={
        "attention_bias": ATTENTION_BIAS,
        "first_k_dense_replace": FirstDense(missing=0, round_weights=True), "moe_layer_freq": EveryFew(),
        "intermediate_size": size("ffn.hidden"), "moe_intermediate_size": size("ffn.expert.hidden", missing=1407),
        "n_routed_experts": count("ffn.experts", missing=64), "n_shared_experts": SharedExperts(missing=2),
        "num_experts_per_tok": size("ffn.top_k"), "norm_topk_prob": flag("ffn.renormalize", missing=False),
        "scoring_func": only("softmax", written=True),
    },
    irrelevant=frozenset({"aux_loss_alpha", "seq_aux", "ep_size"}),
)
DEEPSEEK_V2 = DEEPSEEK.but(
    "deepseek_v2", "DeepseekV2ForCausalLM", names=with_experts(LATENT_NAMES, *SHARED),
    layer={"mixer": part(LatentAttention, rope=part(Rope, layout="interleaved", rounds="result"))},
    keys={
        "num_key_value_heads": only(field("mixer.heads"), None, written=True),  # says nothing: no head shares keys
        "qk_nope_head_dim": size("mixer.nope", missing=128), "qk_rope_head_dim": size("mixer.rope_dim", missing=64),
        "qk_head_dim": only(width), "head_dim": only(field("mixer.rope_dim")),  # as transformers writes them
        "v_head_dim": size("mixer.value", missing=128), "kv_lora_rank": size("mixer.kv_rank", missing=512),
        "q_lora_rank": size("mixer.q_rank", missing=1536, null=None),
        "rope_parameters": TemperedRope(),
        "attention_bias": only(False), "mlp_bias": only(False), "moe_layer_freq": only(1),
        "first_k_dense_replace": FirstDense(missing=0, router_float32=True),
        "n_group": GreedyOrGroups(count=None, kept=None, best=1),
        "routed_scaling_factor": number("ffn.scale", missing=1.0),
        "ffn.scale": Follows(lambda draft: 1.0 if draft["ffn.renormalize"] else draft["ffn.scale"]),
    },
    without=("head_dim", "rope_parameters"),  # they stand behind the widths that they need
)
DEEPSEEK_V3 = DEEPSEEK_V2.but(
    "deepseek_v3", "DeepseekV3ForCausalLM", names=with_experts(LATENT_NAMES, CORRECTION, *SHARED),
    layer={"mixer.rope.rounds": "each"},
    missing={
        "max_position_embeddings": 4096, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    },
    keys={
        "rope_interleave": choice({True: "interleaved", False: "half"}, "mixer.rope.layout", missing=True),
        "first_k_dense_replace": FirstDense(missing=3, **V3_EXPERTS),
        "scoring_func": only("sigmoid", written=True), "topk_method": only("noaux_tc", written=True),
        "n_group": Groups(count=8, kept=4, best=2),
    },
    without=("mlp_bias", "ffn.scale"),
    irrelevant=DEEPSEEK.irrelevant | {"num_nextn_predict_layers"}, ahead=AHEAD,
)
V3_ROUTING = {  # what families with V3's experts and another attention take from it
    key: DEEPSEEK_V3.keys[key] for key in (
        "first_k_dense_replace", "intermediate_size", "moe_intermediate_size", "n_routed_experts", "n_shared_experts",
        "num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor", "n_group",
    )
}
FAMILIES = {"deepseek": DEEPSEEK, "deepseek_v2": DEEPSEEK_V2, "deepseek_v3": DEEPSEEK_V3, "kimi_k2": DEEPSEEK_V3}
