"""What is frozen stays as it is, to the bit, and has no state; what grows can be trained: whole runs."""

import argparse
import json
from pathlib import Path

import pytest
import torch
import transformers

import checkpoints
import train
from nanollm import presets
from nanollm.data import prepare as texts
from nanollm.errors import InputError
from nanollm.model import Decoder
from nanollm.text.tokenizer import load
from nanollm.training import freezing, growing, optim
from tests import forked
from tests.fixtures import slow_but
from tests.test_train import log_of, losses_of, run, run_in_two
from tests.toys import grammar

QUICK = ("--steps", "6", "--context", "32", "--batch-size", "4", "--micro-batch", "2", "--warmup", "1", "--lr", "0.003",
         "--dtype", "float32", "--sample-every", "0", "--save-every", "3", "--eval-every", "6")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = grammar(tmp_path_factory.mktemp("text"))
    texts.prepare(texts.read(folder), folder / "shards", vocab=300, tokenizer=None, context=32)
    return folder / "shards"


@pytest.fixture(scope="module")
def base(shards, tmp_path_factory) -> Path:
    """A model of 4 layers for those shards."""
    folder = tmp_path_factory.mktemp("base") / "model"
    checkpoints.save(Decoder(presets.preset("llama", 300, 32), seed=1), folder)
    for path in shards.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def asked(**more) -> argparse.Namespace:
    return argparse.Namespace(**dict(freeze=None, train_last=None, expand=None, expand_all=False) | more)


def trained(model: Decoder) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoints.load(folder).named_parameters())


def moved(folder: Path, base: Path) -> set[str]:
    before = weights(base)
    return {name for name, value in weights(folder).items() if not torch.equal(value, before[name])}


# ---- which

def test_parts_of_names():
    model = Decoder(presets.preset("llama", 300, 32))
    freezing.freeze(model, asked(freeze=["embed", "layers.0", "mixer.q"]))
    frozen = {*dict(model.named_parameters())} - trained(model)
    assert {name for name in frozen if name.startswith("layers.0.")} == {
        name for name, _ in model.named_parameters() if name.startswith("layers.0.")}
    assert frozen - {name for name in frozen if name.startswith("layers.0.")} == {
        "embed.weight", *(f"layers.{i}.mixer.q.weight" for i in range(1, len(model.layers)))}


def test_an_unknown_part_is_an_error_that_lists_what_there_is():
    model = Decoder(presets.preset("llama", 300, 32))
    last = len(model.layers) - 1
    with pytest.raises(InputError) as error:
        freezing.freeze(model, asked(freeze=["mixer", "layer"]))
    assert str(error.value) == (
        "--freeze layer: no parameter has this between the dots of its name; there are embed, weight, "
        f"layers.0 … layers.{last}, pre_mixer, gain, mixer, q, k, v, o, pre_ffn, ffn, gate, up, down, norm, head")
    with pytest.raises(InputError, match="--train-last 9: the model has . layers"):
        freezing.freeze(model, asked(train_last=9))
    with pytest.raises(InputError, match="nothing would be trained"):
        freezing.freeze(model, asked(freeze=["weight", "gain"]))


@pytest.mark.parametrize("tied", [False, True])
def test_the_last_layers_norm_and_head(tied):
    config = presets.preset("mamba" if tied else "llama", 300, 32)
    model = Decoder(config)
    assert config.tied == tied
    freezing.freeze(model, asked(train_last=1))
    last = f"layers.{len(model.layers) - 1}."
    assert trained(model) == {name for name, _ in model.named_parameters() if name.startswith(last)} | {
        "norm.gain", "embed.weight" if tied else "head.weight"}
    freezing.freeze(model, asked(freeze=["head"]))          # of a tied one the other name counts too
    assert not model.head.weight.requires_grad


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_the_optimizers_have_what_is_trained_and_no_more(name):
    model = Decoder(presets.preset("llama", 300, 32))
    freezing.freeze(model, asked(freeze=["layers"]))
    optimizers = optim.build(model, name, 0.1, torch.float32)       # muon: nothing is left for it
    names = {key.removeprefix("optimizer.").rpartition(".")[0] for key in optim.tensors(model, optimizers)
             if key.startswith("optimizer.")}
    assert names == trained(model) == {"embed.weight", "norm.gain", "head.weight"}


