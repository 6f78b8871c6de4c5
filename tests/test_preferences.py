"""Losses on preferences against trl: value and gradients on the same batch, and ten steps; log-probabilities, and the
rows that they are of."""

import argparse
import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import checkpoints
from nanollm.data import chat_store, preferences
from nanollm.data.chat_writing import Example
from nanollm.data.preferences import Pair
from nanollm.errors import DataError
from nanollm.model import Decoder
from nanollm.text import tokenizer
from nanollm.training import preferences as losses
from nanollm.training.log_probs import answer_log_probs
from tests.fixtures import FIXTURES
from tests.oracles import write
from tests.tok_folders import byte_bpe

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
OPTIONS = {"beta": 0.3, "label_smoothing": 0.0, "gamma": 0.5, "kto_weights": (1.3, 0.7)}
HERE = SimpleNamespace(device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Qwen3 of transformers, with a tokenizer and a template; FOLDER/reference is another one."""
    folder = tmp_path_factory.mktemp("preferences") / "tiny"
    backend = byte_bpe(("<|im_start|>", "<|im_end|>"), vocab=300)
    fixture = FIXTURES["qwen3-0.6b"]
    keys = {**fixture.keys, "vocab_size": backend.get_vocab_size()}
    for path, gain in ((folder, 0.1), (folder / "reference", 0.11)):
        write(type(fixture)("qwen3", keys, gain=gain), path)
        backend.save(str(path / "tokenizer.json"))
        facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
                 "chat_template": CHATML}
        (path / "tokenizer_config.json").write_text(json.dumps(facts))
    return folder


def batch_of(model: Decoder, reference: Decoder, seed: int, rows: int = 3) -> preferences.PairBatch:
    """Random pairs of unequal lengths, the prompt of a pair in front of both answers."""
    draw = np.random.default_rng(seed)
    pairs = []
    for _ in range(rows):
        prompt, both = draw.integers(0, model.config.vocab, draw.integers(1, 6)), []
        for _ in range(2):
            tokens = np.concatenate([prompt, draw.integers(0, model.config.vocab, draw.integers(1, 9))])
            targets = np.append(tokens[1:], -100)
            targets[: len(prompt) - 1] = -100
            both.append(Example(tokens, targets))
        pairs.append(Pair(*both, bool(draw.integers(2)), 0.0, torch.zeros(2)))
    batch = preferences.stack(pairs)
    with torch.no_grad():
        return batch._replace(reference=answer_log_probs(reference, batch.tokens, batch.targets).total)


def for_trl(batch: preferences.PairBatch) -> dict[str, torch.Tensor]:
    judged = torch.nn.functional.pad((batch.targets >= 0).long()[:, :-1], (1, 0))
    return {"input_ids": batch.tokens, "attention_mask": batch.real.long(), "completion_mask": judged}


def trainer(name: str, folder: Path, out: Path, **options: object):
    """A trainer of trl on the model of transformers, with another one for its reference."""
    trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    model, other = (transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
                    for path in (folder, folder / "reference"))
    words = transformers.AutoTokenizer.from_pretrained(folder)
    row = {"prompt": "a", "completion": "b", "label": True} if name == "KTO" else {
        "prompt": "a", "chosen": "b", "rejected": "c"}
    config = getattr(trl, f"{name}Config")(output_dir=str(out), use_cpu=True, report_to="none", bf16=False,
                                           gradient_checkpointing=False, disable_dropout=True,
                                           per_device_train_batch_size=2, **options)
    return getattr(trl, f"{name}Trainer")(
        model=model, ref_model=other, args=config, train_dataset=datasets.Dataset.from_list([row] * 2),
        processing_class=words), model.train()


def by_their_names(model: Decoder, values: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """Gradients, or weights, under the names that transformers has for them."""
    carrier = copy.deepcopy(model)
    for key, p in carrier.named_parameters():
        p.data = values[key].detach().clone()
    checkpoints.save(carrier, folder)
    return load_file(folder / "model.safetensors")


def take(steps: list[torch.optim.Optimizer]) -> None:
    """A step of each optimizer."""
    for optimizer in steps:
        optimizer.step()
        optimizer.zero_grad()


def assert_same_weights(ours, model, folder) -> None:
    """After ten steps, by transformers' names."""
    found = by_their_names(ours, dict(ours.named_parameters()), folder)
    assert max(float((found[key] - p).abs().max()) for key, p in model.named_parameters()) < 2e-5


def same_gradients(ours: Decoder, theirs: torch.nn.Module, folder: Path) -> float:
    """The largest difference of a gradient over the largest gradient."""
    found = by_their_names(ours, {key: p.grad for key, p in ours.named_parameters()}, folder)
    expected = {key: p.grad for key, p in theirs.named_parameters()}
    assert found.keys() == expected.keys()
    largest = max(grad.abs().max() for grad in expected.values())
    return max(float((found[key] - grad).abs().max() / largest) for key, grad in expected.items())


def close(ours: torch.Tensor, expected: torch.Tensor, step: int) -> bool:
    """To 1e-6, and after some steps, in which AdamW makes much of the last bit of a gradient, to 5e-6."""
    value = expected.item()
    return abs(ours.item() - value) <= (1e-6 if step == 0 else 5e-6) * max(1.0, abs(value))


def ours_and_reference(folder: Path) -> tuple[Decoder, Decoder]:
    return (checkpoints.load(folder, dtype=torch.float32).train(),
            checkpoints.load(folder / "reference", dtype=torch.float32))


# ---- the losses, against trl's trainers and functions

DPO = {"dpo": ("sigmoid", {}), "robust": ("robust", {"label_smoothing": 0.2}), "hinge": ("hinge", {}),
       "ipo": ("ipo", {})}


@pytest.mark.parametrize("name", DPO)
def test_dpo_and_its_kin_are_those_of_trl_for_ten_steps(name, folder, tmp_path):
    """Value and gradients of the first step; then ten steps of AdamW, and the weights behind them."""
    kind, more = DPO[name]
    theirs, model = trainer("DPO", folder, tmp_path / "trl", loss_type=[kind], beta=0.3, **more)
    ours, reference = ours_and_reference(folder)
    options = argparse.Namespace(**{**OPTIONS, **more, "loss": name})
    steps = [torch.optim.AdamW(each.parameters(), lr=1e-3) for each in (ours, model)]
    for step in range(10):
        batch = batch_of(ours, reference, step)
        loss, said = losses.preference_loss(ours, batch, options)
        expected = theirs.compute_loss(model, for_trl(batch))
        assert close(loss / 3, expected, step)
        (loss / 3).backward()
        expected.backward()
        if step == 0:
            assert same_gradients(ours, model, tmp_path / "gradients") <= 1e-6
            assert abs(said["margin"] / 3 - theirs._metrics["train"]["rewards/margins"][0]) < 1e-6 * 3
        take(steps)
    assert_same_weights(ours, model, tmp_path / "weights")


def test_smoothed_labels_are_those_of_the_authors():
    """trl has no cDPO any more; the formula of the note, on numbers: with ε = 1/2 there is nothing to prefer."""
    delta = torch.tensor([-2.0, 0.0, 3.0])
    expected = -0.75 * torch.log(1 / (1 + torch.exp(-0.5 * delta))) - 0.25 * torch.log(1 / (1 + torch.exp(0.5 * delta)))
    assert torch.allclose(losses.dpo(delta, 0.5, 0.25), expected, atol=1e-7)
    assert torch.allclose(losses.dpo(delta, 0.5, 0.5), losses.dpo(-delta, 0.5, 0.5))


def test_kto_is_that_of_trl_for_ten_steps(folder, tmp_path):
    theirs, model = trainer("KTO", folder, tmp_path / "trl", beta=0.3, desirable_weight=1.3, undesirable_weight=0.7)
    ours, reference = ours_and_reference(folder)
    options = argparse.Namespace(**OPTIONS)
    steps = [torch.optim.AdamW(each.parameters(), lr=1e-3) for each in (ours, model)]
    seen, above_0 = set(), 0
    for step in range(10):
        batch = batch_of(ours, reference, step, rows=4)
        every = for_trl(batch)
        halves = {f"{prefix}{key}": part for key, whole in every.items()
                  for prefix, part in zip(("", "KL_"), whole.chunk(2), strict=True)}
        seen.add(tuple(batch.labels.tolist()))
        loss, said = losses.label_loss(ours, batch, options)
        expected = theirs.compute_loss(model, halves | {"label": batch.labels})
        above_0 += float(said["kl"]) > 0
        assert close(loss / 4, expected, step) and abs(said["kl"] / 4 - theirs._metrics["train"]["kl"][-1]) < 1e-4
        (loss / 4).backward()
        expected.backward()
        if step == 0:
            assert same_gradients(ours, model, tmp_path / "gradients") <= 1e-6
        for optimizer in steps:
            optimizer.step()
            optimizer.zero_grad()
    assert len(seen) > 3 and 0 < above_0
    found = by_their_names(ours, dict(ours.named_parameters()), tmp_path / "weights")
    assert max(float((found[key] - p).abs().max()) for key, p in model.named_parameters()) < 2e-5


def test_z_of_kto_is_never_below_0(folder):
    """Where the model has come to find strange answers less likely than the reference does, by 50 nats here."""
    ours, reference = ours_and_reference(folder)
    batch = batch_of(ours, reference, 0, rows=4)
    batch = batch._replace(reference=batch.reference + 50)
    loss, said = losses.label_loss(ours, batch, argparse.Namespace(**OPTIONS))
    ratio = (answer_log_probs(ours, batch.tokens, batch.targets).total - batch.reference)[:4]
    expected = losses.kto(ratio, batch.labels, torch.tensor(0.0), 0.3, (1.3, 0.7)).sum()
    assert said["kl"] == 0 and torch.allclose(loss, expected)


def theirs_of(name: str):
    """trl's function of the mean log-probabilities of both answers."""
    pytest.importorskip("trl")
    if name == "simpo":
        from trl.experimental.cpo import CPOTrainer
        me = SimpleNamespace(alpha=0.0, beta=0.3, simpo_gamma=0.5, loss_type="simpo", label_smoothing=0,
                             accelerator=HERE)
        return CPOTrainer.get_batch_logps, lambda a, b: CPOTrainer.cpo_loss(me, a, b)[0]
    from trl.experimental.orpo import ORPOTrainer
    me = SimpleNamespace(beta=0.3, accelerator=HERE)
    return ORPOTrainer.get_batch_logps, lambda a, b: -a - ORPOTrainer.odds_ratio_loss(me, a, b)[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["orpo", "simpo"])
def test_orpo_and_simpo_are_those_of_trl_for_ten_steps(name, folder, tmp_path):
    """trl's functions over transformers' logits. ORPO's first term over the answer alone, as in the paper: in trl it is
    over the prompt too."""
    transformers = pytest.importorskip("transformers")
    log_probs, loss_of = theirs_of(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    ours, reference = ours_and_reference(folder)
    options = argparse.Namespace(**{**OPTIONS, "loss": name})
    steps = [torch.optim.AdamW(each.parameters(), lr=1e-3) for each in (ours, model)]
    for step in range(10):
        batch = batch_of(ours, reference, step)
        loss, _ = losses.preference_loss(ours, batch, options)
        labels = torch.where(for_trl(batch)["completion_mask"] > 0, batch.tokens, -100)
        logits = model(batch.tokens, attention_mask=batch.real.long()).logits
        expected = loss_of(*log_probs(logits, labels, average_log_prob=True).chunk(2)).mean()
        assert close(loss / 3, expected, step)
        (loss / 3).backward()
        expected.backward()
        if step == 0:
            assert same_gradients(ours, model, tmp_path / "gradients") <= 1e-6
        take(steps)
    assert_same_weights(ours, model, tmp_path / "weights")


def test_orpo_stays_finite_where_a_probability_is_nearly_1_or_0():
    log_p = torch.tensor([-1e-7, -0.6931, -0.7, -90.0], requires_grad=True)
    odds = losses.log_odds(log_p)
    odds.sum().backward()
    exact = log_p.detach().double() - torch.log(-torch.expm1(log_p.detach().double()))
    assert torch.allclose(odds.double(), exact, rtol=1e-6, atol=1e-6) and log_p.grad.isfinite().all()
    assert torch.allclose(log_p.grad.double(), -1 / torch.expm1(log_p.detach().double()), rtol=1e-5)


# ---- rows

def written(folder: Path, tmp_path: Path, *items: dict, labels: bool = False, **options: object):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    words = tokenizer.load(folder)
    sets = preferences.Sets([path], None, labels=labels)
    where = chat_store.folder_for(tmp_path, words, sets.chats)
    chat_store.build(where, words, sets.chats)
    rows = {"context": 64, "long": "drop", "colour": False} | options
    return words, *sets.rows(where, words, **rows)


@pytest.mark.filterwarnings("ignore")
def test_ids_are_those_of_trl(folder, tmp_path):
    """A dialogue of two turns, of which the last answer is compared."""
    prompt = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "naïve"},
              {"role": "user", "content": "fox?"}]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("a brown fox", "123"))
    words, (rows,), *_ = written(folder, tmp_path, {"prompt": prompt, "chosen": chosen, "rejected": rejected})
    theirs, _ = trainer("DPO", folder, tmp_path / "trl")
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"prompt": prompt, "chosen": chosen, "rejected": rejected}])
    row = theirs._prepare_dataset(data, theirs.processing_class, theirs.args, "train")[0]
    for ours, answer in zip(rows.items[0].examples, (row["chosen_ids"], row["rejected_ids"]), strict=True):
        assert ours.tokens.tolist() == row["prompt_ids"] + answer
        judged = np.flatnonzero(ours.targets >= 0) + 1
        assert judged.tolist() == [*range(len(row["prompt_ids"]), len(ours.tokens))]


