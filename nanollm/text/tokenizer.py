"""Text ↔ token ids. `load(folder)` takes a Hugging Face folder, whose files tokenizer_files.py reads.

    encode(text) = prefix + ids + suffix          prefix is BOS where the folder says so
    decode(ids)  = utf8(b₁ ‖ b₂ ‖ … ‖ bₙ)         a token *is* a byte string; characters appear when bytes are joined

The second line makes streaming simple and exact: a character may be spread over several tokens, never over half a byte,
so an incremental UTF-8 decoder fed with bᵢ hands out each character once, when it is whole. Ill-formed bytes become
U+FFFD, one for each maximal subpart (Unicode §3.9), as in tokenizers' byte-level decoder; sentencepiece writes one for
each byte, and tokenizers' ByteFallback replaces a run of byte tokens as a whole, where any part of it is ill-formed.

**Special tokens in user text are an attack**: "</s>" typed by a user must not end the turn. `encode` reads text as
text; only `special=True`, for rendered chat templates, reads "</s>" as its id. tokenizers has a switch for this;
sentencepiece never parses control pieces, but it does parse user-defined ones: where the folder calls such a piece
special, the text is cut in two until the piece no longer appears. A special token that is an ordinary word too (a lone
"\\n", say) keeps its id. In a rendered chat the messages stay text: text/chat.py puts OPEN and CLOSE around each
special token inside them.

A sentencepiece folder without `add_bos_token` gets BOS, and without `legacy` gets the space that sentencepiece puts
before each stretch of text: so its models were trained. (transformers 5 does neither when the key is absent.)
"""

import codecs
import json
import re
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from nanollm.errors import TokenizerError, counted
from nanollm.text.tokenizer_declared import Declared, chat_templates, need, need_file
from nanollm.text.tokenizer_files import BYTE, FILES, Model, one_error, read_model

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters: Unicode keeps them out of interchanged text for good
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|END_OF_TURN_TOKEN|>")


def load(folder: str | Path) -> "Tokenizer":
    """The tokenizer of a local folder. Raises TokenizerError, naming the file, what was found and what was expected."""
    return Tokenizer(Path(folder))


