"""RecurrentGemma: Griffin's recurrent blocks, and local attention in every third place. 2B, 9B.

    block_types        "recurrent", "recurrent", "attention", over and over, cut off where the layers end
    intermediate_size  counts gate and up projection together: the MLP is half as wide. Biases on all three, and on o
    attention          multi-query, a window of 2048, and half of each head turns
    embedding          times √hidden_size, rounded to bfloat16 whatever the weights are: 50.5 for 2560, not 50.596

As in Gemma the gains are stored less one, head and embedding are tied, and the logits have a soft cap.
"""

import torch

from checkpoints.families.llama import GATED, HEADS, LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.names.config_rows import Heads, Kinds, RopeKeys, halved
from checkpoints.names.config_table import Draft, Follows, activation, field, flag, number, only, part, size
from checkpoints.names.reader import Reader
from checkpoints.names.rope import read_rope
from checkpoints.names.table import override, rule, under
from nanollm.config import RGLRU, Attention, Norm, Rope
from nanollm.errors import ConfigError

BLOCK = {
    **HEADS, "linear_x": "x_proj", "linear_y": "y_proj", "linear_out": "out_proj", "conv_1d": "conv1d",
    "rg_lru.input_gate_weight": "input_gate.weight", "rg_lru.input_gate_bias": "input_gate.bias",
    "rg_lru.recurrent_gate_weight": "recurrence_gate.weight", "rg_lru.recurrent_gate_bias": "recurrence_gate.bias",
    "rg_lru.recurrent_param": "Lambda",
}
RECURRENT_GEMMA_NAMES = override(
    LLAMA_NAMES, rule("model.final_norm", "norm"),
    *under("model.layers.{i}", "layers.{i}", {"temporal_pre_norm": "pre_mixer", "channel_pre_norm": "pre_ffn"}),
    *under("model.layers.{i}.temporal_block", "layers.{i}.mixer", BLOCK),
    *under("model.layers.{i}.mlp_block", "layers.{i}.ffn", GATED),
)


def read_kinds(r: Reader, layers: int) -> list[str]:
    """What each layer is. The first configs say `_block_types`."""
    round_ = r.get("block_types", r.get("_block_types", ["recurrent", "recurrent", "attention"]))
    if not isinstance(round_, list) or not round_ or not all(one in ("recurrent", "attention") for one in round_):
        raise r.error("block_types", "a list of recurrent and attention")
    return [round_[i % len(round_)] for i in range(layers)]


class PlainRope(RopeKeys):
    """Half of each head turns, and nothing is stretched."""

    def rope(self, r: Reader, draft: Draft) -> Rope:
        rope = read_rope(r, self.theta, draft["context"] or 8192, self.fraction)
        if rope.scaling is not None:
            kind = type(rope.scaling).__name__
            raise ConfigError(f"{r.where}: the rope_type is {kind}; expected default, which is what is implemented")
        return rope


def root(dim: int) -> float:
    """√dim, rounded to bfloat16."""
    return torch.tensor(dim**0.5, dtype=torch.bfloat16).item()


MIXERS = {"recurrent": part(RGLRU), "attention": part(Attention, rope=part(Rope), out_bias=True)}
RECURRENT_GEMMA = LLAMA_SHAPE.but(
    "recurrent_gemma", "RecurrentGemmaForCausalLM", names=(RECURRENT_GEMMA_NAMES,), ignorable=frozenset(),
    norm=part(Norm, offset=1.0, cast_after_gain=True), layer={"ffn.bias": True}, missing={"tie_word_embeddings": True},
    keys={
        "block_types": Kinds("mixer", MIXERS, read_kinds, lambda kinds: {"block_types": kinds}),
        "num_attention_heads": Heads(alone=False),
        "head_dim": only(lambda draft: draft["dim"] // draft["mixer.heads"], written=True),
        "attention_window_size": size("mixer.window", missing=2048),
        "attention_bias": flag("mixer.qkv_bias", missing=False),
        "lru_width": size("mixer.width", missing=field("dim"), null=field("dim")),
        "conv1d_width": size("mixer.conv", missing=4),
        "intermediate_size": halved("ffn.hidden", missing=7680),
        "hidden_activation": activation("ffn.activation", "mixer.activation", missing="gelu_pytorch_tanh"),
        "logits_soft_cap": number("head_softcap", missing=30.0),
        "max_position_embeddings": size("context", missing=None),
        "rope_parameters": PlainRope(fraction=0.5),
        "embeddings_scale_by_sqrt_dim": only(True),
        "embed_scale": Follows(lambda draft: root(draft["dim"])),
    },
    without=("hidden_act",), irrelevant=frozenset({"w_init_variance_scale", "final_w_init_variance_scale"}),
)
FAMILIES = {"recurrent_gemma": RECURRENT_GEMMA}
