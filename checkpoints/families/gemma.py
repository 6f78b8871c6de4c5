"""Gemma: Llama's block with a scaled embedding, norms whose gain is stored as an offset from one, and GeGLU. Tied.

    e = √D · E[token]
    x += [norm] o(attention(norm(x)));  x += [norm] down(gelu(gate(h)) · up(h)),  h = norm(x)     RMS norms with gain 1 + g

    family                [norm]  1 / scale of the scores            soft caps        layers
    Gemma 1, CodeGemma    –       √d                                 –                all full             arXiv 2403.08295
    Gemma 2               yes     √query_pre_attn_scalar: 256, but   50 on scores,    sliding 4096, full,  arXiv 2408.00118
                                  144 for 27B                        30 on logits     sliding, full …
    Gemma 3               yes     likewise, but 168 for 27B          –                5 sliding, 1 full …  arXiv 2503.19786

Gemma 3 also normalises every head of q and k, and has two RoPEs: the sliding layers (512 keys in 1B and 270M, 1024 above) turn
with base 1e4 whatever the context, the full ones with base 1e6, stretched by 8 from 4B on. Heads are 256 wide, 128 in both 27B,
whatever hidden_size is.

The product of norm and gain is rounded once, and √D is rounded to the working dtype before it multiplies (√3072 is 55.5 in
bfloat16). The gelu is always the tanh form: "hidden_act": "gelu" in the first Gemma configs means that one too.

A `gemma3` folder (4B and above) also has a vision tower. Its language model is the object "text_config", in which the hub leaves
out what is the class default; its tensors stand under language_model, and the tower's are left out.
"""

from typing import Any

from checkpoints.families.legacy import functions, read_attention, write_llama_shape
from checkpoints.families.llama import INV_FREQ, LLAMA_NAMES
from checkpoints.names.reader import IRRELEVANT, NEEDED, Reader
from checkpoints.names.rope import read_rope, write_rope
from checkpoints.names.table import moved, override, rule
from nanollm.config import MLP, Attention, Layer, ModelConfig, Norm, Rope
from nanollm.errors import ConfigError

GELU = "gelu_pytorch_tanh"
FULL, SLIDING = "full_attention", "sliding_attention"

GEMMA2_NAMES = override(
    LLAMA_NAMES,
    rule("model.layers.{i}.post_attention_layernorm", "layers.{i}.post_mixer"),
    rule("model.layers.{i}.pre_feedforward_layernorm", "layers.{i}.pre_ffn"),
    rule("model.layers.{i}.post_feedforward_layernorm", "layers.{i}.post_ffn"),
)
GEMMA3_NAMES = override(
    GEMMA2_NAMES,
    rule("model.layers.{i}.self_attn.q_norm", "layers.{i}.mixer.q_norm"),
    rule("model.layers.{i}.self_attn.k_norm", "layers.{i}.mixer.k_norm"),
)


# ---- reading

def read_norm(r: Reader) -> Norm:
    return Norm(eps=r.number("rms_norm_eps", 1e-6), offset=1.0, cast_after_gain=True)


def read_geglu(r: Reader) -> MLP:
    """Two keys for one thing, of which transformers has read the one and the other in turn. Here both must mean the tanh form."""
    r.must("hidden_act", GELU, "gelu")
    r.must("hidden_activation", GELU, None)
    return MLP(r.size("intermediate_size"), "gelu_tanh")


def read_biases(r: Reader) -> dict[str, bool]:
    bias = r.flag("attention_bias", False)
    return dict(qkv_bias=bias, out_bias=bias)


def read_scale(r: Reader, head_dim: int) -> float | None:
    """1 / √query_pre_attn_scalar; None where that is the usual 1/√d."""
    scalar = r.number("query_pre_attn_scalar", 256)
    return None if scalar == head_dim else scalar**-0.5


def read_cap(r: Reader, key: str, default: float | None) -> float | None:
    """A soft cap, which null switches off."""
    return None if r.get(key, default) is None else r.number(key, default)


