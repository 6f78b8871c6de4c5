r"""The published files of base64 ranks: where each cuts a text, and its special tokens, which no such file says.

    ranks      file                      whose                                       special tokens and pattern from
    100 256    cl100k_base.tiktoken      OpenAI                                      tiktoken, openai_public.py
    100 256    arcade100k.tiktoken       StableLM 2                                  tokenization_arcade100k.py
    128 000    tokenizer.model           Llama 3, 3.1, 3.2, 3.3                      llama-models, llama3/tokenizer.py
    151 329    tokenizer.model           GLM-4                                       tokenization_chatglm.py
    151 643    qwen.tiktoken             Qwen-1, and Qwen's own dashscope            tokenization_qwen.py
    163 584    tiktoken.model            Kimi K2, Moonlight                          tokenization_kimi.py
    199 998    o200k_base.tiktoken       OpenAI; gpt-oss, whose names are taken      tiktoken, o200k_harmony
    200 000    tokenizer.model           Llama 4                                     llama-models, llama4/tokenizer.py

A file is known by its number of ranks, and by its name where two have the same. Any other is refused: cut by the wrong
pattern, nearly every text would get ids that look right.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from nanollm.errors import TokenizerError

# Where text is cut before merging; no merge crosses a cut.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")                   # and cl100k's
QWEN = LLAMA3.replace("{1,3}", "")                        # digits one at a time
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_SUFFIX}"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
KIMI = r"[\p{Han}]+|" + (O200K.replace("[\\r\\n/]", "[\\r\\n]")        # Chinese by itself
                         .replace(f"[{_UPPER}]", f"[{_UPPER}&&[^\\p{{Han}}]]")
                         .replace(f"[{_LOWER}]", f"[{_LOWER}&&[^\\p{{Han}}]]"))

# Special tokens that a format keeps in Python code rather than in a file.
_END, _BEGIN_TEXT, _END_TEXT = "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>"
_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
LLAMA3_SPECIALS = (                                       # the names of 3.1 to 3.3, as in their tokenizer.json
    _BEGIN_TEXT, _END_TEXT, "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)))
LLAMA4_SPECIALS = (
    _BEGIN_TEXT, _END_TEXT, *_FIM,
    "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>",
    *(f"<|text_post_train_reserved_special_token_{i}|>" for i in range(6)),
    "<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>",
    *(f"<|text_post_train_reserved_special_token_{i}|>" for i in range(8, 69)),
    "<|image_start|>", "<|image_end|>", "<|vision_reserved_special_token_0|>", "<|vision_reserved_special_token_1|>",
    "<|tile_x_separator|>", "<|tile_y_separator|>", *(f"<|vision_reserved_special_token_{i}|>" for i in range(2, 6)),
    "<|image|>", "<|vision_reserved_special_token_6|>", "<|patch|>",
    *(f"<|vision_reserved_special_token_{i}|>" for i in range(7, 1048)),
    *(f"<|reasoning_reserved_special_token_{i}|>" for i in range(8)),
    "<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(904)))
QWEN_SPECIALS = (_END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
CL100K_SPECIALS = {_END: 100_257, **{text: 100_258 + i for i, text in enumerate(_FIM)}, "<|endofprompt|>": 100_276}
ARCADE_SPECIALS = (
    _END, *_FIM, "<|fim_pad|>", *("<gh_stars> <filename> <issue_start> <issue_comment> <issue_closed> <jupyter_start> "
    "<jupyter_text> <jupyter_code> <jupyter_output> <empty_output> <commit_before> <commit_msg> <commit_after> "
    "<reponame>").split(), "<|endofprompt|>", "<|im_start|>", "<|im_end|>", "<|pause|>",
    *(f"<|reg{i}|>" for i in range(8)), "<|extra0|>")
_HARMONY = {199_998: "<|startoftext|>", 199_999: _END, 200_002: "<|return|>", 200_003: "<|constrain|>",
            200_005: "<|channel|>", 200_006: "<|start|>", 200_007: "<|end|>", 200_008: "<|message|>",
            200_012: "<|call|>", 200_018: "<|endofprompt|>"}
HARMONY_SPECIALS = tuple(_HARMONY.get(id, f"<|reserved_{id}|>") for id in range(199_998, 201_088))
KIMI_SPECIALS = tuple(f"<|reserved_token_{id}|>" for id in range(163_584, 163_840))     # the folder names the others
XGEN_SPECIALS = ("<fim_prefix> <fim_middle> <fim_suffix> <fim_pad> <filename> <gh_stars> <issue_start> "
                 "<issue_comment> <issue_closed> <jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output> "
                 "<empty_output> <commit_before> <commit_msg> <commit_after> <reponame>").split()
TEKKEN_SPECIALS = ("<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] "
                   "[TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] "
                   "[/SYSTEM_PROMPT] [TOOL_CONTENT]").split()


class Ranks(NamedTuple):
    """One row of the table above."""
    name: str
    size: int
    pattern: str                          # QWEN's texts are normalised first, to NFC
    special: dict[str, int]               # those that the code knows; a folder may rename them, or add others
    bos: str | None = None                # what each text begins with, unless add_bos_token says otherwise
    eos: str | None = None
    ends: tuple[str, ...] = ()            # what ends a generation beside eos
    listed: bool = False                  # the folder has to list special tokens: the code takes their names from it
    file: str = ""                        # the file's name, where the number does not tell


def _from(first: int, texts: Iterable[str]) -> dict[str, int]:
    return {text: first + i for i, text in enumerate(texts)}


RANKS = [
    Ranks("cl100k", 100_256, LLAMA3, CL100K_SPECIALS, eos=_END),
    Ranks("StableLM 2", 100_256, QWEN, _from(100_257, ARCADE_SPECIALS), eos=_END, file="arcade100k.tiktoken"),
    Ranks("Llama 3", 128_000, LLAMA3, _from(128_000, LLAMA3_SPECIALS), bos=_BEGIN_TEXT, eos=_END_TEXT,
          ends=("<|eom_id|>", "<|eot_id|>")),
    Ranks("GLM-4", 151_329, LLAMA3, {}, listed=True),
    Ranks("Qwen", 151_643, QWEN, _from(151_643, QWEN_SPECIALS), eos=_END),
    Ranks("Kimi K2", 163_584, KIMI, _from(163_584, KIMI_SPECIALS), listed=True),
    Ranks("gpt-oss", 199_998, O200K, _from(199_998, HARMONY_SPECIALS), eos="<|return|>", ends=(_END, "<|call|>")),
    Ranks("Llama 4", 200_000, O200K, _from(200_000, LLAMA4_SPECIALS), bos=_BEGIN_TEXT, eos=_END_TEXT,
          ends=("<|eom|>", "<|eot|>")),
]


def published(size: int, path: Path) -> Ranks:
    """Whose file of `size` ranks it is. Raises TokenizerError for a number that none of them has."""
    fits = [known for known in RANKS if known.size == size]
    named = [known for known in fits if known.file == path.name] or [known for known in fits if not known.file]
    if named:
        return named[0]
    numbers = ", ".join(f"{known.size} ({known.name})" for known in RANKS)
    raise TokenizerError(f"{path}: found {size} ranks, expected a number that tells whose they are: {numbers}; the "
                         "file says neither where texts are cut nor which tokens are special, so put the model's "
                         "tokenizer.json into the folder")
