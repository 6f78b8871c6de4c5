r"""What the names in tokenizer.ggml.pre stand for: how a byte-level BPE cuts text before it merges.

llama.cpp has them as code, with regexes rewritten for an engine of its own. Here they are steps as a tokenizer.json has
them, those of the published tokenizers, which cut the same:

    Split         by a regex
    ByteLevel     spelled in the byte alphabet (text/tokenizer_files.py); with use_regex cut by GPT-2's pattern first
    Digits        each digit alone, or each run of them

Source: llama.cpp as llama-cpp-python 0.3.36 carries it, src/llama-vocab.cpp; the comments there quote most originals.
Both were compared on 233 texts in many scripts: the same ids for every name, but for five, where these are the
published ones. llama.cpp has no combining marks (\p{M}) for gpt-4o and tekken, keeps runs of digits for deepseek-llm,
takes no wide space for deepseek-coder, and cuts the text of falcon before it is spelled in bytes, not after.
"""

from typing import Any, NamedTuple

from nanollm.text.tokenizer_ranks import GPT2, LLAMA3, O200K, QWEN

Step = dict[str, Any]                            # of a pre-tokenizer, as tokenizer.json has it


class Pre(NamedTuple):
    """What a name in tokenizer.ggml.pre stands for."""
    steps: tuple[Step, ...]                      # how text is cut before merging
    nfc: bool = False                            # text is put into Unicode's NFC first
    whole: bool = False                          # a piece that is a token is taken whole, whatever the merges say
    bos: bool = False                            # what a missing add_bos_token means


def cut(*patterns: str) -> tuple[Step, ...]:
    """Cut by each regex in turn, then spelled in the byte alphabet."""
    splits = [{"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False} for one in patterns]
    return (*splits, spelled(False))


def spelled(by_words: bool) -> Step:
    """The byte alphabet, after a cut by GPT-2's pattern if by_words."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": by_words}


def digits(alone: bool) -> Step:
    return {"type": "Digits", "individual_digits": alone}


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
GPT2_CUT, DIGITS_CUT = (spelled(True),), (digits(True), spelled(True))
NAMED: dict[str, Pre] = {  # names that mean the same stand in one line
    "gpt-2 phi-2 exaone4 gigachat a.x-4.0 mellum modern-bert jais trillion granite-docling": Pre(GPT2_CUT),
    "mpt olmo": Pre(GPT2_CUT, nfc=True),
    "starcoder refact smollm codeshell minerva-7b mellum2": Pre(DIGITS_CUT),
    "command-r exaone": Pre(DIGITS_CUT, nfc=True),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": Pre(cut(LLAMA3), whole=True, bos=True),
    "dbrx smaug-bpe chatglm-bpe": Pre(cut(LLAMA3)),
    "glm4 glm5": Pre(cut(LLAMA3), whole=True),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez": Pre(cut(QWEN), nfc=True),
    "stablelm2 hunyuan solar-open grok-2": Pre(cut(QWEN)),
    "qwen35": Pre(cut(QWEN35), nfc=True),
    "gpt-4o llama4 kanana2 minimax-m2": Pre(cut(O200K), whole=True),
    "tekken": Pre(cut(TEKKEN), whole=True, bos=True),
    "deepseek-llm": Pre((*cut("[\r\n]", rf"\s?{LETTERS_LLM}", rf"\s?{SIGNS_LLM}", r"\s+$", HAN)[:-1],
                         digits(True), spelled(False))),
    "deepseek-coder": Pre((*cut("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN)[:-1], digits(True), spelled(False))),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": Pre(cut(r"\p{N}{1,3}", HAN_V3, WORDS_V3)),
    "falcon": Pre(({"type": "Punctuation", "behavior": "Contiguous"}, spelled(True), digits(False),
                   cut("[0-9][0-9][0-9]")[0])),
    "bloom poro-chat gpt3-finnish": Pre(cut(BLOOM)),
    "viking": Pre((cut(BLOOM)[0], digits(True), spelled(False))),
    "seed-coder": Pre(cut(SEED)),
    "bailingmoe bailingmoe2 llada-moe": Pre(cut(BAILING)),
    "default": Pre((*cut(r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),)),
}
PRE = {name: pre for names, pre in NAMED.items() for name in names.split()}
