"""Tokenizer files and chat templates that are damaged, lie, or mean harm."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanollm.text import tokenizer
from nanollm.text.render import render
from tests.hostile.files import POINTER
from tests.hostile.good import Case, Group, Harm, edited, gone, put
from tests.tok_folders import byte_bpe, ranks_of, sentencepiece_model, small_ranks, write, write_ranks

# ---- tokenizers

JUNK: dict[str, tuple[bytes | str, str]] = {
    "empty": (b"", "an empty file"),
    "{}": (b"{}", "found"),
    "a list": (b"[1, 2]", "found"),
    "a number": (b"7", "found"),
    "deeply nested": (b"[" * 100_000, "found"),
    "not UTF-8": (b'{"a": "\xff"}', "found"),
    "all bytes": (bytes(range(256)), "found"),
    "web page": ("<!DOCTYPE html><html>404</html>", "an HTML page"),
    "zip": (b"PK\x03\x04junk", "a zip archive"),
    "git-lfs pointer": (POINTER, "a git-lfs pointer"),
}


def json_folder(folder: Path) -> None:
    _saved("byte", folder)
    write(folder, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"}, config={"vocab_size": 450})


def sentencepiece_folder(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(_piece_model())


def ranks_folder(folder: Path) -> None:
    write_ranks(folder / "tokenizer.model", _ranks())


def tiktoken_folder(folder: Path) -> None:
    write_ranks(folder / "qwen.tiktoken", small_ranks("Qwen"))


def vocab_folder(folder: Path) -> None:
    _bpe().model.save(str(folder))
    write(folder, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})


def tekken_folder(folder: Path) -> None:
    from base64 import b64encode

    vocab = [
        {"rank": rank, "token_bytes": b64encode(token).decode(), "token_str": None}
        for token, rank in sorted(_ranks().items(), key=lambda one: one[1])
    ]
    config = {
        "pattern": r"\p{L}+|\s|.", "num_vocab_tokens": len(vocab), "default_vocab_size": len(vocab) + 20,
        "default_num_special_tokens": 20,
    }
    (folder / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab}))


_bpe = functools.cache(byte_bpe)                 # trained once: none of the cases changes it
_ranks = functools.cache(lambda: ranks_of(_bpe()))
_piece_model = functools.cache(sentencepiece_model)


def _saved(kind: str, folder: Path) -> None:
    _bpe().save(str(folder / "tokenizer.json"))


def encoded(folder: Path) -> list[int]:
    """There and back."""
    ours = tokenizer.load(folder)
    ids = ours.encode("hello wörld 👍  \n 123" + "x" * 40)
    ours.decode(ids)
    return ids


MAIN = "tokenizer.json"


def model(**changes: Any) -> Harm:
    """Keys of "model" in tokenizer.json."""
    return edited(MAIN, lambda values: values["model"].update(changes))


def token(text: str, to: Any) -> Harm:
    """The id of a token."""
    return edited(MAIN, lambda values: values["model"]["vocab"].update({text: to}))


def part(name: str, to: Any) -> Harm:
    return edited(MAIN, lambda values: values.update({name: to}))


def small(file: str, **content: Any) -> Harm:
    """A file beside the tokenizer."""
    return put(f"{file}.json", json.dumps(content))


def added(**token: Any) -> Harm:
    return edited(
        MAIN,
        lambda values: values["added_tokens"].append(
            {
                "id": 450, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True,
            }
            | token
        ),
    )


NAMED = "tokenizer.json: found"
SMALL = ("tokenizer_config", "special_tokens_map", "config", "generation_config")
TOKENIZER_JSON: dict[str, Case] = {
    **{name: (put(MAIN, content), f"tokenizer.json: .*{cause}") for name, (content, cause) in JUNK.items()},
    "absent": (gone(MAIN), "expected one of tokenizer.json"),
    "no model": (part("model", None), NAMED),
    "a model of an unknown kind": (model(type="Sorcery"), NAMED),
    "no vocabulary": (edited(MAIN, lambda values: values["model"].pop("vocab")), NAMED),
    "an empty vocabulary": (model(vocab={}, merges=[]), NAMED),
    "a vocabulary that is a list": (model(vocab=["a", "b"]), NAMED),
    "no merges": (edited(MAIN, lambda values: values["model"].pop("merges")), NAMED),
    "merges that are a number": (model(merges=3), NAMED),
    "merges of tokens that are not there": (model(merges=[["qq", "zz"]]), NAMED),
    "merges of three": (model(merges=[["a", "b", "c"]]), NAMED),
    "an id that is a text": (token("a", "x"), NAMED),
    "an id below 0": (token("a", -1), NAMED),
    "an id of 10¹²": (token("a", 10**12), NAMED),
    "an id of 2³²−1": (token("a", 2**32 - 1), "id 4294967295"),
    "an id of 2²⁴": (token("a", 2**24), "id 16777216"),
    "an added id that is taken, in place of which the library gives another": (added(id=5), None),
    "an added id of 10⁹, likewise": (added(id=10**9), None),
    "an added token without text, which is never found": (added(content=""), None),
    "an unknown pre-tokenizer": (part("pre_tokenizer", {"type": "Sorcery"}), NAMED),
    "a pattern that is none": (
        part("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        NAMED,
    ),
    "a pattern that never ends": (
        part(
            "pre_tokenizer",
            {"type": "Split", "pattern": {"Regex": r"(x+x+)+y"}, "behavior": "Isolated", "invert": False},
        ),
        r"tokenizer.json: found .*expected rules that this text can be cut by .*retry-limit",
    ),
    "no decoder": (part("decoder", None), "decoder step"),
    "an unknown decoder": (
        part("decoder", {"type": "CTC", "pad_token": "x", "word_delimiter_token": "|", "cleanup": True}),
        "decoder step",
    ),
    "a post-processor with an unknown token": (
        part(
            "post_processor",
            {
                "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}], "pair": [],
                "special_tokens": {},
            },
        ),
        NAMED,
    ),
    # beside it
    **{
        f"{file}.json: {name}": (
            put(f"{file}.json", content), f"{file}.json: found .*{cause if cause != 'found' else ''}",
        )
        for file in SMALL
        for name, (content, cause) in JUNK.items()
        if name != "{}"
    },
    **{
        f"{file}.json: {content}": (small(file, **content), f"{file}.json.*found.*expected")
        for file, content in (
            ("tokenizer_config", {"bos_token": 7}), ("tokenizer_config", {"eos_token": {"special": True}}),
            ("tokenizer_config", {"added_tokens_decoder": [1]}),
            ("tokenizer_config", {"added_tokens_decoder": {"-1": {"content": "x"}}}),
            ("tokenizer_config", {"added_tokens_decoder": {"99999999999": {"content": "x"}}}),
            ("tokenizer_config", {"added_tokens_decoder": {"450": "x"}}),
            ("tokenizer_config", {"add_bos_token": "yes"}),
            ("tokenizer_config", {"additional_special_tokens": {"a": 1}}), ("tokenizer_config", {"chat_template": 5}),
            ("tokenizer_config", {"chat_template": ["x"]}), ("tokenizer_config", {"chat_template": [{"name": "a"}]}),
            ("tokenizer_config", {"chat_template": {"a": 1}}),
            ("config", {"eos_token_id": "two"}), ("config", {"eos_token_id": [True]}),
            ("config", {"eos_token_id": [10**12]}), ("generation_config", {"eos_token_id": -1}),
            ("config", {"vocab_size": "big"}), ("config", {"bos_token_id": {}}),
            ("generation_config", {"user_token_id": "195a"}),
        )
    },
    "tokenizer_config.json: a name for no token": (small("tokenizer_config", bos_token=""), None),
    "added_tokens.json, which nobody reads beside it": (put("added_tokens.json", "[]"), None),
    "chat_template.jinja: not UTF-8": (
        put("chat_template.jinja", b"\xff"), "chat_template.jinja: found .*expected UTF-8",
    ),
}
OTHERS: dict[str, tuple[Callable[[Path], Any], str, dict[str, Case]]] = {
    "tokenizer.model of sentencepiece": (
        sentencepiece_folder, "tokenizer.model",
        {
            "cut short": (
                lambda folder: put("tokenizer.model", (folder / "tokenizer.model").read_bytes()[:700])(folder),
                "tokenizer.model: found",
            ),
        },
    ),
    "tokenizer.model of ranks": (
        ranks_folder, "tokenizer.model",
        {
            "no base64": (put("tokenizer.model", b"YQ== 1\n!!! 2\n"), "tokenizer.model: found"),
            "a token given twice": (put("tokenizer.model", b"YQ== 1\nYQ== 2\n"), "line 2.*no line above"),
            "a rank of 4000 digits": (put("tokenizer.model", b"YQ== " + b"1" * 4000 + b"\n"), "tokenizer.model: found"),
            "a byte without a rank": (
                lambda folder: write_ranks(
                    folder / "tokenizer.model", {one: rank for one, rank in _ranks().items() if one != b"\x80"}
                ),
                "no rank for the bytes",
            ),
            "as many ranks as nobody has": (
                lambda folder: write_ranks(folder / "tokenizer.model", _ranks() | {b"a new one": 450}),
                "found 451 ranks",
            ),
            "a rank given twice": (
                lambda folder: write_ranks(folder / "tokenizer.model", _ranks() | {b"the": 5}), "given twice",
            ),
        },
    ),
    "*.tiktoken": (
        tiktoken_folder, "qwen.tiktoken",
        {
            "a line without a rank": (put("qwen.tiktoken", b"YQ==\n"), "line 1"),
            "a rank below 0": (put("qwen.tiktoken", b"YQ== -1\n"), "line 1"),
        },
    ),
    "vocab.json and merges.txt": (
        vocab_folder, "vocab.json",
        {
            "no merges.txt": (gone("merges.txt"), "merges.txt"),
            "merges.txt of another model": (put("merges.txt", "#version: 0.2\nqq zz\n"), "vocab.json: found"),
            "merges.txt in which a line has no pair": (put("merges.txt", "#version: 0.2\nqq\n"), "vocab.json: found"),
            "merges.txt is a git-lfs pointer": (put("merges.txt", POINTER), "vocab.json: found"),
            "the tokenizer of BERT": (small("tokenizer_config", tokenizer_class="BertTokenizer"), "BertTokenizer"),
            "an id that is a float": (put("vocab.json", '{"a": 1.5}'), "vocab.json: found"),
            **{
                f"added_tokens.json: {name}": (put("added_tokens.json", content), f"added_tokens.json: .*{cause}")
                for name, (content, cause) in JUNK.items()
                if name != "{}"
            },
            **{
                f"added_tokens.json: {content}": (
                    small("added_tokens", **content), "added_tokens.json.*found.*expected",
                )
                for content in ({"x": "no"}, {"x": 1.5}, {"x": 10**12})
            },
        },
    ),
    "tekken.json": (
        tekken_folder, "tekken.json",
        {
            "no config": (edited("tekken.json", lambda values: values.pop("config")), "tekken.json: found"),
            "vocab is a text": (edited("tekken.json", lambda values: values.update(vocab="x")), "tekken.json: found"),
            "10¹² special tokens": (
                edited("tekken.json", lambda values: values["config"].update(default_num_special_tokens=10**12)),
                "tekken.json: found",
            ),
            "a token that is no base64": (
                edited("tekken.json", lambda values: values["vocab"][0].update(token_bytes="!")),
                "tekken.json: found",
            ),
            "a pattern that is none": (
                edited("tekken.json", lambda values: values["config"].update(pattern="(")), "tekken.json: found",
            ),
        },
    ),
}

# ---- chat templates

TOO_LONG, TOO_LARGE, TOO_MUCH, EITHER = "time limit", "memory limit", "output limit", "(time|memory) limit"
ATTACKS: dict[str, tuple[str, str]] = {
    "nested ranges": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", TOO_LONG),
    "power": ("{{ 9**(9**9) }}", TOO_LONG),
    "power of powers": (
        "{% set ns = namespace(x=7) %}{% for i in range(40) %}{% set ns.x = ns.x * ns.x %}{% endfor %}", TOO_LONG,
    ),
    "string times number": ("{{ 'a' * 10**10 }}", TOO_LARGE),
    "list times number": ("{{ ([0] * 10**9) | length }}", TOO_LARGE),
    "percent format": ("{{ '%1000000000d' % 1 }}", TOO_LARGE),
    "str.format": ("{{ '{:1000000000}'.format(1) }}", TOO_LARGE),
    "center": ("{{ 'a' | center(10**9) }}", TOO_LARGE),
    "replace": ("{{ ('a' * 10**6) | replace('a', 'b' * 10**6) }}", EITHER),
    "join": ("{{ (['a' * 10**5] * 10**4) | join }}", EITHER),
    "doubling": (
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        EITHER,
    ),
    "indent": ("{{ ('a\n' * 10**6) | indent(10**3) }}", EITHER),
    "lipsum": ("{{ lipsum(n=100000) }}", TOO_LONG),
    "many small pieces": ("{% for i in range(9999) %}{{ 'a' * 1000 }}{% endfor %}", TOO_MUCH),
    "one large piece": ("{{ 'a' * 10**7 }}", TOO_MUCH),
    "recursive macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "two recursive macros": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", TOO_LONG,
    ),
    "range": ("{{ range(10**9) | list }}", "Range too big"),
    "deep parentheses": ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", "RecursionError"),
    "ten million words": ("{{ ('a ' * 10**7).split() | map('upper') | list | length }}", EITHER),
}
ESCAPES = [
    "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages[0].update(a=1) }}", "{% include 'x' %}",
    "{{ cycler.__init__.__globals__ }}", "{{ ().__class__.__base__.__subclasses__() }}", "{% import 'os' as os %}",
    "{{ '{0.__class__.__init__}'.format(messages) }}{{ ''.format.__self__.x }}", "{{ namespace(__html__=1) }}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}", "{{ raise_exception.__globals__.os }}", "{{ undefined_thing() }}",
    "{% for %}", "{{ open('/etc/passwd') }}", "{{ self._TemplateReference__context.environment.x }}",
]


def template_folder(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


def rendered(folder: Path) -> str:
    return render((folder / "chat_template.jinja").read_text(), [{"role": "user", "content": "Hi"}])


TEMPLATES: dict[str, Case] = {
    **{
        name: (put("chat_template.jinja", template), f"chat template .*{cause}")
        for name, (template, cause) in ATTACKS.items()
    },
    **{template: (put("chat_template.jinja", template), "chat template") for template in ESCAPES},
}

GROUPS = {
    "tokenizer.json": Group("tokenizer.json, and the files beside it", json_folder, encoded, TOKENIZER_JSON),
    **{
        kind: Group(
            kind, make, encoded,
            {
                name: (put(file, content), rf"{file}: .*{cause if 'tiktoken' not in file else ''}")
                for name, (content, cause) in JUNK.items()
            }
            | cases,
        )
        for kind, (make, file, cases) in OTHERS.items()
    },
    "templates": Group("chat templates", template_folder, rendered, TEMPLATES, seconds=10.0, process=False),
}
