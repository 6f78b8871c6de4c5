"""The dense Llama-like families of 2022 to 2026: what their keys mean and which are refused; MiMo's spare layer."""

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
from checkpoints.families import FAMILIES, read_config, write_config
from nanollm.config import Attention, Llama3, LongRope, Norm, Positions, Rope
from nanollm.errors import ConfigError
from tests.fixtures import FIXTURES
from tests.oracles import write

SIZES = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=6,
    num_key_value_heads=2,
)
GPTJ = dict(model_type="gptj", vocab_size=97, n_embd=48, n_layer=2, n_head=4, rotary_dim=6)
OPT = dict(model_type="opt", vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, ffn_dim=80)
NEO = dict(model_type="gpt_neo", vocab_size=97, hidden_size=48, num_layers=2, num_heads=4,
           attention_types=[[["global", "local"], 1]])


def read(kind: str, **keys):
    return read_config({"model_type": kind, **SIZES, **keys})[1]


def windows(config) -> list[int | None]:
    return [layer.mixer.window for layer in config.layers]


def rotated(config) -> list[bool]:
    return [layer.mixer.rope is not None for layer in config.layers]


def test_which_layers_slide_and_which_rotate():
    assert rotated(read("smollm3")) == [True, True, True, False]
    assert rotated(read("smollm3", no_rope_layer_interval=2)) == [True, False, True, False]
    slides = read("smollm3", no_rope_layers=[0, 1, 1, 0], use_sliding_window=True, sliding_window=9)
    assert (rotated(slides), windows(slides)) == ([False, True, True, False], [9, None, None, 9])
    assert windows(read("olmo3")) == [4096, 4096, 4096, None]
    assert windows(read("ministral")) == [4096] * 4 and windows(read("ministral", sliding_window=None)) == [None] * 4
    assert windows(read("cwm")) == [None, 8192, 8192, 8192]
    local = read("exaone4", sliding_window_pattern="LG", num_hidden_layers=3)
    assert (windows(local), rotated(local)) == ([4096, None, None], [True, False, False])
    assert rotated(read("exaone4", sliding_window=None)) == [True] * 4


def test_the_factors_of_granite_and_its_kin():
    swash = read("granite_swa", layer_rope_theta=[0, 1e4, 500, 1e4])
    assert (windows(swash), rotated(swash)) == ([None, 128, 128, 128], [False, True, True, True])
    assert swash.layers[0].mixer.sinks and swash.layers[2].mixer.rope.theta == 500.0
    clova, plain = read("hyperclovax", logits_scaling=0.5), read("hyperclovax", use_post_norm=False)
    assert (clova.head_scale, clova.layers[0].mixer.scale, clova.layers[0].post_ffn) == (0.5, None, Norm())
    assert (plain.layers[0].post_mixer, plain.layers[0].post_ffn) == (None, None)
    assert read("granite", logits_scaling=8).head_scale == 1 / 8 and read("granite").layers[0].mixer.scale == 1.0


def test_ropes_that_other_keys_decide():
    assert read("cwm").layers[0].mixer.rope == Rope(1e6, scaling=Llama3(16.0, 8192))
    assert read("apertus").layers[0].mixer.rope == Rope(12e6, scaling=Llama3(8.0, 8192))
    for kind in (None, 4096):                                # as published, one base for both kinds of layers
        bases = {layer.mixer.rope.theta for layer in read("olmo3", rope_theta=1e6).layers
                 if layer.mixer.window == kind}
        assert bases == {1e6}
    hunyuan = read("hunyuan_v1_dense", rope_theta=1e4, rope_scaling={"type": "dynamic", "alpha": 1000.0, "factor": 1.0})
    assert hunyuan.layers[0].mixer.rope == Rope(1e4 * 1000.0 ** (8 / 6))


@pytest.mark.parametrize("width, head", [(30, 44), (62, 78), (6, 12)])
def test_a_rotary_dim_comes_out_whole(width, head):
    """30 / 44 of 44 is 29.999… in floats."""
    values = GPTJ | {"n_embd": 4 * head, "rotary_dim": width}
    config = read_config(values)[1]
    assert int(head * config.layers[0].mixer.rope.fraction) == width
    assert write_config(config, FAMILIES["gptj"])[1]["rotary_dim"] == width


def test_the_factors_of_minicpm():
    config = read("minicpm", scale_emb=12, scale_depth=1.4, dim_model_base=16, mup_denominator=32)
    assert (config.embed_scale, config.layers[0].residual_scale, config.head_scale) == (12.0, 1.4 / 2, 1 / 3)
    values = write_config(config, FAMILIES["minicpm"])[1]
    assert (values["scale_depth"], values["dim_model_base"]) == (1.4, 16)
    deep = read("minicpm", scale_depth=1.4, num_hidden_layers=3)
    assert deep.layers[0].residual_scale == 1.4 / math.sqrt(3)
    assert write_config(deep, FAMILIES["minicpm"])[1]["scale_depth"] == 1.4


def test_longrope_of_minicpm4():
    rope = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4)
    config = read("minicpm", rope_scaling=rope | {"original_max_position_embeddings": 32}, max_position_embeddings=32)
    assert config.layers[0].mixer.rope.scaling == LongRope((1.0,) * 4, (2.0,) * 4, 32)


