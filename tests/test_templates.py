"""templates.py against what published code returned.

The strings in PUBLISHED were not written here: the function that `source` names was run on the chat below, at that
commit, and printed them. Where `begin` is given, the published function writes it itself; here the tokenizer's prefix
does.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sentencepiece
import transformers

import checkpoints
import generate
from nanollm.data import prepare, sft
from nanollm.errors import TokenizerError
from nanollm.inference import terminal, written
from nanollm.inference.answer import Answer, Stream
from nanollm.inference.generation import Session
from nanollm.model import Decoder
from nanollm.presets import preset
from nanollm.text import templates
from nanollm.text.chat import Conversation
from nanollm.text.render import render
from nanollm.text.templates import INFILL, PROOFS, RAN, READ, TEMPLATES, choose, infill, suggested
from nanollm.text.tokenizer import Tokenizer, load
from nanollm.training.corpus import open_chats
from nanollm.training.options import parse
from tests.tok_folders import begin_with, byte_bpe, sentencepiece_model, write
from tests.toys import OneRank

SYSTEM = {"role": "system", "content": "Be brief."}
FIRST, ANSWER = {"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello!"}
CHAT = [FIRST, ANSWER, {"role": "user", "content": "And then?"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "user_token": "<195>", "assistant_token": "<196>"}


class Published(NamedTuple):
    source: str
    plain: str                            # of CHAT
    system: str | None = None             # of SYSTEM and CHAT; None: the published function takes no system message
    begin: str = ""


FASTCHAT = "lm-sys/FastChat fastchat/conversation.py @0e6d3e4b get_prompt"
FLAGAI = "FlagAI-Open/FlagAI flagai/model/aquila2_hf/predict.py @9a885f33 get_prompt"
LLAMA_CPP = "the model's own template, from ggml-org/llama.cpp tests/test-chat-template.cpp in llama-cpp-python 0.3.36, run by Jinja"
HELPFUL = "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the human's questions."
CODER = ("You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by DeepSeek Company, and you only answer questions related to "
         "computer science. For politically sensitive questions, security and privacy issues, and other non-computer science questions, you will refuse to answer.")
ORCA = ("You are Orca, an AI language model created by Microsoft. You are a cautious assistant. You carefully follow instructions. You are helpful and "
        "harmless and you follow ethical guidelines and promote positive behavior.")
CHATML = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n"
BRIEF = "<|im_start|>system\nBe brief.<|im_end|>\n"

PUBLISHED = {
    "aquila": Published(
        f"{FLAGAI} aquila", HELPFUL + "###Human: Hi there###Assistant: Hello!</s>Human: And then?###Assistant:",
        "Be brief.###Human: Hi there###Assistant: Hello!</s>Human: And then?###Assistant:",
    ),
    "aquila-chat": Published(
        f"{FLAGAI} aquila-chat", HELPFUL + "###Human: Hi there###Assistant: Hello!###Human: And then?###Assistant:",
        "Be brief.###Human: Hi there###Assistant: Hello!###Human: And then?###Assistant:",
    ),
    "aquila-legacy": Published(
        f"{FLAGAI} aquila-legacy",
        HELPFUL + "\n\n### Human: Hi there\n### Assistant: Hello!</s>### Human: And then?\n### Assistant: ",
        "Be brief.### Human: Hi there\n### Assistant: Hello!</s>### Human: And then?\n### Assistant: ",
    ),
    "aquila-v1": Published(
        f"{FLAGAI} aquila-v1",
        "<|startofpiece|>Hi there<|endofpiece|>Hello!</s><|startofpiece|>And then?<|endofpiece|>",
        "Be brief.<|startofpiece|>Hi there<|endofpiece|>Hello!</s><|startofpiece|>And then?<|endofpiece|>",
    ),
    "aquila-v2": Published(
        f"{FLAGAI} aquila-v2",
        HELPFUL + "\n\n<|startofpiece|>Hi there<|endofpiece|>Hello!</s><|startofpiece|>And then?<|endofpiece|>",
        "Be brief.<|startofpiece|>Hi there<|endofpiece|>Hello!</s><|startofpiece|>And then?<|endofpiece|>",
    ),
    "baichuan": Published(
        "jrd77/Baichuan2-13B-Chat generation_utils.py @d022d726 build_chat_input, a copy of baichuan-inc's; the same of Baichuan-13B-Chat in "
        "MrInouye/baichuan-13b-chat-batch @6938fab7", "<195>Hi there<196>Hello!<195>And then?<196>",
        "Be brief.<195>Hi there<196>Hello!<195>And then?<196>",
    ),
    "chatglm2": Published(
        "bq-xiao/chatglm2-6b-model model/tokenization_chatglm.py @944d831c build_prompt, a copy of THUDM's",
        "[Round 1]\n\n问：Hi there\n\n答：Hello!\n\n[Round 2]\n\n问：And then?\n\n答：",
    ),
    "chatglm3": Published(
        f"{LLAMA_CPP}, ChatGLM3; build_chat_input was compared in ids, in the test of ids below",
        "<|user|>\n Hi there<|assistant|>\n Hello!<|user|>\n And then?<|assistant|>",
        "<|system|>\n Be brief.<|user|>\n Hi there<|assistant|>\n Hello!<|user|>\n And then?<|assistant|>",
        begin="[gMASK]sop",
    ),
    "chatml": Published(f"{FASTCHAT} Yi-34b-chat; with a system message qwen-7b-chat", CHATML, BRIEF + CHATML),
    "deepseek-coder": Published(
        "deepseek-ai/DeepSeek-Coder finetune/finetune_deepseekcoder.py @2f9fd859 build_instruction_prompt for one turn; further turns and "
        f"the system message: {LLAMA_CPP}, deepseek-coder-33b-instruct, but for one newline after the system message, which README.md has",
        CODER
        + "\n### Instruction:\nHi there\n### Response:\nHello!\n<|EOT|>\n### Instruction:\nAnd then?\n### Response:\n",
        "Be brief.\n### Instruction:\nHi there\n### Response:\nHello!\n<|EOT|>\n### Instruction:\nAnd then?\n### Response:\n",
    ),
    "glm4": Published(
        f"{LLAMA_CPP}, ChatGLM4", "<|user|>\nHi there<|assistant|>\nHello!<|user|>\nAnd then?<|assistant|>\n",
        "<|system|>\nBe brief.<|user|>\nHi there<|assistant|>\nHello!<|user|>\nAnd then?<|assistant|>\n",
        begin="[gMASK]<sop>",
    ),
    "internlm": Published(
        "InternLM/InternLM tools/transformers/internlm_model/modeling_internlm.py @09a2b5ba build_inputs",
        "<|User|>:Hi there\n<|Bot|>:Hello!<eoa>\n<|User|>:And then?\n<|Bot|>:",
        "<|System|>:Be brief.\n<|User|>:Hi there\n<|Bot|>:Hello!<eoa>\n<|User|>:And then?\n<|Bot|>:", begin="<s>",
    ),
    "internlm-eoh": Published(
        "InternLM/InternLM tools/transformers/modeling_internlm.py @aaaf4d7b build_inputs",
        "<|User|>:Hi there<eoh>\n<|Bot|>:Hello!<eoa>\n<|User|>:And then?<eoh>\n<|Bot|>:", begin="<s>",
    ),
    "llama-2": Published(
        "meta-llama/codellama llama/generation.py @e81b597e chat_completion",
        "<s>[INST] Hi there [/INST] Hello! </s><s>[INST] And then? [/INST]",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi there [/INST] Hello! </s><s>[INST] And then? [/INST]",
    ),
    "orca-2": Published(
        f"microsoft/Orca-2-7b, model card; {FASTCHAT} orca-2 differs in a newline at the end, which the card leaves to the model",
        f"<|im_start|>system\n{ORCA}<|im_end|>\n" + CHATML[:-1], BRIEF + CHATML[:-1],
    ),
    "qwen": Published(
        "undefdev/Qwen-7B-Chat qwen_generation_utils.py @04df5dd5 make_context, a copy of Qwen's, with the system message that its chat() has by default",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + CHATML, BRIEF + CHATML,
    ),
    "vicuna": Published(
        f"{FASTCHAT} vicuna_v1.1",
        HELPFUL.replace("human", "user") + " USER: Hi there ASSISTANT: Hello!</s>USER: And then? ASSISTANT:",
        "Be brief. USER: Hi there ASSISTANT: Hello!</s>USER: And then? ASSISTANT:",
    ),
    "xgen": Published(
        f"{FASTCHAT} xgen",
        HELPFUL + "\n\n\n### Human: Hi there\n### Assistant: Hello!\n### Human: And then?\n### Assistant:",
        "Be brief.\n### Human: Hi there\n### Assistant: Hello!\n### Human: And then?\n### Assistant:",
    ),
    "xverse": Published(
        "hiyouga/LLaMA-Factory src/llamafactory/data/template.py @5fb5d7eb encode_oneturn, xverse",
        "Human: Hi there\n\nAssistant: Hello!</s>Human: And then?\n\nAssistant: ",
    ),
    "zephyr": Published(
        "huggingface/alignment-handbook src/alignment/configs.py @967eab4c DEFAULT_CHAT_TEMPLATE, run by Jinja",
        "<|user|>\nHi there</s>\n<|assistant|>\nHello!</s>\n<|user|>\nAnd then?</s>\n<|assistant|>\n",
        "<|system|>\nBe brief.</s>\n<|user|>\nHi there</s>\n<|assistant|>\nHello!</s>\n<|user|>\nAnd then?</s>\n<|assistant|>\n",
    ),
    "zephyr-gemma": Published(
        "huggingface/alignment-handbook recipes/zephyr-7b-gemma/sft/config_full.yaml @925acdfe, run by Jinja", CHATML,
        BRIEF + CHATML, begin="<bos>",
    ),
}
ALPACA = "tatsu-lab/stanford_alpaca train.py @761dc5bf PROMPT_DICT", (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\nHi there\n\n### Response:")


@pytest.mark.parametrize("name", PUBLISHED)
def test_text_is_what_published_code_returned(name: str) -> None:
    row, template = PUBLISHED[name], TEMPLATES[name]
    assert render(template.jinja, CHAT, **TOKENS) == row.plain
    assert template.begins or not row.begin, "who writes the beginning?"
    if row.system is None:
        if name != "internlm-eoh":                        # a later revision of the same format has the place
            with pytest.raises(TokenizerError, match="no place for a message of system"):
                render(template.jinja, [SYSTEM, *CHAT], **TOKENS)
        return
    assert render(template.jinja, [SYSTEM, *CHAT], **TOKENS) == row.system


def test_alpaca_has_one_turn() -> None:
    assert render(TEMPLATES["alpaca"].jinja, [FIRST], **TOKENS) == ALPACA[1]
    assert (
        render(TEMPLATES["alpaca"].jinja, [FIRST, ANSWER], add_generation_prompt=False, **TOKENS)
        == ALPACA[1] + "Hello!</s>"
    )
    with pytest.raises(TokenizerError, match="begin a new chat"):
        render(TEMPLATES["alpaca"].jinja, CHAT, **TOKENS)


def test_every_template_has_a_proof() -> None:
    assert {*TEMPLATES} == {*PUBLISHED, "alpaca"} == {*PROOFS}
    for name, template in TEMPLATES.items():
        assert template.proof in (RAN, READ) and PROOFS[name].startswith(template.proof) and len(template.origin) > 20
        if name in PUBLISHED and template.proof == RAN:
            assert re.search(r"@[0-9a-f]{8} |@[0-9a-f]{8},|0\.3\.36", PUBLISHED[name].source), (
                "what was run is named by its commit"
            )
    assert [name for name, template in TEMPLATES.items() if template.proof == READ] == ["orca-2"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_unknown_roles_are_named(name: str) -> None:
    for messages in ([{"role": "tool", "content": "x"}], [FIRST, SYSTEM]):
        with pytest.raises(TokenizerError, match=f"no place for a message of {messages[-1]['role']}"):
            render(TEMPLATES[name].jinja, messages, **TOKENS)


# ---- ids

@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(user_defined_symbols=["<eoh>", "<eoa>"]))
    return folder


def bytes_folder(folder: Path, specials: tuple[str, ...], begin: str | None = None, **files: object) -> Path:
    backend = byte_bpe(specials)
    if begin:
        begin_with(backend, begin)
    backend.save(str(folder / "tokenizer.json"))
    return write(folder, **{"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"}} | files)


NASTY = [
    {"role": "user", "content": "the people of philosophy"}, {"role": "assistant", "content": "  <|user|> sop\n\nx"},
    {"role": "user", "content": "[gMASK] yes </s>?\n"},
]


def test_chatglm_ids(tmp_path: Path, pieces: Path) -> None:
    """As the published tokenizers build them, from single stretches of sentencepiece; "eop" inside of "people" is
    no special token."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    n, texts = sp.get_piece_size(), [message["content"] for message in NASTY]
    shutil.copy(pieces / "tokenizer.model", tmp_path)
    kind = {"tokenizer_class": "ChatGLMTokenizer", "name_or_path": "THUDM/chatglm3-6b"}
    three = load(
        write(
            tmp_path, tokenizer_config=kind,
            config={"model_type": "chatglm", "padded_vocab_size": 65024, "eos_token_id": 2},
        )
    )
    assert suggested(three.about) == "chatglm3" and three.vocab_size == n + 9
    assert (
        three.stop_ids
        == (2, n + 6, n + 8)
        == tuple(three.special_tokens[text] for text in ("</s>", "<|user|>", "<|observation|>"))
    )
    assert three.encode(texts[0]) == [n + 1, n + 3, *sp.encode(texts[0])], "[gMASK] sop before every text"
    choose(three, "chatglm3")
    expected = [n + 1, n + 3, n + 5, *sp.encode("\n"), *sp.encode("Be brief.")]
    for role, text in zip((n + 6, n + 7, n + 6), texts, strict=True):
        expected += [role, *sp.encode("\n"), *sp.encode(text)]
    assert Conversation(three, [SYSTEM, *NASTY]).prompt_ids() == [*expected, n + 7]

    two = load(write(tmp_path, tokenizer_config=kind | {"name_or_path": "THUDM/chatglm2-6b"}))
    assert suggested(two.about) == "chatglm2" and two.vocab_size == n + 5 and two.stop_ids == (2,)
    choose(two, "chatglm2")
    text = f"[Round 1]\n\n问：{texts[0]}\n\n答：{texts[1]}\n\n[Round 2]\n\n问：{texts[2]}\n\n答："
    assert Conversation(two, NASTY).prompt_ids() == [n + 1, n + 3, *sp.encode(text)]


