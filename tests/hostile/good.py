"""The folders that the battery harms, unharmed: a Llama of six kilobytes, in every layout that is read, with numbers
that need no luck.

Its weights are written down here, not drawn, so that what a changed byte does is the same with every version of torch.
"""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.families import read_config
from checkpoints.source import Source, open_source
from checkpoints.storage import stream
from nanollm.model import Decoder
from tests.meta_folders import COLUMNS, ORIGINAL, neighbours

CONFIG: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=16, hidden_size=8, intermediate_size=12,
    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, rms_norm_eps=1e-5,
    rope_theta=10_000.0, hidden_act="silu", tie_word_embeddings=False, torch_dtype="float32", bos_token_id=1,
    eos_token_id=2,
)
PARAMS: dict[str, Any] = dict(
    dim=8, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=16, multiple_of=4, ffn_dim_multiplier=0.6, norm_eps=1e-5,
    rope_theta=10_000.0,
)
MISTRAL: dict[str, Any] = dict(
    dim=8, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=16, head_dim=4, hidden_dim=12, norm_eps=1e-5,
    rope_theta=10_000.0,
)

Harm = Callable[[Path], Any]                     # done to a good folder
Case = tuple[
    Harm, str | None
]  # and a part of the message that must follow; None: nothing is wrong with it, and it loads


@dataclass(frozen=True)
class Group:
    """Cases that start from one folder and end in one call."""
    title: str
    make: Callable[[Path], Any]                  # writes the good folder
    use: Callable[[Path], Any]                   # what is called; it must succeed on the good folder
    cases: dict[str, Case]
    folder: bool = False                         # a Hugging Face folder: transformers can be asked what it makes of it
    seconds: float = 1.0  # the most that one may take
    process: bool = True  # seconds are of this process; False: of the clock on the wall, as others work too


def tensors() -> dict[str, Tensor]:
    """Every tensor of the model, between −1/2 and 1/2, the gains around 1."""
    wide, narrow, hidden = 8, 4, 12
    shapes = {"model.embed_tokens.weight": (16, wide), "model.norm.weight": (wide,), "lm_head.weight": (16, wide)}
    for i in range(2):
        for name, shape in (
            ("input_layernorm", (wide,)), ("post_attention_layernorm", (wide,)), ("self_attn.q_proj", (wide, wide)),
            ("self_attn.k_proj", (narrow, wide)), ("self_attn.v_proj", (narrow, wide)),
            ("self_attn.o_proj", (wide, wide)), ("mlp.gate_proj", (hidden, wide)), ("mlp.up_proj", (hidden, wide)),
            ("mlp.down_proj", (wide, hidden)),
        ):
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    made = {}
    for place, (name, shape) in enumerate(shapes.items()):
        count = torch.Size(shape).numel()
        values = ((torch.arange(count) * 37 + 11 * place) % 64).float() / 64 - 0.5
        made[name] = (values + (1 if len(shape) == 1 else 0)).view(shape)
    return made


# ---- the layouts

def hugging_face(folder: Path) -> None:
    write_json(folder / "config.json", CONFIG)
    save_file(tensors(), folder / "model.safetensors", {"format": "pt"})


def sharded(folder: Path) -> None:
    """Two shards and their index; and a file outside, which is none of this model's business."""
    write_json(folder / "config.json", CONFIG)
    names = [*tensors()]
    shards = {"model-1.safetensors": names[:10], "model-2.safetensors": names[10:]}
    for file, some in shards.items():
        save_file({name: tensors()[name] for name in some}, folder / file, {"format": "pt"})
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {}, "weight_map": {name: file for file, some in shards.items() for name in some}},
    )
    save_file(tensors(), folder.parent / "outside.safetensors", {"format": "pt"})


def pickled(folder: Path) -> None:
    write_json(folder / "config.json", CONFIG)
    torch.save(tensors(), folder / "pytorch_model.bin")


def own(folder: Path) -> None:
    """Our names, as checkpoints/families/nanollm.py has them."""
    config = read_config(CONFIG)[1]
    write_json(folder / "config.json", {"model_type": "nanollm", "decoder": config.to_dict()})
    save_file(
        {name: parameter.data for name, parameter in Decoder(config).named_parameters()},
        folder / "model.safetensors", {"format": "pt"},
    )


def original() -> dict[str, Tensor]:
    """The same model under Meta's names."""
    found = {}
    for name, tensor in tensors().items():
        parts = name.split(".")
        if name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
            new = {"model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.norm": "norm"}[
                name.removesuffix(".weight")
            ]
        elif "layernorm" in name:
            new = f"layers.{parts[2]}.{'attention_norm' if parts[3] == 'input_layernorm' else 'ffn_norm'}"
        else:
            new = f"layers.{parts[2]}.{'attention' if parts[3] == 'self_attn' else 'feed_forward'}.{ORIGINAL[parts[4]]}"
        heads = {"wq": 2, "wk": 1}.get(new.split(".")[-1])
        found[f"{new}.weight"] = neighbours(tensor, heads) if heads else tensor
    return found


def meta(folder: Path) -> None:
    """Two ranks."""
    write_json(folder / "params.json", PARAMS)
    for rank in range(2):
        own = {
            name: tensor
            if tensor.ndim == 1
            else tensor.chunk(2, 1 if name.split(".")[-2] in (*COLUMNS, "tok_embeddings") else 0)[rank].clone()
            for name, tensor in original().items()
        }
        torch.save(own, folder / f"consolidated.{rank:02d}.pth")


def mistral(folder: Path) -> None:
    write_json(folder / "params.json", MISTRAL)
    save_file(original(), folder / "consolidated.safetensors")


# ---- what is called

def read_whole(folder: Path, allow_pickle: bool = True) -> Source:
    """As convert.py reads a folder: understood, planned, and then every value."""
    source = open_source(folder, allow_pickle=allow_pickle)
    parameters = {name: torch.empty(parameter.shape) for name, parameter in source.parameters().items()}
    for step in source.steps:
        stream.load_step(step, source.stored, parameters)
    return source


# ---- how harm is done

def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def put(name: str, content: bytes | str) -> Harm:
    """A file with this content, in place of what is there."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def gone(*names: str) -> Harm:
    return lambda folder: [(folder / name).unlink() for name in names]


def edited(name: str, change: Callable[[dict[str, Any]], Any]) -> Harm:
    """A JSON file after `change`, in place."""
    def harm(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        write_json(folder / name, values)
    return harm


def keys(file: str = "config.json", **changes: Any) -> Harm:
    """Keys of a JSON file with other values; ... takes one away."""
    def change(values: dict[str, Any]) -> None:
        for key, value in changes.items():
            values.pop(key, None) if value is ... else values.update({key: value})
    return edited(file, change)


def weights(change: Callable[[dict[str, Tensor]], Any], file: str = "model.safetensors") -> Harm:
    """The tensors of a safetensors file after `change`, in place."""
    def harm(folder: Path) -> None:
        found = load_file(folder / file)
        change(found)
        save_file(found, folder / file, {"format": "pt"})
    return harm


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of this header and data, whatever they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: Any, end: Any, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


def taken_apart(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]