# ---- runs

@pytest.mark.parametrize("more", slow_but([("--train-last", "1")], [
    ("--freeze", "embed", "ffn"), ("--train-last", "1"), ("--train-last", "1", "--freeze", "head")]))
def test_what_is_frozen_stays_to_the_bit(more, base, shards, tmp_path):
    run("--init", base, "--data", shards, "--out", tmp_path / "run", *QUICK, "--weight-decay", "0.1", *more)
    model = Decoder(presets.preset("llama", 300, 32))
    args = asked(freeze=[*more[more.index("--freeze") + 1 :]] if "--freeze" in more else None,
                 train_last=1 if "--train-last" in more else None)
    freezing.freeze(model, args)
    assert moved(tmp_path / "run", base) == trained(model)


@pytest.mark.slow
def test_frozen_runs_equal_a_loop_by_hand(base, shards, tmp_path):
    """torch's AdamW over the trained parameters of transformers' model, on the rows of the run."""
    from nanollm.data.stream import Stream, open_folder
    run("--init", base, "--data", shards, "--out", tmp_path / "run", *QUICK, "--train-last", "2", "--clip", "0")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    depth = model.config.num_hidden_layers
    for name, p in model.named_parameters():
        p.requires_grad_(any(part in name for part in (
            f"layers.{depth - 1}.", f"layers.{depth - 2}.", "model.norm", "lm_head")))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.95), weight_decay=0)
    stream, found = Stream([open_folder(shards, 32, None)[0]], None, 0), []
    for step in range(6):
        batch = stream.batch(4 * step, 4)
        mask = None
        if batch.positions is not None:                     # documents see nothing of each other
            document = (batch.positions == 0).cumsum(1)
            mask = (document[:, :, None] == document[:, None]).tril()[:, None]
        logits = model(batch.tokens, attention_mask=mask, position_ids=batch.positions).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.003 * optim.lr_factor(step, 6, 1, "linear")
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert losses_of(log_of(tmp_path / "run")) == pytest.approx(found, abs=2e-5)


@pytest.mark.slow
def test_two_ranks_are_one(base, shards, tmp_path):
    for more in (("--train-last", "1"), ("--expand", "2"), ("--freeze", "embed", "norm")):
        logs = []
        for ranks in (1, 2):
            out = tmp_path / f"{more[0]}{ranks}"
            ended = forked.start(ranks, train.run, "--init", base, "--data", shards, "--out", out, *QUICK, *more)
            assert (ended := ended.end(300)).codes == [0] * ranks, ended.said
            logs.append(log_of(out))
        assert losses_of(logs[0]) == pytest.approx(losses_of(logs[1]), abs=2e-5)
        first, second = (weights(tmp_path / f"{more[0]}{ranks}") for ranks in (1, 2))
        before = weights(base)
        same = {name for name, value in second.items() if name in before and torch.equal(value, before[name])}
        assert same and same == {name for name in first if name in before and torch.equal(first[name], before[name])}


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--train-last", "1"), ("--expand", "2"), ("--neftune", "5", "--recompute", "full"),
                                  ("--shift-attention", "8")])
def test_a_run_that_was_left_ends_as_one_that_was_not(more, base, shards, tmp_path, monkeypatch):
    args = ("--init", base, "--data", shards, *QUICK, *more)
    run(*args, "--out", tmp_path / "whole")
    run_in_two(monkeypatch, *args, "--out", tmp_path / "left")
    whole, left = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "left"))
    assert whole == left
    assert losses_of(log_of(tmp_path / "whole")) == losses_of(log_of(tmp_path / "left"))