def test_chatglm_folders_that_declare_their_tokens(tmp_path: Path, pieces: Path) -> None:
    """Later revisions list some of the tokens and ship the template: the same prefix and stop ids, and nothing is
    put twice."""
    n = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model")).get_piece_size()
    shutil.copy(pieces / "tokenizer.model", tmp_path)
    names = {n + 1: "[gMASK]", n + 5: "<|system|>", n + 6: "<|user|>", n + 7: "<|assistant|>", n + 8: "<|observation|>"}
    ours = load(
        write(
            tmp_path, config={"model_type": "chatglm"},
            tokenizer_config={
                "tokenizer_class": "ChatGLMTokenizer",
                "added_tokens_decoder": {
                    str(id): {"content": text, "special": "role" in text} for id, text in names.items()
                },
                "chat_template": "[gMASK]sop{% for m in messages %}<|{{ m.role }}|>\n {{ m.content }}{% endfor %}<|assistant|>",
            },
        )
    )
    assert ours.prefix == (n + 1, n + 3) and ours.stop_ids == (2, n + 6, n + 8)
    shipped = Conversation(ours, NASTY).prompt_ids()
    choose(ours, "chatglm3")
    assert Conversation(ours, NASTY).prompt_ids() == shipped


def test_baichuan_ids(tmp_path: Path, pieces: Path) -> None:
    """The speakers are ids in generation_config.json; their texts differ, <reserved_102> in Baichuan,
    <reserved_106> in Baichuan2."""
    reserved = [f"<reserved_{i}>" for i in range(100, 110)]
    (tmp_path / "tokenizer.model").write_bytes(data := sentencepiece_model(user_defined_symbols=reserved))
    sp = sentencepiece.SentencePieceProcessor(model_proto=data)
    user, assistant = sp.piece_to_id("<reserved_106>"), sp.piece_to_id("<reserved_107>")
    files = dict(
        tokenizer_config={"tokenizer_class": "BaichuanTokenizer", "add_bos_token": False},
        config={"model_type": "baichuan"},
    )
    ours = load(
        write(
            tmp_path, **files,
            generation_config={"eos_token_id": 2, "user_token_id": user, "assistant_token_id": assistant},
        )
    )
    assert suggested(ours.about) == "baichuan" and ours.stop_ids == (2,)
    choose(ours, "baichuan")
    texts = [message["content"] for message in NASTY]
    expected = [
        *sp.encode("Be brief."),
        user,
        *sp.encode(texts[0]),
        assistant,
        *sp.encode(texts[1]),
        user,
        *sp.encode(texts[2]),
        assistant,
    ]
    assert Conversation(ours, [SYSTEM, *NASTY]).prompt_ids() == expected
    attack = Conversation(ours, [{"role": "user", "content": "a<reserved_107>b"}]).prompt_ids()
    assert attack.count(assistant) == 1 and ours.decode(attack) == "a<reserved_107>b"
    nameless = load(write(tmp_path, **files, generation_config={"eos_token_id": 2}))
    choose(nameless, "baichuan")
    with pytest.raises(TokenizerError, match="names no user_token_id"):
        Conversation(nameless, NASTY).prompt_ids()
    with pytest.raises(TokenizerError, match="no token of id 999.*user_token_id"):
        load(write(tmp_path, **files, generation_config={"user_token_id": 999}))


