"""Named shapes: five families at a size for a laptop, and some of the published ones.

    preset("llama")                 = preset("llama-toy"): the demo of train.py
    preset("llama-8b")              the shape of Llama-3.1-8B; its weights come from checkpoints.load
    preset("llama-8b", vocab=5000)  the same around another tokenizer

The five toys cost about the same to train (Mamba half as much again as Llama) and differ as their families do: Qwen3
normalises each query and key head, Mistral slides a window over the last tokens, Mixtral has experts in place of the
MLP, Mamba scans instead of attending. All that attend are grouped: two query heads or three share a key/value head.
"""

import difflib
from dataclasses import replace
from functools import partial

from nanollm.config import MLP, Attention, Layer, Llama3, Mamba, ModelConfig, MoE, Norm, Rope, Scaling
from nanollm.errors import ConfigError


def transformer(
    vocab: int, dim: int, layers: int, heads: int, kv_heads: int, hidden: int, *, head_dim: int | None = None,
    theta: float = 10_000.0, scaling: Scaling | None = None, eps: float = 1e-5, window: int | None = None,
    qk_norm: bool = False, experts: int = 0, top_k: int = 2, tied: bool = False, context: int = 4096,
) -> ModelConfig:
    """Llama, and what Qwen3, Mistral and Mixtral change about it. head_dim None is dim / heads."""
    norm = Norm(eps=eps)
    attention = Attention(heads, kv_heads, head_dim or dim // heads, Rope(theta, scaling=scaling), window,
                          qk_norm=norm if qk_norm else None)
    ffn = MoE(experts, top_k, MLP(hidden), renormalize=True) if experts else MLP(hidden)
    layer = Layer(attention, ffn, pre_mixer=norm, pre_ffn=norm)
    return ModelConfig(vocab, dim, (layer,) * layers, norm, tied, context=context)


def mamba(vocab: int, dim: int, layers: int, state: int = 16) -> ModelConfig:
    """Mamba: a scan twice as wide as the model, and nothing else. Gu & Dao 2023, §3.4."""
    norm = Norm(eps=1e-5)
    layer = Layer(Mamba(inner=2 * dim, state=state, conv=4, dt_rank=-(-dim // 16)), None, pre_mixer=norm, pre_ffn=None)
    return ModelConfig(vocab, dim, (layer,) * layers, norm, tied=True, float32_residual=True)


llama3 = partial(transformer, context=131072, theta=5e5)            # what the models of a family have in common
qwen3 = partial(transformer, qk_norm=True, eps=1e-6, theta=1e6)

PRESETS = {     # vocabulary, width, layers; heads, key/value heads, feed-forward width
    "llama-toy":    partial(transformer, 4096, 128, 4, 4, 2, 320, context=128),
    "qwen3-toy":    partial(qwen3, 4096, 128, 4, 6, 2, 320, context=128, head_dim=32),
    "mistral-toy":  partial(transformer, 4096, 128, 4, 4, 2, 320, context=128, window=64),
    "mixtral-toy":  partial(transformer, 4096, 128, 4, 4, 2, 160, context=128, experts=4),
    "mamba-toy":    partial(mamba, 4096, 80, 3, state=4),
    "llama-1b":     partial(llama3, 128256, 2048, 16, 32, 8, 8192, scaling=Llama3(32.0, 8192), tied=True),  # Llama-3.2
    "llama-8b":     partial(llama3, 128256, 4096, 32, 32, 8, 14336, scaling=Llama3(8.0, 8192)),             # Llama-3.1
    "qwen3-0.6b":   partial(qwen3, 151936, 1024, 28, 16, 8, 3072, context=40960, head_dim=128, tied=True),
    "mistral-7b":   partial(transformer, 32000, 4096, 32, 32, 8, 14336, context=32768, window=4096),        # v0.1
    "mixtral-8x7b": partial(transformer, 32000, 4096, 32, 32, 8, 14336, context=32768, experts=8, theta=1e6),
    "mamba-130m":   partial(mamba, 50280, 768, 24),
    "mamba-2.8b":   partial(mamba, 50280, 2560, 64),
}


def preset(name: str, vocab: int | None = None, context: int | None = None) -> ModelConfig:
    """The shape called `name`; a family's name alone is its toy. vocab and context replace those of the table.

    Raises ConfigError for a name that is not in PRESETS, with the nearest.
    """
    key = f"{name}-toy" if f"{name}-toy" in PRESETS else name
    if key not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1)
        advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(PRESETS)}"
        raise ConfigError(f"no preset {name!r}; {advice}")
    config = PRESETS[key]()
    # Mamba has no positions, so no context either
    return replace(config, vocab=vocab or config.vocab, context=config.context and (context or config.context))
