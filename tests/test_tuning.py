"""Adapters in the trainer: against peft and bitsandbytes, and against itself: resumed, on two ranks, recomputed."""

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import checkpoints
import train
from nanollm.data import prepare as texts
from nanollm.data.stream import stack
from nanollm.errors import InputError, RunError
from nanollm.inference import options as generating
from nanollm.inference.quantize import quantised as quantised_weight
from nanollm.inference.quantize import quantize_as
from nanollm.model import Decoder
from nanollm.presets import transformer
from nanollm.training import log as logs
from nanollm.training import lora, optim, options, tuning
from tests import forked, killed
from tests.toys import grammar

LORA = ("--lora-rank", 4)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A toy that learnt a little, and the shards that it learnt from: FOLDER/base, FOLDER/shards."""
    folder = tmp_path_factory.mktemp("base")
    text = texts.read(grammar(tmp_path_factory.mktemp("text")))
    texts.prepare(text, folder / "shards", vocab=300, tokenizer=None, context=32)
    launch(1, folder / "base", "--data", folder / "shards", "--optimizer", "adamw", "--steps", 8)
    return folder


def arguments(out: Path, *more: object) -> list[str]:
    every = ("--out", out, "--context", 32, "--batch-size", 4, "--warmup", 1, "--lr", 0.003, "--dtype", "float32",
             "--sample-every", 0, "--eval-every", 4, "--save-every", 2, "--steps", 6)
    return [str(each) for each in (*every, *more)]


def launch(ranks: int, out: Path, *more: object) -> list[dict]:
    """A run in processes of its own; its log."""
    ended = forked.start(ranks, train.run, *arguments(out, *more)).end(300)
    assert ended.codes == [0] * ranks, ended.said
    return log(out)


def here(monkeypatch, out: Path, *more: object) -> list[dict]:
    """A run in this process; its log."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(out, *more)])
    train.run()
    return log(out)


def log(out: Path) -> list[dict]:
    return [entry for entry in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in entry]


def numbers(entries: list[dict]) -> list[tuple[float, float]]:
    return [(entry["loss"], entry["gradient_norm"]) for entry in entries]


def tuned(base: Path) -> tuple:
    return "--init", base / "base", "--data", base / "shards"


# ---- what it is

@pytest.mark.parametrize("more", [
    ("--quantize", "nf4"), *(pytest.param(more, marks=pytest.mark.slow) for more in (
        (), ("--dora", "--quantize", "int4"), ("--lora-init", "loftq", "--quantize", "nf4"),
        ("--rope-scaling", "yarn", "--rope-factor", 2),
        ("--rope-scaling", "linear", "--rope-factor", 2, "--quantize", "int8"),
        ("--lora-init", "pissa", "--lora-plus", 4, "--rslora", "--lora-targets", "q", "v")))], ids=str)
def test_what_is_exported_is_what_was_trained(monkeypatch, base, tmp_path, more):
    """The loss of the model that the run folder and the base give, with the last held-out loss of the run."""
    files = {path: path.read_bytes() for path in (base / "base").iterdir() if path.is_file()}
    entries = here(monkeypatch, tmp_path / "run", *tuned(base), *LORA, *more)
    assert len(entries) == 6
    said = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    held_out = [entry["held_out_loss"] for entry in said if "held_out_loss" in entry][-1]
    if (tmp_path / "run/adapter_config.json").exists():
        assert not (tmp_path / "run/model.safetensors").exists()
        kind = more[more.index("--quantize") + 1] if "--quantize" in more else None
        model = checkpoints.load(base / "base", quantize=kind, adapter=tmp_path / "run")
    else:
        assert "loftq" in more or "--rope-scaling" in more
        model = checkpoints.load(tmp_path / "run")
    corpus = train.open_corpus(parsed(*tuned(base), *LORA, "--context", 32), Alone(), 300)
    rows = stack([corpus.held_out.row(i) for i in range(corpus.held_out.rows)])
    with torch.no_grad():
        logits = model(rows.tokens, rows.positions)
    assert abs(F.cross_entropy(logits.flatten(0, 1), rows.targets.flatten()).item() - held_out) < 2e-4
    assert files == {path: path.read_bytes() for path in files}                # the base never changes


class Alone:
    """As much of a World as open_corpus asks of one process."""
    rank, size = 0, 1

    def on_rank_0(self, work):
        return work()

    on_all_ranks = on_rank_0

    def broadcast(self, value):
        return value


def parsed(*args: object):
    return options.parse("", [str(arg) for arg in args])


