"""Answers that follow a grammar: what is drawn is read by json, jsonschema, re and ast, which know nothing of it.

Most need llguidance, which `make published` installs, and are skipped by name without it.
"""

import ast
import json
import re
import sys
from pathlib import Path

import jsonschema
import pytest
import torch

import generate as script
from nanollm.errors import InputError
from nanollm.inference.constrained import Grammar, _Words
from nanollm.inference.generation import answer_batch, generate
from nanollm.inference.request import Request
from nanollm.inference.sample import Sampling
from nanollm.model import Decoder
from nanollm.presets import transformer
from nanollm.text.tokenizer import Tokenizer, load
from tests import forked
from tests.terminals import scripted
from tests.tok_folders import NASTY, byte_bpe, metaspace_bpe, sentencepiece_model, write

SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["name", "age", "tags", "ok"], "properties": {
        "name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 7, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "bb", "é\n"]}, "minItems": 1, "maxItems": 3},
        "ok": {"type": "boolean"}, "at": {"anyOf": [{"type": "null"}, {"type": "number"}]}}}
SUMS = """start: sum
sum: term (("+" | "-") term)*
term: /[1-9][0-9]?/ | "(" sum ")"
"""


@pytest.fixture(scope="module")
def llguidance():
    return pytest.importorskip("llguidance", reason="needs the package llguidance: make published")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level, with one stop token and one that is special alone."""
    folder = tmp_path_factory.mktemp("words")
    byte_bpe(("<|end|>", "<|tool|>")).save(str(folder / "tokenizer.json"))
    return load(write(folder, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}))


def noise(words: Tokenizer, padding: int = 7) -> Decoder:
    """A model that says anything, and has rows that the tokenizer lacks."""
    torch.manual_seed(0)
    return Decoder(transformer(words.vocab_size + padding, 16, 1, 2, 1, 16)).eval()


def drawn(words: Tokenizer, grammar: Grammar | None, seeds: int = 4, tokens: int = 300) -> list[tuple[str, str]]:
    """Texts of batches of 4 at temperature 1, and why they ended."""
    model, found = noise(words, padding=7 if grammar else 0), []
    for seed in range(seeds):
        request = Request(words, tokens, Sampling(1.0, seed=seed), constrain=grammar)
        answers = answer_batch(model, [[1], [2, 3]], tokens, samples=2, **request.how(continues=False))
        found += [(request.text(answer, continues=False), answer.ended) for answer in answers]
    return found


@pytest.mark.parametrize("seeds", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_each_random_answer_follows_the_schema(llguidance, words: Tokenizer, seeds: int) -> None:
    texts = drawn(words, Grammar(words, "json_schema", json.dumps(SCHEMA), "x"), seeds)
    for text, ended in texts:
        if ended == "stop":
            jsonschema.validate(json.loads(text), SCHEMA)
        else:
            with pytest.raises(json.JSONDecodeError):
                json.loads(text)
    whole = {text for text, ended in texts if ended == "stop"}
    assert len(whole) >= 3 * seeds and all(re.search(r"[ \n]", text) for text in whole), "white space may come between"
    assert any(ord(char) > 127 for text in whole for char in text), "a character of several tokens"


def test_without_white_space_where_the_schema_says_so(llguidance, words: Tokenizer) -> None:
    schema = {"type": "array", "items": {"type": "boolean"}, "x-guidance": {"whitespace_flexible": False}}
    texts = [text for text, ended in drawn(words, Grammar(words, "json_schema", json.dumps(schema), "x"), 2)
             if ended == "stop"]
    assert len({*texts}) > 2 and all(text == json.dumps(json.loads(text), separators=(",", ":")) for text in texts)


def test_a_stop_token_that_is_white_space_too_ends_nothing_in_between(llguidance, tmp_path: Path) -> None:
    """The tokenizer's end is a new line, which JSON may have anywhere."""
    byte_bpe().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"},
          generation_config={"eos_token_id": byte_bpe().token_to_id("Ċ")})
    grammar = Grammar(words := load(tmp_path), "json_schema", '{"type": "array", "items": {"type": "boolean"}}', "x")
    assert words.stop_ids == tuple(words.encode("\n", bos=False, special=True))
    texts = drawn(words, grammar, 2)
    assert all(isinstance(json.loads(text), list) for text, ended in texts if ended == "stop")
    assert len({text for text, ended in texts if ended == "stop"}) > 2


def test_without_it_none_does(words: Tokenizer) -> None:
    for text, _ in drawn(words, None, 1):
        with pytest.raises(ValueError):
            json.loads(text)


