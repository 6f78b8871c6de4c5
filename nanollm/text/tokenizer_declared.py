"""What a model folder says about its tokens beside the vocabulary: in small JSON files, each of which may be absent.

    tokenizer_config.json, special_tokens_map.json   special tokens by name, added tokens, switches, the class
    added_tokens.json                                added tokens, text → id; not read beside a tokenizer.json
    config.json, generation_config.json              ids that end a generation; ids of the speakers' tokens, if any
    chat_template.jinja, or tokenizer_config.json    how a chat is written; several ways of it have names, those of
    additional_chat_templates/NAME.jinja             "tool_use" among them
    chat_template.json                               the same, as processors write it; where there is no other

Some published tokenizers keep a part of it in their Python code only. That part is here as data, by the name of their
class (`IN_CODE`), and counts only where the files are silent.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken

from nanollm.errors import TokenizerError

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
NAMED_TEMPLATES = "additional_chat_templates"            # a folder in the model's folder
SPEAKERS = ("user_token", "assistant_token")              # generation_config.json has their ids: "user_token_id": 195


class InCode(NamedTuple):
    """What a tokenizer's class keeps in Python code."""
    follow: tuple[str, ...] = ()                          # special tokens, whose ids follow the last of the vocabulary
    special: tuple[str, ...] = ()                         # entries of the vocabulary that are special
    begin: tuple[str, ...] = ()                           # what each text begins with, in place of BOS
    stops: tuple[str, ...] = ()                           # what ends a generation


_GLM_MASKS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
_GLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
IN_CODE = {
    "ChatGLMTokenizer": InCode(follow=_GLM_MASKS + _GLM_ROLES, begin=("[gMASK]", "sop"),
                               stops=("<|user|>", "<|observation|>")),
    "ChatGLMTokenizer chatglm2": InCode(follow=_GLM_MASKS, begin=("[gMASK]", "sop")),      # before it had roles
    "ChatGLM4Tokenizer": InCode(begin=("[gMASK]", "<sop>")),
    "InternLMTokenizer": InCode(special=("<eoh>", "<eoa>")),
}


def need(condition: Any, path: Path, found: str, expected: str) -> None:
    """Raises TokenizerError unless the condition holds."""
    if not condition:
        raise TokenizerError(f"{path}: found {found[:160]}, expected {expected}")


def what_is(data: bytes) -> str:
    """Names the usual accidents: most 'invalid JSON' is an error page, or a pointer that git-lfs did not follow."""
    kinds = {b"version https://git-lfs": "a git-lfs pointer", b"<": "an HTML page", b"PK\x03": "a zip archive"}
    named = [kind for mark, kind in kinds.items() if data.lstrip().startswith(mark)]
    return named[0] if named else f"{len(data)} bytes beginning {data[:24]!r}" if data else "an empty file"


