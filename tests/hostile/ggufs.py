"""GGUF files that lie about their keys, types, parts and tokenizers, or are damaged. tests/test_gguf.py has more of
the container, byte by byte."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

import checkpoints
from tests.hostile import good
from tests.hostile.files import POINTER, mutated
from tests.hostile.good import Case, Group, Harm, put

FILE = "model.gguf"
LLAMA = {
    "general.architecture": "llama", "general.type": "model", "llama.block_count": 2, "llama.context_length": 64,
    "llama.embedding_length": 8, "llama.feed_forward_length": 12, "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 1e4,
    "llama.rope.dimension_count": 4, "llama.vocab_size": 16,
}
TOKENS = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*"abcdefghijkl", "ab", "<s>", "</s>", "[PAD15]"],
    "tokenizer.ggml.token_type": [1] * 13 + [3, 3, 5], "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 13, "tokenizer.ggml.eos_token_id": 14, "tokenizer.chat_template": "{{ messages }}",
}
PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tensors() -> dict[str, np.ndarray]:
    """Those of the good model, by the names of a GGUF. No row is put into another order: nothing is compared here."""
    made = {}
    for name, tensor in good.tensors().items():
        module = name.removesuffix(".weight")
        if module.startswith("model.layers."):
            _, _, layer, part = module.split(".", 3)
            module = f"blk.{layer}.{PARTS[part]}"
        made[f"{OUTSIDE.get(module, module)}.weight"] = tensor.numpy()
    return made


def write(path: Path, keys: dict[str, Any], stored: dict[str, np.ndarray], **writer: Any) -> None:
    w = gguf.GGUFWriter(path, keys.get("general.architecture", "llama"), **writer)
    if "general.architecture" not in keys:
        del w.kv_data[0]["general.architecture"]
    for key, value in keys.items():
        if key != "general.architecture":
            add = {bool: w.add_bool, int: w.add_uint32, float: w.add_float32, str: w.add_string, list: w.add_array}
            add[type(value)](key, value)
    for name, values in stored.items():
        w.add_tensor(name, values)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def whole(folder: Path) -> None:
    write(folder / FILE, LLAMA | TOKENS, tensors())


def split(folder: Path) -> None:
    write(folder / FILE, LLAMA | TOKENS, tensors(), split_max_tensors=8)


def changed(keys: dict[str, Any] | None = None, without: tuple[str, ...] = (), **stored: np.ndarray | None) -> Harm:
    """The file with other keys, or without some; and with other tensors: None takes one away."""
    def harm(folder: Path) -> None:
        new = {key: value for key, value in (LLAMA | TOKENS | (keys or {})).items() if key not in without}
        held = tensors() | {name.replace("_dot_", "."): value for name, value in stored.items()}
        write(folder / FILE, new, {name: value for name, value in held.items() if value is not None})
    return harm


def bytes_changed(change: Any) -> Harm:
    def harm(folder: Path) -> None:
        (folder / FILE).write_bytes(change((folder / FILE).read_bytes()))
    return harm


def part(number: int, change: Any) -> Harm:
    """What is done to one part of a model that has several."""
    def harm(folder: Path) -> None:
        change(sorted(folder.glob("*.gguf"))[number])
    return harm


def key(name: str, value: Any) -> Harm:
    return changed({name: value})


def overwritten_by_the_next(path: Path) -> None:
    path.write_bytes(sorted(path.parent.glob("*.gguf"))[2].read_bytes())


T = "tokenizer.ggml."
CASES: dict[str, Case] = {
    "as it is": (lambda folder: None, None),
    "empty": (put(FILE, ""), "model.gguf: empty; download it again"),
    "a git-lfs pointer": (put(FILE, POINTER), "not GGUF, but a git-lfs pointer"),
    "cut in the header": (bytes_changed(lambda data: data[:200]), "truncated in the header"),
    "cut in the data": (bytes_changed(lambda data: data[:-64]), "truncated: .* ends at byte"),
    "a version of the future": (bytes_changed(lambda data: data[:4] + b"\x04" + data[5:]), "version 4; expected 2"),
    "no architecture": (changed(without=("general.architecture",)), "general.architecture is None; supported are"),
    "another architecture": (key("general.architecture", "clip"), "general.architecture is 'clip'; supported are"),
    "an adapter": (key("general.type", "adapter"), "general.type is 'adapter'; expected a model"),
    "no layers": (key("llama.block_count", 0), "llama.block_count is 0; expected a whole number"),
    "a billion layers": (key("llama.block_count", 10**9), "llama.block_count is 1000000000; expected a whole number"),
    "a layer more": (key("llama.block_count", 3), r"(?s)missing.*blk\.2"),
    "a width that does not divide": (key("llama.attention.head_count", 3), "head_count is 3; expected a divisor"),
    "a huge width": (key("llama.embedding_length", 2**31 - 8), "dimension_count is 4; expected 1073741820"),
    "ε is NaN": (key("llama.attention.layer_norm_rms_epsilon", float("nan")), "epsilon is nan; expected a finite"),
    "a text for a number": (key("llama.context_length", "long"), "context_length is 'long'; expected a whole number"),
    "an unknown key": (key("llama.new_thing", 0.5), r"llama\.new_thing = 0\.5"),
    "experts without their number": (key("llama.expert_count", 4), "expert_used_count is missing"),
    "experts that are not there": (
        changed({"llama.expert_count": 4, "llama.expert_used_count": 2}), r"(?s)missing.*ffn_gate_inp"),
    "another vocabulary": (key("llama.vocab_size", 17), "vocab_size is 17; expected 16"),
    "no embedding": (changed(token_embd_dot_weight=None), "no tensor token_embd.weight"),
    "a matrix of integers": (changed(output_dot_weight=np.zeros((16, 8), np.int8)), "output.weight is I8, which the"),
    "a NaN": (changed(output_dot_weight=np.full((16, 8), np.nan, np.float32)), "output.weight holds a NaN"),
    "one file of several": (key("split.count", 3), "one of 3 files of a model; expected a name such as"),
    # the tokenizer inside
    "a tokenizer of another kind": (key(f"{T}model", "bert"), "model is 'bert'; expected gpt2 or llama"),
    "an unknown pre-tokenizer": (key(f"{T}pre", "mine"), "pre is 'mine'; known are gpt-2"),
    "no merges": (changed(without=(f"{T}merges",)), "merges has None; expected a list"),
    "a merge of what is no token": (key(f"{T}merges", ["a b", "x y"]), "merges has 'x y', of which a part or"),
    "a merge that is no pair": (key(f"{T}merges", ["ab"]), "merges has 'ab'; expected two tokens"),
    "too few types": (key(f"{T}token_type", [1]), "token_type has 1 entries; expected 16, one a token"),
    "types that are texts": (key(f"{T}token_type", ["one"] * 16), "token_type has 'one'; expected a list of int"),
    "a token twice": (key(f"{T}tokens", ["a"] * 16), "tokens has 'a' twice; expected each text once"),
    "tokens that are a number": (key(f"{T}tokens", 16), "tokens has 16; expected a list"),
    "a template that is broken": (key("tokenizer.chat_template", "{% for %}"), None),       # said when it is used
    "no scores": (key(f"{T}model", "llama"), "scores has None; expected a list"),
    "BOS beyond the vocabulary": (key(f"{T}bos_token_id", 99), None),
    "no tokenizer": (key(f"{T}model", "no_vocab"), "found no tokenizer, expected one of tokenizer.json"),
}
SPLIT: dict[str, Case] = {
    "all parts": (lambda folder: None, None),
    "a part is missing": (part(1, Path.unlink), "one of 3 files of a model; beside it there is no .*-00002-of-00003"),
    "the first part is missing": (part(0, Path.unlink), "beside it there is no .*-00001-of-00003"),
    "a part in place of another": (part(1, overwritten_by_the_next), "split.no is 2; expected 1"),
    "a part that is empty": (part(2, lambda path: path.write_bytes(b"")), "-00003-of-00003.gguf: empty"),
    "a part that is cut": (part(2, lambda path: path.write_bytes(path.read_bytes()[:-64])), "truncated"),
    "another model beside": (lambda folder: whole(folder), "2 GGUF models; give one of them"),
}


def read(folder: Path) -> Any:
    """The model and its tokenizer."""
    return checkpoints.load(folder), checkpoints.tokenizer(folder)


def mutations(root: Path, count: int) -> Iterator[tuple[str, Path]]:
    """A folder at a time, each with another damaged copy of the file."""
    folder = root / "model"
    folder.mkdir()
    whole(folder)
    content = (folder / FILE).read_bytes()
    for seed in range(count):
        (folder / FILE).write_bytes(mutated(seed, content))
        yield f"seed {seed}", folder


GROUPS = {
    "gguf": Group("GGUF files, and the tokenizer inside", whole, read, CASES),
    "gguf parts": Group("parts of a GGUF", split, read, SPLIT),
}