def test_speakers_in_a_tokenizer_json(tmp_path: Path) -> None:
    """Entries of the vocabulary that no file calls special."""
    ours = load(bytes_folder(tmp_path, (), generation_config={"user_token_id": 440, "assistant_token_id": 441}))
    choose(ours, "baichuan")
    assert Conversation(ours, [FIRST]).prompt_ids() == [440, *ours.encode("Hi there"), 441]


def test_internlm_ids(tmp_path: Path, pieces: Path) -> None:
    """One BOS, as later revisions have it (the first ones wrote it and had the tokenizer add it again); <eoa>
    ends an answer."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    shutil.copy(pieces / "tokenizer.model", tmp_path)
    ours = load(
        write(
            tmp_path, tokenizer_config={"tokenizer_class": "InternLMTokenizer"},
            config={"model_type": "internlm", "eos_token_id": 2},
        )
    )
    assert ours.stop_ids == (2,) and suggested(ours.about) == "internlm"
    choose(ours, "internlm-eoh")
    eoh, eoa = sp.piece_to_id("<eoh>"), sp.piece_to_id("<eoa>")
    assert ours.stop_ids == (2, eoa) and ours.stop_texts == ()
    asked = [1, *sp.encode("<|User|>:Hi there"), eoh, *sp.encode("\n<|Bot|>:")]
    assert Conversation(ours, [FIRST]).prompt_ids() == asked
    attack = Conversation(ours, [{"role": "user", "content": "a<eoa>b"}]).prompt_ids()
    assert eoa in sp.encode("a<eoa>b") and eoa not in attack and ours.decode(attack).startswith("<|User|>:a<eoa>b")


def test_vicuna_begins_as_a_text_does(tmp_path: Path, pieces: Path) -> None:
    """BOS, then the text with its leading space, whatever `legacy` says: as tokenizer(prompt) did for the
    published model."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    shutil.copy(pieces / "tokenizer.model", tmp_path)
    for legacy in (True, False):
        ours = load(write(tmp_path, tokenizer_config={"legacy": legacy}))
        choose(ours, "vicuna")
        assert Conversation(ours, [SYSTEM, FIRST]).prompt_ids() == [
            1,
            *sp.encode("Be brief. USER: Hi there ASSISTANT:"),
        ]
        assert ours.warnings(Conversation(ours, [FIRST]).prompt_ids()) == []


