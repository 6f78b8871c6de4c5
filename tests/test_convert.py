"""Conversion: every layout in, every layout out, bytes and logits, memory, and what is left when it is stopped."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import checkpoints
from checkpoints import convert
from checkpoints.families import read_config
from checkpoints.layouts import original
from checkpoints.source import open_source
from checkpoints.storage import files
from nanollm import cli
from nanollm.config import MLP, Attention, Layer, ModelConfig, Rope
from nanollm.errors import CheckpointError, ConfigError, InputError
from nanollm.model import Decoder
from tests import forked
from tests.fixtures import ALL, FIXTURES
from tests.meta_folders import original_tensors, published_logits, write_meta, write_mistral
from tests.oracles import Fixture, difference, reference_logits, rope, tokens, write
from tests.test_roundtrip import all_tensors, reload, same_tensors

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:params.json has no key for the context:UserWarning")


def converted(source, folder, to="hf", dtype=None, verify=True, allow_pickle=False, **more):
    convert.convert(
        convert.plan(open_source(Path(source), allow_pickle=allow_pickle), to, dtype), Path(folder), verify=verify,
        **more,
    )
    return folder


@pytest.fixture
def command(monkeypatch, capfd):
    """The command in this process: (exit code, standard output, standard error)."""
    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        code = 0
        try:
            cli.main(convert.run)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            print(end.code if isinstance(end.code, str) else "", file=sys.stderr)
        return code, *capfd.readouterr()
    return run


# ---- our own names, and back

@pytest.mark.parametrize("name", ALL)
def test_every_family_goes_to_our_layout_and_comes_back_byte_for_byte(name, tmp_path):
    write(FIXTURES[name], tmp_path / "in")
    converted(tmp_path / "in", tmp_path / "own", "nanollm")
    converted(tmp_path / "own", tmp_path / "out")
    for file in ("model.safetensors", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "in" / file).read_bytes()
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (tmp_path / "in/config.json").read_text()
    )
    own = load_file(tmp_path / "own/model.safetensors")
    model = checkpoints.load(tmp_path / "own")
    assert own.keys() == dict(model.named_parameters()).keys() and all(
        torch.equal(own[key], value) for key, value in model.named_parameters()
    )


def test_a_model_that_no_family_can_express_is_kept_under_our_names(tmp_path):
    other = Attention(4, 4, 12, Rope(layout="interleaved"), window=3)
    layers = (Layer(Attention(4, 2, 8, Rope()), MLP(24)), Layer(other, MLP(20, gated=False)))
    model = Decoder(ModelConfig(31, 16, layers))
    with pytest.warns(UserWarning, match="no family can express this model"):
        checkpoints.save(model, tmp_path / "own")
    again = checkpoints.load(tmp_path / "own")
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    with pytest.raises(ConfigError, match="no family can express this model"):
        converted(tmp_path / "own", tmp_path / "hf", "hf")


def test_a_model_in_our_layout_is_saved_as_it_was(tmp_path):
    write(FIXTURES["yi-early"], tmp_path / "in")
    converted(tmp_path / "in", tmp_path / "own", "nanollm")
    checkpoints.save(checkpoints.load(tmp_path / "own"), tmp_path / "out")
    assert same_tensors(all_tensors(tmp_path / "in"), all_tensors(tmp_path / "out"))


# ---- Meta's and Mistral's layouts, written by an independent script

GQA = {"vocab_size": 132, "num_key_value_heads": 4, "intermediate_size": 176}
META = {  # fixture, params.json, whether the embedding is cut by rows
    "llama-1": (
        Fixture("llama", {**GQA, "num_key_value_heads": 8}), dict(norm_eps=1e-2, vocab_size=-1, multiple_of=16),
        False,
    ),
    "llama-2-70b": (
        Fixture("llama", {**GQA, "intermediate_size": 224}),
        dict(
            norm_eps=1e-2, vocab_size=-1, n_kv_heads=4, multiple_of=32, ffn_dim_multiplier=1.3, max_seq_len=4096,
            max_batch_size=1,
        ),
        False,
    ),
    "llama-3": (
        Fixture("llama", {**GQA, **rope("default", 500_000.0)}),
        dict(norm_eps=1e-2, vocab_size=132, n_kv_heads=4, multiple_of=16, rope_theta=500_000.0), True,
    ),
    "llama-3.1": (
        Fixture(
            "llama",
            {
                **GQA,
                **rope(
                    "llama3", 500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=8192,
                ),
            },
        ),
        dict(norm_eps=1e-2, vocab_size=132, n_kv_heads=4, multiple_of=16, rope_theta=500_000.0, use_scaled_rope=True),
        True,
    ),
}
SHAPE = dict(dim=64, n_layers=3, n_heads=8)


def meta_folder(name, folder, ranks=1):
    fixture, params, by_rows = META[name]
    model = write(fixture, folder / "hf")
    params = SHAPE | params
    write_meta(model, folder / "meta", params, ranks, by_rows)
    return fixture, model, params


@pytest.mark.parametrize("name", META)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_meta_to_hugging_face(name, ranks, tmp_path):
    """Weights bit for bit, config, logits: the model that transformers wrote, from what a script made of it after
    Meta's code."""
    fixture, model, _ = meta_folder(name, tmp_path, ranks)
    converted(tmp_path / "meta", tmp_path / "out", allow_pickle=True)
    assert same_tensors(all_tensors(tmp_path / "hf"), all_tensors(tmp_path / "out"))
    known, found = (
        read_config(json.loads((tmp_path / folder / "config.json").read_text()))[1] for folder in ("hf", "out")
    )
    assert dataclasses.replace(found, context=known.context) == known
    x = tokens(fixture)
    assert (
        difference(reference_logits(fixture, reload(tmp_path / "out"), x), reference_logits(fixture, model, x)) < 1e-6
    )