class Tokenizer:
    """What callers use; the two backends at the end of this file do the work.

    vocab_size       largest id + 1                        special_tokens   {text: id}
    bos_id, eos_id   an id, or None                        named_tokens     {"bos_token": text, …}
    prefix           the ids that every text begins with   about            model_type and names, as the files say
    stop_ids         every id that a file calls an end     files            the paths in `folder` to copy on export
    chat_templates   {name: source}; "default", and often "tool_use" for chats with tools
    stop_texts       texts that end an answer              chat_begins      the prefix is put before a chat, which
                                                                            otherwise writes it itself
    The last two are of published templates that the user names (`templates.py`).
    """

    def __init__(self, folder: Path) -> None:
        need(folder.is_dir(), folder, "no such folder", "a folder with tokenizer files")
        for pattern in FILES:
            for path in folder.glob(pattern):
                need_file(path)
        self._declared = declared = Declared(folder)

        def backend(model: Model, path: Path) -> SentencePiece | Tokenizers:
            if isinstance(model, tuple):
                return SentencePiece(model, declared, path)
            return Tokenizers(model, declared, path)

        self._backend = read_model(folder, declared, backend)
        self.vocab_size = self._backend.size
        self.special_tokens, self.named_tokens = self._backend.special, declared.named
        self._special_ids = {*self.special_tokens.values()}
        self.bos_id = self.special_tokens.get(declared.named.get("bos_token", ""), declared.bos_id)
        self.eos_id = self.special_tokens.get(declared.named.get("eos_token", ""))
        self.prefix, self.about = tuple(self._backend.prefix), declared.about
        self._stops = declared.all_stops(self.special_tokens)
        self.stop_ids = tuple(sorted(set().union(*self._stops.values())))
        self.chat_templates, self.template_files = chat_templates(folder, declared)
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self.special_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.chat_begins = False
        self.stop_texts: tuple[str, ...] = ()
        self.folder = folder
        self.files = [path for pattern in FILES for path in sorted(folder.glob(pattern))]

    @property
    def chat_template(self) -> str | None:
        """The template for chats without tools. Set, it is the only one."""
        return self.chat_templates.get("default")

    @chat_template.setter
    def chat_template(self, source: str | None) -> None:
        self.chat_templates, self.template_files = {} if source is None else {"default": source}, {}

    def copy_files(self, folder: Path) -> None:
        """Copy its files to a folder, and generation_config.json, which says what ends an answer."""
        for path in [*self.files, self.folder / "generation_config.json"]:
            if path.exists():
                to = folder / path.relative_to(self.folder)
                to.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, to)

    def template_for(self, tools: Any) -> str | None:
        """The source that writes a chat with these tools (None: without), as transformers' `get_chat_template` picks
        it."""
        return self.chat_templates.get(self.template_name(tools))

    def template_name(self, tools: Any) -> str:
        """The name of that template."""
        return "tool_use" if tools is not None and "tool_use" in self.chat_templates else "default"

    def encode(self, text: str, *, bos: bool | None = None, special: bool = False,
               continues: bool = False) -> list[int]:
        """The ids of `text`.

        bos        None: the folder's own rule, EOS included. True: begins with BOS. False: the text alone.
        special    True: the text of a special token becomes its id, but not between OPEN and CLOSE. Only for text that
                   no user wrote.
        continues  True: the text goes on from other text, so it gets no leading space.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"position {error.start}"
            raise TokenizerError(f"text: found a lone surrogate at {where}, expected Unicode text") from None
        ids = self._backend.encode(text, special, continues)
        if bos is None:
            return self._backend.prefix + ids + self._backend.suffix
        if not bos:
            return ids
        if self.bos_id is None:
            where = str(self._declared.where)
            raise TokenizerError(f"{where}: found no bos_token, expected one, because encode was asked for BOS")
        return (self._backend.prefix or [self.bos_id]) + ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continues: bool = False) -> str:
        """The text of `ids`, with special tokens left out or spelled out.

        continues  True: the ids go on from earlier text, so the space they begin with is a real one. False: they are
                   a text, before which sentencepiece put a space that was not there.
        """
        text = b"".join(self._bytes_of(id, skip_special) for id in ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._backend.strips and not continues else text

    def stream(self, *, skip_special: bool = True, continues: bool = False) -> "Stream":
        """`decode`, one id at a time."""
        return Stream(self, skip_special, continues)

    @property
    def backend(self) -> "SentencePiece | Tokenizers":
        """What does the work, for who writes the tokenizer in another form."""
        return self._backend

    def _bytes_of(self, id: int, skip_special: bool) -> bytes:
        """Ids that the embedding has and the tokenizer lacks (padding, holes) show as U+FFFD."""
        id = int(id)                                      # a tensor's element, too
        if skip_special and id in self._special_ids:
            return b""
        if not 0 <= id < max(self.vocab_size, self._declared.rows):
            raise TokenizerError(f"token id {id}: expected 0 to {max(self.vocab_size, self._declared.rows) - 1}")
        found = self._backend.bytes_of(id)
        return "\ufffd".encode() if found is None else found

    def warnings(self, ids: list[int]) -> list[str]:
        """What is wrong with the start of a prompt, in sentences. BOS doubled or absent costs tens of points."""
        found, begins = [], self._backend.prefix[:1]
        if self.bos_id is not None and list(ids[:2]) == [self.bos_id] * 2:
            found.append(f"BOS ({self.bos_id}) stands twice at the start: the text has it, and encode added it again.")
        if begins and list(ids[:1]) != begins:
            found.append(f"The prompt does not start with {begins[0]}, as the folder says that texts do.")
        return found

    def doctor(self) -> list[str]:
        """What is wrong, or worth knowing, about the special tokens of the folder, in sentences."""
        found, stops = [], self._stops
        if not stops:
            found.append("No stop id: no file names an end-of-sequence token, "
                         "so generation ends only at its length limit.")
        if stops and set().union(*stops.values()) not in stops.values():    # else one file has them all
            said = ", ".join(f"{file} {sorted(ids)}" for file, ids in stops.items())
            found.append(f"The files name different stop ids: {said}. Each of them stops.")
        templates = "".join(self.chat_templates.values())
        for text in TURN_ENDS:
            if text in templates and self.special_tokens.get(text, -1) not in (-1, *self.stop_ids):
                found.append(f"The chat template ends turns with {text}, which is no stop id: chats may run on.")
        for name, text in self.named_tokens.items():
            if text not in self.special_tokens:
                found.append(f"{name} {text!r} is not in the vocabulary.")
        if self._declared.flag("add_bos_token") and self.bos_id not in self._backend.prefix:
            found.append("tokenizer_config.json says add_bos_token, but tokenizer.json decides, and adds none. If the "
                         "model was trained with it, put it first: --bos, or encode(text, bos=True).")
        for file, ids in self._declared.stops.items():
            if beyond := sorted(id for id in ids if id >= max(self.vocab_size, self._declared.rows)):
                found.append(f"{file} names the stop id {beyond[0]}, and the ids end at "
                             f"{max(self.vocab_size, self._declared.rows) - 1}: it never stops a text.")
        if self._declared.rows and self.vocab_size > self._declared.rows:
            found.append(f"The tokenizer has ids up to {self.vocab_size - 1}, "
                         f"the model only {counted(self._declared.rows, 'row')}.")
        return found


class Stream:
    """push(id) → the text that this id completes, often one piece of a word, maybe ""; finish() → what is left.

    The pieces join to `decode(ids)`. A character is held back until its last byte has come, so at most three bytes are
    kept, and a push costs the same however long the text is.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, continues: bool) -> None:
        self.tokenizer, self.skip_special = tokenizer, skip_special
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.at_start = tokenizer._backend.strips and not continues

    def push(self, id: int) -> str:
        return self._begin(self.utf8.decode(self.tokenizer._bytes_of(id, self.skip_special)))

    def finish(self) -> str:
        return self._begin(self.utf8.decode(b"", final=True))

    def _begin(self, text: str) -> str:
        if self.at_start and text:
            self.at_start = False
            return text.removeprefix(" ")
        return text


