"""What is loaded is what is saved: names, shapes, dtypes and bytes, for every fixture; and transformers takes it
back."""

import copy
import dataclasses
import json
import pickle
import shutil
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import checkpoints
from checkpoints.export import layout_for, plan_export
from checkpoints.families import read_config, write_config
from checkpoints.layouts import hub
from checkpoints.storage.files import INDEX, read_folder
from nanollm.config import MLP, Attention, Layer, Linear, Mamba, ModelConfig, MoE, Norm, Rope
from nanollm.errors import ConfigError
from nanollm.model import Decoder
from nanollm.text import tokenizer_files
from tests import forked
from tests.fixtures import ALL, FIXTURES, ONE_OF_EACH, slow_but
from tests.oracles import difference, old_dialect, reference_logits, tokens, write


def all_tensors(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same_tensors(a, b) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        and torch.equal(a[name].view(-1).view(torch.uint8), b[name].view(-1).view(torch.uint8)) for name in a)


def reload(folder, **more):
    """As transformers loads it; nothing may be missing or left over."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", **more
    )
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("name", ALL)
def test_every_fixture_comes_back_byte_for_byte(name, tmp_path):
    write(FIXTURES[name], tmp_path / "in")
    checkpoints.save(checkpoints.load(tmp_path / "in"), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "in/model.safetensors").read_bytes()
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (tmp_path / "in/config.json").read_text()
    )
    assert (tmp_path / "out/generation_config.json").read_bytes() == (
        tmp_path / "in/generation_config.json"
    ).read_bytes()


# those whose tensors are packed, stacked, turned or renamed each in another way
ARRANGED = {
    "llama-3.1", "yi-early", "phi-4-mini", "gpt-neox-20b", "gpt2-stanford", "mixtral-8x22b", "gpt-oss-full-first",
}


@pytest.mark.parametrize("name", slow_but(ARRANGED, [*ONE_OF_EACH, "yi-early"]))
def test_bf16_in_shards(name, tmp_path):
    write(FIXTURES[name], tmp_path / "in", torch.bfloat16)
    stored = all_tensors(tmp_path / "in")
    checkpoints.save(checkpoints.load(tmp_path / "in"), tmp_path / "sharded", shard_bytes=30_000)
    assert (tmp_path / "sharded" / INDEX).exists() and len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    assert same_tensors(stored, all_tensors(tmp_path / "sharded"))
    model = checkpoints.load(tmp_path / "sharded")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    checkpoints.save(model, tmp_path / "whole")
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "in/model.safetensors").read_bytes()
    if FIXTURES[name].kind == json.loads((tmp_path / "in/config.json").read_text())["model_type"]:
        reload(tmp_path / "sharded")


@pytest.mark.parametrize("name", ["llama-3", "mixtral-8x22b"])
def test_shards_that_transformers_wrote(name, tmp_path):
    write(FIXTURES[name], tmp_path / "in", max_shard_size="40KB")
    assert (tmp_path / "in" / INDEX).exists()
    save_file(
        {"layers.0.attention.wq.weight": torch.ones(3)}, tmp_path / "in/consolidated.safetensors"
    )  # Mistral's other copy
    with pytest.warns(UserWarning, match=r"not copied to .*: other weights .*\(consolidated.safetensors\)"):
        checkpoints.save(checkpoints.load(tmp_path / "in"), tmp_path / "out")
    (tmp_path / "in/consolidated.safetensors").unlink()
    assert same_tensors(all_tensors(tmp_path / "in"), all_tensors(tmp_path / "out"))


# newer than transformers 5: no rope_scaling there
NEW_DIALECT_ONLY = {"mellum", "mistral4", "mimo_v2_flash", "laguna", "gemma4_text"}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_config_written_anew_is_read_by_transformers(name, tmp_path):
    """Its config.json is written anew by the family's table, in both dialects, and transformers' logits agree."""
    theirs = write(FIXTURES[name], tmp_path / "in")
    model = checkpoints.load(tmp_path / "in")
    family = model.origin.family
    values = write_config(model.config, family)[1]
    model.origin = dataclasses.replace(model.origin, values=values, names=family.tables(model.config)[0])
    checkpoints.save(model, tmp_path / "out")
    assert same_tensors(all_tensors(tmp_path / "in"), all_tensors(tmp_path / "out"))
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values["model_type"] == FIXTURES[name].kind and values["dtype"] == values["torch_dtype"] == "float32"
    assert checkpoints.load(tmp_path / "out").config == model.config
    x = tokens(FIXTURES[name])
    assert (
        difference(
            reference_logits(FIXTURES[name], reload(tmp_path / "out"), x), reference_logits(FIXTURES[name], theirs, x)
        )
        < 1e-6
    )
    if "rope_parameters" in values and FIXTURES[name].kind not in NEW_DIALECT_ONLY:
        del values["rope_parameters"]
        (tmp_path / "out/config.json").write_text(json.dumps(values))
        assert (
            difference(
                reference_logits(FIXTURES[name], reload(tmp_path / "out"), x),
                reference_logits(FIXTURES[name], theirs, x),
            )
            < 1e-6
        )


FRESH = {
    "llama": (Layer(Attention(6, 2, 12, Rope(5e5, scaling=Linear(2.0))), MLP(80)),) * 2,
    "mistral": (Layer(Attention(4, 1, 16, Rope(), window=9), MLP(80)),) * 2,
    "mixtral": (Layer(Attention(6, 3, 8, Rope()), MoE(4, 2, MLP(56), renormalize=True)),) * 2,
    "qwen2": (
        Layer(Attention(6, 3, 8, Rope(), qkv_bias=True), MLP(80)),
        Layer(Attention(6, 3, 8, Rope(), window=9, qkv_bias=True), MLP(80)),
    ),
    "qwen3": (Layer(Attention(6, 3, 10, Rope(), qk_norm=Norm()), MLP(80)),) * 2,
    "mamba": (Layer(Mamba(96, 8, 4, 3), None, pre_ffn=None),) * 2,
}


@pytest.mark.parametrize("name", FRESH)
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_trained_here_runs_in_transformers(name, tied, tmp_path):
    config = ModelConfig(97, 48, FRESH[name], tied=tied, context=None if name == "mamba" else 64)
    model = Decoder(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))                    # as if trained
    checkpoints.save(model, tmp_path / "out")
    x = torch.randint(0, 97, (2, 40))
    theirs = reload(tmp_path / "out")
    assert theirs.config.model_type == name and theirs.generation_config.eos_token_id is None
    with torch.inference_mode():
        assert difference(model(x), theirs(x, use_cache=False).logits) < 1e-5
    again = checkpoints.load(tmp_path / "out")
    assert again.config == config and all(
        torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True)
    )
    assert len(list(again.parameters())) == len(list(model.parameters()))


def test_changed_sizes_are_written_into_the_old_config(tmp_path):
    """Three rows more in the vocabulary: the rest of config.json is as it was, in the dialect that it was in."""
    write(FIXTURES["llama-3.2"], tmp_path / "in")
    model = checkpoints.load(tmp_path / "in")
    larger = Decoder(dataclasses.replace(model.config, vocab=134))
    larger.load_state_dict(
        {**model.state_dict(), **{name: torch.zeros(134, 64) for name in ("embed.weight", "head.weight")}}
    )
    larger.origin = model.origin
    checkpoints.save(larger, tmp_path / "out")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("in", "out"))
    assert after == before | {"vocab_size": 134} and "rope_scaling" in before and "rope_parameters" not in before
    assert reload(tmp_path / "out").model.embed_tokens.weight.shape == (134, 64)


def test_what_no_family_can_say_is_written_in_our_own_layout(tmp_path):
    """A finished run never ends without its folder: save says why it is no Hugging Face folder, and load reads it
    back."""
    write(FIXTURES["llama-3"], tmp_path / "in")
    model = checkpoints.load(tmp_path / "in")
    layers = tuple(
        dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, window=5 if i % 2 else None))
        for i, layer in enumerate(model.config.layers))
    changed = Decoder(dataclasses.replace(model.config, layers=layers))
    changed.load_state_dict(model.state_dict())
    changed.origin = model.origin
    cause = r"llama: .*window is 5, and would be read as None"
    assert (
        layout_for(model.config, model.origin) == ("hf", "")
        and layout_for(changed.config, model.origin)[0] == "nanollm"
    )
    with pytest.warns(UserWarning, match=f"written in nanollm's own layout.*{cause}"):
        checkpoints.save(changed, tmp_path / "out")
    again = checkpoints.load(tmp_path / "out")
    assert again.config == changed.config and torch.equal(again(torch.arange(9)[None]), changed(torch.arange(9)[None]))
    parameters = {name: p.data for name, p in changed.named_parameters()}
    with pytest.raises(ConfigError, match=cause):  # who asks for a Hugging Face folder is told why there is none
        plan_export(changed.config, parameters, {name: p.dtype for name, p in parameters.items()}, changed.origin, "hf")


def test_the_example_of_the_decoder_is_saved(tmp_path):
    """The config at the head of model.py, which says no context."""
    config = ModelConfig(vocab=320, dim=64, layers=(Layer(Attention(8, 2, 8, Rope()), MLP(96)),) * 2)
    with pytest.warns(UserWarning, match="max_position_embeddings is None"):
        checkpoints.save(Decoder(config), tmp_path / "out")
    assert checkpoints.load(tmp_path / "out").config == config


def test_dtype(tmp_path):
    write(FIXTURES["mamba-130m"], tmp_path / "in")
    tensors = load_file(tmp_path / "in/model.safetensors")
    mixed = {name: tensor if "A_log" in name else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(mixed, tmp_path / "in/model.safetensors", {"format": "pt"})
    assert {p.dtype for p in checkpoints.load(tmp_path / "in").parameters()} == {torch.float32}    # config.json says so
    said = json.loads((tmp_path / "in/config.json").read_text())
    (tmp_path / "in/config.json").write_text(json.dumps(said | {"dtype": "bfloat16"}))
    model, theirs = checkpoints.load(tmp_path / "in"), reload(tmp_path / "in", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    checkpoints.save(model, tmp_path / "out")
    assert same_tensors({name: one.bfloat16() for name, one in mixed.items()}, all_tensors(tmp_path / "out"))
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in checkpoints.load(tmp_path / "in", dtype=torch.float64).parameters()} == {torch.float64}


# ---- layouts of the hub, names only

def test_buffers_of_old_repositories_are_passed_over(tmp_path):
    write(FIXTURES["llama-2"], tmp_path / "in")
    tensors = load_file(tmp_path / "in/model.safetensors")
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    save_file(tensors | buffers, tmp_path / "in/model.safetensors", {"format": "pt"})
    checkpoints.save(checkpoints.load(tmp_path / "in"), tmp_path / "out")
    assert same_tensors(tensors, all_tensors(tmp_path / "out"))


@pytest.mark.parametrize(
    "name, ours, theirs",
    [
        ("yi-early", "layers.1.pre_mixer.gain", "model.layers.1.ln1.weight"),
        ("mamba-130m", "embed.weight", "backbone.embedding.weight"),
    ],
)
def test_names_of_the_first_uploads(name, ours, theirs, tmp_path):
    write(FIXTURES[name], tmp_path / "in")
    tensors = {
        key.replace("embeddings", "embedding"): tensor
        for key, tensor in load_file(tmp_path / "in/model.safetensors").items()
    }
    save_file(tensors, tmp_path / "in/model.safetensors", {"format": "pt"})
    model = checkpoints.load(tmp_path / "in")
    assert torch.equal(model.get_parameter(ours), tensors[theirs])
    checkpoints.save(model, tmp_path / "out")
    assert same_tensors(tensors, all_tensors(tmp_path / "out"))


# without rotation, or with other names for it, which the tests in tests/families/ turn back
OTHER_KEYS = {
    "mamba", "falcon_mamba", "mamba2", "jamba", "rwkv", "gpt2", "gpt_bigcode", "gpt_neox", "bloom", "mpt", "phi",
    "codegen", "opt", "biogpt", "xglm", "zamba",
}
NEW_DIALECT = [name for name, fixture in FIXTURES.items()
               if fixture.edit is None and "head_dim" not in fixture.keys and fixture.kind not in OTHER_KEYS]


@pytest.mark.parametrize("name", NEW_DIALECT)
def test_both_dialects_read_alike(name, tmp_path):
    write(FIXTURES[name], tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    old = copy.deepcopy(values)
    old_dialect()(old)
    assert old != values and read_config(old)[1] == read_config(values)[1]


# ---- what goes with a model, and what it costs

def test_what_the_tokenizer_reads_is_fetched_and_copied():
    assert set(tokenizer_files.FILES) <= set(hub.COMPANIONS)


def test_the_tokenizer_goes_with_the_model(tmp_path):
    write(FIXTURES["llama-3"], tmp_path / "in")
    for name in ("tokenizer.json", "qwen.tiktoken", "chat_template.jinja", "notes.txt", "modeling_llama.py"):
        (tmp_path / "in" / name).write_text(name)
    (tmp_path / "in" / "additional_chat_templates").mkdir()
    (tmp_path / "in" / "additional_chat_templates" / "tool_use.jinja").write_text("named")
    model = checkpoints.load(tmp_path / "in")
    with pytest.warns(UserWarning, match=r"not copied to .*: code \(modeling_llama.py\)"):
        checkpoints.save(model, tmp_path / "out")
    copied = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert copied == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "qwen.tiktoken",
        "chat_template.jinja", "additional_chat_templates/tool_use.jinja",
    }
    shutil.rmtree(tmp_path / "in")
    with pytest.warns(UserWarning, match="gone, so .* is written without tokenizer"):
        checkpoints.save(model, tmp_path / "later")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")    # torch's own, while it compiles
def test_a_compiled_model_is_saved_under_its_own_names(tmp_path):
    write(FIXTURES["llama-3"], tmp_path / "in")
    model = checkpoints.load(tmp_path / "in")
    model.layers[1] = torch.compile(model.layers[1])
    checkpoints.save(model, tmp_path / "out")
    assert same_tensors(all_tensors(tmp_path / "in"), all_tensors(tmp_path / "out"))


def load_and_measure() -> None:
    """The main function of a forked process: bytes of memory that a model adds at its height."""
    folder, dtype = sys.argv[1:]
    before = forked.high_water()
    model = checkpoints.load(folder, dtype=getattr(torch, dtype))
    print(forked.high_water() - before)
    del model


@pytest.mark.slow
def test_peak_memory_is_the_model_and_one_tensor(tmp_path):
    """Resident memory of a fresh process: a model of 96 MB in 24 tensors may take 96 MB and a little, cast or not."""
    layer = Layer(Attention(8, 8, 64, Rope()), MLP(512))
    checkpoints.save(Decoder(ModelConfig(128, 512, (layer,) * 14, context=64)), tmp_path / "in")
    size = sum(one.size for one in read_folder(tmp_path / "in").values())
    for dtype, wanted in (("float32", size), ("bfloat16", size // 2)):
        ended = forked.start(1, load_and_measure, tmp_path / "in", dtype).end()
        assert ended.codes == [0], ended.said
        assert wanted / 2 < int(ended.out) < wanted + 16e6, (dtype, ended.out, wanted)


def test_a_loaded_model_can_be_copied_and_pickled(tmp_path):
    """With where it came from, so that a copy is saved as the original would be."""
    write(FIXTURES["qwen3-0.6b"], tmp_path / "in")
    model = checkpoints.load(tmp_path / "in")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.origin.family is model.origin.family
        checkpoints.save(other, tmp_path / "out")
        assert same_tensors(all_tensors(tmp_path / "in"), all_tensors(tmp_path / "out"))
        shutil.rmtree(tmp_path / "out")


def test_a_key_that_only_the_changed_model_needs_is_written(tmp_path):
    """Baichuan says by the presence of a key that the rows of its head have length 1."""
    for name, unit in (("baichuan-7b", True), ("baichuan2-7b", False)):
        write(FIXTURES[name], tmp_path / name)
        model = checkpoints.load(tmp_path / name)
        other = Decoder(dataclasses.replace(model.config, unit_head=unit))
        other.load_state_dict(model.state_dict())
        other.origin = model.origin
        checkpoints.save(other, tmp_path / f"{name}-out")
        values = json.loads((tmp_path / f"{name}-out/config.json").read_text())
        assert values["model_type"] == "baichuan" and ("z_loss_weight" in values) == unit
        assert checkpoints.load(tmp_path / f"{name}-out").config == other.config
