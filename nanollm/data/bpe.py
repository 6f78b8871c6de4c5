"""A tokenizer trained on text: byte-level BPE, and the files that make a folder with it one that others load.

Byte-level BPE begins with the 256 bytes and merges the neighbours that occur most often, until the vocabulary is full
(Radford et al. 2019, §2.2): any text can be written, and what was written can be read back. It learns from all of the
text to train on, or, where that has more than SAMPLE characters, from each kth piece of it, so that about SAMPLE are
taken from all over the text.
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from nanollm.data.documents import END, Part
from nanollm.data.shards import write_file
from nanollm.data.split import boundary

SAMPLE = 1 << 30                # characters
PIECE = 1 << 16
WORDS = r"\w+ ?|[^\w\s]+ ?|\s+"   # where tokens may end. A word takes the space behind it: a prompt may end in "def "

# A chat in plain words. ": " is a piece of its own wherever it stands (WORDS), so the ids of a prompt and of its
# answer, one after the other, are the ids of both together; and an answer ends in the mark, as a document does.
CHAT = r"""{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{{ message['content'] + '\n' }}
    {%- elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n' }}
    {%- elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}
    {%- else %}{{ raise_exception('found the role ' + message['role'] + ', expected system, user or assistant') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}
"""


def train_tokenizer(parts: Iterable[Part], size: int, vocab: int) -> tokenizers.Tokenizer:
    """A BPE of `vocab` tokens, the 256 bytes and END among them, of parts that have about `size` characters."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet,
                                  show_progress=sys.stderr.isatty())
    tokenizer.train_from_iterator(sample(parts, math.ceil(size / SAMPLE)), trainer)
    return tokenizer


def sample(parts: Iterable[Part], every: int) -> Iterator[str]:
    """Each `every`th piece of the text. A piece ends behind a line or a word, and has at most PIECE characters: the
    library keeps several hundred of them at once."""
    number = 0
    for part in parts:
        at = 0
        while at < len(part.text):
            end = at + PIECE
            if end < len(part.text):
                end = at + boundary(part.text[at:end])
            if number % every == 0:
                yield part.text[at:end]
            at, number = end, number + 1


def save_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """The files that nanollm.text.tokenizer.load and transformers.AutoTokenizer read. The mark is BOS and EOS both."""
    end = tokenizer.token_to_id(END)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END,
              "clean_up_tokenization_spaces": False}
    generation = {"bos_token_id": end, "eos_token_id": end}
    write_file(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    for name, value in (("tokenizer_config", config), ("generation_config", generation)):
        write_file(folder / f"{name}.json", json.dumps(value, indent=2).encode() + b"\n")
    write_file(folder / "chat_template.jinja", CHAT.encode())
