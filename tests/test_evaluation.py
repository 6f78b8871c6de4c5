"""Evaluation: the held-out loss is what a loop by hand gives, the best checkpoint is kept and exported, a run ends
early, averaged weights are torch's, and all of it goes on after --resume, to the bit.

Where losses have to rise and fall on demand they are planned: `PLAN` by the step.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import checkpoints
import train
from nanollm.data import prepare as texts
from nanollm.data.stream import open_folder
from nanollm.errors import InputError, RunError
from nanollm.model import Decoder
from nanollm.presets import preset
from nanollm.training import runs, state
from nanollm.training.evaluation import Best, find_checkpoint
from nanollm.training.log import read_log
from tests.test_resume import cut, here, outcome, run, saved, steps
from tests.toys import grammar

SHORT = ("--steps", "8", "--save-every", "2", "--eval-every", "2", "--optimizer", "adamw")
PLAN = {0: 6.0, 2: 5.0, 4: 4.0, 6: 4.5, 8: 4.25}        # the best is that of step 4


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = grammar(tmp_path_factory.mktemp("text"))
    texts.prepare(texts.read(folder), folder / "shards", vocab=300, tokenizer=None, context=32)
    return folder / "shards"


@pytest.fixture
def planned(monkeypatch) -> None:
    monkeypatch.setattr(train.Run, "held_out", lambda self, most=None: {"loss": PLAN[self.step]})


def weights(checkpoint: Path, kind: str = "model") -> dict[str, torch.Tensor]:
    """The parameters in a checkpoint of one rank, or their averages."""
    found = load_file(checkpoint / "rank-0.safetensors")
    return {name.removeprefix(f"{kind}."): value for name, value in found.items() if name.startswith(f"{kind}.")}


def exported(out: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoints.load(out).named_parameters())


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def evaluations(out: Path) -> list[tuple[int, float]]:
    log = read_log(out / "log.jsonl")
    return [(entry["step"], entry["held_out_loss"]) for entry in log if "held_out_loss" in entry]


@torch.no_grad()
def by_hand(model: Decoder, data: Path) -> float:
    """The mean over all held-out tokens, a row at a time."""
    source, total, count = open_folder(data, 32)[1], 0.0, 0
    for index in range(source.rows):
        tokens, targets, positions = (torch.from_numpy(part)[None] for part in source.row(index))
        total += F.cross_entropy(model(tokens, positions)[0], targets[0], reduction="sum").item()
        count += int((targets >= 0).sum())
    return total / count


# ---- the held-out loss

def test_the_first_evaluation_is_of_the_first_weights_and_the_last_of_what_is_written(data, tmp_path):
    assert here(data, tmp_path / "run", *SHORT) is None
    found = dict(evaluations(tmp_path / "run"))
    assert [*found] == [0, 2, 4, 6, 8]
    assert found[0] == pytest.approx(by_hand(Decoder(preset("llama", 300, 32)), data), abs=1e-5)
    assert found[8] == pytest.approx(by_hand(checkpoints.load(tmp_path / "run"), data), abs=1e-5)


def test_evaluation_alone_of_a_run_and_of_a_folder_changes_nothing(data, tmp_path, monkeypatch, capsys):
    """A run needs no other option: it is found in run.json, with the command that began it in another folder."""
    out = tmp_path / "run"
    assert here(data, out, *SHORT, "--preset", "qwen3") is None
    last = evaluations(out)[-1][1]
    before = sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*") if path.name != "lock")
    for args in (("--out", out), ("--init", out, "--data", data)):
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["train.py", "--eval-only", *map(str, args), "--dtype", "float32"])
        monkeypatch.chdir(tmp_path)
        train.run()
        said = capsys.readouterr().out
        line = next(line for line in said.splitlines() if line.startswith("  this model"))
        nats, bits = map(float, line.split()[-2:])
        assert nats == pytest.approx(last, abs=6e-4)
        facts = texts.facts(data)
        assert bits == pytest.approx(nats / 0.6931 * facts.held_out_targets / facts.held_out_bytes, abs=2e-3)
    assert sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*") if path.name != "lock") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


# ---- the best

def test_the_best_is_the_lowest_number():
    best = Best()
    assert [best.judge(step, loss) for step, loss in enumerate([float("nan"), 3.0, 3.0, 2.0, float("inf"), 2.5])] == [
        False, True, False, True, False, False]
    assert best == Best(step=3, loss=2.0, since=2) == Best(**json.loads(json.dumps(best.facts())))
    assert best.exhausted(2) and not best.exhausted(3) and not best.exhausted(None)


def test_the_best_checkpoint_stays_beside_the_newest_and_is_exported(planned, data, tmp_path):
    out = tmp_path / "run"
    assert here(data, out, *SHORT, "--keep", "1", "--keep-best") is None
    assert saved(out) == [4, 8] and state.read_manifest(out / "steps" / "00000008")["facts"]["best"]["step"] == 4
    assert equal(exported(out), weights(out / "steps" / "00000004"))
    assert evaluations(out) == [*PLAN.items()]


def test_a_better_evaluation_is_a_checkpoint_although_none_is_due(planned, data, tmp_path):
    assert here(data, tmp_path / "run", *SHORT, "--save-every", "100", "--keep-best", "--keep", "9") is None
    assert saved(tmp_path / "run") == [0, 2, 4, 8]


def test_any_kept_checkpoint_is_exported_without_training(planned, data, tmp_path, capsys):
    out = tmp_path / "run"
    assert here(data, out, *SHORT, "--keep", "9", "--keep-best") is None
    log = (out / "log.jsonl").read_bytes(), (out / "run.json").read_bytes()
    for which, step in (("6", 6), ("last", 8), ("2", 2), ("best", 4)):
        assert here(data, out, "--export", which, "--optimizer", "adamw") is None
        assert f"the model is now that of step {step}" in capsys.readouterr().out
        assert equal(exported(out), weights(out / "steps" / f"{step:08}"))
    assert ((out / "log.jsonl").read_bytes(), (out / "run.json").read_bytes()) == log
    assert "none of step 5; there are steps 0, 2, 4, 6, 8" in here(data, out, "--export", "5", "--optimizer", "adamw")
    assert "holds no run" in here(data, tmp_path / "none", "--export", "5")


def test_a_best_that_was_not_kept_is_named(planned, data, tmp_path):
    assert here(data, tmp_path / "run", *SHORT, "--keep", "1") is None
    with pytest.raises(RunError, match="the best one, of step 4, was not kept; --keep-best keeps it; there is step 8"):
        find_checkpoint(tmp_path / "run" / "steps", "best")
    with pytest.raises(RunError, match="no checkpoint"):
        find_checkpoint(tmp_path, "last")


# ---- early stopping

def test_a_run_ends_early_and_goes_on_where_more_patience_is_given(planned, data, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert here(data, whole, *SHORT) is None
    early = (*SHORT, "--patience", "1")
    assert here(data, out, *early) is None
    assert "no lower held-out loss since step 4" in capsys.readouterr().out
    assert saved(out)[-1] == 6 and evaluations(out) == [*PLAN.items()][:4] and len(steps(out)) == 6
    assert equal(exported(out), weights(out / "steps" / "00000006"))
    assert here(data, out, *early, "--resume") is None and len(steps(out)) == 6         # over is over
    assert here(data, out, *SHORT, "--patience", "2", "--resume") is None
    assert outcome(out) == outcome(whole)


def test_what_early_stopping_remembers_goes_on(planned, data, tmp_path):
    early = (*SHORT, "--patience", "2", "--keep", "9", "--keep-best")
    assert here(data, tmp_path / "whole", *early) is None and saved(tmp_path / "whole")[-1] == 8
    out = cut(tmp_path / "whole", 6, tmp_path / "run")
    assert here(data, out, *early, "--resume") is None
    assert outcome(out) == outcome(tmp_path / "whole")
    facts = [state.read_manifest(folder / "steps" / "00000008")["facts"] for folder in (out, tmp_path / "whole")]
    assert facts[0] == facts[1] and facts[0]["best"] == {"step": 4, "loss": 4.0, "since": 2, "newest": 4.25}


# ---- averaged weights

EMA = (*SHORT, "--ema", "0.7", "--save-every", "1", "--keep", "99")


def test_averaged_weights_are_those_of_torch(data, tmp_path):
    """Its AveragedModel, fed with the weights of every checkpoint: the same bits. They are what is evaluated and
    written, and the weights that are trained are those of a run without them."""
    out = tmp_path / "run"
    assert here(data, out, *EMA, "--keep-best") is None
    first = Decoder(preset("llama", 300, 32))
    average = AveragedModel(first)
    average.update_parameters(first)                                            # the first call copies
    for step in range(1, 9):
        average.multi_avg_fn = get_ema_multi_avg_fn(min(0.7, (1 + step) / (10 + step)))
        new = Decoder(preset("llama", 300, 32))
        new.load_state_dict(weights(out / "steps" / f"{step:08}"), strict=False)
        average.update_parameters(new)
    means = dict(average.module.named_parameters())
    assert equal(weights(out / "steps" / "00000008", "average"), means) and equal(exported(out), means)
    assert evaluations(out)[-1][1] == pytest.approx(by_hand(average.module, data), abs=1e-5)
    assert here(data, tmp_path / "plain", *SHORT) is None
    assert steps(tmp_path / "plain") == steps(out)


def test_averaged_weights_go_on(data, tmp_path):
    assert here(data, tmp_path / "whole", *EMA) is None
    out = cut(tmp_path / "whole", 5, tmp_path / "run")
    assert here(data, out, *EMA, "--resume") is None
    assert outcome(out) == outcome(tmp_path / "whole")
    last = [folder / "steps" / "00000008" / "rank-0.safetensors" for folder in (out, tmp_path / "whole")]
    assert last[0].read_bytes() == last[1].read_bytes()
    assert "--ema 0.7 → None" in here(data, out, *SHORT, "--resume")


@pytest.mark.slow
def test_averaged_weights_of_two_ranks_are_those_of_one(data, tmp_path):
    for ranks in (1, 2):
        run(data, tmp_path / str(ranks), *EMA, "--keep-best", ranks=ranks)
    one, two = (exported(tmp_path / name) for name in "12")
    assert one.keys() == two.keys() and max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
    pairs = zip(evaluations(tmp_path / "1"), evaluations(tmp_path / "2"), strict=True)
    assert max(abs(a - b) for (_, a), (_, b) in pairs) < 5e-6
    out = cut(tmp_path / "2", 5, tmp_path / "elastic")                          # and a checkpoint of two goes on on one
    run(data, out, *EMA, "--keep-best", "--resume", ranks=1)
    again = exported(out)
    assert max((again[name] - two[name]).abs().max().item() for name in two) < 1e-5


# ---- dropout

@pytest.mark.parametrize("residual, attention", [(0.3, 0.0), (0.0, 0.3)])
def test_dropout_is_that_of_gpt2(tmp_path, residual, attention):
    """transformers' own, from the same seed: the same numbers are dropped in the same places."""
    transformers = pytest.importorskip("transformers")
    from nanollm.training.dropout import add_attention_dropout, add_dropout
    config = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, n_positions=16,
                                     embd_pdrop=residual, resid_pdrop=residual, attn_pdrop=attention)
    theirs = transformers.GPT2LMHeadModel(config)
    theirs.save_pretrained(tmp_path)
    ours, tokens = checkpoints.load(tmp_path), torch.randint(0, 99, (3, 12))
    if residual:
        add_dropout(ours, residual)
    if attention:
        add_attention_dropout(ours, attention)
    with torch.no_grad():
        quiet = ours(tokens)
        found = []
        for model in (theirs.train(), ours.train()):
            torch.manual_seed(5)
            logits = model(tokens)
            found.append(logits if isinstance(logits, torch.Tensor) else logits.logits)
    assert torch.allclose(*found, atol=2e-5) and not torch.allclose(found[1], quiet, atol=1e-2)
    with torch.no_grad():
        assert torch.allclose(quiet, theirs.eval()(tokens).logits, atol=2e-5)


