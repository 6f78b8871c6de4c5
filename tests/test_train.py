"""train.py: the presets are the published shapes, every toy learns, what is saved is what transformers reads, bad input writes nothing."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoints
import train
from nanollm import cli, presets, tokenizer
from nanollm.errors import ConfigError
from nanollm.model import Decoder

TOYS = ["llama", "qwen3", "mistral", "mixtral", "mamba"]
ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A small grammar: enough to learn from in a few steps."""
    folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for i in range(24):
        names = rng.choice(["alpha", "beta", "gamma", "delta"], 40)
        (folder / f"{i:02}.py").write_text("".join(f"def {a}({b}):\n    return {b} + {n}\n\n" for n, (a, b) in enumerate(zip(names, names[::-1]))))
    return folder


def run(*args: str | Path) -> None:
    """One run in this process; SystemExit if the command line would have ended otherwise than with 0."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, args)])
        cli.main(train.run)


def quick(text: Path, out: Path, *more: str) -> list[dict]:
    run("--data", text, "--out", out, "--steps", "12", "--vocab", "300", "--context", "32", "--batch-size", "4", "--warmup", "2",
        "--eval-every", "4", "--sample-every", "6", "--dtype", "float32", *more)
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(text, tmp_path_factory):
    """One run for each toy, on demand."""
    done: dict[str, tuple[Path, list[dict]]] = {}

    def get(name: str) -> tuple[Path, list[dict]]:
        if name not in done:
            folder = tmp_path_factory.mktemp("runs") / name
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

@pytest.mark.parametrize("name", TOYS)
def test_each_toy_learns(runs, name):
    folder, log = runs(name)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    held_out = [entry["held_out_loss"] for entry in log if "held_out_loss" in entry]
    assert len(losses) == 12 and np.isfinite(losses).all()
    assert abs(losses[0] - np.log(300)) < 0.5                                   # at first every token is as likely
    assert losses[-1] < losses[0] - 1 and held_out[-1] < held_out[0] and held_out[-1] < losses[0] - 1
    assert (log[0]["balance"] > 0) == (name == "mixtral")
    assert len([entry for entry in log if "sample" in entry]) == 2
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", TOYS)
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
        return [{key: value for key, value in entry.items() if key != "tokens_per_second"} for entry in entries]
    assert timeless(quick(text, tmp_path / "again", "--preset", "llama")) == timeless(log)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert timeless(quick(text, tmp_path / "other", "--preset", "llama", "--seed", "1")) != timeless(log)


def test_adamw_and_bfloat16_learn_too(text, tmp_path):
    log = quick(text, tmp_path / "run", "--optimizer", "adamw", "--lr", "0.003", "--dtype", "bfloat16")
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5


def test_muon_takes_the_matrices_of_the_layers_and_adamw_all_else():
    options = train.parse([])
    for name in TOYS:
        model = Decoder(presets.preset(name))
        muon, adamw = (sum((group["params"] for group in o.param_groups), []) for o in train.build_optimizers(model, options))
        assert len({*map(id, muon + adamw)}) == len(muon + adamw) == len(list(model.parameters()))
        names = {id(p): n for n, p in model.named_parameters()}
        assert all(re.search(r"\.(q|k|v|o|gate|up|down|router|in_proj|x_proj|dt_proj|out_proj)\.weight$", names[id(p)]) for p in muon)
        assert not any(names[id(p)].startswith("layers") and p.ndim == 2 and "A_log" not in names[id(p)] for p in adamw)


def test_documents_in_a_row_do_not_see_each_other(runs):
    """The loss of a document is the same whatever stands before it in the window."""
    from nanollm import data
    model = checkpoints.load(runs("llama")[0])
    for first in ([5, 6, 7], [9, 9, 9]):
        batch = data.cut(np.array([0, *first, 0, 30, 31, 32, 33], np.uint16), [0], 8, end=0)
        logits = model(batch.tokens, batch.positions)[0, 4:]
        assert torch.allclose(logits, model(batch.tokens[:, 4:])[0], atol=1e-5)


def test_the_rate_rises_and_falls_to_zero():
    options = train.parse(["--steps", "100", "--warmup", "10", "--lr", "1.0"])
    rates = [train.rate_at(step, options) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] <= 1.0 and 0 < rates[-1] <= 0.011 and rates[9:] == sorted(rates[9:], reverse=True)


# ---- the run folder

def test_a_run_folder_is_replaced_only_by_the_same_command_or_by_force(runs, text, tmp_path):
    folder, log = tmp_path / "run", quick(text, tmp_path / "run")
    assert len(quick(text, folder)) == len(log)
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    with pytest.raises(SystemExit) as error:
        quick(text, folder, "--seed", "5")
    assert "seed 0 → 5" in error.value.code and "--force" in error.value.code
    assert sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before
    quick(text, folder, "--seed", "5", "--force")


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
    (["--steps", "0"], 2, "above 0"),
    (["--lr", "nan"], 2, "--lr"),
    (["--optimizer", "sgd"], 2, "muon"),
    (["--preset", "lama"], 1, "did you mean llama"),
    (["--data", "nowhere"], 1, "nowhere: no such file"),
    (["--data", "bad.jsonl"], 1, "bad.jsonl, line 2"),
    (["--data", "short.txt"], 1, "too little text"),
    (["--data", "bad.jsonl", "--device", "nonsense"], 1, "nonsense"),
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


def test_help_teaches_and_a_process_ends_with_the_right_code(tmp_path):
    help = subprocess.run([sys.executable, ROOT / "train.py", "--help"], capture_output=True, text=True)
    assert help.returncode == 0 and all(word in help.stdout for word in ("python train.py", "--data", "--preset", "mamba", "default"))
    bad = subprocess.run([sys.executable, ROOT / "train.py", "--data", tmp_path / "none"], capture_output=True, text=True, cwd=tmp_path)
    assert bad.returncode == 1 and bad.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_demo_beats_gzip_far(tmp_path):
    """The default run, with fewer than half of its steps."""
    run("--out", tmp_path / "demo", "--steps", "250")
    log = [json.loads(line) for line in (tmp_path / "demo" / "log.jsonl").read_text().splitlines()]
    facts = json.loads((tmp_path / "demo" / "data" / "facts.json").read_text())
    held_out = [entry for entry in log if "held_out_loss" in entry][-1]
    assert held_out["held_out_loss"] < facts["unigram_loss"] - 1.5
    assert held_out["held_out_bits_per_byte"] < facts["gzip_bits_per_byte"]