@pytest.mark.parametrize("name", META)
def test_hugging_face_to_meta(name, tmp_path):
    """The tensors are those of the independent script, params.json gives the published code the same model, and
    torch.load takes the file."""
    fixture, model, params = meta_folder(name, tmp_path)
    converted(tmp_path / "hf", tmp_path / "out", "meta")
    w, said = (
        torch.load(tmp_path / "out/consolidated.00.pth", weights_only=True),
        json.loads((tmp_path / "out/params.json").read_text()),
    )
    assert same_tensors(w, original_tensors(model))
    assert original.hidden_width(64, said["multiple_of"], said.get("ffn_dim_multiplier")) == original.hidden_width(
        64, params["multiple_of"], params.get("ffn_dim_multiplier")
    )
    x = tokens(fixture)
    factor = said.get("rope_scaling_factor") if said.get("use_scaled_rope") else None
    theirs = published_logits(
        w, x, said["n_heads"], said["n_kv_heads"], said["norm_eps"], said["rope_theta"], factor=factor
    )
    assert difference(theirs, reference_logits(fixture, model, x)) < 1e-5


@pytest.mark.parametrize(
    "dim, hidden, multiple, factor",
    [
        (4096, 11008, 256, None), (5120, 13824, 256, None), (6656, 17920, 256, None), (8192, 22016, 256, None),
        (8192, 28672, 4096, 1.3), (4096, 14336, 1024, 1.3), (2048, 8192, 256, 1.5), (3072, 8192, 256, 1.0),
        (16384, 53248, 4096, 1.2),
    ],
)
def test_widths_of_published_models(dim, hidden, multiple, factor):
    """params.json of Llama 1 to 3.2 and the intermediate_size of their config.json; what we write gives the same."""
    assert original.hidden_width(dim, multiple, factor) == hidden
    said = original._width_in_words(dim, hidden)
    assert original.hidden_width(dim, said["multiple_of"], said.get("ffn_dim_multiplier")) == hidden


