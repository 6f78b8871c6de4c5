"""The reward model: against trl, against transformers, and in the trainer."""

import argparse
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoints
import train
from nanollm.errors import InputError, RunError
from nanollm.training import options, reward
from tests import forked, killed
from tests.test_preference_runs import KINDS, LORA, arguments, base, held_out, log, steps  # noqa: F401
from tests.test_preferences import batch_of, by_their_names, close, folder  # noqa: F401


def rewarding(base: Path, out: Path, *more: object) -> list[str]:  # noqa: F811
    every = arguments(base, out, *more)
    every[every.index("--preference")] = "--reward"
    return every


def launch(ranks: int, base: Path, out: Path, *more: object) -> list[dict]:  # noqa: F811
    ended = forked.start(ranks, train.run, *rewarding(base, out, *more)).end(300)
    assert ended.codes == [0] * ranks, ended.said
    return log(out)


@pytest.mark.filterwarnings("ignore")
def test_it_is_that_of_trl_for_ten_steps(folder, tmp_path):  # noqa: F811
    """Value and gradients, with a margin; the padding id of transformers is one that no sequence has, in ours it is 0,
    which sequences do have."""
    trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    ours = reward.add_score(checkpoints.load(folder, dtype=torch.float32), seed=3).train()
    model.score.weight.data.copy_(ours.score.weight)
    config = trl.RewardConfig(output_dir=str(tmp_path / "trl"), use_cpu=True, report_to="none", bf16=False,
                              gradient_checkpointing=False)
    pairs = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    theirs = trl.RewardTrainer(model=model, args=config, train_dataset=pairs,
                               processing_class=transformers.AutoTokenizer.from_pretrained(folder))
    vocab = ours.config.vocab
    model.train().config.pad_token_id = vocab - 1
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-3) for each in (ours, model)]
    for step in range(10):
        batch = batch_of(ours, ours, step)
        batch = batch._replace(tokens=batch.tokens.clamp(max=vocab - 2), margins=torch.tensor([0.0, 0.5, 2.0]))
        loss, said = reward.reward_loss(ours, batch, argparse.Namespace())
        padded = batch.tokens.where(batch.real, vocab - 1)
        expected = theirs.compute_loss(model, {"input_ids": padded, "attention_mask": batch.real.long(),
                                               "margin": batch.margins})
        assert close(loss / 3, expected, step)
        (loss / 3).backward()
        expected.backward()
        assert abs(said["accuracy"] / 3 - theirs._metrics["train"]["accuracy"][-1]) < 1e-6
        if step == 0:
            assert torch.allclose(ours.score.weight.grad, model.score.weight.grad, rtol=1e-5, atol=1e-7)
            assert torch.allclose(ours.embed.weight.grad, model.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-7)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert torch.allclose(ours.score.weight, model.score.weight, atol=2e-5)
    score = reward.taken_off(ours)
    found = by_their_names(ours, dict(ours.named_parameters()), tmp_path / "weights")
    assert score is not None
    for key, p in model.named_parameters():
        assert key == "score.weight" or float((found[key] - p).abs().max()) < 2e-5


def test_the_last_token_is_read_though_it_is_the_padding_id(folder):  # noqa: F811
    """Sequences end with a stop id, which many tokenizers use as padding too."""
    model = reward.add_score(checkpoints.load(folder, dtype=torch.float32), seed=0)
    tokens, lengths = torch.tensor([[5, 6, 0, 0, 0], [5, 6, 7, 8, 0]]), torch.tensor([3, 5])
    with torch.no_grad():
        together = reward.rewards(model, tokens, lengths)
        alone = [reward.rewards(model, tokens[i : i + 1, :n], lengths[i : i + 1]) for i, n in enumerate((3, 5))]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6) and together.dtype == torch.float32


@pytest.mark.parametrize("kind", ["lora", *(pytest.param(kind, marks=pytest.mark.slow)
                                            for kind in ("full", "frozen", "qlora"))])