def test_attention_that_cannot_drop_is_named():
    from nanollm.training.dropout import add_attention_dropout
    with pytest.raises(InputError, match="--attention-dropout: layers.0.mixer is Mamba; only plain attention has"):
        add_attention_dropout(Decoder(preset("mamba", 300, 32)), 0.1)


DROPOUT = (*SHORT, "--dropout", "0.2", "--attention-dropout", "0.1", "--micro-batch", "2")


def test_dropout_goes_on_and_is_drawn_again_where_activations_are_recomputed(data, tmp_path):
    assert here(data, tmp_path / "whole", *DROPOUT, "--keep", "9") is None
    assert here(data, tmp_path / "none", *SHORT, "--micro-batch", "2") is None
    assert steps(tmp_path / "whole") != steps(tmp_path / "none")
    assert evaluations(tmp_path / "whole")[0] == evaluations(tmp_path / "none")[0]      # nothing is dropped there
    out = cut(tmp_path / "whole", 4, tmp_path / "run")
    torch.rand(7)                                               # whatever else was drawn meanwhile
    assert here(data, out, *DROPOUT, "--recompute", "full", "--resume") is None
    assert outcome(out) == outcome(tmp_path / "whole")


# ---- nothing changes before all is checked

def test_a_run_that_cannot_go_on_is_as_it_was(data, tmp_path):
    out = tmp_path / "run"
    assert here(data, out, *SHORT) is None
    file = out / "steps" / "00000008" / "rank-0.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "lock"}
    assert "damaged" in here(data, out, *SHORT, "--resume")
    assert "--seed 0 → 1" in here(data, out, *SHORT, "--resume", "--seed", "1")
    assert "is not installed" in here(data, out, *SHORT, "--resume", "--wandb", "x") or __import__("wandb")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "lock"} == before