def test_each_random_answer_matches_the_pattern(llguidance, words: Tokenizer) -> None:
    for pattern in ("[0-9]{3}-[a-f]{2}é?", "(yes|yesterday|no) *", "(Hello|World)"):
        texts = drawn(words, Grammar(words, "regex", pattern, "x"), 2)
        assert all(re.fullmatch(pattern, text) and ended == "stop" for text, ended in texts) and len({*texts}) > 1


def test_each_random_answer_follows_the_lark_grammar(llguidance, words: Tokenizer) -> None:
    texts = drawn(words, Grammar(words, "lark", SUMS, "x"))
    for text, ended in texts:
        if ended == "stop":
            assert {type(node) for node in ast.walk(ast.parse(text, mode="eval"))} <= {
                ast.Expression, ast.BinOp, ast.Add, ast.Sub, ast.Constant} and " " not in text
    assert len({text for text, ended in texts if ended == "stop"}) >= 5


def test_a_special_token_that_the_grammar_names(llguidance, words: Tokenizer) -> None:
    (answer,) = answer_batch(noise(words), [[1]], 9, constrain=Grammar(words, "lark", 'start: "a" <|tool|> "b"', "x"))
    tool = words.special_tokens["<|tool|>"]
    assert answer.tokens == [*words.encode("a"), tool, *words.encode("b")] and answer.ended == "stop"
    assert not any(tool in each.tokens for each in answer_batch(
        noise(words), [[1]], 60, samples=8, temperature=1.0, seed=0, constrain=Grammar(words, "regex", "(?s:.)*", "x")))


def test_greedy_text_that_fits_stays_as_it_is(llguidance, words: Tokenizer) -> None:
    """Token for token, however it is cut: of text that may be anything, only what is no UTF-8 is ruled out."""
    model, size = noise(words), words.vocab_size
    ascii_only = [id for id in range(size + 7) if id >= size or id in words.special_tokens.values()
                  or not (words.backend.bytes_of(id) or b"\xff").isascii()]
    for prompt in ([1], [2, 3], [9, 9]):
        free = list(generate(model, prompt, 40, banned=ascii_only))
        assert free == list(generate(model, prompt, 40, banned=ascii_only,
                                     constrain=Grammar(words, "regex", "(?s:.)*", "x")))
        text = words.decode(free)
        held = generate(model, prompt, 60, banned=ascii_only, constrain=Grammar(words, "regex", re.escape(text), "x"))
        assert list(held) == free and held.answer.ended == "stop"


# ---- tokens as bytes

def folders(tmp_path: Path) -> list[Tokenizer]:
    """Byte-level; ▁ and <0xNN> in a tokenizer.json; sentencepiece."""
    for name in ("bytes", "metaspace", "sentencepiece"):
        (tmp_path / name).mkdir()
    byte_bpe(("<s>", "</s>")).save(str(tmp_path / "bytes" / "tokenizer.json"))
    metaspace_bpe().save(str(tmp_path / "metaspace" / "tokenizer.json"))
    (tmp_path / "sentencepiece" / "tokenizer.model").write_bytes(sentencepiece_model())
    for name in ("bytes", "metaspace"):
        write(tmp_path / name, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    return [load(path) for path in sorted(tmp_path.iterdir())]


def test_the_bytes_of_each_token_are_those_of_its_text(llguidance, tmp_path: Path) -> None:
    for words in folders(tmp_path):
        vocabulary = _Words(words)
        theirs = llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary), eos_token=vocabulary.ends)
        special = {*words.special_tokens.values(), *words.stop_ids}
        found = {id for id in range(words.vocab_size) if theirs.is_special_token(id)}
        assert {words.backend.bytes_of(id) for id in found - special} <= {b"\xff"}, "which no text has in it"
        assert special <= found and words.stop_ids
        for id in range(words.vocab_size):
            if id not in found:
                data = theirs.decode_bytes([id])
                assert data.decode("utf-8", "replace") == words.decode([id], continues=True), id
        for text in NASTY:
            ids = [id for id in words.encode(text, bos=False, continues=True) if id not in special]
            assert theirs.decode_bytes(ids) == words.decode(ids, continues=True).encode()


def test_an_answer_is_what_the_grammar_says_from_its_first_space_on(llguidance, tmp_path: Path) -> None:
    """With tokenizers whose texts lose a leading space, too."""
    for words in folders(tmp_path):
        for pattern in (" [a-z]{3}", "[a-z]{3}", "é日 ?"):
            texts = drawn(words, Grammar(words, "regex", pattern, "x"), 2)
            assert all(re.fullmatch(pattern, text) and ended == "stop" for text, ended in texts), (words.folder, texts)


