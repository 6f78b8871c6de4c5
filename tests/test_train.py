"""train.py: presets are published shapes, toys learn, transformers reads what is saved, bad input writes nothing."""

import dataclasses
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoints
import train
from nanollm import cli, presets
from nanollm.data.stream import open_folder
from nanollm.errors import ConfigError, InputError
from nanollm.model import Decoder
from nanollm.text import tokenizer
from nanollm.training import arguments, options
from nanollm.training.plot import loss_curve
from tests import forked
from tests.toys import grammar

TOYS = ["llama", "qwen3", "mistral", "mixtral", "mamba"]
TRAINED = [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("llama", "qwen3"))) for name in TOYS]
ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A small grammar: enough to learn from in a few steps."""
    return grammar(tmp_path_factory.mktemp("text"))


def run(*args: str | Path) -> None:
    """One run in this process; SystemExit if the command line would have ended otherwise than with 0."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, args)])
        cli.main(train.run)


def run_in_two(monkeypatch: pytest.MonkeyPatch, *args: str | Path) -> None:
    """The same run, left in the middle of its fifth step and resumed."""
    take, taken = train.take_step, []

    def leave(*given):
        taken.append(take(*given))
        if len(taken) == 5:
            raise SystemExit("killed")
        return taken[-1]

    with monkeypatch.context() as patch:
        patch.setattr(train, "take_step", leave)
        with pytest.raises(SystemExit, match="killed"):
            run(*args)
    run(*args, "--resume")


def quick(text: Path, out: Path, *more: str) -> list[dict]:
    run("--data", text, "--out", out, "--steps", "12", "--vocab", "300", "--context", "32", "--batch-size", "4",
        "--warmup", "2", "--eval-every", "4", "--sample-every", "6", "--dtype", "float32", *more)
    return log_of(out)


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses_of(log: list[dict]) -> list[float]:
    return [entry["loss"] for entry in log if "loss" in entry]


SHORT = ("--context", "32", "--batch-size", "4", "--dtype", "float32")


@pytest.fixture(scope="module")
def runs(text, tmp_path_factory):
    """One run for each toy, on demand."""
    done: dict[str, tuple[Path, list[dict]]] = {}

    def get(name: str) -> tuple[Path, list[dict]]:
        if name not in done:
            folder = tmp_path_factory.mktemp("runs") / name
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("nanollm.training.log.loss_curve", loss_curve)        # which conftest.py takes away
                done[name] = folder, quick(text, folder, "--preset", name)
        return done[name]

    return get


# ---- presets

PUBLISHED = {       # parameters, as counted in the published weights; a tied head once
    "llama-1b": 1_235_814_400, "llama-8b": 8_030_261_248, "qwen3-0.6b": 596_049_920, "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704, "mamba-130m": 129_135_360, "mamba-2.8b": 2_768_345_600,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_sizes_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = Decoder(presets.preset(name))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_every_preset_is_a_toy_that_is_trained_here_or_a_size_that_is_counted_here():
    assert set(presets.PRESETS) == {f"{toy}-toy" for toy in TOYS} | set(PUBLISHED)
    assert presets.preset("llama") == presets.preset("llama-toy") != presets.preset("llama", vocab=300)
    with pytest.raises(ConfigError, match="did you mean mixtral"):
        presets.preset("mixtrall")


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_real_sizes_have_the_shapes_that_transformers_gives_the_exported_config(name):
    """Through our own writer, so a mistake there would show in test_real_sizes_have_the_published_number… first."""
    import transformers

    from checkpoints.families import write_config
    values = write_config(presets.preset(name))[1]
    config = transformers.AutoConfig.for_model(**{key: value for key, value in values.items() if value is not None})
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in theirs.parameters()) == PUBLISHED[name]


# ---- training

