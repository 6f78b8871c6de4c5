"""GPT-Neo, 125M to 2.7B, and TinyStories: GPT-2 with a window on every other layer, and scores that nothing divides.

    attention_types    [[["global", "local"], 12]]      that many times these kinds of layers, 24 in all
    window_size        256 keys, in the local ones
    scores             q kᵀ, in float32                  not over √d

A bias on o, none on q, k and v; all matrices are (out, in). Positions are learned, the head is tied.
"""

from typing import Any

from checkpoints.families.gpt2 import GPT2
from checkpoints.names.config_rows import Heads, LayerCount, four_widths
from checkpoints.names.config_table import Draft, Row, size
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, under

NAMES = override(
    GPT2.names[0],
    *under("transformer.h.{i}.attn.attention", "layers.{i}.mixer", {
        "q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o"}),
    *under("transformer.h.{i}.mlp", "layers.{i}.ffn", {"c_fc": "up", "c_proj": "down"}),
)


class Local(Row):
    """Which layers have a window: pairs of a list of kinds, and how many times it is repeated."""
    shapes = True

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """Both keys, and `attention_layers`, which says the same once more."""
        number, window, said = len(draft.layers), r.size("window_size", 256), r.get(key, [[["global", "local"], 12]])
        try:
            kinds = [kind for kinds, times in said for kind in kinds * min(times, number + 1)]
        except (TypeError, ValueError):
            kinds = []
        if len(kinds) != number or set(kinds) - {"global", "local"}:
            raise r.error(key, f"[[kinds, times], …], {number} kinds in all, each global or local")
        r.must("attention_layers", kinds)
        for layer, kind in zip(draft.layers, kinds, strict=True):
            layer.set("mixer.window", window if kind == "local" else None)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        windows = list(draft.each("mixer.window"))
        kinds = ["local" if window else "global" for window in windows]
        return {key: [[kinds, 1]], "attention_layers": kinds, "window_size": next(filter(None, windows), 256)}


GPT_NEO = GPT2.but(
    "gpt_neo", "GPTNeoForCausalLM", names=(NAMES,), layer={"mixer.qkv_bias": False, "mixer.scale": 1.0},
    keys={
        "hidden_size": size("dim"), "num_layers": LayerCount(also=("num_hidden_layers",)),
        "num_heads": Heads(also=("num_attention_heads",)),
        "intermediate_size": size("ffn.hidden", missing=four_widths, null=four_widths),
        "max_position_embeddings": size("positions", "context", missing=2048),
        "attention_types": Local(),
    },
    without=("n_embd", "n_layer", "n_head", "n_inner", "n_positions", "scale_attn_weights", "attention_head_type"),
    ignorable=frozenset({"transformer.h.{i}.attn.attention.bias", "transformer.h.{i}.attn.attention.masked_bias"}),
    irrelevant=GPT2.irrelevant | {"resid_dropout", "embed_dropout", "classifier_dropout"},
)
FAMILIES = {"gpt_neo": GPT_NEO}
