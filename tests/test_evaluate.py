"""python -m benchmarks.evaluate: answers are those of lm_eval's own HFLM, request by request; what is wrong is one
error.

lm_eval is no light package, so it is in the extra `eval` alone, and what needs it is skipped without.
"""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers

import checkpoints
from benchmarks.evaluate import __main__ as command
from benchmarks.evaluate import needle, samples, speed, text
from nanollm.errors import InputError, NanollmError, TokenizerError
from tests.oracles import make_loud
from tests.tok_folders import CORPUS, begin_with, byte_bpe

TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny loud Llama with a tokenizer that puts BOS before a text, and a chat template."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = byte_bpe(("<bos>", "<eos>", "<|user|>", "<|assistant|>"))
    begin_with(tokenizer, "<bos>")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", chat_template=TEMPLATE).save_pretrained(path)
    bos, eos = (tokenizer.token_to_id(each) for each in ("<bos>", "<eos>"))
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, bos_token_id=bos, eos_token_id=eos))
    make_loud(model)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("items")
    samples.write(path)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """The command in this process: what it prints."""
    def started(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, words)])
        command.run()
        return capsys.readouterr().out

    return started


# ---- tasks

ALL = "hellaswag,arc_easy,mmlu,cmmlu,winogrande,truthfulqa_mc2,truthfulqa_gen,gsm8k,wikitext"
CHAT = "arc_easy,mmlu,cmmlu,truthfulqa_mc2,gsm8k"


def counts(printed: str) -> dict[str, int]:
    """Requests of each task that were compared, all of which were equal."""
    found = {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+) (?:log|texts|gen)", printed, re.MULTILINE)}
    assert f"all {sum(found.values())} requests equal those of transformers" in printed
    return found


def test_every_request_in_chats_is_answered_as_by_transformers(run, folder, data):
    pytest.importorskip("lm_eval", reason="the extra `eval` has lm_eval")
    found = counts(run("--model", folder, "--tasks", CHAT, "--data", data, "--against", "hf", "--apply-chat-template",
                       "--fewshot", 1, "--limit", 2, "--batch-tokens", 700))
    assert found == {"arc_easy": 8, "mmlu_anatomy": 8, "mmlu_astronomy": 8, "cmmlu_anatomy": 8, "truthfulqa_mc2": 4,
                     "gsm8k": 2}