def test_a_meta_folder_is_the_published_model(tmp_path):
    """Read as it is, with neighbours in RoPE: our logits are those of the published forward pass, and saving
    turns it into Hugging Face's."""
    fixture, model, params = meta_folder("llama-3.1", tmp_path)
    source = open_source(tmp_path / "meta", allow_pickle=True)
    assert source.config.layers[0].mixer.rope.layout == "interleaved" and source.config.context == 131_072
    converted(tmp_path / "meta", tmp_path / "own", "nanollm", allow_pickle=True)
    ours, x = checkpoints.load(tmp_path / "own"), tokens(fixture)
    w = original_tensors(model)
    assert (
        torch.equal(ours.layers[1].mixer.q.weight, w["layers.1.attention.wq.weight"]) and ours.config == source.config
    )
    assert difference(ours(x), published_logits(w, x, 8, 4, 1e-2, 5e5, factor=8.0)) < 1e-5
    converted(tmp_path / "own", tmp_path / "out")
    assert (
        same_tensors(all_tensors(tmp_path / "hf"), all_tensors(tmp_path / "out"))
        and json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "llama"
    )
    converted(tmp_path / "own", tmp_path / "again", "meta")
    assert same_tensors(torch.load(tmp_path / "again/consolidated.00.pth", weights_only=True), w)


def test_a_tied_head_and_the_sizes_of_llama_3_2(tmp_path):
    """Meta stores the head although it is the embedding; and 3.2's stretch follows from its sizes, as params.json
    has nothing to tell it by."""
    assert (
        original.read_params(dict(dim=2048, n_layers=16, n_heads=32, use_scaled_rope=True), "x", "llama", 9, True)[
            "rope_scaling"
        ]["factor"]
        == 32.0
    )
    assert (
        original.read_params(dict(dim=4096, n_layers=32, n_heads=32, use_scaled_rope=True), "x", "llama", 9, True)[
            "rope_scaling"
        ]["factor"]
        == 8.0
    )
    fixture = Fixture("llama", {**GQA, "tie_word_embeddings": True})
    model = write(fixture, tmp_path / "hf")
    write_meta(model, tmp_path / "meta", SHAPE | META["llama-1"][1] | {"n_kv_heads": 4})
    converted(tmp_path / "meta", tmp_path / "out", allow_pickle=True)
    assert same_tensors(
        all_tensors(tmp_path / "hf"), all_tensors(tmp_path / "out")
    ) and "lm_head.weight" not in all_tensors(tmp_path / "out")
    converted(tmp_path / "hf", tmp_path / "back", "meta")
    back = torch.load(tmp_path / "back/consolidated.00.pth", weights_only=True)
    assert same_tensors(back, original_tensors(model)) and torch.equal(
        back["output.weight"], back["tok_embeddings.weight"]
    )


MISTRAL = {
    "v0.1": (
        Fixture("mistral", {"sliding_window": 9, "head_dim": 8}), dict(sliding_window=9), dict(window=9, theta=1e4),
    ),
    "v0.3": (
        Fixture("mistral", {"sliding_window": None, **rope("default", 1e6), "head_dim": 8}), dict(rope_theta=1e6),
        dict(theta=1e6),
    ),
    "nemo": (Fixture("mistral", {"sliding_window": None, **rope("default", 1e6), "head_dim": 12}), {}, dict(theta=1e6)),
    "mixtral": (
        Fixture(
            "mixtral",
            {
                "num_local_experts": 4, "num_experts_per_tok": 2, **rope("default", 1e6), "sliding_window": None,
                "head_dim": 8,
            },
        ),
        dict(rope_theta=1e6, moe={"num_experts": 4, "num_experts_per_tok": 2}), dict(theta=1e6, top_k=2),
    ),
}


