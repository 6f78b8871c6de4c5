"""Special tokens added to a tokenizer, in every form that folders have; transformers reads what is written."""

import json
import shutil

import pytest
import transformers

from nanollm.errors import TokenizerError
from nanollm.text import adding
from nanollm.text.tokenizer import load
from tests.tok_folders import CORPUS, NASTY, byte_bpe, metaspace_bpe, sentencepiece_model, write

NEW = ["<|im_start|>", "<|im_end|>"]
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


def of_bpe(folder):
    write(folder, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", **NAMED})
    byte_bpe(("<s>", "</s>")).save(str(folder / "tokenizer.json"))


def of_metaspace(folder):
    write(folder, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", **NAMED, "added_tokens_decoder": {
        "0": {"content": "<unk>", "special": True}}, "additional_special_tokens": ["<|end|>"]})
    metaspace_bpe().save(str(folder / "tokenizer.json"))


def of_sentencepiece(folder):
    write(folder, tokenizer_config={"tokenizer_class": "LlamaTokenizer", **NAMED, "legacy": False})
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())


def of_sentencepiece_of_old(folder):
    """With a [PAD] in added_tokens.json, as early fine-tunes of LLaMA have it."""
    of_sentencepiece(folder)
    write(folder, added_tokens={"[PAD]": 560}, special_tokens_map={"pad_token": "[PAD]"})


def of_vocab(folder):
    state = json.loads(byte_bpe().to_str())["model"]
    vocab = state["vocab"] | {"<|endoftext|>": len(state["vocab"])}        # GPT-2's files have it as their last entry
    write(folder, vocab=vocab, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    merges = (" ".join(pair) for pair in state["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")


FOLDERS = [of_bpe, of_metaspace, of_sentencepiece, of_sentencepiece_of_old, of_vocab]


@pytest.mark.parametrize("make", FOLDERS)
def test_new_tokens_follow_the_last_one_and_are_read_as_one(make, tmp_path):
    make(tmp_path / "old")
    old = load(tmp_path / "old")
    new = adding.with_tokens(tmp_path / "old", NEW, tmp_path / "new")
    first = old.vocab_size
    assert [new.special_tokens[text] for text in NEW] == [first, first + 1] and new.vocab_size == first + 2
    for text in [*NASTY[:40], *CORPUS[:5]]:
        plain = text.replace("<|im_end|>", "")
        assert new.encode(plain) == old.encode(plain)
        assert new.encode(text + NEW[0], bos=False)[-1] != first            # typed by a user it is text
    ids = new.encode("<|im_start|>hello<|im_end|>", bos=False, special=True)
    assert ids[0] == first and ids[-1] == first + 1 and len(ids) > 2
    assert new.decode(ids, skip_special=False, continues=True) == "<|im_start|>hello<|im_end|>"
    assert "hello" in new.decode(ids) and "im_" not in new.decode(ids)


@pytest.mark.parametrize("make", FOLDERS)
def test_transformers_reads_the_same_ids(make, tmp_path):
    make(tmp_path / "old")
    ours = adding.with_tokens(tmp_path / "old", NEW, tmp_path / "new")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert theirs.convert_tokens_to_ids(NEW) == [ours.special_tokens[text] for text in NEW]
    text = "<|im_start|>hello<|im_end|>"
    found = theirs(text, add_special_tokens=False)["input_ids"]
    assert found[0] == ours.special_tokens[NEW[0]] and found[-1] == ours.special_tokens[NEW[1]]
    assert "im_" not in theirs.decode(found, skip_special_tokens=True)
    # what transformers itself writes after adding them has the same ids
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "old")
    other.add_special_tokens({"additional_special_tokens": NEW})
    assert other.convert_tokens_to_ids(NEW) == theirs.convert_tokens_to_ids(NEW)


def test_tokens_that_are_there_keep_their_ids(tmp_path):
    of_metaspace(tmp_path / "old")
    old = load(tmp_path / "old")
    assert "<tool>" not in old.special_tokens                # an added token, but no special one
    new = adding.with_tokens(tmp_path / "old", ["<|end|>", "<tool>", "<new>"], tmp_path / "new")
    assert new.special_tokens["<|end|>"] == old.special_tokens["<|end|>"]
    assert new.special_tokens["<tool>"] == old.encode("<tool>", bos=False, continues=True)[0]
    assert new.special_tokens["<new>"] == old.vocab_size == new.vocab_size - 1
    again = adding.with_tokens(tmp_path / "new", ["<new>"], tmp_path / "again")
    assert again.vocab_size == new.vocab_size


def test_what_cannot_be_added_is_refused_and_nothing_is_left(tmp_path):
    of_bpe(tmp_path / "old")
    for tokens, message in ((["<a>", "<a>"], "'<a>': given twice"), ([""], "'': empty")):
        with pytest.raises(TokenizerError, match=message):
            adding.with_tokens(tmp_path / "old", tokens, tmp_path / "new")
    shutil.copytree(tmp_path / "old", tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        adding.with_tokens(tmp_path / "broken", ["<a>"], tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"old", "broken"}