def need_file(path: Path) -> None:
    """Raises TokenizerError for what is there but no file: opening a pipe would wait for ever."""
    need(path.is_file() or not path.exists(), path, "a folder" if path.is_dir() else "a pipe or a device", "a file")


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; {} where there is no such file."""
    need_file(path)
    data = path.read_bytes() if path.exists() else b"{}"
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: found {what_is(data)}, expected JSON ({error!s:.80}); "
                             "download it again") from None
    need(isinstance(value, dict), path, repr(value), "a JSON object")
    return value


def token_id(value: Any, path: Path) -> int:
    """An id from JSON, where keys are strings and values numbers. 2²⁴ is far above every vocabulary in use."""
    digits = str(value) if not isinstance(value, bool) else ""
    fits = digits.isascii() and digits.isdigit() and len(digits) < 9 and int(digits) < 1 << 24
    need(fits, path, repr(value), "a token id")
    return int(digits)


class Declared:
    """The contents of the small files, checked."""

    def __init__(self, folder: Path) -> None:
        self.where = folder / "tokenizer_config.json"
        self.config = read_json(folder / "special_tokens_map.json") | read_json(self.where)
        self.kind = str(self.config.get("tokenizer_class") or "").removesuffix("Fast")
        self.begins = False                               # with BOS, where no switch says so: set by a reader
        self.ends: tuple[str, ...] = ()                   # what ends a generation beside EOS: set by a reader
        self.named = {name: self._text(self.config[name]) for name in NAMES if not self._none(self.config.get(name))}
        extra = self.config.get("additional_special_tokens") or []
        need(isinstance(extra, list), self.where, repr(extra), "additional_special_tokens to be a list")
        self.special = {*self.named.values(), *(self._text(token) for token in extra if not self._none(token))}

        self.added: dict[int, AddedToken] = {}
        # beside a tokenizer.json it is a leftover, as for transformers: that file has its own list
        older = {} if (folder / "tokenizer.json").exists() else read_json(folder / "added_tokens.json")
        for text, id in older.items():
            self.added[token_id(id, folder / "added_tokens.json")] = AddedToken(text, special=text in self.special)
        listed = self.config.get("added_tokens_decoder") or {}
        need(isinstance(listed, dict), self.where, repr(listed), "added_tokens_decoder to map ids to tokens")
        for id, token in listed.items():
            need(isinstance(token, dict), self.where, repr(token), "a token's object in added_tokens_decoder")
            names = ("special", "lstrip", "rstrip", "normalized", "single_word")
            flags = {name: token.get(name) is True for name in names}
            self.added[token_id(id, self.where)] = AddedToken(self._text(token), **flags)

        model, generation = read_json(folder / "config.json"), read_json(folder / "generation_config.json")
        rows = model.get("vocab_size") or model.get("padded_vocab_size") or 0
        need(isinstance(rows, int), folder / "config.json", repr(rows), "vocab_size to be a number")
        self.rows = rows                                  # of the embedding; often padded beyond the tokenizer
        bos = model.get("bos_token_id", generation.get("bos_token_id"))
        self.bos_id = bos if bos is None else token_id(bos, folder / "config.json")
        self.stops = {}                                   # file name → the ids that it says end a generation
        for name, config in (("config.json", model), ("generation_config.json", generation)):
            ids = config.get("eos_token_id")
            if ids is not None:
                self.stops[name] = {token_id(id, folder / name) for id in (ids if isinstance(ids, list) else [ids])}
        self.speakers = {name: token_id(generation[f"{name}_id"], folder / "generation_config.json")
                         for name in SPEAKERS if f"{name}_id" in generation}
        self.about = " ".join(str(config.get(key) or "") for config, key in (
            (model, "model_type"), (model, "_name_or_path"), (self.config, "name_or_path"))).strip()
        kind = f"{self.kind} chatglm2" if "chatglm2" in self.about.lower() else self.kind
        self.in_code = IN_CODE.get(kind, IN_CODE.get(self.kind, InCode()))
        self.special |= {*self.in_code.special, *self.in_code.follow}

    def _none(self, token: Any) -> bool:
        """Whether a name stands for no token: null, or "" as in early conversions of LLaMA."""
        return (token.get("content") if isinstance(token, dict) and "content" in token else token) in (None, "")

    def _text(self, token: Any) -> str:                   # "<s>" or {"content": "<s>", "special": true, …}
        text: Any = token.get("content") if isinstance(token, dict) else token
        need(isinstance(text, str) and text, self.where, repr(token), "the text of a token")
        return text

    def flag(self, name: str) -> bool | None:
        """A switch of tokenizer_config.json; None where it is absent."""
        value = self.config.get(name)
        need(value in (None, True, False), self.where, f"{name} = {value!r}", "true or false")
        return value

    def speak(self, text_of: Callable[[int], str | None], where: Path) -> None:
        """Name the speakers' tokens after their ids, so that a template can write them: {{ user_token }}."""
        for name, id in self.speakers.items():
            text = text_of(id)
            if text is None:
                raise TokenizerError(f"{where}: found no token of id {id}, "
                                     f"expected one, as generation_config.json names it {name}_id")
            self.named[name] = text
            self.special.add(text)

    def around(self, ids: dict[str, int]) -> tuple[list[int], list[int]]:
        """Prefix and suffix of every text: what the class begins with, else what add_bos_token, add_eos_token say."""
        bos, eos, add_bos = self.named.get("bos_token"), self.named.get("eos_token"), self.flag("add_bos_token")
        begin = [ids[text] for text in self.in_code.begin if text in ids]
        return (begin or ([ids[bos]] if bos in ids and (self.begins if add_bos is None else add_bos) else []),
                [ids[eos]] if eos in ids and self.flag("add_eos_token") else [])

    def all_stops(self, ids: dict[str, int]) -> dict[str, set[int]]:
        """Who says that which ids end a generation. Each of them does."""
        said = {"the tokenizer": (self.named.get("eos_token"), *self.ends),
                f"the code of {self.kind}": self.in_code.stops}
        found = {who: {ids[text] for text in texts if text in ids} for who, texts in said.items()}
        return {who: stops for who, stops in found.items() if stops} | self.stops


def chat_templates(folder: Path, declared: Declared) -> tuple[dict[str, str], dict[str, Path]]:
    """The chat templates by name, and their files; one without a name is "default". Files win over
    tokenizer_config.json, all of them over all of it: transformers, `PreTrainedTokenizerBase._from_pretrained`.

    chat_template.json, which transformers reads for processors (`ProcessorMixin.get_processor_dict`), is the last.
    """
    files = {"default": folder / "chat_template.jinja"} if (folder / "chat_template.jinja").exists() else {}
    files |= {path.stem: path for path in sorted((folder / NAMED_TEMPLATES).glob("*.jinja"))}
    if files:
        return {name: _read(path) for name, path in files.items()}, files
    where, said = declared.where, declared.config.get("chat_template")
    if said is None:
        where = folder / "chat_template.json"
        said = read_json(where).get("chat_template")
    if isinstance(said, list):                            # [{"name": …, "template": …}, …]
        need(all(isinstance(one, dict) for one in said), where, repr(said), "a list of named chat templates")
        said = {one.get("name"): one.get("template") for one in said}
    named = said if isinstance(said, dict) else {} if said is None else {"default": said}
    need(all(isinstance(text, str) for pair in named.items() for text in pair), where, repr(said),
         "chat_template to be text, or texts by name")
    return named, dict.fromkeys(named, where)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{file}: found {what_is(file.read_bytes())}, expected UTF-8 text ({error})") from None
