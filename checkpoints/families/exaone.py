"""EXAONE 3.0, 3.5 and Deep (exaone): a Llama with names of its own. EXAONE 4.0 (exaone4): OLMo-2's wiring.

    EXAONE 3      ln_1, attn.attention, ln_2 and mlp are Llama's parts; c_fc_0 is the gate, c_fc_1 the up projection.
                  Llama 3.1's stretch from 3.5 on; the 2.4B is tied. An, Bae et al. 2024, arXiv 2408.03541, 2412.04862
    EXAONE 4      x += norm(attention(x));  x += norm(mlp(x))       a norm on every head of q and k; arXiv 2507.11407
      32B         three layers of four slide (4096) and rotate, the fourth sees all, not rotated
      1.2B        sliding_window null: every layer sees all and rotates

`sliding_window_pattern` is a period, or letters, one a layer, "LLLG", of which the last layer is always global. It
counts where there is no `layer_types`.
"""

from checkpoints.families.llama import EPS, INV_FREQ, LLAMA_SHAPE
from checkpoints.families.olmo import OLMO2_NAMES
from checkpoints.names.config_rows import LayerCount, Windows, four_widths
from checkpoints.names.config_table import Draft, activation, number, part, size
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, under
from nanollm.config import Norm

EXAONE_NAMES = override(
    {},
    *under("", "", {"transformer.wte": "embed", "transformer.ln_f": "norm", "lm_head": "head"}),
    *under("transformer.h.{i}", "layers.{i}", {"ln_1": "pre_mixer", "ln_2": "pre_ffn"}),
    *under("transformer.h.{i}.attn.attention", "layers.{i}.mixer", {
        "q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o"}),
    *under("transformer.h.{i}.mlp", "layers.{i}.ffn", {"c_fc_0": "gate", "c_fc_1": "up", "c_proj": "down"}),
)


class LocalTurns(Windows):
    """Only the layers with a window rotate, if any may have one."""

    def pattern(self, r: Reader, layers: int) -> list[bool]:
        said = r.get("sliding_window_pattern", 4)
        if r.get("sliding_window", self.default) is None:
            return [False] * layers  # whatever the pattern says; transformers writes a 0
        if isinstance(said, str) and set(said) == {"L", "G"}:
            return [said[i % len(said)] == "L" and i < layers - 1 for i in range(layers)]
        period = r.size("sliding_window_pattern", 4, or_null=True)
        return [period is not None and (i + 1) % period != 0 for i in range(layers)]

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        """The windows, and no rotation in the others."""
        super().read(r, draft, key)
        for layer in draft.layers:
            if layer.get("mixer.window") is None and r.get("sliding_window", self.default) is not None:
                layer.set("mixer.rope", None)


EXAONE = LLAMA_SHAPE.but(
    "exaone", "ExaoneForCausalLM", names=(EXAONE_NAMES,), missing={"tie_word_embeddings": True},
    keys={
        "num_layers": LayerCount(also=("num_hidden_layers",)),
        "activation_function": activation("ffn.activation", missing="silu"),
        "layer_norm_epsilon": number(*EPS), "intermediate_size": size("ffn.hidden", missing=four_widths),
    },
    without=("num_hidden_layers", "hidden_act", "rms_norm_eps"), irrelevant=frozenset({"embed_dropout"}),
    ignorable=frozenset({"transformer.rotary.inv_freq", "transformer.h.{i}.attn.attention.rotary.inv_freq"}),
)
EXAONE4 = LLAMA_SHAPE.but(
    "exaone4", "Exaone4ForCausalLM", names=(OLMO2_NAMES,), ignorable=INV_FREQ,
    layer={"mixer.qk_norm": part(Norm), "pre_mixer": None, "post_mixer": part(Norm), "pre_ffn": None,
           "post_ffn": part(Norm)},
    missing={"num_key_value_heads": 32, "rms_norm_eps": 1e-5}, keys={"layer_types": LocalTurns(or_null=True)},
)
FAMILIES = {"exaone": EXAONE, "exaone4": EXAONE4}
