r"""What the names in tokenizer.ggml.pre stand for: how a byte-level BPE splits text before it merges.

llama.cpp has them as code, with regexes rewritten for an engine of its own. Here they are the steps of a pre-tokenizer
as tokenizer.json writes them, taken from the published tokenizers:

    Split         by a regex
    ByteLevel     into the byte alphabet (text/tokenizer_files.py); with use_regex after a split by GPT-2's pattern
    Digits        each digit alone, or each run of them

Source: llama.cpp as llama-cpp-python 0.3.36 carries it, src/llama-vocab.cpp; the comments there quote most originals.
tests/test_published.py compares these steps with llama.cpp's on 233 texts in many scripts. The ids are the same but for
five kinds, for which these are the published steps: llama.cpp has no combining marks (\p{M}) for gpt-4o and tekken,
keeps runs of digits for deepseek-llm, takes no wide space for deepseek-coder, and splits the text of falcon before the
byte alphabet, not after.
"""

from typing import Any, NamedTuple

from nanollm.text.tokenizer_ranks import GPT2, LLAMA3, O200K, QWEN

Step = dict[str, Any]                            # of a pre-tokenizer, as tokenizer.json has it


class Pre(NamedTuple):
    """What a name in tokenizer.ggml.pre stands for."""
    steps: tuple[Step, ...]                      # how text is split before merging
    nfc: bool = False                            # text is put into Unicode's NFC first
    ignore_merges: bool = False                  # a piece that is a token is taken whole, whatever the merges say
    bos: bool = False                            # what a missing add_bos_token means


def splits(*patterns: str) -> tuple[Step, ...]:
    """A split by each regex in turn. What matches is a piece of its own, and so is what lies between."""
    return tuple({"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False}
                 for one in patterns)


def byte_level(use_regex: bool = False) -> Step:
    """The byte alphabet; with use_regex after a split by GPT-2's pattern."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def digits(individual: bool) -> Step:
    """Each digit alone, or each run of them."""
    return {"type": "Digits", "individual_digits": individual}


TEKKEN = O200K.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", "")
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SEED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}" "\r\n" r"]+|\s*[" "\r\n"
    r"]+|\s+(?!\S)|\s+"
)
BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
HAN_V3 = "[一-龥぀-ゟ゠-ヿ]+"
WORDS_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HAN, BLOOM = "[一-龥ࠀ-一가-퟿]+", r" ?[^(\s|[.,!?…。，、।۔،])]+"
LETTERS_LLM = (                                  # of DeepSeek-LLM: letters that have two cases
    "[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-"
    "\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ"
    "-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
SIGNS_LLM = "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"      # punctuation, ASCII and full width
BYTES, GPT2_BYTES = (byte_level(),), (byte_level(use_regex=True),)
NAMED: dict[str, Pre] = {  # names that mean the same stand in one line
    "gpt-2 phi-2 exaone4 gigachat a.x-4.0 mellum modern-bert jais trillion granite-docling": Pre(GPT2_BYTES),
    "mpt olmo": Pre(GPT2_BYTES, nfc=True),
    "starcoder refact smollm codeshell minerva-7b mellum2": Pre((digits(True), *GPT2_BYTES)),
    "command-r exaone": Pre((digits(True), *GPT2_BYTES), nfc=True),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2":
        Pre(splits(LLAMA3) + BYTES, ignore_merges=True, bos=True),
    "dbrx smaug-bpe chatglm-bpe": Pre(splits(LLAMA3) + BYTES),
    "glm4 glm5": Pre(splits(LLAMA3) + BYTES, ignore_merges=True),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez": Pre(splits(QWEN) + BYTES, nfc=True),
    "stablelm2 hunyuan solar-open grok-2": Pre(splits(QWEN) + BYTES),
    "qwen35": Pre(splits(QWEN35) + BYTES, nfc=True),
    "gpt-4o llama4 kanana2 minimax-m2": Pre(splits(O200K) + BYTES, ignore_merges=True),
    "tekken": Pre(splits(TEKKEN) + BYTES, ignore_merges=True, bos=True),
    "deepseek-llm": Pre((*splits("[\r\n]", rf"\s?{LETTERS_LLM}", rf"\s?{SIGNS_LLM}", r"\s+$", HAN), digits(True),
                         *BYTES)),
    "deepseek-coder": Pre((*splits("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN), digits(True), *BYTES)),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": Pre(splits(r"\p{N}{1,3}", HAN_V3, WORDS_V3) + BYTES),
    "falcon": Pre(({"type": "Punctuation", "behavior": "Contiguous"}, *GPT2_BYTES, digits(False),
                   *splits("[0-9][0-9][0-9]"))),
    "bloom poro-chat gpt3-finnish": Pre(splits(BLOOM) + BYTES),
    "viking": Pre((*splits(BLOOM), digits(True), *BYTES)),
    "seed-coder": Pre(splits(SEED) + BYTES),
    "bailingmoe bailingmoe2 llada-moe": Pre(splits(BAILING) + BYTES),
    "default": Pre(splits(r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]") + BYTES),
}
PRE = {name: pre for names, pre in NAMED.items() for name in names.split()}
