"""The tokenizer inside a GGUF: files written here with the gguf package, as llama.cpp's converter writes them from the
real vocabularies that mistral-common ships, and compared with sentencepiece and mistral-common themselves.

tests/test_published.py compares with llama.cpp, where it is installed, and with a published file."""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import mistral_common
import pytest
import transformers
from gguf import TokenType
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import checkpoints
from checkpoints.layouts import gguf_tokens
from checkpoints.layouts.gguf_pretokenizers import PRE
from nanollm.errors import TokenizerError
from tests.clock import within
from tests.fixtures import FIXTURES
from tests.oracles import write as write_model
from tests.test_gguf import write_gguf

DATA = Path(mistral_common.__file__).parent / "data"
TEXTS = [
    "Hello world", "  leading and   runs\n\n\n of \t\t space  ", "I've he'll WE'RE don't 'tis", "12345 3.14159 ٣٤٥ ½",
    "你好，世界！我想在apple工作1314151天～", "日本語のテキスト カタカナ", "한국어 문장입니다", "Привет, мир!",
    "مرحبا بالعالم ۔", "हिन्दी में कुछ पाठ", "🚀 (normal) 😶‍🌫️ ✅ 🦙🦙", "def f(x):\n    return x**2\n\tif x: pass\r\n\r\n",
    "é e\u0301 ﬁ ＡＢＣ", "</s><s>[INST]", "a" * 50, "\x00\x01\x1b[31m", "\u00a0nbsp\u2003em\u3000ideo",
    "\n", " ", "", "x \n y", "ก็ภาษาไทย", "𐐷",
    *("".join(random.Random(n).choices("ab cXY1 23\n\t.,'é你🙂-_▁\r", k=n % 40 + 1)) for n in range(100)),
]


def write(path: Path, kind: str, tokens, types, bos: int | None = None, eos: int | None = None, more=lambda w: None,
          **keys) -> Path:
    w = gguf.GGUFWriter(path, "llama")
    w.add_tokenizer_model(kind)
    w.add_token_list(tokens)
    w.add_token_types(types)
    if bos is not None:
        w.add_bos_token_id(bos)
    if eos is not None:
        w.add_eos_token_id(eos)
    for key, value in keys.items():
        getattr(w, f"add_{key}")(value)
    more(w)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def sentencepiece_gguf(path: Path, sp: SentencePieceProcessor, **keys) -> Path:
    """As conversion/base.py: _create_vocab_sentencepiece."""
    def type_of(id: int) -> TokenType:
        for known, kind in ((sp.IsUnknown, TokenType.UNKNOWN), (sp.IsControl, TokenType.CONTROL),
                            (sp.IsUnused, TokenType.UNUSED), (sp.IsByte, TokenType.BYTE)):
            if known(id):
                return kind
        return TokenType.NORMAL

    count = sp.vocab_size()
    return write(path, "llama", [sp.IdToPiece(i) for i in range(count)], [type_of(i) for i in range(count)], 1, 2,
                 token_scores=[sp.GetScore(i) for i in range(count)], unk_token_id=0, **keys)


def streamed(tokenizer, ids) -> str:
    stream = tokenizer.stream()
    return "".join([*map(stream.push, ids), stream.finish()])


