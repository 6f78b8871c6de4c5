"""Which GGUF files are a model: parts of one, files without a suffix, and files that are left out.

The parts are those that the gguf package's own writer makes."""

import re

import numpy as np
import pytest
import torch

import checkpoints
from checkpoints.storage import gguf as storage
from nanollm.errors import CheckpointError
from tests.fixtures import FIXTURES
from tests.oracles import write
from tests.test_gguf import write_gguf


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write(FIXTURES["llama-3"], tmp_path_factory.mktemp("llama"))


@pytest.fixture
def parts(llama, tmp_path):
    """A model in three files or more, as split_max_tensors makes them."""
    write_gguf(tmp_path / "model.gguf", llama, split_max_tensors=10)
    found = sorted(tmp_path.glob("model-*-of-*.gguf"))
    assert len(found) > 2
    return found


def same(model, llama) -> bool:
    return torch.equal(model.embed.weight, llama.model.embed_tokens.weight) and torch.equal(
        model.layers[-1].ffn.up.weight, llama.model.layers[-1].mlp.up_proj.weight)


def test_any_part_stands_for_the_whole(parts, llama):
    for given in (parts[0].parent, parts[0], parts[1], parts[-1]):
        assert same(checkpoints.load(given), llama)


def test_a_part_is_missing_or_is_another(parts):
    whole = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=rf"one of {len(parts)} files of a model; beside it there is no "
                                              rf"{re.escape(parts[1].name)}"):
        checkpoints.load(parts[0])
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(CheckpointError, match=rf"{re.escape(parts[1].name)}: split.no is 2; expected 1"):
        checkpoints.load(parts[0])
    parts[1].write_bytes(whole)
    renamed = parts[0].with_name("first.gguf")
    parts[0].rename(renamed)
    with pytest.raises(CheckpointError, match="first.gguf: one of .* expected a name such as model-00001-of-00002"):
        checkpoints.load(renamed)


def test_the_parts_of_two_models(parts, llama):
    write_gguf(parts[0].with_name("other.gguf"), llama)
    with pytest.raises(CheckpointError, match=f"2 GGUF models; give one of them: {parts[0].name}, other.gguf"):
        checkpoints.load(parts[0].parent)


def test_known_by_its_first_bytes(llama, tmp_path):
    """As a store of blobs keeps it: no suffix, and a name that says nothing."""
    path = tmp_path / "sha256-74701a8c35f6c8d9a4b91f3f3497643001d63e0c7a84e085bed452548fa88d45"
    write_gguf(tmp_path / "x.gguf", llama).rename(path)
    assert same(checkpoints.load(path), llama)


def test_a_vision_tower_is_left_out(llama, tmp_path):
    write_gguf(tmp_path / "x.gguf", llama)
    (tmp_path / "mmproj-x.gguf").write_bytes(b"GGUF")
    with pytest.warns(UserWarning, match="left out: mmproj-x.gguf"):
        assert same(checkpoints.load(tmp_path), llama)


def test_experts_one_by_one(tmp_path):
    """Before 2024 a file had a tensor for each expert."""
    model = write(FIXTURES["mixtral-8x7b"], tmp_path / "hf")

    def apart(w, tensors):
        for name in [name for name in tensors if "_exps" in name]:
            for number, expert in enumerate(tensors.pop(name)):
                tensors[name.replace("_exps", f".{number}")] = expert.clone()

    stacked = checkpoints.load(write_gguf(tmp_path / "a.gguf", model))
    single = checkpoints.load(write_gguf(tmp_path / "b.gguf", model, apart))
    assert all(torch.equal(a, b) for a, b in zip(stacked.parameters(), single.parameters(), strict=True))


def test_a_gate_of_one_row_as_a_vector(tmp_path):
    model = write(FIXTURES["qwen1.5-moe"], tmp_path / "hf")

    def flat(w, tensors):
        for name in tensors:
            if name.endswith("gate_inp_shexp.weight"):
                tensors[name] = tensors[name][0]

    loaded = checkpoints.load(write_gguf(tmp_path / "x.gguf", model, flat))
    gate = model.model.layers[0].mlp.shared_expert_gate.weight
    assert torch.equal(loaded.layers[0].ffn.shared_gate.weight, gate)


def test_lists_are_read_when_they_are_wanted(llama, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", llama)
    metadata = storage.read_header(path).metadata
    assert storage.read_list(path, metadata["tokenizer.ggml.tokens"]) == [f"token {i}" for i in range(131)]
    assert np.allclose(storage.read_list(path, metadata["tokenizer.ggml.scores"]), 0.5)