@pytest.mark.parametrize("name", MISTRAL)
def test_mistral_both_ways(name, tmp_path):
    fixture, params, more = MISTRAL[name]
    model = write(fixture, tmp_path / "hf")
    head_dim = fixture.keys["head_dim"]
    params = SHAPE | dict(n_kv_heads=2, head_dim=head_dim, hidden_dim=96, norm_eps=1e-2, vocab_size=131) | params
    write_mistral(model, tmp_path / "mistral", params)
    x, w = tokens(fixture), original_tensors(model)
    theirs = reference_logits(fixture, model, x)
    assert difference(published_logits(w, x, 8, 2, 1e-2, head_dim=head_dim, **more), theirs) < 1e-5
    assert difference(checkpoints.load(tmp_path / "mistral")(x), theirs) < 1e-5
    converted(tmp_path / "mistral", tmp_path / "out")
    assert same_tensors(all_tensors(tmp_path / "hf"), all_tensors(tmp_path / "out"))
    assert difference(reference_logits(fixture, reload(tmp_path / "out"), x), theirs) < 1e-6
    checkpoints.save(checkpoints.load(tmp_path / "mistral"), tmp_path / "saved")
    assert same_tensors(all_tensors(tmp_path / "hf"), all_tensors(tmp_path / "saved"))
    converted(tmp_path / "hf", tmp_path / "back", "mistral")
    assert same_tensors(load_file(tmp_path / "back/consolidated.safetensors"), w)
    said = json.loads((tmp_path / "back/params.json").read_text())
    assert {key: said.get(key) for key in params if key != "rope_theta"} == {
        key: params[key] for key in params if key != "rope_theta"
    } and said["rope_theta"] == more["theta"]


def test_what_an_original_layout_cannot_say_is_refused(tmp_path):
    for name, to, cause in (
        ("vicuna-16k", "meta", r"params.json cannot say what the model is: config.layers\[0\].mixer.rope.scaling"),
        ("qwen3-8b", "meta", "a qwen3 model has no meta layout; it is one of llama"),
        ("llama-3", "mistral", "a llama model has no mistral layout"),
        ("llama-biases", "meta", r"params.json cannot say what the model is: .*\.head_dim is 10"),
        ("mamba-130m", "meta", "a mamba model has no meta layout"),
    ):
        write(FIXTURES[name], tmp_path / name)
        with pytest.raises(ConfigError, match=cause):
            converted(tmp_path / name, tmp_path / "out", to)
        assert not (tmp_path / "out").exists()


# ---- pickles

