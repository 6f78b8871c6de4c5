"""Llama, and the many that differ from it in numbers only.

    x += o(attention(norm(x)));  x += down(silu(gate(h)) · up(h)),  h = norm(x)        RMS norms, RoPE in the half layout

    family                     what it takes besides Llama's own keys
    Llama-1                    config without rope_theta, num_key_value_heads or max_position_embeddings; inv_freq on disk
    Llama-2, Orca-2, XGen      –   (Orca-2: vocab 32003)
    Llama-3, 3.1, 3.2, 3.3     theta 5e5; from 3.1 on the "llama3" scaling; 3.2 1B and 3B tied
    CodeLlama                  theta 1e6
    Vicuna, Alpaca             vocab 32001 (Alpaca); the 16k Vicunas have linear scaling
    Yi, Yi-1.5, Yi-200K        theta 5e6 and more; the first uploads have model_type "Yi" and call the norms ln1, ln2
    DeepSeek-LLM, -Coder       Coder: theta 1e5 and linear scaling by 4
    TinyLlama, SmolLM          SmolLM: tied, and two keys of its trainer
    Aquila, Aquila2            model_type "aquila"; the 16K one has linear scaling by 4
    XVERSE                     model_type "xverse", and two keys about how it was stored
    InternLM-1 as converted    attention_bias, which puts a bias on o too

The readers and the table of Llama are what the other Llama-shaped lineages (mistral.py, mixtral.py, qwen.py) start from.
"""

from typing import Any

from checkpoints.families.family import Family
from checkpoints.names.reader import Reader
from checkpoints.names.rope import read_rope, write_rope
from checkpoints.names.table import override, rule
from nanollm.config import MLP, Attention, Layer, ModelConfig, Norm
from nanollm.errors import ConfigError

LLAMA_NAMES = override(
    {},
    rule("model.embed_tokens", "embed"),
    rule("model.layers.{i}.input_layernorm", "layers.{i}.pre_mixer"),
    rule("model.layers.{i}.self_attn.q_proj", "layers.{i}.mixer.q"),
    rule("model.layers.{i}.self_attn.k_proj", "layers.{i}.mixer.k"),
    rule("model.layers.{i}.self_attn.v_proj", "layers.{i}.mixer.v"),
    rule("model.layers.{i}.self_attn.o_proj", "layers.{i}.mixer.o"),
    rule("model.layers.{i}.post_attention_layernorm", "layers.{i}.pre_ffn"),
    rule("model.layers.{i}.mlp.gate_proj", "layers.{i}.ffn.gate"),
    rule("model.layers.{i}.mlp.up_proj", "layers.{i}.ffn.up"),
    rule("model.layers.{i}.mlp.down_proj", "layers.{i}.ffn.down"),
    rule("model.norm", "norm"),
    rule("lm_head", "head"),
)
YI_NAMES = override(
    LLAMA_NAMES,
    rule("model.layers.{i}.ln1", "layers.{i}.pre_mixer"),
    rule("model.layers.{i}.ln2", "layers.{i}.pre_ffn"),
)
INV_FREQ = frozenset({"model.layers.{i}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"})


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


def read(r: Reader) -> ModelConfig:
    """Llama, and its other names with the keys that they add."""
    norm = Norm(eps=r.number("rms_norm_eps", 1e-6))
    bias = r.flag("attention_bias", False)
    r.must("rope_interleaved", False)                    # SmolLM
    r.must("quantization_bit", 0)                        # XVERSE: all its configs have it
    attention = read_attention(r, qkv_bias=bias, out_bias=bias)
    layer = Layer(attention, read_mlp(r, bias=r.flag("mlp_bias", False)), pre_mixer=norm, pre_ffn=norm)
    return read_decoder(r, [layer] * r.count("num_hidden_layers"), norm)


# ---- writing

def write_decoder(config: ModelConfig, model_type: str, architecture: str, mixer: type, ffn: type) -> dict[str, Any]:
    """What all families write. `mixer` and `ffn` are what its layers must be for the family's `write` to make sense."""
    for i, layer in enumerate(config.layers):
        for part, kind in (("mixer", mixer), ("ffn", ffn)):
            if not isinstance(getattr(layer, part), kind):
                raise ConfigError(f"layers[{i}].{part} is {type(getattr(layer, part)).__name__}, not {kind.__name__}")
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


def write(config: ModelConfig) -> dict[str, Any]:
    """One bias for all four projections and one for the MLP: a Qwen2, with biases on three, does not read back."""
    values = write_llama_shape(config, "llama", "LlamaForCausalLM")
    if config.dim % values["num_attention_heads"]:
        raise ConfigError(f"transformers' Llama wants dim ({config.dim}) to be a multiple of heads ({values['num_attention_heads']})")
    layer = config.layers[0]
    return values | {"attention_bias": layer.mixer.out_bias, "mlp_bias": layer.ffn.bias}


LLAMA = Family(
    "llama", read, write, (LLAMA_NAMES, YI_NAMES), INV_FREQ,
    irrelevant=frozenset({"max_sequence_length", "max_tokenizer_truncation", "is_llama_config", "initializer_weight", "_from_model_config"}),
)
