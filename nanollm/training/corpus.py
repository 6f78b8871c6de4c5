"""The data of a run, of any kind: one stream of training rows, held-out rows, a tokenizer.

    --data text …      tokenized into the run folder (data/prepare.py), then read as shards
    --data shards …    one source each, mixed by weight (data/stream.py)
    --chat file …      chats through the model's own template, packed into rows (data/sft.py), mixed by weight; also
                       with --data, after which one stream has rows of both kinds
    --preference, --reward file …    pairs of answers, or answers with a label (data/preferences.py), mixed by weight
    --grpo, --ppo file …             prompts without answers (data/prompts.py), mixed by weight
    --held-out file    what is measured on; all of the above is then trained on
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nanollm.data import chat_sets, chat_store, preferences, prompts
from nanollm.data import prepare as text
from nanollm.data import stream as data
from nanollm.data.encode import marks
from nanollm.data.shards import read_meta
from nanollm.data.stream import Source, Stream
from nanollm.errors import DataError, counted
from nanollm.text import adding, templates, tokenizer
from nanollm.text.chat import Conversation
from nanollm.text.tokenizer import Tokenizer
from nanollm.training.distributed import World


@dataclass(frozen=True)
class Corpus:
    """See the head of the file. facts: counted when text was tokenized for this run, None for other data.

    targets_per_byte    of the held-out text, where its bytes are known: nats per target → bits per byte
    examples            the folder of data/chat_store.py that the chats are read from
    """
    stream: Stream
    held_out: Source | None
    tokenizer: Tokenizer | None                 # None for raw .bin files without one: ids cannot become text
    vocab: int
    chat: bool
    facts: text.Facts | None
    notes: tuple[str, ...]                      # lines that are printed before the first step
    draft: Path | None = None                   # tokenized for this run, and not yet where it belongs; see `keep`
    targets_per_byte: float | None = None
    examples: Path | None = None
    rewarded: bool = False                      # what is measured on the held-out rows is a reward, with a minus

    def prompt(self, words: str) -> list[int]:
        """The ids that a sample goes on from: the beginning of a document, or of an answer. Needs a tokenizer."""
        tokenizer = self.tokenizer
        assert tokenizer is not None
        if self.chat and tokenizer.chat_template is not None:       # without a template, prompts are plain text
            conversation = Conversation(tokenizer)
            conversation.add("user", words or "Hello!")
            return conversation.prompt_ids()
        start = () if tokenizer.bos_id is None and tokenizer.eos_id is None else marks(tokenizer).before
        return [*start, *tokenizer.encode(words, bos=False)]

    def keep(self, world: World) -> "Corpus":
        """The same, with text that was tokenized for this run moved to its place, and the examples of other chats
        removed: the run begins, all checks have passed. All ranks call it."""
        draft, reader, examples = self.draft, self.tokenizer, self.examples
        if examples:
            world.on_rank_0(lambda: chat_store.keep_only(examples))
        if draft is None:
            return self
        world.on_rank_0(lambda: text.settle(draft, draft.parent))
        for source in (*self.stream.sources, self.held_out):
            if isinstance(source, data.Tokens):
                source.moved(draft)
        if reader and reader.folder == draft:
            reader = tokenizer.load(draft.parent)
        return dataclasses.replace(self, tokenizer=reader, draft=None)

    def copy_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer's files beside a model, and for chats the template and the ids that end an answer."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            return
        tokenizer.copy_files(folder)
        if self.chat and tokenizer.chat_templates:
            templates.write(tokenizer, folder)
            file = folder / "generation_config.json"
            config = json.loads(file.read_text()) if file.exists() else {}
            file.write_text(json.dumps(config | {"eos_token_id": list(tokenizer.stop_ids)}, indent=2) + "\n")

    def of_step(self, step: int, options: argparse.Namespace, world: World) -> list[Any]:
        """This rank's micro-batches of a step. The rows of a step are the same however many ranks share them.

        Raises DataError where a file can no longer be read.
        """
        each, at_once = options.batch_size // world.size, options.micro_batch
        first = self.first_row(step, options) + world.rank * each
        try:
            return [self.stream.batch(at, at_once) for at in range(first, first + each, at_once)]
        except DataError as error:
            error.alone = True                  # other ranks may have read their rows
            raise

    def first_row(self, step: int, options: argparse.Namespace) -> int:
        """The first row of a step. Where several updates are made with the same samples, they have the same rows."""
        return int(step // options.updates * options.batch_size)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the data, by name: log-probabilities of the reference model (reference.py)."""
        sources = [*self.stream.sources, *([self.held_out] if self.held_out else [])]
        return {f"reference.{number}": source.reference for number, source in enumerate(sources)
                if isinstance(source, preferences.Pairs)}

    def describe(self, first: int, count: int) -> str:
        """Where `count` rows of the stream come from, beginning with row `first`, for messages."""
        places = [self.stream.place(row) for row in range(first, first + count)]
        names = [f"{self.stream.sources[source].name} {window}" for source, _, window in places]
        return f"rows {first} to {first + count - 1} ({', '.join(names[:4])}{', …' if count > 4 else ''})"

    def unchanged(self) -> None:
        """Raises DataError if a file has changed since it was opened."""
        for source in self.stream.sources:
            source.unchanged()

    def in_bytes(self, loss: float) -> dict[str, float]:
        """The held-out loss in bits per byte, which does not depend on the tokenizer; {} where bytes are not known."""
        return {} if self.targets_per_byte is None else {"held_out_bits_per_byte": self.bits_per_byte(loss)}

    def bits_per_byte(self, loss: float) -> float:
        """Nats per token → bits per byte of the held-out text. Needs `targets_per_byte`."""
        assert self.targets_per_byte is not None
        return loss * self.targets_per_byte / math.log(2)