@pytest.mark.parametrize("name", TRAINED)
def test_each_toy_learns(runs, name):
    folder, log = runs(name)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    held_out = [entry["held_out_loss"] for entry in log if "held_out_loss" in entry]
    assert len(losses) == 12 and np.isfinite(losses).all()
    assert abs(losses[0] - np.log(300)) < 0.5                                   # at first every token is as likely
    assert losses[-1] < losses[0] - 1 and held_out[-1] < held_out[0] and held_out[-1] < losses[0] - 1
    assert (log[1]["balance"] > 0) == (name == "mixtral")
    assert len([entry for entry in log if "sample" in entry]) == 2
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", TRAINED)
def test_transformers_loads_the_run_folder_with_equal_logits(runs, name):
    transformers = pytest.importorskip("transformers")
    folder, _ = runs(name)
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(folder), checkpoints.load(folder)
    words = "def alpha(beta):\n    return"
    ids = torch.tensor([tokenizer.load(folder).encode(words)])
    assert transformers.AutoTokenizer.from_pretrained(folder)(words)["input_ids"] == ids[0].tolist()
    assert theirs.generation_config.eos_token_id == tokenizer.load(folder).eos_id
    ids = torch.cat([ids, torch.randint(0, ours.config.vocab, (1, 40))], 1)     # past mistral's … and into rare tokens
    with torch.no_grad():
        a, b = theirs(ids).logits, ours(ids)
    assert (a - b).abs().max() < 1e-5 * a.abs().max()


def test_the_same_seed_gives_the_same_numbers_and_the_same_weights(runs, text, tmp_path):
    folder, log = runs("llama")
    def timeless(entries):
        timed = ("tokens_per_second", "data_wait", "memory_gb")
        return [{key: value for key, value in entry.items() if key not in timed}
                for entry in entries if "checkpoint" not in entry]
    assert timeless(quick(text, tmp_path / "again", "--preset", "llama")) == timeless(log)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert timeless(quick(text, tmp_path / "other", "--preset", "llama", "--seed", "1")) != timeless(log)


@pytest.mark.slow
def test_adamw_and_bfloat16_learn_too(text, tmp_path):
    log = quick(text, tmp_path / "run", "--optimizer", "adamw", "--lr", "0.003", "--dtype", "bfloat16")
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5


def test_documents_in_a_row_do_not_see_each_other(runs):
    """Packing: whatever stands in one document, logits and gradients of the others in the row are the same bits."""
    model = checkpoints.load(runs("llama")[0]).train()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2]])
    found = []
    for first in ([5, 6, 7, 8], [90, 91, 92, 93]):
        tokens = torch.tensor([[*first, 30, 31, 32, 33, 34, 40, 41, 42]])
        model.zero_grad()
        logits = model(tokens, positions)
        logits[0, 4:].square().sum().backward()
        found.append((logits[0, 4:].detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])
    alone = model(torch.tensor([[30, 31, 32, 33, 34]]))
    assert torch.allclose(found[0][0][:5], alone[0], atol=1e-5)


def test_skipped_steps_change_no_weight_and_the_rows_after_them_are_the_same(text, tmp_path):
    log = quick(text, tmp_path / "run", "--skip-steps", "0:12", "--save-every", "12")
    assert len([entry for entry in log if entry.get("skipped") == "--skip-steps"]) == 12 and not losses_of(log)
    trained, drawn = checkpoints.load(tmp_path / "run"), Decoder(presets.preset("llama", 300, 32))
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), drawn.parameters(), strict=True))
    part = quick(text, tmp_path / "part", "--skip-steps", "0:3", "5:6")
    assert [entry["step"] for entry in part if "skipped" in entry] == [1, 2, 3, 6]
    assert np.isfinite(losses_of(part)).all()


def test_a_number_that_is_not_finite_stops_the_run_before_a_weight_changes(text, tmp_path, monkeypatch):
    """A NaN among the weights, as a bad step would leave it; the message names step and rows, and what to do."""
    from nanollm.training import optim
    steps = []

    def spoil(optimizers, lr):
        step(optimizers, lr)
        steps.append(lr)
        if len(steps) == 3:
            optimizers[1].param_groups[1]["params"][0].detach()[0] = torch.nan      # of a gain: all tokens pass by it

    step = optim.step
    monkeypatch.setattr(optim, "step", spoil)
    with pytest.raises(SystemExit) as error:
        quick(text, tmp_path / "run", "--save-every", "2")
    assert len(steps) == 3
    words = ("step 4", "loss nan", "rows 12 to 15", "no weight was changed", "--skip-steps 3:4")
    assert all(word in error.value.code for word in words)
    monkeypatch.undo()
    left = [path.name for path in sorted((tmp_path / "run" / "steps").iterdir())]
    assert left in (["00000002"], [".00000002.tmp"], [])


