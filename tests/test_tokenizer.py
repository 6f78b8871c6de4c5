"""tokenizer.py against libraries that no one here wrote: transformers, sentencepiece, tiktoken and mistral_common.

The real files are those that mistral_common ships; everything else is trained on the spot. Nothing is downloaded.
"""

import json
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import transformers
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from mistral_common.tokens.tokenizers.tekken import SpecialTokenPolicy, Tekkenizer
from tiktoken_ext import openai_public
from tokenizers import AddedToken

from nanollm.errors import TokenizerError
from nanollm.text import tokenizer_ranks
from nanollm.text.tokenizer import Tokenizer, load
from nanollm.text.tokenizer_ranks import GPT2, LLAMA3
from tests.clock import within
from tests.tok_folders import (
    CORPUS,
    MISTRAL,
    NASTY,
    PUBLISHED,
    SMALL,
    begin_with,
    byte_bpe,
    metaspace_bpe,
    noise,
    ranks_of,
    sentencepiece_model,
    small,
    small_ranks,
    write,
    write_ranks,
)

TEXTS = NASTY + noise(1, 200)
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}        # tokenizer.json as it stands: other classes rebuild it


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder of each kind that can be made quickly."""
    root = tmp_path_factory.mktemp("tokenizers")
    made = {name: root / name for name in ("byte", "metaspace", "sp", "mistral", "vocab", "qwen2", "llama3", "qwen")}
    for folder in made.values():
        folder.mkdir()
    byte = byte_bpe(("<|begin|>", "<|im_end|>"))
    begin_with(byte, "<|begin|>")
    byte.save(str(made["byte"] / "tokenizer.json"))
    write(made["byte"], tokenizer_config=FAST | {"bos_token": "<|begin|>", "eos_token": "<|im_end|>"})
    metaspace_bpe().save(str(made["metaspace"] / "tokenizer.json"))
    write(made["metaspace"], tokenizer_config=FAST | {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    (made["sp"] / "tokenizer.model").write_bytes(sentencepiece_model())
    shutil.copy(MISTRAL / "mistral_instruct_tokenizer_240323.model.v3", made["mistral"] / "tokenizer.model")
    for name, kind in (("vocab", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer")):
        byte_bpe().model.save(str(made[name]))
        write(
            made[name], tokenizer_config={"tokenizer_class": kind},
            added_tokens={"<|endoftext|>": 450, "<|im_end|>": 451},
            config={"model_type": "qwen2" if name == "qwen2" else "gpt2"},
        )
    write_ranks(made["llama3"] / "tokenizer.model", ranks_of(byte_bpe()))
    write_ranks(made["qwen"] / "qwen.tiktoken", small_ranks("Qwen"))
    return made


@pytest.fixture(scope="session")
def tekken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tekken")
    shutil.copy(MISTRAL / "tekken_240911.json", folder / "tekken.json")
    return folder


def hf(folder: Path, **options: object) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(folder, **options)


# ---- the same ids, and the same text, as the oracles

@pytest.mark.parametrize("kind", ["byte", "metaspace", "vocab", "qwen2"])
def test_ids_and_text_equal_transformers(folders: dict[str, Path], kind: str) -> None:
    ours, theirs, safe = load(folders[kind]), hf(folders[kind]), hf(folders[kind], split_special_tokens=True)
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, bos=False, special=True) == ids, text
        assert ours.encode(text) == safe.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids), text


FLAGS = [{}, {"add_bos_token": True}, {"add_eos_token": True}] + [
    {"add_bos_token": b, "add_eos_token": e} for b in (True, False) for e in (True, False)]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("kind", ["post-processor", "no post-processor", "vocab.json"])
def test_bos_rule_equals_transformers(tmp_path: Path, flags: dict[str, bool], kind: str) -> None:
    """tokenizer.json's post-processor decides alone; without a tokenizer.json, the flags do."""
    backend, config = byte_bpe(("<s>", "</s>")), FAST
    if kind == "post-processor":
        begin_with(backend, "<s>")
    if kind == "vocab.json":
        backend.model.save(str(tmp_path))
        write(tmp_path, added_tokens={"<s>": 450, "</s>": 451}, config={"model_type": "gpt2"})
        config = {"tokenizer_class": "GPT2Tokenizer"}
    else:
        backend.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, tokenizer_config=config | {"bos_token": "<s>", "eos_token": "</s>"} | flags)
    ours = load(tmp_path)
    assert ours.encode("hello") == hf(tmp_path).encode("hello")
    ignored = flags.get("add_bos_token") and kind == "no post-processor"
    assert bool(ignored) == any("add_bos_token" in line and "--bos" in line for line in ours.doctor())


def test_bos_argument(folders: dict[str, Path]) -> None:
    ours = load(folders["byte"])
    bare = ours.encode("hello", bos=False)
    assert ours.encode("hello", bos=True) == ours.encode("hello") == [ours.bos_id] + bare and ours.bos_id not in bare
    plain = load(folders["vocab"])
    assert plain.encode("hello") == plain.encode("hello", bos=False) and plain.bos_id is None
    with pytest.raises(TokenizerError, match="bos_token"):
        plain.encode("hello", bos=True)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.model.v1", "mistral_instruct_tokenizer_240216.model.v2",
        "mistral_instruct_tokenizer_240323.model.v3", "mistral_instruct_tokenizer_241114.model.v7",
    ],
)
def test_mistral_sentencepiece_equals_mistral_common(tmp_path: Path, name: str) -> None:
    shutil.copy(MISTRAL / name, tmp_path / "tokenizer.model")
    ours, theirs = load(tmp_path), SentencePieceTokenizer(MISTRAL / name)
    assert (ours.vocab_size, ours.bos_id, ours.stop_ids) == (theirs.n_words, theirs.bos_id, (theirs.eos_id,))
    for text in TEXTS:
        ids = theirs.encode(text, bos=True, eos=False)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, SpecialTokenPolicy.IGNORE) == text.replace("▁", " "), text


