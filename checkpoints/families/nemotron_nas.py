"""Nemotron-NAS (DeciLM): a Llama out of which a search has taken what it could do without. 49B, 253B.

    x += o(attention(norm(x)));  x += down(silu(gate(h)) · up(h)),  h = norm(x)       of which a layer may lack either

`block_configs` has an object a layer: how many query heads share a key (`n_heads_in_group`), how wide the MLP is, and
which of the two is no more there (`no_op`). An MLP of `ffn_mult` m is 2 m hidden_size / 3 wide, rounded up to 256.
Bercovich et al. 2024 (arXiv 2411.19146). Refused are layers whose attention or MLP became one matrix
(`replace_with_linear`), and windows, sinks and sparse heads, which the keys have room for.
"""

from typing import Any

from checkpoints.families.llama import ATTENTION_BIAS, LLAMA_SHAPE
from checkpoints.names.config_table import ABSENT, Draft, Part, flag, only, part
from checkpoints.names.layer_kinds import LayerKinds
from checkpoints.names.reader import Reader
from nanollm.config import MLP, Attention, Layer, Norm, Rope

WHOLE = LLAMA_SHAPE.layer
LAYERS = {
    "both": WHOLE,
    "attention": part(Layer, mixer=part(Attention, rope=part(Rope)), ffn=None, pre_mixer=part(Norm), pre_ffn=None),
    "mlp": part(Layer, mixer=None, ffn=part(MLP), pre_mixer=None, pre_ffn=part(Norm)),
}
MLP_OFF: dict[str, Any] = {"sparsify": None, "replace_with_linear": False}  # keys, at what is implemented
ATTENTION_OFF = MLP_OFF | {"num_sink_tokens": None, "unshifted_sink": False, "window_length": None,
                           "use_prefill_window_in_sink_attention": False}


def width(times: float, dim: int) -> int:
    """F of an MLP."""
    return -(-int(2 * times * dim / 3) // 256) * 256


class BlockConfigs(LayerKinds):
    """What each layer has, and its key/value heads and the width of its MLP."""

    def __init__(self) -> None:
        super().__init__(LAYERS, lambda r: [], lambda kinds: {})

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        blocks = r.get(key)
        if not isinstance(blocks, list) or not 0 < len(blocks) <= r.most:
            raise r.error(key, f"a list of objects, at most {r.most}")
        draft.layers = [self.layer(r, each, f"{key}[{i}]") for i, each in enumerate(blocks)]

    def layer(self, r: Reader, block: Any, where: str) -> Part:
        """The layer of one object."""
        own = r.of({where: block}).inside(where)
        attention, mlp = (own and own.inside(name) for name in ("attention", "ffn"))
        if own is None or attention is None or mlp is None:
            raise r.of({where: block}).error(where, "an object with attention and ffn")
        for inner, off in ((attention, ATTENTION_OFF), (mlp, MLP_OFF)):
            for name, value in off.items():
                inner.must(name, value)
        idle = attention.flag("no_op", False), mlp.flag("no_op", False)
        if all(idle):
            raise attention.error("no_op", "false, where ffn.no_op is true")
        found = self.layers["mlp" if idle[0] else "attention" if idle[1] else "both"].copy()
        group, times = attention.get("n_heads_in_group", None), mlp.get("ffn_mult", None)
        if not idle[0]:
            heads, group = r.size("num_attention_heads"), attention.size("n_heads_in_group")
            if heads % group:
                raise attention.error("n_heads_in_group", f"a divisor of num_attention_heads ({heads})")
            found.set("mixer.kv_heads", heads // group)
        if not idle[1]:
            times = mlp.number("ffn_mult")
            found.set("ffn.hidden", width(times, r.size("hidden_size")))
        for inner in (attention, mlp, own):
            inner.close()
        return found

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        """The blocks of config.json, one a layer."""
        blocks = []
        for each in draft.layers:
            kv_heads, hidden = each.get("mixer.kv_heads"), each.get("ffn.hidden")
            attention = {"no_op": kv_heads is ABSENT, "n_heads_in_group": None, **ATTENTION_OFF}
            mlp = {"no_op": hidden is ABSENT, "ffn_mult": None, **MLP_OFF}
            if kv_heads is not ABSENT:
                attention["n_heads_in_group"] = each.get("mixer.heads") // kv_heads
            if hidden is not ABSENT:
                mlp["ffn_mult"] = 1.5 * hidden / draft["dim"]
            blocks.append({"attention": attention, "ffn": mlp})
        return {key: blocks, "num_hidden_layers": len(blocks)}


NEMOTRON_NAS = LLAMA_SHAPE.but(
    "nemotron-nas", "DeciLMForCausalLM",
    keys={
        "num_hidden_layers": only(lambda draft: len(draft.layers)), "block_configs": BlockConfigs(),
        "num_key_value_heads": only(None, written=True), "intermediate_size": only(None, written=True),
        "attention_bias": ATTENTION_BIAS, "mlp_bias": flag("ffn.bias", missing=False),
    },
)
FAMILIES = {"nemotron-nas": NEMOTRON_NAS}
