"""Granite 3, 3.1, 3.2, 3.3, dense: Llama with four factors, which training finds for a small model and keeps (muP).

    x  = e · E[token]                                     e = embedding_multiplier    12
    x += r · o(attention(norm(x)));  x += r · mlp(norm(x))    r = residual_multiplier     0.22
    scores = a · q kᵀ                                     a = attention_multiplier    1/d, and not 1/√d
    logits = W norm(x) / l                                l = logits_scaling          8 (2B), 16 (8B)

A factor whose key is missing is 1, that of the scores too. Biases as in Llama: `attention_bias` and `mlp_bias`.
The factors are after Yang et al. 2022 (arXiv 2203.03466).

Granite Swash, 2B (granite_swa): every fourth layer, the first of them, sees all, the others 128 keys; every head has a
sink, as in gpt-oss; `layer_rope_theta` is the base of each layer, 0 where it does not rotate.

HyperCLOVA X SEED Think 14B (hyperclovax) is the same with norms behind both branches too, before r multiplies; there
`logits_scaling` multiplies, and a missing attention_multiplier means 1/√d.
"""

from typing import Any

from checkpoints.families.cwm import FirstOfFourFull
from checkpoints.families.llama import ATTENTION_BIAS, EPS, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.names.config_rows import RopeKeys, reciprocal
from checkpoints.names.config_table import Draft, Follows, Row, Switch, flag, number, part
from checkpoints.names.reader import Reader, is_number
from checkpoints.names.table import override, rule, under
from nanollm.config import Norm

GRANITE = LLAMA_SHAPE.but(
    "granite", "GraniteForCausalLM",
    keys={
        "embedding_multiplier": number("embed_scale", missing=1.0),
        "residual_multiplier": number("residual_scale", missing=1.0),
        "attention_multiplier": number("mixer.scale", missing=1.0),
        "logits_scaling": reciprocal("head_scale", missing=1.0),
        "attention_bias": ATTENTION_BIAS, "mlp_bias": flag("ffn.bias", missing=False),
    },
)


class BaseOfEach(RopeKeys):
    """RoPE, with a base for each layer; without the list all have the same."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """The common keys, and then what the list says."""
        super().read(r, draft, key)
        bases, number = r.get("layer_rope_theta", None), len(draft.layers)
        if bases is None:
            return
        known = isinstance(bases, list) and all(
            type(base) in (int, float) and (base == 0 or is_number(base, 1)) for base in bases)
        if not known or len(bases) != number:
            raise r.error("layer_rope_theta", f"{number} times a number above 1, or 0")
        for layer, base in zip(draft.layers, bases, strict=True):
            path, value = ("mixer.rope.theta", float(base)) if base else ("mixer.rope", None)
            layer.set(path, value)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        bases = [0 if rope is None else rope.get("theta") for rope in draft.each("mixer.rope")]
        return super().write(draft, key) | {"layer_rope_theta": bases}


SINKS = rule("model.layers.{i}.self_attn.sinks", "layers.{i}.mixer.sinks")
GRANITE_SWA = GRANITE.but(
    "granite_swa", "GraniteSWAForCausalLM", layer={"mixer.sinks": True}, names=(override(LLAMA_NAMES, SINKS),),
    about="Granite Swash, dense: Granite 3 whose heads have sinks, with a window in three layers of four.",
    missing={"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
             "max_position_embeddings": 8192},
    keys={"layer_types": FirstOfFourFull(128), "rope_parameters": BaseOfEach()},
)


class UsualOrOther(Row):
    """What scores are multiplied by; a null, and a missing key, mean 1/√d."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        scale = r.number(key, None)
        draft["mixer.scale"] = None if scale == draft["mixer.head_dim"] ** -0.5 else scale

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: draft["mixer.scale"]}


HYPERCLOVAX = GRANITE.but(
    "hyperclovax", "HyperCLOVAXForCausalLM",
    about="HyperCLOVA X SEED Think 14B (Naver): Granite's factors, with norms behind both branches too.",
    names=(override(LLAMA_NAMES, *under("model.layers.{i}", "layers.{i}", {
        "post_norm1": "post_mixer", "post_norm2": "post_ffn"})),),
    keys={
        "attention_multiplier": UsualOrOther(), "logits_scaling": number("head_scale", missing=1.0),
        "use_post_norm": Switch("post_mixer", part(Norm), missing=True),
        "post_ffn": Follows(lambda draft: None if draft["post_mixer"] is None else part(Norm)),
        "rms_norm_eps": number(*EPS, missing=1e-6),
    },
    without=("rms_norm_eps",),  # it stands behind what decides which norms there are
)
FAMILIES = {"granite": GRANITE, "granite_swa": GRANITE_SWA, "hyperclovax": HYPERCLOVAX}
