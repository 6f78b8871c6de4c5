"""RoPE's frequencies: against transformers bit for bit, and against a float64 NumPy transcription of each paper."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nanollm.config import DynamicNTK, Linear, Llama3, LongRope, Rope, Yarn
from nanollm.layers.rope import frequencies, rotate, rotation_tables
from nanollm.layers.scaling import attention_factor, length_key

D = 32                                                   # rotated channels
SHORT, LONG = tuple(1 + 0.1 * j for j in range(D // 2)), tuple(2.0 + j for j in range(D // 2))


def lengths(n: int) -> torch.Tensor:
    return torch.full((1, 1), n)


# ---- the papers, in NumPy, float64; nothing of ours is used

def plain(theta):                                        # arXiv 2104.09864, §3.2.2:  θ_i = base^(−2(i−1)/d)
    return np.array([theta ** (-2 * (i - 1) / D) for i in range(1, D // 2 + 1)])


def ntk(theta, s, L, n):                                 # base · (s·n/L − (s − 1))^(d/(d−2))
    return plain(theta if n <= L else theta * ((s * n / L) - (s - 1)) ** (D / (D - 2)))


def meta_llama3(theta, s, L, low, high):                 # by wavelength, as Meta's report of Llama 3.1 describes it
    out = []
    for f in plain(theta):
        wavelength = 2 * math.pi / f
        if wavelength < L / high:
            out.append(f)
        elif wavelength > L / low:
            out.append(f / s)
        else:
            smooth = (L / wavelength - low) / (high - low)
            out.append((1 - smooth) * f / s + smooth * f)
    return np.array(out)


def by_parts(
    theta, s, L, fast, slow, truncate
):  # arXiv 2309.00071, eq. 17 and §3.2, ramp over the index as in its code
    def index(turns):
        return D * math.log(L / (turns * 2 * math.pi)) / (2 * math.log(theta))
    lo, hi = index(fast), index(slow)
    if truncate:
        lo, hi = math.floor(lo), math.ceil(hi)
    lo, hi = max(lo, 0), min(hi, D - 1)
    gamma = 1 - np.clip((np.arange(D // 2) - lo) / (hi - lo), 0, 1)
    return (1 - gamma) * plain(theta) / s + gamma * plain(theta)


CASES = {
    "default": (Rope(), 40, lambda: plain(1e4), dict(rope_type="default")),
    "theta": (Rope(theta=5e6), 40, lambda: plain(5e6), dict(rope_type="default", rope_theta=5e6)),
    "linear": (Rope(scaling=Linear(4.0)), 40, lambda: plain(1e4) / 4, dict(rope_type="linear", factor=4.0)),
    "ntk within": (
        Rope(scaling=DynamicNTK(2.0, 64)), 40, lambda: ntk(1e4, 2.0, 64, 40), dict(rope_type="dynamic", factor=2.0),
    ),
    "ntk beyond": (
        Rope(scaling=DynamicNTK(2.0, 64)), 200, lambda: ntk(1e4, 2.0, 64, 200), dict(rope_type="dynamic", factor=2.0),
    ),
    "llama3": (
        Rope(5e5, scaling=Llama3(8.0, 64)), 40, lambda: meta_llama3(5e5, 8.0, 64, 1, 4),
        dict(
            rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama3 narrow": (
        Rope(5e5, scaling=Llama3(32.0, 64, 2.0, 3.0)), 40, lambda: meta_llama3(5e5, 32.0, 64, 2, 3),
        dict(
            rope_type="llama3", rope_theta=5e5, factor=32.0, low_freq_factor=2.0, high_freq_factor=3.0,
            original_max_position_embeddings=64,
        ),
    ),
    "yarn": (
        Rope(scaling=Yarn(4.0, 64)), 40, lambda: by_parts(1e4, 4.0, 64, 32, 1, True),
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
    ),
    "yarn open": (
        Rope(1e6, scaling=Yarn(16.0, 4096, 20.0, 2.0, False, 1.5)), 40,
        lambda: by_parts(1e6, 16.0, 4096, 20, 2, False),
        dict(
            rope_type="yarn", rope_theta=1e6, factor=16.0, original_max_position_embeddings=4096, beta_fast=20.0,
            beta_slow=2.0, truncate=False, attention_factor=1.5,
        ),
    ),
    "longrope short": (
        Rope(scaling=LongRope(SHORT, LONG, 64, 1.3)), 64, lambda: plain(1e4) / SHORT,
        dict(
            rope_type="longrope", short_factor=list(SHORT), long_factor=list(LONG),
            original_max_position_embeddings=64, factor=4.0, attention_factor=1.3,
        ),
    ),
    "longrope long": (
        Rope(scaling=LongRope(SHORT, LONG, 64, 1.3)), 65, lambda: plain(1e4) / LONG,
        dict(
            rope_type="longrope", short_factor=list(SHORT), long_factor=list(LONG),
            original_max_position_embeddings=64, factor=4.0, attention_factor=1.3,
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_equal_the_paper(name):
    rope, n, paper, _ = CASES[name]
    ours = frequencies(rope, D, lengths(n)).flatten().double().numpy()
    assert np.abs(ours / paper() - 1).max() < 2e-6      # float32 powers against float64


@pytest.mark.parametrize("name", CASES)
def test_frequencies_equal_transformers(name):
    rope, n, _, parameters = CASES[name]
    parameters = {"rope_theta": 1e4, **parameters}
    config = AutoConfig.for_model(
        "llama", hidden_size=4 * D, num_attention_heads=4, max_position_embeddings=64, rope_parameters=dict(parameters)
    )
    if parameters["rope_type"] == "default":
        module = LlamaRotaryEmbedding(config)
        theirs, factor = module.inv_freq, module.attention_scaling
    else:
        theirs, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=torch.tensor(n))
    assert torch.allclose(frequencies(rope, D, lengths(n)).flatten(), theirs, rtol=3e-7)  # one rounding apart at most
    assert abs(attention_factor(rope) - factor) < 1e-12


def test_partial_rotation_counts_its_own_channels():
    """A quarter of 32 channels: frequencies of an 8-wide head; the other 24 channels pass."""
    rope, positions = Rope(fraction=0.25), torch.arange(9)[None]
    assert torch.equal(frequencies(rope, 32, positions), frequencies(Rope(), 8, positions))
    x = torch.randn(1, 2, 9, 32)
    turned = rotate(x, *rotation_tables(rope, 32, positions, positions), "half")
    assert torch.equal(turned[..., 8:], x[..., 8:]) and not torch.equal(turned[:, :, 1:, :8], x[:, :, 1:, :8])


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_scores_depend_on_the_distance_alone_and_lengths_stay(layout):
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).unbind(0)

    def score(m: int, n: int) -> float:
        def turn(x, p):
            return rotate(
                x,
                *(
                    t.double()
                    for t in rotation_tables(Rope(layout=layout), 16, torch.tensor([[p]]), torch.tensor([[p]]))
                ),
                layout,
            )
        assert abs(turn(q, m).norm() - q.norm()) < 1e-5
        return (turn(q, m) * turn(k, n)).sum().item()

    assert abs(score(3, 11) - score(103, 111)) < 1e-4 and abs(score(3, 11) - score(3, 12)) > 1e-2


def test_lengths_count_for_each_token_its_own_sequence():
    """Two documents in one row, one past the original context: only its angles change."""
    rope, n = Rope(scaling=DynamicNTK(2.0, 64)), torch.tensor([[40, 40, 200]])
    f = frequencies(rope, D, n)[0]
    assert torch.equal(f[0], f[1]) and torch.equal(f[2], frequencies(rope, D, lengths(200)).flatten())
    assert (
        length_key(rope, n).tolist() == [[64, 64, 200]]
        and length_key(Rope(), n) is None
        and length_key(None, n) is None
    )
