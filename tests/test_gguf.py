"""GGUF: files written here with the gguf package, from transformers' models, as llama.cpp's converter writes them;
and what is refused.

Nothing here knows our tables. Names, the order of the rows of q and k, the 1 that is added to Gemma's norms, and
which keys there are, follow llama.cpp's converter. The container is compared with the package's own reader, the
numbers with its own dequantize."""

import contextlib
import dataclasses
import re
import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import checkpoints
from checkpoints import convert, layouts
from checkpoints.families import read_config
from checkpoints.layouts import gguf_files
from checkpoints.layouts.found import Asked
from checkpoints.layouts.gguf_names import read_metadata
from checkpoints.layouts.original import with_rope_layout
from checkpoints.source import open_source
from checkpoints.storage import files
from checkpoints.storage import gguf as ours
from checkpoints.storage.files import Stored
from nanollm.config import Linear, Llama3
from nanollm.errors import CheckpointError, ConfigError, NanollmError
from tests.clock import within
from tests.fixtures import FIXTURES
from tests.oracles import Fixture, difference, reference_logits, rope, tokens, write


def like(name: str, **keys) -> Fixture:
    return dataclasses.replace(FIXTURES[name], keys=FIXTURES[name].keys | keys)


LLAMA31 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
WIDE = dict(
    num_attention_heads=2, num_key_value_heads=1, head_dim=64
)  # enough pairs for every part of Llama 3.1's formula
THIN = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=256)
MODELS = {
    "llama": FIXTURES["llama-3"],
    "llama-mha": FIXTURES["codellama"],
    "llama-3.1": Fixture("llama", {**WIDE, **rope("llama3", 500_000.0, **LLAMA31)}),
    "llama-3.2": Fixture(
        "llama", {**WIDE, **rope("llama3", 500_000.0, **{**LLAMA31, "factor": 32.0}), "tie_word_embeddings": True}
    ),
    "llama-linear": FIXTURES["vicuna-16k"],
    "llama-yarn": Fixture(
        "llama",
        {
            **rope(
                "yarn", factor=4.0, original_max_position_embeddings=2048, attention_factor=1.4, beta_fast=8.0,
                beta_slow=2.0,
            ),
            "head_dim": 32,
        },
    ),
    "llama-biases": FIXTURES["llama-biases"],
    "mistral": FIXTURES["mistral-nemo"],
    "mistral-window": FIXTURES["mistral-v0.1"],  # no converter writes it today
    "qwen2": FIXTURES["qwen2-0.5b"],
    "qwen2-yarn": FIXTURES["qwen2.5-128k"],
    "qwen3": FIXTURES["qwen3-8b"],
    "qwen3-biases": like("qwen3-0.6b", attention_bias=True),
    "gemma": FIXTURES["gemma-2b"],
    "gemma2": FIXTURES["gemma2-9b"],
    "gemma3": like(
        "gemma3-1b",
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
        },
    ),
    "gemma3-full": dataclasses.replace(like("gemma3-1b", layer_types=["full_attention"] * 7), edit=None),
    "phi2": Fixture(
        "phi", {**FIXTURES["phi-2"].keys, "intermediate_size": 320, **rope("default", partial_rotary_factor=0.4)}
    ),
    "phi3": FIXTURES["phi-3-mini-4k"],
    "phi3-long": FIXTURES["phi-3.5-mini"],
    "phi3-partial": FIXTURES["phi-4-mini"],
    "mixtral": FIXTURES["mixtral-8x7b"],
    "qwen2moe": FIXTURES["qwen1.5-moe"],
    "qwen3moe": FIXTURES["qwen3-moe"],
    "gpt-oss": like("gpt-oss-20b", swiglu_limit=7.0),
}
ARCHITECTURE = {  # of model_types that are called otherwise
    "mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3", "phi": "phi2", "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss",
}
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.dense": "attn_output", "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate_up_proj": "ffn_up", "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp", "mlp.router": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
FOUR_NORMS = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OUTSIDE = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.final_layernorm": "output_norm",
    "lm_head": "output",
}


# ---- as the converter writes