def open_corpus(options: argparse.Namespace, world: World, vocab: int) -> Corpus:
    """The data that the options name. All ranks call it: rank 0 tokenizes text and checks every byte, the others wait.

    vocab: the size of the BPE that is trained where no tokenizer is given. Raises DataError.
    """
    if options.preference or options.reward:
        return open_preferences(options, world)
    if options.grpo or options.ppo:
        return world.on_all_ranks(lambda: open_prompts(options))
    if not options.chat:
        return open_text(options, world, vocab)
    chats = open_chats(options, world)
    if not options.data:
        return chats
    return mixed(options, chats, open_text(argparse.Namespace(**vars(options) | {"mix": None}), world, vocab))


def open_text(options: argparse.Namespace, world: World, vocab: int) -> Corpus:
    """The text, or shards, of --data; with --chat, --held-out is of chats, and read elsewhere."""
    folders, draft = options.data, None
    if new := not folders or not all(map(is_shards, folders)):
        made = world.broadcast(world.on_rank_0(lambda: prepare(options, vocab)))
        folders, draft = [made], None if made == options.out / "data" else made
    corpus = world.on_all_ranks(lambda: open_shards(options, folders))
    if options.held_out and not options.chat and not (new and not is_shards(options.held_out)):
        corpus = world.on_all_ranks(lambda: measured_on(options, corpus))
    sources = [source for source in (*corpus.stream.sources, corpus.held_out) if source]
    world.on_rank_0(lambda: [source.verify(corpus.vocab) for source in sources])
    return dataclasses.replace(corpus, draft=draft)


def is_shards(path: Path) -> bool:
    """Whether that is tokens, and not text."""
    return path.suffix == ".bin" or data.is_shard_folder(path)


