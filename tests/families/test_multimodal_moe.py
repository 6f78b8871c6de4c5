"""Multimodal folders around a mixture of experts: the text model is loaded, and saved as one.

The oracle is transformers' multimodal class, given text.
"""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import checkpoints
from checkpoints.families import read_config
from nanollm.config import MLP, Attention, Layer, ModelConfig, MoE, Norm, Rope
from nanollm.errors import ConfigError
from tests.fixtures.deepseek import LATENT, YARN, corrections
from tests.oracles import difference, make_loud, rope

TEXT = dict(vocab_size=131, hidden_size=64, intermediate_size=96, rms_norm_eps=1e-2, max_position_embeddings=128)
TOWER = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2)
MODELS = {
    "kimi_k25": dict(
        tie_word_embeddings=False,
        text_config=TEXT | LATENT | rope("yarn", 5e4, **YARN, mscale=1.0, mscale_all_dim=1.0)
        | dict(model_type="deepseek_v3", n_group=1, topk_group=1, n_shared_experts=1),
        vision_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_hidden_size=16
        ),
    ),
    "qwen3_vl_moe": dict(
        text_config=TEXT | dict(
            num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, head_dim=12, num_experts=6,
            num_experts_per_tok=3, moe_intermediate_size=40, mlp_only_layers=[1], tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 5e6, "mrope_section": [3, 2, 1],
                             "mrope_interleaved": True},
        ),
        vision_config=TOWER | dict(out_hidden_size=64, deepstack_visual_indexes=[0]),
    ),
    "llama4": dict(
        text_config=TEXT | rope("default", 5e5) | dict(
            num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, head_dim=12, num_local_experts=4,
            attention_chunk_size=11, floor_scale=6, intermediate_size_mlp=56, interleave_moe_layer_step=2,
        ),
        vision_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8,
            patch_size=4, vision_output_dim=16, projector_input_dim=16, projector_output_dim=16,
        ),
    ),
}
TEXT_TYPE = {"kimi_k25": "deepseek_v3", "qwen3_vl_moe": "qwen3_moe", "llama4": "llama4_text"}


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    """(kind, folder as the hub has it, transformers' model, ours)"""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = transformers.AutoModelForImageTextToText.from_config(
        transformers.AutoConfig.for_model(request.param, **MODELS[request.param]),
        attn_implementation="eager", experts_implementation="eager",
    ).eval()
    make_loud(theirs)
    with torch.no_grad():
        corrections(theirs)
    theirs.save_pretrained(folder)
    path = folder / "model.safetensors"
    stored = {  # transformers 5.23 writes Kimi's layers as language_model.model.blocks, a name of the tower's
        name.replace("language_model.model.blocks.", "language_model.model.layers."): tensor
        for name, tensor in load_file(path).items()
    }
    save_file(stored, path, {"format": "pt"})
    with pytest.warns(UserWarning, match="left out: "):
        return request.param, folder, theirs, checkpoints.load(folder)


@pytest.mark.parametrize("length", [1, 48])
@torch.inference_mode()
def test_text_alone_gives_the_same_logits(case, length):
    x = torch.randint(4, 120, (2, length), generator=torch.Generator().manual_seed(1))
    assert difference(case[3](x), case[2](x, use_cache=False).logits) < 1e-5


@torch.inference_mode()
def test_what_is_saved_is_a_text_model(case, tmp_path):
    kind, _, theirs, ours = case
    checkpoints.save(ours, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["model_type"] == TEXT_TYPE[kind] and not [key for key in values if "vision" in key or "image" in key]
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "vis" in name or "mm_" in name]
    text, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    x = torch.randint(4, 120, (2, 48), generator=torch.Generator().manual_seed(2))
    assert difference(text(x, use_cache=False).logits, theirs(x, use_cache=False).logits) < 1e-5
    assert checkpoints.load(tmp_path).config == ours.config


def test_turned_experts_are_told_by_their_shape(case, tmp_path):
    """The hub has Qwen3-VL's experts (E, D, 2F), transformers writes (E, 2F, D) under the same names."""
    kind, folder, _, ours = case
    if kind != "qwen3_vl_moe":
        return
    stored = load_file(folder / "model.safetensors")
    turned = {name: tensor.transpose(1, 2).contiguous() if "experts." in name else tensor
              for name, tensor in stored.items()}
    save_file(turned, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.warns(UserWarning, match="left out: "):
        again = checkpoints.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


INNER = dict(vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=6)
QWEN = INNER | dict(model_type="qwen3_vl_moe_text", num_key_value_heads=2, tie_word_embeddings=False)
KIMI = INNER | dict(model_type="kimi_k2", intermediate_size=80)


def read(kind: str, text: object, **more) -> ModelConfig:
    return read_config(dict(model_type=kind, text_config=text, vision_config={"depth": 1}) | more)[1]


def test_what_a_missing_key_means_in_qwen3_vl():
    config = read("qwen3_vl_moe", QWEN, image_token_id=3)
    attention = Attention(6, 2, 8, Rope(500_000.0), qk_norm=Norm())
    layer = Layer(attention, MoE(60, 4, MLP(1408), True, round_weights=True))
    assert config == ModelConfig(97, 48, (layer,) * 2, context=128000)


REFUSED = {
    "no text": ("kimi_k25", None, {}, "text_config is None; expected an object"),
    "another text model": ("kimi_k25", KIMI | {"model_type": "llama"}, {}, "text_config.model_type is 'llama'"),
    "an unknown key inside": ("kimi_k25", KIMI | {"new_trick": 3}, {}, "text_config.new_trick = 3"),
    "an unknown key outside": ("qwen3_vl_moe", QWEN, {"new_trick": 3}, "new_trick = 3"),
    "tied here and not there": (
        "qwen3_vl_moe", QWEN, {"tie_word_embeddings": True}, "tie_word_embeddings is True; expected False",
    ),
    "not renormalised": ("qwen3_vl_moe", QWEN | {"norm_topk_prob": False}, {}, "norm_topk_prob is False"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    kind, text, more, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        read(kind, text, **more)