def read_sliding(r: Reader, period: int) -> list[int | None]:
    """The window of each layer: what layer_types says, or else all but every `period`-th layer slide."""
    window, count = r.size("sliding_window", 4096), r.count("num_hidden_layers")
    types = r.get("layer_types", None)
    if types is None:
        r.must("_sliding_window_pattern", period)        # what transformers writes beside layer_types, and does not read
        types = [SLIDING if (i + 1) % period else FULL for i in range(count)]
    if not isinstance(types, list) or len(types) != count or not all(one in (FULL, SLIDING) for one in types):
        raise r.error("layer_types", f"{count} times {FULL} or {SLIDING}")
    return [window if one == SLIDING else None for one in types]


def read_ropes(r: Reader, context: int) -> tuple[Rope, Rope]:
    """Those of the sliding layers and of the full ones: an object for each in rope_parameters, or else rope_local_base_freq, and
    rope_theta with rope_scaling, which is for the full layers alone."""
    each, scaling = r.inside("rope_parameters"), r.inside("rope_scaling")
    ropes = []
    for kind, key, theta in ((SLIDING, "rope_local_base_freq", 1e4), (FULL, "rope_theta", 1e6)):
        own = each.inside(kind) if each else None
        given = {**(own.values if own else {}), **(scaling.values if scaling and kind == FULL else {})}
        values = {"rope_theta": r.number(key, theta, above=1), "rope_parameters": given}
        ropes.append(read_rope(Reader(values, r.where, r.ignore, r.most, f"{r.prefix}{kind}."), theta, context))
    if each:
        each.close()
    return ropes[0], ropes[1]


def read_decoder(r: Reader, layers: list[Layer], norm: Norm, context: int, vocab: Any = NEEDED, **more: Any) -> ModelConfig:
    r.must("use_bidirectional_attention", None, False)
    dim = r.size("hidden_size")
    return ModelConfig(
        vocab=r.size("vocab_size", vocab), dim=dim, layers=tuple(layers), final_norm=norm, tied=r.flag("tie_word_embeddings", True),
        context=r.size("max_position_embeddings", context), embed_scale=dim**0.5, **more,
    )


def read_gemma(r: Reader) -> ModelConfig:
    norm = read_norm(r)
    attention = read_attention(r, context=8192, kv_heads=16, head_dim=256, **read_biases(r))
    return read_decoder(r, [Layer(attention, read_geglu(r), norm, None, norm)] * r.count("num_hidden_layers"), norm, 8192)


def read_gemma2(r: Reader) -> ModelConfig:
    """Four norms a layer, two soft caps, a window on every other layer."""
    norm, mlp = read_norm(r), read_geglu(r)
    more = dict(scale=read_scale(r, r.size("head_dim", 256)), softcap=read_cap(r, "attn_logit_softcapping", 50.0), **read_biases(r))
    windows = read_sliding(r, 2)
    r.must("sliding_window_size", r.get("sliding_window", 4096))     # said twice on the hub
    layers = [Layer(read_attention(r, context=8192, kv_heads=4, head_dim=256, window=window, **more), mlp, norm, norm, norm, norm)
              for window in windows]
    return read_decoder(r, layers, norm, 8192, head_softcap=read_cap(r, "final_logit_softcapping", 30.0))


def read_gemma3(r: Reader) -> ModelConfig:
    """Sizes that the hub's text_config leaves out have the class defaults."""
    norm, mlp = read_norm(r), read_geglu(r)
    heads, kv_heads, head_dim = r.size("num_attention_heads", 8), r.size("num_key_value_heads", 4), r.size("head_dim", 256)
    more = dict(qk_norm=norm, scale=read_scale(r, head_dim), **read_biases(r))
    r.must("attn_logit_softcapping", None)               # transformers knows the key and applies none
    local, whole = read_ropes(r, r.size("max_position_embeddings", 131_072))
    layers = [Layer(Attention(heads, kv_heads, head_dim, local if window else whole, window, **more), mlp, norm, norm, norm, norm)
              for window in read_sliding(r, r.size("sliding_window_pattern", 6))]
    return read_decoder(r, layers, norm, 131_072, vocab=262_208, head_softcap=read_cap(r, "final_logit_softcapping", None))