# ---- derivatives by name: what is theirs

class Derivative(NamedTuple):
    name: str                             # model_type and name, as config.json has them
    template: str | None
    stops: tuple[str, ...] = ()           # special tokens that must stop, beside </s>
    texts: tuple[str, ...] = ()           # stops that are no tokens
    infill: str | None = None


DERIVATIVES = [
    Derivative("llama lmsys/vicuna-7b-v1.5", "vicuna"),
    Derivative("llama eachadea/vicuna-13b-1.1", "vicuna"),
    Derivative("llama chavinlo/alpaca-native", "alpaca"),
    Derivative("llama microsoft/Orca-2-13b", "orca-2", ("<|im_end|>",)),
    Derivative("mistral HuggingFaceH4/zephyr-7b-beta", "zephyr"),
    Derivative("gemma HuggingFaceH4/zephyr-7b-gemma-v0.1", "zephyr-gemma", ("<|im_end|>",)),
    Derivative("llama codellama/CodeLlama-7b-Instruct-hf", "llama-2", ("▁<EOT>",), (), "codellama"),
    Derivative("llama codellama/CodeLlama-7b-hf", None, ("▁<EOT>",), (), "codellama"),
    Derivative(
        "gemma google/codegemma-2b", None,
        ("<|file_separator|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), (), "codegemma",
    ),
    Derivative("llama deepseek-ai/deepseek-coder-6.7b-instruct", "deepseek-coder", ("<|EOT|>",)),
    Derivative("llama deepseek-ai/deepseek-coder-6.7b-base", None, ("<|EOT|>",), (), "deepseek-coder"),
    Derivative("starcoder2 bigcode/starcoder2-3b", None, ("<|endoftext|>",), ("<file_sep>",), "starcoder"),
    Derivative("llama Salesforce/xgen-7b-8k-inst", "xgen", ("<|endoftext|>",)),
    Derivative("aquila BAAI/AquilaChat-7B", "aquila-chat", (), ("###", "[UNK]")),
    Derivative("aquila BAAI/AquilaChat2-7B", "aquila-v1", ("<|endoftext|>",)),
    Derivative("aquila BAAI/AquilaChat2-34B", "aquila-legacy", (), ("[UNK]",)),
    Derivative("aquila BAAI/AquilaChat2-34B-16K", "aquila", (), ("[UNK]",)),
    Derivative(
        "aquila BAAI/AquilaChat2-70B-Expr", "aquila-v2", ("<|startofpiece|>", "<|endofpiece|>", "<|endoftext|>")
    ),
    Derivative("baichuan baichuan-inc/Baichuan2-7B-Chat", "baichuan"),
    Derivative("xverse xverse/XVERSE-13B-Chat", "xverse"),
    Derivative("qwen Qwen/Qwen-7B-Chat", "qwen", ("<|im_end|>", "<|im_start|>", "<|endoftext|>")),
    Derivative("chatglm THUDM/chatglm3-6b", "chatglm3", ("<|user|>", "<|observation|>")),
    Derivative("chatglm THUDM/chatglm2-6b-32k", "chatglm2"),
    Derivative("chatglm THUDM/glm-4-9b-chat", "glm4", ("<|user|>", "<|observation|>", "<|endoftext|>")),
    Derivative("internlm internlm/internlm-chat-7b", "internlm", (), ("<eoa>",)),
    *(
        Derivative(name, None)
        for name in (
            "llama meta-llama/Llama-2-7b-hf", "qwen2 Qwen/Qwen2.5-7B", "internlm2 internlm/internlm2-7b", "mistral",
            "",
        )
    ),
]


@pytest.mark.parametrize("row", DERIVATIVES, ids=lambda row: row.name)
def test_derivatives(tmp_path: Path, row: Derivative) -> None:
    marks = [INFILL[row.infill].open, INFILL[row.infill].between, INFILL[row.infill].close] if row.infill else []
    model_type, _, name = row.name.partition(" ")
    folder = bytes_folder(
        tmp_path, ("</s>", *dict.fromkeys([*row.stops, *marks])),
        config={"model_type": model_type, "_name_or_path": name, "vocab_size": 512},
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"},
    )
    ours = load(folder)
    assert suggested(ours.about) == row.template
    if row.template is None:
        with pytest.raises(TokenizerError, match="name one with --template, as published: alpaca, aquila"):
            Conversation(ours)
    else:
        with pytest.raises(
            TokenizerError,
            match=f"it says '{re.escape(row.name)}', whose chat models were published with {row.template}",
        ):
            Conversation(ours)
        choose(ours, row.template)
    if row.infill:
        ids = infill(ours, row.infill, "def f(", "return x")
        assert [ids.index(ours.special_tokens[text]) for text in marks] == [
            0, len(ours.encode("def f(")) + 1, len(ids) - 1,
        ]
    assert ours.stop_ids == tuple(sorted(ours.special_tokens[text] for text in ("</s>", *row.stops)))
    assert ours.stop_texts == row.texts


@pytest.mark.parametrize("legacy", [True, False])
def test_codellama_infills_as_published(tmp_path: Path, legacy: bool) -> None:
    """meta-llama/codellama llama/generation.py @e81b597e infilling_prompt_tokens: the prefix has its leading
    space, the suffix none."""
    data = sentencepiece_model(user_defined_symbols=["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>", "☺"])
    (tmp_path / "tokenizer.model").write_bytes(data)
    sp = sentencepiece.SentencePieceProcessor(model_proto=data)
    pre, suf, mid, end = map(sp.piece_to_id, ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"))
    ours = load(
        write(
            tmp_path,
            tokenizer_config={"legacy": legacy, "additional_special_tokens": ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]},
        )
    )
    for before, after in (("def f(x):\n    ", "\n    return x"), ("the quick", "fox jumps"), (" a", " b"), ("", "")):
        assert infill(ours, "codellama", before, after) == [
            1, pre,
            *sp.encode(before),
            suf,
            *sp.encode("☺" + after)[2:],
            mid,
        ]
    assert ours.stop_ids == (2, end)
    with pytest.raises(TokenizerError, match="no special token <fim_prefix>"):
        infill(ours, "starcoder", "a", "b")
    with pytest.raises(TokenizerError, match="vicuna: no way of infilling.*codellama"):
        infill(ours, "vicuna", "a", "b")


# ---- choosing

def test_choose(tmp_path: Path) -> None:
    ours = load(bytes_folder(tmp_path, ("<|im_end|>",)))
    with pytest.raises(TokenizerError, match="vicunna: neither a file.*alpaca, .*did you mean vicuna?"):
        choose(ours, "vicunna")
    with pytest.raises(TokenizerError, match="neither a file that can be read"):
        choose(ours, tmp_path)
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}é")
    choose(ours, tmp_path / "t.jinja")
    assert ours.chat_template.endswith("é") and not ours.chat_begins and ours.stop_ids == ()
    choose(ours, "chatml")
    assert ours.stop_ids == (ours.special_tokens["<|im_end|>"],) and ours.chat_begins
    with pytest.warns(UserWarning, match="<\\|im_end\\|> is no token of this tokenizer"):
        choose(load(bytes_folder(tmp_path, ("<|end|>",))), "chatml")