def test_a_tokenizer_that_names_no_end(llguidance, tmp_path: Path) -> None:
    """Nothing ends what may always go on; what is complete ends by itself. Rows beyond the tokenizer are no text."""
    byte_bpe().save(str(tmp_path / "tokenizer.json"))
    words = load(write(tmp_path, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert not words.stop_ids
    for text, ended in drawn(words, Grammar(words, "regex", "(ab)*", "x"), 1, 9):
        assert ended == "length" and re.fullmatch("(ab)*a?", text)
    assert {*drawn(words, Grammar(words, "regex", "(ab){3}", "x"), 2, 9)} == {("ababab", "stop")}


# ---- the command

@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It says abcabc…"""
    return scripted(tmp_path_factory.mktemp("model"), ["a", "b", "c"], endless=True)


def cli(*arguments: object, text: str = "") -> forked.Ended:
    done = forked.start(1, script.run, *arguments, stdin=text).end()
    assert "Traceback" not in done.said, done.said
    return done


@pytest.mark.slow
def test_each_way_of_asking_takes_a_grammar(llguidance, folder: Path, tmp_path: Path) -> None:
    """What the model would say, as far as it fits; it ends, and is told to have stopped."""
    files = {name: tmp_path / name for name in ("x.json", "x.lark", "in.jsonl", "out.jsonl")}
    files["x.json"].write_text('{"enum": ["cab", "abca"]}')
    files["x.lark"].write_text('start: "abca" | "d"')
    for options, said in ((("--regex", "[abc]{4}"), "abca"), (("--grammar", files["x.lark"]), "abca"),
                          (("--json-schema", files["x.json"]), '"abca"'), (("--regex", "b[a-c]*d"), None)):
        done = cli("--model", folder, "--ask", "x", "--json", "--max-new-tokens", 9, *options)
        answer = json.loads(done.out)
        if said is None:
            assert answer["answer"].startswith("bcabc") and answer["finish_reason"] == "length"
        else:
            assert (answer["answer"], answer["finish_reason"], answer["tokens"]) == (said, "stop", len(said)), done.said
    grammar = ("--regex", "[abc]{4}")
    assert cli("--model", folder, "--prompt", "x\n", "--prompt", "y\n", "--n", 2, *grammar).out.count("\nabca\n") == 4
    assert cli("--model", folder, "--chat", *grammar, text="x\ny\n").out == "abca\nabca\n"
    files["in.jsonl"].write_text('{"prompt": "x\\n"}\n')
    cli("--model", folder, "--prompts", files["in.jsonl"], "--out", files["out.jsonl"], *grammar)
    assert json.loads(files["out.jsonl"].read_text()) == {"prompt": "x\n", "answer": "abca", "finish_reason": "stop"}


@pytest.mark.parametrize("option, data, message", [
    ("--json-schema", None, "No such file"), ("--json-schema", b"{", "not JSON"),
    ("--json-schema", b"[" * 99999, "not JSON"), ("--json-schema", b"[]", "expected a JSON schema, an object"),
    ("--json-schema", b'{"type": "x"}', "given: Invalid type: x\n"),
    ("--json-schema", b'{"uniqueItems": true}', 'Unimplemented keys: ["uniqueItems"]'),
    ("--json-schema", b'{"$ref": "http://x/y"}', "http://x/y"), ("--json-schema", b'{"not": {}}', "not"),
    ("--json-schema", b"\xff", "found the byte 0xff at 0, expected UTF-8"),
    ("--grammar", b"start: x", 'at 1(8): unknown name: "x"\n'), ("--grammar", b"", "start"),
    ("--regex", b"(", "unclosed group"), ("--regex", b"(?=a)", "look-around"),
])
def test_what_is_no_grammar_is_said_before_the_model_is_loaded(llguidance, folder: Path, tmp_path: Path, option: str,
                                                               data: bytes | None, message: str) -> None:
    """One line, with the file: here the model has no weights, which would be said next."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    file = tmp_path / "given"
    if data is not None:
        file.write_bytes(data)
    given = data.decode() if option == "--regex" and data else file
    done = cli("--model", tmp_path, "--prompt", "x", option, given)
    named = f"--regex {given}" if option == "--regex" else str(file)
    assert done.err.startswith(f"error: {named}: ") and message in done.err and done.err.count("\n") == 1, done.said


def test_what_to_install_is_said(words: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError) as error:
        Grammar(words, "json_schema", "{}", "x.json")
    assert str(error.value) == 'x.json: a grammar needs llguidance: pip install -e ".[constrain]"'
