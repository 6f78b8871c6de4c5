"""config.json: every key is read, checked or known to be irrelevant; both dialects say the same; what is written
reads back."""

import dataclasses
import math
import re

import pytest

from checkpoints.families import FAMILIES, TRAINED_HERE, read_config, write_config
from checkpoints.names.config_table import number
from checkpoints.names.reader import Reader
from nanollm.config import (
    MLP,
    Attention,
    DynamicNTK,
    Layer,
    Linear,
    Llama3,
    LongRope,
    Mamba,
    ModelConfig,
    MoE,
    Norm,
    Rope,
    Yarn,
)
from nanollm.errors import ConfigError

SIZES = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6)
MAMBA = dict(model_type="mamba", vocab_size=97, hidden_size=48, num_hidden_layers=3)


def read(model_type="llama", ignore=(), **keys) -> ModelConfig:
    return read_config(dict(model_type=model_type, **SIZES) | keys, ignore=ignore)[1]


def mixer(*args, **keys):
    return read(*args, **keys).layers[0].mixer


# ---- what a missing key means, family by family (the class defaults of transformers 5.23)

def test_defaults():
    norm, silu = Norm(eps=1e-6), MLP(80)
    attention = Attention(6, 6, 8, Rope(10_000.0))
    assert read() == ModelConfig(97, 48, (Layer(attention, silu, norm, None, norm),) * 3, norm, context=2048)
    sizes = dict(num_attention_heads=8)
    assert mixer("mistral", **sizes) == Attention(8, 8, 6, Rope(10_000.0), window=4096)
    assert mixer("mistral", **sizes, sliding_window=None) == Attention(8, 8, 6, Rope(10_000.0))
    mixtral = read("mixtral", **sizes)
    assert mixtral.layers[0] == Layer(
        Attention(8, 8, 6, Rope(1e6)), MoE(8, 2, silu, True), Norm(eps=1e-5), None, Norm(eps=1e-5)
    )
    sizes = dict(num_attention_heads=32, hidden_size=64)
    assert mixer("qwen2", **sizes) == Attention(32, 32, 2, Rope(10_000.0), qkv_bias=True)
    assert mixer("qwen3", **sizes) == Attention(32, 32, 128, Rope(10_000.0), qk_norm=norm)
    contexts = {name: read(name, **sizes).context for name in ("llama", "mistral", "mixtral", "qwen2", "qwen3")}
    assert contexts == {"llama": 2048, "mistral": 131072, "mixtral": 131072, "qwen2": 32768, "qwen3": 32768}
    scan = read_config(MAMBA)[1]
    assert scan.layers[0] == Layer(Mamba(96, 16, 4, 3), None, Norm(eps=1e-5), pre_ffn=None)
    assert scan.tied and scan.float32_residual and scan.context is None


def test_aliases_of_llama():
    assert read("aquila") == read("xverse") == read("Yi") == read("llama")


def test_llama_keys():
    config = read(
        attention_bias=True, mlp_bias=True, head_dim=10, num_key_value_heads=2, hidden_act="gelu_new",
        tie_word_embeddings=True,
    )
    assert config.layers[0].mixer == Attention(6, 2, 10, Rope(), qkv_bias=True, out_bias=True)
    assert config.layers[0].ffn == MLP(80, "gelu_tanh", bias=True) and config.tied


def test_qwen_windows():
    def windows(**keys):
        return [
            layer.mixer.window for layer in read("qwen2", num_hidden_layers=4, num_key_value_heads=2, **keys).layers
        ]

    assert windows(sliding_window=32768, max_window_layers=2) == [None] * 4
    assert windows(use_sliding_window=True, sliding_window=7, max_window_layers=2) == [None, None, 7, 7]
    assert windows(use_sliding_window=True, max_window_layers=3) == [None, None, None, 4096]
    types = ["sliding_attention", "full_attention"] * 2
    assert windows(use_sliding_window=True, sliding_window=7, max_window_layers=0, layer_types=types) == [7, None] * 2
    for bad in (types[:3], ["chunked_attention"] * 4, "full_attention"):
        with pytest.raises(ConfigError, match="layer_types is"):
            windows(use_sliding_window=True, sliding_window=7, layer_types=bad)
    with pytest.raises(ConfigError, match="layer_types is .* expected 4 times full_attention"):
        windows(layer_types=types)                       # sliding, but with no window switched on