# ---- on from a checkpoint


@pytest.mark.slow
def test_a_model_that_was_fine_tuned_on_chats_answers_them(runs, tmp_path, capsys):
    """Questions of a toy, learnt by heart. The folder keeps family, dtype and tokenizer of the one it came from."""
    from nanollm.inference.generation import generate
    from nanollm.text.chat import Conversation
    base = runs("llama")[0]
    chats = {"alpha?": "beta", "beta?": "gamma", "gamma?": "delta + 1", "delta?": "return alpha"}
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in chats.items()]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": pair}) + "\n" for pair in turns))
    run("--init", base, "--chat", tmp_path / "chats.jsonl", "--out", tmp_path / "tuned", "--steps", "60", *SHORT,
        "--warmup", "5", "--lr", "0.005", "--optimizer", "muon", "--sample-every", "60", "--prompt", "gamma?")
    said = capsys.readouterr().out
    assert "⟦beta" in said and "4 chats in" in said                     # one of them is shown before the first step
    model, words = checkpoints.load(tmp_path / "tuned"), tokenizer.load(tmp_path / "tuned")
    for question, answer in chats.items():
        conversation = Conversation(words)
        conversation.add("user", question)
        ids = [*generate(model, conversation.prompt_ids(), 20, stop_ids=words.stop_ids)]
        assert ids[-1] in words.stop_ids and words.decode(ids) == answer
    assert (tmp_path / "tuned" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    log = log_of(tmp_path / "tuned")
    assert [entry["sample"] for entry in log if "sample" in entry] == ["User: gamma?\nAssistant: delta + 1"]


def test_init_keeps_what_the_folder_is(runs, text, tmp_path):
    """More text for a bfloat16 qwen3: its tokenizer reads the text, and its dtype is written."""
    model = checkpoints.load(runs("qwen3")[0], dtype=torch.bfloat16)
    checkpoints.save(model, tmp_path / "base")
    run("--init", tmp_path / "base", "--data", text, "--out", tmp_path / "more", "--steps", "4", "--context", "16",
        "--batch-size", "4", "--dtype", "float32")
    again = checkpoints.load(tmp_path / "more")
    assert again.config == model.config and {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert not torch.equal(again.embed.weight, model.embed.weight)
    assert losses_of(log_of(tmp_path / "more"))[0] < 3.5            # it knows the text; a new model would begin at 5.7


def test_a_model_that_no_family_can_express_ends_in_a_folder_too_and_that_is_said_before_the_first_step(
        runs, text, tmp_path, capsys):
    llama, mamba = presets.preset("llama", 300, 32), presets.preset("mamba", 300)
    mixer = dataclasses.replace(mamba.layers[0].mixer, inner=384, dt_rank=12)
    narrow = dataclasses.replace(mamba.layers[0], mixer=mixer)
    config = dataclasses.replace(llama, layers=(llama.layers[0], narrow))
    with pytest.warns(UserWarning, match="nanollm's own layout"):
        checkpoints.save(Decoder(config), tmp_path / "base")
    words = runs("llama")[0]
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("--init", tmp_path / "base", "--data", text, "--tokenizer", words, "--out", tmp_path / "run",
            "--steps", "2", "--batch-size", "4", "--dtype", "float32", "--sample-every", "1")
    said = capsys.readouterr().out
    assert said.index("run: will be in nanollm's own layout, which checkpoints.load") < said.index("a sample at step 1")
    again = checkpoints.load(tmp_path / "run")
    before = checkpoints.load(tmp_path / "base")
    assert again.config == config and not torch.equal(again.embed.weight, before.embed.weight)


def test_a_run_says_that_transformers_will_load_it(text, tmp_path, capsys):
    run("--data", text, "--out", tmp_path / "run", "--steps", "1", "--vocab", "300", *SHORT, "--sample-every", "1")
    said, words = capsys.readouterr().out, "run: will be a Hugging Face folder, which transformers loads too"
    assert said.index(words) < said.index("a sample at step 1")


@pytest.mark.parametrize("more, words", [
    (["--context", "64"], "made for 32 tokens, --context is 64"),
    (["--tokenizer", "other", "--context", "32"], "has a vocabulary of 300, the tokenizer of the data one of 3"),
])
def test_a_folder_of_another_shape_is_refused(runs, text, tmp_path, more, words):
    from nanollm.data import prepare as texts
    if "other" in more:
        texts.prepare(texts.read(text), tmp_path / "other", vocab=400, tokenizer=None, context=16)
        more = ["--tokenizer", str(tmp_path / "other"), "--context", "32"]
    with pytest.raises(SystemExit) as error:
        run("--init", runs("llama")[0], "--data", text, "--out", tmp_path / "run", *more)
    assert words in error.value.code


def test_shards_of_another_tokenizer_are_refused_and_mixtures_are_trained_on(runs, text, tmp_path):
    from nanollm.data import prepare as texts
    for name, vocab in (("a", 300), ("b", 400)):
        texts.prepare(texts.read(text), tmp_path / name, vocab=vocab, tokenizer=None, context=32)
    with pytest.raises(SystemExit) as error:
        run("--data", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "run")
    assert "another tokenizer" in error.value.code
    texts.prepare(list(texts.read(text))[:12], tmp_path / "c", vocab=None, tokenizer=tmp_path / "a", context=32)
    run("--data", tmp_path / "a", tmp_path / "c", "--mix", "0.75", "0.25", "--out", tmp_path / "run", *SHORT,
        "--steps", "3")
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) > 3


def test_shards_that_change_under_a_run_end_it_and_no_checkpoint_has_seen_them(text, tmp_path, monkeypatch):
    from nanollm.data import prepare as texts
    from nanollm.training import optim
    texts.prepare(texts.read(text), tmp_path / "shards", vocab=300, tokenizer=None, context=32)
    shard, steps, step = tmp_path / "shards" / "train-00000.bin", [], optim.step

    def meddle(optimizers, lr):
        step(optimizers, lr)
        steps.append(lr)
        if len(steps) == 6:
            shard.write_bytes(shard.read_bytes()[:-2] + b"\1\0")

    monkeypatch.setattr(optim, "step", meddle)
    args = ("--data", tmp_path / "shards", "--out", tmp_path / "run", "--steps", "12", *SHORT, "--save-every", "4",
            "--sample-every", "0")
    with pytest.raises(SystemExit) as error:
        run(*args)
    assert str(shard) in error.value.code and "changed since the run began" in error.value.code
    assert [path.name for path in sorted((tmp_path / "run" / "steps").glob("0*"))] == ["00000004"]
    monkeypatch.undo()
    with pytest.raises(SystemExit) as error:                    # and it cannot be gone on with: the checksum differs
        run(*args, "--resume")
    assert str(shard) in error.value.code and "crc32" in error.value.code


def test_raw_shards_need_a_vocabulary_and_give_a_model_without_tokenizer(tmp_path):
    np.random.default_rng(0).integers(0, 50, 4000).astype(np.uint16).tofile(tmp_path / "train.bin")
    options = ("--data", tmp_path / "train.bin", "--out", tmp_path / "run", "--steps", "3", *SHORT)
    with pytest.raises(SystemExit) as error:
        run(*options)
    assert "train.bin: raw shards" in error.value.code and "--vocab" in error.value.code
    with pytest.raises(SystemExit) as error:
        run(*options, "--vocab", "49")
    assert "found id 49" in error.value.code and not (tmp_path / "run").exists()
    run(*options, "--vocab", "64")
    assert checkpoints.load(tmp_path / "run").config.vocab == 64 and not (tmp_path / "run" / "tokenizer.json").exists()


def test_tensorboard_has_the_curves(text, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = quick(text, tmp_path / "run", "--tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    expected = [(entry["step"], pytest.approx(entry["loss"])) for entry in log if "loss" in entry]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected
    assert {"lr", "gradient_norm", "held_out_loss"} <= set(events.Tags()["scalars"])


def test_weights_and_biases_gets_the_numbers_and_the_facts(text, tmp_path, monkeypatch):
    """With a stand-in for the library, which would want the network. A resumed run is the same run there."""
    seen = []

    class Run:
        def log(self, values, step):
            seen.append((step, values))

        def finish(self):
            seen.append("finished")

    stand_in = type(sys)("wandb")
    stand_in.init = lambda **how: seen.append(how) or Run()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    log = quick(text, tmp_path / "run", "--wandb", "toys")
    assert seen[0]["project"] == "toys" and seen[0]["name"] == "run" and seen[-1] == "finished"
    assert seen[0]["config"]["options"]["steps"] == 12
    found = [(step, values["loss"]) for step, values in seen[1:-1] if "loss" in values]
    assert found == [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    quick(text, tmp_path / "run", "--wandb", "toys", "--resume")
    again = next(how for how in reversed(seen) if isinstance(how, dict))
    assert again["id"] == seen[0]["id"] and again["resume"] == "allow"
    quick(text, tmp_path / "run", "--wandb", "toys", "--force")                 # another run
    assert next(how for how in reversed(seen) if isinstance(how, dict))["id"] != seen[0]["id"]


def test_a_monitor_that_fails_costs_its_curve_and_never_the_run(text, tmp_path, monkeypatch):
    class Run:
        def log(self, values, step):
            if step == 3:
                raise ConnectionError("the server is gone")

        def finish(self):
            raise ConnectionError("the server is gone")

    stand_in = type(sys)("wandb")
    stand_in.init = lambda **how: Run()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    with pytest.MonkeyPatch.context() as patch:
        warned = []
        patch.setattr(warnings, "warn", lambda message, **_: warned.append(message))
        assert len(losses_of(quick(text, tmp_path / "run", "--wandb", "toys"))) == 12
    assert [word for word in warned if "gets nothing after step 2: the server is gone" in str(word)]
    stand_in.init = lambda **how: (_ for _ in ()).throw(PermissionError("no key"))
    with pytest.raises(SystemExit) as error:
        quick(text, tmp_path / "other", "--wandb", "toys")
    assert error.value.code.startswith("error: --wandb: cannot begin: no key")


def test_mlflow_has_the_curves_and_one_run_however_often_it_is_resumed(text, tmp_path, monkeypatch):
    """The library itself, with its store of files beside the run folder."""
    mlflow = pytest.importorskip("mlflow")
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    args = ("--mlflow", "toys", "--save-every", "6", "--keep", "9")
    log = quick(text, tmp_path / "run", *args)
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("toys").experiment_id
    found, = client.search_runs([experiment])
    curve = [(point.step, point.value) for point in client.get_metric_history(found.info.run_id, "loss")]
    assert curve == [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    assert found.data.params["steps"] == "12" and found.info.status == "FINISHED" and found.info.run_name == "run"
    shutil.rmtree(tmp_path / "run" / "steps" / "00000012")
    quick(text, tmp_path / "run", *args, "--resume")                            # steps 7 to 12 once more
    assert len(client.search_runs([experiment])) == 1
    assert [point.step for point in client.get_metric_history(found.info.run_id, "loss")] == [*range(1, 13)]


@pytest.mark.parametrize("option, package", [("--tensorboard", "tensorboard"), ("--wandb x", "wandb"),
                                             ("--mlflow x", "mlflow")])
def test_a_monitor_that_is_not_installed_is_one_error_before_anything_is_built(text, tmp_path, monkeypatch, option,
                                                                                package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(train, "build", lambda *_: pytest.fail("the model was built"))
    with pytest.raises(SystemExit) as error:
        quick(text, tmp_path / "run", *option.split())
    assert error.value.code.startswith(f"error: --{package}: the package {package} is not installed; pip install ")
    assert list(tmp_path.iterdir()) == []


# ---- the run folder

@pytest.mark.slow
def test_a_run_is_gone_on_with_or_replaced_only_when_that_is_said(text, tmp_path):
    folder, log = tmp_path / "run", quick(text, tmp_path / "run")
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.name != "lock")
    for more, words in (
        ((), "holds a run with a checkpoint at step 12; --resume"), (("--resume", "--seed", "5"), "--seed 0 → 5"),
        (("--resume", "--lr", "1"), "--lr 0.012 → 1.0"),
    ):
        with pytest.raises(SystemExit) as error:
            quick(text, folder, *more)
        assert words in error.value.code
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.name != "lock") == before
    assert len(losses_of(quick(text, folder, "--resume"))) == 12                # done: nothing is done again
    assert losses_of(quick(text, folder, "--seed", "5", "--force")) != losses_of(log)


def test_the_run_folder_says_how_it_was_made(runs):
    record = json.loads((runs("qwen3")[0] / "run.json").read_text())
    assert record["options"]["lr"] == 0.012 and record["options"]["dtype"] == "float32"
    assert record["model"]["vocab"] == 300 and record["muon"] == {"momentum": 0.9, "lr_scale": 8.0}
    assert record["data"]["fingerprint"] > 0 and record["starts"][0]["packages"]["torch"] == torch.__version__
    start = record["starts"][0]
    assert start["git"] and "--preset" in start["command"] and start["ranks"] == 1


def test_a_folder_of_something_else_is_never_touched(text, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for more in ([], ["--force"]):
        with pytest.raises(SystemExit) as error:
            quick(text, tmp_path, *more)
        assert "not made by train.py" in error.value.code
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# ---- the command line

@pytest.mark.parametrize("args, code, words", [
    (["--step", "5"], 2, "did you mean --steps?"),
    (["--learning-rate", "5"], 2, "unknown option --learning-rate"),
    (["--steps", "0"], 2, "a whole number from 1"),
    (["--lr", "nan"], 2, "--lr"),
    (["--optimizer", "sgd"], 2, "muon"),
    (["--preset", "lama"], 1, "did you mean llama"),
    (["--data", "nowhere"], 1, "nowhere: no such file"),
    (["--data", "bad.jsonl"], 1, "bad.jsonl, line 2"),
    (["--data", "short.txt"], 1, "do not fill one context of 128"),
    (["--data", "bad.jsonl", "--device", "nonsense"], 1, "nonsense"),
    (["--config", "bad.jsonl"], 1, "bad.jsonl: not TOML"),
    (["--config", "none.toml"], 1, "none.toml: cannot be read"),
    (["--skip-steps", "5:5"], 2, "a < b"),
    (["--batch-size", "6", "--micro-batch", "4"], 1, "not a multiple"),
    (["--replicas", "2"], 1, "does not divide"),
    (["--chat", "bad.jsonl"], 1, "--init"),
    (["--chat", "bad.jsonl", "--init", "x", "--data", "short.txt", "--mix", "1"], 1, "1 weights for 1 --chat and 1"),
    (["--data", "short.txt", "--mix", "1", "2"], 1, "2 weights for 1 --data"),
    (["--init", "nowhere"], 1, "nowhere"),
    (["--steps", "5", "--epochs", "1"], 1, "give one of them"),
    (["--epochs", "0"], 2, "above 0"),
    (["--ema", "1"], 2, "below 1"),
    (["--min-lr", "0.1"], 1, "above --lr"),
    (["--export", "newest"], 2, "last, best or the number of a step"),
    (["--export", "best"], 1, "runs/demo: holds no run"),
    (["--batch-size", "8", "--micro-batch", "4", "--gradient-accumulation", "3"], 1, "not a multiple"),
    (["--batch-size", "9", "--micro-batch", "4", "--gradient-accumulation", "3"], 1, "× --micro-batch 4 × "),
])
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys, args, code, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnot json\n')
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(SystemExit) as error:
        run(*args)
    message = error.value.code if code == 1 else capsys.readouterr().err.strip().splitlines()[-1]
    assert words in message and "\n" not in message
    assert (error.value.code == 2) if code == 2 else message.startswith("error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "short.txt"]


def test_a_toml_file_says_the_same_as_the_command_line_and_the_command_line_wins(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('preset = "mixtral"\nbatch-size = 64\nskip_steps = ["1:2", "5:9"]\n'
                    'compile = true\noffload = false\nlr = 1e-3\n')
    found = options.parse("", ["--config", str(file), "--batch-size", "8"])
    args = f"--config {file} --preset mixtral --batch-size 8 --skip-steps 1:2 5:9 --compile --lr 0.001"
    assert vars(found) == vars(options.parse("", args.split()))
    assert found.skip_steps == [(1, 2), (5, 9)] and found.compile and not found.offload
    assert found.out == Path("runs/mixtral")
    for text, words in (
        ("step = 5", "unknown option step; did you mean --steps?"), ("[train]\nsteps = 5", "unknown option train"),
        ("[steps]\na = 5", "is a table"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=words.replace("?", "[?]")) as error:
            options.parse("", ["--config", str(file)])
        assert str(file) in str(error.value)
    file.write_text('steps = "many"')
    with pytest.raises(SystemExit):
        options.parse("", ["--config", str(file)])


# ---- defaults

def settled(*args: object) -> dict:
    """The options of a run on 1,000 rows, of a model made for 8,192 tokens where --init names one."""
    found = options.parse("", [*map(str, args)])
    options.fit_context(found, presets.preset("llama-8b", context=8192))
    options.fit_steps(found, rows=1000)
    return vars(found)


@pytest.mark.parametrize("args, expected", [
    ([], {"optimizer": "muon", "lr": 0.012, "context": 128, "batch_size": 16, "micro_batch": None, "warmup": 20}),
    (["--preset", "mamba-toy"], {"lr": 0.012, "context": 128}),
    (["--preset", "llama-8b"], {"optimizer": "adamw", "lr": 3e-4, "weight_decay": 0.1, "context": 4096,
                                "batch_size": 256, "micro_batch": 1, "steps": 4, "warmup": 1}),
    (["--preset", "mamba-130m"], {"lr": 3e-4, "context": 4096}),
    (["--init", "base"], {"optimizer": "adamw", "lr": 2e-5, "weight_decay": 0.0, "context": 2048, "batch_size": 16,
                          "micro_batch": 1, "steps": 63, "warmup": 2}),
    (["--init", "base", "--chat", "chats.jsonl"], {"lr": 2e-5, "steps": 188, "warmup": 6}),
    (["--init", "base", "--lr", "0", "--context", "64", "--steps", "7", "--warmup", "0", "--optimizer", "muon"],
     {"lr": 0.0, "context": 64, "steps": 7, "warmup": 0, "optimizer": "muon"}),
    (["--preset", "llama-8b", "--lr", "0.001", "--micro-batch", "4"], {"lr": 0.001, "micro_batch": 4, "context": 4096}),
    (["--epochs", "2"], {"steps": 125, "warmup": 20}),
    (["--init", "base", "--epochs", "0.5"], {"steps": 32, "warmup": 1}),
    (["--micro-batch", "3", "--gradient-accumulation", "4"], {"batch_size": 12, "micro_batch": 3}),
    (["--init", "base", "--gradient-accumulation", "4"], {"batch_size": 16, "micro_batch": None}),
])
def test_defaults_follow_the_preset_and_init_and_what_is_given_wins(args, expected):
    found = settled(*args)
    assert {name: found[name] for name in expected} == expected
    assert all(found[name] is not None for name in arguments.DEFAULTS if name != "micro_batch")
    assert options.rows_at_once(found["batch_size"], found["micro_batch"], 1, found["gradient_accumulation"]) > 0


def test_a_context_is_no_longer_than_what_the_model_was_made_for():
    found = options.parse("", ["--init", "base"])
    options.fit_context(found, presets.preset("llama", context=96))
    assert found.context == 96


def test_a_resumed_run_keeps_the_defaults_that_it_began_with(tmp_path):
    """As they were written by a version with another table, or on another machine."""
    own = {"lr": 0.5, "steps": 9, "context": 64, "optimizer": "adamw", "dtype": "bfloat16", "micro_batch": 8}
    (tmp_path / "run.json").write_text(json.dumps({"options": own}))
    found = settled("--out", tmp_path, "--resume", "--lr", "0.25")
    assert found["lr"] == 0.25 and found["micro_batch"] is None                 # given; and of other ranks, perhaps
    assert all(found[name] == own[name] for name in ("steps", "context", "optimizer", "dtype"))
    assert settled("--out", tmp_path)["lr"] == 0.012
    (tmp_path / "run.json").write_text("not a record")                          # which runs.check says
    assert settled("--out", tmp_path, "--resume")["lr"] == 0.012


def test_fine_tuning_takes_the_steps_and_the_context_of_its_data_and_model(runs, text, tmp_path):
    args = ("--init", runs("llama")[0], "--data", text, "--out", tmp_path / "more", "--dtype", "float32",
            "--sample-every", "0")
    run(*args)
    record = json.loads((tmp_path / "more" / "run.json").read_text())["options"]
    rows = sum(source.rows for source in open_folder(tmp_path / "more" / "data", 32)[:1])
    assert record["context"] == 32 and record["lr"] == 2e-5
    assert record["steps"] == -(-rows // 16) == len(losses_of(log_of(tmp_path / "more")))
    run(*args, "--resume")


@pytest.mark.parametrize("batch, micro, ranks, passes, expected", [
    (16, None, 1, None, 16), (16, None, 4, None, 4), (16, 2, 4, None, 2), (16, None, 4, 2, 2), (16, 2, 4, 2, 2),
])
def test_a_batch_is_ranks_times_rows_times_passes(batch, micro, ranks, passes, expected):
    assert options.rows_at_once(batch, micro, ranks, passes) == expected


def test_gradient_accumulation_is_one_big_batch(runs, text, tmp_path):
    one, many = (losses_of(log) for log in (runs("llama")[1], quick(text, tmp_path / "run", "--preset", "llama",
                                                                    "--gradient-accumulation", "4")))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["options"]["micro_batch"] == 1
    assert max(abs(a - b) for a, b in zip(one, many, strict=True)) < 1e-5


def test_the_epochs_of_a_run_that_is_resumed_may_be_left_out(text, tmp_path):
    args = ("--data", text, "--out", tmp_path / "run", "--vocab", "300", *SHORT, "--sample-every", "0")
    run(*args, "--epochs", "0.05")
    taken = len(losses_of(log_of(tmp_path / "run")))
    rows = sum(source.rows for source in open_folder(tmp_path / "run" / "data", 32)[:1])
    assert taken == -(-rows * 0.05 // 4)
    run(*args, "--resume")
    run(*args, "--resume", "--epochs", "0.05")
    with pytest.raises(SystemExit) as error:
        run(*args, "--resume", "--epochs", "0.5")
    assert f"--steps {taken} → " in error.value.code


@pytest.mark.parametrize("able, seconds, expected", [
    ({}, {}, "float32"),
    ({"avx512_bf16": True}, {"bfloat16": 2.0, "float32": 1.0}, "float32"),      # an Intel without AMX
    ({"avx512_bf16": True}, {"bfloat16": 0.5, "float32": 1.0}, "bfloat16"),     # an AMD
    ({"amx_bf16": True}, {"bfloat16": 0.2, "float32": 1.0}, "bfloat16"),
])
def test_a_cpu_takes_the_dtype_in_which_its_products_are_fastest(monkeypatch, able, seconds, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(options, "product_seconds", lambda dtype: seconds[str(dtype).removeprefix("torch.")])
    assert options.fast_dtype("cpu") == expected


def test_a_product_takes_time():
    assert 0 < options.product_seconds(torch.float32) < 10


def test_every_help_entry_begins_with_its_noun():
    """And states the default of each kind of run. "how many steps", "go on …", "of the weights" are no nouns."""
    actions = arguments.build_parser("")._actions
    entries = {action.option_strings[-1]: action.help for action in actions if action.dest != "help"}
    no_nouns = ("of", "how", "go", "with", "what", "under", "on", "a", "the", "most", "so")
    assert not [name for name, help in entries.items() if help.split()[0].rstrip(":") in no_nouns]
    assert "gradient accumulation" in entries["--micro-batch"] and "activation checkpointing" in entries["--recompute"]
    assert "default 0.012; published presets: 0.0003; --init: 2e-05" in entries["--lr"]


def test_help_teaches_and_a_process_ends_with_the_right_code(tmp_path):
    help = forked.start(1, train.run, "--help").end()
    words = ("python train.py", "--data", "--preset", "mamba", "default")
    assert help.codes == [0] and all(word in help.out for word in words)
    command = [sys.executable, ROOT / "train.py", "--data", tmp_path / "none"]
    bad = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert bad.returncode == 1 and bad.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_demo_beats_gzip_far(tmp_path):
    """The default run, with four sevenths of its steps."""
    run("--out", tmp_path / "demo", "--steps", "200", "--eval-every", "200")
    log = [json.loads(line) for line in (tmp_path / "demo" / "log.jsonl").read_text().splitlines()]
    facts = json.loads((tmp_path / "demo" / "data" / "meta.json").read_text())["facts"]
    held_out = [entry for entry in log if "held_out_loss" in entry][-1]
    assert held_out["held_out_loss"] < facts["unigram_loss"] - 1.5
    assert held_out["held_out_bits_per_byte"] < facts["gzip_bits_per_byte"]