def test_a_run_of_an_older_version_goes_on(data, tmp_path):
    """Its record lacks every option that came later, its checkpoints what evaluations remember."""
    whole = tmp_path / "whole"
    assert here(data, whole, *SHORT, "--keep", "9") is None
    out = cut(whole, 4, tmp_path / "run")
    record = json.loads((out / "run.json").read_text())
    for name in ("min_lr", "betas", "dropout", "ema", "keep_best", "patience", "export", "eval_only", "mlflow",
                 "epochs", "gradient_accumulation", "warmup", "clip"):
        del record["options"][name]
    runs.write(out / "run.json", json.dumps(record))
    manifest = state.read_manifest(out / "steps" / "00000004")
    del manifest["facts"]["best"]
    state.write_manifest(out / "steps" / "00000004", manifest)
    assert here(data, out, *SHORT, "--warmup", "20", "--resume", "--ema", "0.5").startswith(f"error: {out}: holds")
    assert "--warmup 20 → 2" in here(data, out, *SHORT, "--resume")             # the toy's default was 20
    record["options"]["warmup"] = 2
    runs.write(out / "run.json", json.dumps(record))
    assert here(data, out, *SHORT, "--resume") is None
    assert outcome(out) == outcome(whole)


def test_the_same_data_by_another_path_is_the_same(data, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    assert here(data, whole, *SHORT, "--keep", "9") is None
    out = cut(whole, 4, tmp_path / "run")
    record = json.loads((out / "run.json").read_text())
    monkeypatch.chdir(data.parent)
    record["options"]["data"] = ["shards"]
    runs.write(out / "run.json", json.dumps(record))
    assert here(data, out, *SHORT, "--resume") is None
    assert outcome(out) == outcome(whole)


def test_a_model_is_not_replaced_by_the_run_that_starts_from_it(data, tmp_path):
    out = tmp_path / "run"
    assert here(data, out, *SHORT) is None
    before = (out / "model.safetensors").read_bytes(), (out / "tokenizer.json").read_bytes()
    for option in ("--init", "--tokenizer"):
        said = here(data, out, *SHORT, option, str(out), "--force")
        assert said.startswith(f"error: {option} and --out are both {out}: ")
    assert ((out / "model.safetensors").read_bytes(), (out / "tokenizer.json").read_bytes()) == before


def test_a_name_on_the_hub_is_trained_as_its_folder_is(data, tmp_path, monkeypatch):
    base = tmp_path / "base"
    assert here(data, base, *SHORT) is None
    from checkpoints.layouts import hub
    original = hub.local_path
    monkeypatch.setattr(hub, "local_path", lambda source, *a, **b: base if str(source) == "owner/name" else
                        original(source, *a, **b))
    tuned = ("--steps", "3", "--lr", "0.001")
    assert here(data, tmp_path / "a", *tuned, "--init", "owner/name") is None
    assert here(data, tmp_path / "b", *tuned, "--init", str(base)) is None
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")
    assert json.loads((tmp_path / "a" / "run.json").read_text())["options"]["init"] == "owner/name"


# ---- the seam

def test_a_method_is_a_loss_and_a_collator(data, tmp_path, monkeypatch):
    """One that the loop has never heard of: it learns to say one token always, and counts rows, not targets."""
    from nanollm.training import losses, method

    def always_seven(model: Decoder, batch, options) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits = model(batch.tokens, batch.positions)[:, -1]
        nats = F.cross_entropy(logits, torch.full((len(logits),), 7), reduction="sum")
        return nats, {"loss": nats.detach(), "right": (logits.argmax(-1) == 7).sum()}

    monkeypatch.setattr("nanollm.data.stream.Batch.divisor", property(lambda self: len(self.tokens)))
    build = train.build

    def built(*given):
        made = build(*given)
        made.method = method.Method(always_seven)
        return made

    monkeypatch.setattr(train, "build", built)
    assert here(data, tmp_path / "run", *SHORT, "--lr", "0.01") is None
    log = [entry for entry in read_log(tmp_path / "run" / "log.jsonl") if "loss" in entry]
    assert log[0]["targets"] == 4 and log[0]["right"] == 0 and log[-1]["right"] == 1 and "log_z" not in log[0]
    assert evaluations(tmp_path / "run")[-1][1] < 1
    assert losses.means({"loss": 8.0, "log_z": 16.0}, 4) == {"loss": 2.0, "log_z": 2.0}
