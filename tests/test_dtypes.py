"""Folders whose tensors are stored in several dtypes: one rule says what the model is computed in, for load, convert
and inspect, and the logits are those of transformers with dtype="auto"."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
from checkpoints.convert import convert, describe, plan
from checkpoints.inspect import look
from checkpoints.source import majority, open_source, said_dtype
from nanollm.errors import CheckpointError
from tests.fixtures import FIXTURES
from tests.oracles import difference, reference_logits, tokens, write
from tests.test_roundtrip import all_tensors, reload, same_tensors

FIXTURE = FIXTURES["qwen1.5-moe"]
PARTS = {
    "head": "lm_head.weight", "embedding": "model.embed_tokens.weight", "norm": "model.layers.0.input_layernorm.weight",
    "bias": "model.layers.1.self_attn.q_proj.bias", "matrix": "model.layers.1.self_attn.o_proj.weight",
    "router": "model.layers.0.mlp.gate.weight", "expert": "model.layers.1.mlp.experts.2.up_proj.weight",
}
PAIRS = [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)]


def mixed(folder, name, most, other, fixture=FIXTURE, **config):
    """A folder of one dtype, but for one tensor."""
    write(fixture, folder, most)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].to(other)
    if other.itemsize > most.itemsize:
        tensors[name] += 1e-3 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    values = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("dtype", "torch_dtype")}
    path.write_text(json.dumps(values | config))
    return tensors


def theirs_of(folder):
    """transformers' model, with the experts one by one as ours has them."""
    return reload(folder, dtype="auto", experts_implementation="eager")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("most, other", PAIRS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_one_part_in_another_dtype(part, most, other, tmp_path):
    """21 combinations: the model runs, with transformers' logits; inspect tells; convert keeps every byte."""
    name, short = PARTS[part], str(most).removeprefix("torch.")
    tensors = mixed(tmp_path / "in", name, most, other, torch_dtype=short)
    theirs, ours, x = theirs_of(tmp_path / "in"), checkpoints.load(tmp_path / "in"), tokens(FIXTURE)
    assert {p.dtype for p in ours.parameters()} == {p.dtype for p in theirs.parameters()} == {most}
    expected = reference_logits(FIXTURE, theirs, x, "sdpa")
    if most == torch.float32:
        assert difference(ours(x), expected) < FIXTURE.bound
    else:
        assert torch.equal(ours(x), expected)
    note = f"the model is {short}, as config.json says so; 1 tensor is stored in {str(other).removeprefix('torch.')}"
    assert f"{note} and becomes {short} in memory: {name}" in look(tmp_path / "in").notes
    convert(plan(open_source(tmp_path / "in")), tmp_path / "out", verify=True)
    assert same_tensors(tensors, all_tensors(tmp_path / "out"))
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == short


@pytest.mark.parametrize("part", ["head", "expert"])
def test_by_way_of_our_names_nothing_is_rounded(part, tmp_path):
    tensors = mixed(tmp_path / "in", PARTS[part], torch.bfloat16, torch.float32)
    convert(plan(open_source(tmp_path / "in"), "nanollm"), tmp_path / "own", verify=True)
    own = open_source(tmp_path / "own")
    assert own.working_dtype == torch.bfloat16
    convert(plan(own), tmp_path / "out", verify=True)
    found = all_tensors(tmp_path / "out")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key].float(), tensors[key].float()) for key in found)
    x = tokens(FIXTURE)
    assert torch.equal(checkpoints.load(tmp_path / "own")(x), checkpoints.load(tmp_path / "in")(x))


@pytest.mark.parametrize("name, part", [
    ("phi-3-mini-4k", "model.layers.1.self_attn.o_proj.weight"),
    ("phi-3-mini-4k", "model.layers.1.self_attn.qkv_proj.weight"), ("gpt2", "h.0.attn.c_attn.bias"),
])
def test_fused_arrangements(name, part, tmp_path):
    """Parts of one stored tensor are parameters of their own, and back."""
    tensors = mixed(tmp_path / "in", part, torch.bfloat16, torch.float32, FIXTURES[name], dtype="bfloat16")
    assert {p.dtype for p in checkpoints.load(tmp_path / "in").parameters()} == {torch.bfloat16}
    convert(plan(open_source(tmp_path / "in"), "nanollm"), tmp_path / "own", verify=True)
    convert(plan(open_source(tmp_path / "own")), tmp_path / "out", verify=True)
    assert same_tensors(tensors, all_tensors(tmp_path / "out"))
    convert(plan(open_source(tmp_path / "in"), dtype=torch.float32), tmp_path / "wide", verify=True)
    wide = {key: one.float() for key, one in tensors.items()}
    assert same_tensors(wide, all_tensors(tmp_path / "wide"))