def test_a_batch_has_better_answers_first_and_padding_behind(folder, tmp_path):
    words, (rows,), held, notes = written(
        folder, tmp_path, {"prompt": "a", "chosen": "b b b", "rejected": "c"},
        {"prompt": "d", "chosen": "e", "rejected": "f f f f f f", "margin": 2})
    batch = rows.stack([rows.row(0), rows.row(1)])
    said = [words.decode(ids[ids >= 0].tolist()) for ids in batch.targets]
    assert said == ["b b b", "e", "c", "f f f f f f"] and held is None
    assert batch.margins.tolist() == [0, 2] and batch.divisor == 2
    assert batch.seen == sum(len(one.tokens) for item in rows.items for one in item.examples) == int(batch.real.sum())
    assert batch.reference.isnan().all() and batch.to(torch.device("cpu")).tokens.equal(batch.tokens)
    model = checkpoints.load(folder, dtype=torch.float32)
    alone = [answer_log_probs(model, *(torch.from_numpy(part[None].astype(np.int64)) for part in one)).total
             for item in zip(*(item.examples for item in rows.items), strict=True) for one in item]
    together = answer_log_probs(model, batch.tokens, batch.targets).total
    assert torch.allclose(torch.cat(alone), together, atol=1e-5)


def test_log_probs_are_those_of_the_logits_in_pieces_too(folder, monkeypatch):
    model = checkpoints.load(folder, dtype=torch.float32)
    batch = batch_of(model, model, 0)
    logits = torch.log_softmax(model(batch.tokens), -1)
    each = logits.gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0] * (batch.targets >= 0)
    monkeypatch.setattr("nanollm.training.log_probs.PIECE", 2 * model.config.vocab)
    found = answer_log_probs(model, batch.tokens, batch.targets)
    assert torch.allclose(found.total, each.sum(1), atol=1e-5) and found.tokens.tolist() == (
        (batch.targets >= 0).sum(1).tolist())


