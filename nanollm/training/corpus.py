"""What a run learns from, whatever it was made of: one stream of rows, held-out rows, a tokenizer.

    --data text …      made into shards in the run folder (data/prepare.py), then read as those
    --data shards …    one source each, mixed by weight (data/stream.py)
    --chat file        chats through the model's own template, packed into rows (data/sft.py)
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from nanollm.data import documents, prepare, sft, stream
from nanollm.data.stream import Batch, Source, Stream
from nanollm.errors import DataError
from nanollm.text import templates, tokenizer
from nanollm.text.chat import Conversation
from nanollm.text.tokenizer import Tokenizer
from nanollm.training.distributed import World


@dataclass(frozen=True)
class Corpus:
    """See the head of the file. facts: what was counted when text was prepared, None for other sources."""
    stream: Stream
    held_out: Source | None
    tokenizer: Tokenizer | None                 # None: raw .bin files, of which no text can be made
    folder: Path | None                         # with the tokenizer's files, to be copied beside the model
    vocab: int
    chat: bool
    facts: prepare.Facts | None
    notes: tuple[str, ...]                      # lines for a person, before the first step

    def prompt(self, words: str) -> list[int]:
        """The ids that a sample continues: the beginning of a document, or of an answer."""
        assert self.tokenizer is not None
        if self.chat and self.tokenizer.chat_template is not None:  # without one, chats are plain text
            conversation = Conversation(self.tokenizer)
            conversation.add("user", words or "Hello!")
            return conversation.prompt_ids()
        start = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id
        return ([] if start is None else [start]) + self.tokenizer.encode(words, bos=False)

    def copy_tokenizer(self, folder: Path) -> None:
        """Put the tokenizer's files beside a model. A template that was given for the chats goes with them, and the ids
        that end an answer in it."""
        if self.tokenizer is None or self.folder is None:
            return
        for path in [*self.tokenizer.files, self.folder / "generation_config.json"]:
            if path.exists():
                shutil.copyfile(path, folder / path.name)
        if self.chat and self.tokenizer.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.tokenizer.chat_template)
            file = folder / "generation_config.json"
            config = json.loads(file.read_text()) if file.exists() else {}
            file.write_text(json.dumps(config | {"eos_token_id": list(self.tokenizer.stop_ids)}, indent=2) + "\n")

    def batches(self, first: int, rows: int, at_once: int) -> list[Batch]:
        """The rows first … first + rows − 1 of the stream, `at_once` to a batch. Raises DataError where a file cannot
        be read any more."""
        try:
            return [self.stream.batch(at, at_once) for at in range(first, first + rows, at_once)]
        except DataError as error:
            error.alone = True                  # the other ranks may have read theirs
            raise

    def describe(self, first: int, count: int) -> str:
        """Which rows of which source the rows first … of the stream are."""
        places = [self.stream.place(row) for row in range(first, first + count)]
        names = [f"{self.stream.sources[source].name} {window}" for source, _, window in places]
        return f"rows {first} to {first + count - 1} ({', '.join(names[:4])}{', …' if count > 4 else ''})"

    def unchanged(self) -> None:
        """Raises DataError if a file is not what it was when it was opened."""
        for source in self.stream.sources:
            source.unchanged()

    def in_bytes(self, loss: float) -> dict[str, float]:
        """The held-out loss in a unit that does not depend on the tokenizer, where the bytes were counted."""
        return {} if self.facts is None else {"held_out_bits_per_byte": self.facts.bits_per_byte(loss)}


def open_corpus(options: argparse.Namespace, world: World, vocab: int) -> Corpus:
    """All ranks call it; rank 0 prepares text (with a BPE of `vocab`) and checks every byte, while the others wait.
    Raises DataError."""
    if options.chat:
        return world.on_all_ranks(lambda: open_chats(options))
    folders = options.data
    if not all(path.suffix == ".bin" or stream.is_shard_folder(path) for path in folders) or not folders:
        world.on_rank_0(lambda: prepare_text(options, vocab))
        folders = [options.out / "data"]
    corpus = world.on_all_ranks(lambda: open_shards(options, folders))
    sources = [source for source in (*corpus.stream.sources, corpus.held_out) if source]
    world.on_rank_0(lambda: [source.verify(corpus.vocab) for source in sources])
    return corpus


def prepare_text(options: argparse.Namespace, vocab: int) -> None:
    """Make shards of --data, or of the standard library, in the run folder."""
    if len(options.data) > 1:
        raise DataError(f"{', '.join(map(str, options.data))}: several --data are mixed as shards; make each with "
                        "python -m nanollm.data first")
    given = options.tokenizer or options.init
    found = documents.read(options.data[0] if options.data else None)
    prepare.prepare(
        found, options.out / "data", vocab=None if given else vocab, tokenizer=given, context=options.context)


def open_shards(options: argparse.Namespace, folders: list[Path]) -> Corpus:
    """A mixture of shard folders and .bin files, and their tokenizer: named by an option, or found beside them."""
    places = (options.tokenizer, options.init, *folders)
    words = next((path for path in places if path and any(path.glob("tokenizer*"))), None)
    reader = tokenizer.load(words) if words else None
    pairs = [stream.open_folder(path, options.context, reader.eos_id if reader else None) for path in folders]
    for source, _ in pairs:
        if reader and source.digest not in (None, prepare.digest(reader)):
            raise DataError(f"{source.name}: made with another tokenizer than that of {words}; make it anew with "
                            f"python -m nanollm.data --tokenizer {words}")
    vocab = reader.vocab_size if reader else options.vocab
    if vocab is None:
        raise DataError(f"{folders[0]}: raw shards do not say which tokenizer they were made with; name its folder "
                        "with --tokenizer, or its size with --vocab")
    rows = Stream([train for train, _ in pairs], options.mix, options.seed)
    facts = prepare.facts(folders[0]) if len(folders) == 1 and folders[0].is_dir() else None
    notes = [f"{source.name}: {source.rows:,} rows of {options.context} tokens" for source in rows.sources]
    if facts:
        notes = [f"{facts.train_documents} documents, {facts.train_bytes / 1e6:.1f} MB, {facts.train_tokens / 1e6:.2f} "
                 f"M tokens; {facts.held_out_documents} more documents held out"]
    held_out = next((held for _, held in pairs if held), None)
    if len(pairs) > 1:
        notes.append(f"measured on {held_out.name}" if held_out else "nothing is held out to measure on")
    return Corpus(rows, held_out, reader, words, vocab, False, facts, tuple(notes))


def open_chats(options: argparse.Namespace) -> Corpus:
    """The chats of a file, read through the template of --init and packed into rows; the first of them is shown."""
    reader = tokenizer.load(options.init)
    if options.template:
        templates.choose(reader, options.template, to_file=True)
    chats, held = sft.split(sft.read(options.chat))
    examples = [example for chat in chats for example in sft.examples(reader, chat)]
    held_examples = [example for chat in held for example in sft.examples(reader, chat)]
    pad = reader.eos_id if reader.eos_id is not None else 0
    train = sft.Chats(str(options.chat), examples, options.context, pad)
    held_out = sft.Chats(f"{options.chat}, held out", held_examples, options.context, pad) if held_examples else None
    for source in (train, held_out):
        if source:
            source.verify(reader.vocab_size)
    colour = sys.stdout.isatty()
    notes = [f"{len(chats)} chats in {train.rows} rows of {options.context} tokens, {len(held)} held out; one of them, "
             f"what is learnt in {'green' if colour else '⟦ ⟧'}:", sft.picture(reader, examples[0], colour=colour)]
    if train.dropped:
        notes.append(f"{train.dropped} examples are longer than --context {options.context} and are left out")
    rows = Stream([train], None, options.seed)
    return Corpus(rows, held_out, reader, options.init, reader.vocab_size, True, None, tuple(notes))