def test_what_config_says_stands_and_else_the_majority_of_the_matrices(tmp_path):
    name = PARTS["embedding"]
    mixed(tmp_path / "in", name, torch.bfloat16, torch.float32, dtype="float16")
    assert {p.dtype for p in checkpoints.load(tmp_path / "in").parameters()} == {torch.float16}
    mixed(tmp_path / "silent", name, torch.bfloat16, torch.float32)
    source = open_source(tmp_path / "silent")
    assert source.working_dtype == torch.bfloat16 and {p.dtype for p in source.fill(None).parameters()} == {
        torch.bfloat16}
    assert any("as most of the weights are" in note for note in look(tmp_path / "silent").notes)
    norms = {f"n{i}": torch.empty(1000, dtype=torch.float32) for i in range(9)}
    assert majority([*norms.values(), torch.empty(2, 3, dtype=torch.float16)]) == torch.float16
    assert majority(norms.values()) == torch.float32


@pytest.mark.parametrize("values, dtype", [
    ({}, None), ({"dtype": "bfloat16"}, torch.bfloat16), ({"torch_dtype": "torch.float16"}, torch.float16),
    ({"torch_dtype": "auto"}, None), ({"dtype": 7, "torch_dtype": "float32"}, torch.float32), ({"dtype": None}, None),
    ({"text_config": {"torch_dtype": "bfloat16"}}, torch.bfloat16), ({"dtype": "float8_e4m3fn"}, None),
    ({"dtype": "float32", "text_config": {"dtype": "bfloat16"}}, torch.float32),
])
def test_what_a_config_says(values, dtype):
    assert said_dtype(values) == dtype


def test_an_island_stays_as_it_is_stored(tmp_path):
    """The correction of a router: transformers keeps it in float32 (_keep_in_fp32_modules_strict), and so do we."""
    fixture = FIXTURES["moonlight"]
    name = next(one for one in _names(fixture, tmp_path / "names") if "e_score_correction_bias" in one)
    tensors = mixed(tmp_path / "in", name, torch.bfloat16, torch.float32, fixture, torch_dtype="bfloat16")
    ours, theirs, x = checkpoints.load(tmp_path / "in"), theirs_of(tmp_path / "in"), tokens(fixture)
    kept = {name: p.dtype for name, p in ours.named_parameters() if name.endswith("correction")}
    assert torch.float32 in kept.values() and theirs.get_parameter_or_buffer(name).dtype == torch.float32
    assert torch.equal(ours(x), reference_logits(fixture, theirs, x, "sdpa"))
    assert any("1 tensor is stored in float32 and stays so" in note for note in look(tmp_path / "in").notes)
    checkpoints.save(ours, tmp_path / "out")
    assert same_tensors(tensors, all_tensors(tmp_path / "out"))


def _names(fixture, folder):
    write(fixture, folder)
    return load_file(folder / "model.safetensors")


def test_a_value_beyond_what_config_says_is_an_error(tmp_path):
    write(FIXTURES["llama-3"], tmp_path / "in")
    tensors = load_file(tmp_path / "in/model.safetensors")
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, tmp_path / "in/model.safetensors", {"format": "pt"})
    path = tmp_path / "in/config.json"
    path.write_text(path.read_text().replace('"float32"', '"float16"'))
    with pytest.raises(CheckpointError, match="model.norm.weight holds a NaN or an infinity as float16"):
        checkpoints.load(tmp_path / "in")
    assert checkpoints.load(tmp_path / "in", dtype=torch.bfloat16).norm.gain[0] > 9e4


def test_the_plan_says_what_is_cast(tmp_path):
    mixed(tmp_path / "in", PARTS["head"], torch.bfloat16, torch.float32)
    lines = list(describe(plan(open_source(tmp_path / "in"), dtype=torch.bfloat16)))
    assert [line for line in lines if "← float32" in line] == [line for line in lines if line.startswith("lm_head")]
