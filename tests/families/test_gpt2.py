"""GPT-2 and gpt_bigcode: learned positions and their end, folders as the hub has them, what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
from checkpoints.families import read_config, write_config
from nanollm.cache import Cache
from nanollm.config import MLP, Attention, Layer, ModelConfig, Norm
from nanollm.errors import ConfigError, InputError
from nanollm.inference.generation import Session, generate, generate_batch
from nanollm.model import Decoder
from tests.fixtures import FIXTURES
from tests.oracles import difference, tokens, write

NORM = Norm("layer", 1e-5, bias=True)
SMALL = ModelConfig(
    50, 32,
    (Layer(Attention(4, 4, 8, qkv_bias=True, out_bias=True), MLP(64, "gelu_tanh", False, True), NORM, pre_ffn=NORM),)
    * 2,
    NORM, tied=True, context=12, positions=12,
)


MEDIUM = dict(
    model_type="gpt2", activation_function="gelu_new", architectures=["GPT2LMHeadModel"], attn_pdrop=0.1,
    embd_pdrop=0.1, initializer_range=0.02, layer_norm_epsilon=1e-5, n_ctx=1024, n_embd=1024, n_head=16, n_layer=24,
    n_positions=1024, n_special=0, predict_special_tokens=True, resid_pdrop=0.1, summary_activation=None,
    summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True,
    vocab_size=50257,
)
STARCODER = dict(
    model_type="gpt_bigcode", activation_function="gelu", attention_softmax_in_fp32=True, multi_query=True,
    attn_pdrop=0.1, embd_pdrop=0.1, inference_runner=0, layer_norm_epsilon=1e-5, max_batch_size=None,
    max_sequence_length=None, n_embd=6144, n_head=48, n_inner=24576, n_layer=40, n_positions=8192,
    pad_key_length=True, pre_allocate_kv_cache=False, resid_pdrop=0.1, scale_attention_softmax_in_fp32=True,
    scale_attn_weights=True, summary_type="cls_index", validate_runner_input=True, vocab_size=49152,
)


def read(base: dict, **keys) -> ModelConfig:
    return read_config(base | keys)[1]


def test_published_sizes():
    medium, starcoder = read(MEDIUM), read(STARCODER)
    assert (
        medium.layers
        == (
            Layer(
                Attention(16, 16, 64, qkv_bias=True, out_bias=True), MLP(4096, "gelu_tanh", False, True), NORM,
                pre_ffn=NORM,
            ),
        )
        * 24
    )
    assert (medium.vocab, medium.dim, medium.positions, medium.context, medium.tied, medium.final_norm) == (
        50257, 1024, 1024, 1024, True, NORM,
    )
    assert (
        starcoder.layers[0].mixer == Attention(48, 1, 128, qkv_bias=True, out_bias=True)
        and starcoder.layers[0].ffn.hidden == 24576
    )
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(medium).parameters()) == 354_823_168
        assert sum(p.numel() for p in Decoder(starcoder).parameters()) == 15_517_456_384
    general = dict(hidden_size=1024, num_attention_heads=16, num_hidden_layers=24, max_position_embeddings=1024)
    assert (
        read(
            {
                key: value
                for key, value in (MEDIUM | general).items()
                if key not in ("n_embd", "n_head", "n_layer", "n_positions")
            }
        )
        == medium
    )
    with pytest.raises(ConfigError, match="hidden_size is 512; expected 1024"):
        read(MEDIUM, hidden_size=512)


def test_masks_among_the_tensors_are_passed_over_and_the_prefix_need_not_be_there(tmp_path):
    write(FIXTURES["gpt2"], tmp_path / "in")
    tensors = load_file(tmp_path / "in/model.safetensors")
    assert "wte.weight" in tensors and "h.0.attn.c_attn.weight" in tensors
    masks = {
        f"h.{i}.attn.{name}": mask
        for i in range(3)
        for name, mask in (("bias", torch.ones(1, 1, 90, 90)), ("masked_bias", torch.tensor(-1e4)))
    }
    save_file(tensors | masks, tmp_path / "in/model.safetensors", {"format": "pt"})
    model = checkpoints.load(tmp_path / "in")
    checkpoints.save(model, tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors").keys() == tensors.keys()
    prefixed = {f"transformer.{name}": tensor for name, tensor in (tensors | masks).items()}
    save_file(prefixed, tmp_path / "in/model.safetensors", {"format": "pt"})
    assert torch.equal(checkpoints.load(tmp_path / "in").layers[1].mixer.k.weight, model.layers[1].mixer.k.weight)


def test_each_layer_has_its_scale():
    def scales(**keys):
        return [layer.mixer.scale for layer in read(MEDIUM, n_layer=3, **keys).layers]
    assert scales(scale_attn_by_inverse_layer_idx=True) == [None, 1 / 16, 1 / 24]
    assert scales(scale_attn_weights=False) == [1.0] * 3
    assert scales(scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True) == [1.0, 1 / 2, 1 / 3]
    assert scales(scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True, n_head=256) == [
        1.0, None, 1 / 3,
    ]  # 1/2 is 1/√4


@pytest.mark.parametrize("base", [MEDIUM, STARCODER], ids=["gpt2", "gpt_bigcode"])
@pytest.mark.parametrize(
    "keys",
    [{}, {"scale_attn_weights": False}, {"tie_word_embeddings": False, "n_inner": 77, "activation_function": "relu2"}],
)
def test_what_is_written_reads_back(base, keys):
    family, config = read_config(base | keys)
    assert read_config(write_config(config, family)[1])[1] == config
    for other in ({"scale_attn_by_inverse_layer_idx": True} if base is MEDIUM else {"multi_query": False},):
        family, config = read_config(base | keys | other)
        assert read_config(write_config(config, family)[1])[1] == config


@pytest.mark.parametrize(
    "base, keys, complaint",
    [
        (MEDIUM, {"add_cross_attention": True}, "add_cross_attention is True; expected False"),
        (
            MEDIUM, {"attention_head_type": "multiquery"},
            "attention_head_type is 'multiquery'; expected 'multihead'",
        ),  # SantaCoder's first upload
        (MEDIUM, {"activation_function": "mish"}, "activation_function is 'mish'"),
        (MEDIUM, {"n_head": 5}, r"n_head is 5; expected a divisor of the model's width \(1024\)"),
        (MEDIUM, {"n_positions": None}, "n_positions is None"),
        (MEDIUM, {"rope_theta": 1e4}, "nothing here knows what these mean: rope_theta"),
        (STARCODER, {"num_key_value_heads": 2}, "num_key_value_heads is 2; expected 1"),
        (
            STARCODER, {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is True; expected False",
        ),
        (STARCODER, {"multi_query": 1}, "multi_query is 1; expected true or false"),
    ],
)
def test_refusals(base, keys, complaint):
    with pytest.raises(ConfigError, match=complaint):
        read(base, **keys)


def test_a_model_trained_here_is_exported_as_gpt2_and_nothing_else_is(tmp_path):
    checkpoints.save(Decoder(SMALL), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "gpt2"
    assert checkpoints.load(tmp_path / "out").config == SMALL
    with pytest.raises(ConfigError, match="gpt2: .*n_positions is None"):
        write_config(ModelConfig(50, 32, SMALL.layers, NORM, tied=True, context=12))


# ---- the end of the table of positions

def test_a_sequence_past_the_last_position_is_refused():
    model = Decoder(SMALL).eval().requires_grad_(False)
    x = tokens(FIXTURES["gpt2"], 2, 13) % 50
    assert model(x[:, :12]).isfinite().all()
    with pytest.raises(
        InputError,
        match=r"the model has 12 positions, from 0 to 11; it cannot read a longer sequence \(row 0, token 12\)",
    ):
        model(x)
    packed = torch.arange(13).remainder(7).expand(2, 13)  # two documents, each of them short enough
    assert difference(model(x, packed)[:, 7:], model(x[:, 7:])) < 1e-6


@pytest.mark.parametrize("ragged", [False, True])
def test_a_cache_is_as_it_was_after_a_refusal(ragged):
    model = Decoder(SMALL).eval().requires_grad_(False)
    x = tokens(FIXTURES["gpt2"], 2, 14) % 50
    places = (lambda begin, end: torch.arange(begin, end).expand(2, -1)) if ragged else lambda begin, end: None
    cache = Cache(SMALL, 2, 40)
    model(x[:, :10], places(0, 10), cache)
    with pytest.raises(InputError, match="the model has 12 positions, from 0 to 11; position 13 was fed"):
        model(x[:, 10:], places(10, 14), cache)
    assert difference(model(x[:, 10:12], places(10, 12), cache), model(x[:, :12])[:, 10:]) < 1e-6


def test_generation_says_so_before_it_begins():
    model = Decoder(SMALL).eval()
    assert len(list(generate(model, [1, 2, 3], 10))) == 10  # 13 tokens, of which the last is not read
    message = "may be 14 long together, and the model has 12 positions; ask for at most 13"
    for ask in (
        lambda: generate(model, [1, 2, 3], 11), lambda: generate_batch(model, [[1], [1, 2, 3]], 11),
        lambda: Session(model, 14),
    ):
        with pytest.raises(InputError, match=message):
            ask()
