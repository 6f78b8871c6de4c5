"""Weights that are quantised as they are loaded: the same bits as after loading, and the memory of the result alone."""

import re
import sys

import pytest
import torch

import checkpoints
from checkpoints.source import Source
from nanollm.config import MLP, Attention, Layer, ModelConfig, MoE, Rope
from nanollm.errors import CheckpointError, InputError
from nanollm.inference.quantize import QuantizedExperts, quantize
from nanollm.model import Decoder
from tests import forked
from tests.fixtures import FIXTURES, ONE_OF_EACH, slow_but
from tests.oracles import write
from tests.test_roundtrip import ARRANGED

pytestmark = pytest.mark.filterwarnings("ignore:.*written in nanollm's own layout:UserWarning")
# experts in a tensor each, with shared ones, in one tensor transposed and interleaved, beside layers of Mamba
MIXTURES = {"mixtral-8x22b", "qwen2-moe", "gpt-oss-full-first", "deepseek-v3", "jamba"}


def same_state(a: Decoder, b: Decoder) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)


def wide(**more) -> Decoder:
    """Two kinds of layers whose widths are multiples of 64."""
    layers = (Layer(Attention(4, 2, 32, Rope(), qkv_bias=True), MLP(192)),
              Layer(Attention(4, 2, 32, Rope()), MoE(4, 2, MLP(64), True)))
    return Decoder(ModelConfig(vocab=80, dim=128, layers=layers, **more)).eval()


@pytest.mark.parametrize("name", slow_but({*ARRANGED, *MIXTURES & FIXTURES.keys()}, ONE_OF_EACH))
def test_the_bits_are_those_of_quantising_afterwards(name, tmp_path):
    write(FIXTURES[name], tmp_path / "in", torch.bfloat16)
    expected = quantize(checkpoints.load(tmp_path / "in"), 8)
    found = checkpoints.load(tmp_path / "in", quantize="int8")
    assert same_state(found, expected) and found.config == expected.config and not found.training
    assert {type(module) for module in found.modules()} == {type(module) for module in expected.modules()}


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("group", [None, 32])
def test_four_bits_in_groups_and_another_dtype(group, dtype, tmp_path):
    checkpoints.save(wide(tied=True).bfloat16(), tmp_path / "in")
    expected = quantize(checkpoints.load(tmp_path / "in", dtype=dtype), 4, group)
    found = checkpoints.load(tmp_path / "in", dtype=dtype, quantize="int4", group=group)
    assert same_state(found, expected) and found.head.weight is found.embed.weight
    assert found.layers[0].mixer.q.group == (group or 64) and found.embed.weight.dtype == (dtype or torch.bfloat16)
    assert isinstance(found.layers[1].ffn.experts, QuantizedExperts)


def test_what_cannot_be_quantised_is_refused_before_there_is_memory(tmp_path, monkeypatch):
    checkpoints.save(wide(), tmp_path / "in")
    monkeypatch.setattr(Source, "fill", lambda *_: pytest.fail("memory was taken"))
    for options, message in (
        ({"quantize": "int3"}, "quantize is 'int3'; expected int8, int4, nf4, or None"),
        ({"quantize": 4}, "quantize is 4; expected int8, int4, nf4, or None"),
        ({"quantize": "int8", "group": 32}, "group is 32, and quantize 'int8': groups go with int4"),
        ({"group": 32}, "group is 32, and quantize None: groups go with int4"),
        ({"quantize": "int4", "group": 48}, "layers.0.mixer.q: groups of 48, expected 32, 64, 128"),
        ({"quantize": "int4", "group": 128}, "layers.0.ffn.down: 192 inputs, expected a multiple of the group of 128"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            checkpoints.load(tmp_path / "in", **options)


@pytest.mark.parametrize("name", ["layers.0.mixer.q.weight", "layers.1.ffn.experts.up"])
def test_a_value_that_is_not_finite_is_named_by_its_tensor(name, tmp_path):
    model = wide()
    checkpoints.save(model, tmp_path / "in")
    path = tmp_path / "in/model.safetensors"
    find = torch.full((8,), 1234.5)
    model.get_parameter(name).data.flatten()[-8:] = find
    checkpoints.save(model, tmp_path / "other")
    content = (tmp_path / "other/model.safetensors").read_bytes()
    path.write_bytes(content.replace(find.numpy().tobytes(), torch.full((8,), torch.nan).numpy().tobytes()))
    with pytest.raises(CheckpointError, match=rf"{name} holds a NaN or an infinity"):
        checkpoints.load(tmp_path / "in", quantize="int8")


def load_and_measure() -> None:
    """The main function of a forked process: bytes that loading adds at its height, and those of the model."""
    folder, bits = sys.argv[1:]
    quantize(wide(), 4)                          # what is imported and made once
    before = forked.high_water()
    model = checkpoints.load(folder, quantize=bits)
    print(forked.high_water() - before, sum(tensor.nbytes for tensor in model.state_dict().values()))


@pytest.mark.slow
def test_peak_memory_is_that_of_the_result(tmp_path):
    """A Mixtral of 218 MB in bfloat16: resident memory of a fresh process never exceeds the packed model by more than
    30 MB. By hand, with one of 1,018 MB: int8 512 MB and 517 at the height, int4 275 and 291."""
    layer = Layer(Attention(8, 4, 64, Rope()), MoE(4, 2, MLP(2048), True))
    with torch.device("meta"):
        model = Decoder(ModelConfig(512, 512, (layer,) * 8, context=64))
    model = model.to_empty(device="cpu").bfloat16()
    model.tie()
    for parameter in model.parameters():
        parameter.data.uniform_(-1, 1)
    plain = sum(parameter.nbytes for parameter in model.parameters())
    checkpoints.save(model, tmp_path / "in", shard_bytes=50_000_000)
    for bits, part in (("int8", 0.52), ("int4", 0.33)):
        ended = forked.start(1, load_and_measure, tmp_path / "in", bits).end()
        assert ended.codes == [0], ended.said
        peak, size = map(int, ended.out.split())
        assert size < part * plain and size < peak < size + 30e6 < plain, (bits, peak, size, plain)