@pytest.mark.parametrize("name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def test_sentencepiece_by_scores(name, tmp_path):
    """Ids, text and streams equal sentencepiece's, of 32,000 pieces; loaded in well under 3 s."""
    sp = SentencePieceProcessor(str(DATA / name))
    path = sentencepiece_gguf(tmp_path / "x.gguf", sp)
    ours = within(3, lambda: gguf_tokens.load(path))
    for text in TEXTS:
        ids = ours.encode(text, bos=False)
        assert ids == sp.EncodeAsIds(text), text
        assert ours.decode(ids) == sp.DecodeIds(ids) == streamed(ours, ids)
    assert ours.encode("a") == [1, *sp.EncodeAsIds("a")] and ours.stop_ids == (2,)


def test_no_space_before_a_text_and_no_bos(tmp_path):
    """Gemma's: add_space_prefix false."""
    sp = SentencePieceProcessor(str(DATA / "tokenizer.model.v1"))
    ours = gguf_tokens.load(sentencepiece_gguf(tmp_path / "x.gguf", sp, add_space_prefix=False, add_bos_token=False))
    for text in TEXTS[:24]:
        bare = sp.EncodeAsIds("\n" + text)[2:]            # what follows a newline has no space of its own
        if not text.startswith("\n"):
            assert ours.encode(text) == bare, text
            assert ours.decode(bare) == text


@pytest.fixture(scope="module")
def tekken(tmp_path_factory):
    """(Mistral-Nemo's tekken as a GGUF, mistral-common's own reading): merges follow from the ranks."""
    theirs = Tekkenizer.from_file(DATA / "tekken_240718.json")
    from nanollm.text.tokenizer_declared import Declared
    from nanollm.text.tokenizer_files import _from_tekken
    folder = tmp_path_factory.mktemp("tekken")
    (folder / "tekken.json").write_bytes((DATA / "tekken_240718.json").read_bytes())
    model = json.loads(_from_tekken(folder / "tekken.json", Declared(folder)).to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    types = [TokenType.CONTROL if id < theirs.num_special_tokens else TokenType.NORMAL for id in range(len(tokens))]
    path = write(folder / "x.gguf", "gpt2", tokens, types, 1, 2, tokenizer_pre="tekken",
                 token_merges=[" ".join(pair) for pair in model["merges"]])
    return path, theirs


@pytest.mark.slow
def test_byte_level_of_131072_tokens(tekken):
    path, theirs = tekken
    ours = within(3, lambda: gguf_tokens.load(path))
    for text in TEXTS:
        ids = ours.encode(text, bos=False)
        assert ids == theirs.encode(text, bos=False, eos=False), text
        assert ours.decode(ids) == text == streamed(ours, ids)
    assert ours.encode("a")[0] == 1                       # the pre-tokenizer's default


SMALL = {"<|s|>": TokenType.CONTROL, "<|im_end|>": TokenType.CONTROL, "<note>": TokenType.USER_DEFINED}


def small(path: Path, pre: str | None = "gpt-2", **more) -> Path:
    """A BPE that was trained here, with a few tokens of each type and a row of padding."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), *SMALL]
    types = [TokenType.NORMAL] * len(model["vocab"]) + [*SMALL.values(), TokenType.UNUSED]
    keys = {"tokenizer_pre": pre} if pre else {}
    return write(path, "gpt2", [*tokens, f"[PAD{len(tokens)}]"], types, len(tokens) - 3, len(tokens) - 2,
                 token_merges=[" ".join(pair) for pair in model["merges"]], **keys, **more)


@pytest.mark.parametrize("pre", PRE)
def test_every_pre_tokenizer_cuts_and_joins(pre, tmp_path):
    """A text comes back whole, and transformers reads the same ids from the files that are written."""
    path = small(tmp_path / "x.gguf", pre, add_bos_token=False)
    ours = gguf_tokens.load(path)
    gguf_tokens.write(path, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS[:40]:
        ids = ours.encode(text, bos=False, special=True)
        assert ids == theirs.encode(text), text
        assert PRE[pre].nfc or ours.decode(ids) == text


def test_types_of_tokens(tmp_path):
    """Control tokens are read in a template, never in a user's text; user-defined ones are read in both."""
    ours = gguf_tokens.load(small(tmp_path / "x.gguf", add_bos_token=False))
    count = ours.vocab_size
    start, end, note = count - 3, count - 2, count - 1
    assert ours.encode("a<|im_end|>", special=True)[-1] == end and end not in ours.encode("a<|im_end|>")
    assert ours.encode("a<note>")[-1] == note and ours.decode([note]) == "<note>"
    assert ours.decode([start, end]) == "" and ours.bos_id == start and ours.stop_ids == (end,)
    assert "[PAD" not in ours.decode(ours.encode("[PAD703]")[:1])


def test_templates_by_name_and_ids_that_end(tmp_path):
    def more(w):
        w.add_chat_template([{"name": "default", "template": "{{ messages[0].content }}"},
                             {"name": "tool_use", "template": "{{ tools }}"}])
        w.add_eot_token_id(5)
    path = small(tmp_path / "x.gguf", more=more)
    found = gguf_tokens.files(path)
    assert [one["name"] for one in found["tokenizer_config.json"]["chat_template"]] == ["default", "tool_use"]
    assert found["generation_config.json"]["eos_token_id"] == sorted([5, gguf_tokens.load(path).eos_id])


def test_a_model_and_its_tokenizer_come_out_together(tmp_path):
    """convert, save and generate find the tokenizer in the file; config.json says the ids."""
    model = write_model(FIXTURES["llama-3"], tmp_path / "hf")

    def with_tokens(w, tensors):
        for key in [key for key in w.kv_data[0] if key.startswith("tokenizer.")]:
            del w.kv_data[0][key]
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre("gpt-2")
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:127]
        w.add_token_list([*letters, "ab", "<s>", "</s>", "<|im_start|>"])
        w.add_token_types([1] * 128 + [3] * 3)
        w.add_token_merges(["a b"])
        w.add_bos_token_id(128)
        w.add_eos_token_id(129)
        w.add_chat_template("{{ messages[0].content }}")

    path = write_gguf(tmp_path / "x.gguf", model, with_tokens)
    checkpoints.save(checkpoints.load(path), tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = checkpoints.tokenizer(path)
    assert theirs.eos_token == "</s>" and theirs.chat_template == ours.chat_template == "{{ messages[0].content }}"
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [129]
    assert checkpoints.tokenizer(tmp_path / "out").stop_ids == ours.stop_ids == (129,)
    for file in ours.files:
        assert file.exists()                              # as long as the tokenizer lives


@pytest.mark.parametrize("change, words", [
    (dict(pre="my-own"), r"tokenizer\.ggml\.pre is 'my-own'; known are gpt-2, phi-2"),
    (dict(merges=["a b c"]), r"merges has 'a b c', of which a part or the union is no token"),
    (dict(merges=["ab"]), r"merges has 'ab'; expected two tokens with a space between"),
    (dict(model="bert"), r"tokenizer\.ggml\.model is 'bert'; expected gpt2 or llama"),
    (dict(types=[1]), r"token_type has 1 entries; expected 257"),
    (dict(twice=True), r"tokens has '!' twice; expected each text once"),
])
def test_refused(change, words, tmp_path):
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "!" if change.get("twice") else "<s>"]
    write(tmp_path / "x.gguf", change.get("model", "gpt2"), tokens, change.get("types", [1] * len(tokens)),
          tokenizer_pre=change.get("pre", "gpt-2"), token_merges=change.get("merges", []))
    with pytest.raises(TokenizerError, match=words) as caught:
        gguf_tokens.load(tmp_path / "x.gguf")
    assert str(tmp_path / "x.gguf") in str(caught.value)


def test_without_pre_a_warning_and_without_a_tokenizer_none(tmp_path):
    with pytest.warns(UserWarning, match=r"no tokenizer\.ggml\.pre, so text is cut as llama\.cpp does by default"):
        gguf_tokens.load(small(tmp_path / "x.gguf", pre=None))
    empty = write(tmp_path / "y.gguf", "no_vocab", ["a"], [1])
    assert gguf_tokens.load(empty) is None and gguf_tokens.files(empty) == {}


@pytest.mark.slow
def test_a_killed_process_leaves_no_folder_for_good(tmp_path, monkeypatch):
    """The next one that reads a GGUF takes it away; not the folder of a process that lives, be it old."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = small(tmp_path / "x.gguf")
    loading = f"import os, signal, tempfile; from pathlib import Path; tempfile.tempdir = {tempfile.tempdir!r}\n" \
              f"from checkpoints.layouts import gguf_tokens; kept = gguf_tokens.load(Path({str(path)!r}))\n" \
              "os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", loading], cwd=Path(__file__).parent.parent, check=False)
    left, = Path(tempfile.gettempdir()).iterdir()
    os.utime(left, (1, 1))
    alive = gguf_tokens.load(path)
    os.utime(alive.folder, (1, 1))
    other = gguf_tokens.load(path)
    assert {*Path(tempfile.gettempdir()).iterdir()} == {alive.folder, other.folder} and not left.exists()
    del alive, other
    assert not [*Path(tempfile.gettempdir()).iterdir()]