def test_every_request_is_answered_as_by_transformers(run, folder, data, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra `eval` has lm_eval")
    compared = counts(run("--model", folder, "--tasks", ALL, "--data", data, "--out", tmp_path, "--against", "hf",
                          "--limit", 2))
    assert compared.keys() >= {"hellaswag", "mmlu_anatomy", "mmlu_astronomy", "truthfulqa_gen", "gsm8k", "wikitext"}
    file, = tmp_path.rglob("results_*.json")
    results = json.loads(file.read_text())
    assert {"results", "configs", "versions", "n-shot"} <= results.keys()
    assert results["results"]["arc_easy"]["acc_stderr,none"] >= 0 and "bleu_max,none" in results["results"][
        "truthfulqa_gen"] and "word_perplexity,none" in results["results"]["wikitext"]
    assert len([*tmp_path.rglob("samples_*.jsonl")]) == len(compared)


def test_a_difference_is_told(folder):
    pytest.importorskip("lm_eval", reason="the extra `eval` has lm_eval")
    from lm_eval.api.instance import Instance

    from benchmarks.evaluate.against import Report
    from benchmarks.evaluate.harness import Asked
    instance = Instance("loglikelihood", {}, ("a", "b"), 0, ("task", 7, 1))
    for kind, ours, theirs, same in (
            ("loglikelihood", (-5.0, True), (-5.00009, True), True),
            ("loglikelihood", (-5.0, True), (-5.0, False), False),
            ("loglikelihood", (-5.0, True), (-5.00011, True), False),
            ("loglikelihood_rolling", -5e3, -5e3 - 4e-3, True),
            ("loglikelihood_rolling", -5e3, -5e3 - 6e-3, False), ("generate_until", "a", "a ", False)):
        report = Report()
        report.add(Asked(kind, instance, ours), theirs)
        assert bool(report.different) != same, (kind, ours, theirs)
    assert "1 of 1 requests differ" in report.lines()[1] and "task, document 7: 'a', theirs 'a '" in report.lines()[2]


def test_what_is_wrong_with_tasks_is_one_error(run, folder, data, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra `eval` has lm_eval")
    for words, said in (
            (("--tasks", "helaswag"), "no such task, group or tag; did you mean .*hellaswag"),
            (("--tasks", "hellaswag"), "tasks come from the hub, which cannot be reached; --data DIR"),
            (("--tasks", "hellaswag", "--data", tmp_path / "none"), "no such folder"),
            (("--tasks", "piqa", "--data", data), r"found arc_challenge, .* …, expected piqa/"),
            (("--tasks", "mmlu", "--data", tmp_path), "found nothing, expected any of its 57 tasks"),
            (("--tasks", "hellaswag", "--data", data, "--fewshot", "1"), "expected train.jsonl too"),
            (("--tasks", "arc_easy", "--data", tmp_path), "expected arc_easy/")):
        with pytest.raises(InputError, match=said):
            run("--model", folder, *words)
    (tmp_path / "winogrande").mkdir()
    (tmp_path / "winogrande" / "validation.jsonl").write_text('{"sentence": "The _ fell."}\n')
    with pytest.raises(InputError, match="lm_eval stopped: KeyError: 'answer'"):
        run("--model", folder, "--tasks", "winogrande", "--data", tmp_path)
    for second, said in (('{"sentence": "A _."}', "jsonl, line 2: found no answer, option1, option2, which the first"),
                         ('{"sentence": ', "jsonl, line 2: not JSON")):
        (tmp_path / "winogrande" / "validation.jsonl").write_text(
            '{"sentence": "The _ fell.", "option1": "a", "option2": "b", "answer": "1"}\n' + second + "\n")
        with pytest.raises(NanollmError, match=said):
            run("--model", folder, "--tasks", "winogrande", "--data", tmp_path)
    (tmp_path / "winogrande" / "validation.jsonl").unlink()
    with pytest.raises(InputError, match="found nothing, expected validation.jsonl: what winogrande asks from"):
        run("--model", folder, "--tasks", "winogrande", "--data", tmp_path)


def test_what_is_not_there_is_said(run, folder, monkeypatch, tmp_path):
    real = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "lm_eval", raising=False)
        patch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else real(name, *rest))
        with pytest.raises(InputError, match=r"lm_eval is not installed; pip install -e '.\[eval\]'"):
            run("--model", folder, "--tasks", "hellaswag")
    bare = tmp_path / "bare"
    checkpoints.save(checkpoints.load(folder), bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(TokenizerError, match="bare"):
        run("--model", bare, "--speed")


@pytest.mark.parametrize(("words", "said"), [
    (("--speed", "--limit", "3"), "--limit goes with --tasks"),
    (("--tasks", "a", "--against", "hf", "--dtype", "bfloat16"), "compares in float32"),
    (("--perplexity", "x", "--places"), "--places goes with --out"),
    (("--tasks", "a", "--speed"), "not allowed with"),
    ((), "one of the arguments")])
def test_options_that_do_not_go_together(run, capsys, words, said):
    with pytest.raises(SystemExit) as end:
        run("--model", "m", *words)
    assert end.value.code == 2 and said in capsys.readouterr().err


# ---- texts, needles, speed

def test_perplexity_is_transformers(run, folder, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(CORPUS[:20]))
    printed = run("--model", folder, "--perplexity", file, "--window", "64", "--stride", "48", "--against", "hf")
    assert f"text.txt: {file.stat().st_size:,} bytes" in printed and "window 64, stride 48" in printed
    gap = re.search(r"transformers +[\d.]+, relative difference (\S+)", printed)
    assert gap is not None and float(gap[1]) <= text.BOUND
    with pytest.raises(InputError, match="not UTF-8"):
        (tmp_path / "bytes").write_bytes(b"\xff\xfe")
        run("--model", folder, "--perplexity", tmp_path / "bytes")


def test_the_loss_by_place_is_drawn_for_each_scaling(run, folder, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(CORPUS))
    printed = run("--model", folder, "--perplexity", file, "--window", "1024", "--places", "--out", tmp_path / "out")
    assert [line.split("  ")[0] for line in printed.splitlines()] == ["as it is", "linear", "dynamic", "yarn"]
    assert (tmp_path / "out" / "places.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("words", [("--dtype", "bfloat16"), ("--quantize", "int8")], ids=" ".join)
def test_batches_are_as_large_as_the_memory_of_a_prepared_model_allows(run, folder, tmp_path, words):
    """Its matrices are packed and no parameters any more; where none are given they follow from the config."""
    file = tmp_path / "text.txt"
    file.write_text(" ".join(CORPUS))
    found = [run("--model", folder, "--perplexity", file, "--window", 64, *words, *more)
             for more in ((), ("--batch-tokens", 64))]
    free, given = (float(re.search(r"perplexity +([\d.]+)", printed)[1]) for printed in found)
    assert free == pytest.approx(given, rel=0.01)


def test_a_needle_stands_where_it_should(run, folder, tmp_path, monkeypatch):
    hidden = needle.Needle("Oaxaca", 12345)
    hay = "word " * 40
    for depth, before in ((0.0, 0), (0.5, 20), (1.0, 40)):
        for chat in (False, True):
            prompt = hidden.prompt(hay, depth, chat)
            assert prompt.split("The secret number of Oaxaca is 12345.")[0].split() == ["word"] * before
            assert prompt.endswith("Oaxaca?" if chat else "The secret number of Oaxaca is")
    prompts = []

    def reader(model, ids, *rest, **how):
        """A model that knows what stands in the first half of its prompt."""
        prompts.append(ids)
        said = re.search(r"is (\d{5})\.", tokenizer.decode(ids[: len(ids) // 2]))
        return tokenizer.encode(said[1] if said else "no", bos=False)

    tokenizer = checkpoints.tokenizer(folder)
    monkeypatch.setattr(needle, "generate", reader)
    file = tmp_path / "text.txt"
    file.write_text(" ".join(CORPUS[:5]))
    printed = run("--model", folder, "--needle", file, "--lengths", "400,480", "--depths", "3", "--out", tmp_path)
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()}
    assert rows["0%"] == ["found"] * 2 and rows["100%"] == ["–"] * 2
    assert all(250 < len(ids) <= length for ids, length in zip(prompts, [400] * 3 + [480] * 3, strict=True))
    assert (tmp_path / "needle.png").read_bytes()[:4] == b"\x89PNG"


def test_speed_is_a_table(folder, capsys, monkeypatch):
    monkeypatch.setattr(speed, "CASES", ((1, 8), (2, 8), (1, 100_000)))
    speed.report(checkpoints.load(folder, dtype=torch.float32))
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [[cell.strip() for cell in row[:2]] for row in rows] == [["1", "8"], ["2", "8"]]     # the third is too long


# ---- while training

def test_a_run_asks_its_tasks_and_stops_by_them(folder, data, tmp_path, monkeypatch):
    """The log has what the command says of the exported model; --patience and --keep-best go by the mean."""
    pytest.importorskip("lm_eval", reason="the extra `eval` has lm_eval")
    import train
    from benchmarks.evaluate import training

    file = tmp_path / "text.txt"
    file.write_text("\n".join(CORPUS) * 3)
    means = iter([0.2, 0.5, 0.4, 0.3])
    real = training.measured

    def planned(*how):
        figures, mean = real(*how)
        figures["real"] = mean
        return figures, next(means)

    monkeypatch.setattr(training, "measured", planned)
    out = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["train", *map(str, (
        "--init", folder, "--data", file, "--context", 64, "--batch-size", 2, "--steps", 20, "--save-every", 20,
        "--eval-every", 20, "--optimizer", "adamw", "--dtype", "float32", "--sample-every", 0, "--out", out,
        "--tasks", "arc_easy,wikitext", "--tasks-data", data, "--tasks-limit", 3, "--evaluate-every", 2,
        "--patience", 2, "--keep-best"))])
    train.run()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    asked = {entry["step"]: entry for entry in log if "tasks" in entry}
    assert [*asked] == [2, 4, 6, 8] and max(entry["step"] for entry in log) == 8
    assert [entry["exported"] for entry in log if "exported" in entry] == [4]
    assert {"arc_easy/acc", "arc_easy/acc_norm", "wikitext/word_perplexity"} <= asked[2].keys()
    assert asked[4]["real"] == (asked[4]["arc_easy/acc"] - asked[4]["wikitext/word_perplexity"]) / 2
    options = train.parse("")
    again, _ = real(checkpoints.load(out), checkpoints.tokenizer(out), options)
    assert again == pytest.approx({name: asked[4][name] for name in again}, rel=1e-4)


def test_tasks_of_a_run_are_checked_before_it_begins(folder, data, tmp_path, monkeypatch):
    import train
    words = ["train", "--init", folder, "--out", tmp_path / "run", "--tasks", "helaswag", "--tasks-data", data]
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    there = importlib.util.find_spec("lm_eval") is not None
    with pytest.raises(InputError, match="did you mean" if there else "lm_eval is not installed"):
        train.run()
    assert not (tmp_path / "run" / "run.json").exists()
