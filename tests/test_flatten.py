"""One file a model: its logits are those of the library to the bit, whole and cached; so are the weights it loads.

The file of every fixture is made, run and compared; nothing of nanollm is imported by it.
"""

import dataclasses
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import checkpoints
from checkpoints.families import read_config
from checkpoints.flatten import flatten
from checkpoints.flatten.build import prepared
from nanollm.cache import Cache
from nanollm.errors import ConfigError, NanollmError
from nanollm.inference.generation import generate
from tests.fixtures import FIXTURES, slow_but
from tests.oracles import hf_config, tokens, write

QUICK = ["llama-3.1", "mixtral-8x22b", "mamba-biases", "deepseek-v2", "gemma3-27b", "qwen3-next-mixed", "internlm-7b",
         "zamba2-2.7b"]
ALLOWED = {"math", "sys", "collections", "dataclasses", "pathlib", "typing", "torch", "safetensors", "tokenizers"}


def run(text: str) -> types.ModuleType:
    """The file as a module."""
    module = types.ModuleType("flat")
    exec(compile(text, "flat.py", "exec"), vars(module))
    return module


@pytest.fixture(scope="module", params=slow_but(QUICK, FIXTURES))
def flat(request, tmp_path_factory):
    """(fixture, our model, the text of the file, the module, its model)"""
    fixture, folder = FIXTURES[request.param], tmp_path_factory.mktemp("flat")
    write(fixture, folder)
    text = flatten(folder)
    module = run(text)
    return fixture, checkpoints.load(folder), text, module, module.load(folder)


def test_the_weights_are_the_same(flat):
    """Every parameter by its name, in the dtype that the library keeps it in."""
    _, ours, _, _, model = flat
    theirs = dict(model.named_parameters())
    assert theirs.keys() == dict(ours.named_parameters()).keys()
    assert all(torch.equal(theirs[name], value) and theirs[name].dtype == value.dtype
               for name, value in ours.named_parameters())


@torch.inference_mode()
def test_logits_are_equal_to_the_bit(flat):
    """Whole: one token, few, many. Cached: a prompt, single tokens past every window, chunks between them; and the
    tokens that are generated."""
    fixture, ours, _, module, model = flat
    for length in (1, 5, 80):
        x = tokens(fixture, length=length)
        assert torch.equal(model(x), ours(x)), length
    if hasattr(module, "Cache"):
        x, mine, flats = tokens(fixture, length=60), Cache(ours.config, 2, 60), module.Cache(model, 2, 60)
        for part in x.split([20, 1, 1, 7, 1, *[1] * 22, 8], 1):
            assert torch.equal(model(part, flats), ours(part, cache=mine))
    assert list(module.generate(model, [1, 2, 3], 8)) == list(generate(ours, [1, 2, 3], 8))


def test_it_stands_alone_and_is_tidy(flat):
    text = flat[2]
    found = re.findall(r"^\s*(?:from|import) ([\w.]+)", text, re.MULTILINE)
    assert {name.partition(".")[0] for name in found} <= ALLOWED
    ruff = pytest.importorskip("ruff", reason="the extra `lint` has ruff")
    settings = Path(__file__).parent.parent / "pyproject.toml"
    command = [ruff.find_ruff_bin(), "check", "--quiet", "--no-cache", "--config", settings, "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert not done.returncode, done.stdout


def test_the_same_file_every_time():
    """In another process too, where hashes differ."""
    code = "from checkpoints.flatten import flatten; print(flatten('mixtral'), end='')"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           cwd=Path(__file__).parent.parent)
    assert other.stdout == flatten("mixtral")


def test_a_llama_is_a_short_file():
    assert flatten("llama").count("\n") < 250


def test_what_cannot_be_flattened_is_said(tmp_path):
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(NanollmError):
        flatten(tmp_path)
    config = read_config(json.loads(hf_config(FIXTURES["gemma4-e2b"]).to_json_string()))[1]
    first, *rest = config.layers
    mixed = dataclasses.replace(first, end=dataclasses.replace(first.end, inputs=None, norm=None)), *rest
    with pytest.raises(ConfigError, match="some layers have a vector of their own and others none"):
        prepared(dataclasses.replace(config, layers=mixed))
    with pytest.raises(ConfigError, match="no preset"):
        flatten("no-such-model")