def test_held_out_pairs_are_ordered_and_what_is_written_orders_them(monkeypatch, base, tmp_path, kind):  # noqa: F811
    monkeypatch.setattr(sys, "argv", ["train.py", *rewarding(base, tmp_path / "run", *KINDS[kind], "--steps", 12)])
    train.run()
    entries = log(tmp_path / "run")
    accuracy, losses = held_out(entries, "accuracy"), held_out(entries, "loss")
    assert accuracy[-1] == 1.0 and losses[-1] < losses[0] - 0.1 and not any("sample" in entry for entry in entries)
    chosen = options.parse("", rewarding(base, tmp_path / "other", *KINDS[kind]))
    if "lora" in kind:
        model = checkpoints.load(base / "base", quantize=chosen.quantize, adapter=tmp_path / "run")
    else:
        model = checkpoints.load(tmp_path / "run")
    corpus = train.open_corpus(chosen, Alone(), 300)
    batch = corpus.held_out.stack([corpus.held_out.row(i) for i in range(corpus.held_out.rows)])
    with torch.no_grad():
        loss, _ = reward.reward_loss(reward.read(model, tmp_path / "run"), batch, chosen)
    assert abs(loss.item() / batch.divisor - losses[-1]) < 1e-4


class Alone:
    """As much of a World as open_corpus asks of one process."""
    rank, size = 0, 1

    def on_rank_0(self, work):
        return work()

    on_all_ranks = on_rank_0


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), LORA], ids=str)
def test_a_killed_run_ends_as_one_that_was_not_and_two_ranks_are_one(base, tmp_path, more):  # noqa: F811
    whole = launch(1, base, tmp_path / "whole", *more)
    ended = forked.start(1, killed.run, "optimizer", "4", *rewarding(base, tmp_path / "run", *more)).end(300)
    assert ended.codes == [-signal.SIGKILL], ended.said
    resumed = launch(1, base, tmp_path / "run", *more, "--resume")
    same = ("loss", "gradient_norm", "margin")
    assert [[entry[name] for name in same] for entry in steps(resumed)] == [
        [entry[name] for name in same] for entry in steps(whole)]
    assert (tmp_path / "run" / reward.FILE).read_bytes() == (tmp_path / "whole" / reward.FILE).read_bytes()
    two = launch(2, base, tmp_path / "two", *more)
    for a, b in zip(steps(whole), steps(two), strict=True):
        assert abs(a["loss"] - b["loss"]) <= 2e-6 and abs(a["gradient_norm"] / b["gradient_norm"] - 1) < 5e-5


@pytest.mark.slow
def test_transformers_reads_it_as_a_classifier(monkeypatch, base, tmp_path):  # noqa: F811
    """The two lines of docs/preferences.md."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "argv", ["train.py", *rewarding(base, tmp_path / "run")])
    train.run()
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "run", num_labels=1, dtype=torch.float32)
    theirs.score.load_state_dict(load_file(tmp_path / "run" / reward.FILE))
    tokens = torch.randint(0, 300, (1, 9))
    model = reward.read(checkpoints.load(tmp_path / "run", dtype=torch.float32), tmp_path / "run")
    with torch.no_grad():
        assert abs(theirs(tokens).logits.item() - reward.rewards(model, tokens, torch.tensor([9])).item()) < 1e-5


def test_what_is_no_score_is_named(base, tmp_path):  # noqa: F811
    model = checkpoints.load(base / "base")
    with pytest.raises(RunError, match="score.safetensors: cannot be read.*--reward"):
        reward.read(model, base / "base")
    reward.write(reward.Score(7), tmp_path)
    with pytest.raises(RunError, match="is for a width of 7, the model has"):
        reward.read(model, tmp_path)


def test_options_that_do_not_go_together(tmp_path):
    for args, message in ((("--beta", "1"), "--beta goes with --preference"),
                          (("--preference", "x"), "--preference with --reward"),
                          (("--chat", "x"), "--reward with --chat")):
        with pytest.raises(InputError, match=message):
            options.parse("", ["--init", str(tmp_path), "--reward", "p.jsonl", *args])