def prepare(options: argparse.Namespace, vocab: int) -> Path:
    """Tokenize the text that --data names: the folder of shards, which is a draft inside that of the run where the
    text is new.

    A run that is resumed keeps its tokenizer, and, unless --force says so, its text: both are compared before any
    work. Text that an earlier version tokenized is not compared, and taken as it is. Raises DataError.
    """
    folder, given = options.out / "data", adding.folder_of(options)
    if shards := [path for path in options.data if is_shards(path)]:
        raise DataError(f"--data {shards[0]}: found shards beside text; make shards of the text too, with python -m "
                        "nanollm.data --tokenizer, and they can be mixed")
    if options.mix:
        raise DataError(f"--mix: expected --data of shards, found text ({', '.join(map(str, options.data))}), which is "
                        "one source; make shards of each with python -m nanollm.data")
    read = functools.partial(text.read, field=options.text_field, marks=text.separators(given))
    documents: text.Texts | text.Apart = read(options.data)
    if options.held_out:                                # where it is of chats, or of shards, no text is held out
        own = None if options.chat or is_shards(options.held_out) else read(options.held_out)
        documents = text.Apart(read(options.data), own)
    meta = read_meta(folder) if options.resume and (options.out / "run.json").exists() else {}
    if "facts" in meta:                                 # the text of the run that is resumed
        if text.holds(folder, documents):
            if text.is_whole(folder):
                return folder
        elif not options.force:
            given_text = " ".join(["--data", *map(str, options.data)]) if options.data else "Python's standard library"
            given_text += f" and --held-out {options.held_out}" if options.held_out else ""
            raise DataError(f"{options.out}: holds another run (its text is not that of {given_text}); "
                            "with --resume --force it goes on with that text, under the tokenizer that it has; "
                            "--force starts over, --out names another folder")
        else:
            given = given or folder                     # the model knows no other
    size = None if given else vocab
    return text.draft(documents, folder, vocab=size, tokenizer=given, context=options.context)


def open_shards(options: argparse.Namespace, folders: list[Path]) -> Corpus:
    """A mixture of shard folders and .bin files, and their tokenizer: named by an option, or beside them.

    Raises DataError where the shards were made with another tokenizer, or none is found and --vocab is not given.
    """
    candidates = (path for path in (adding.folder_of(options), options.init, *folders) if path)
    words = next((path for path in candidates if any(path.glob("tokenizer*"))), None)
    reader = tokenizer.load(words) if words else None
    pairs = [data.open_folder(path, options.context, reader.eos_id if reader else None) for path in folders]
    if reader:
        for source, _ in pairs:
            need_tokenizer(source, reader)
    vocab = reader.vocab_size if reader else options.vocab
    if vocab is None:
        raise DataError(f"{folders[0]}: raw shards do not say which tokenizer they were made with; "
                        "name its folder with --tokenizer, or its size with --vocab")
    stream = Stream([train for train, _ in pairs], options.mix, options.seed)
    facts = text.facts(folders[0]) if len(folders) == 1 and folders[0].is_dir() else None
    notes = [f"{source.name}: {counted(source.rows, 'row')} of {options.context} tokens" for source in stream.sources]
    if facts:
        size = f"{facts.train_bytes / 1e6:.1f} MB, {facts.train_tokens / 1e6:.2f} M tokens"
        whole = "" if options.held_out else ", whole or the end of a long one,"
        notes = [f"{counted(facts.train_documents, 'document')}, {size}; "
                 f"{counted(facts.held_out_documents, 'document')}{whole} held out"]
        notes += text.notes(folders[0])
    held_out = next((held for _, held in pairs if held), None)
    if len(pairs) > 1:
        notes.append(f"measured on {held_out.name}" if held_out else "nothing is held out to measure on")
    rate = facts.held_out_targets / facts.held_out_bytes if facts and facts.held_out_bytes else None
    return Corpus(stream, held_out, reader, vocab, False, facts, tuple(notes), targets_per_byte=rate)


def need_tokenizer(source: data.Tokens, reader: Tokenizer) -> None:
    """Raise DataError where shards say that they were made with another tokenizer."""
    if source.digest not in (None, text.digest(reader)):
        raise DataError(f"{source.name}: made with another tokenizer than that of {reader.folder}; "
                        f"make it anew with python -m nanollm.data --tokenizer {reader.folder}")


def measured_on(options: argparse.Namespace, corpus: Corpus) -> Corpus:
    """The corpus with what --held-out names to measure on: shards, or text, which is tokenized here."""
    path, reader, rate = options.held_out, corpus.tokenizer, None
    if is_shards(path):
        train, beside = data.open_folder(path, options.context, reader.eos_id if reader else None)
        held_out = beside or train
        if reader:
            need_tokenizer(held_out, reader)
    elif reader is None:
        raise DataError(f"--held-out {path}: text needs a tokenizer: name its folder with --tokenizer")
    else:
        documents = text.read(path, options.text_field, text.separators(reader.folder))
        tokens, size = text.in_memory(documents, reader)
        held_out = data.Tokens(f"{path}, held out", [tokens], options.context, short=True)
        rate = (tokens.count - 1) / size
    notes = [note for note in corpus.notes if not note.endswith("measure on") and not note.startswith("measured on")]
    return dataclasses.replace(corpus, held_out=held_out, facts=None, targets_per_byte=rate,
                               notes=(*notes, f"measured on {held_out.name}"))