def test_mamba_keys():
    hub = dict(
        d_inner=96, d_model=48, n_layer=3, intermediate_size=96, fused_add_norm=True, pad_vocab_size_multiple=8,
        rms_norm=True, ssm_cfg={}, expand=2, time_step_rank="auto", residual_in_fp32=True, time_step_min=0.001,
        use_mambapy=False,
    )
    assert read_config(MAMBA | hub)[1] == read_config(MAMBA)[1]
    assert read_config(MAMBA | dict(hidden_size=50))[1].layers[0].mixer.dt_rank == 4
    other = read_config(MAMBA | dict(time_step_rank=7, use_bias=True, use_conv_bias=False, residual_in_fp32=False))[1]
    assert other.layers[0].mixer == Mamba(96, 16, 4, 7, conv_bias=False, bias=True) and not other.float32_residual
    for key, value in (("d_inner", 100), ("rms_norm", False), ("hidden_act", "gelu"), ("ssm_cfg", {"d_state": 16})):
        with pytest.raises(ConfigError, match=f"{key} is .* which is what is implemented"):
            read_config(MAMBA | {key: value})


# ---- rope: two dialects

SCALED = [
    ("linear", dict(factor=4.0), Linear(4.0)),
    ("dynamic", dict(factor=2.0), DynamicNTK(2.0, 2048)),
    (
        "llama3", dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512),
        Llama3(8.0, 512, 1.0, 4.0),
    ),
    ("yarn", dict(factor=4.0, original_max_position_embeddings=512), Yarn(4.0, 512)),
    ("yarn", dict(factor=4.0), Yarn(4.0, 2048)),
    (
        "yarn", dict(factor=4.0, mscale=0.5, mscale_all_dim=2.0),
        Yarn(4.0, 2048, attention_factor=(1 + 0.05 * math.log(4)) / (1 + 0.2 * math.log(4))),
    ),
    (
        "yarn",
        dict(
            factor=4, original_max_position_embeddings=512, beta_fast=16, beta_slow=None, attention_factor=1.5,
            truncate=False,
        ),
        Yarn(4.0, 512, 16.0, 1.0, False, 1.5),
    ),
    (
        "longrope", dict(short_factor=[1.0] * 4, long_factor=[2, 3, 4, 5], original_max_position_embeddings=512),
        LongRope((1.0,) * 4, (2.0, 3.0, 4.0, 5.0), 512, math.sqrt(1 + math.log(4) / math.log(512))),
    ),
    (
        "longrope",
        dict(
            short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=512, attention_factor=1.1,
            factor=9.0,
        ),
        LongRope((1.0,) * 4, (2.0,) * 4, 512, 1.1),
    ),
]


@pytest.mark.parametrize("kind, keys, scaling", SCALED)
def test_both_dialects(kind, keys, scaling):
    old = read(rope_theta=500_000.0, rope_scaling={"type": kind, **keys})
    new = read(rope_parameters={"rope_theta": 500_000.0, "rope_type": kind, **keys})
    assert old == new and old.layers[0].mixer.rope == Rope(500_000.0, scaling=scaling)


