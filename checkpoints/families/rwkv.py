"""RWKV-4: Raven, Pile and World, 169M to 14B, in transformers' layout.

    x = norm(E[token]);   x += time(norm(x));   x += channel(norm(x))        LayerNorms with bias; the first is stored in block 0

No positions and no window: the state has one size for ever, and `context_length` is only what it was trained with. The last norm
has ε = 1e-5 whatever `layer_norm_epsilon` says. `rescale_every` halves the stream after so many layers, with the matrices that write
to it, so that float16 does not overflow; the logits are meant to be the same, so nothing here does it.
"""

from typing import Any

from checkpoints.families.legacy import functions, write_decoder
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, rule
from nanollm.config import RWKV, Layer, ModelConfig, Norm
from nanollm.errors import ConfigError

HALVES = {
    "attention": ("time", {"key": "key", "value": "value", "receptance": "receptance", "output": "o", "time_decay": "decay", "time_first": "first",
                           "time_mix_key": "mix_k", "time_mix_value": "mix_v", "time_mix_receptance": "mix_r"}),
    "feed_forward": ("channel", {"key": "up", "value": "down", "receptance": "receptance", "time_mix_key": "mix_k",
                                 "time_mix_receptance": "mix_r"}),
}
RWKV_NAMES = override(
    {},
    rule("rwkv.embeddings", "embed"),
    rule("rwkv.blocks.0.pre_ln", "embed_norm"),
    rule("rwkv.blocks.{i}.ln1", "layers.{i}.mixer.time_norm"),
    rule("rwkv.blocks.{i}.ln2", "layers.{i}.mixer.channel_norm"),
    *(rule(f"rwkv.blocks.{{i}}.{theirs}.{name}", f"layers.{{i}}.mixer.{ours}.{mine}")
      for theirs, (ours, names) in HALVES.items() for name, mine in names.items()),
    rule("rwkv.ln_out", "norm"),
    rule("head", "head"),
)


def read(r: Reader) -> ModelConfig:
    """A layer is the mixer alone, which has both halves and their norms."""
    dim = r.size("hidden_size")
    r.must("attention_hidden_size", dim, None)
    norm = Norm("layer", eps=r.number("layer_norm_epsilon", 1e-5), bias=True)
    mixer = RWKV(dim, r.size("intermediate_size", 4 * dim, or_null=True) or 4 * dim, norm)
    return ModelConfig(
        vocab=r.size("vocab_size"),
        dim=dim,
        layers=(Layer(mixer, None, pre_mixer=None, pre_ffn=None),) * r.count("num_hidden_layers"),
        final_norm=Norm("layer", eps=1e-5, bias=True),
        tied=r.flag("tie_word_embeddings", False),
        context=r.size("context_length", 1024),
        embed_norm=norm,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """One ε for all norms but the last."""
    base = write_decoder(config, "rwkv", "RwkvForCausalLM", RWKV, type(None))
    if config.embed_norm is None:
        raise ConfigError("embed_norm is None; RWKV wants one")
    return base | {
        "attention_hidden_size": config.dim,
        "intermediate_size": config.layers[0].mixer.hidden,
        "layer_norm_epsilon": config.embed_norm.eps,
        "context_length": config.context,
    }


RWKV4 = functions("rwkv", read, write, (RWKV_NAMES,), irrelevant=frozenset({"rescale_every"}))
FAMILIES = {"rwkv": RWKV4}