def test_a_checkpoint_holds_adapters_alone_and_the_base_keeps_its_bits(base, tmp_path, monkeypatch):
    kept = []
    original = tuning.fingerprint
    monkeypatch.setattr(train, "export", lambda run: kept.append(run))
    here(monkeypatch, tmp_path / "run", *tuned(base), *LORA, "--quantize", "int4")
    run = kept[0]
    run.model.state_dict()                                      # puts the codes of quantised modules in order
    assert original(run.model, run.options) == run.source.frozen
    names = json.loads(next((tmp_path / "run/steps").glob("*6/manifest.json")).read_text())["tensors"]
    assert names and all(name.endswith((".A", ".B", ".exp_avg", ".exp_avg_sq", ".step")) for name in names)
    assert not any(p.grad is not None for p in run.model.parameters() if not p.requires_grad)
    trained = {p for group in run.optimizers[0].param_groups for p in group["params"]}
    assert trained == set(lora.adapters(run.model).values())
    size = sum(path.stat().st_size for path in (tmp_path / "run/steps/00000006").iterdir())
    assert size < (base / "base/model.safetensors").stat().st_size / 2


@pytest.mark.slow
def test_frozen_weights_stay_in_the_dtype_of_the_folder(base, tmp_path, monkeypatch):
    model = checkpoints.load(base / "base")
    checkpoints.save(model.bfloat16(), tmp_path / "base")
    for file in (base / "base").glob("token*"):
        shutil.copy(file, tmp_path / "base")
    kept = []
    monkeypatch.setattr(train, "export", lambda run: kept.append(run))
    here(monkeypatch, tmp_path / "run", "--init", tmp_path / "base", "--data", base / "shards", *LORA)
    dtypes = {p.requires_grad: p.dtype for p in kept[0].model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    logged = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    held_out = [entry["held_out_loss"] for entry in logged if "held_out_loss" in entry]     # at step 0, 4 and 6
    assert len(held_out) == 3 and held_out[2] < held_out[1] < held_out[0]


def test_lora_plus_gives_each_parameter_the_rate_that_peft_gives_it():
    """λ times the rate for B, the rate itself for A, and weight decay for both."""
    transformers, optimizers = pytest.importorskip("transformers"), pytest.importorskip("peft.optimizers")
    small = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)),
                                 peft.LoraConfig(r=4, target_modules="all-linear"))
    made = optimizers.create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16,
                                                loraplus_weight_decay=0.1)
    part = {p: name.split(".lora_")[1][0] for name, p in theirs.named_parameters() if ".lora_" in name}
    expected = {(part[p], group["lr"], group["weight_decay"]) for group in made.param_groups for p in group["params"]}

    model = lora.add(Decoder(transformer(64, 32, 2, 4, 4, 48)), lora.LoRA(4, 8))
    asked = argparse.Namespace(lora_plus=16.0, weight_decay=0.1, betas=(0.9, 0.95), optimizer="adamw",
                               galore_rank=None, galore_scale=None, switch_every=None)
    ours = tuning.optimizers(model, asked, torch.float32)
    optim.step(ours, 1e-3)                                      # no parameter has a gradient: rates are set, no more
    part = {p: name[-1] for name, p in lora.adapters(model).items()}
    found = {(part[p], group["lr"], group["weight_decay"])
             for one in ours for group in one.param_groups for p in group["params"]}
    assert found == expected and len(found) == 2


# ---- against itself

@pytest.mark.slow
def test_recomputed_activations_change_no_bit(monkeypatch, base, tmp_path):
    """With dropout, whose masks are drawn again; and with an embedding that needs no gradient."""
    more = (*tuned(base), *LORA, "--lora-dropout", 0.3, "--quantize", "nf4")
    plain = here(monkeypatch, tmp_path / "plain", *more)
    for how in ("full", "selective"):
        assert numbers(plain) == numbers(here(monkeypatch, tmp_path / how, *more, "--recompute", how))
    assert all(entry["gradient_norm"] > 0 for entry in plain)


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not(base, tmp_path):
    more = (*tuned(base), *LORA, "--lora-dropout", 0.2, "--quantize", "int4", "--dora")
    whole = launch(1, tmp_path / "whole", *more)
    ended = forked.start(1, killed.run, "optimizer", "4", *arguments(tmp_path / "run", *more)).end(300)
    assert ended.codes == [-signal.SIGKILL], ended.said
    resumed = launch(1, tmp_path / "run", *more, "--resume")
    assert numbers(resumed) == numbers(whole) and len(whole) == 6
    name = "adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_a_run_is_not_resumed_beside_other_weights(monkeypatch, base, tmp_path):
    shutil.copytree(base / "base", tmp_path / "base", ignore=shutil.ignore_patterns("steps", "lock"))
    more = ("--init", tmp_path / "base", "--data", base / "shards", *LORA)
    here(monkeypatch, tmp_path / "run", *more)
    before = (tmp_path / "run/run.json").read_bytes()
    model = checkpoints.load(base / "base")
    with torch.no_grad():
        model.layers[0].ffn.up.weight.mul_(1.01)
    shutil.rmtree(tmp_path / "other", ignore_errors=True)
    checkpoints.save(model, tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", tmp_path / "base/model.safetensors")
    with pytest.raises(RunError, match="base.weights [0-9a-f]{8} → [0-9a-f]{8}"):
        here(monkeypatch, tmp_path / "run", *more, "--resume", "--steps", 6)
    assert (tmp_path / "run/run.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--dora", "--quantize", "nf4"), ("--quantize", "int8")], ids=str)