# ---- the two backends. Each has: encode(text, special, continues), bytes_of(id), special {text: id}, size (largest id
# ---- + 1), strips (decoding drops one leading space), prefix and suffix (the ids that the folder puts around a text).

def _decoder_steps(backend: tokenizers.Tokenizer, where: Path) -> list[dict[str, Any]]:
    """The steps of its decoder, each of which `Tokenizers.bytes_of` and `strips` reproduce; any other is an error."""
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": "null"}
    steps = decoder.get("decoders", [decoder])
    for step in steps:
        known = {"ByteLevel": len(steps) == 1, "ByteFallback": True, "Fuse": True,
                 "Metaspace": step.get("replacement") == "▁",
                 "Replace": (step.get("pattern"), step.get("content")) == ({"String": "▁"}, " "),
                 "Strip": (step.get("content"), step.get("start"), step.get("stop")) == (" ", 1, 0)}
        fits = known.get(step["type"])
        need(fits, where, f"the decoder step {step}", "ByteLevel, or ▁ → space with <0xNN> for bytes")
    return steps


def _special(token: AddedToken) -> AddedToken:
    """The same token, special. Added again as plain text it would lose its other flags."""
    return AddedToken(token.content, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
                      normalized=token.normalized, special=True)


class Tokenizers:
    """A `tokenizers.Tokenizer`, for every file but sentencepiece's."""

    def __init__(self, backend: tokenizers.Tokenizer, declared: Declared, where: Path) -> None:
        self.backend, self.lock, self.where = backend, threading.Lock(), where
        backend.no_truncation()
        backend.no_padding()
        held = backend.get_added_tokens_decoder()         # what the tokenizer's own file says of a token stands
        backend.add_tokens([token for id, token in sorted(declared.added.items())
                            if id not in held or held[id].content != token.content])
        for id, token in declared.added.items():
            got = backend.token_to_id(token.content)
            need(got == id, where, f"id {got} for {token.content!r}", f"{id}, as the folder's added tokens declare it")
        added = backend.get_added_tokens_decoder()
        stops = {added[id].content for ids in declared.stops.values() for id in ids if id in added}
        declared.speak(backend.id_to_token, where)
        flags = {token.content: token for token in added.values()}
        known = [text for text in sorted(declared.special | stops) if backend.token_to_id(text) is not None]
        backend.add_special_tokens([_special(flags[text]) if text in flags else text for text in known])
        added = backend.get_added_tokens_decoder()
        self.added = {id: token.content for id, token in added.items()}
        self.special = {token.content: id for id, token in added.items() if token.special}
        longest_first = sorted(self.special, key=len, reverse=True)
        self.marked = re.compile(OPEN + "(" + "|".join(map(re.escape, longest_first)) + ")")
        self.size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        need(self.size, where, "an empty vocabulary", "at least one token")
        need(self.size <= 1 << 24, where, f"id {self.size - 1}", f"ids below {1 << 24}")

        steps = _decoder_steps(backend, where)
        self.byte_level = steps[0]["type"] == "ByteLevel"
        self.byte_fallback = any(step["type"] == "ByteFallback" for step in steps)
        self.strips = any(step["type"] == "Strip" or step.get("prepend_scheme", "never") != "never" for step in steps)

        self.prefix, self.suffix = declared.around(self.special)
        if where.name == "tokenizer.json":                # its post-processor is the rule, not tokenizer_config.json
            whole, bare = backend.encode("a").ids, backend.encode("a", add_special_tokens=False).ids
            need(bare, where, "a vocabulary that cannot spell 'a'", "one that shows what the post-processor adds")
            start = next(i for i in range(len(whole)) if whole[i:i + len(bare)] == bare)
            self.prefix, self.suffix = whole[:start], whole[start + len(bare):]

    def encode(self, text: str, special: bool, continues: bool) -> list[int]:
        """Ids as Tokenizer.encode has them, of the text alone. Raises TokenizerError if the library cannot cut it."""
        if special and (OPEN in text or CLOSE in text):   # text, marked, text, …
            pieces = [piece.replace(OPEN, "").replace(CLOSE, "") for piece in self.marked.split(text)]
            return [id for i, piece in enumerate(pieces) for id in self.encode(piece, i % 2 == 0, continues)]
        if continues and self.strips:                     # a newline is a byte token, with which nothing merges
            begun, whole = (self.encode(before, special, False) for before in ("\n", "\n" + text))
            return whole[len(begun):]
        with self.lock, one_error(self.where, "rules that this text can be cut by"):      # all calls share the switch
            self.backend.encode_special_tokens = not special
            return self.backend.encode(text, add_special_tokens=False).ids

    def bytes_of(self, id: int) -> bytes | None:
        """None for an id that stands for nothing."""
        token = self.backend.id_to_token(id)
        if token is None:
            return None
        if self.byte_level:                               # an added token is stored as plain text
            spelled = id not in self.added and all(char in BYTE for char in token)
            return bytes(BYTE[char] for char in token) if spelled else token.encode()
        if self.byte_fallback and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()


