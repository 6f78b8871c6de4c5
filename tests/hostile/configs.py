"""config.json and params.json that are none, that lie about sizes, or hold what no model could mean; and every key of
every lineage with values that it cannot have."""

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import checkpoints
from checkpoints import source
from checkpoints.families import read_config
from checkpoints.layouts import original
from checkpoints.names import reader, table
from checkpoints.storage import files
from tests.fixtures import FIXTURES
from tests.hostile import good
from tests.hostile.files import POINTER
from tests.hostile.good import Case, Group, edited, gone, keys, put
from tests.hostile.lineages import LINEAGES
from tests.oracles import write

CONFIG, PARAMS = "config.json", "params.json"
ENDS: dict[str, tuple[bytes | str, str]] = {       # of any JSON file
    "empty": (b"", "not JSON"),
    "cut short": (b"{", "not JSON"),
    "a list": (b"[]", "a JSON object expected, found list"),
    "a number": (b"7", "a JSON object expected, found int"),
    "null": (b"null", "a JSON object expected, found NoneType"),
    "a key given twice": (b'{"a": 1, "a": 2}', "'a' appears twice"),
    "deeply nested": (b'{"a":' * 100_000, "nested too deeply"),
    "a deep list": (b"[" * 100_000, "nested too deeply"),
    "a number of 10000 digits": (b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not JSON"),
    "ten megabytes": (b" " * 10_000_001, "too large"),
    "web page": ("<!doctype html>", "a web page"),
    "git-lfs pointer": (POINTER, "git-lfs pointer"),
    "zip": (b"PK\x03\x04", "zip archive"),
}
DEEPEST = 900                                    # what Python's parser takes on top of a test's own calls


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


def dangling(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to("nothing")


SHAPE, RANGE, TOO_MANY = "of another shape", "from 1 to", "nothing here knows what these mean"
CONFIGS: dict[str, Case] = {
    "absent": (gone(CONFIG), "config.json: no such file"),
    "a link to nothing": (dangling, "config.json: a link to nothing, where there is nothing"),
    **{name: (put(CONFIG, text), f"config.json: .*{cause}") for name, (text, cause) in ENDS.items()},
    "{}": (put(CONFIG, "{}"), "model_type is None; .* lists the"),
    # which model
    "unknown model_type": (keys(model_type="gpt5"), "model_type is 'gpt5'; near it are gpt"),
    "model_type is a list": (keys(model_type=["llama"]), "model_type is"),
    "model_type of a megabyte": (keys(model_type="x" * 1_000_000), "model_type is"),
    "model_type is deep": (keys(model_type=nested(DEEPEST)), "model_type is"),
    "model_type is a path": (keys(model_type="../../x"), "model_type is '../../x'"),
    "another family": (keys(model_type="mamba"), TOO_MANY),
    "code of its own, and a class that is not known": (
        keys(model_type="mine", auto_map={"AutoModel": "modeling.Mine"}), "model_type is 'mine'",
    ),
    # layers
    "a layer more": (keys(num_hidden_layers=3), "9 missing"),
    "a layer fewer": (keys(num_hidden_layers=1), "9 unexpected"),
    "no layers": (keys(num_hidden_layers=0), f"num_hidden_layers is 0; .*{RANGE}"),
    "−1 layers": (keys(num_hidden_layers=-1), f"num_hidden_layers is -1; .*{RANGE}"),
    "1e9 layers": (keys(num_hidden_layers=10**9), "num_hidden_layers is 1000000000; .*from 1 to 21"),
    "1e9 layers as a float": (keys(num_hidden_layers=1e9), RANGE),
    "NaN layers": (keys(num_hidden_layers=math.nan), "num_hidden_layers is nan"),
    "layers are a text": (keys(num_hidden_layers="2"), "num_hidden_layers is '2'"),
    "layers are true": (keys(num_hidden_layers=True), "num_hidden_layers is True"),
    "layers are missing": (keys(num_hidden_layers=...), "num_hidden_layers is missing"),
    # sizes
    "a vocabulary of 1e12": (keys(vocab_size=10**12), f"vocab_size is 1000000000000; .*{RANGE}"),
    "a vocabulary of 2³¹": (keys(vocab_size=2**31), SHAPE),
    "a vocabulary one larger": (keys(vocab_size=17), SHAPE),
    "a vocabulary that is null": (keys(vocab_size=None), "vocab_size is None"),
    "a width of −1": (keys(hidden_size=-1), RANGE),
    "a width of 1.5": (keys(hidden_size=1.5), RANGE),
    "a width of 2⁴⁰": (keys(hidden_size=2**40), RANGE),
    "a width of 10⁴⁰⁰": (keys(hidden_size=10**400), RANGE),
    "a width beyond any memory": (keys(hidden_size=2**31 - 64, vocab_size=2**31), "a tensor beyond any memory"),
    "an infinite width": (keys(hidden_size=math.inf), "hidden_size is inf"),
    "a width that is an object": (keys(hidden_size={"a": 1}), "hidden_size is"),
    "a width that is deep": (keys(hidden_size=nested(DEEPEST)), "hidden_size is"),
    "a width that is a list of 10⁶": (keys(hidden_size=[0] * 1_000_000), "hidden_size is"),
    "no heads": (keys(num_attention_heads=0), RANGE),
    "heads that do not divide": (keys(num_attention_heads=3), "num_attention_heads is 3; expected a divisor"),
    "key/value heads that do not divide": (keys(num_attention_heads=4, num_key_value_heads=3), "kv_heads = 3"),
    "key/value heads of 1e9": (keys(num_key_value_heads=10**9), "kv_heads = 1000000000"),
    "an odd head": (keys(head_dim=3), "rope"),
    "a feed-forward of 1e12": (keys(intermediate_size=10**12), RANGE),
    "a feed-forward of 1e9": (keys(intermediate_size=10**9), SHAPE),
    "a context of 0": (keys(max_position_embeddings=0), RANGE),
    # numbers and words
    "ε is NaN": (keys(rms_norm_eps=math.nan), "rms_norm_eps is nan"),
    "ε is 0": (keys(rms_norm_eps=0), "rms_norm_eps is 0"),
    "ε is negative": (keys(rms_norm_eps=-1e-6), "rms_norm_eps is -1e-06"),
    "ε is a text": (keys(rms_norm_eps="1e-6"), "rms_norm_eps is '1e-6'"),
    "ε is 10⁴⁰⁰": (keys(rms_norm_eps=10**400), "rms_norm_eps is 1"),
    "RoPE of base NaN": (keys(rope_theta=math.nan), "rope_theta is nan"),
    "RoPE of base 0": (keys(rope_theta=0), "rope_theta is 0"),
    "RoPE of infinite base": (keys(rope_theta=math.inf), "rope_theta is inf"),
    "RoPE of an unknown kind": (keys(rope_scaling={"type": "axial", "factor": 2.0}), "rope_type is 'axial'"),
    "RoPE of a kind that is deep": (keys(rope_scaling={"type": nested(DEEPEST - 50)}), "rope_type is"),
    "RoPE stretched by NaN": (keys(rope_scaling={"type": "linear", "factor": math.nan}), "rope_scaling.factor is nan"),
    "RoPE stretched by −1": (keys(rope_scaling={"type": "linear", "factor": -1.0}), "rope_scaling.factor is -1.0"),
    "RoPE stretched by a list of 10⁵": (
        keys(rope_scaling={"type": "longrope", "short_factor": [1.0] * 100_000, "long_factor": [1.0] * 100_000}),
        "LongRope lists of 2",
    ),
    "rope_scaling is a list": (keys(rope_scaling=[1, 2]), "rope_scaling is .* expected an object"),
    "unknown activation": (keys(hidden_act="sigmoid"), "hidden_act is 'sigmoid'"),
    "a bias that is 1": (keys(attention_bias=1), "attention_bias is 1; expected true or false"),
    "biases that are not there": (keys(attention_bias=True), "8 missing"),
    "tied is a text": (keys(tie_word_embeddings="false"), "tie_word_embeddings is 'false'"),
    "an unknown key": (keys(clip_qkv=8.0), r"clip_qkv = 8.0.*--ignore clip_qkv"),
    "a thousand unknown keys": (keys(**{f"key_{n}": n for n in range(1000)}), TOO_MANY),
    "an unknown key of a megabyte": (keys(**{"x" * 1_000_000: 1}), TOO_MANY),
    "an unknown key that is half a character": (keys(**{"\ud800": 1}), r"\\ud800 = 1"),
    "an unknown key that is deep": (keys(mystery=nested(DEEPEST)), "mystery = "),
    # quantised
    "AWQ of 3 bits": (
        keys(quantization_config={"quant_method": "awq", "bits": 3}), "bits is 3; .*Read of awq are: .*unquantised up",
    ),
    "GPTQ without bits": (
        keys(quantization_config={"quant_method": "gptq"}), "bits is missing; .*Read of gptq are: .*unquantised upload",
    ),
    "GPTQ in groups of 10¹²": (
        keys(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 10**12}), "group_size is 1000000",
    ),
    "AutoRound packed in another way": (
        keys(quantization_config={"quant_method": "auto-round", "bits": 4, "packing_format": ["x"]}),
        "packing_format is .'x'.; .*unquantised upload",
    ),
    "AQLM": (keys(quantization_config={"quant_method": "aqlm"}), "quant_method is 'aqlm': .*unquantised upload"),
    "bitsandbytes": (
        keys(quantization_config={"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "af4"}),
        r"bnb_4bit_quant_type is 'af4'; .*\.dequantize\(\)\.save_pretrained\('OUT', save_original_format=False\)",
    ),
    "compressed-tensors": (
        keys(quantization_config={"quant_method": "compressed-tensors"}), r"CompressedTensorsConfig\(dequantize=True\)",
    ),
    "compressed-tensors by an older key": (
        keys(compression_config={"quant_method": "compressed-tensors"}), "compression_config.format is missing",
    ),
    "ModelOpt's AWQ": (
        keys(quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}),
        "quant_algo is 'NVFP4_AWQ'; .*Read of modelopt are: FP8",
    ),
    "ModelOpt of layers that are deep": (
        keys(quantization_config={"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": [[1]]}}}),
        "quantized_layers is .* expected 'FP8'",
    ),
    "MLX of 7 bits": (keys(quantization={"group_size": 64, "bits": 7}), "quantization.bits is 7; .*--dequantize"),
    "MLX with a layer of its own that is deep": (
        keys(quantization={"group_size": 64, "bits": 4, "lm_head": {"bits": nested(9)}}), "quantization.lm_head.bits",
    ),
    "an unknown quantization": (keys(quantization_config={"quant_method": "mine"}), "quant_method is 'mine'"),
    "a quantization that is a list": (keys(quantization_config=[1] * 100_000), "quantization_config is"),
    "a quantization that is deep": (
        keys(quantization_config={"quant_method": nested(DEEPEST - 50)}), "quant_method is",
    ),
    "fp8 in blocks of 0": (
        keys(quantization_config={"quant_method": "fp8", "weight_block_size": [0, 128]}), "weight_block_size is",
    ),
    "fp8 in blocks that are a number": (
        keys(quantization_config={"quant_method": "fp8", "weight_block_size": 128}), "weight_block_size is",
    ),
    "fp8 of another format": (
        keys(quantization_config={"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]}),
        "fmt is 'e5m2'",
    ),
    "fp8 with another scheme of activations": (
        keys(quantization_config={"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "token"}),
        "activation_scheme is 'token'; .*unquantised upload",
    ),
    # legal
    "code of its own, which is not run": (keys(auto_map={"AutoModelForCausalLM": "modeling.Mine"}), None),
    "what training left": (keys(pretraining_tp=2, use_cache=False, attention_dropout=0.5, architectures=None), None),
    "quantization_config is null": (keys(quantization_config=None), None),
}


# ---- our own layout

def decoder(*path: Any, to: Any) -> good.Harm:
    """The value at a place inside "decoder"."""
    def change(values: dict[str, Any]) -> None:
        inside = values["decoder"]
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = to
    return edited(CONFIG, change)


LAYERS, LAYER = "of at most 21 layers", ("layers", 0, 1)
OWN: dict[str, Case] = {
    "no decoder": (keys(decoder=...), "decoder is missing"),
    **{
        f"decoder is {value!r}": (keys(decoder=value), LAYERS)
        for value in (None, 7, "x", [], {}, {"layers": 3}, {"layers": [[2]]})
    },
    "decoder is deep": (keys(decoder=nested(DEEPEST)), LAYERS),
    "1e9 layers": (decoder("layers", 0, 0, to=10**9), LAYERS),
    "−1 layers": (decoder("layers", 0, 0, to=-1), LAYERS),
    "layers are true": (decoder("layers", 0, 0, to=True), LAYERS),
    "a layer more": (decoder("layers", 0, 0, to=3), "9 missing"),
    "no layers": (decoder("layers", to=[]), "ModelConfig.layers"),
    "a layer that is null": (decoder("layers", 0, 1, to=None), "ModelConfig.layers"),
    "a layer that is a norm": (decoder("layers", 0, 1, to={"is": "Norm"}), "ModelConfig.layers"),
    "an unknown class": (
        decoder(*LAYER, "mixer", "is", to="Popen"), "not a ModelConfig as to_dict writes it: KeyError: 'Popen'",
    ),
    "a class that is a list": (decoder(*LAYER, "mixer", "is", to=["Norm"]), "not a ModelConfig as to_dict writes it"),
    "an unknown field": (decoder("surprise", to=1), "not a ModelConfig as to_dict writes it.*surprise"),
    "a field that is missing": (
        edited(CONFIG, lambda values: values["decoder"].pop("vocab")),
        "not a ModelConfig as to_dict writes it.*vocab",
    ),
    "a mixer that is a number": (decoder(*LAYER, "mixer", to=7), "Layer.mixer = 7"),
    "a norm that is a number": (decoder(*LAYER, "pre_mixer", to=7), "Layer.pre_mixer = 7"),
    "a norm that is deep": (
        decoder(*LAYER, "pre_mixer", to=nested(DEEPEST - 50)),
        "not a ModelConfig as to_dict writes it: RecursionError|Layer.pre_mixer = ",
    ),
    "a RoPE that is a text": (decoder(*LAYER, "mixer", "rope", to="yes"), "Attention.rope = 'yes'"),
    "ε is NaN": (decoder("final_norm", "eps", to=math.nan), "Norm.eps = nan"),
    "ε is 10⁴⁰⁰": (decoder("final_norm", "eps", to=10**400), "Norm.eps = 1000"),
    "a vocabulary of 10⁴⁰⁰": (decoder("vocab", to=10**400), "ModelConfig.vocab = 1000"),
    "a vocabulary of 1e12": (decoder("vocab", to=10**12), "ModelConfig.vocab = 1000000000000"),
    "a vocabulary of 1e9": (decoder("vocab", to=10**9), SHAPE),
    "heads of 2³¹, each as wide": (
        lambda folder: [decoder(*LAYER, "mixer", key, to=2**31)(folder) for key in ("heads", "kv_heads", "head_dim")],
        "a tensor beyond any memory|of another shape",
    ),
    "tied is a text": (decoder("tied", to="yes"), "ModelConfig.tied = 'yes'"),
    "a bias that is 1": (decoder(*LAYER, "mixer", "qkv_bias", to=1), "Attention.qkv_bias = 1"),
    "a kind that does not exist": (decoder("final_norm", "kind", to="batch"), "Norm.kind = 'batch'"),
    "a tensor renamed": (
        good.weights(lambda found: found.update({"embed": found.pop("embed.weight")})),
        "1 missing:\n    embed.weight",
    ),
}


# ---- the original layouts

def ranks(change: Callable[[dict[str, torch.Tensor]], Any], rank: int = 1) -> good.Harm:
    """The tensors of a rank's file after `change`."""
    def harm(folder: Path) -> None:
        path = folder / f"consolidated.{rank:02d}.pth"
        found = torch.load(path, weights_only=True)
        change(found)
        torch.save(found, path)
    return harm


def of_params(**changes: Any) -> good.Harm:
    return keys(PARAMS, **changes)


META: dict[str, Case] = {
    **{name: (put(PARAMS, text), f"params.json: .*{cause}") for name, (text, cause) in ENDS.items()},
    "{}": (put(PARAMS, "{}"), "dim is missing"),
    "a dim of 0": (of_params(dim=0), RANGE),
    "a dim of 1e12": (of_params(dim=10**12), RANGE),
    "a dim of 2³¹": (of_params(dim=2**31), "intermediate_size is"),
    "a dim that is a text": (of_params(dim="8"), "dim is '8'"),
    "1e9 layers": (of_params(n_layers=10**9), "n_layers is 1000000000; .*from 1 to 21"),
    "a layer more": (of_params(n_layers=3), "9 missing"),
    "NaN layers": (of_params(n_layers=math.nan), "n_layers is nan"),
    "heads that do not divide": (of_params(n_heads=3), "n_heads is 3; expected a divisor"),
    "key/value heads that do not divide": (of_params(n_heads=4, n_kv_heads=3), "kv_heads = 3"),
    "a vocabulary of 1e9": (of_params(vocab_size=10**9), SHAPE),
    "a vocabulary of −2": (of_params(vocab_size=-2), RANGE),
    "a width multiplied by NaN": (of_params(ffn_dim_multiplier=math.nan), "ffn_dim_multiplier is nan"),
    "a width multiplied by 1e30": (of_params(ffn_dim_multiplier=1e30), "intermediate_size is"),
    "a width in multiples of 1e12": (of_params(multiple_of=10**12), RANGE),
    "ε is NaN": (of_params(norm_eps=math.nan), "norm_eps is nan"),
    "RoPE of base 0": (of_params(rope_theta=0), "rope_theta is 0"),
    "stretched by a text": (of_params(use_scaled_rope="yes"), "use_scaled_rope is 'yes'"),
    "an unknown key": (of_params(vision=1), "vision = 1"),
    "a key that is deep": (of_params(vision=nested(DEEPEST)), "vision = "),
    "a rank is missing": (gone("consolidated.00.pth"), "one of the ranks' files is missing"),
    "no ranks": (
        gone("consolidated.00.pth", "consolidated.01.pth"),
        "neither consolidated.safetensors nor consolidated.00.pth",
    ),
    "the last rank is missing": (gone("consolidated.01.pth"), SHAPE),
    "a rank too many": (
        lambda folder: (folder / "consolidated.02.pth").write_bytes((folder / "consolidated.01.pth").read_bytes()),
        SHAPE,
    ),
    "a rank that is a link to another kind of file": (
        lambda folder: [
            (folder / "consolidated.01.pth").unlink(), (folder / "consolidated.01.pth").symlink_to("params.json"),
        ],
        "not tensors as torch.save writes them",
    ),
    "a rank of another shape": (
        ranks(lambda found: found.update({"layers.0.attention.wq.weight": torch.ones(8, 8)})),
        "wq.weight is not in all of the 2 files",
    ),
    "a rank of another dtype": (
        ranks(lambda found: found.update({"layers.0.attention.wq.weight": torch.ones(4, 8).half()})),
        "wq.weight is not in all of the 2 files",
    ),
    "a tensor that one rank lacks": (
        ranks(lambda found: found.pop("output.weight")), "output.weight is not in all of the 2 files",
    ),
    "a tensor that one rank has alone": (
        ranks(lambda found: found.update(extra=torch.ones(2, 2))), "extra is not in the first of the 2 files",
    ),
    "norms that differ": (
        ranks(lambda found: found["norm.weight"].add_(1)), "norm.weight differs between the files of the ranks",
    ),
    "a tensor of three dimensions": (
        lambda folder: [ranks(lambda found: found.update(cube=torch.ones(2, 2, 2)), rank)(folder) for rank in (0, 1)],
        "cube is .* a vector or a matrix",
    ),
    "a tensor of no dimension": (
        lambda folder: [
            ranks(lambda found: found.update({"norm.weight": torch.tensor(1.0)}), rank)(folder) for rank in (0, 1)
        ],
        "norm.weight is .* a vector or a matrix",
    ),
    "a NaN in the second rank": (
        ranks(lambda found: found["output.weight"].view(-1)[3:4].fill_(math.nan)), "output.weight holds a NaN",
    ),
    "no embedding": (
        lambda folder: [ranks(lambda found: found.pop("tok_embeddings.weight"), rank)(folder) for rank in (0, 1)],
        "no matrix tok_embeddings.weight",
    ),
    "a rank that is a pointer": (put("consolidated.01.pth", POINTER), "git-lfs pointer"),
}
MISTRAL: dict[str, Case] = {
    "no width of a head": (of_params(head_dim=...), "head_dim is missing"),
    "a feed-forward of 1e9": (of_params(hidden_dim=10**9), SHAPE),
    "a window of 0": (of_params(sliding_window=0), RANGE),
    "two windows": (of_params(sliding_window=4, _sliding_window=8), "_sliding_window is 8"),
    "experts that are a list": (of_params(moe=[8, 2]), "moe is .* expected an object"),
    "1e9 experts": (
        of_params(moe={"num_experts": 10**9, "num_experts_per_tok": 2}),
        "moe.num_experts is 1000000000; .*from 1 to 21",
    ),
    "experts that are not there": (of_params(moe={"num_experts": 4, "num_experts_per_tok": 2}), "missing"),
    "more experts a token than there are": (of_params(moe={"num_experts": 2, "num_experts_per_tok": 3}), "top_k = 3"),
    "an embedding of one dimension": (
        good.weights(lambda found: found.update({"tok_embeddings.weight": torch.ones(16)}), original.SINGLE),
        "no matrix tok_embeddings.weight",
    ),
    "an embedding of no dimension": (
        good.weights(lambda found: found.update({"tok_embeddings.weight": torch.tensor(1.0)}), original.SINGLE),
        "no matrix tok_embeddings.weight",
    ),
    "weights that are a web page": (put(original.SINGLE, "<html></html>"), "a web page"),
    "weights cut short": (
        lambda folder: (folder / original.SINGLE).write_bytes((folder / original.SINGLE).read_bytes()[:-1]),
        "truncated",
    ),
}

GROUPS = {
    "config": Group("config.json", good.hugging_face, checkpoints.load, CONFIGS, folder=True),
    "own": Group("our own layout", good.own, checkpoints.load, OWN),
    "meta": Group("params.json and consolidated.*.pth", good.meta, good.read_whole, META),
    "mistral": Group("params.json and consolidated.safetensors", good.mistral, checkpoints.load, MISTRAL),
}


# ---- every key of every lineage

VALUES = {
    "null": None, "true": True, "−1": -1, "0": 0, "1": 1, "3": 3, "1e9": 1e9, "10⁹": 10**9, "2³¹": 2**31,
    "10¹²": 10**12, "10⁴⁰⁰": 10**400, "1e-300": 1e-300, "NaN": math.nan, "∞": math.inf, "−∞": -math.inf, "x": "x",
    "empty text": "", "[]": [], "{}": {}, "deep": nested(2_000), "[null]": [None], "[1]": [1], "{k: 1}": {"k": 1},
    "long": [1.0] * 10_000,
}


def asked_for(values: dict[str, Any], most: int) -> list[tuple[str, ...]]:
    """The keys that a family asks for, and those that are there, those of objects inside as (object, key)."""
    asked: dict[tuple[str, ...], None] = {}
    plain = reader.Reader.get

    def get(self: reader.Reader, key: str, *default: Any) -> Any:
        asked[(*self.prefix.split(".")[:-1], key)] = None
        return plain(self, key, *default)

    reader.Reader.get = get
    try:
        read_config(values, most=most)
    finally:
        reader.Reader.get = plain
    return [*dict.fromkeys([*asked, *places_in(values)])]


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*path, key)
        yield from places_in(item, (*path, key))


def replaced(text: str, path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A JSON object with another value at a place."""
    values = inside = json.loads(text)
    for key in path[:-1]:
        if isinstance(inside, dict) and not isinstance(inside.get(key), (dict, list)):
            inside[key] = {}
        inside = inside[key]
    inside[path[-1]] = value
    return values


def fits(values: dict[str, Any], stored: dict[str, files.Stored]) -> None:
    """What source.py does with a config and headers, up to the plan. Raises what it raises."""
    family, config = read_config(values, most=len(stored))
    parameters = dict(source._on_meta(config, "config.json").named_parameters())
    tables = [table.expand(names, parameters, config) for names in family.tables(config)]
    table.check(min(tables, key=lambda steps: len(table.missing(steps, stored))), parameters, stored, family.ignorable)


def sweep(root: Path, count: int, own: bool = False) -> Iterator[tuple[str, Callable[[], None]]]:
    """`count` values at random places of the config.json of each lineage, or of the same model's in our own layout."""
    for name in LINEAGES:
        folder = root / name
        if not folder.exists():
            write(FIXTURES[name], folder)
        stored = files.read_folder(folder)
        values = json.loads((folder / CONFIG).read_text())
        if own:
            config = read_config(values)[1]
            values = {"model_type": "nanollm", "decoder": json.loads(json.dumps(config.to_dict()))}
            stored = {name: files.Stored(folder, torch.float32, tuple(parameter.shape), 0, 0)
                      for name, parameter in source._on_meta(config, CONFIG).named_parameters()}
        fits(values, stored)                     # as it is
        text, rng = json.dumps(values), random.Random(name)
        paths = list(places_in(values)) if own else asked_for(values, len(stored))
        for path, label in rng.sample([(path, label) for path in paths for label in VALUES], count):
            changed = replaced(text, path, VALUES[label])
            yield (
                f"{name}, {'.'.join(map(str, path))} = {label}",
                lambda changed=changed, stored=stored: fits(changed, stored),
            )


def sweep_params(root: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every value in every key of params.json, of both dialects, and of the one with experts."""
    experts = {**good.MISTRAL, "moe": {"num_experts": 4, "num_experts_per_tok": 2}}
    known = (
        "n_kv_heads", "rope_theta", "use_scaled_rope", "rope_scaling_factor", "max_seq_len", "multiple_of",
        "ffn_dim_multiplier", "sliding_window", "_sliding_window", "tied_embeddings", "norm_eps", "vocab_size",
    )
    for dialect, params in (("llama", good.PARAMS), ("mistral", good.MISTRAL), ("mixtral", experts)):
        for path in dict.fromkeys([*places_in(params), *((key,) for key in known)]):
            for label, value in VALUES.items():
                changed = replaced(json.dumps(params), path, value)

                def use(changed: dict[str, Any] = changed, dialect: str = dialect) -> None:
                    source._on_meta(
                        read_config(
                            original.read_params(changed, "params.json", dialect, 16, False, most=30), "params.json",
                            most=30,
                        )[1],
                        "params.json",
                    )

                yield f"{dialect}, {'.'.join(path)} = {label}", use