def test_only_new_layers_are_trained(base, shards, tmp_path):
    run("--init", base, "--data", shards, "--out", tmp_path / "run", *QUICK, "--expand", "2")
    old, new = checkpoints.load(base), checkpoints.load(tmp_path / "run")
    fresh = growing.new_layers(len(new.layers), 2)
    places = [place for place in range(len(new.layers)) if place not in fresh]
    for number, place in enumerate(places):
        for one, other in zip(old.layers[number].parameters(), new.layers[place].parameters(), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(old.embed.weight, new.embed.weight) and torch.equal(old.head.weight, new.head.weight)
    assert all(new.layers[place].mixer.o.weight.abs().max() > 0 for place in fresh)
    log = losses_of(log_of(tmp_path / "run"))
    run("--init", base, "--data", shards, "--out", tmp_path / "all", *QUICK, "--expand", "2", "--expand-all")
    whole = losses_of(log_of(tmp_path / "all"))
    assert log[0] == whole[0] and log[-1] < log[0] and whole[-1] < whole[0]
    assert not torch.equal(old.embed.weight, checkpoints.load(tmp_path / "all").embed.weight)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "run").num_hidden_layers == len(old.layers) + 2


def test_added_tokens_come_out_in_the_model_and_the_tokenizer(base, shards, tmp_path):
    """ChatML on a model that does not have its tokens: they are one id each, and learnt."""
    answer = {"role": "assistant", "content": "return beta"}
    chats = [{"messages": [{"role": "user", "content": f"def alpha{n}"}, answer]} for n in range(12)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    added = ["<|im_start|>", "<|im_end|>"]
    run("--init", base, "--chat", tmp_path / "chats.jsonl", "--out", tmp_path / "run", *QUICK, "--template", "chatml",
        "--add-tokens", *added)
    ours, theirs = load(tmp_path / "run"), transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    first = load(base).vocab_size
    assert [ours.special_tokens[text] for text in added] == theirs.convert_tokens_to_ids(added) == [first, first + 1]
    text = "<|im_start|>user\ndef alpha<|im_end|>\n"
    assert ours.encode(text, bos=False, special=True) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode([first, first + 1]) == theirs.decode([first, first + 1], skip_special_tokens=True) == ""
    assert first + 1 in ours.stop_ids
    before, after = checkpoints.load(base), checkpoints.load(tmp_path / "run")
    assert after.config.vocab == before.config.vocab + 2
    mean = before.head.weight.mean(0)
    assert not torch.allclose(after.head.weight[first + 1], mean, atol=1e-4)            # it has learnt to end
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    ids = torch.tensor([theirs(text)["input_ids"]])
    with torch.no_grad():
        assert (reference(ids).logits - after(ids)).abs().max() < 1e-4


def test_a_vocabulary_too_small_is_refused_with_what_helps(base, shards, tmp_path):
    texts.prepare(texts.read(shards.parent), tmp_path / "more", vocab=320, tokenizer=None, context=16)
    args = ("--init", base, "--data", shards.parent, "--tokenizer", tmp_path / "more", *QUICK)
    with pytest.raises(SystemExit, match="the tokenizer of the data one of 3.*--grow-vocab gives it rows for them"):
        run(*args, "--out", tmp_path / "run")
    run(*args, "--out", tmp_path / "run", "--grow-vocab")
    assert checkpoints.load(tmp_path / "run").config.vocab == load(tmp_path / "more").vocab_size > 300


@pytest.mark.slow
def test_a_longer_context_can_be_trained(base, shards, tmp_path):
    args = ("--init", base, "--data", shards, *QUICK, "--context", "64")
    with pytest.raises(SystemExit, match="made for 32 tokens, --context is 64; --rope-scaling and --rope-factor"):
        run(*args, "--out", tmp_path / "run")
    for kind in growing.SCALINGS:
        run(*args, "--out", tmp_path / kind, "--rope-scaling", kind, "--rope-factor", "2")
        found = transformers.AutoConfig.from_pretrained(tmp_path / kind)
        assert found.rope_parameters["rope_type"] == kind
        assert found.max_position_embeddings == (32 if kind == "dynamic" else 64)
