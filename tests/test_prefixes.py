"""Names of tensors as tools leave them: prefixes, base models saved alone, tied pairs under one name, copies in two
shards. Where transformers reads the folder too, the logits are its own."""

import json
import shutil
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file, save_model

import checkpoints
from checkpoints.convert import convert, plan
from checkpoints.inspect import look
from checkpoints.source import open_source
from nanollm.errors import CheckpointError
from tests.fixtures import FIXTURES
from tests.meta_folders import original_tensors
from tests.oracles import Fixture, difference, reference_logits, tokens, write
from tests.test_convert import MISTRAL, SHAPE
from tests.test_roundtrip import all_tensors, same_tensors

TIED = Fixture("qwen3", {"head_dim": 12, "tie_word_embeddings": True})
UNTIED = FIXTURES["llama-3"]


def renamed(folder, change):
    """The folder with other names; `change` is called with each and leaves out what it gives None for."""
    tensors = {change(name): one for name, one in load_file(folder / "model.safetensors").items()}
    tensors.pop(None, None)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def need_logits(folder, fixture, model, warning=None):
    x = tokens(fixture)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ours = checkpoints.load(folder)
    said = [str(one.message) for one in told]
    assert (not said) if warning is None else len(said) == 1 and warning in said[0], said
    assert difference(ours(x), reference_logits(fixture, model, x)) < 1e-5
    return ours


# ---- a tied pair, a base model

def test_a_tied_pair_under_the_name_of_the_head(tmp_path):
    """As safetensors' save_model writes it: of two names of one tensor it keeps the first in the alphabet."""
    model = write(TIED, tmp_path / "in")
    whole = load_file(tmp_path / "in/model.safetensors")
    save_model(model, str(tmp_path / "in/model.safetensors"), {"format": "pt"})
    stored = load_file(tmp_path / "in/model.safetensors")
    assert "lm_head.weight" in stored and "model.embed_tokens.weight" not in stored
    ours = need_logits(tmp_path / "in", TIED, model)
    assert ours.head.weight is ours.embed.weight
    convert(plan(open_source(tmp_path / "in")), tmp_path / "out", verify=True)
    assert same_tensors(all_tensors(tmp_path / "out"), whole)


def test_a_base_model_saved_alone(tmp_path):
    """Qwen3-Embedding: names without model., the head tied. transformers reads it as a whole model too."""
    model = write(TIED, tmp_path / "in")
    shutil.copytree(tmp_path / "in", tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "base")
    shutil.copyfile(tmp_path / "base/model.safetensors", tmp_path / "in/model.safetensors")
    assert "layers.0.mlp.up_proj.weight" in load_file(tmp_path / "in/model.safetensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in").eval()
    need_logits(tmp_path / "in", TIED, theirs, "a base model that was saved alone; model. is put before")
    assert any("saved alone" in note for note in look(tmp_path / "in").notes)
    with pytest.warns(UserWarning, match="saved alone"):
        convert(plan(open_source(tmp_path / "in")), tmp_path / "out", verify=True)
    assert same_tensors(all_tensors(tmp_path / "out"), all_tensors(tmp_path / "whole"))


def test_a_base_model_without_a_head(tmp_path):
    """transformers draws a random head for it, and says so in a warning; here it is an error that says so."""
    model = write(UNTIED, tmp_path / "in")
    model.model.save_pretrained(tmp_path / "base")
    shutil.copyfile(tmp_path / "base/model.safetensors", tmp_path / "in/model.safetensors")
    _, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in", output_loading_info=True)
    assert set(report["missing_keys"]) == {"lm_head.weight"}
    with pytest.raises(CheckpointError, match="without lm_head.weight, .*would draw a random one"), pytest.warns():
        checkpoints.load(tmp_path / "in")


def test_a_base_model_with_its_head(tmp_path):
    model = write(UNTIED, tmp_path / "in")
    renamed(tmp_path / "in", lambda name: name.removeprefix("model."))
    need_logits(tmp_path / "in", UNTIED, model, "model. is put before")


# ---- prefixes

@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.",
                                    "_fsdp_wrapped_module."])