def test_pairs_become_labels_and_each_has_the_answer_to_another_prompt(folder, tmp_path):
    words, (rows,), *_ = written(
        folder, tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "d", "completion": "e", "label": False}, labels=True)
    said = [[words.decode(one.targets[one.targets >= 0].tolist()) for one in item.examples] for item in rows.items]
    assert said == [["b", "e"], ["c", "e"], ["e", "b"]]
    assert [item.label for item in rows.items] == [True, False, False]
    with pytest.raises(DataError, match="line 1: all prompts are the same one"):
        written(folder, tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}, labels=True)


def test_answers_to_one_prompt_are_held_out_together(folder, tmp_path):
    items = [{"prompt": f"q{i // 2}", "chosen": f"yes {i}", "rejected": "no"} for i in range(80)]
    words, (rows,), held, notes = written(folder, tmp_path, *items)
    prompts = [{words.decode(one.tokens[: (one.targets >= 0).argmax()].tolist())
                for one, _ in (item.examples for item in some.items)} for some in (rows, held)]
    assert not any("nothing is held out" in note for note in notes)
    assert held.rows == 4 and rows.rows == 76 and not prompts[0] & prompts[1]


@pytest.mark.parametrize("items, options, words", [
    ([{"prompt": "a", "chosen": "b", "rejected": "b"}], {}, "in all 1 pair both answers are the same"),
    ([{"prompt": "a", "completion": "b", "label": True}], {}, "line 1: an answer with a label, expected a chosen"),
    ([{"prompt": "a " * 99, "chosen": "b", "rejected": "c"}], {}, "no item fits --context 64"),
    ([{"prompt": "a " * 99, "chosen": "b", "rejected": "c"}], {"long": "error"}, "line 1: longer than --context 64"),
])
def test_what_cannot_be_compared_is_named(folder, tmp_path, items, options, words):
    with pytest.raises(DataError, match=words):
        written(folder, tmp_path, *items, **options)


def test_what_is_passed_over_is_said(folder, tmp_path):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    *_, notes = written(folder, tmp_path, pair, pair | {"chosen": "c"}, pair | {"chosen": "b " * 99})
    assert any(note.endswith("1 pair passed over, as both answers are the same") for note in notes)
    assert any("1 item longer than --context 64 left out, the first at" in note for note in notes)
    assert any("nothing is held out to measure on: of fewer than 20" in note for note in notes)
