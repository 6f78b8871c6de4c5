"""Falcon-H1: attention and Mamba-2 side by side in every layer, and an MLP. 0.5B … 34B. TII 2025 (arXiv 2507.22448).

    x += s_out · Mamba-2(s_in · h) + a_out · attention(a_in · h),  h = norm(x)
    x += m_out · down(silu(m_gate · gate h) · up h),               h = norm(x)

Every product has a multiplier, from µP; the weights as they are stored lack it:

    attention_in_multiplier, attention_out_multiplier, ssm_in_multiplier, ssm_out_multiplier    as above
    mlp_multipliers       m_gate, m_out
    ssm_multipliers       of z, x, B, C and Δ, as they are projected
    key_multiplier        of the keys
    embedding_multiplier, lm_head_multiplier

`mamba_rms_norm` says whether a norm follows the gate of Mamba-2; it has none but in the 34B. With a norm before the
gate (`mamba_norm_before_gate`) it would be another model, which nobody has published.
"""

from typing import Any

from checkpoints.families.bamba import MAMBA2_KEYS, MAMBA2_PARTS
from checkpoints.families.llama import ATTENTION_BIAS, EPS, GATED, HEADS, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.families.mamba2 import inner
from checkpoints.names.config_rows import HeadDim, RopeKeys
from checkpoints.names.config_table import Draft, Row, field, flag, number, only, part, size
from checkpoints.names.layer_kinds import Within
from checkpoints.names.reader import Reader, is_number
from checkpoints.names.table import Table, override, under
from nanollm.config import MLP, Attention, Mamba2, ParallelMixer, Rope, ScaledMLP

WITHOUT = (".mixer.q", ".mixer.k", ".mixer.v", ".mixer.o")
BASE: Table = {ours: each for ours, each in LLAMA_NAMES.items() if not ours.endswith(WITHOUT)}
FALCON_H1_NAMES = override(
    BASE, *under("", "", {"model.final_layernorm": "norm", "model.layers.{i}.pre_ff_layernorm": "layers.{i}.pre_ffn"}),
    *under("model.layers.{i}.mamba", "layers.{i}.mixer.scan", MAMBA2_PARTS),
    *under("model.layers.{i}.self_attn", "layers.{i}.mixer.attention", HEADS),
    *under("model.layers.{i}.feed_forward", "layers.{i}.ffn", GATED),
)


class ScanWidth(Row):
    """How wide Mamba-2 is, and each of its heads; null: mamba_expand times the model's width."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        channels = r.size(key, 1024, or_null=True) or r.size("mamba_expand", 2) * draft["dim"]
        r.get("mamba_expand", None)
        heads, width = draft["mixer.heads"], r.get("mamba_d_head", "auto")
        width = channels // heads if width == "auto" else r.size("mamba_d_head")
        if heads * width != channels:
            raise r.error("mamba_n_heads", f"mamba_d_ssm / mamba_d_head ({channels} / {width})")
        draft["mixer.head_dim"] = width

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: inner(draft), "mamba_d_head": draft["mixer.head_dim"]}


class GateNorm(Row):
    """Whether a norm follows the gate; its ε is that of the others."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        before = r.flag("mamba_norm_before_gate", True)
        if not r.flag(key, False):
            draft["mixer.eps"] = None
        elif before:
            raise r.error("mamba_norm_before_gate", "false, where there is a norm")

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: draft["mixer.eps"] is not None, "mamba_norm_before_gate": False}


class Multipliers(Row):
    """A list of numbers, one a field, or all in one; a missing key, and null, mean ones."""

    def __init__(self, number: int, *paths: str) -> None:
        self.number, self.paths = number, paths

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """The list into its fields. Raises ConfigError for another length, and for what is no number above 0."""
        values = r.get(key, None)
        if values is None:
            values = [1.0] * self.number
        if not isinstance(values, list) or len(values) != self.number or not all(map(is_number, values)):
            raise r.error(key, f"{self.number} finite numbers above 0")
        if len(self.paths) == 1:
            draft[self.paths[0]] = None if set(values) == {1.0} else tuple(map(float, values))
        else:
            for path, value in zip(self.paths, values, strict=True):
                draft[path] = float(value)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        if len(self.paths) == 1:
            return {key: list(draft[self.paths[0]] or [1.0] * self.number)}
        return {key: [draft[path] for path in self.paths]}


MIXER = part(ParallelMixer, attention=part(Attention, rope=part(Rope)), scan=part(Mamba2))
FALCON_H1 = LLAMA_SHAPE.but(
    "falcon_h1", "FalconH1ForCausalLM", names=(FALCON_H1_NAMES,), ignorable=frozenset(),
    layer={"mixer": MIXER, "ffn": part(ScaledMLP, mlp=part(MLP))}, missing={"max_position_embeddings": 8192},
    keys={key: Within("scan", row) for key, row in MAMBA2_KEYS.items() if key not in ("mamba_d_head", "hidden_act")} | {
        "mamba_d_ssm": Within("scan", ScanWidth()),
        "num_attention_heads": Within("attention", size("mixer.heads")),
        "num_key_value_heads": Within("attention", size(
            "mixer.kv_heads", missing=8, null=field("mixer.heads"))),
        "head_dim": Within("attention", HeadDim()), "attention_bias": Within("attention", ATTENTION_BIAS),
        "rope_parameters": Within("attention", RopeKeys()),
        "intermediate_size": size("ffn.mlp.hidden"), "mlp_bias": flag("ffn.mlp.bias", missing=False),
        "hidden_act": only("silu", written=True),
        "rms_norm_eps": number(*EPS, "mixer.scan.eps", missing=1e-5), "mamba_rms_norm": Within("scan", GateNorm()),
        "projectors_bias": only(field("mixer.scan.bias"), written=True, missing=False),
        "embedding_multiplier": number("embed_scale", missing=1.0),
        "lm_head_multiplier": number("head_scale", missing=1.0),
        "attention_in_multiplier": number("mixer.attention_in", missing=1.0),
        "attention_out_multiplier": number("mixer.attention_out", missing=1.0),
        "ssm_in_multiplier": number("mixer.scan_in", missing=1.0),
        "ssm_out_multiplier": number("mixer.scan_out", missing=1.0),
        "key_multiplier": number("mixer.keys", missing=1.0),
        "ssm_multipliers": Within("scan", Multipliers(5, "mixer.scales")),
        "mlp_multipliers": Multipliers(2, "ffn.gate", "ffn.out"), "attn_layer_indices": only(None),
    },
    irrelevant=frozenset({"mamba_chunk_size", "mamba_use_mlp", "num_logits_to_keep"}),
)
FAMILIES = {"falcon_h1": FALCON_H1}
