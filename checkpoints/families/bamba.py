"""Bamba: Mamba-2 layers, attention in a few places, an MLP in all. 9B. IBM, Princeton, CMU, UIUC 2024.

    x += mixer(norm(x));  x += down(silu(gate h) · up h),  h = norm(x)

`attn_layer_indices` names the layers with attention, of which half of each head turns. The rows for Mamba-2 are those
of Granite 4 and Falcon-H1 too: mamba_expand · hidden_size = mamba_n_heads · mamba_d_head.
"""

from typing import Any

from checkpoints.families.llama import ATTENTION_BIAS, EPS, GATED, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.families.mamba2 import StepLimits, inner
from checkpoints.names.config_rows import Heads, Kinds, RopeKeys, whole_multiple
from checkpoints.names.config_table import Draft, Keys, Row, field, flag, number, only, part, size
from checkpoints.names.layer_kinds import Among
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, under
from nanollm.config import Attention, Mamba2, Rope

MAMBA2_PARTS = {name: name for name in ("in_proj", "conv1d", "dt_bias", "A_log", "D", "norm", "out_proj")}
BAMBA_NAMES = override(
    LLAMA_NAMES,
    *under("", "", {"model.final_layernorm": "norm", "model.layers.{i}.pre_ff_layernorm": "layers.{i}.pre_ffn"}),
    *under("model.layers.{i}.mamba", "layers.{i}.mixer", MAMBA2_PARTS),
    *under("model.layers.{i}.feed_forward", "layers.{i}.ffn", GATED),
)


class HeadWidth(Row):
    """How wide a head of Mamba-2 is; "auto" is what is left by `mamba_expand` times the model's width."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        heads, channels = draft["mixer.heads"], r.size("mamba_expand", 2) * draft["dim"]
        width = r.get(key, "auto")
        if not draft.layers:                                 # of which no layer is
            return
        width = channels // heads if width == "auto" else r.size(key)
        if heads * width != channels:
            raise r.error("mamba_n_heads", f"mamba_expand · hidden_size / mamba_d_head ({channels} / {width})")
        draft["mixer.head_dim"] = width

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        if not draft.layers:                                 # of no layer, but transformers checks that they fit
            return {"mamba_n_heads": 1, key: "auto"}
        return {key: draft["mixer.head_dim"], "mamba_expand": whole_multiple(inner(draft), draft["dim"])}


MAMBA2_KEYS: Keys = {
    "mamba_n_heads": Among(Mamba2, size("mixer.heads", missing=128)), "mamba_d_head": Among(Mamba2, HeadWidth()),
    "mamba_n_groups": size("mixer.groups", missing=1), "mamba_d_state": size("mixer.state", missing=256),
    "mamba_d_conv": size("mixer.conv", missing=4), "mamba_conv_bias": flag("mixer.conv_bias", missing=True),
    "mamba_proj_bias": flag("mixer.bias", missing=False), "time_step_limit": StepLimits(),
    "hidden_act": only("silu", written=True),  # Mamba's too
}


def read_kinds(r: Reader, layers: int) -> list[str]:
    """What each layer is; null: there is no attention."""
    places = r.get("attn_layer_indices", None) or []
    if not isinstance(places, list) or not all(type(i) is int and 0 <= i < layers for i in places):
        raise r.error("attn_layer_indices", f"a list of layers from 0 to {layers - 1}")
    return ["attention" if i in places else "mamba" for i in range(layers)]


def write_kinds(kinds: list[str]) -> dict[str, Any]:
    return {"attn_layer_indices": [i for i, kind in enumerate(kinds) if kind == "attention"]}


MIXERS = {"mamba": part(Mamba2), "attention": part(Attention, rope=part(Rope))}
BAMBA = LLAMA_SHAPE.but(
    "bamba", "BambaForCausalLM", names=(BAMBA_NAMES,), ignorable=frozenset(),
    missing={"max_position_embeddings": 262144},
    keys=MAMBA2_KEYS | {
        "attn_layer_indices": Kinds("mixer", MIXERS, read_kinds, write_kinds),
        "num_attention_heads": Among(Attention, Heads(alone=False)),
        "num_key_value_heads": Among(Attention, size("mixer.kv_heads", missing=8, null=field("mixer.heads"))),
        "rms_norm_eps": number(*EPS, "mixer.eps", missing=1e-5),
        "attention_bias": ATTENTION_BIAS, "mlp_bias": flag("ffn.bias", missing=False),
        "rope_parameters": RopeKeys(fraction=0.5),
    },
    without=("head_dim",), irrelevant=frozenset({"mamba_chunk_size", "num_logits_to_keep", "z_loss_coefficient"}),
)
FAMILIES = {"bamba": BAMBA}