def as_pickle(folder, *parts, names=None):
    """The folder with its weights in pytorch_model.bin, or in shards of these many tensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if not parts:
        torch.save(tensors, folder / "pytorch_model.bin")
        return tensors
    places, left = {}, list(tensors)
    for number, part in enumerate([left[:parts[0]], left[parts[0]:]], 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: torch.nn.Parameter(tensors[name]) for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tensors


@pytest.mark.parametrize(
    "name", ["gpt2", "bloom-7b1", "mamba-original", "mamba2-130m", "stripedhyena-first", "chatglm2-6b"]
)
@pytest.mark.parametrize("parts", [(), (3,)])
def test_pickles_where_they_are_allowed(name, parts, tmp_path):
    write(FIXTURES[name], tmp_path / "in")
    tensors = as_pickle(tmp_path / "in", *parts)
    with pytest.raises(CheckpointError, match="only pickled weights .*--allow-pickle"):
        checkpoints.load(tmp_path / "in")
    converted(tmp_path / "in", tmp_path / "out", allow_pickle=True)
    assert same_tensors(tensors, all_tensors(tmp_path / "out"))


@pytest.mark.filterwarnings("ignore:.*other weights:UserWarning")
def test_a_file_in_place_of_its_folder(tmp_path):
    """Where a folder holds the weights twice, or under another name."""
    write(FIXTURES["llama-3"], tmp_path / "in")
    tensors = load_file(tmp_path / "in/model.safetensors")
    torch.save({"model": tensors}, tmp_path / "in/model.pt")
    (tmp_path / "in/model.safetensors").rename(tmp_path / "in/weights.safetensors")
    with pytest.raises(
        CheckpointError, match="neither model.safetensors nor .*model.pt, weights.safetensors follow another layout"
    ):
        open_source(tmp_path / "in")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(model.pt\)"):
        open_source(tmp_path / "in/model.pt")
    for name in ("model.pt", "weights.safetensors"):
        converted(tmp_path / "in" / name, tmp_path / name, allow_pickle=True)
        assert same_tensors(tensors, all_tensors(tmp_path / name))
    with pytest.raises(CheckpointError, match="generation_config.json: a model folder expected, or one of its files"):
        open_source(tmp_path / "in/generation_config.json")


def test_tensors_that_share_a_storage_are_read_each_for_itself(tmp_path):
    write(FIXTURES["llama-3"], tmp_path / "in")
    tensors = as_pickle(tmp_path / "in")
    packed = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    parts = packed.split([tensor.numel() for tensor in tensors.values()])
    torch.save(
        {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)},
        tmp_path / "in/pytorch_model.bin",
    )
    converted(tmp_path / "in", tmp_path / "out", allow_pickle=True)
    assert same_tensors(tensors, all_tensors(tmp_path / "out"))


# ---- what can be asked for

@pytest.mark.parametrize("name", ["llama-3", "mamba-130m", "gpt-oss-20b"])
def test_casts_are_those_of_load(name, tmp_path):
    write(FIXTURES[name], tmp_path / "in")
    converted(tmp_path / "in", tmp_path / "out", dtype=torch.bfloat16)
    checkpoints.save(checkpoints.load(tmp_path / "in", dtype=torch.bfloat16), tmp_path / "saved")
    assert same_tensors(all_tensors(tmp_path / "saved"), all_tensors(tmp_path / "out"))
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert "bfloat16" in (said.get("dtype"), said.get("torch_dtype"))


def test_shards(tmp_path):
    write(FIXTURES["mixtral-8x7b"], tmp_path / "in", max_shard_size="60KB")
    converted(tmp_path / "in", tmp_path / "out", shard_bytes=30_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert same_tensors(all_tensors(tmp_path / "in"), all_tensors(tmp_path / "out"))
    reload(tmp_path / "out")


def test_sizes():
    texts = ("5GB", "500 MB", "2GiB", "1.5kB", "7", "7B", "5G", "1TB", "2T", "500M", "3GI", "5000000000")
    assert [convert.size(text) for text in texts] == [
        5 * 10**9, 5 * 10**8, 2**31, 1500, 7, 7, 5 * 10**9, 10**12, 2 * 10**12, 5 * 10**8, 3 * 2**30, 5 * 10**9,
    ]
    for text in ("", "GB", "5 PB", "-1GB", "0", "1e9", "9" * 400):
        with pytest.raises(InputError, match="--shard-size .*expected a size"):
            convert.size(text)


def test_the_command(tmp_path, command):
    """The plan, the work, the comparison; then what it refuses, in one line and without a folder."""
    write(FIXTURES["qwen3-8b"], tmp_path / "in")
    config = json.loads((tmp_path / "in/config.json").read_text())
    (tmp_path / "in/tokenizer.json").write_text("{}")
    code, out, _ = command(tmp_path / "in", tmp_path / "out", "--dry-run", "--to", "nanollm", "--dtype", "bfloat16")
    assert (
        code == 0
        and not (tmp_path / "out").exists()
        and len(out.splitlines()) == 1 + len(load_file(tmp_path / "in/model.safetensors"))
    )
    source = r"float32 model\.layers\.1\.self_attn\.q_proj\.weight  model\.safetensors"
    assert re.search(rf"^layers\.1\.mixer\.q\.weight +bfloat16 +\d+×64  ← {source}$", out, re.MULTILINE)
    code, out, _ = command(tmp_path / "in", tmp_path / "out", "--verify", "--shard-size", "50KB")
    assert (
        code == 0
        and "read back equal" in out
        and (tmp_path / "out/tokenizer.json").exists()
        and (tmp_path / "out" / files.INDEX).exists()
    )
    assert command(tmp_path / "in", tmp_path / "out")[2].endswith(
        "exists and is not an empty folder; nothing is overwritten\n"
    )
    del config["model_type"], config["architectures"]
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    code, _, said = command(tmp_path / "in", tmp_path / "new")
    assert code == 1 and said.startswith("error: ") and said.count("\n") == 1 and "model_type is None" in said
    assert command(tmp_path / "in", tmp_path / "new", "--family", "qwen3")[0] == 0
    assert "did you mean --dtype?" in command("a", "b", "--dtyp", "x")[2]


@pytest.mark.slow
def test_python_m_and_a_closed_pipe(tmp_path):
    write(FIXTURES["llama-3"], tmp_path / "in")
    ran = subprocess.run(
        f"{sys.executable} -m checkpoints.convert {tmp_path}/in {tmp_path}/out --dry-run | head -1", shell=True,
        cwd=ROOT, capture_output=True, text=True,
    )
    assert "(llama, hf) → " in ran.stdout and ran.stderr == "" and ran.returncode == 0


def test_fused_arrangements_are_said_in_the_plan(tmp_path):
    write(FIXTURES["phi-3-mini-4k"], tmp_path / "in")
    lines = list(convert.describe(convert.plan(open_source(tmp_path / "in"), "nanollm")))
    source = r"model\.layers\.0\.self_attn\.qkv_proj\.weight  model\.safetensors"
    assert any(re.match(rf"layers\.0\.mixer\.k\.weight .* ← {source}   as Blocks → Same", line) for line in lines)


# ---- what can go wrong

def test_verify_finds_a_bit(tmp_path, monkeypatch):
    write(FIXTURES["phi-3-mini-4k"], tmp_path / "in")
    real = os.pwrite

    def flipped(file, data, place):
        wrong = bytearray(data)
        if len(wrong) == 64 * 64 * 4:
            wrong[100] ^= 1
        return real(file, wrong, place)

    monkeypatch.setattr(os, "pwrite", flipped)
    for to in ("hf", "nanollm"):
        converted(tmp_path / "in", tmp_path / f"{to}-unseen", to, verify=False)
        with pytest.raises(CheckpointError, match=r"o_proj\.weight|mixer\.\w\.weight: what was written is not"):
            converted(tmp_path / "in", tmp_path / "out", to)
        assert not (tmp_path / "out").exists()


def test_a_full_disk(tmp_path, monkeypatch):
    write(FIXTURES["llama-3"], tmp_path / "in")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(CheckpointError, match=r"[\d,]+ bytes to write, and 10 free on that disk; nothing was written"):
        converted(tmp_path / "in", tmp_path / "out")
    monkeypatch.undo()
    real, calls = os.pwrite, iter(range(10**6))

    def full(file, data, place):
        if next(calls) == 20:
            raise OSError(28, "No space left on device")
        return real(file, data, place)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CheckpointError, match="out: cannot write: .*No space left"):
        converted(tmp_path / "in", tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


def test_a_nan_on_its_way(tmp_path):
    write(FIXTURES["phi-3-mini-4k"], tmp_path / "in")
    tensors = load_file(tmp_path / "in/model.safetensors")
    tensors["model.layers.1.self_attn.qkv_proj.weight"][3, 3] = torch.nan
    save_file(tensors, tmp_path / "in/model.safetensors", {"format": "pt"})
    for to in ("hf", "nanollm"):
        with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.qkv_proj\.weight holds a NaN"):
            converted(tmp_path / "in", tmp_path / "out", to)
    assert os.listdir(tmp_path) == ["in"]


def killed_at(place: int | None, source: Path, folder: Path, count: Path) -> int:
    """The wait status of a process that converts, and dies of SIGKILL before it asks the disk for the `place`th time.

    place None: it lives, and writes into `count` how often it asked."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    asked = 0

    def ask(*ignored) -> None:
        nonlocal asked
        asked += 1
        if asked == place:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(function):
        return lambda *args: (ask(), function(*args))[1]

    os.pwrite, os.fsync = watched(os.pwrite), watched(os.fsync)
    sys.addaudithook(lambda event, args: ask() if event in ("open", "os.mkdir", "os.rename", "os.remove") else None)
    try:
        converted(source, folder)
        count.write_text(str(asked))
    finally:
        os._exit(0)