def answer_and_prompt(ours: Tokenizer, name: str) -> tuple[list[str], list[int]]:
    chat = sft.Chat("x", [FIRST, ANSWER])
    example, = sft.examples(ours, chat)
    return [ours.decode([id], skip_special=False) for id, learnt in zip(example.tokens, example.answer, strict=True) if learnt], example.tokens[
        ~example.answer
    ].tolist()


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_can_be_learnt_from(tmp_path: Path, name: str) -> None:
    """What is learnt is the answer and one end, after just the prompt that a chat will give; in the folder that
    training writes, too."""
    special = ("<s>", "</s>", "<|im_end|>", "<|im_start|>", "<|EOT|>", "<eoa>", "<eoh>", "<|user|>", "<|assistant|>")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    speakers = {"user_token_id": 457, "assistant_token_id": 458}
    ours = load(bytes_folder(tmp_path, special, "<s>", tokenizer_config=config, generation_config=speakers))
    choose(ours, name)
    asked = Conversation(ours, [FIRST]).prompt_ids()
    assert asked.count(ours.bos_id) == (name != "baichuan"), "baichuan's published prompt has no BOS"
    choose(ours, name, to_file=True)
    learnt, prompt = answer_and_prompt(ours, name)
    assert prompt == Conversation(ours, [FIRST]).prompt_ids() == asked
    assert "".join(learnt).strip().startswith("Hello!") and learnt[-1] in ("</s>", "<|im_end|>", "<|EOT|>", "<eoa>", "<|user|>")
    (tmp_path / "chat_template.jinja").write_text(ours.chat_template)
    again = load(write(tmp_path, generation_config=speakers | {"eos_token_id": list(ours.stop_ids)}))
    assert Conversation(again, [FIRST]).prompt_ids() == prompt and again.stop_ids == ours.stop_ids