def test_a_config_without_a_model_type_goes_by_its_class():
    values = {"architectures": ["Exaone4ForCausalLM"], **SIZES}
    assert read_config(values)[1] == read("exaone4")
    with pytest.raises(ConfigError, match="model_type is None"):
        read_config({"architectures": ["NoSuchForCausalLM"], **SIZES})


def test_gpt_neo_says_its_windows_three_times():
    config = read_config(NEO | {"attention_layers": ["global", "local"], "window_size": 8})[1]
    assert config.layers[1].mixer == Attention(4, 4, 12, window=8, out_bias=True, scale=1.0)


def test_opt_has_two_rows_before_position_0():
    config = read_config(OPT | {"max_position_embeddings": 30})[1]
    assert (config.positions, config.context, config.final_norm.eps) == (Positions(32, 2), 30, 1e-5)
    plain = read_config(OPT | {"layer_norm_elementwise_affine": False, "enable_bias": False})[1]
    assert plain.final_norm == plain.layers[0].pre_ffn == Norm("layer", eps=1e-5, gain=False)
    assert write_config(config, FAMILIES["opt"])[1]["max_position_embeddings"] == 30


def test_biogpt_and_gpt_neox_japanese():
    sizes = dict(vocab_size=97, hidden_size=48, num_hidden_layers=3, num_attention_heads=4)
    config = read_config(sizes | dict(model_type="biogpt", intermediate_size=80, layer_norm_eps=1e-12))[1]
    assert (config.embed_scale, config.positions, config.final_norm.eps) == (48**0.5, Positions(1026, 2), 1e-5)
    config = read_config(sizes | dict(model_type="gpt_neox_japanese"))[1]
    assert [layer.mixer.out_bias for layer in config.layers] == [False, False, True]
    assert config.tied and config.layers[0].ffn.hidden == 192 and not config.layers[0].mixer.qkv_bias
    biased = dataclasses.replace(config, layers=config.layers[::-1])
    with pytest.raises(ConfigError, match="out_bias"):
        write_config(biased, FAMILIES["gpt_neox_japanese"])


REFUSED = {
    "a short list": ("smollm3", dict(no_rope_layers=[1, 0]), "no_rope_layers is .*; expected 4 times 0 or 1"),
    "no list of layers": ("ministral", dict(layer_types=["chunked_attention"] * 4), "layer_types is"),
    "a pattern of other letters": ("exaone4", dict(sliding_window_pattern="LX"), "sliding_window_pattern is 'LX'"),
    "experts": ("minicpm", dict(num_experts=8), "num_experts is 8; expected 0"),
    "sparse attention": ("minicpm", dict(sparse_config={"topk": 64}), "sparse_config"),
    "a theta beside none": ("cwm", dict(rope_theta=5e5), "rope_theta is 500000.0; expected 1000000.0"),
    "a base that is none": ("granite_swa", dict(layer_rope_theta=[1e4, 1e4, False, 1e4]), "layer_rope_theta is"),
    "clipping": ("iquestcoder", dict(clip_qkv=8.0), "clip_qkv is 8.0; expected None"),
    "shared keys of layers": ("hunyuan_v1_dense", dict(use_cla=True), "use_cla is True; expected False"),
    "an alpha without dynamic": (
        "hunyuan_v1_dense", dict(rope_scaling={"type": "linear", "alpha": 2.0}), "type is 'linear'; expected 'dynamic'",
    ),
    "no biases": ("mimo", dict(attention_bias=False), "attention_bias is False; expected True"),
    "latent heads": ("minicpm3", {}, "num_key_value_heads is 2; expected 6"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    kind, keys, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        read(kind, **keys)


@pytest.mark.parametrize("values, words", [
    (OPT | {"do_layer_norm_before": False}, "do_layer_norm_before is False; expected True"),
    (OPT | {"word_embed_proj_dim": 24}, "word_embed_proj_dim is 24; expected 48 or None"),
    (OPT | {"scale_embeddings": True}, "scale_embeddings is True"),
    (GPTJ | {"rotary_dim": 14}, r"rotary_dim is 14; expected at most the width of a head \(12\)"),
    (GPTJ | {"rotary_dim": None}, "rotary_dim is None; expected a whole number"),
    (GPTJ | {"rotary": False}, "rotary is False"),
    (GPTJ | {"model_type": "codegen", "n_head": 6, "rotary_dim": 4}, "n_head is 6; expected a multiple of 4"),
    (NEO | {"attention_types": [[["global"], 3]]}, "attention_types is .*; expected .* 2 kinds in all"),
    (NEO | {"attention_types": "local"}, "attention_types is 'local'"),
    (NEO | {"attention_layers": ["local", "local"]}, "attention_layers is"),
])
def test_refused_in_keys_of_their_own(values, words):
    with pytest.raises(ConfigError, match=words):
        read_config(values)


def test_the_layer_for_the_token_after_the_next_one_is_left_out(tmp_path):
    write(FIXTURES["mimo-7b"], tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    spare = {f"model.mtp_layers.0.{name}": torch.zeros(4, 4) for name in ("input_proj.weight", "mlp.up_proj.weight")}
    save_file(stored | spare, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"left out: model.mtp_layers.0.… \(2 tensors"):
        assert len(checkpoints.load(tmp_path).layers) == 3
