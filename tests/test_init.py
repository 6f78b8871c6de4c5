"""The table of `init_weights`: every row is measured, every parameter is drawn, and the draw is repeatable."""

import math

import pytest
import torch

from nanollm.config import (
    MLP,
    RGLRU,
    RWKV,
    Attention,
    ClippedGLU,
    FilteredAttention,
    Hyena,
    LatentAttention,
    Layer,
    Mamba,
    Mamba2,
    ModelConfig,
    MoE,
    Norm,
    Rope,
)
from nanollm.model import Decoder

DIM, LAYERS = 128, 4
CONFIG = ModelConfig(
    vocab=300, dim=DIM, final_norm=Norm(offset=1.0), positions=60, embed_norm=Norm("layer", bias=True),
    head_bias=True,
    layers=(
        Layer(Attention(4, 2, 64, Rope(), qkv_bias=True, qk_norm=Norm()), MLP(512, bias=True)),
        Layer(Attention(4, 2, 64, Rope()), MoE(4, 2, MLP(256), True, MLP(128), True)),
        Layer(Mamba(256, 16, 4, 8), None, pre_ffn=None),
        Layer(Attention(4, 2, 64, Rope()), MLP(512, gated=False), Norm("layer", bias=True)),
    ),
)
WRITES = (2 * LAYERS) ** -0.5                  # what writes to the residual stream

STANDARD_DEVIATIONS = {
    "embed.weight": 0.02, "positions.weight": 0.02, "head.weight": 0.02, "layers.0.mixer.q.weight": DIM**-0.5,
    "layers.0.mixer.v.weight": DIM**-0.5, "layers.0.mixer.o.weight": 256**-0.5 * WRITES,
    "layers.0.ffn.gate.weight": DIM**-0.5, "layers.0.ffn.up.weight": DIM**-0.5,
    "layers.0.ffn.down.weight": 512**-0.5 * WRITES, "layers.1.ffn.router.weight": DIM**-0.5,
    "layers.1.ffn.experts.gate": DIM**-0.5, "layers.1.ffn.experts.up": DIM**-0.5,
    "layers.1.ffn.experts.down": 256**-0.5 * WRITES, "layers.1.ffn.shared.down.weight": DIM**-0.5 * WRITES,
    "layers.1.ffn.shared_gate.weight": DIM**-0.5, "layers.2.mixer.in_proj.weight": DIM**-0.5,
    "layers.2.mixer.x_proj.weight": 256**-0.5, "layers.2.mixer.out_proj.weight": 256**-0.5 * WRITES,
    "layers.2.mixer.conv1d.weight": 0.5 / math.sqrt(3), "layers.2.mixer.dt_proj.weight": 8**-0.5 / math.sqrt(3),
}
CONSTANTS = {
    "norm.gain": 0.0, "embed_norm.gain": 1.0, "embed_norm.bias": 0.0, "head.bias": 0.0,
    "layers.0.pre_mixer.gain": 1.0, "layers.0.mixer.q_norm.gain": 1.0, "layers.3.pre_mixer.gain": 1.0,
    "layers.3.pre_mixer.bias": 0.0, "layers.0.mixer.q.bias": 0.0, "layers.0.ffn.down.bias": 0.0,
    "layers.2.mixer.conv1d.bias": 0.0, "layers.2.mixer.D": 1.0,
}


@pytest.fixture(scope="module")
def parameters() -> dict[str, torch.Tensor]:
    return dict(Decoder(CONFIG, seed=3).named_parameters())


@pytest.mark.parametrize("name", STANDARD_DEVIATIONS)
def test_standard_deviation(parameters, name):
    p, expected = parameters[name].detach(), STANDARD_DEVIATIONS[name]
    error = 4 / math.sqrt(2 * p.numel())                 # four standard errors of a measured standard deviation
    assert abs(p.std().item() / expected - 1) < error and abs(p.mean().item()) < 4 * expected / math.sqrt(p.numel())


@pytest.mark.parametrize("name", CONSTANTS)
def test_constant(parameters, name):
    assert (parameters[name] == CONSTANTS[name]).all()


def test_mamba_steps_and_decays(parameters):
    steps = torch.nn.functional.softplus(parameters["layers.2.mixer.dt_proj.bias"].detach())
    assert steps.min() >= 0.00099 and steps.max() <= 0.101
    logs = steps.log()  # log-uniform: mean and spread of a uniform between the logs
    assert (
        abs(logs.mean() - (math.log(0.001) + math.log(0.1)) / 2) < 0.4
        and abs(logs.std() - math.log(100) / math.sqrt(12)) < 0.2
    )
    assert torch.allclose(parameters["layers.2.mixer.A_log"][7].exp(), torch.arange(1.0, 17.0))


def test_every_parameter_is_drawn_and_the_seed_decides(parameters):
    again, other = (dict(Decoder(CONFIG, seed).named_parameters()) for seed in (3, 4))
    for name, p in parameters.items():
        assert p.isfinite().all() and torch.equal(p, again[name])
        assert name in CONSTANTS or p.unique().numel() <= 16 or not torch.equal(p, other[name]), name
    assert not torch.equal(parameters["layers.0.ffn.gate.weight"], parameters["layers.0.ffn.up.weight"])


def test_a_shallower_model_begins_with_the_same_matrices(parameters):
    """A parameter's stream belongs to its name: what else the model holds does not move it."""
    shallow = dict(Decoder(ModelConfig(vocab=300, dim=DIM, layers=CONFIG.layers[:1])).named_parameters())
    deep = dict(Decoder(CONFIG).named_parameters())
    assert torch.equal(shallow["layers.0.ffn.up.weight"], deep["layers.0.ffn.up.weight"])


