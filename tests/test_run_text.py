"""The text of a run: nothing in its folder changes before every check has passed, a run that goes on keeps its text and
its tokenizer, and the same text is the same wherever it lies. FINDINGS 4.2, 4.4, 4.7."""

import json
import shutil
from pathlib import Path

import pytest

from nanollm.data import prepare as texts
from nanollm.training.corpus import Corpus
from tests.test_encode import aged
from tests.test_train import SHORT, grammar, losses_of, run

OPTIONS = (*SHORT, "--vocab", "300", "--steps", "4", "--save-every", "2", "--sample-every", "0")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name not in ("lock", texts.VERIFIED)}


def refused(*args: str | Path) -> str:
    with pytest.raises(SystemExit) as error:
        run(*args)
    return str(error.value.code)


@pytest.fixture
def begun(tmp_path) -> tuple[Path, Path]:
    """(text, a run of 4 steps on it)."""
    text = grammar(tmp_path / "text") if (tmp_path / "text").mkdir() is None else tmp_path
    run("--data", text, "--out", tmp_path / "run", *OPTIONS)
    return text, tmp_path / "run"


def test_a_refused_resume_leaves_the_run_as_it_was(begun, monkeypatch):
    """FINDINGS 4.2: the text grew by a file, and out/data was a new BPE before the refusal came."""
    text, out = begun
    (text / "zz.txt").write_text("one more file of other words\n" * 40)
    before = contents(out)
    with monkeypatch.context() as patch:                        # and it is found out before any work
        patch.setattr(texts, "build", lambda *_: pytest.fail("the text was tokenized"))
        said = refused("--data", text, "--out", out, *OPTIONS, "--resume")
    assert f"holds another run (its text is not that of --data {text})" in said and contents(out) == before
    said = refused("--data", text, "--out", out, *OPTIONS, "--vocab", "310", "--resume")
    assert "--vocab 300 → 310" in said and contents(out) == before


def test_a_run_that_is_refused_after_its_text_was_tokenized_leaves_no_trace(begun, tmp_path, monkeypatch):
    text, out = begun
    before = contents(out)
    shutil.rmtree(out / "data")                                 # all that a resumed run compares with is in run.json
    (text / "zz.txt").write_text("one more file of other words\n" * 40)
    said = refused("--data", text, "--out", out, *OPTIONS, "--resume")
    assert "data.fingerprint" in said
    assert contents(out) == {name: content for name, content in before.items() if not name.startswith("data/")}
    assert not (out / "data").exists()
    refused("--data", text, "--out", tmp_path / "new", *OPTIONS, "--steps", "1", "--context", "100000")
    assert not (tmp_path / "new").exists()


def test_a_run_that_is_forced_onto_more_text_keeps_its_tokenizer(begun):
    """FINDINGS 4.2: with a new vocabulary under the old weights the loss was 10.19 after 1.46."""
    text, out = begun
    words, last = (out / "tokenizer.json").read_bytes(), losses_of(log(out))[-1]
    tokens = texts.facts(out / "data").train_tokens
    (text / "zz.txt").write_text("".join(path.read_text() for path in sorted(text.iterdir())[:3]) + "the end\n")
    more = (*OPTIONS, "--steps", "6")
    run("--data", text, "--out", out, *more, "--resume", "--force")
    assert (out / "tokenizer.json").read_bytes() == (out / "data" / "tokenizer.json").read_bytes() == words
    assert texts.facts(out / "data").train_tokens > tokens and losses_of(log(out))[-1] < last + 0.5
    run("--data", text, "--out", out, *OPTIONS, "--steps", "8", "--resume", "--force")          # steps differ
    before = contents(out / "data")
    run("--data", text, "--out", out, *OPTIONS, "--steps", "8", "--resume")
    assert contents(out / "data") == before
    run("--data", text, "--out", out, *OPTIONS, "--force")      # begun anew, with a tokenizer of all of the text
    assert (out / "data" / "tokenizer.json").read_bytes() != words


def test_a_run_is_measured_on_text_of_its_own(begun, tmp_path, monkeypatch, capsys):
    """The text to measure on counts as the text to train on does: unchanged it is not tokenized again."""
    text, out = begun
    (tmp_path / "other.txt").write_text("the cat sees a dog\n" * 40)
    options, out = (*OPTIONS, "--held-out", tmp_path / "other.txt"), tmp_path / "own"
    run("--data", text, "--out", out, *options)
    facts = texts.facts(out / "data")
    assert facts.held_out_bytes == (tmp_path / "other.txt").stat().st_size and facts.held_out_documents == 1
    assert facts.train_bytes == sum(path.stat().st_size for path in text.iterdir())
    last = [entry for entry in log(out) if "held_out_loss" in entry][-1]
    assert last["held_out_bits_per_byte"] == pytest.approx(
        last["held_out_loss"] / 0.6931471805599453 * facts.held_out_targets / facts.held_out_bytes)
    assert "1 document held out" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(texts, "build", lambda *_: pytest.fail("the text was tokenized again"))
        run("--data", text, "--out", out, *options, "--resume")
    (tmp_path / "other.txt").write_text("another text\n")
    said = refused("--data", text, "--out", out, *options, "--resume")
    assert f"its text is not that of --data {text} and --held-out {tmp_path / 'other.txt'}" in said


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_the_same_text_by_another_path_is_the_same_run(begun, tmp_path, monkeypatch):
    """FINDINGS 4.7: the same data by its absolute path was another run."""
    text, out = begun
    aged(text)
    before = contents(out / "data")
    shutil.copytree(text, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(texts, "build", lambda *_: pytest.fail("the text was tokenized again"))
    for path in ("moved", "text", tmp_path / "moved"):
        run("--data", path, "--out", out, *OPTIONS, "--resume")
        assert contents(out / "data") == before


def test_data_of_an_earlier_version_is_gone_on_with(begun):
    text, out = begun
    meta = json.loads((out / "data" / "meta.json").read_text())
    (out / "data" / "meta.json").write_text(json.dumps(
        {key: meta[key] for key in ("format", "vocab", "tokenizer_sha256", "facts")} | {"fingerprint": 7}))
    before = contents(out / "data")
    run("--data", text, "--out", out, *OPTIONS, "--resume")
    assert contents(out / "data") == before


def test_several_texts_are_one_and_what_was_not_read_is_said(tmp_path, capsys):
    for name in "ab":
        (tmp_path / name).mkdir()
        grammar(tmp_path / name)
    (tmp_path / "b" / "x.png").write_bytes(b"\0")
    (tmp_path / "b" / "marked.txt").write_text("a story\n<|endoftext|>\nanother one\n" * 9)
    run("--data", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "run", *OPTIONS, "--steps", "1")
    said = capsys.readouterr().out
    assert f"1 file no text: not read: {tmp_path / 'b' / 'x.png'}" in said
    assert "1 file parted where a mark stands" in said and "(10 documents)" in said
    assert "expected --data of shards" in refused(
        "--data", tmp_path / "a", tmp_path / "b", "--mix", "1", "2", "--out", tmp_path / "other", *OPTIONS)
    assert "found shards beside text" in refused(
        "--data", tmp_path / "a", tmp_path / "run" / "data", "--out", tmp_path / "other", *OPTIONS)


def test_a_prompt_begins_as_documents_do(begun):
    text, out = begun
    from nanollm.text import tokenizer
    reader = tokenizer.load(out)
    corpus = Corpus(None, None, reader, reader.vocab_size, False, None, ())
    assert corpus.prompt("") == [reader.eos_id]
