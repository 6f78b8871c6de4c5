"""RWKV-4: Raven, Pile and World, 169M to 14B, in transformers' layout.

    x = norm(E[token]);   x += time(norm(x));   x += channel(norm(x))

The norms are LayerNorms with bias; the first is stored in block 0. No positions and no window: the state has one size
for ever, and `context_length` is only what it was trained with. The last norm has ε = 1e-5 whatever
`layer_norm_epsilon` says. `rescale_every` halves the stream after so many layers, with the matrices that write to it,
so that float16 does not overflow; the logits are meant to be the same, so nothing here does it.
"""

from checkpoints.families.family import Family
from checkpoints.names.config_rows import LayerCount, four_widths
from checkpoints.names.config_table import field, flag, number, only, part, size
from checkpoints.names.table import override, rule, under
from nanollm.config import RWKV, Layer, ModelConfig, Norm

TIME = {"key": "key", "value": "value", "receptance": "receptance", "output": "o", "time_decay": "decay",
        "time_first": "first",
        "time_mix_key": "mix_k", "time_mix_value": "mix_v", "time_mix_receptance": "mix_r"}
CHANNEL = {"key": "up", "value": "down", "receptance": "receptance",
           "time_mix_key": "mix_k", "time_mix_receptance": "mix_r"}
RWKV_NAMES = override(
    {},
    *under("rwkv", "", {"embeddings": "embed", "blocks.0.pre_ln": "embed_norm", "ln_out": "norm"}),
    rule("head", "head"),
    *under("rwkv.blocks.{i}", "layers.{i}.mixer", {"ln1": "time_norm", "ln2": "channel_norm"}),
    *under("rwkv.blocks.{i}.attention", "layers.{i}.mixer.time", TIME),
    *under("rwkv.blocks.{i}.feed_forward", "layers.{i}.mixer.channel", CHANNEL),
)
NORM = part(Norm, kind="layer", eps=1e-5, bias=True)
RWKV4 = Family(
    "rwkv", "RwkvForCausalLM",
    keys={
        "vocab_size": size("vocab"), "hidden_size": size("dim", "mixer.width"), "num_hidden_layers": LayerCount(),
        "attention_hidden_size": only(field("dim"), None, written=True),
        "intermediate_size": size("mixer.hidden", missing=four_widths, null=four_widths),
        "layer_norm_epsilon": number("embed_norm.eps", "mixer.norm.eps", missing=1e-5),
        "tie_word_embeddings": flag("tied", missing=False), "context_length": size("context", missing=1024),
    },
    layer=part(Layer, mixer=part(RWKV, norm=NORM), ffn=None, pre_mixer=None, pre_ffn=None),
    model=part(ModelConfig, embed_norm=NORM, final_norm=NORM), names=(RWKV_NAMES,),
    irrelevant=frozenset({"rescale_every"}),
)
FAMILIES = {"rwkv": RWKV4}
