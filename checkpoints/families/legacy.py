"""What the families that are not yet tables share. Gone when the last of them is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from checkpoints.families.family import Family
from checkpoints.names.config_table import part
from checkpoints.names.reader import Reader
from checkpoints.names.rope import read_rope, write_rope
from checkpoints.names.table import Table
from nanollm.config import MLP, Attention, Layer, ModelConfig, Norm
from nanollm.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Functions(Family):
    """A family that is two functions."""
    reads: Callable[[Reader], ModelConfig] | None = None
    writes: Callable[[ModelConfig], dict[str, Any]] | None = None

    def read(self, r: Reader) -> ModelConfig:
        return self.reads(r)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return self.writes(config)


def functions(name: str, reads: Callable, writes: Callable, tables: tuple[Table, ...], ignorable: frozenset[str] = frozenset(),
              irrelevant: frozenset[str] = frozenset(), left_out: tuple[str, ...] = (), ahead: str = "") -> Functions:
    return Functions(name, "", keys={}, layer=part(Layer), names=tables, ignorable=ignorable, irrelevant=irrelevant, left_out=left_out,
                     ahead=ahead, reads=reads, writes=writes)


# ---- reading, in the parts that the lineages share

def read_attention(
    r: Reader, theta: float = 10_000.0, context: int = 2048, kv_heads: int | None = None, head_dim: int | None = None, **more: Any
) -> Attention:
    """The keyword arguments are the family's defaults; `kv_heads` and `head_dim` of None are heads and dim / heads."""
    dim, heads = r.size("hidden_size"), r.size("num_attention_heads")
    head_dim = r.size("head_dim", head_dim, or_null=True)
    if head_dim is None and dim % heads:
        raise r.error("num_attention_heads", f"a divisor of hidden_size ({dim}) where there is no head_dim")
    kv_heads = r.size("num_key_value_heads", kv_heads, or_null=True)
    rope = read_rope(r, theta, r.size("max_position_embeddings", context))
    return Attention(heads, kv_heads or heads, head_dim or dim // heads, rope, **more)


def read_mlp(r: Reader, **more: Any) -> MLP:
    return MLP(r.size("intermediate_size"), r.activation("hidden_act", "silu"), **more)


def read_decoder(r: Reader, layers: list[Layer], norm: Norm, context: int = 2048) -> ModelConfig:
    """What surrounds the layers."""
    return ModelConfig(
        vocab=r.size("vocab_size"),
        dim=r.size("hidden_size"),
        layers=tuple(layers),
        final_norm=norm,
        tied=r.flag("tie_word_embeddings", False),
        context=r.size("max_position_embeddings", context),
    )


# ---- writing

def write_decoder(config: ModelConfig, model_type: str, architecture: str, mixer: type, ffn: type) -> dict[str, Any]:
    """What all families write. `mixer` and `ffn` are what its layers must be for the family's `write` to make sense."""
    for i, layer in enumerate(config.layers):
        for slot, kind in (("mixer", mixer), ("ffn", ffn)):
            if not isinstance(getattr(layer, slot), kind):
                raise ConfigError(f"layers[{i}].{slot} is {type(getattr(layer, slot)).__name__}, not {kind.__name__}")
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab,
        "hidden_size": config.dim,
        "num_hidden_layers": len(config.layers),
        "tie_word_embeddings": config.tied,
        "bos_token_id": None,                            # the tokenizer's to say; a missing key would mean 1
        "eos_token_id": None,                            # and here 2
        "pad_token_id": None,
        "dtype": None,                                   # what the weights are, when they are written
        "torch_dtype": None,
    }


def write_llama_shape(config: ModelConfig, model_type: str, architecture: str, ffn: type = MLP) -> dict[str, Any]:
    """What the Llama-shaped lineages write. It looks at the first layer; reading it back tells whether that was enough."""
    base = write_decoder(config, model_type, architecture, Attention, ffn)
    layer = config.layers[0]
    attention, mlp = layer.mixer, layer.ffn if ffn is MLP else layer.ffn.expert
    if attention.rope is None:
        raise ConfigError("layers[0].mixer.rope is None")
    if not isinstance(mlp, MLP):
        raise ConfigError(f"layers[0].ffn.expert is {type(mlp).__name__}, not MLP")
    return base | {
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": mlp.hidden,
        "hidden_act": "gelu_pytorch_tanh" if mlp.activation == "gelu_tanh" else mlp.activation,
        "rms_norm_eps": config.final_norm.eps,
        "max_position_embeddings": config.context,
    } | write_rope(attention.rope)