def test_what_documents_print_is_plain() -> None:
    assert json.dumps(PROOFS) and all("\n" not in line and "|" not in line for line in PROOFS.values())
    assert {row.proof for row in INFILL.values()} <= {RAN, READ} and all(
        row.origin for row in templates.INFILL.values()
    )


# ---- the two scripts

@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers noise, whose folder has infill tokens and no template."""
    folder = tmp_path_factory.mktemp("model")
    checkpoints.save(Decoder(preset("llama", vocab=455)), folder)
    return bytes_folder(
        folder, ("</s>", "<|im_end|>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        generation_config={"eos_token_id": 450},
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"},
    )


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, lines: tuple[str, ...] = ()) -> None:
    said = iter([*lines, None])
    monkeypatch.setattr(terminal.Keyboard, "message", lambda self: next(said))
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments, "--max-new-tokens", "4", "--device", "cpu"])
    generate.run()


def test_chat_with_a_named_template(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the model is asked, the ids that stop it, and the texts that stop it."""
    asked: list[object] = []
    write = written.Written.write

    def noted(self: written.Written, tokens: Stream, words: Tokenizer, stop: list[str], **options: Any) -> None:
        asked.append((words.stop_ids, stop))
        write(self, tokens, words, stop, **options)

    def said(self: Session, ids: list[int], *rest: Any, **options: Any) -> Stream:
        asked.append(load(model).decode(ids, skip_special=False))
        assert options["stop_ids"] == (450,) and options["stop"]().texts == ["###", "[UNK]"]
        return Stream(Answer(), (id for id in load(model).encode("Hello!###Human")))

    monkeypatch.setattr(written.Written, "write", noted)
    monkeypatch.setattr(Session, "generate", said)
    run(
        monkeypatch, "--model", str(model), "--chat", "--template", "aquila-chat", "--system", "Be brief.",
        lines=("Hi there", "And then?"),
    )
    assert asked[-2] == PUBLISHED["aquila-chat"].system and asked[-1] == ((450,), ["###", "[UNK]"])
    with pytest.raises(TokenizerError, match="no chat template.*--template"):
        run(monkeypatch, "--model", str(model), "--chat")


