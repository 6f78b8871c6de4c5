"""AFMoE: Trinity Nano, Mini and Large. Gated attention in windows, norms before and after, and sigmoid experts.

    x = √D · E[token]                                       where `mup_enabled` says so
    x += norm(gated(attention(norm(x))));  x += norm(experts(norm(x)))

    attention    three layers of four slide and rotate, the fourth sees all, not rotated; a norm on every head of q and
                 k; what is mixed is multiplied by σ(W_g h) (nanollm/layers/gated_attention.py)
    experts      V3's: sigmoids, a correction for the choice, the chosen weights renormalised, × `route_scale`; experts
                 that every token visits. The first `num_dense_layers` layers have an MLP

All norms are RMS, and round after the gain. The router works in the working dtype, its scores are float32. Arcee AI
2026, https://huggingface.co/arcee-ai
"""

from typing import Any

from checkpoints.families.deepseek import SHARED, FirstDense, SharedExperts
from checkpoints.families.llama import EPS, EXPERT, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.families.qwen import QK_NORM
from checkpoints.names.config_rows import FULL, SLIDING, RopeKeys, whole
from checkpoints.names.config_table import Draft, Row, activation, count, number, only, part, size
from checkpoints.names.ops import Stack
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, rule, under
from nanollm.config import Attention, GatedAttention, Norm, Rope

AFMOE_NAMES = override(
    LLAMA_NAMES, *QK_NORM, *SHARED, rule("model.layers.{i}.self_attn.gate_proj", "layers.{i}.mixer.gate"),
    *under("model.layers.{i}", "layers.{i}", {
        "post_attention_layernorm": "post_mixer", "pre_mlp_layernorm": "pre_ffn", "post_mlp_layernorm": "post_ffn",
        "mlp.router.gate": "ffn.router", "mlp.expert_bias": "ffn.router.correction",
    }),
    *under("model.layers.{i}.mlp.experts.{e}", "layers.{i}.ffn.experts", EXPERT, Stack),
)


class FirstLayers(FirstDense):
    """The number of first layers with an MLP, under another name."""

    def kinds(self, r: Reader, layers: int) -> list[str]:
        """The kind of each layer."""
        first = whole(r, "num_dense_layers", self.missing)
        return ["mlp" if i < first else "experts" for i in range(layers)]

    def keys(self, kinds: list[str]) -> dict[str, Any]:
        """The number of layers before the first with experts."""
        return {"num_dense_layers": [*kinds, "experts"].index("experts")}


class LocalTurns(Row):
    """Which layers slide and rotate, and which do neither: by `layer_types`, or else every so many-th is full."""
    shapes = True

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """Take window and rotation from the full layers."""
        number, every = len(draft.layers), r.size("global_attn_every_n_layers", 4)
        types = r.get(key, None) or [SLIDING if (i + 1) % every else FULL for i in range(number)]
        if not isinstance(types, list) or len(types) != number or not all(one in (FULL, SLIDING) for one in types):
            raise r.error(key, f"{number} times {FULL} or {SLIDING}")
        window = r.size("sliding_window", 1024)
        for layer, kind in zip(draft.layers, types, strict=True):
            path, value = ("window", window) if kind == SLIDING else ("rope", None)
            layer.set(f"mixer.attention.{path}", value)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """The window, and which layers have it."""
        windows = [*draft.each("mixer.attention.window")]
        used = next((window for window in windows if window), 1024)
        return {"sliding_window": used, key: [SLIDING if window else FULL for window in windows]}


class RootOfWidth(Row):
    """Whether the embedding is multiplied by the root of its width."""

    def __init__(self, missing: bool = False) -> None:
        self.missing = missing

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        draft["embed_scale"] = draft["dim"] ** 0.5 if r.flag(key, self.missing) else 1.0

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: draft["embed_scale"] != 1}


NORM = part(Norm, cast_after_gain=True)
AFMOE = LLAMA_SHAPE.but(
    "afmoe", "AfmoeForCausalLM", names=(AFMOE_NAMES,), norm=NORM,
    layer={"mixer": part(GatedAttention, attention=part(Attention, rope=part(Rope), qk_norm=NORM)),
           "post_mixer": NORM, "post_ffn": NORM},
    missing={"max_position_embeddings": 16384},
    keys={
        "num_dense_layers": FirstLayers(missing=1, score="sigmoid", correction=True, renormalize=True),
        "layer_types": LocalTurns(),
        "num_attention_heads": size("mixer.attention.heads"),
        "num_key_value_heads": size(
            "mixer.attention.kv_heads", missing=lambda draft: draft["mixer.attention.heads"],
            null=lambda draft: draft["mixer.attention.heads"]),
        "head_dim": size("mixer.attention.head_dim", missing=128),
        "hidden_act": activation("ffn.activation", "ffn.expert.activation", missing="silu"),
        "intermediate_size": size("ffn.hidden"), "moe_intermediate_size": size("ffn.expert.hidden", missing=1408),
        "rms_norm_eps": number(*EPS, "mixer.attention.qk_norm.eps", missing=1e-5),
        "rope_parameters": RopeKeys(path="mixer.attention.rope"),
        "num_experts": count("ffn.experts", missing=64), "num_experts_per_tok": size("ffn.top_k", missing=6),
        "num_shared_experts": SharedExperts(missing=2), "route_scale": number("ffn.scale", missing=1.0),
        "mup_enabled": RootOfWidth(),
        # what the class always does, and the hub's configs also say
        "attention_bias": only(False), "route_norm": only(True), "score_func": only("sigmoid"),
        **dict.fromkeys(("n_group", "topk_group", "num_expert_groups", "num_limited_groups"), only(1)),
    },
    irrelevant=frozenset({"load_balance_coeff", "use_grouped_mm"}),
)
FAMILIES = {"afmoe": AFMOE}