def test_precedence_of_theta():
    """As transformers 5.23: rope_scaling replaces rope_parameters; the base inside the object beats the one
    beside it."""
    assert mixer(rope_theta=55, rope_parameters={"rope_theta": 77, "rope_type": "default"}).rope == Rope(77.0)
    assert mixer(rope_theta=55, rope_scaling={"rope_theta": 77, "type": "linear", "factor": 2}).rope == Rope(
        77.0, scaling=Linear(2.0)
    )
    both = dict(
        rope_scaling={"type": "linear", "factor": 2}, rope_parameters={"rope_theta": 77, "rope_type": "default"}
    )
    assert mixer(**both, rope_theta=55).rope == Rope(55.0, scaling=Linear(2.0))
    assert mixer(rope_theta=55, rope_scaling={}, rope_parameters=None).rope == Rope(55.0)
    with pytest.raises(ConfigError, match="rope_parameters is .* expected rope_theta beside or inside rope_scaling"):
        mixer(**both)                                    # transformers would take 10000 here, which no one meant


def test_su_is_longrope():
    keys = dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=512)
    assert mixer(rope_scaling={"type": "su", **keys}) == mixer(rope_scaling={"type": "longrope", **keys})


ROPES = {
    "unknown": ({"rope_type": "axial"}, "rope_scaling.rope_type is 'axial'; expected default, linear"),
    "not a word": ({"rope_type": ["linear"]}, "rope_type is"),
    "no factor": ({"type": "linear"}, "rope_scaling.factor is missing"),
    "factor of nothing": ({"factor": 2.0}, "rope_scaling.factor = 2.0"),
    "NaN": ({"type": "linear", "factor": math.nan}, "rope_scaling.factor is nan"),
    "negative": ({"type": "linear", "factor": -1.0}, "rope_scaling.factor is -1.0"),
    "text": ({"type": "linear", "factor": "2"}, "rope_scaling.factor is '2'"),
    "unknown key": ({"type": "yarn", "factor": 2.0, "turns": 0.7}, "rope_scaling.turns = 0.7"),
    "one mscale": (
        {"type": "yarn", "factor": 2.0, "mscale": 0.7},
        "rope_scaling.mscale is 0.7; expected mscale and mscale_all_dim together",
    ),
    "partial": ({"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "list of text": ({"type": "longrope", "short_factor": ["1"], "long_factor": [1.0]}, "short_factor is"),
    "lists too short": ({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "LongRope lists of 4"),
    "a list": ([1, 2], "rope_scaling is .* expected an object"),
}


@pytest.mark.parametrize("case", ROPES)
def test_refused_rope(case):
    scaling, cause = ROPES[case]
    with pytest.raises(ConfigError, match=cause):
        read(rope_scaling=scaling)


def test_a_nested_key_can_be_passed_over():
    scaling = {"type": "yarn", "factor": 2.0, "finetuned": True}
    assert mixer(rope_scaling=scaling, ignore=["rope_scaling.finetuned"]).rope.scaling == Yarn(2.0, 2048)


# ---- keys and values that are refused

def test_an_unread_key_is_refused_by_name():
    with pytest.raises(
        ConfigError, match=r"quantization_config = .*new_trick = 3.* --ignore quantization_config --ignore new_trick$"
    ):
        read(quantization_config={"bits": 4}, new_trick=3)
    with pytest.raises(ConfigError, match=r"new_trick = 3\. .*--ignore new_trick$"):
        read(quantization_config={"bits": 4}, new_trick=3, ignore=["quantization_config"])
    assert read(new_trick=3, ignore=["new_trick"]) == read()


def test_irrelevant_keys_change_nothing():
    assert (
        read(
            architectures=["LlamaForCausalLM"], torch_dtype="bfloat16", use_cache=False, attention_dropout=0.1,
            eos_token_id=[1, 2], max_sequence_length=2048, transformers_version="4.31", pretraining_tp=2,
        )
        == read()
    )


WRONG = {
    "hidden_size": (0, -8, 1.5, "48", None, True, math.nan, math.inf, 2**40, [48], 10**400),
    "num_hidden_layers": (0, -1, 1e9, 10**9, None, "3", False),
    "num_attention_heads": (0, 5, -6, "6"),
    "num_key_value_heads": (0, 4, 2.0, 10**9),
    "vocab_size": (0, 10**12, 97.0, None),
    "intermediate_size": (0, 10**12, None, [80]),
    "head_dim": (0, 3, "8"),
    "rms_norm_eps": (0, -1e-6, math.nan, math.inf, "1e-6", None, True, 10**400),
    "rope_theta": (0, 1, -1e4, math.nan, math.inf, None, "1e4"),
    "hidden_act": ("sigmoid", None, 3, ["silu"]),
    "attention_bias": (1, "true", None),
    "tie_word_embeddings": (0, None, "false"),
    "max_position_embeddings": (0, -1, 2048.0, "2048", None),
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in WRONG.items() for value in values])
def test_wrong_values(key, value):
    with pytest.raises(ConfigError) as error:
        read(**{key: value})
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("key", SIZES)
def test_sizes_have_no_default(key):
    values = {name: value for name, value in SIZES.items() if name != key}
    with pytest.raises(ConfigError, match=f"config.json: {key} is missing"):
        read_config(dict(model_type="llama", **values))


def test_counts_are_bounded_by_the_tensors_on_disk():
    values = dict(model_type="mixtral", **SIZES, num_key_value_heads=2)
    read_config(values | dict(num_local_experts=8), most=8)
    with pytest.raises(ConfigError, match="num_local_experts is 9; expected a whole number from 1 to 8"):
        read_config(values | dict(num_local_experts=9), most=8)
    with pytest.raises(ConfigError, match="num_hidden_layers is 11"):
        read_config(values | dict(num_hidden_layers=11), most=8)


def test_unknown_families():
    for kind, near in (
        ("qwen5", "near it are qwen"), (None, "checkpoints.families lists"), (3, "lists"), (["llama"], "lists"),
    ):
        with pytest.raises(ConfigError, match=f"model_type is .*; .*{near}"):
            read(kind)


def test_must():
    reader = Reader({"a": 1, "b": True, "c": 2.0})
    assert reader.must("a", 1) == 1 and reader.must("c", 1.0, 2.0) == 2.0 and reader.must("absent", None) is None
    for key, one in (("a", True), ("b", 1)):             # a boolean is no number, though Python thinks so
        with pytest.raises(ConfigError, match=f"{key} is .* which is what is implemented"):
            reader.must(key, one)


# ---- writing

def decoder(*layers: Layer, **more) -> ModelConfig:
    return ModelConfig(97, 48, layers, **{"context": 64, "final_norm": layers[0].pre_mixer, **more})


ATTENTION, NORM, FFN = Attention(6, 2, 8, Rope(5e5)), Norm(), MLP(80)
PLAIN = Layer(ATTENTION, FFN)
WINDOW = dataclasses.replace(PLAIN, mixer=dataclasses.replace(ATTENTION, window=7))


def change(layer: Layer, **attention) -> Layer:
    return dataclasses.replace(layer, mixer=dataclasses.replace(layer.mixer, **attention))


WRITTEN = {
    "llama": decoder(PLAIN, PLAIN),
    "llama tied, biases": decoder(
        change(Layer(ATTENTION, MLP(80, "gelu_tanh", bias=True)), qkv_bias=True, out_bias=True), tied=True
    ),
    "llama linear": decoder(change(PLAIN, rope=Rope(1e5, scaling=Linear(4.0)))),
    "llama dynamic": decoder(change(PLAIN, rope=Rope(scaling=DynamicNTK(2.0, 64)))),
    "llama llama3": decoder(change(PLAIN, rope=Rope(scaling=Llama3(8.0, 32)))),
    "llama yarn": decoder(change(PLAIN, rope=Rope(scaling=Yarn(4.0, 16, attention_factor=1.2)))),
    "llama longrope": decoder(change(PLAIN, rope=Rope(scaling=LongRope((1.0,) * 4, (2.0,) * 4, 16, 1.2)))),
    "mistral": decoder(WINDOW, WINDOW),
    "mixtral": decoder(Layer(ATTENTION, MoE(4, 2, FFN, True))),
    "qwen2": decoder(change(PLAIN, qkv_bias=True), change(WINDOW, qkv_bias=True), tied=True),
    "qwen3": decoder(change(PLAIN, qk_norm=NORM), change(WINDOW, qk_norm=NORM), change(PLAIN, qk_norm=NORM)),
    "mamba": decoder(Layer(Mamba(96, 16, 4, 3), None, pre_ffn=None), context=None, tied=True),
    "mamba float32": decoder(Layer(Mamba(96, 16, 4, 3), None, pre_ffn=None), context=None, float32_residual=True),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_the_first_family_that_can_say_it_writes_it(case):
    family, values = write_config(WRITTEN[case])
    assert family.name == case.split()[0] == values["model_type"]
    assert read_config(values)[1] == WRITTEN[case]
    old = {key: value for key, value in values.items() if key not in ("rope_parameters", "layer_types")}
    new = {key: value for key, value in values.items() if key not in ("rope_theta", "rope_scaling")}
    assert read_config(new)[1] == WRITTEN[case]
    if len({layer.mixer for layer in WRITTEN[case].layers}) < 3 and family.name != "qwen3":
        assert read_config(old)[1] == WRITTEN[case]      # each dialect stands alone, where the old one can say it


REFUSED = {
    "no context": (decoder(PLAIN, context=None), "llama: as llama: max_position_embeddings is None"),
    "layers that differ": (
        decoder(PLAIN, WINDOW), r"llama: config.layers\[1\].mixer.window is 7, and would be read as None",
    ),
    "two windows": (
        decoder(WINDOW, change(WINDOW, window=9)),
        r"mistral: config.layers\[1\].mixer.window is 9, and would be read as 7",
    ),
    "hybrid": (
        decoder(PLAIN, Layer(Mamba(96, 16, 4, 3), None, pre_ffn=None)),
        r"llama: layers\[1\].mixer is Mamba, not Attention",
    ),
    "interleaved": (
        decoder(change(PLAIN, rope=Rope(layout="interleaved"), out_bias=True)),
        "layout is 'interleaved', and would be read as 'half'",
    ),
    "no rope": (decoder(change(PLAIN, rope=None)), "rope is None"),
    "soft cap": (decoder(change(PLAIN, softcap=50.0)), "softcap is 50.0, and would be read as None"),
    "sandwich": (decoder(dataclasses.replace(PLAIN, post_ffn=NORM)), "post_ffn is .* and would be read as None"),
    "float32 residual": (decoder(PLAIN, float32_residual=True), "float32_residual is True, and would be read as False"),
    "two eps": (decoder(PLAIN, final_norm=Norm(eps=1e-3)), "eps is 1e-06, and would be read as 0.001"),
    "shared expert": (decoder(Layer(ATTENTION, MoE(4, 2, FFN, True, shared=FFN))), "mixtral: .*shared is"),
    "mamba of odd width": (decoder(Layer(Mamba(100, 16, 4, 3), None, pre_ffn=None)), "mamba: inner width .100. is no"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_family_can_say_is_refused_with_the_reason(case):
    config, cause = REFUSED[case]
    with pytest.raises(ConfigError, match="no family can express this model") as error:
        write_config(config)
    text = str(error.value)
    assert re.search(cause, text), text
    assert all(f"\n  {name}: " in text for name in TRAINED_HERE)


def test_a_misspelt_field_of_a_table_is_an_error():
    """It would be set nowhere, and the logits would be wrong in silence."""
    with pytest.raises(AssertionError, match="mixer.softcup: no part of a config has a field 'softcup'"):
        number("mixer.softcup", missing=None)
    with pytest.raises(AssertionError, match="Layer has no field mixer.skale here"):
        FAMILIES["llama"].but("mine", layer={"mixer.skale": 3.0})
    with pytest.raises(AssertionError, match="Layer has no field mixer.qk_norm.eps here"):
        FAMILIES["llama"].but("mine", layer={"mixer.qk_norm.eps": 1e-3})  # there is no such norm to have an epsilon