def test_two_ranks_are_one(base, tmp_path, more):
    one = launch(1, tmp_path / "one", *tuned(base), *LORA, *more)
    two = launch(2, tmp_path / "two", *tuned(base), *LORA, *more)
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two, strict=True)) <= 1e-6
    assert max(abs(a["gradient_norm"] / b["gradient_norm"] - 1) for a, b in zip(one, two, strict=True)) < 2e-5
    a, b = (checkpoints.load(base / "base", adapter=tmp_path / name) for name in ("one", "two"))
    mine, theirs = lora.adapters(a), lora.adapters(b)
    assert mine and all((mine[name] - theirs[name]).abs().max() < 1e-4 for name in mine)


@pytest.mark.slow
def test_an_adapter_goes_on(monkeypatch, base, tmp_path):
    first = here(monkeypatch, tmp_path / "first", *tuned(base), *LORA)
    second = here(monkeypatch, tmp_path / "second", *tuned(base), "--adapter", tmp_path / "first")
    assert second[0]["loss"] < first[0]["loss"] - 0.01          # the same rows
    assert checkpoints.load(base / "base", adapter=tmp_path / "second").lora.rank == 4


# ---- against peft and bitsandbytes

@pytest.mark.parametrize("kind", [None, "nf4"])
def test_ten_steps_are_those_of_peft(base, tmp_path, kind):
    """transformers' model with peft's adapters, its Linears dequantised from bitsandbytes' own NF4; torch's AdamW."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = pytest.importorskip("bitsandbytes.functional")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(base / "base", dtype=torch.float32)
    if kind:
        for module in theirs.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                found = quantised.quantize_4bit(module.weight.data, blocksize=64, quant_type="nf4",
                                                compress_statistics=True)
                module.weight.data = quantised.dequantize_4bit(*found)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    ours = checkpoints.load(base / "base", quantize=kind)
    chosen = parsed(*tuned(base), *LORA, *(("--quantize", kind) if kind else ()))
    tuning.prepare(ours, chosen, quantised_weight, quantize_as)
    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
             "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    their_parts = dict(theirs.named_parameters())
    pairs = []
    for name, p in lora.adapters(ours).items():
        _, layer, _, leaf, part = name.split(".")
        twin = their_parts[f"base_model.model.model.layers.{layer}.{names[leaf]}.lora_{part}.default.weight"]
        twin.data.copy_(p.data)
        pairs.append((p, twin))
    mine = tuning.optimizers(ours, chosen, torch.float32)
    other = torch.optim.AdamW([twin for _, twin in pairs], lr=0.002, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    draw = torch.Generator().manual_seed(1)
    for _ in range(10):
        tokens = torch.randint(0, 300, (2, 17), generator=draw)
        losses = []
        for model, read in ((ours, lambda x: ours(x)), (theirs, lambda x: theirs(x).logits)):
            loss = F.cross_entropy(read(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())
            model.zero_grad()
            loss.backward()
            losses.append(loss.item())
        assert abs(losses[0] - losses[1]) < 2e-6
        assert max((p.grad - twin.grad).abs().max().item() for p, twin in pairs) < 1e-6
        train.optim.step(mine, 0.002)
        other.step()
    # AdamW's first steps are ± lr, also where a gradient is rounding alone
    apart = torch.cat([(p - twin).detach().flatten().abs() for p, twin in pairs])
    assert apart.mean() < 1e-6 and apart.quantile(0.99) < 1e-5


# ---- options

@pytest.mark.parametrize("args, message", [
    (("--quantize", "nf4"), "--quantize nf4: weights in so few bits are not trained"),
    (("--dora",), "--dora is for adapters: give --lora-rank"),
    (("--lora-plus", 16), "--lora-plus is for adapters: give --lora-rank"),
    ((*LORA, "--optimizer", "muon"), "--lora-rank with --optimizer muon"),
    ((*LORA, "--adapter", "x"), "--lora-rank with --adapter"),
    ((*LORA, "--train-last", 1), "--lora-rank with --train-last"),
    ((*LORA, "--lora-init", "loftq"), "--lora-init loftq makes up for what quantising loses"),
    ((*LORA, "--quantize", "nf4", "--offload"), "--offload moves parameters"),
], ids=lambda value: value if isinstance(value, str) else None)
def test_options_that_do_not_go_together(tmp_path, args, message):
    with pytest.raises(InputError, match=message):
        parsed("--init", tmp_path, *args)


def test_adapters_need_a_model():
    with pytest.raises(InputError, match="--lora-rank tunes a model that exists: name its folder with --init"):
        parsed(*LORA)


@pytest.mark.slow
@pytest.mark.parametrize("more, message", [
    (("--lora-rank", 4, "--lora-targets", "qkv"), "no weight of the layers is called qkv"),
    (("--adapter", "nowhere"), "nowhere: no adapter"),
])
def test_what_the_model_cannot_have_leaves_no_folder(monkeypatch, base, tmp_path, more, message):
    with pytest.raises((InputError, checkpoints.CheckpointError), match=message):
        here(monkeypatch, tmp_path / "run", *tuned(base), *more)
    assert not os.path.exists(tmp_path / "run")


def test_the_learning_rate_of_adapters(tmp_path):
    assert parsed("--init", tmp_path, *LORA).lr == 0.0002 and parsed("--init", tmp_path).lr == 0.00002
    assert parsed("--init", tmp_path, *LORA, "--lr", 0.001).lr == 0.001


@pytest.mark.parametrize("more", [(), ("--quantize", "int8")], ids=["lora", "qlora"])
def test_a_run_says_how_many_parameters_there_are_and_are_trained(base, tmp_path, monkeypatch, capsys, more):
    """In whatever number of bits: those of a QLoRA were counted without the weights that are quantised."""
    whole = sum(p.numel() for p in checkpoints.load(base / "base").parameters())
    here(monkeypatch, tmp_path / "run", *tuned(base), *LORA, *more, "--steps", 2)
    trained = sum(t.numel() for t in load_file(tmp_path / "run/adapter_model.safetensors").values())
    said = capsys.readouterr().out
    assert f": {whole / 1e6:.2f} M parameters, {trained:,} trained, 256 tokens to see, " in said
    assert f"{tmp_path / 'run'}: adapter, tokenizer, log.jsonl" in said and "(training, last 2 steps)" in said


@pytest.mark.parametrize("more, how", [
    (("--data", "x"), ["--prompt", "Once upon a time"]), (("--chat", "x"), ["--chat"]),
    (("--chat", "x", "--template", "vicuna"), ["--chat", "--template", "vicuna"]), (("--preference", "x"), ["--chat"])])
def test_the_command_that_a_run_prints_can_be_typed(tmp_path, monkeypatch, more, how):
    """generate.py and convert take it as it stands, with spaces in names, too; the model it names need not exist."""
    out = tmp_path / "a run"
    said = tuning.how_to_use(parsed("--init", tmp_path, *LORA, *more, "--out", out), str(tmp_path)).splitlines()
    _, script, *args = shlex.split(said[1])
    assert (script, args) == ("generate.py", ["--model", str(tmp_path), "--adapter", str(out), *how])
    monkeypatch.setattr(sys, "argv", [script, *args])
    found = generating.parse("")
    assert found.adapter == out and (found.chat or found.prompt)


def test_a_reward_model_is_told_as_what_it_is(tmp_path, monkeypatch):
    """It scores: no command is told that lets it write."""
    said = tuning.how_to_use(parsed("--init", tmp_path, *LORA, "--reward", "x", "--out", tmp_path / "judge"), "base")
    assert "score.safetensors" in said and "generate.py" not in said
    _, script, *args = shlex.split(said.splitlines()[1])
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "score.safetensors").touch()
    chosen = parsed(*(str(tmp_path) if arg == "base" else arg for arg in args))
    assert script == "train.py" and chosen.reward_model == tmp_path / "judge"
    (tmp_path / "judge" / "log.jsonl").touch()
    assert logs.report(tmp_path / "judge", None, "").startswith(
        f"{tmp_path / 'judge'}: a reward model for --reward-model {tmp_path / 'judge'}: model, score.safetensors, ")


def test_the_adapter_of_a_model_from_the_hub_names_it_as_the_hub_does(base, tmp_path, monkeypatch):
    """Not the folder of this machine's cache, which no one else has."""
    monkeypatch.setattr(train.hub, "to_train", {"owner/name": base / "base"}.get)
    here(monkeypatch, tmp_path / "run", *tuned(base), "--init", "owner/name", *LORA, "--steps", 1)
    assert json.loads((tmp_path / "run/adapter_config.json").read_text())["base_model_name_or_path"] == "owner/name"
