"""Impossible configs are refused with the field, its value and what was expected; JSON is an exact inverse."""

import ast
import dataclasses
import inspect
import json

import pytest

from nanollm import config as c
from nanollm.errors import ConfigError

GOOD = c.ModelConfig(
    vocab=10, dim=8, tied=True, context=64,
    layers=(
        *(
            c.Layer(
                c.Attention(
                    4, 2, 8, c.Rope(scaling=c.LongRope((1.0,) * 4, (2.0,) * 4, 16)), window=3,
                    qk_norm=c.Norm(offset=1.0),
                ),
                c.MLP(16),
            ),
        )
        * 3,
        c.Layer(c.Mamba(16, 4, 4, 1), None, pre_ffn=None),
        c.Layer(
            c.Attention(4, 2, 8, c.Rope(1e6, "interleaved", 0.5, c.Yarn(4.0, 16))),
            c.MoE(4, 2, c.MLP(8), False, c.MLP(4), True), parallel=True,
        ),
    ),
)


def test_json_round_trip():
    text = json.dumps(GOOD.to_dict())
    assert c.ModelConfig.from_dict(json.loads(text)) == GOOD
    assert len(GOOD.to_dict()["layers"]) == 3, "equal layers are stored once"


@pytest.mark.parametrize(
    "scaling",
    [
        None, c.Linear(2.0), c.DynamicNTK(2.0, 8), c.Llama3(8.0, 8), c.Yarn(2.0, 8, attention_factor=1.1),
        c.LongRope((1.0,) * 4, (3.0,) * 4, 8),
    ],
)
def test_each_scaling_survives_json(scaling):
    config = dataclasses.replace(GOOD, layers=(c.Layer(c.Attention(1, 1, 8, c.Rope(scaling=scaling)), c.MLP(8)),))
    assert c.ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "broken",
    [
        {}, {"is": "ModelConfig"}, {**GOOD.to_dict(), "speed": 1}, {**GOOD.to_dict(), "layers": 3},
        {**GOOD.to_dict(), "layers": [[2, {"is": "os"}]]},
    ],
)
def test_broken_json_is_one_error(broken):
    with pytest.raises(ConfigError, match="not a ModelConfig"):
        c.ModelConfig.from_dict(broken)


@pytest.mark.parametrize("make, message", [
    (lambda: c.Attention(8, 3, 16), "Attention.kv_heads = 3: expected a divisor of heads \\(8\\)"),
    (lambda: c.Attention(0, 1, 16), "Attention.heads = 0"),
    (lambda: c.Attention(8, 8, True), "Attention.head_dim = True: expected a positive whole number"),
    (lambda: c.Attention(8, 8, 16, window=0), "Attention.window = 0"),
    (lambda: c.Attention(8, 8, 7, c.Rope()), "an even number of rotated channels, not 7 of 7"),
    (lambda: c.Attention(8, 8, 16, c.Rope(scaling=c.LongRope((1.0,), (1.0,), 8))), "LongRope lists of 8 numbers"),
    (lambda: c.Rope(theta=float("nan")), "Rope.theta = nan: expected a finite number above 0"),
    (lambda: c.Rope(layout="diagonal"), "Rope.layout = 'diagonal'"),
    (lambda: c.Rope(fraction=1.5), "Rope.fraction = 1.5"),
    (lambda: c.Llama3(8.0, 16, 4.0, 4.0), "Llama3.high = 4.0: expected more than low"),
    (lambda: c.Linear(0), "Linear.factor = 0"),
    (lambda: c.LongRope((1.0,), (1.0, 2.0), 8), "as many numbers as short"),
    (lambda: c.Norm("batch"), "Norm.kind = 'batch'"),
    (lambda: c.Norm(eps=-1.0), "Norm.eps = -1.0"),
    (lambda: c.MLP(16, "tanh"), "MLP.activation = 'tanh': expected one of silu"),
    (lambda: c.MoE(4, 5, c.MLP(8), True), "MoE.top_k = 5: expected at most experts"),
    (lambda: c.MoE(4, 2, c.MLP(8, bias=True), True), "MoE.expert"),
    (lambda: c.MoE(4, 2, c.MLP(8), 1), "MoE.renormalize = 1: expected True, False, or a number between 0 and 1"),
    (lambda: c.MoE(4, 2, c.MLP(8), True, None, True), "MoE.shared_gate = True"),
    (lambda: c.Layer(c.Mamba(8, 4, 4, 1), None), "Layer.ffn = None"),
    (lambda: c.Layer(None, None), "Layer.ffn = None"),
    (lambda: c.Layer(None, c.MLP(8)), "Layer.mixer = None: expected a mixer, or a feed-forward, no norm for it"),
    (lambda: c.Layer(c.MLP(8), c.MLP(8)), "Layer.mixer = MLP.*expected Attention, another mixer, or None"),
    (lambda: c.MoE(4, 2, c.LatentExpert(0, c.MLP(8)), True), "LatentExpert.width = 0"),
    (lambda: c.LatentExpert(4, c.MLP(8, bias=True)), "LatentExpert.mlp = .*expected an MLP without bias"),
    (lambda: c.ShortConv(8, 0), "ShortConv.conv = 0"),
    (lambda: c.Mamba2(4, 8, 1, 4, 4, scales=(1.0,)), "Mamba2.scales = .*expected 5 numbers"),
    (lambda: c.ScaledMLP(c.MLP(8, gated=False)), "ScaledMLP.mlp = .*expected an MLP with a gate"),
    (lambda: c.ParallelMixer(c.Attention(4, 2, 8, window=3), c.Mamba2(4, 8, 1, 4, 4)), "no window and no ALiBi"),
    (lambda: c.Norm(bias=True), "Norm.bias = True: expected False"),
    (lambda: c.Norm("rms_outer", offset=1.0), "Norm.offset = 1.0: expected 0 for kind 'rms_outer'"),
    (lambda: c.Norm("layer", cast_after_gain=True), "Norm.cast_after_gain = True: expected False for kind 'layer'"),
    (lambda: c.Positions(2, 2), "Positions.first = 2: expected less than rows"),
    (lambda: dataclasses.replace(GOOD, positions=0), "ModelConfig.positions = 0"),
    (lambda: c.LogLength(1), "LogLength.original = 1: expected more than 1"),
    (lambda: c.LogSteps(8, 0.0), "LogSteps.beta = 0.0"),
    (lambda: dataclasses.replace(GOOD, vocab=-1), "ModelConfig.vocab = -1"),
    (lambda: dataclasses.replace(GOOD, layers=()), "ModelConfig.layers"),
    (lambda: dataclasses.replace(GOOD, context=0.5), "ModelConfig.context = 0.5"),
])
def test_impossible_values_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_at_most_fourteen_fields_each_with_a_comment():
    lines = inspect.getsource(c).splitlines()
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.ClassDef):
            fields = [line for line in node.body if isinstance(line, ast.AnnAssign)]
            assert len(fields) <= 14, node.name
            assert (
                ast.get_docstring(node) and [f.target.id for f in fields if "  # " not in lines[f.lineno - 1]] == []
            ), node.name