def read_gemma3_with_vision(r: Reader) -> ModelConfig:
    """The language model, as "text_config" describes it."""
    text = r.inside("text_config")
    if text is None:
        raise r.error("text_config", "an object, the config of the language model")
    text.must("model_type", "gemma3_text")
    text.must("final_logit_softcapping", None)           # the multimodal class applies none
    config = read_gemma3(text)
    text.close(IRRELEVANT | UNREAD)
    r.must("tie_word_embeddings", config.tied)
    return config


# ---- writing

def write_gemma(config: ModelConfig) -> dict[str, Any]:
    values = write_llama_shape(config, "gemma", "GemmaForCausalLM")
    return values | {"hidden_activation": values["hidden_act"], "attention_bias": config.layers[0].mixer.out_bias}


def write_sliding(config: ModelConfig) -> dict[str, Any]:
    """layer_types; a period alone says it only where every n-th layer is full."""
    windows = [layer.mixer.window for layer in config.layers]
    return {
        "sliding_window": next((window for window in windows if window), 4096),
        "layer_types": [SLIDING if window else FULL for window in windows],
    }


def write_gemma2(config: ModelConfig) -> dict[str, Any]:
    """It looks at the first layer, but for the windows; reading it back tells whether that was enough."""
    values, attention = write_gemma(config), config.layers[0].mixer
    if config.dim % attention.heads:
        raise ConfigError(f"transformers wants dim ({config.dim}) to be a multiple of heads ({attention.heads}) here")
    return values | write_sliding(config) | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "query_pre_attn_scalar": attention.head_dim if attention.scale is None else round(attention.scale**-2),
        "attn_logit_softcapping": attention.softcap,
        "final_logit_softcapping": config.head_softcap,
    }


def write_gemma3(config: ModelConfig) -> dict[str, Any]:
    """The older keys, too; a RoPE that no layer has is written as the family's own."""
    values = write_gemma2(config)
    ropes = {SLIDING: Rope(1e4), FULL: Rope(1e6)} | {SLIDING if layer.mixer.window else FULL: layer.mixer.rope for layer in config.layers}
    if None in ropes.values():
        raise ConfigError("a layer has no rope")
    return values | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "sliding_window_pattern": [*values["layer_types"], FULL].index(FULL) + 1,
        "rope_theta": ropes[FULL].theta,
        "rope_local_base_freq": ropes[SLIDING].theta,
        "rope_scaling": write_rope(ropes[FULL])["rope_scaling"],
        "rope_parameters": {kind: write_rope(rope)["rope_parameters"] for kind, rope in ropes.items()},
    }


UNREAD = frozenset({"cache_implementation", "_sliding_window_pattern"})
GEMMA = functions("gemma", read_gemma, write_gemma, (LLAMA_NAMES,), INV_FREQ)
GEMMA2 = functions("gemma2", read_gemma2, write_gemma2, (GEMMA2_NAMES,), INV_FREQ, UNREAD)
GEMMA3 = functions("gemma3_text", read_gemma3, write_gemma3, (GEMMA3_NAMES,), INV_FREQ, UNREAD)
GEMMA3_WITH_VISION = functions(
    "gemma3_text", read_gemma3_with_vision, write_gemma3,
    tables=(moved(GEMMA3_NAMES, "", "language_model."), moved(GEMMA3_NAMES, "model.", "model.language_model.")),
    irrelevant=frozenset("vision_config mm_tokens_per_image image_token_index boi_token_index eoi_token_index image_token_id boi_token_id "
                         "eoi_token_id".split()),
    left_out=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
)
FAMILIES = {"gemma": GEMMA, "gemma2": GEMMA2, "gemma3_text": GEMMA3, "gemma3": GEMMA3_WITH_VISION}