def test_a_prefix_of_all_tensors(prefix, tmp_path):
    model = write(UNTIED, tmp_path / "in")
    whole = load_file(tmp_path / "in/model.safetensors")
    renamed(tmp_path / "in", lambda name: prefix + name)
    need_logits(tmp_path / "in", UNTIED, model, f"{prefix} is taken off the names of all {len(whole)} tensors")
    with pytest.warns(UserWarning, match="is taken off"):
        convert(plan(open_source(tmp_path / "in")), tmp_path / "out", verify=True)
    assert same_tensors(all_tensors(tmp_path / "out"), whole)


def test_the_language_model_of_a_multimodal_one(tmp_path):
    model = write(TIED, tmp_path / "in")
    renamed(tmp_path / "in", lambda name: name.replace("model.", "model.language_model."))
    with pytest.warns(UserWarning) as told:
        ours = checkpoints.load(tmp_path / "in")
    assert ["model.language_model. is taken off" in str(one.message) for one in told] == [True, False]
    assert difference(ours(tokens(TIED)), reference_logits(TIED, model, tokens(TIED))) < 1e-5


@pytest.mark.parametrize("inner", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
@pytest.mark.parametrize("part", ["model.", "layers.1."])
def test_a_wrapper_inside_the_names(inner, part, tmp_path):
    """Of the whole model below its head, and of one layer."""
    model = write(UNTIED, tmp_path / "in")
    count = sum(part in name for name in load_file(tmp_path / "in/model.safetensors"))
    renamed(tmp_path / "in", lambda name: name.replace(part, f"{part}{inner}."))
    need_logits(tmp_path / "in", UNTIED, model, f"{inner}. is taken out of {count} names of tensors")


def test_a_prefix_of_some_tensors(tmp_path):
    write(UNTIED, tmp_path / "in")
    renamed(tmp_path / "in", lambda name: "module." + name if "layers.1" in name else name)
    count = len(load_file(tmp_path / "in/model.safetensors"))
    with pytest.raises(CheckpointError, match=rf"9 of {count} tensor names begin with module. and the others do not"):
        checkpoints.load(tmp_path / "in")


# ---- shards

def test_copies_in_two_shards(tmp_path):
    model = write(UNTIED, tmp_path / "in", max_shard_size="60KB")
    index = json.loads((tmp_path / "in/model.safetensors.index.json").read_text())["weight_map"]
    name = "model.norm.weight"
    other = next(shard for shard in sorted(set(index.values())) if shard != index[name])
    tensors = load_file(tmp_path / "in" / other)
    copy = load_file(tmp_path / "in" / index[name])[name]
    save_file(tensors | {name: copy}, tmp_path / "in" / other, {"format": "pt"})
    need_logits(tmp_path / "in", UNTIED, model, f"in two shards with the same bytes: 1 tensor ({name}, in ")
    save_file(tensors | {name: copy + 1}, tmp_path / "in" / other, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} is in two shards, .*, with other values in each"):
        checkpoints.load(tmp_path / "in")


@pytest.mark.parametrize("name", ["v0.1", "mixtral"])
def test_mistrals_layout_in_shards(name, tmp_path):
    """As the large ones are published: consolidated-00001-of-00002.safetensors and their index."""
    fixture, params, _ = MISTRAL[name]
    model = write(fixture, tmp_path / "hf")
    more = dict(n_kv_heads=2, head_dim=fixture.keys["head_dim"], hidden_dim=96, norm_eps=1e-2, vocab_size=131)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/params.json").write_text(json.dumps(SHAPE | more | params))
    tensors, places = original_tensors(model), {}
    for number in (1, 2):
        part = dict(list(tensors.items())[number - 1 :: 2])
        shard = f"consolidated-{number:05d}-of-00002.safetensors"
        save_file(part, tmp_path / "in" / shard)
        places |= dict.fromkeys(part, shard)
    (tmp_path / "in/consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    need_logits(tmp_path / "in", fixture, model)
    report = look(tmp_path / "in")
    assert report.reason is None and report.layout == "mistral"
    convert(plan(open_source(tmp_path / "in")), tmp_path / "out", verify=True)
    assert same_tensors(all_tensors(tmp_path / "out"), all_tensors(tmp_path / "hf"))
    assert torch.equal(checkpoints.load(tmp_path / "out").embed.weight, tensors["tok_embeddings.weight"])
    (tmp_path / "in/consolidated-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="00002-of-00002.safetensors: missing; .*index.json needs it"):
        checkpoints.load(tmp_path / "in")