def gguf_tensors(model) -> dict[str, torch.Tensor]:
    config, found = model.config, {}
    parts = PARTS | (FOUR_NORMS if config.model_type in ("gemma2", "gemma3_text") else {})
    if config.model_type == "gpt_oss":
        parts = parts | {"post_attention_layernorm": "post_attention_norm"}
    for name, tensor in model.state_dict().items():
        if experts := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj(_bias)?", name):
            found |= expert_tensors(config.model_type, tensor, *experts.groups())
            continue
        if name.endswith("sinks"):
            found[f"blk.{name.split('.')[2]}.attn_sinks.weight"] = tensor.clone()
            continue
        module, leaf = name.rsplit(".", 1)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        inside = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
        new = f"blk.{inside[1]}.{parts[inside[2]]}" if inside else OUTSIDE[module]
        if config.model_type in ("llama", "mistral", "mixtral") and new.endswith(("attn_q", "attn_k")):
            heads = config.num_attention_heads if new.endswith("q") else config.num_key_value_heads
            d = len(tensor) // heads  # pair j: rows j and j + d/2 of a head there, 2j and 2j + 1 here
            tensor = tensor[[h * d + half * d // 2 + j for h in range(heads) for j in range(d // 2) for half in (0, 1)]]
        if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        found[f"{new}.{leaf}"] = tensor.clone()
    said = config.rope_parameters
    if said.get("rope_type") == "llama3":
        found["rope_freqs.weight"] = torch.tensor(
            [llama3_divisor(said, config.head_dim, j) for j in range(config.head_dim // 2)]
        )
    if said.get("rope_type") == "longrope":
        found |= {f"rope_factors_{which}.weight": torch.tensor(said[f"{which}_factor"]) for which in ("long", "short")}
    return found


def expert_tensors(kind, tensor, layer, part, bias) -> dict[str, torch.Tensor]:
    """Of a layer one tensor (E, F, D) a part. transformers has gate above up; gpt-oss columns gate up gate up …"""
    leaf = "bias" if bias else "weight"
    if kind == "gpt_oss" and not bias:
        tensor = tensor.transpose(1, 2)
    if part == "down":
        return {f"blk.{layer}.ffn_down_exps.{leaf}": tensor.contiguous()}
    gate, up = (tensor[:, 0::2], tensor[:, 1::2]) if kind == "gpt_oss" else tensor.chunk(2, dim=1)
    return {f"blk.{layer}.ffn_{which}_exps.{leaf}": half.contiguous() for which, half in (("gate", gate), ("up", up))}


def llama3_divisor(said, d, j) -> float:
    """In double precision, where the converter takes single."""
    turns = said["original_max_position_embeddings"] / (2 * np.pi * said["rope_theta"] ** (2 * j / d))
    low, high = said["low_freq_factor"], said["high_freq_factor"]
    share = min(max((turns - low) / (high - low), 0), 1)
    return 1 / ((1 - share) / said["factor"] + share)


def add_keys(w: gguf.GGUFWriter, config) -> None:
    kind, said = config.model_type, config.rope_parameters
    heads, dim = config.num_attention_heads, config.hidden_size
    d = getattr(config, "head_dim", None) or dim // heads
    w.add_name("tiny")
    w.add_type("model")
    w.add_file_type(0)
    w.add_block_count(config.num_hidden_layers)
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(dim)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_tokenizer_model("llama")
    w.add_token_list([f"token {i}" for i in range(config.vocab_size)])
    w.add_token_scores([0.5] * config.vocab_size)
    w.add_token_types([1] * config.vocab_size)
    w.add_chat_template("{{ messages }} …")
    if kind == "phi":
        w.add_layer_norm_eps(config.layer_norm_eps)
        w.add_rope_dimension_count(int(said["partial_rotary_factor"] * dim) // heads)
        return
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    if kind == "phi3":
        original = (
            said["original_max_position_embeddings"]
            if said["rope_type"] == "longrope"
            else config.original_max_position_embeddings
        )
        w.add_rope_dimension_count(int(said.get("partial_rotary_factor", 1) * dim) // heads)
        w.add_rope_freq_base(said["rope_theta"])
        w.add_rope_scaling_orig_ctx_len(original)
        w.add_sliding_window(config.sliding_window or 0)
        if said["rope_type"] == "longrope":
            w.add_rope_scaling_attn_factors(
                (1 + np.log(config.max_position_embeddings / original) / np.log(original)) ** 0.5
            )
        return
    w.add_key_length(d)
    w.add_value_length(d)
    if experts := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        w.add_expert_count(experts)
        w.add_expert_used_count(config.num_experts_per_tok)
    if kind in ("qwen2_moe", "qwen3_moe"):
        w.add_expert_feed_forward_length(config.moe_intermediate_size)
    if kind == "qwen2_moe":
        w.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if kind == "gpt_oss":
        w.add_expert_feed_forward_length(config.intermediate_size)
    if kind in ("llama", "mistral", "mixtral"):
        w.add_vocab_size(config.vocab_size)
        w.add_rope_dimension_count(d)
    if kind.startswith("gemma"):
        if kind == "gemma2":
            w.add_attn_logit_softcapping(config.attn_logit_softcapping)
            w.add_final_logit_softcapping(config.final_logit_softcapping)
        if kind == "gemma2" or kind == "gemma3_text" and "sliding_attention" in config.layer_types:
            w.add_sliding_window(config.sliding_window)
        if kind != "gemma3_text":
            return                                       # neither has its rope_theta written
    elif getattr(config, "sliding_window", None):
        w.add_sliding_window(config.sliding_window)
    whole = said.get("full_attention", said)
    w.add_rope_freq_base(whole["rope_theta"])
    if "sliding_attention" in said:
        w.add_rope_freq_base_swa(said["sliding_attention"]["rope_theta"])
    if whole["rope_type"] in ("linear", "yarn"):
        w.add_rope_scaling_type(gguf.RopeScalingType(whole["rope_type"]))
        w.add_rope_scaling_factor(whole["factor"])
    if whole["rope_type"] == "yarn":
        w.add_rope_scaling_orig_ctx_len(whole["original_max_position_embeddings"])
        for key, add in (
            ("attention_factor", w.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", w.add_rope_scaling_yarn_beta_fast), ("beta_slow", w.add_rope_scaling_yarn_beta_slow),
        ):
            if whole.get(key) is not None:
                add(whole[key])


def write_gguf(path, model, change=lambda w, tensors: None, kinds=lambda name: Kind.F32, **writer):
    """`kinds` says the type of a matrix; vectors are F32. `change` may edit tensors and keys before they are
    written."""
    w = gguf.GGUFWriter(path, ARCHITECTURE.get(model.config.model_type, model.config.model_type), **writer)
    add_keys(w, model.config)
    tensors = gguf_tensors(model)
    change(w, tensors)
    for name, tensor in tensors.items():
        kind = kinds(name) if tensor.ndim > 1 else Kind.F32
        data = packed(tensor.numpy(), kind)
        w.add_tensor(name, data, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def packed(values: np.ndarray, kind: Kind) -> np.ndarray:
    """The package quantises; what it cannot, is drawn."""
    if values.ndim == 3 and kind != Kind.F32:
        return np.stack([packed(one, kind) for one in values])
    if kind not in (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K):
        return gguf.quantize(values, kind)
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(values.size).integers(0, 256, (values.size // elements, nbytes), np.uint8)
    places = (208,) if kind == Kind.Q6_K else (0, 2)     # of scales, in float16: here between 2⁻¹² and 2⁻⁸
    for at in places:
        blocks[:, at + 1] = blocks[:, at + 1] % 16 + 12
    return blocks.reshape(values.shape[0], -1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name → (its GGUF, transformers' model, the folder that transformers wrote), each made once."""
    there = {}

    def make(name):
        if name not in there:
            home = tmp_path_factory.mktemp(name)
            model = write(MODELS[name], home / "hf")
            there[name] = write_gguf(home / "x.gguf", model), model, home / "hf"
        return there[name]
    return make


def load(path, family=None):
    """checkpoints.load, for a family that the file does not say."""
    return open_source(path, family=family).fill(None)


# ---- what it means

@pytest.mark.parametrize("name", MODELS)
def test_logits(name, made):
    path, model, folder = made(name)
    fixture = MODELS[name]
    family = "mistral" if fixture.kind == "mistral" else None
    loaded = load(path, family)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    x = tokens(fixture)
    assert difference(loaded(x), reference_logits(fixture, model, x)) < fixture.bound
    if "long" not in str(model.config.rope_parameters.get("rope_type")):  # its attention factor is stored in float32
        assert with_rope_layout(open_source(path, family=family).config, "half") == open_source(folder).config


THEIRS = {
    "llama": FIXTURES["llama-3"], "llama-3.2": MODELS["llama-3.2"], "qwen2": MODELS["qwen2"],
    "qwen3": like(
        "qwen3-0.6b", **{**THIN, "head_dim": 128}, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ),
    "gemma2": like(
        "gemma2-9b", **THIN, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, query_pre_attn_scalar=256
    ),
    "gemma3": like("gemma3-1b", **THIN, query_pre_attn_scalar=256), "phi3": FIXTURES["phi-4"],
}


@pytest.mark.parametrize("name", THEIRS)
def test_transformers_reads_the_same(name, tmp_path):
    """Its reader knows neither scalings nor caps nor a head_dim where that is rare: models in which those are its
    defaults."""
    fixture = THEIRS[name]
    path = write_gguf(tmp_path / "x.gguf", write(fixture, tmp_path / "hf"))
    config = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="x.gguf")
    config.pad_token_id = None                           # of Phi-3 32000, beyond this vocabulary
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    found = load_gguf_checkpoint(path, return_tensors=True, model_to_load=theirs)[
        "tensors"
    ]  # what from_pretrained calls, which wants accelerate too
    assert theirs.load_state_dict(found, strict=False).missing_keys == (
        ["lm_head.weight"] if config.tie_word_embeddings else []
    )
    model, x = checkpoints.load(path), tokens(fixture)
    if name == "llama-3.2":                              # nor rope_freqs
        plain = dataclasses.replace(MODELS[name], keys=MODELS[name].keys | rope("default", 500_000.0))
        path = write_gguf(tmp_path / "plain.gguf", write(plain, tmp_path / "plain"))
        assert difference(model(x), reference_logits(fixture, theirs, x)) > 1e-4
        model = checkpoints.load(path)
    assert difference(model(x), reference_logits(fixture, theirs, x)) < 1e-5


@pytest.mark.parametrize(
    "name", ["llama-biases", "llama-3.1", "llama-yarn", "qwen3", "gemma2", "gemma3", "phi2", "phi3-partial", "mixtral",
             "qwen2moe", "qwen3moe", "gpt-oss"]
)
def test_saved_as_a_folder(name, made, tmp_path):
    """Rows of q and k go back to where Hugging Face has them, and transformers misses nothing."""
    path, model, folder = made(name)
    checkpoints.save(checkpoints.load(path), tmp_path / "out")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    x = tokens(MODELS[name])
    assert difference(reference_logits(MODELS[name], again.eval(), x), reference_logits(MODELS[name], model, x)) < 2e-6
    exact = {
        key: value for key, value in model.state_dict().items() if not (name.startswith("gemma") and "norm" in key)
    }
    assert all(torch.equal(again.state_dict()[key], value) for key, value in exact.items())
    assert all((again.state_dict()[key] - value).abs().max() < 2e-7 for key, value in model.state_dict().items())


@pytest.mark.slow
def test_command(made, tmp_path):
    path, model, folder = made("mistral")
    command = [
        sys.executable, "-m", "checkpoints.convert", str(path), str(tmp_path / "out"), "--family", "mistral",
        "--verify",
    ]
    subprocess.run(command, check=True, capture_output=True)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(model) and all(
        torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items()
    )
    plan = "\n".join(convert.describe(convert.plan(open_source(path, family="mistral"))))
    assert re.search(
        r"layers.0.self_attn.q_proj.weight +float32 .* ← blk.0.attn_q.weight  x.gguf   as Same → Halving", plan
    )


def test_numbers_are_those_that_were_written(made):
    values = layouts.find(made("llama-3.1")[0]).values
    assert values["rms_norm_eps"] == 0.01 and values["rope_theta"] == 500_000.0
    assert values["rope_scaling"] == {"rope_type": "llama3", **LLAMA31}
    assert isinstance(open_source(made("llama-3.2")[0]).config.layers[0].mixer.rope.scaling, Llama3)
    values = layouts.find(made("phi3-long")[0]).values
    assert values["rope_scaling"]["short_factor"] == [1.1, 1.3, 1.6, 2.0] and values["sliding_window"] is None


def read_keys(kind, tensors=100, family=None, **keys):
    """The ModelConfig for these keys of an architecture, without a file."""
    base = dict(block_count=2, context_length=64, embedding_length=96, feed_forward_length=32)
    heads = {"attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-6}
    here = {
        name: Stored(None, torch.float32, (10, 96), 0, 0) for name in ("token_embd.weight", *map(str, range(tensors)))
    }
    metadata = {f"{kind}.{key}": value for key, value in (base | heads | keys).items()}
    return read_config(read_metadata(metadata, kind, family, here, "x.gguf"))[1]


def test_what_the_file_does_not_say():
    """The 27B Gemmas are known by their layers; windows follow the family's period, or the file's."""
    for kind, layers, period in (("gemma2", 46, 2), ("gemma3", 62, 6)):
        keys = {"attention.key_length": 128, "attention.value_length": 128, "attention.sliding_window": 8}
        usual, large = read_keys(kind, **keys), read_keys(kind, **keys, block_count=layers)
        assert usual.layers[0].mixer.scale is None and large.layers[0].mixer.scale == (96 // 4) ** -0.5
        assert [layer.mixer.window for layer in large.layers] == [
            8 if (i + 1) % period else None for i in range(layers)
        ]
        other = read_keys(kind, **keys, **{"attention.sliding_window_pattern": [False, True]})
        assert [layer.mixer.window for layer in other.layers] == [None, 8]
        other = read_keys(kind, **keys, **{"attention.sliding_window_pattern": 1})
        assert [layer.mixer.window for layer in other.layers] == [None, None]
    assert read_keys("gemma2").layers[0].mixer.window == 4096 and read_keys("gemma2").layers[0].mixer.softcap == 50.0
    assert read_keys("llama").layers[0].mixer.rope.theta == 10_000.0
    for scaling in (
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope.scaling.factor": 1.0},
        {"rope.scaling.type": "yarn"},
    ):
        assert read_keys("llama", **scaling).layers[0].mixer.rope.scaling is None
    assert read_keys("llama", **{"rope.scaling.factor": 4.0}).layers[0].mixer.rope.scaling == Linear(4.0)
    partial = read_keys("phi3", **{"rope.dimension_count": 30, "attention.key_length": 44})
    assert int(44 * partial.layers[0].mixer.rope.fraction) == 30 != int(44 * (30 / 44))


# ---- the numbers

ALL = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_K, Kind.Q6_K]
BLOCKY = Fixture("llama", dict(hidden_size=256, intermediate_size=512, num_hidden_layers=1))
MATRICES = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """One matrix of each type. The package's own reader says what is in it."""
    model = write(BLOCKY, tmp_path_factory.mktemp("blocky"))
    types = {f"blk.0.{part}.weight": kind for part, kind in zip(MATRICES, ALL, strict=True)}
    path = write_gguf(tmp_path_factory.mktemp("mixed") / "x.gguf", model, kinds=lambda name: types.get(name, Kind.Q8_0))
    return path, {one.name: one for one in gguf.GGUFReader(path).tensors}


def test_the_container_is_what_the_package_reads(mixed):
    path, theirs = mixed
    stored = gguf_files.find(path, Asked()).stored
    assert list(stored) == list(theirs) and {one.kind for one in stored.values()} == set(ALL)
    for name, one in stored.items():
        there = theirs[name]
        assert (
            one.shape == tuple(there.shape.tolist()[::-1])
            and one.kind == there.tensor_type
            and one.dtype == torch.bfloat16
        )
        assert (one.start, one.size) == (there.data_offset, there.n_bytes)
    fields = {key: field for key, field in gguf.GGUFReader(path).fields.items() if not key.startswith("GGUF.")}
    metadata = ours.read_header(path).metadata
    assert metadata.keys() == fields.keys() and len(fields) > 15
    for key, field in fields.items():
        if field.types[:2] == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING]:
            assert ours.read_list(path, metadata[key]) == field.contents()
        else:
            found, there = np.array(metadata[key]), np.array(field.contents())
            assert np.array_equal(
                found, there if there.dtype != float else there.astype(np.float32).astype(str).astype(float)
            ), key


def test_dequantised_bit_for_bit_wherever_a_run_begins(mixed):
    path, theirs = mixed
    for name, one in gguf_files.find(path, Asked()).stored.items():
        whole = torch.from_numpy(gguf.dequantize(theirs[name].data, theirs[name].tensor_type).copy()).flatten()
        count = whole.numel()
        for first, length in (
            (0, count), (1, 31), (31, 2), (255, 2), (count - 300, 300) if count > 300 else (0, 1),
            (count // 2 + 7, 777), (count - 1, 1),
        ):
            for dtype in (torch.float32, torch.bfloat16):
                run = torch.full((min(length, count - first),), torch.nan, dtype=one.run_dtype(dtype))
                one.read_run(first, run)
                assert run.dtype == dtype and torch.equal(run, whole[first : first + len(run)].to(dtype)), (
                    name, first, length,
                )
        assert len(whole.unique()) > 10 or whole.ndim == 1


def test_every_type_that_the_package_unpacks(tmp_path):
    """Two rows of random blocks of each type: bit for bit what the package makes of them."""
    draw, kinds = np.random.default_rng(0), []
    w = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for kind, name in ours.dequantizable().items():
        _, nbytes = gguf.GGML_QUANT_SIZES[Kind(kind)]
        blocks = draw.integers(0, 256, (2, 256 * nbytes), np.uint8)
        if name in ("F32", "F16"):
            blocks = blocks.view({"F32": np.float32, "F16": np.float16}[name])
        w.add_tensor(name, blocks, raw_dtype=Kind(kind))
        kinds.append(name)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    usual = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS IQ3_S IQ2_XXS IQ1_S TQ1_0 MXFP4 BF16"
    assert set(usual.split()) < set(kinds)
    stored = ours.places(tmp_path / "x.gguf", ours.read_header(tmp_path / "x.gguf"), torch.bfloat16, 0.0)
    for one in gguf.GGUFReader(tmp_path / "x.gguf").tensors:
        with np.errstate(all="ignore"):
            there = torch.from_numpy(gguf.dequantize(one.data, one.tensor_type).copy())
        run = torch.empty(there.numel())
        stored[one.name].read_run(0, run)
        assert stored[one.name].shape == there.shape
        assert torch.equal(run.view(torch.int32), there.flatten().view(torch.int32)), one.name


def test_only_the_blocks_of_a_run_are_read(mixed, monkeypatch):
    stored, read = gguf_files.find(mixed[0], Asked()).stored, []
    plain = files.Stored.read_run
    monkeypatch.setattr(
        files.Stored, "read_run", lambda self, first, run: (read.append((first, run.numel())), plain(self, first, run))
    )
    stored["blk.0.ffn_up.weight"].read_run(250, torch.empty(300))                # Q4_K: blocks 0, 1 and 2
    stored["blk.0.attn_output.weight"].read_run(64, torch.empty(33))             # Q8_0: blocks 2 and 3
    assert read == [(0, 3 * 144), (2 * 34, 2 * 34)]


def test_one_dtype_for_a_model(mixed, made, tmp_path):
    path, theirs = mixed
    exact = checkpoints.load(path, dtype=torch.float32)
    whole = gguf.dequantize(theirs["blk.0.ffn_down.weight"].data, Kind.Q6_K)
    assert np.array_equal(exact.layers[0].ffn.down.weight.numpy(force=True), whole)
    kept = checkpoints.load(path)
    assert {parameter.dtype for parameter in kept.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(kept.parameters(), exact.parameters(), strict=True))
    model = made("llama")[1]
    for kind, dtype in ((Kind.F16, torch.float16), (Kind.BF16, torch.bfloat16)):
        half = checkpoints.load(write_gguf(tmp_path / f"{kind.name}.gguf", model, kinds=lambda name, kind=kind: kind))
        assert {parameter.dtype for parameter in half.parameters()} == {dtype}
        assert torch.equal(half.head.weight, model.lm_head.weight.to(dtype))


def test_quantised_gemma_norms_keep_their_precision(made):
    """The 1 that was added is taken away in float32, before anything is rounded."""
    path, model, _ = made("gemma2")
    gain, stored = model.model.norm.weight, gguf_files.find(path, Asked()).stored["output_norm.weight"]
    run = torch.empty(len(gain), dtype=torch.bfloat16)
    stored.read_run(0, run)
    assert torch.equal(run, (gain + 1 - 1).bfloat16()) and not torch.equal(run, (gain + 1).bfloat16() - 1)


# ---- refused

def without(*keys):
    def change(w, tensors):
        for key in keys:
            assert w.kv_data[0].pop(key)
    return change


def nan(w, tensors):
    tensors["blk.1.ffn_up.weight"][3, 4] = torch.nan


REFUSED = {  # of which model, what is changed, the words
    "an unknown key": ("llama", lambda w, t: w.add_logit_scale(0.5), r"llama\.logit_scale = 0\.5"),
    "experts": ("llama", lambda w, t: w.add_expert_count(8), r"llama\.expert_used_count is missing"),
    "no key": ("llama", without("llama.block_count"), r"llama\.block_count is missing"),
    "experts that are used": (
        "llama", lambda w, t: w.add_expert_used_count(2), r"llama\.expert_used_count is 2; expected 0",
    ),
    "no epsilon": (
        "qwen2", without("qwen2.attention.layer_norm_rms_epsilon"),
        r"qwen2\.attention\.layer_norm_rms_epsilon is missing",
    ),
    "epsilon is NaN": (
        "llama", lambda w, t: w.add_float32("llama.attention.layer_norm_rms_epsilon", np.nan),
        "layer_norm_rms_epsilon is nan",
    ),
    "heads that differ": (
        "llama", lambda w, t: w.add_head_count([8, 8, 4]),
        r"attention\.head_count is \[8, 8, 4\]; expected a whole number",
    ),
    "another vocabulary": ("llama", lambda w, t: w.add_vocab_size(132), r"llama\.vocab_size is 132; expected 131"),
    "values of another width": (
        "llama", lambda w, t: w.add_value_length(16), r"attention\.value_length is 16; expected 8",
    ),
    "a part of each head": (
        "llama", lambda w, t: w.add_rope_dimension_count(4), r"rope\.dimension_count is 4; expected 8",
    ),
    "looks ahead": ("qwen3", lambda w, t: w.add_causal_attention(False), r"attention\.causal is False; expected True"),
    "a window of llama's": (
        "llama", lambda w, t: w.add_sliding_window(16),
        r"attention\.sliding_window is 16; expected 0, or no such key, or --family mistral",
    ),
    "a window of qwen's": (
        "qwen2", lambda w, t: w.add_sliding_window(16),
        r"attention\.sliding_window is 16; expected 0, or no such key",
    ),
    "another scaling": (
        "llama", lambda w, t: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
        r"rope\.scaling\.type is 'longrope'; expected 'linear' or 'none' or 'yarn'",
    ),
    "yarn with a multiplier": (
        "llama-yarn", lambda w, t: w.add_rope_scaling_yarn_log_mul(1.0), r"rope\.scaling\.yarn_log_multiplier = 1\.0",
    ),
    "yarn without its ramp": (
        "llama-yarn", lambda w, t: w.add_rope_scaling_yarn_ext_factor(0.5), r"yarn_ext_factor is 0\.5; expected 1\.0",
    ),
    "another formula": (
        "llama-3.1", lambda w, t: t["rope_freqs.weight"][20:].mul_(1.001),
        r"rope_freqs\.weight has divisors other than Llama 3\.1's formula gives",
    ),
    "another original context": (
        "llama-3.1",
        lambda w, t: t.update(
            {
                "rope_freqs.weight": torch.tensor(
                    [
                        llama3_divisor({**LLAMA31, "original_max_position_embeddings": 4096, "rope_theta": 5e5}, 64, j)
                        for j in range(32)
                    ]
                )
            }
        ),
        r"rope_freqs\.weight has divisors other",
    ),
    "too few divisors": (
        "llama-3.1", lambda w, t: t.update({"rope_freqs.weight": t["rope_freqs.weight"][:-1]}),
        r"rope_freqs\.weight is \(31,\); expected \(32,\)",
    ),
    "a divisor that is NaN": (
        "llama-3.1", lambda w, t: t["rope_freqs.weight"][3:4].fill_(torch.nan),
        r"rope_freqs\.weight has a divisor that is no finite number",
    ),
    "two scalings": (
        "llama-3.1", lambda w, t: w.add_rope_scaling_factor(2.0),
        r"rope\.scaling\.factor is 2\.0; expected no other scaling beside rope_freqs\.weight",
    ),
    "divisors of qwen's": (
        "qwen2", lambda w, t: t.update({"rope_freqs.weight": torch.ones(4)}), r"(?s)unexpected.*rope_freqs\.weight",
    ),
    "one list of two": (
        "phi3-long", lambda w, t: t.pop("rope_factors_short.weight"), r"no tensor rope_factors_short\.weight",
    ),
    "no attention factor": (
        "phi3-long", without("phi3.rope.scaling.attn_factor"), r"phi3\.rope\.scaling\.attn_factor is missing",
    ),
    "a factor of phi3's": ("phi3", lambda w, t: w.add_rope_scaling_factor(2.0), r"phi3\.rope\.scaling\.factor = 2\.0"),
    "wide heads of phi2's": (
        "phi2", lambda w, t: w.add_key_length(16),
        r"attention\.key_length is 16; expected embedding_length / attention\.head_count",
    ),
    "no such pattern": (
        "gemma3", lambda w, t: w.add_array("gemma3.attention.sliding_window_pattern", [True, False]),
        r"sliding_window_pattern is \[True, False\]; expected a period, or 7 times",
    ),
    "one of several files": (
        "llama", lambda w, t: w.add_uint16("split.count", 3),
        r"one of 3 files of a model; expected a name such as model-00001-of-00002\.gguf",
    ),
    "an adapter": ("llama", lambda w, t: w.add_type("adapter"), r"general\.type is 'adapter'; expected a model"),
    "another architecture": (
        "llama", lambda w, t: w.add_string("general.architecture", "mamba"),
        r"general\.architecture is 'mamba'; supported are llama, qwen2, qwen2moe",
    ),
    "no embedding": ("llama", lambda w, t: t.pop("token_embd.weight"), r"no tensor token_embd\.weight"),
    "a tensor too few": ("llama", lambda w, t: t.pop("blk.1.ffn_up.weight"), r"(?s)1 missing.*blk\.1\.ffn_up\.weight"),
    "a tensor too many": (
        "llama", lambda w, t: t.update({"blk.0.attn_sub_norm.weight": torch.ones(64)}),
        r"(?s)1 unexpected.*attn_sub_norm",
    ),
    "a tensor of another shape": (
        "llama", lambda w, t: t.update({"output.weight": torch.ones(131, 32)}), r"output\.weight: \(131, 32\) stored",
    ),
    "a weight that is NaN": ("llama", nan, r"blk\.1\.ffn_up\.weight holds a NaN or an infinity"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, made, tmp_path):
    name, change, words = REFUSED[case]
    path = write_gguf(tmp_path / "x.gguf", made(name)[1], change)
    with pytest.raises((CheckpointError, ConfigError), match=words) as caught:
        checkpoints.load(path)
    assert "x.gguf" in str(caught.value) or str(tmp_path) in str(caught.value)



def test_refused_by_type_family_and_package(made, tmp_path, monkeypatch):
    path, model, _ = made("llama")
    w = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    w.add_tensor("token_embd.weight", np.zeros((4, 64), np.int8))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    with pytest.raises(CheckpointError, match=r"x\.gguf: token_embd\.weight is I8, which the installed gguf package "
                                              "does not unpack; it does F32, F16, Q4_0, Q4_1"):
        checkpoints.load(tmp_path / "x.gguf")
    with pytest.raises(ConfigError, match="--family qwen2: architecture llama is read as llama or mistral or mixtral"):
        load(path, "qwen2")
    (tmp_path / "two").mkdir()
    for name in "ab":
        (tmp_path / "two" / f"{name}.gguf").write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="2 GGUF models; give one of them: a.gguf, b.gguf"):
        checkpoints.load(tmp_path / "two")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=re.escape('pip install -e ".[gguf]"')):
        checkpoints.load(path)


def test_a_big_endian_file(made, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", made("llama")[1], endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(CheckpointError, match=r"version 50331648 \(big-endian\); expected 2 or 3, little-endian"):
        checkpoints.load(path)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(*keys: bytes, tensors: bytes = b"", counts=None, version: int = 3) -> bytes:
    return (
        b"GGUF" + struct.pack("<IQQ", version, *(counts or (1 if tensors else 0, len(keys)))) + b"".join(keys) + tensors
    )


NAMED = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
KEY = text(b"llama.block_count")
HUGE = 2**63
DAMAGED = {
    "empty": (b"", "empty; download it again"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "not GGUF, but a git-lfs pointer"),
    "no header": (b"GGUF\3\0", "truncated in the header: 8 bytes expected at byte 0"),
    "the first version": (header(version=1), "version 1; expected 2 or 3"),
    "absurdly many tensors": (
        header(NAMED, counts=(HUGE, 1)), f"{HUGE} tensors and 1 keys; at most 100000 and 10000 expected",
    ),
    "many tensors": (header(NAMED, counts=(100_000, 1)), "truncated in the header"),
    "absurdly many keys": (header(NAMED, counts=(0, HUGE)), f"0 tensors and {HUGE} keys"),
    "many keys": (header(NAMED, counts=(0, 10_000)), "truncated in the header"),
    "a long name": (header(struct.pack("<Q", HUGE)), f"truncated in the header: {HUGE} bytes expected at byte 32"),
    "a name of a megabyte": (header(text(bytes(2**20))), "a text of 1048576 bytes at byte 32; at most 65535 expected"),
    "a name of bytes": (header(text(b"\xff\xfe")), "the text at byte 32 is not UTF-8"),
    "no such type": (
        header(KEY + struct.pack("<I", 13)), "llama.block_count has a value of type 13; the format knows 0 to 12",
    ),
    "a long array": (header(KEY + struct.pack("<IIQ", 9, 0, HUGE)), "truncated in the header"),
    "a long array of text": (
        header(KEY + struct.pack("<IIQ", 9, 8, HUGE)),
        f"llama.block_count brings the texts in arrays to {HUGE}; at most 2097152 expected",
    ),
    "many texts": (header(KEY + struct.pack("<IIQ", 9, 8, 2**21)) + bytes(2**24 - 8), "truncated in the header"),
    "an array of arrays": (
        header(KEY + struct.pack("<IIQ", 9, 9, 1)),
        "llama.block_count is an array of type 9; numbers or text expected",
    ),
    "a key twice": (header(NAMED, NAMED), "'general.architecture' appears twice"),
    "an alignment of 3": (
        header(text(b"general.alignment") + struct.pack("<II", 4, 3)),
        "general.alignment is 3; expected a power of two",
    ),
    "no key": (header(), "general.architecture is None; supported are llama"),
    "no dimension": (
        header(NAMED, tensors=text(b"w") + struct.pack("<IIQ", 0, 0, 0)), "'w' has 0 dimensions; 1 to 4 expected",
    ),
    "many dimensions": (
        header(NAMED, tensors=text(b"w") + struct.pack("<I", 2**32 - 1)), "'w' has 4294967295 dimensions",
    ),
    "nothing in it": (
        header(NAMED, tensors=text(b"w") + struct.pack("<IQIQ", 1, 0, 0, 0)),
        r"'w' has sizes \(0,\); numbers above 0 expected",
    ),
    "larger than the file": (
        header(NAMED, tensors=text(b"w") + struct.pack("<IQQIQ", 2, HUGE, HUGE, 0, 0)), "truncated: w ends at byte",
    ),
    "beyond the file": (
        header(NAMED, tensors=text(b"w") + struct.pack("<IQIQ", 1, 4, 0, HUGE)), f"w has offset {HUGE}; expected 0",
    ),
    "half a block": (
        header(NAMED, tensors=text(b"w") + struct.pack("<IQIQ", 1, 33, 8, 0)),
        r"w \(33,\) is Q8_0; expected rows of whole blocks of 32",
    ),
    "an unknown type": (
        header(NAMED, tensors=text(b"w") + struct.pack("<IQIQ", 1, 32, 99, 0)), "w is of type 99, which",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(case, tmp_path):
    data, words = DAMAGED[case]
    (tmp_path / "x.gguf").write_bytes(data)

    def refused() -> str:
        with pytest.raises((CheckpointError, ConfigError), match=words) as caught:
            checkpoints.load(tmp_path / "x.gguf")
        return str(caught.value)

    assert str(tmp_path / "x.gguf") in within(1, refused)


def test_a_tensor_twice_or_out_of_place(tmp_path):
    one = text(b"w") + struct.pack("<IQIQ", 1, 4, 0, 0)
    for second, words in (
        (text(b"w") + struct.pack("<IQIQ", 1, 4, 0, 32), "w appears twice"),
        (text(b"v") + struct.pack("<IQIQ", 1, 4, 0, 0), "v has offset 0; expected 32"),
    ):
        (tmp_path / "x.gguf").write_bytes(header(NAMED, tensors=one + second, counts=(2, 1)) + bytes(200))
        with pytest.raises(CheckpointError, match=words):
            checkpoints.load(tmp_path / "x.gguf")


def test_cut_short_or_flipped_anywhere(made, tmp_path):
    """Whatever a byte of the header says, or wherever the file ends: an error of ours, or a model that was
    planned; and soon."""
    whole, path = made("llama")[0].read_bytes(), tmp_path / "x.gguf"
    end = min(one.start for one in gguf_files.find(made("llama")[0], Asked()).stored.values())

    def harm() -> None:
        draw = np.random.default_rng(0)
        for at in (*draw.integers(0, end, 40), *draw.integers(end, len(whole), 10), len(whole) - 32):
            path.write_bytes(whole[:at])
            with pytest.raises(NanollmError):
                open_source(path)
        for at in draw.integers(0, end, 200):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.integers(8)]) + whole[at + 1 :])
            with contextlib.suppress(NanollmError):
                open_source(path)

    within(10, harm)


def test_truncated_after_it_was_planned(made, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(made("llama")[0].read_bytes())
    stored = gguf_files.find(path, Asked()).stored["output.weight"]
    path.write_bytes(path.read_bytes()[: stored.start + 100])
    with pytest.raises(CheckpointError, match="truncated while it was read: expected 400 bytes, found 100"):
        stored.read_run(0, torch.empty(100))


def test_a_large_vocabulary_is_passed_over(tmp_path):
    """As many tokens and merges as Gemma 3 has, in well under a second."""
    texts = [
        text(f"tokenizer.ggml.{name}".encode()) + struct.pack("<IIQ", 9, 8, count) + text(b"abcdefgh") * count
        for name, count in (("tokens", 262_144), ("merges", 524_288))
    ]
    types = text(b"tokenizer.ggml.token_type") + struct.pack("<IIQ262144i", 9, 5, 262_144, *[1] * 262_144)
    (tmp_path / "x.gguf").write_bytes(header(*texts, types))
    types = within(1, lambda: ours.read_header(tmp_path / "x.gguf")).metadata["tokenizer.ggml.token_type"]
    assert (types.kind, types.count) == (5, 262_144)