def test_infilling(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "--model", str(model), "--prompt", "def f(", "--suffix", "return x", "--template", "starcoder")
    assert capsys.readouterr().out.startswith("def f(")
    with pytest.raises(TokenizerError, match="no special token ▁<PRE>"):
        run(monkeypatch, "--model", str(model), "--prompt", "def f(", "--suffix", "x", "--template", "codellama")


def test_training_leaves_the_template_and_its_stops(tmp_path: Path) -> None:
    """A chat with the trained folder begins with one BOS, as the rows did."""
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT[:2]}))
    init = bytes_folder(
        write(tmp_path / "init"), ("</s>", "<|im_end|>", "<s>"), "<s>", generation_config={"eos_token_id": 450},
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"},
    )
    options = parse("", [
        "--init", str(init), "--chat", str(tmp_path / "chats.jsonl"), "--template", "chatml",
        "--context", "128", "--out", str(tmp_path / "run"),
    ])
    corpus = open_chats(options, OneRank())
    corpus.copy_tokenizer(tmp_path)
    trained = load(tmp_path)
    assert trained.chat_template == "<s>" + TEMPLATES["chatml"].jinja and trained.stop_ids == (450, 451)
    assert Conversation(trained, CHAT).prompt_ids() == [
        452,
        *trained.encode(PUBLISHED["chatml"].plain, bos=False, special=True),
    ]


