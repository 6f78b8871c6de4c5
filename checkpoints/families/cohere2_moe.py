"""Cohere's Command-A+ and North Mini Code (cohere2_moe): Command-A's parallel layers with experts in place of the MLP.

    x += o(attention(h)) + experts(h),  h = norm(x)      LayerNorm, or RMS norm where `rms_norm_eps` is no null

    experts    the k best, weighed by a softmax over these, or by sigmoids (`expert_selection_fn`), renormalised unless
               `norm_topk_prob` is false; and `num_shared_experts` that every token visits, as one MLP of that many
               times the width: added ("sum"), or both halved ("average")
    layers     the first `first_k_dense_replace`, or those that `mlp_layer_types` calls dense, have an MLP, of a width
               of its own. The others slide (4096) and rotate but for every fourth, which sees all, not rotated;
               dense ones rotate always if `prefix_dense_sliding_window_pattern` is 1
"""

from typing import Any

from checkpoints.families.cohere import COHERE2
from checkpoints.families.deepseek import SHARED, SharedExperts
from checkpoints.families.exaone_moe import NamedOrFirstDense
from checkpoints.families.llama import LLAMA_NAMES
from checkpoints.families.qwen_moe import with_experts
from checkpoints.names.config_rows import HeadDim, Windows, whole
from checkpoints.names.config_table import Draft, Follows, Row, choice, count, field, flag, only, part, size
from checkpoints.names.reader import Reader
from nanollm.config import MLP, Norm, ScaledMLP

PREFIX = "prefix_dense_sliding_window_pattern"


class PrefixAndPeriod(Windows):
    """Where there is no `layer_types`: a period for the first dense layers, another for the rest. Full layers do not
    rotate, but dense ones where their period is 1."""

    def pattern(self, r: Reader, layers: int) -> list[bool]:
        first, own, rest = whole(r, "first_k_dense_replace", 0), r.size(PREFIX, 1), r.size("sliding_window_pattern", 4)
        return [(i + 1) % own != 0 if i < first else (i - first + 1) % rest != 0 for i in range(layers)]

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """The windows, and no rotation in the others."""
        super().read(r, draft, key)
        for layer in draft.layers:
            turns = r.size(PREFIX, 1) == 1 and layer.get("ffn").kind is MLP
            if layer.get("mixer.window") is None and not turns:
                layer.set("mixer.rope", None)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """The list; of the period of dense layers only whether it is 1 counts beside it."""
        dense = [layer for layer in draft.layers if layer.get("ffn").kind is MLP]
        still = any(layer.get("mixer.rope") is None for layer in dense)
        return super().write(draft, key) | {PREFIX: 4 if still else 1}


class SharedAverage(SharedExperts):
    """How many experts every token visits, one MLP of that many times the width; by `…_strategy` added or averaged."""
    strategy = "shared_expert_combination_strategy"

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """Averaged, either is halved."""
        half = r.must(self.strategy, "average", "sum") == "average"
        number = whole(r, key, self.missing)
        if number and "ffn.expert" in draft:
            inner = r.of({key: number})
            super().read(inner, draft, key)
            if half:
                draft["ffn.scale"] = 0.5
                draft["ffn.shared"] = part(ScaledMLP, mlp=draft["ffn.shared"], out=0.5)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """The number, 0 for none, and the word."""
        half, hidden = "ffn.shared.mlp" in draft, draft["ffn.expert.hidden"]
        shared = draft["ffn.shared.mlp.hidden" if half else "ffn.shared.hidden"]
        number = shared // hidden if isinstance(shared, int) else 0
        return {key: number, self.strategy: "average" if half or not number else "sum"}


class RmsOrLayer(Row):
    """ε of RMS norms, or else those are LayerNorms, with the ε of `layer_norm_eps`."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        rms, layer = r.number(key, None), r.number("layer_norm_eps", 1e-5)
        for path in ("final_norm", "pre_mixer"):
            draft[path] = part(Norm, kind="rms" if rms else "layer", eps=rms or layer)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        rms, eps = draft["final_norm.kind"] == "rms", draft["final_norm.eps"]
        return {key: eps if rms else None, "layer_norm_eps": 1e-5 if rms else eps}


COHERE2_MOE = COHERE2.but(
    "cohere2_moe", "Cohere2MoeForCausalLM", names=with_experts(LLAMA_NAMES, *SHARED),
    keys={
        "mlp_layer_types": NamedOrFirstDense(missing=0, round_weights=True), "layer_types": PrefixAndPeriod(),
        "num_attention_heads": size("mixer.heads"), "head_dim": HeadDim(missing=128),
        "intermediate_size": size("ffn.expert.hidden", "ffn.hidden", missing=22528),
        "prefix_dense_intermediate_size": size("ffn.hidden", missing=field("ffn.hidden"), null=field("ffn.hidden")),
        "num_experts": count("ffn.experts", missing=8), "num_experts_per_tok": size("ffn.top_k", missing=2),
        "num_shared_experts": SharedAverage(missing=0),
        "expert_selection_fn": choice({"softmax": "softmax", "sigmoid": "sigmoid"}, "ffn.score", missing="softmax"),
        "norm_topk_prob": flag("ffn.renormalize", missing=True),
        "ffn.renormalize": Follows(lambda draft: draft["ffn.score"] == "softmax" or draft["ffn.renormalize"]),
        "rms_norm_eps": RmsOrLayer(), "layer_norm_bias": only(False),
    },
    without=("layer_types", "layer_norm_eps"),  # the first stands behind what says which layers are dense
)
FAMILIES = {"cohere2_moe": COHERE2_MOE}
