"""Small tokenizer folders, trained on the spot, and texts that find bugs. Shared by the tests of tokenizer.py and
chat.py."""

import base64
import io
import json
import random
from pathlib import Path

import mistral_common
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from nanollm.text.tokenizer_ranks import RANKS, Ranks

MISTRAL = Path(mistral_common.__file__).parent / "data"       # real files: sentencepiece v1 to v7, and tekken

WORDS = (
    "the quick brown fox jumps over lazy dogs while models learn to read write and count 123 4567 hello world "
    "don't we'll they've naïve café über straße 你好 世界 日本語 русский текст 👍🏽 emoji code def return x = y + 1"
).split()
_rng = random.Random(0)
CORPUS = [" ".join(_rng.choices(WORDS, k=12)) for _ in range(400)] + ["    indented\n\n\tlines  with   spaces"] * 20

NASTY = [
    "", " ", "  ", "a", " a", "a ", "  a  b   c    ", "\n", "\n\n\n", "\t", "\r\n x\r", "Hello, world!", " Hello",
    "hello  world", "don't WE'LL they'Ve", "3.14159 1234567 ١٢٣ ½", "naïve café", "e\u0301 n\u0303 \u0301", "ﬁ Å Ａ ㎏",
    "你好，世界。", "日本語のテキスト", "👍🏽 👨‍👩‍👧 🇫🇷", "русский", "العربية", "हिन्दी", "\u200b\u200d\ufeff",
    "\ufffd", "\x00",
    "a\x00b", "\x01\x7f\x85\xa0", "▁", "a▁b ▁c", "<0x0A>", "<unk>", "Ġ Ċ", "x" * 3000, "ab" * 500, " " * 70,
    "\n" * 40, "!?" * 60, "a\u2028b\u3000c", "def f(x):\n    return x  # done\n\n", "\U0010ffff\U00020000",
    "<s>not</s> [INST] <|im_end|> <|eot_id|>",
]


def noise(seed: int, count: int, alphabet: str = "aab  \n1'é你👍<>|s_") -> list[str]:
    """Strings of few distinct characters: repeats and overlaps, where merge order shows."""
    rng = random.Random(seed)
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 40))) for _ in range(count)]


def write(folder: Path, **files: object) -> Path:
    """write(folder, config={…}) writes config.json, and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def byte_bpe(specials: tuple[str, ...] = (), vocab: int = 450) -> tokenizers.Tokenizer:
    """GPT-2's kind: byte alphabet, trained merges, special tokens at the end."""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tok.add_special_tokens(list(specials))
    return tok


def begin_with(tok: tokenizers.Tokenizer, bos: str) -> None:
    tok.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tok.token_to_id(bos))])


def metaspace_bpe() -> tokenizers.Tokenizer:
    """Llama-2's kind as a tokenizer.json: ▁ for spaces, <0xNN> for what has no token, special tokens first."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, show_progress=False, limit_alphabet=40))
    state = json.loads(trained.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    vocab = {
        token: i for i, token in enumerate(first + [t for t, _ in sorted(state["vocab"].items(), key=lambda kv: kv[1])])
    }
    tok = tokenizers.Tokenizer(models.BPE(vocab, [tuple(m) for m in state["merges"]], unk_token="<unk>", fuse_unk=True,
                                          byte_fallback=True))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    tok.add_special_tokens(["<unk>", "<s>", "</s>"])
    tok.add_tokens([AddedToken("<tool>", special=False), AddedToken("<|end|>", special=True, rstrip=True)])
    begin_with(tok, "<s>")
    return tok


def sentencepiece_model(**options: object) -> bytes:
    """Llama's settings, unless told otherwise."""
    settings = dict(model_type="bpe", vocab_size=560, byte_fallback=True, normalization_rule_name="identity",
                    remove_extra_whitespaces=False, character_coverage=0.99, minloglevel=2, num_threads=1) | options
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=out, **settings)
    return out.getvalue()


def ranks_of(tok: tokenizers.Tokenizer) -> dict[bytes, int]:
    """The vocabulary of a byte-level BPE as tiktoken's ranks: its ids are already in merge order."""
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    return {bytes(byte_of[c] for c in token): id for token, id in tok.get_vocab(with_added_tokens=False).items()}


# Rank files are known by their size, and the published ones are large. These sizes stand for them in the tests.
SMALL = {"Llama 3": 450, "Qwen": 449, "GLM-4": 448, "Llama 4": 447, "gpt-oss": 446, "cl100k": 445, "StableLM 2": 445,
         "Kimi K2": 444}


def small(known: Ranks, size: int) -> Ranks:
    """The same row for a file of `size` ranks: its special tokens follow those."""
    return known._replace(size=size, special={text: id - known.size + size for text, id in known.special.items()})


PUBLISHED = {known.name: known for known in RANKS}
RANKS += [small(PUBLISHED[name], size) for name, size in SMALL.items()]


def small_ranks(name: str) -> dict[bytes, int]:
    """As many ranks as stand for that file."""
    return {token: rank for token, rank in ranks_of(byte_bpe()).items() if rank < SMALL[name]}


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
