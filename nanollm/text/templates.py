"""Chat templates by name, for folders that ship none.

    python generate.py --model FOLDER --chat --template vicuna
    python train.py --init FOLDER --chat FILE --template vicuna

Nothing here is chosen without being asked for: a wrong format costs more than a missing one, and shows less. Where
config.json's model_type or the model's name is that of a published chat model, the error for a missing template says
which name was published with it; a name that is given wins over the folder's own template.

Most formats are four pieces of text in a row, of which `turns` makes Jinja, as text/render.py runs it:

    system     "{{ text }} "                       the first message, if it is one; or what is written by default
    user       "USER: {{ text }} "                 {{ text }} is the message, {{ round }} counts the questions from 1
    assistant  "ASSISTANT: {{ text }}</s>"
    call       "ASSISTANT:"                        asks for an answer: what an answer, too, begins with

    Be brief. USER: Hi ASSISTANT: Hello!</s>USER: And then? ASSISTANT:

`stops` end an answer. Where the tokenizer has such a text as a special token, its id joins the tokenizer's stop ids,
which are already the union of what the tokenizer, config.json and generation_config.json say; else the text itself
stops. Every format was compared with published code that no one here wrote: `proof` says how, tests/test_templates.py
holds what that code returned, and `PROOFS` is what docs/families.md prints.
"""

import difflib
import re
import shlex
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

from nanollm.errors import TokenizerError
from nanollm.text.tokenizer import Tokenizer
from nanollm.text.tokenizer_declared import NAMED_TEMPLATES

RAN, READ = "ran the published function", "read only"


@dataclass(frozen=True)
class Template:
    """One published chat format."""
    jinja: str
    origin: str                           # repository, file, and the format's name there
    proof: str = RAN                      # how the text was compared with the origin's: RAN or READ
    stops: tuple[str, ...] = ()           # texts that end an answer, beside what the files say
    begins: bool = True                   # the tokenizer's prefix (BOS) comes first; False: the template writes it
    known: str = ""                       # a pattern for "model_type name": models that were published with this format


def turns(user: str, assistant: str, call: str, system: str | None = None, default: str | None = None) -> str:
    """The Jinja of four pieces. A system message without `system` is an error, as is any role that the format lacks."""
    begin = ""
    if default is not None:
        begin = f"{{% if messages[0].role != 'system' %}}{{% set text = {default!r} %}}{system}{{% endif %}}"
    first = "" if system is None else f"{{% if m.role == 'system' and loop.first %}}{system}{{% el"
    return (f"{begin}{{% set ns = namespace(round=0) %}}"
            f"{{% for m in messages %}}{{% set text = m.content %}}{first or '{% '}"
            f"if m.role == 'user' %}}{{% set ns.round = ns.round + 1 %}}{{% set round = ns.round %}}{user}"
            f"{{% elif m.role == 'assistant' %}}{assistant}"
            "{% else %}{{ raise_exception('this format has no place for a message of ' ~ m.role ~ ' here') }}"
            "{% endif %}{% endfor %}"
            f"{{% if add_generation_prompt %}}{call}{{% endif %}}")


def _chatml(call: str = "<|im_start|>assistant\n", default: str | None = None) -> str:
    return turns("<|im_start|>user\n{{ text }}<|im_end|>\n", "<|im_start|>assistant\n{{ text }}<|im_end|>\n", call,
                 "<|im_start|>system\n{{ text }}<|im_end|>\n", default)


def _internlm(end_of_question: str) -> str:
    return turns(f"<|User|>:{{{{ text }}}}{end_of_question}\n", "<|Bot|>:{{ text }}<eoa>\n", "<|Bot|>:",
                 "<|System|>:{{ text }}\n")


_HELPFUL = ("A chat between a curious %s and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the %s's questions.")
_HUMAN = _HELPFUL % ("human", "human")
_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_ORCA = ("You are Orca, an AI language model created by Microsoft. You are a cautious assistant. "
         "You carefully follow instructions. You are helpful and harmless and you follow ethical guidelines and "
         "promote positive behavior.")
_DEEPSEEK = ("You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by DeepSeek Company, "
             "and you only answer questions related to computer science. For politically sensitive questions, "
             "security and privacy issues, and other non-computer science questions, you will refuse to answer.")
_ONE_TURN = ("{% if messages | selectattr('role', 'equalto', 'user') | list | length > 1 %}"
             "{{ raise_exception('this format has one question and one answer: begin a new chat') }}{% endif %}")
_SPEAKERS = ("{% if user_token is not defined or assistant_token is not defined %}"
             "{{ raise_exception('generation_config.json names no user_token_id and assistant_token_id') }}{% endif %}")