@pytest.mark.parametrize(
    "options",
    [
        {}, {"model_type": "unigram", "vocab_size": 360}, {"add_dummy_prefix": False},
        {"byte_fallback": False, "vocab_size": 300},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    ],
    ids=str,
)
def test_sentencepiece_equals_sentencepiece(tmp_path: Path, options: dict[str, object]) -> None:
    data = sentencepiece_model(**options)
    (tmp_path / "tokenizer.model").write_bytes(data)
    ours, theirs = load(tmp_path), sentencepiece.SentencePieceProcessor(model_proto=data)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text, bos=False) == ids, text
        if theirs.unk_id() not in ids:  # sentencepiece prints " ⁇ " for it; here it is a special token
            assert ours.decode(ids) == theirs.decode(ids), text


def test_sentencepiece_space_after_special_tokens(tmp_path: Path, folders: dict[str, Path]) -> None:
    """`legacy` (and its absence): each stretch begins with sentencepiece's space. Not legacy: only the first one
    does."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(folders["sp"] / "tokenizer.model"))

    def without_space(text: str) -> list[int]:  # a newline is a byte token, which never merges: cut it off again
        pieces = model.encode("\n" + text, out_type=str)
        return model.encode("\n" + text)[pieces.index("<0x0A>") + 1:]

    shutil.copy(folders["sp"] / "tokenizer.model", tmp_path)
    for config, after in (({}, model.encode), ({"legacy": True}, model.encode), ({"legacy": False}, without_space)):
        ours = load(write(tmp_path, tokenizer_config=config))
        for a, b in (("hello", "world"), (" hello", " world"), ("the ", "\nfox"), ("é", "👍")):
            assert ours.encode(f"{a}</s>{b}", special=True, bos=False) == model.encode(a) + [2] + after(b), (
                config, a, b,
            )
            assert ours.encode(f"<s>{b}</s>{a}", special=True, bos=False) == [1] + after(b) + [2] + after(a), (
                config, a, b,
            )
    assert model.encode("world") != without_space("world")


def test_tekken_equals_mistral_common(tekken: Path) -> None:
    ours, theirs = load(tekken), Tekkenizer.from_file(tekken / "tekken.json")
    assert (ours.vocab_size, ours.bos_id, ours.stop_ids) == (theirs.n_words, theirs.bos_id, (theirs.eos_id,))
    for text in TEXTS:
        ids = theirs.encode(text, bos=True, eos=False)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, SpecialTokenPolicy.IGNORE) == text, text
    for id in (0, 1, 3, 4, 19, 20, 999):
        assert ours.decode([id], skip_special=False) == theirs.decode([id], SpecialTokenPolicy.KEEP)
    assert ours.encode("[INST]hi[/INST]", special=True, bos=False) == [3, *theirs.encode("hi", False, False), 4]


# The patterns, written out as the published code has them, for the rows that tiktoken does not define itself.
CASES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
META = CASES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|" + REST
UPPER, LOWER = (rf"[{letters}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for letters in (r"\p{Lu}\p{Lt}", r"\p{Ll}"))
MOONSHOT = "|".join([r"[\p{Han}]+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CASES}?",
                     rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CASES}?", REST])
ONE_DIGIT = META.replace("{1,3}", "")
WRITTEN = {  # file, pattern
    "Llama 3": ("tokenizer.model", META), "GLM-4": ("tokenizer.model", META), "Qwen": ("qwen.tiktoken", ONE_DIGIT),
    "Kimi K2": ("tiktoken.model", MOONSHOT), "StableLM 2": ("arcade100k.tiktoken", ONE_DIGIT),
}
DEFINED = {  # file, tiktoken's definition; Llama 4's pattern is o200k's
    "cl100k": ("cl100k_base.tiktoken", "cl100k_base"), "gpt-oss": ("o200k_base.tiktoken", "o200k_harmony"),
    "Llama 4": ("tokenizer.model", "o200k_base"),
}
LETTERS = "aA'sS tT\n\r\t 12é日本👍½ſK./\u0650\u093eǅʰ"


def definition(name: str, ranks: dict[bytes, int], monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What tiktoken itself says of an encoding, its ranks replaced: nothing is downloaded."""
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *place, **digest: ranks)
    return getattr(openai_public, name)()


