"""python -m checkpoints.inspect: what it says of a folder is what safetensors, torch and load() say, and no weight is
read for it."""

import dataclasses
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import checkpoints
from checkpoints import folding
from checkpoints import inspect as command
from checkpoints.convert import convert, plan
from checkpoints.families import read_config
from checkpoints.inspect import describe, facts, look
from checkpoints.names import table
from checkpoints.source import open_source
from checkpoints.storage import files
from nanollm.errors import NanollmError
from nanollm.model import Decoder
from tests.clock import within
from tests.fixtures import FIXTURES
from tests.meta_folders import write_meta, write_mistral
from tests.oracles import write
from tests.test_show import PUBLISHED

PARAMS = dict(
    dim=64, n_layers=3, n_heads=8, n_kv_heads=2, vocab_size=131, multiple_of=32, ffn_dim_multiplier=0.5,
    norm_eps=1e-2, rope_theta=500000.0,
)
MISTRAL = dict(
    dim=64, n_layers=3, n_heads=8, n_kv_heads=2, vocab_size=131, head_dim=8, hidden_dim=96, norm_eps=1e-2,
    rope_theta=10000.0, sliding_window=9,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A Llama and a Mixtral as transformers writes them, and the Llama's model."""
    folder = tmp_path_factory.mktemp("models")
    model = write(FIXTURES["llama-3"], folder / "llama", max_shard_size="60KB")
    write(FIXTURES["mixtral-8x7b"], folder / "mixtral")
    return folder, model


@pytest.fixture
def llama(written, tmp_path):
    return shutil.copytree(written[0] / "llama", tmp_path / "llama")


def ran(monkeypatch, capsys, *args: object) -> tuple[int, str]:
    """Exit code, and what was printed."""
    monkeypatch.setattr(sys, "argv", ["inspect", *map(str, args)])
    try:
        command.run()
        return 0, capsys.readouterr().out
    except SystemExit as end:
        return end.code, capsys.readouterr().out


def stored_by_safetensors(folder: Path) -> dict[str, tuple[str, list[int], str]]:
    """name → dtype, shape, file, as the library itself reads them."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {
                name: (table.short(file.get_tensor(name).dtype), list(file.get_slice(name).get_shape()), path.name)
                for name in file.keys()
            }
    return found


# ---- what is there

def test_it_says_what_safetensors_and_transformers_say(written, monkeypatch, capsys):
    folder, model = written
    code, out = ran(monkeypatch, capsys, folder / "llama", "--json", "--tensors")
    said, oracle = json.loads(out), stored_by_safetensors(folder / "llama")
    assert code == 0 and said["loads"] and said["reason"] is None
    assert {one["name"]: (one["dtype"], one["shape"], one["file"]) for one in said["stored"]} == oracle
    assert (
        said["parameters"] == model.num_parameters()
        and said["tensors"] == len(oracle)
        and said["family"] == "llama"
        and said["layout"] == "hf"
    )
    assert {one["name"]: one["bytes"] for one in said["files"]} == {
        path.name: path.stat().st_size for path in (folder / "llama").glob("*.safetensors")
    }
    assert sum(one["bytes"] for one in said["stored"]) == sum(p.nbytes for p in model.state_dict().values())


def test_the_text(written):
    folder, _ = written
    text = describe(look(folder / "mixtral"))
    stored = files.read_folder(folder / "mixtral")
    assert text.startswith(
        f"{folder / 'mixtral'}\nlayout       hf\nfamily       mixtral\nfiles        model.safetensors   "
    )
    assert f"\ntensors      {len(stored)}\n" in text and "\nloads        yes\n\n" in text
    lines = [line.split() for line in text.partition("\n\n")[2].splitlines()]
    assert [
        "model.layers.{0..2}.block_sparse_moe.experts.{0..7}.w1.weight", "float32", "96×64", "24", "tensors", "590",
        "kB",
    ] in lines
    assert sum(int(line[3]) for line in lines) == len(stored)
    assert len(describe(look(folder / "mixtral"), tensors=True).partition("\n\n")[2].splitlines()) == len(stored)


def test_no_weight_is_read_of_a_model_of_any_size(tmp_path, monkeypatch):
    """Llama-3.1-8B as its headers are, its weights a hole in the file."""
    values = PUBLISHED["Llama-3.1-8B"][0]
    family, config = read_config(values)
    with torch.device("meta"):
        parameters = dict(Decoder(config).named_parameters())
    header, at = {}, 0
    for step in table.expand(family.tables(config)[0], parameters, config):
        for name, shape in step.shapes(parameters).items():
            size = 2 * math.prod(shape)
            header[name], at = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}, at + size
    (tmp_path / "config.json").write_text(json.dumps(values))
    with open(tmp_path / "model.safetensors", "wb") as file:
        text = json.dumps(header).encode()
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    monkeypatch.setattr(files.Stored, "read_run", lambda *args: pytest.fail("a weight was read"))
    report = within(0.5, lambda: look(tmp_path), time.process_time)
    assert report.reason is None and report.parameters == PUBLISHED["Llama-3.1-8B"][1]
    assert (
        "model.layers.{0..31}.self_attn.q_proj.weight          bfloat16  4096×4096    32 tensors  1.07 GB\n"
        in describe(report)
    )


def test_every_layout(tmp_path):
    model = write(
        dataclasses.replace(FIXTURES["llama-3"], keys=FIXTURES["llama-3"].keys | {"vocab_size": 132}), tmp_path / "even"
    )
    mha = write(FIXTURES["mistral-v0.1"], tmp_path / "mistral-hf")
    write_meta(model, tmp_path / "meta", PARAMS | {"vocab_size": 132}, ranks=2)
    write_mistral(mha, tmp_path / "mistral", MISTRAL)
    convert(plan(open_source(tmp_path / "mistral-hf"), "nanollm"), tmp_path / "own")
    said = {name: look(tmp_path / name, allow_pickle=True) for name in ("meta", "mistral", "own", "mistral-hf")}
    assert {name: (one.layout, one.family) for name, one in said.items()} == {
        "meta": ("meta", "llama"), "mistral": ("mistral", "mistral"), "own": ("nanollm", "nanollm"),
        "mistral-hf": ("hf", "mistral"),
    }
    assert said["meta"].reason is said["own"].reason is said["mistral-hf"].reason is None
    assert said["meta"].parameters == model.num_parameters() and said["own"].parameters == mha.num_parameters()
    assert {path.name for path in said["meta"].used} == {"consolidated.00.pth", "consolidated.01.pth"}
    assert "consolidated.00.pth, consolidated.01.pth" in describe(said["meta"], tensors=True)


def test_a_second_copy_of_the_weights_is_named(llama):
    (llama / "pytorch_model.bin").write_bytes(b"x" * 5000)
    assert "\n             pytorch_model.bin   5 kB, not read\n" in describe(look(llama))
    said = {one["name"]: one["used"] for one in json.loads(facts(look(llama)))["files"]}
    assert not said.pop("pytorch_model.bin") and all(said.values())


def test_what_load_warns_of_is_noted(llama):
    values = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": True}))
    report = look(llama)
    assert report.reason is None and "tied by config.json, but lm_head.weight is not the embedding" in describe(report)


# ---- what would not load

def drop_a_shard(folder):
    next(folder.glob("model-00002*")).unlink()


def cut_a_shard(folder):
    path = next(folder.glob("model-00002*"))
    path.write_bytes(path.read_bytes()[:-10])


def unknown_family(folder):
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"model_type": "gpt5"})
    )


def wrong_width(folder):
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"intermediate_size": 97})
    )


def unknown_key(folder):
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"quantum": True})
    )


def no_json(folder):
    (folder / "config.json").write_text("<html>")


def no_config(folder):
    (folder / "config.json").unlink()


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


def no_index(folder):
    (folder / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize(
    "breaks, listed",
    [
        (drop_a_shard, True), (cut_a_shard, True), (unknown_family, True), (wrong_width, True), (unknown_key, True),
        (no_json, True), (no_config, True), (empty, False), (no_index, True),
    ],
)
def test_what_would_not_load_says_what_load_says(llama, breaks, listed, monkeypatch, capsys):
    breaks(llama)
    with pytest.raises(NanollmError) as error:
        checkpoints.load(llama)
    code, out = ran(monkeypatch, capsys, llama)
    assert (
        code == 1
        and "\nloads        no\n" in out
        and all(f"             {line}\n" in out + "\n" for line in str(error.value).splitlines())
    )
    assert ("model.layers." in out.partition("\n\n")[2]) == listed
    said = json.loads(ran(monkeypatch, capsys, llama, "--json")[1])
    assert said["reason"] == str(error.value) and not said["loads"] and said["parameters"] is None


def test_the_options_of_load_and_convert(llama, monkeypatch, capsys):
    unknown_key(llama)
    assert ran(monkeypatch, capsys, llama, "--ignore", "quantum")[0] == 0
    unknown_family(llama)
    assert ran(monkeypatch, capsys, llama, "--ignore", "quantum", "--family", "llama")[0] == 0
    with pytest.raises(NanollmError, match="no such folder"):
        ran(monkeypatch, capsys, llama / "no" / "where")


class Evil:
    def __reduce__(self):
        return os.system, ("echo > proof",)


def test_pickles_are_named_and_judged_and_not_run(llama, monkeypatch, capsys):
    for path in llama.glob("*.safetensors*"):
        if path.suffix == ".safetensors":
            torch.save(
                load_file(path), llama / path.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
            )
        path.unlink()
    places = {name: path.name for path in llama.glob("*.bin") for name in torch.load(path)}
    (llama / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(NanollmError) as error:
        checkpoints.load(llama)
    code, out = ran(monkeypatch, capsys, llama)
    assert code == 1 and str(error.value) in out and all(f"{name}: harmless" in out for name in set(places.values()))
    assert ran(monkeypatch, capsys, llama, "--allow-pickle")[0] == 0
    first = next(iter(places.values()))
    monkeypatch.chdir(llama)
    torch.save({"w": Evil()}, llama / first)
    for options in ((), ("--allow-pickle",)):
        code, out = ran(monkeypatch, capsys, llama, *options)
        assert (
            code == 1
            and f"{first}: NOT harmless, it calls {os.system.__module__}.system" in out
            and not (llama / "proof").exists()
        )
    said = {one["name"]: one["harmless"] for one in json.loads(ran(monkeypatch, capsys, llama, "--json")[1])["pickles"]}
    assert said == {name: name != first for name in set(places.values())}


def test_damage_of_any_kind_is_reported(llama):
    """Bytes at random in what describes the model: never a traceback, and where load() gives a model, so it says."""
    draw = random.Random(0)
    targets = ["config.json", "model.safetensors.index.json", next(llama.glob("model-00001*")).name]
    whole = {name: (llama / name).read_bytes() for name in targets}
    refused = 0
    for _ in range(150):
        name = draw.choice(targets)
        text = bytearray(whole[name])
        for _ in range(draw.choice((1, 1, 3))):
            text[draw.randrange(min(len(text), 1500))] = draw.randrange(256)
        (llama / name).write_bytes(text)
        report = look(llama)
        assert describe(report) and facts(report, tensors=True)
        refused += report.reason is not None
        (llama / name).write_bytes(whole[name])
    assert refused > 75


def test_names_that_no_one_should_give(tmp_path):
    names = ["." * 50, "a." + "9" * 5000 + ".b", "\u0663.x", "", "a.0.b\n", "a.1.b\n"]
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "model.safetensors")
    report = look(tmp_path)
    assert report.reason and {"a.{0..1}.b\n", *names[:4]} == {
        one["name"] for one in json.loads(facts(report))["stored"]
    }
    assert describe(report).partition("\n\n")[2].count("\n") == 4 and "a.{0..1}.b\\n" in describe(report)


# ---- folding

@pytest.mark.parametrize("names, one", [
    (["norm.weight"], "norm.weight"),
    (["h.3.w"], "h.3.w"),
    ([f"h.{i}.w" for i in range(12)], "h.{0..11}.w"),
    (["h.7.w", "h.1.w", "h.2.w"], "h.{1..2,7}.w"),
    ([f"h.{i}.e.{e}.w" for i in (1, 2, 3) for e in range(256)], "h.{1..3}.e.{0..255}.w"),
    ([f"h.{i}.e.0.w" for i in range(3)], "h.{0..2}.e.0.w"),
    ([f"h.{i}" for i in range(0, 32, 2)], "h.{0,2,4,6,8,…,30}"),
])
def test_folding(names, one):
    assert folding.folded(names) == one and len(set(map(folding.pattern, names))) == 1


@pytest.mark.slow
def test_the_standard_library_keeps_its_inspect(llama):
    """torch alone imports it a hundred times."""
    done = subprocess.run(
        [sys.executable, "-m", "checkpoints.inspect", llama], cwd=Path(__file__).parent.parent, capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr and "loads        yes" in done.stdout