def test_killed_at_20_places(tmp_path):
    """Each time there is no folder, or all of it; the next run succeeds, and takes away what the killed one left."""
    layer = Layer(Attention(8, 8, 8, Rope()), MLP(64))
    checkpoints.save(Decoder(ModelConfig(128, 64, (layer,) * 4, context=64)), tmp_path / "in", shard_bytes=100_000)
    wanted, rng, count = all_tensors(tmp_path / "in"), random.Random(0), tmp_path / "count"
    converted(tmp_path / "in", tmp_path / "out")            # once here: what is imported on the way is a file too
    shutil.rmtree(tmp_path / "out")
    assert killed_at(None, tmp_path / "in", tmp_path / "out", count) == 0
    places = int(count.read_text())
    count.unlink()
    seen = {"nothing": 0, "all": 0, "left": 0}
    for place in sorted({*rng.sample(range(1, places - 2), 17), *range(places - 2, places + 1)}):
        folder = tmp_path / str(place)
        folder.mkdir()
        assert killed_at(place, tmp_path / "in", folder / "out", count) == signal.SIGKILL
        seen["left"] += any(path.name.endswith(".tmp") for path in folder.iterdir())
        seen["all" if (folder / "out").exists() else "nothing"] += 1
        if not (folder / "out").exists():
            converted(tmp_path / "in", folder / "out")
        assert os.listdir(folder) == ["out"] and same_tensors(all_tensors(folder / "out"), wanted)
    assert seen["nothing"] >= 5 and seen["left"] >= 3 and seen["all"] >= 2, seen