_LLAMA2 = """\
{% set ns = namespace(system='') %}
{% for m in messages %}
{% if m.role == 'system' and loop.first %}{% set ns.system = '<<SYS>>\\n' ~ m.content ~ '\\n<</SYS>>\\n\\n' %}
{% elif m.role == 'user' %}{{ bos_token ~ '[INST] ' ~ (ns.system ~ m.content) | trim ~ ' [/INST]' }}\
{% set ns.system = '' %}
{% elif m.role == 'assistant' %}{{ ' ' ~ m.content | trim ~ ' ' ~ eos_token }}
{%- else %}{{ raise_exception('this format has no place for a message of ' ~ m.role ~ ' here') }}{% endif %}
{% endfor %}"""
_FASTCHAT = "lm-sys/FastChat, fastchat/conversation.py"
_FLAGAI = "FlagAI-Open/FlagAI, flagai/model/aquila2_hf/predict.py"
_EOS = "{{ eos_token }}"

TEMPLATES = {
    "alpaca": Template(
        _ONE_TURN + turns("### Instruction:\n{{ text }}\n\n", "### Response:{{ text }}" + _EOS, "### Response:",
                          "{{ text }}\n\n", _ALPACA),
        "tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT", known="alpaca"),
    "aquila": Template(                   # AquilaChat2-7B-16K and -34B-16K
        turns("Human: {{ text }}###", "Assistant: {{ text }}</s>", "Assistant:", "{{ text }}###", _HUMAN),
        f"{_FLAGAI}, aquila", stops=("</s>", "[UNK]"), known="aquilachat2-.*16k"),
    "aquila-chat": Template(              # AquilaChat-7B, the first one
        turns("Human: {{ text }}###", "Assistant: {{ text }}###", "Assistant:", "{{ text }}###", _HUMAN),
        f"{_FLAGAI}, aquila-chat", stops=("###", "</s>", "[UNK]"), known="aquilachat-"),
    "aquila-legacy": Template(            # AquilaChat2-34B
        turns("### Human: {{ text }}\n", "### Assistant: {{ text }}</s>", "### Assistant: ", "{{ text }}",
              _HUMAN + "\n\n"),
        f"{_FLAGAI}, aquila-legacy", stops=("</s>", "[UNK]"), known="aquilachat2-34b"),
    "aquila-v1": Template(                # AquilaChat2-7B
        turns("<|startofpiece|>{{ text }}", "<|endofpiece|>{{ text }}</s>", "<|endofpiece|>", "{{ text }}"),
        f"{_FLAGAI}, aquila-v1", stops=("</s>", "<|endoftext|>"), known="aquilachat2-7b"),
    "aquila-v2": Template(                # AquilaChat2-70B-Expr
        turns("<|startofpiece|>{{ text }}", "<|endofpiece|>{{ text }}</s>", "<|endofpiece|>", "{{ text }}",
              _HUMAN + "\n\n"),
        f"{_FLAGAI}, aquila-v2", stops=("</s>", "<|endoftext|>", "<|startofpiece|>", "<|endofpiece|>"),
        known="aquilachat2-70b"),
    "baichuan": Template(                 # and Baichuan2: ids 195, 196 (<reserved_102> or <reserved_106>, and the next)
        _SPEAKERS + turns("{{ user_token }}{{ text }}", "{{ assistant_token }}{{ text }}", "{{ assistant_token }}",
                          "{{ text }}"),
        "baichuan-inc/Baichuan2-13B-Chat, generation_utils.py, build_chat_input", begins=False, known="^baichuan"),
    "chatglm2": Template(
        turns("[Round {{ round }}]\n\n问：{{ text }}\n\n", "答：{{ text }}\n\n", "答："),
        "THUDM/chatglm2-6b, tokenization_chatglm.py, build_prompt", known="chatglm2"),
    "chatglm3": Template(                 # the space is the one that sentencepiece puts before a message
        turns("<|user|>\n {{ text }}", "<|assistant|>\n {{ text }}", "<|assistant|>", "<|system|>\n {{ text }}"),
        "THUDM/chatglm3-6b, tokenization_chatglm.py, build_chat_input", stops=("<|user|>", "<|observation|>"),
        known="chatglm3"),
    "chatml": Template(_chatml(), f"{_FASTCHAT}, Yi-34b-chat", stops=("<|im_end|>",), known="yi-.*chat"),
    "deepseek-coder": Template(
        turns("### Instruction:\n{{ text }}\n", "### Response:\n{{ text }}\n<|EOT|>\n", "### Response:\n",
              "{{ text }}\n", _DEEPSEEK),
        "deepseek-ai/DeepSeek-Coder, finetune/finetune_deepseekcoder.py, build_instruction_prompt; README.md for a "
        "second turn",
        stops=("<|EOT|>",), known="deepseek-coder.*instruct"),
    "glm4": Template(
        turns("<|user|>\n{{ text }}", "<|assistant|>\n{{ text }}", "<|assistant|>\n", "<|system|>\n{{ text }}"),
        "THUDM/glm-4-9b-chat, as in ggml-org/llama.cpp, tests/test-chat-template.cpp, ChatGLM4",
        stops=("<|endoftext|>", "<|user|>", "<|observation|>"), known="glm-4-9b-chat"),
    "internlm": Template(
        _internlm(""), "InternLM/InternLM, tools/transformers/internlm_model/modeling_internlm.py, build_inputs",
        stops=("<eoa>",), known=r"^internlm\b"),
    "internlm-eoh": Template(
        _internlm("<eoh>"), "InternLM/InternLM of 2023, tools/transformers/modeling_internlm.py, build_inputs",
        stops=("<eoa>",)),
    "llama-2": Template(_LLAMA2, "meta-llama/codellama, llama/generation.py, chat_completion", begins=False,
                        known="llama-2-.*chat|codellama-(7|13|34)b-instruct"),
    "orca-2": Template(_chatml("<|im_start|>assistant", _ORCA), "microsoft/Orca-2-7b, model card", READ,
                       stops=("<|im_end|>",), known="orca-2"),
    "qwen": Template(
        _chatml(default="You are a helpful assistant."), "Qwen/Qwen-7B-Chat, qwen_generation_utils.py, make_context",
        stops=("<|im_end|>", "<|im_start|>", "<|endoftext|>"), known=r"^qwen\b"),
    "vicuna": Template(
        turns("USER: {{ text }} ", "ASSISTANT: {{ text }}" + _EOS, "ASSISTANT:", "{{ text }} ",
              _HELPFUL % ("user", "user")),
        f"{_FASTCHAT}, vicuna_v1.1", known="vicuna"),
    "xgen": Template(
        turns("### Human: {{ text }}\n", "### Assistant: {{ text }}\n", "### Assistant:", "{{ text }}\n",
              _HUMAN + "\n\n"),
        f"{_FASTCHAT}, xgen", stops=("<|endoftext|>",), known="xgen.*inst"),
    "xverse": Template(turns("Human: {{ text }}\n\n", "Assistant: {{ text }}" + _EOS, "Assistant: "),
                       "xverse/XVERSE-13B-Chat, as in hiyouga/LLaMA-Factory, src/llamafactory/data/template.py",
                       known="^xverse"),
    "zephyr": Template(
        turns(f"<|user|>\n{{{{ text }}}}{_EOS}\n", f"<|assistant|>\n{{{{ text }}}}{_EOS}\n", "<|assistant|>\n",
              f"<|system|>\n{{{{ text }}}}{_EOS}\n"),
        "huggingface/alignment-handbook, src/alignment/configs.py, DEFAULT_CHAT_TEMPLATE",
        known="zephyr-7b-(alpha|beta)"),
    "zephyr-gemma": Template(
        _chatml(), "huggingface/alignment-handbook, recipes/zephyr-7b-gemma/sft/config_full.yaml, chat_template",
        stops=("<|im_end|>",), known="zephyr-7b-gemma"),
}
PROOFS = {name: f"{template.proof}: {template.origin}" for name, template in TEMPLATES.items()}


