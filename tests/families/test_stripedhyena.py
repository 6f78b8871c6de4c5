"""StripedHyena's keys; and the long filter: its recurrence, its form in chunks, and the convolution that both are."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

import checkpoints
from checkpoints.families import read_config, write_config
from checkpoints.families.stripedhyena import STRIPEDHYENA
from nanollm.config import MLP, Attention, Hyena, Layer, Linear, ModelConfig, Norm, Rope
from nanollm.errors import ConfigError
from nanollm.layers.hyena import long_filter
from nanollm.layers.recurrent import CHUNKED_FROM
from tests.fixtures.stripedhyena import FIXTURES
from tests.oracles import write

SIZES = dict(
    model_type="stripedhyena", vocab_size=97, hidden_size=48, inner_mlp_size=80, num_layers=3, num_attention_heads=6,
    proj_groups=3, num_filters=48, attn_layer_idxs=[1], hyena_layer_idxs=[0, 2, 4],
)


def read(**keys) -> ModelConfig:
    return read_config(SIZES | keys)[1]


# ---- config.json

def test_keys():
    norm = Norm(eps=1e-5, cast_after_gain=True)
    hyena, attention = (
        Layer(mixer, MLP(80), norm, None, norm) for mixer in (Hyena(48, 6, 2, 3), Attention(6, 2, 8, Rope(5e5)))
    )
    assert read() == ModelConfig(97, 48, (hyena, attention, hyena), norm, context=32768)
    assert read(use_flash_rmsnorm=False, eps=1e-6).final_norm == Norm("rms_outer", eps=1e-6)
    assert read(column_split_hyena=False).layers[0].mixer == Hyena(48, 1, 2, 3)
    assert read(inner_mlp_size=80, mlp_activation="gelu").layers[1].ffn == MLP(80, "gelu")
    evo = read(use_interpolated_rotary_pos_emb=True, rotary_emb_scaling_factor=16, rotary_emb_base=10000,
               qkv_proj_bias=True, mha_out_proj_bias=True, tie_embeddings=True)
    assert (
        evo.layers[1].mixer == Attention(6, 2, 8, Rope(1e4, scaling=Linear(16.0)), qkv_bias=True, out_bias=True)
        and evo.tied
    )


@pytest.mark.parametrize(
    "keys, complaint",
    [
        (
            dict(hyena_layer_idxs=[0]),
            "hyena_layer_idxs is .* expected those of the 3 layers that attn_layer_idxs does not name",
        ),
        (dict(hyena_layer_idxs=[0, 1, 2]), "hyena_layer_idxs is .* expected those of the 3 layers"),
        (dict(attn_layer_idxs="odd"), "attn_layer_idxs is 'odd'; expected a list of whole numbers"),
        (dict(attn_layer_idxs=[True]), "attn_layer_idxs is .* a list of whole numbers"),
        (dict(hyena_filter_groups=48), "hyena_filter_groups is 48"),
        (dict(num_filters=24), "num_filters is 24; expected 48"),
        (dict(short_filter_bias=False), "short_filter_bias is False"),
        (dict(final_norm=False), "final_norm is False"), (dict(smeared_gqa=True), "smeared_gqa is True"),
        (dict(mlp_activation="relu"), "mlp_activation is 'relu'"),
        (
            dict(proj_groups=4),
            "num_attention_heads is 6; expected a divisor of hidden_size .48. and a multiple of proj_groups .4.",
        ),
        (dict(hcl_layer_idxs=[2]), "nothing here knows .* hcl_layer_idxs"),  # Evo-2: filters of other kinds
    ],
)
def test_refusals(keys, complaint):
    with pytest.raises(ConfigError, match=complaint):
        read(**keys)


@pytest.mark.parametrize(
    "keys",
    [
        {}, dict(use_flash_rmsnorm=False, column_split_hyena=False),
        dict(attn_layer_idxs=[], hyena_layer_idxs=[0, 1, 2], proj_groups=1),
        dict(
            use_interpolated_rotary_pos_emb=True, rotary_emb_scaling_factor=16, tie_embeddings=True,
            mlp_activation="gelu",
        ),
    ],
)
def test_what_is_written_reads_back(keys):
    config = read(**keys)
    assert read_config(write_config(config, STRIPEDHYENA)[1])[1] == config


def test_a_folder_with_its_config_written_anew(tmp_path):
    write(FIXTURES["stripedhyena-7b"], tmp_path / "in")
    model = checkpoints.load(tmp_path / "in")
    family = model.origin.family
    values = write_config(model.config, family)[1]
    model.origin = dataclasses.replace(model.origin, values=values, names=family.tables(model.config)[0])
    checkpoints.save(model, tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert checkpoints.load(tmp_path / "out").config == model.config


# ---- the long filter

def random_filter(length: int, I: int = 3, N: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(length)
    poles = torch.polar(
        0.7 + 0.29 * torch.rand(I, N, dtype=torch.float64), 6.28 * torch.rand(I, N, dtype=torch.float64)
    )
    return [
        torch.randn(2, length, I, dtype=torch.float64), poles, torch.randn(I, N, dtype=torch.complex128),
        torch.randn(2, I, N, dtype=torch.complex128),
    ]


@pytest.mark.parametrize("length", [1, CHUNKED_FROM - 1, CHUNKED_FROM, 50])
def test_it_is_the_convolution_of_the_paper(length):
    u, p, R, S = random_filter(length)
    h = (R[..., None] * p[..., None] ** torch.arange(length)).real.sum(1)                   # (I, T)
    y, last = long_filter(u, p, R, torch.zeros_like(S))
    for t in range(length):
        assert torch.allclose(y[:, t], (h[:, : t + 1].flip(-1) * u[:, : t + 1].transpose(1, 2)).sum(-1), atol=1e-9), t
    whole = sum(p ** (length - 1 - s) * u[:, s, :, None] for s in range(length))
    assert torch.allclose(last, whole, atol=1e-9)


def test_in_pieces_with_its_state_it_is_the_same():
    u, p, R, S = random_filter(90)
    y, last = long_filter(u, p, R, S)
    parts = []
    for piece in u.split([1, 40, 1, 9, 39], 1):
        part, S = long_filter(piece, p, R, S)
        parts.append(part)
    assert torch.allclose(torch.cat(parts, 1), y, atol=1e-9) and torch.allclose(S, last, atol=1e-9)


@pytest.mark.parametrize("length", [20, 70])
def test_documents_forget_and_padding_waits(length):
    u, p, R, S = random_filter(length)
    begins, real = torch.zeros(2, length, dtype=torch.bool), torch.ones(2, length, dtype=torch.bool)
    begins[0, 13], real[1, 5:9] = True, False
    y, last = long_filter(u, p, R, S, begins, real)
    first, _ = long_filter(u[:1, :13], p, R, S[:1])
    second, end = long_filter(u[:1, 13:], p, R, torch.zeros_like(S[:1]))
    assert torch.allclose(y[:1], torch.cat([first, second], 1), atol=1e-9) and torch.allclose(last[:1], end, atol=1e-9)
    squeezed, end = long_filter(torch.cat([u[1:, :5], u[1:, 9:]], 1), p, R, S[1:])
    assert torch.allclose(torch.cat([y[1:, :5], y[1:, 9:]], 1), squeezed, atol=1e-9) and torch.allclose(
        last[1:], end, atol=1e-9
    )


def test_both_forms_have_the_same_gradients(monkeypatch):
    gradients = []
    for limit in (10**9, 1):                                                                # steps; chunks
        monkeypatch.setattr("nanollm.layers.hyena.CHUNKED_FROM", limit)
        inputs = [z.requires_grad_() for z in random_filter(37)]
        y, last = long_filter(*inputs)
        gradients.append(torch.autograd.grad((y * y).sum() + (last * last.conj()).real.sum(), inputs))
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-9, rtol=1e-9)