class SentencePiece:
    """A sentencepiece model, and the added tokens around it, which sentencepiece itself knows nothing of."""

    def __init__(self, models: tuple[Any, Any], declared: Declared, where: Path) -> None:
        self.model, self.bare = models                    # as it is, and without its leading space
        self.pieces = self.model.get_piece_size()
        self.legacy = declared.flag("legacy") is not False      # a leading space after each special token, too
        self.strips = self.model.id_to_piece(self.model.encode("a")[0]).startswith("▁")

        for name in ("bos", "eos", "unk", "pad"):
            if (id := getattr(self.model, f"{name}_id")()) >= 0:
                declared.named.setdefault(f"{name}_token", self.model.id_to_piece(id))
        declared.speak(lambda id: self.model.id_to_piece(id) if id < self.pieces else None, where)
        control = {i for i in range(self.pieces) if self.model.is_control(i) or self.model.is_unknown(i)}
        self.added = {id: token.content for id, token in declared.added.items()}
        for id, text in self.added.items():
            at = self.model.piece_to_id(text)             # the unknown id, if there is no such piece
            need(at == id or self.model.id_to_piece(at) != text, where, f"id {at} for {text!r}", f"{id}, as declared")
        texts = {i: self.model.id_to_piece(i) for i in range(self.pieces)} | self.added      # added ones rename pieces
        stops = set().union(*declared.stops.values()) & {*self.added}
        flagged = control | stops | {id for id, token in declared.added.items() if token.special}
        named = declared.special | {*declared.named.values()}
        self.special = {text: id for id, text in texts.items() if id in flagged or text in named}
        self.parsed = {id for id in self.special.values() if id < self.pieces} - control     # user-defined, yet special
        self.size = 1 + max(texts)
        self.prefix, self.suffix = declared.around(self.special)

        plain = {text: id for id, text in self.added.items() if text not in self.special}
        self.cuts = {False: self._cuts(plain, declared), True: self._cuts(plain | self.special, declared)}

    def _cuts(self, tokens: dict[str, int], declared: Declared) -> tuple[re.Pattern[str], list[int]]:
        """A pattern with one group for each token, the longest first, and the ids of the groups."""
        order = sorted(tokens, key=len, reverse=True)
        flags = [declared.added.get(tokens[text], AddedToken(text)) for text in order]
        groups = ["(" + r"\s*" * token.lstrip + f"(?<!{OPEN})" + re.escape(text) + r"\s*" * token.rstrip + ")"
                  for text, token in zip(order, flags, strict=True)]
        return re.compile("|".join(groups) or "(?!)"), [tokens[text] for text in order]

    def encode(self, text: str, special: bool, continues: bool) -> list[int]:
        pattern, group_ids = self.cuts[special]
        ids, end, space = [], 0, not continues
        for match in pattern.finditer(text):
            ids += self._stretch(text[end:match.start()], space, special)
            assert match.lastindex is not None, "each alternative of the pattern is a group"
            ids.append(group_ids[match.lastindex - 1])
            end, space = match.end(), self.legacy
        return ids + self._stretch(text[end:], space, special)

    def _stretch(self, text: str, leading_space: bool, special: bool) -> list[int]:
        """Text between tokens of the pattern. A special piece that sentencepiece finds in it is cut in two."""
        text = text.replace(OPEN, "").replace(CLOSE, "") if special else text
        ids = (self.model if leading_space else self.bare).encode(text)
        if len(text) < 2 or self.parsed.isdisjoint(ids):
            return ids
        half = len(text) // 2
        return self._stretch(text[:half], leading_space, False) + self._stretch(text[half:], False, False)

    def bytes_of(self, id: int) -> bytes | None:
        """None for an id that stands for nothing."""
        if id in self.added or id >= self.pieces:
            return self.added[id].encode() if id in self.added else None
        piece = self.model.id_to_piece(id)
        return bytes([int(piece[3:5], 16)]) if self.model.is_byte(id) else piece.replace("▁", " ").encode()