@dataclass(frozen=True)
class Infill:
    """Fill in the middle: a code model is asked for it by open, text before, between, text after, close."""
    open: str
    between: str
    close: str
    stops: tuple[str, ...]
    origin: str
    proof: str = READ


INFILL = {
    "codegemma": Infill(
        "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>",
        ("<|file_separator|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
        "google/codegemma-7b, model card"),
    "codellama": Infill(
        "▁<PRE>", "▁<SUF>", "▁<MID>", ("▁<EOT>",),
        "meta-llama/codellama, llama/generation.py, infilling_prompt_tokens", RAN),
    "deepseek-coder": Infill(
        "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", ("<|EOT|>",), "deepseek-ai/DeepSeek-Coder, README.md"),
    "starcoder": Infill(
        "<fim_prefix>", "<fim_suffix>", "<fim_middle>", ("<|endoftext|>", "<file_sep>"),
        "bigcode/starcoder2-3b, model card"),
}


def choose(tokenizer: Tokenizer, choice: str | Path, *, to_file: bool = False) -> None:
    """Give the tokenizer the template `choice`: one of its own that has this name, or a name above, else a file. Raises
    TokenizerError if it is none of these.

    to_file    the template will be written into a folder: then the prefix is a part of its text, as in other folders
    """
    if own := tokenizer.chat_templates.get(str(choice)):
        file = tokenizer.template_files.get(str(choice))
        tokenizer.chat_template = own
        if file:
            tokenizer.template_files = {"default": file}
        return
    if named := TEMPLATES.get(str(choice)):
        texts = {id: text for text, id in tokenizer.special_tokens.items()}
        written = "".join(texts[id] for id in tokenizer.prefix) if to_file and named.begins else ""
        tokenizer.chat_template, tokenizer.chat_begins = written + named.jinja, named.begins and not to_file
        stop_at(tokenizer, named.stops)
        if spelled := [text for text in tokenizer.stop_texts if text.startswith("<")]:
            warnings.warn(f"--template {choice}: {', '.join(spelled)} is no token of this tokenizer: it is spelled out "
                          "in several; in training --add-tokens adds it", stacklevel=2)
        return
    try:
        tokenizer.chat_template, tokenizer.chat_begins = Path(choice).read_text(encoding="utf-8"), False
        tokenizer.template_files = {"default": Path(choice)}
    except (OSError, UnicodeDecodeError) as error:
        known = [*tokenizer.chat_templates, *TEMPLATES]
        near = difflib.get_close_matches(str(choice), known, 1)
        reason = getattr(error, "strerror", None) or error
        raise TokenizerError(f"--template {choice}: neither a file that can be read ({reason}) nor one of "
                             f"{', '.join(known)}" + (f"; did you mean {near[0]}?" if near else "")) from None


def stop_at(tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
    """These texts end an answer, too: as ids, where they are special tokens."""
    ids = {tokenizer.special_tokens[text] for text in stops if text in tokenizer.special_tokens}
    tokenizer.stop_ids = tuple(sorted({*tokenizer.stop_ids, *ids}))
    tokenizer.stop_texts = tuple(text for text in stops if text not in tokenizer.special_tokens)


def suggested(about: str) -> str | None:
    """The name that was published with a model of this model_type and name, if there is one."""
    for name, template in TEMPLATES.items():
        if template.known and re.search(template.known, about.lower()):
            return name
    return None


def no_template(tokenizer: Tokenizer) -> str:
    """What to say where a folder ships no template for a chat."""
    about, name = tokenizer.about, suggested(tokenizer.about)
    hint = f" (it says {about!r}, whose chat models were published with {name})" if name else ""
    lacks = "has no chat template, and chats differ from model to model"
    if others := list(tokenizer.chat_templates):
        options = " or ".join(f"--template {shlex.quote(other)}" for other in others)
        return (f"the model's folder has chat templates named {', '.join(others)}, and none named default for this "
                f"chat: name one with {options}; or one that was published{hint}: {', '.join(TEMPLATES)}; "
                "or give it a file")
    return (f"the model's folder {lacks}: name one with --template, as published{hint}: {', '.join(TEMPLATES)}; "
            "or give it a file")


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """The tokenizer's chat templates as files of `folder`, as transformers writes them, in place of those in it."""
    shutil.rmtree(folder / NAMED_TEMPLATES, ignore_errors=True)
    for name, source in tokenizer.chat_templates.items():
        if name != Path(name).name:                       # it comes from a file that anybody may have written
            raise TokenizerError(f"chat template {name!r}: found a path, expected a name")
        path = folder / "chat_template.jinja" if name == "default" else folder / NAMED_TEMPLATES / f"{name}.jinja"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")


def infill(tokenizer: Tokenizer, name: str, before: str, after: str) -> list[int]:
    """The ids that ask for the text between `before` and `after`; its end joins the stop ids.

    `before` is encoded as a text of its own, with the leading space where the tokenizer puts one; `after` is not.
    Raises TokenizerError if the tokenizer has no tokens for infilling.
    """
    if name not in INFILL:
        raise TokenizerError(f"--template {name}: no way of infilling; expected one of {', '.join(INFILL)}")
    marks, special = INFILL[name], tokenizer.special_tokens
    if lacking := [text for text in (marks.open, marks.between, marks.close) if text not in special]:
        raise TokenizerError(f"--template {name}: the tokenizer has no special token {', '.join(lacking)}, "
                             "so the model was not taught to infill so")
    stop_at(tokenizer, marks.stops)
    return [*tokenizer.prefix, special[marks.open], *tokenizer.encode(before, bos=False), special[marks.between],
            *tokenizer.encode(after, bos=False, continues=True), special[marks.close]]