def open_chats(options: argparse.Namespace, world: World) -> Corpus:
    """The chats of all --chat, written with the template of --init and packed into rows (data/chat_sets.py). All ranks
    call it: rank 0 writes what the others read."""
    def read() -> tuple[Tokenizer, chat_sets.Sets]:
        return chat_tokenizer(options), chat_sets.Sets(options.chat, options.held_out, options.dataset_dir,
                                                       columns(options))

    reader, sets = world.on_all_ranks(read)
    folder = chat_store.folder_for(options.out, reader, sets.every)
    world.on_rank_0(lambda: chat_store.build(folder, reader, sets.every))
    train, held, notes = world.on_all_ranks(lambda: sets.rows(folder, reader, options.context, options.long or "drop"))
    stream = Stream(train, options.mix if len(options.mix or ()) == len(train) else None, options.seed)
    largest = max(source.largest for source in (*train, held) if source)
    return Corpus(stream, held, reader, largest + 1, True, None, tuple(notes), examples=folder)


def open_preferences(options: argparse.Namespace, world: World) -> Corpus:
    """The items of all --preference, or --reward, written with the template of --init (data/preferences.py). All ranks
    call it: rank 0 writes what the others read."""
    def read() -> tuple[Tokenizer, preferences.Sets]:
        return chat_tokenizer(options), preferences.Sets(
            options.preference or options.reward, options.held_out, options.dataset_dir, columns(options),
            labels=options.loss == "kto")

    reader, sets = world.on_all_ranks(read)
    folder = chat_store.folder_for(options.out, reader, sets.chats)
    world.on_rank_0(lambda: chat_store.build(folder, reader, sets.chats))
    train, held, notes = world.on_all_ranks(lambda: sets.rows(folder, reader, options.context, options.long or "drop",
                                                              sys.stdout.isatty()))
    largest = max(source.largest for source in (*train, held) if source)
    return Corpus(Stream(train, options.mix, options.seed), held, reader, largest + 1, True, None, tuple(notes),
                  examples=folder)


def open_prompts(options: argparse.Namespace) -> Corpus:
    """The prompts of --grpo or --ppo, written with the template of --init."""
    reader = chat_tokenizer(options)
    train, held, notes = prompts.open_sets(
        options.grpo or options.ppo, options.held_out, reader, options.context, options.max_new_tokens,
        options.long or "drop", options.dataset_dir, columns(options))
    largest = max(*reader.stop_ids, *(source.largest for source in (*train, held) if source))
    return Corpus(Stream(train, options.mix, options.seed), held, reader, largest + 1, True, None, tuple(notes),
                  rewarded=True)


def chat_tokenizer(options: argparse.Namespace) -> Tokenizer:
    """The tokenizer of --init, with the template of --template."""
    folder = adding.folder_of(options)
    assert folder is not None, "--chat and --preference go with --init"
    reader = tokenizer.load(folder)
    if options.template:
        templates.choose(reader, options.template, to_file=True)
    return reader


def columns(options: argparse.Namespace) -> dict[str, str]:
    """--columns, as a mapping."""
    return dict(pair.split("=", 1) for pair in options.columns or ())


def mixed(options: argparse.Namespace, chats: Corpus, text: Corpus) -> Corpus:
    """Chats and text as one corpus: chats first, in the order of --mix. Measured on what the chats hold out."""
    stream = Stream([*chats.stream.sources, *text.stream.sources], options.mix, options.seed)
    held_out = chats.held_out or text.held_out
    measured = f"measured on {held_out.name}" if held_out else "nothing is held out to measure on"
    told = ("measured", "nothing is held out")                 # of one of the two
    notes = (*(note for note in (*text.notes, *chats.notes) if not note.startswith(told)), measured)
    return dataclasses.replace(text, stream=stream, held_out=held_out, tokenizer=chats.tokenizer, chat=True, facts=None,
                               vocab=max(chats.vocab, text.vocab), notes=notes, targets_per_byte=None,
                               examples=chats.examples)