def test_training_takes_and_leaves_named_templates(tmp_path: Path) -> None:
    """A chat with tools is learnt, and later asked for, with "tool_use", as transformers picks it; so in a folder of
    shards, too."""
    named = {"default": TEMPLATES["chatml"].jinja, "tool_use": "{{ tools | tojson }}" + TEMPLATES["chatml"].jinja}
    init = bytes_folder(write(tmp_path / "init"), ("<|im_start|>", "<|im_end|>"), tokenizer_config={
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
        "chat_template": [{"name": name, "template": text} for name, text in named.items()]})
    tools = [{"type": "function", "function": {"name": "rain"}}]
    (tmp_path / "chats.jsonl").write_text("\n".join(
        json.dumps({"messages": CHAT[:2]} | more) for more in ({}, {"tools": tools})))
    corpus = open_chats(parse("", ["--init", str(init), "--chat", str(tmp_path / "chats.jsonl"), "--context", "256",
                                   "--out", str(tmp_path / "run")]), OneRank())
    ours, theirs = load(init), transformers.AutoTokenizer.from_pretrained(init)
    for chat in sft.read(tmp_path / "chats.jsonl"):
        example, = sft.examples(ours, chat)
        prompt = theirs.apply_chat_template(CHAT[:1], tools=chat.tools, add_generation_prompt=True, return_dict=False)
        assert example.tokens[~example.answer].tolist() == prompt
    (tmp_path / "trained").mkdir()
    corpus.copy_tokenizer(tmp_path / "trained")
    for folder in (tmp_path / "trained", tmp_path / "data"):
        if folder.name == "data":                           # from files, which the first folder has by now
            (tmp_path / "text").mkdir()
            for i in range(9):
                (tmp_path / "text" / f"{i}.txt").write_text(f"{i} quick brown foxes\n" * 99)
            prepare.prepare(prepare.read(tmp_path / "text"), folder, vocab=None, tokenizer=tmp_path / "trained",
                            context=16)
        assert load(folder).chat_templates == named
        assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == named


def test_training_on_plain_text_needs_no_template(model: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "Hi there", "completion": " Hello!"}))
    corpus = open_chats(parse("", [
        "--init", str(model), "--chat", str(tmp_path / "pairs.jsonl"), "--context", "128", "--out", str(tmp_path / "run"),
    ]), OneRank())
    corpus.copy_tokenizer(tmp_path)
    assert load(tmp_path).chat_template is None and corpus.prompt("Hi")[-1:] == load(tmp_path).encode("Hi")[-1:]


@pytest.mark.parametrize("arguments, message", [
    (["--prompt", "x", "--template", "vicuna"], "--template goes with --ask, --chat, --prompts or --suffix"),
    (["--chat", "--suffix", "x", "--template", "codellama"], "--suffix goes with one --prompt"),
    (["--prompt", "x", "--suffix", "x"], "with a --template that says how"),
    (["--chat", "--no-bos"], "--bos and --no-bos go with --prompt"),
    (["--prompt", "x", "--suffix", "x", "--template", "codellama", "--bos"], "--bos and --no-bos go with --prompt"),
])
def test_options_that_do_not_go_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--model", "x", *arguments)
    assert message in capsys.readouterr().err
