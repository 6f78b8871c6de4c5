"""Qwen2 and Qwen3.

    Qwen1.5, Qwen2, Qwen2.5    model_type qwen2: bias on q, k and v and none on o, always, and no key says so
    Qwen3                      RMS norm on every query and key head; head_dim 128 whatever hidden_size is; no bias

Some layers may slide. `layer_types` says which, where it stands; before transformers 5 they were all from
`max_window_layers` on. Either counts only with `use_sliding_window`: published configs carry a `sliding_window` of 32768
or 131072 that means nothing. The small ones are tied. Vocabularies are padded (151936, 152064) past the last real token.
"""

from typing import Any

from checkpoints.families.family import Family
from checkpoints.families.llama import INV_FREQ, LLAMA_NAMES, read_attention, read_decoder, read_mlp, write_llama_shape
from checkpoints.names.reader import Reader
from checkpoints.names.table import override, rule
from nanollm.config import Layer, ModelConfig, Norm

CONTEXT = 32768                                          # what a missing max_position_embeddings means

QWEN3_NAMES = override(
    LLAMA_NAMES,
    rule("model.layers.{i}.self_attn.q_norm", "layers.{i}.mixer.q_norm"),
    rule("model.layers.{i}.self_attn.k_norm", "layers.{i}.mixer.k_norm"),
)


def read_windows(r: Reader) -> list[int | None]:
    """The window of each layer."""
    window = r.size("sliding_window", 4096, or_null=True)
    window = window if r.flag("use_sliding_window", False) else None
    first = r.get("max_window_layers", 28)
    if type(first) is not int or first < 0:
        raise r.error("max_window_layers", "a whole number")
    count = r.count("num_hidden_layers")
    types = r.get("layer_types", None)
    if types is None:
        types = ["sliding_attention" if window and i >= first else "full_attention" for i in range(count)]
    known = ("full_attention", "sliding_attention") if window else ("full_attention",)
    if not isinstance(types, list) or len(types) != count or not all(one in known for one in types):
        raise r.error("layer_types", f"{count} times {' or '.join(known)}")
    return [window if one == "sliding_attention" else None for one in types]


def read_qwen2(r: Reader) -> ModelConfig:
    norm = Norm(eps=r.number("rms_norm_eps", 1e-6))
    r.must("use_mrope", False)                           # positions in three dimensions, for images
    mlp = read_mlp(r)
    layers = [Layer(read_attention(r, context=CONTEXT, kv_heads=32, window=window, qkv_bias=True), mlp, pre_mixer=norm, pre_ffn=norm)
              for window in read_windows(r)]
    return read_decoder(r, layers, norm, CONTEXT)


def read_qwen3(r: Reader) -> ModelConfig:
    norm = Norm(eps=r.number("rms_norm_eps", 1e-6))
    bias = r.flag("attention_bias", False)
    mlp = read_mlp(r)
    more = dict(context=CONTEXT, kv_heads=32, head_dim=128, qk_norm=norm, qkv_bias=bias, out_bias=bias)
    layers = [Layer(read_attention(r, window=window, **more), mlp, pre_mixer=norm, pre_ffn=norm) for window in read_windows(r)]
    return read_decoder(r, layers, norm, CONTEXT)


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """Both ways of saying it. `max_window_layers` alone is right only where the full layers all come first."""
    windows = [layer.mixer.window for layer in config.layers]
    sliding = [i for i, window in enumerate(windows) if window is not None]
    return {
        "use_sliding_window": bool(sliding),
        "sliding_window": windows[sliding[0]] if sliding else None,
        "max_window_layers": sliding[0] if sliding else len(windows),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


def write_qwen2(config: ModelConfig) -> dict[str, Any]:
    return write_llama_shape(config, "qwen2", "Qwen2ForCausalLM") | write_windows(config)


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
    values = write_llama_shape(config, "qwen3", "Qwen3ForCausalLM") | write_windows(config)
    return values | {"attention_bias": config.layers[0].mixer.out_bias}


QWEN2 = Family("qwen2", read_qwen2, write_qwen2, (LLAMA_NAMES,), INV_FREQ)
QWEN3 = Family("qwen3", read_qwen3, write_qwen3, (QWEN3_NAMES,), INV_FREQ)