def convert_and_measure() -> None:
    """The main function of a forked process: bytes of memory that a conversion adds at its height."""
    source, folder, to, dtype = sys.argv[1:]
    torch.isfinite(torch.aminmax(torch.ones(10))[0])
    before = forked.high_water()
    converted(source, folder, to, getattr(torch, dtype), allow_pickle=True)
    print(forked.high_water() - before)


@pytest.mark.slow
def test_peak_memory_is_one_rule(tmp_path):
    """Resident memory of a fresh process, above what it was before: less than 1.5 times the largest rule, whatever the
    arrangement."""
    dim, hidden = 1024, 12288
    layer = Layer(Attention(8, 8, 128, Rope()), MLP(hidden))
    write_large = Decoder(ModelConfig(128, dim, (layer,) * 2, context=64))
    checkpoints.save(write_large, tmp_path / "llama")                          # largest: gate, up or down, 48 MB
    config = transformers.Phi3Config(
        vocab_size=128, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8, pad_token_id=None, max_position_embeddings=64, original_max_position_embeddings=64)
    config.save_pretrained(tmp_path / "phi3")                                  # largest: gate and up in one, 96 MB
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in transformers.Phi3ForCausalLM(config).named_parameters()}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "phi3/model.safetensors")
    converted(tmp_path / "phi3", tmp_path / "own", "nanollm", verify=False)
    converted(tmp_path / "llama", tmp_path / "meta", "meta", verify=False)
    megabytes = {}
    for name, to, dtype, rule in (
        ("llama", "hf", "float32", 48), ("llama", "meta", "bfloat16", 48), ("meta", "hf", "float32", 48),
        ("phi3", "nanollm", "float32", 96), ("own", "hf", "float32", 96),
    ):
        folders = tmp_path / name, tmp_path / f"{name}-{to}-{dtype}"
        ended = forked.start(1, convert_and_measure, *folders, to, dtype).end()
        assert ended.codes == [0], ended.said
        megabytes[name, to] = int(ended.out) / 2**20
        assert megabytes[name, to] < 1.5 * rule, megabytes
    assert megabytes["phi3", "nanollm"] > 90                 # what is fused is held once, so the measure measures