@pytest.mark.parametrize("name", SMALL)
def test_ranks_equal_tiktoken(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each published file by its number of ranks: cut as the published pattern cuts, in tiktoken's own engine."""
    ranks = small_ranks(name)
    file, pattern = WRITTEN.get(name) or (
        DEFINED[name][0], definition(DEFINED[name][1], ranks, monkeypatch)["pat_str"])
    write_ranks(tmp_path / file, ranks)
    listed = {"added_tokens_decoder": {str(SMALL[name]): {"content": "[BOS]", "special": True}}}
    ours = load(write(tmp_path, tokenizer_config=listed if PUBLISHED[name].listed else {}))
    theirs = tiktoken.Encoding("oracle", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for text in TEXTS + noise(2, 200, "aabbn th ") + noise(3, 300, LETTERS):
        if "NFC" in str(ours._backend.backend.normalizer):
            text = unicodedata.normalize("NFC", text)        # Qwen and StableLM normalise first: see below
        ids = theirs.encode(text, disallowed_special=())
        assert ours.encode(text, bos=False) == ids, text
        assert ours.decode(ids) == theirs.decode(ids), text


@pytest.mark.parametrize("name, oracle", [("cl100k", "cl100k_base"), ("gpt-oss", "o200k_harmony")])
def test_special_tokens_of_ranks_equal_tiktoken(name: str, oracle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken has a second name for gpt-oss's 200018, which tokenizer.json does not have."""
    theirs = definition(oracle, {}, monkeypatch)["special_tokens"]
    assert PUBLISHED[name].special == {text: id for text, id in theirs.items() if text != "<|reserved_200018|>"}


def test_a_number_of_ranks_that_nobody_has(tmp_path: Path) -> None:
    """The count, the known ones, and what to do."""
    write_ranks(tmp_path / "tokenizer.model", {token: id for token, id in ranks_of(byte_bpe()).items() if id < 300})
    with pytest.raises(TokenizerError, match="tokenizer.model: found 300 ranks, .*tokenizer.json into the folder") as e:
        load(tmp_path)
    assert all(f"{known.size} ({known.name})" in str(e.value) for known in PUBLISHED.values())
    assert "\n" not in str(e.value)


def test_two_files_of_one_size_differ_by_name(tmp_path: Path) -> None:
    for name, file in (("cl100k", "cl100k_base.tiktoken"), ("StableLM 2", "arcade100k.tiktoken")):
        write_ranks(tmp_path / name / file, small_ranks(name))
        ours = load(tmp_path / name)
        assert ours.eos_id == SMALL[name] + 1 and ours.prefix == ()
        assert (len(ours.encode("123", bos=False)) == 3) == (name == "StableLM 2"), "digits one at a time"
        assert (ours.encode("e\u0301") == ours.encode("é")) == (name == "StableLM 2")
        assert ("<|im_start|>" in ours.special_tokens) == (name == "StableLM 2")


def test_ranks_say_where_texts_begin_and_answers_end(tmp_path: Path) -> None:
    """llama-models: `bos_id`, `stop_tokens`; gpt-oss: its generation_config.json. A folder that says otherwise wins."""
    for name, file, bos, ends in (
        ("Llama 3", "tokenizer.model", True, ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")),
        ("Llama 4", "tokenizer.model", True, ("<|end_of_text|>", "<|eom|>", "<|eot|>")),
        ("gpt-oss", "o200k_base.tiktoken", False, ("<|endoftext|>", "<|return|>", "<|call|>")),
        ("Qwen", "qwen.tiktoken", False, ("<|endoftext|>",)),
    ):
        write_ranks(tmp_path / name / file, small_ranks(name))
        ours = load(tmp_path / name)
        assert ours.stop_ids == tuple(sorted(ours.special_tokens[text] for text in ends)) and ours.doctor() == []
        assert ours.prefix == ((SMALL[name],) if bos else ())
    first = SMALL["Llama 3"]
    ours = load(write(tmp_path / "Llama 3", tokenizer_config={"add_bos_token": False, "added_tokens_decoder": {
        str(first + 4): {"content": "<mine>", "special": True}, str(first + 300): {"content": "<new>"}}}))
    assert ours.prefix == () and ours.special_tokens["<mine>"] == first + 4 and ours.vocab_size == first + 301
    assert "<|finetune_right_pad_id|>" not in ours.special_tokens and ours.special_tokens["<|eot_id|>"] == first + 9


def test_ranks_of_every_shape_equal_tiktoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random vocabularies, their ranks not in merge order, one token that no merge reaches; strings where every
    split ties."""
    rng = random.Random(11)
    for trial in range(40):
        tokens = [b"a", b"b"]
        while len(tokens) < 20:
            tokens.append(rng.choice(tokens) + rng.choice(tokens))
        tokens = sorted({*tokens[2:]}, key=lambda token: rng.random() if trial % 2 else len(token)) + [b"bcbcb"]
        ranks = {bytes([i]): i for i in range(256)} | {token: 256 + i for i, token in enumerate(tokens)}
        write_ranks(tmp_path / "tokenizer.model", ranks)
        monkeypatch.setattr(tokenizer_ranks, "RANKS", [small(PUBLISHED["Llama 3"], len(ranks))])
        ours = load(tmp_path)
        theirs = tiktoken.Encoding("oracle", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens={})
        assert ours.encode("bcbcb", bos=False) == theirs.encode("bcbcb") == [ranks[b"bcbcb"]]
        for text in noise(trial, 60, "aaab bc"):
            assert ours.encode(text, bos=False) == theirs.encode(text), (text, tokens)


def test_ranks_special_tokens_and_normalisation(folders: dict[str, Path], tmp_path: Path) -> None:
    llama3, qwen = load(folders["llama3"]), load(folders["qwen"])
    assert llama3.encode("hi")[0] == llama3.bos_id == 450 and qwen.encode("hi") == qwen.encode("hi", bos=False)
    names = {
        "<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|start_header_id|>": 6, "<|end_header_id|>": 7,
        "<|eom_id|>": 8, "<|eot_id|>": 9, "<|python_tag|>": 10, "<|reserved_special_token_247|>": 255,
    }  # llama-models, tokenizer.py
    assert all(llama3.special_tokens[text] == 450 + i for text, i in names.items()) and llama3.vocab_size == 450 + 256
    names = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<|extra_0|>": 3, "<|extra_204|>": 207}
    assert all(qwen.special_tokens[text] == 449 + i for text, i in names.items()) and qwen.vocab_size == 449 + 208
    named = load(
        write(shutil.copytree(folders["qwen"], tmp_path / "q"), special_tokens_map={"pad_token": "<|extra_0|>"})
    )
    assert named.named_tokens == {"eos_token": "<|endoftext|>", "pad_token": "<|extra_0|>"} and named.stop_ids == (449,)
    assert qwen.encode("cafe\u0301") == qwen.encode("café") and llama3.encode("cafe\u0301") != llama3.encode("café")


def test_glm4_declares_its_special_tokens(tmp_path: Path) -> None:
    """Ranks with added_tokens_decoder: those ids, gaps included, and none of Llama-3's."""
    write_ranks(tmp_path / "tokenizer.model", small_ranks("GLM-4"))
    write(tmp_path, tokenizer_config={"added_tokens_decoder": {
        "448": {"content": "<|endoftext|>", "special": True}, "453": {"content": "<|user|>", "special": True}}})
    ours = load(tmp_path)
    assert ours.special_tokens == {"<|endoftext|>": 448, "<|user|>": 453} and ours.vocab_size == 454
    assert ours.encode("<|user|>a", special=True) == [453, *ours.encode("a")] and ours.decode([450]) == "\ufffd"


def test_glm4_keeps_its_prefix_in_code(tmp_path: Path) -> None:
    """Every text begins with [gMASK]<sop>; its special tokens are not Llama-3's, so a folder that lists none is
    refused."""
    write_ranks(tmp_path / "tokenizer.model", small_ranks("GLM-4"))
    kind = {"tokenizer_class": "ChatGLM4Tokenizer", "eos_token": "<|endoftext|>"}
    with pytest.raises(TokenizerError, match="no added_tokens_decoder.*ChatGLM4Tokenizer"):
        load(write(tmp_path, tokenizer_config=kind))
    names = (
        "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
        "<|observation|>",
    )
    listed = {str(448 + i): {"content": text, "special": True} for i, text in enumerate(names)}
    ours = load(
        write(
            tmp_path, tokenizer_config=kind | {"added_tokens_decoder": listed},
            config={"eos_token_id": [448, 455, 457], "padded_vocab_size": 470},
        )
    )
    theirs = tiktoken.Encoding("oracle", pat_str=LLAMA3, mergeable_ranks=small_ranks("GLM-4"), special_tokens={})
    for text in TEXTS:
        assert ours.encode(text) == [450, 452, *theirs.encode(text, disallowed_special=())], text
    assert ours.stop_ids == (448, 455, 457) and ours.decode([469]) == "\ufffd" and ours.warnings([1]) != []


def test_xgen_equals_tiktoken(tmp_path: Path) -> None:
    """GPT-2's vocabulary with runs of spaces and tabs as new ranks, BudEcosystem/GenZ utils/tokenizer_xgen.py
    @14ad9221, a copy of Salesforce's."""
    byte_bpe().model.save(str(tmp_path))
    vocab = json.loads((tmp_path / "vocab.json").read_text()) | {"<|endoftext|>": 450}
    write(tmp_path, vocab=vocab, tokenizer_config={"tokenizer_class": "XgenTokenizer"}, config={"eos_token_id": 450})
    (tmp_path / "merges.txt").unlink()
    ranks = ranks_of(byte_bpe())
    assert b"  " in ranks, "the example needs a run that GPT-2 knows"
    for run in [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]:
        ranks[run.encode()] = 451 + len([r for r in ranks.values() if r > 450])
    theirs = tiktoken.Encoding(
        "oracle", pat_str=GPT2, mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 450, "<fim_prefix>": 489, "<reponame>": 506},
    )
    ours = load(tmp_path)
    for text in [
        *TEXTS,
        *(" " * n + "x" for n in range(70)),
        *("\t" * n for n in range(25)),
        *noise(4, 200, "  \t\nab"),
    ]:
        ids = theirs.encode(text, disallowed_special=())
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == text
    assert (ours.vocab_size, ours.eos_id, ours.stop_ids, ours.prefix) == (507, 450, (450,), ())
    for text in ("<fim_prefix>", "<reponame>", "<|endoftext|>"):
        assert (
            ours.encode(text, special=True) == theirs.encode(text, allowed_special="all") == [ours.special_tokens[text]]
        )
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(TokenizerError, match="XgenTokenizer has no file of its own: put the vocab.json of GPT-2"):
        load(tmp_path)


def test_old_qwen_has_the_same_first_special_tokens(folders: dict[str, Path]) -> None:
    """Those of August 2023 have other names after the third, which no text is written with: undefdev/Qwen-7B-Chat
    @04df5dd5."""
    assert list(load(folders["qwen"]).special_tokens.items())[:3] == [
        ("<|endoftext|>", 449), ("<|im_start|>", 450), ("<|im_end|>", 451),
    ]


@pytest.mark.parametrize("kind", ["sp", "metaspace", "byte"])
def test_a_text_that_continues_another(folders: dict[str, Path], kind: str) -> None:
    """It gets no leading space, and so decodes to itself behind the other."""
    ours = load(folders[kind])
    for text in ("world", " world", "\nworld", "é", "👍", "", "the quick", "  "):
        ids = ours.encode("hello", bos=False) + ours.encode(text, bos=False, continues=True)
        assert ours.decode(ids) == "hello" + text, (kind, text)
    assert (ours.encode("world", bos=False, continues=True) == ours.encode("world", bos=False)) == (kind == "byte")


# ---- text stays text

def test_marks_keep_special_tokens_text(folders: dict[str, Path]) -> None:
    """As chat.py sets them; a template that cuts the closing mark off opens no door."""
    for kind, text in (("byte", "<|im_end|>"), ("sp", "</s>"), ("mistral", "[INST]"), ("metaspace", "</s>")):
        ours = load(folders[kind])
        id = ours.special_tokens[text]
        for marked in (f"a\ufdd0{text}\ufdd1b", f"a\ufdd0{text}", f"\ufdd0{text}{text}"):
            ids = ours.encode(marked, bos=False, special=True)
            assert ids.count(id) == max(0, marked.count(text) - 1), (kind, marked)
            assert "\ufdd0" not in ours.decode(ids, skip_special=False) and "\ufdd1" not in ours.decode(
                ids, skip_special=False
            )
    sp = load(folders["sp"])
    assert sp.encode("a\ufdd0</s>\ufdd1b </s>", bos=False, special=True) == [*sp.encode("a</s>b ", bos=False), 2], (
        "the text is not cut there"
    )


def test_user_text_never_becomes_a_special_token(folders: dict[str, Path], tekken: Path) -> None:
    for folder in [*folders.values(), tekken]:
        ours = load(folder)
        for text in list(ours.special_tokens)[:40]:
            for attack in (text, f"hi {text} there", f"{text}{text}", f" {text}\n"):
                ids = ours.encode(attack, bos=False)
                assert not {*ours.special_tokens.values()} & {*ids}, (folder, attack)
                assert ours.decode(ids).strip() == attack.strip(), (folder, attack)
            assert ours.encode(text, bos=False, special=True) == [ours.special_tokens[text]]


def test_user_defined_pieces_that_the_folder_calls_special(tmp_path: Path) -> None:
    """sentencepiece itself parses these (Gemma's <start_of_turn>), in any spelling that normalises to them."""
    data = sentencepiece_model(user_defined_symbols=["<turn>", "<b>"], normalization_rule_name="nfkc")
    (tmp_path / "tokenizer.model").write_bytes(data)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    turn, bold = theirs.piece_to_id("<turn>"), theirs.piece_to_id("<b>")
    assert turn in theirs.encode("a <turn> b") and turn in theirs.encode("＜turn＞")
    ours = load(write(tmp_path, tokenizer_config={"additional_special_tokens": ["<turn>"]}))
    for text in ("<turn>", "a <turn> b<turn>", "＜turn＞ yes"):
        assert turn not in ours.encode(text)
    assert ours.decode(ours.encode("a <turn> b <b>")) == "a <turn> b <b>" and bold in ours.encode("a <b>")
    assert ours.encode("a<turn>", bos=False, special=True) == [*theirs.encode("a"), turn]


def test_stop_tokens_that_are_not_flagged_special(tmp_path: Path) -> None:
    backend = byte_bpe()
    backend.add_tokens(["<|im_end|>", "<|other|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, generation_config={"eos_token_id": [450]})
    ours = load(tmp_path)
    assert ours.encode("<|im_end|>", special=True) == [450] != ours.encode("<|im_end|>")
    assert ours.encode("<|other|>") == [451], "an added token that is not special is a word like any other"


class Slow:
    """A backend that takes its time between the switch and the encoding, as another thread may at any moment."""

    def __init__(self, backend: object) -> None:
        object.__setattr__(self, "backend", backend)

    def __setattr__(self, name: str, value: bool) -> None:
        setattr(self.backend, name, value)
        time.sleep(0.002)

    def __getattr__(self, name: str) -> object:
        return getattr(self.backend, name)


def test_switch_is_safe_between_threads(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, wrong = load(folders["byte"]), []
    expected = {special: ours.encode("a<|im_end|>b", special=special) for special in (True, False)}

    def work(special: bool) -> None:
        wrong.extend(1 for _ in range(20) if ours.encode("a<|im_end|>b", special=special) != expected[special])

    threads = [threading.Thread(target=work, args=(special,)) for special in (True, False)]
    monkeypatch.setattr(ours._backend, "backend", Slow(ours._backend.backend))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- added tokens

def test_added_tokens_around_a_sentencepiece_model(tmp_path: Path, folders: dict[str, Path]) -> None:
    shutil.copy(folders["sp"] / "tokenizer.model", tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    write(
        tmp_path, added_tokens={"<tool>": 560, "<tool>s": 563},
        tokenizer_config={
            "eos_token": "<|end|>",
            "added_tokens_decoder": {
                "562": {"content": "<|end|>", "special": True, "rstrip": True},
                "559": {"content": "<renamed>", "special": True},
            },
        },
    )
    ours = load(tmp_path)
    assert (ours.vocab_size, ours.eos_id, ours.stop_ids) == (564, 562, (562,))
    assert ours.encode("a<tool>b<tool>s", bos=False) == [*model.encode("a"), 560, *model.encode("b"), 563]
    assert ours.encode("a<|end|> \n b", bos=False, special=True) == [*model.encode("a"), 562, *model.encode("b")]
    assert (
        ours.encode("<renamed>", bos=False, special=True) == [559]
        and ours.decode([559], skip_special=False) == "<renamed>"
    )
    assert ours.decode([560, 561, 562]) == "<tool>\ufffd"


def test_declared_id_must_be_the_real_one(tmp_path: Path) -> None:
    byte_bpe().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, tokenizer_config=FAST | {"added_tokens_decoder": {"777": {"content": "<x>"}}})
    with pytest.raises(TokenizerError, match="found id 450 for '<x>', expected 777"):
        load(tmp_path)
    write(tmp_path, tokenizer_config={}, added_tokens={"<x>": 777})
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    assert load(tmp_path).vocab_size == 778
    with pytest.raises(TokenizerError, match="found id 2 for '</s>', expected 777"):
        load(write(tmp_path, added_tokens={"</s>": 777}))


def test_added_tokens_outside_tokenizer_json(tmp_path: Path) -> None:
    byte_bpe().save(str(tmp_path / "tokenizer.json"))
    added = {str(450 + i): {"content": text, "special": i == 1, "lstrip": False, "rstrip": False, "normalized": False,
                            "single_word": False} for i, text in enumerate(["<a>", "<b>", "üü"])}
    write(tmp_path, tokenizer_config=FAST | {"added_tokens_decoder": added, "eos_token": "<a>"})
    ours, theirs = load(tmp_path), hf(tmp_path)
    text = "x<a>y<b>"
    assert ours.encode(text, special=True) == theirs.encode(text)
    assert {**ours.special_tokens} == {"<a>": 450, "<b>": 451} and ours.eos_id == 450
    ids = ours.encode("süüß")
    assert ours.decode(ids) == "süüß" != theirs.decode(ids), "tokenizers takes ü in an added token for the byte FC"


PHI = ["<|end|>", "<|user|>", "<|assistant|>", "<|endoftext|>"]


@pytest.mark.parametrize("beside", ["nothing", "named", "stop ids", "added_tokens.json", "a stale added_tokens.json",
                                    "other flags"])
def test_what_tokenizer_json_says_of_a_token_stands(tmp_path: Path, beside: str) -> None:
    """Its flags, whatever names it or lists it again: Phi-3's <|end|> takes the newline behind it, with stop ids
    too."""
    backend = byte_bpe()
    backend.add_special_tokens([AddedToken(text, rstrip=text != "<|endoftext|>", special=True) for text in PHI])
    backend.save(str(tmp_path / "tokenizer.json"))
    end, user, assistant, eos = (backend.token_to_id(text) for text in PHI)
    files: dict[str, dict[str, object]] = {
        "nothing": {},
        "named": {"tokenizer_config": FAST | {"eos_token": "<|end|>", "additional_special_tokens": PHI[:3]}},
        "stop ids": {"generation_config": {"eos_token_id": [eos, assistant, end]}},
        "added_tokens.json": {"added_tokens": dict(zip(PHI, (end, user, assistant, eos), strict=True))},
        "a stale added_tokens.json": {"added_tokens": {"<|user|>": 7, "<|gone|>": 9_999}},
        "other flags": {"tokenizer_config": FAST | {"added_tokens_decoder": {
            str(backend.token_to_id(text)): {"content": text, "special": True} for text in PHI}}},
    }
    write(tmp_path, **files[beside])
    ours, text = load(tmp_path), "<|user|>\nHi<|end|>\n<|assistant|>\n"
    ids = backend.encode(text, add_special_tokens=False).ids
    assert ids == [user, *backend.encode("Hi").ids, end, assistant], "no newline is left"
    assert ours.encode(text, special=True, bos=False) == ids
    assert ours.special_tokens == dict(zip(PHI, (end, user, assistant, eos), strict=True))


def test_thousands_of_added_tokens_are_loaded_at_once(tmp_path: Path) -> None:
    """Gemma 3 has 6,415, each listed twice. Added one by one they take half a minute."""
    backend = byte_bpe()
    backend.add_tokens([AddedToken(f"<unused{i}>", special=i % 2 == 0) for i in range(6500)])
    backend.save(str(tmp_path / "tokenizer.json"))
    listed = {str(450 + i): {"content": f"<unused{i}>", "special": True} for i in range(6500)}
    write(tmp_path, tokenizer_config=FAST | {"eos_token": "<unused1>", "added_tokens_decoder": listed})
    ours = within(1.5, lambda: load(tmp_path), time.process_time)
    assert ours.encode("a<unused6499>") == backend.encode("a<unused6499>").ids and ours.eos_id == 451


def test_tokens_added_to_a_vocabulary_keep_their_id_and_flags(tmp_path: Path) -> None:
    """ChatML's two on a vocabulary of another model: listed in tokenizer.json, said again in added_tokens.json."""
    backend = byte_bpe()
    backend.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    first = backend.token_to_id("<|im_start|>")
    write(tmp_path, tokenizer_config=FAST | {"eos_token": "<|im_end|>"},
          added_tokens={"<|im_start|>": first, "<|im_end|>": first + 1})
    ours, theirs, text = load(tmp_path), hf(tmp_path), "<|im_start|>user\nHi<|im_end|>\n"
    assert ours.encode(text, special=True) == theirs.encode(text) and ours.encode(text, special=True)[0] == first
    assert ours.eos_id == first + 1 and first + 1 not in ours.encode(text), "typed by a user it is text"


# ---- streaming

def pieces(ours: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    stream = ours.stream(**options)
    return [stream.push(id) for id in ids] + [stream.finish()]


@pytest.mark.parametrize("kind", ["byte", "metaspace", "sp", "mistral", "vocab", "llama3"])
def test_stream_joins_to_decode(folders: dict[str, Path], kind: str) -> None:
    ours, rng = load(folders[kind]), random.Random(3)
    for text in TEXTS:
        parts = pieces(ours, ours.encode(text))
        if kind != "metaspace":                              # it eats a leading space, in transformers too
            assert "".join(parts) == (text if kind in ("byte", "vocab", "llama3") else text.replace("▁", " ")), text
        assert "\ufffd" in text or "\ufffd" not in "".join(parts), "half a character was printed"
    for _ in range(300):  # any ids at all, ill-formed bytes and special tokens among them
        ids = [rng.randrange(ours.vocab_size) for _ in range(rng.randrange(30))]
        for skip in (True, False):
            assert "".join(pieces(ours, ids, skip_special=skip)) == ours.decode(ids, skip_special=skip), ids


def test_stream_prints_each_character_as_soon_as_it_is_whole(folders: dict[str, Path]) -> None:
    ours = load(folders["byte"])
    ids = ours.encode("\U0010ffff!", bos=False)
    assert len(ids) == 5, "the example needs one token a byte"
    assert pieces(ours, ids) == ["", "", "", "\U0010ffff", "!", ""]
    assert pieces(ours, ids[:3]) == ["", "", "", "\ufffd"], "what never became whole is shown at the end"


def test_stream_continues_a_text(folders: dict[str, Path]) -> None:
    ours = load(folders["mistral"])
    prompt, rest = ours.encode("the quick"), ours.encode(" brown fox")[2:]
    assert "".join(pieces(ours, rest)) == "brown fox" and "".join(pieces(ours, rest, continues=True)) == " brown fox"
    assert ours.decode(prompt + rest) == "the quick brown fox"
    assert ours.decode(rest) == "brown fox" and ours.decode(rest, continues=True) == " brown fox"


def test_stream_costs_the_same_at_the_end(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = load(folders["sp"])
    looked_up: list[int] = []
    original = ours._backend.bytes_of
    monkeypatch.setattr(ours._backend, "bytes_of", lambda id: looked_up.append(id) or original(id))
    ids = ours.encode(" ".join(CORPUS), bos=False)
    stream = ours.stream()
    for id in ids:
        stream.push(id)
    assert looked_up == ids, "one look-up for each token: nothing is decoded twice"


def test_ill_formed_bytes_agree_up_to_their_number(folders: dict[str, Path]) -> None:
    """sentencepiece and we replace the same bytes; it writes one U+FFFD a byte, we one a maximal subpart."""
    ours = load(folders["mistral"])
    theirs, rng = (
        sentencepiece.SentencePieceProcessor(model_file=str(folders["mistral"] / "tokenizer.model")),
        random.Random(5),
    )
    first = theirs.piece_to_id("<0x00>")
    for _ in range(300):
        ids = [
            first + rng.choice([0x41, 0xE2, 0x82, 0xAC, 0xC3, 0xA9, 0xF0, 0x9F, 0x91, 0x8D, 0xFF]) for _ in range(12)
        ]
        squeeze = [re.sub("\ufffd+", "\ufffd", text) for text in (ours.decode(ids), theirs.decode(ids))]
        assert squeeze[0] == squeeze[1], ids


# ---- what a folder says about its ends

def test_stop_ids_are_the_union(tmp_path: Path) -> None:
    backend = byte_bpe(("<s>", "</s>", "<|im_end|>"))
    backend.save(str(tmp_path / "tokenizer.json"))
    write(
        tmp_path, tokenizer_config={"eos_token": {"content": "</s>"}},
        config={"eos_token_id": 451, "bos_token_id": 450}, generation_config={"eos_token_id": [452, 451]},
    )
    ours = load(tmp_path)
    assert (ours.stop_ids, ours.eos_id, ours.bos_id) == ((451, 452), 451, 450)
    assert ours.doctor() == []                            # one file names them all
    write(tmp_path, generation_config={"eos_token_id": 452})
    assert load(tmp_path).stop_ids == (451, 452)
    assert [s for s in load(tmp_path).doctor() if "different stop ids" in s and "[452]" in s]
    (tmp_path / "generation_config.json").unlink()
    assert load(tmp_path).stop_ids == (451,) and load(tmp_path).doctor() == []


def test_doctor(tmp_path: Path, folders: dict[str, Path]) -> None:
    ours = load(folders["byte"])
    ids = ours.encode("hello")
    assert ours.warnings(ids) == [] and "twice" in ours.warnings([ours.bos_id] + ids)[0]
    assert "not start" in ours.warnings(ids[1:])[0] and load(folders["vocab"]).warnings([1, 2]) == []
    backend = byte_bpe(("<|im_end|>",))
    backend.save(str(tmp_path / "tokenizer.json"))
    assert "No stop id" in load(tmp_path).doctor()[0]
    write(tmp_path, config={"eos_token_id": 3, "vocab_size": 450}, tokenizer_config={
        "chat_template": "{{ messages[0].content }}<|im_end|>", "pad_token": "[PAD]"})
    said = " ".join(load(tmp_path).doctor())
    assert "<|im_end|>, which is no stop id" in said and "pad_token '[PAD]'" in said and "only 450 rows" in said


def test_chat_template_sources(tmp_path: Path) -> None:
    byte_bpe().save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).chat_template is None
    assert load(write(tmp_path, tokenizer_config={"chat_template": "one"})).chat_template == "one"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]
    assert load(write(tmp_path, tokenizer_config={"chat_template": named})).chat_template == "two"
    write(tmp_path, tokenizer_config={"chat_template": "one"})
    (tmp_path / "chat_template.jinja").write_text("é three")
    assert load(tmp_path).chat_template == "é three"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match="chat_template.jinja.*UTF-8"):
        load(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("")
    assert [f.name for f in load(tmp_path).files] == ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]


@pytest.mark.parametrize("none", ["", {"content": ""}, None], ids=str)
def test_an_empty_name_names_nothing(tmp_path: Path, none: object) -> None:
    """Early conversions of LLaMA: `"bos_token": ""`. The model file has the names, where there is one."""
    (tmp_path / "sp").mkdir()
    (tmp_path / "sp" / "tokenizer.model").write_bytes(sentencepiece_model())
    config = {f"{name}_token": none for name in ("bos", "eos", "unk", "pad")} | {"additional_special_tokens": [""]}
    ours = load(write(tmp_path / "sp", tokenizer_config=config | {"tokenizer_class": "LLaMATokenizer"}))
    assert (ours.prefix, ours.stop_ids, ours.named_tokens["bos_token"]) == ((1,), (2,), "<s>")
    metaspace_bpe().save(str(tmp_path / "tokenizer.json"))
    ours = load(write(tmp_path, tokenizer_config=FAST | config | {"eos_token": "</s>"}))
    # transformers 5.23 recurses for ever where unk_token is empty, too, and refuses {"content": ""}
    theirs = hf(write(tmp_path, tokenizer_config=FAST | {"bos_token": none and "", "eos_token": "</s>"}))
    assert ours.named_tokens == {"eos_token": "</s>"} and ours.bos_id is None and not theirs.bos_token
    assert ours.encode("hello") == theirs.encode("hello") == [1, *theirs.encode("hello", add_special_tokens=False)]


def test_ids_that_stand_for_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    ours = load(folders["byte"])
    for id in (-1, ours.vocab_size, 10**12):
        with pytest.raises(TokenizerError, match=f"token id {id}"):
            ours.decode([id])
    shutil.copytree(folders["byte"], tmp_path / "padded")
    padded = load(write(tmp_path / "padded", config={"vocab_size": 512}))
    assert padded.decode([511]) == "\ufffd" and padded.vocab_size == ours.vocab_size


def test_lone_surrogates_are_named(folders: dict[str, Path]) -> None:
    for kind in ("byte", "sp"):
        with pytest.raises(TokenizerError, match="surrogate at position 2"):
            load(folders[kind]).encode("ab\ud800")


# ---- damaged files; those that are junk are in tests/hostile/tokens.py

def test_other_accidents(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="expected one of tokenizer.json"):
        load(tmp_path)
    with pytest.raises(TokenizerError, match="no such folder"):
        load(tmp_path / "nowhere")
    cases: dict[str, object] = {}
    ranks = ranks_of(byte_bpe())
    cases["no rank for the bytes"] = {token: rank for token, rank in ranks.items() if token != b"\x80"}
    cases["given twice"] = ranks | {b"the": 5}
    for match, broken in cases.items():
        write_ranks(tmp_path / "tokenizer.model", broken)
        with pytest.raises(TokenizerError, match=match):
            load(tmp_path)
    for lines, match in (
        (b"YQ== 1\n!!! 2\n", "tokenizer.model: found"), (b"YQ== 1\nYQ== 2\n", "line 2.*no line above"),
    ):
        (tmp_path / "tokenizer.model").write_bytes(lines)
        with pytest.raises(TokenizerError, match=match):
            load(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    byte_bpe().model.save(str(tmp_path))
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(TokenizerError, match="merges.txt"):
        load(tmp_path)
    write(tmp_path, tokenizer_config={"tokenizer_class": "BertTokenizer"})
    with pytest.raises(TokenizerError, match="BertTokenizer"):
        load(tmp_path)
    backend = byte_bpe()
    backend.decoder = None
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="decoder step"):
        load(tmp_path)


@pytest.mark.parametrize(
    "kind, file",
    [
        ("byte", "tokenizer.json"), ("metaspace", "tokenizer.json"), ("sp", "tokenizer.model"),
        ("llama3", "tokenizer.model"), ("vocab", "vocab.json"), ("vocab", "merges.txt"),
    ],
)
def test_mutated_files_load_or_are_named(tmp_path: Path, folders: dict[str, Path], kind: str, file: str) -> None:
    shutil.copytree(folders[kind], tmp_path / "m")
    good, rng = (tmp_path / "m" / file).read_bytes(), random.Random(7)
    loaded = 0
    for _ in range(60):
        data, at = bytearray(good), rng.randrange(len(good))
        damage = rng.randrange(3)
        data[at : at + rng.choice([1, 1, 20])] = (
            b"", bytes([rng.randrange(256)]), rng.choice([b'"', b"9" * 12, b"-1", b"{}"]),
        )[damage]
        (tmp_path / "m" / file).write_bytes(data)
        try:
            ours = load(tmp_path / "m")
            ours.decode(ours.encode("hello 👍"))
            loaded += 1
        except TokenizerError as error:
            assert str(tmp_path) in str(error) or "token id" in str(error)
    assert loaded < 60


def test_imports_stay_small() -> None:
    program = (
        "import sys, nanollm.text.tokenizer, nanollm.text.chat; "
        "print([m for m in ('torch', 'transformers', 'jinja2') if m in sys.modules])"
    )
    root = str(Path(__file__).resolve().parent.parent)
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=True)
    assert out.stdout.strip() == "[]", "the child of chat.py imports this, once a session"