def test_tied_is_one_parameter_also_after_the_meta_device():
    tied = ModelConfig(vocab=30, dim=16, layers=(Layer(Attention(2, 2, 8), MLP(8)),), tied=True)
    model = Decoder(tied)
    assert model.head.weight is model.embed.weight and "head.weight" not in dict(model.named_parameters())
    with torch.device("meta"):
        model = Decoder(tied)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    model.tie()
    assert model.head.weight is model.embed.weight and model.embed.weight.data_ptr() == model.head.weight.data_ptr()
    assert list(model.buffers()) == []


def test_filters_of_two_taps_poles_and_residues():
    layers = (Layer(FilteredAttention(Attention(4, 4, 32), 96), MLP(64)), Layer(Hyena(256, 4, 4, 3), MLP(64)))
    p = {
        name: tensor.detach()
        for name, tensor in Decoder(ModelConfig(vocab=30, dim=DIM, layers=layers)).named_parameters()
    }
    for name, expected in (
        ("layers.0.mixer.first.weight", (2 * DIM) ** -0.5), ("layers.0.mixer.second.weight", (2 * 96) ** -0.5),
        ("layers.1.mixer.residues", 4**-0.5), ("layers.1.mixer.conv1d.weight", 3**-0.5 / math.sqrt(3)),
    ):
        assert abs(p[name].std().item() / expected - 1) < 4 / math.sqrt(2 * p[name].numel()), name
    poles = torch.view_as_complex(p["layers.1.mixer.poles"])
    assert (
        poles.abs().max() < 0.95 and abs(poles.abs().square().mean() - 0.95**2 / 2) < 0.05 and poles.mean().abs() < 0.08
    )  # even over the disc
    assert (
        (p["layers.1.mixer.D"] == 1).all()
        and not p["layers.0.mixer.first.bias"].any()
        and not p["layers.1.mixer.in_proj.bias"].any()
    )


def test_latent_attention_and_experts_with_biases():
    mixer, moe = (
        LatentAttention(4, 32, 16, 24, 48, 64, Rope()),
        MoE(4, 2, ClippedGLU(64), True, router_bias=True, correction=True),
    )
    drawn = dict(Decoder(ModelConfig(60, DIM, (Layer(mixer, moe),) * 2)).named_parameters())
    for name, deviation in {
        "mixer.q_down.weight": DIM**-0.5, "mixer.q_up.weight": 64**-0.5, "mixer.kv_down.weight": DIM**-0.5,
        "mixer.kv_up.weight": 48**-0.5, "mixer.o.weight": 96**-0.5 / 2, "ffn.experts.gate": DIM**-0.5,
        "ffn.experts.down": 64**-0.5 / 2,
    }.items():
        p = drawn[f"layers.1.{name}"]
        assert abs(p.std().item() / deviation - 1) < 4 / math.sqrt(2 * p.numel()), name
    for name in ("router.bias", "router.correction", "experts.gate_bias", "experts.up_bias", "experts.down_bias"):
        assert (drawn[f"layers.1.ffn.{name}"] == 0).all(), name
    assert (drawn["layers.0.mixer.kv_norm.gain"] == 1).all()


def test_decays_of_heads_of_gated_recurrences_and_of_averages():
    layers = (
        Layer(Mamba2(64, 8, 2, 4, 4), None, pre_ffn=None), Layer(RGLRU(512, 4, 4), MLP(64)),
        Layer(RWKV(DIM, 64, Norm("layer", bias=True)), None, None, pre_ffn=None),
    )
    p = {
        name.removeprefix("layers."): tensor.detach()
        for name, tensor in Decoder(ModelConfig(vocab=30, dim=DIM, layers=layers)).named_parameters()
    }
    A = p["0.mixer.A_log"].exp()
    assert (
        1 <= A.min() < 3
        and 14 < A.max() <= 16
        and abs(A.mean() - 8.5) < 2
        and (p["0.mixer.D"] == 1).all()
        and (p["0.mixer.norm.gain"] == 1).all()
    )
    steps = torch.nn.functional.softplus(p["0.mixer.dt_bias"])
    assert 0.00099 <= steps.min() and steps.max() <= 0.101 and abs(steps.log().mean() - math.log(0.01)) < 0.6
    decay = torch.exp(-8 * torch.nn.functional.softplus(p["1.mixer.Lambda"]))
    assert 0.9 <= decay.min() < 0.902 and 0.997 < decay.max() <= 0.9991 and abs(decay.mean() - 0.9495) < 0.005
    assert (
        abs(p["1.mixer.input_gate.weight"].std() * 128**0.5 - 1) < 0.02
        and not p["1.mixer.input_gate.bias"].any()
        and not p["1.mixer.x_proj.bias"].any()
    )
    assert abs(p["1.mixer.out_proj.weight"].std() * (512 * 6) ** 0.5 - 1) < 0.02
    assert (
        torch.equal(p["2.mixer.time.decay"], torch.linspace(-5, 3, DIM))
        and (p["2.mixer.time.first"] == math.log(0.3)).all()
    )
    assert all(
        torch.equal(p[f"2.mixer.{half}"][0, 0], torch.linspace(0, 1, DIM))
        for half in ("time.mix_r", "time.mix_k", "time.mix_v", "channel.mix_r", "channel.mix_k")
    )
    for writer, width in (("time.o", DIM), ("channel.down", 64)):
        assert abs(p[f"2.mixer.{writer}.weight"].std() * (width * 6) ** 0.5 - 1) < 0.04
