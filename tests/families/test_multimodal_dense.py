"""Folders of Mistral-Small-3.1, Ministral 3, Mistral Small 4 and Qwen3-VL: the text model is loaded, and saved as one.

The oracle is transformers' multimodal class, given text.
"""

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import checkpoints
from checkpoints.families import read_config
from nanollm.config import Attention, LogSteps, Norm, Rope, Yarn
from nanollm.errors import ConfigError
from tests.fixtures.deepseek import LATENT
from tests.fixtures.ministral3 import GROWS
from tests.fixtures.mistral4 import GROWS as GROWS_IN_4
from tests.oracles import difference, make_loud, rope

TEXT = dict(
    vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, head_dim=12, rms_norm_eps=1e-2, max_position_embeddings=128,
)
PIXTRAL = dict(
    model_type="pixtral", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
    image_size=8, patch_size=4,
)
QWEN_TOWER = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=64,
                  deepstack_visual_indexes=[0], num_position_embeddings=16)
MODELS = {  # name → transformers' model_type, its config, the class that is saved
    "mistral-small-3.1": ("mistral3", dict(
        tie_word_embeddings=False, vision_config=PIXTRAL,
        text_config=TEXT | rope("default", 1e9) | dict(model_type="mistral", sliding_window=None)), "mistral"),
    "ministral-3": ("mistral3", dict(
        tie_word_embeddings=True, vision_config=PIXTRAL,
        text_config=TEXT | GROWS | dict(model_type="ministral3", sliding_window=None)), "ministral3"),
    "mistral-small-4": ("mistral3", dict(
        tie_word_embeddings=False, vision_config=PIXTRAL,
        text_config=TEXT | LATENT | GROWS_IN_4 | dict(model_type="mistral4", head_dim=28)), "mistral4"),
    "qwen3-vl": ("qwen3_vl", dict(
        vision_config=QWEN_TOWER, tie_word_embeddings=False,
        text_config=TEXT | rope("default", 5e6, mrope_section=[3, 2, 1], mrope_interleaved=True)), "qwen3"),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    """(name, folder, transformers' model, ours)"""
    folder, (kind, keys, _) = tmp_path_factory.mktemp(request.param), MODELS[request.param]
    theirs = transformers.AutoModelForImageTextToText.from_config(
        transformers.AutoConfig.for_model(kind, **keys), attn_implementation="eager").eval()
    make_loud(theirs)
    theirs.save_pretrained(folder)
    with pytest.warns(UserWarning, match="left out: .*(vision_tower|visual)"):
        return request.param, folder, theirs, checkpoints.load(folder)


@pytest.mark.parametrize("length", [1, 48])
@torch.inference_mode()
def test_text_alone_gives_the_same_logits(case, length):
    x = torch.randint(4, 120, (2, length), generator=torch.Generator().manual_seed(1))
    assert difference(case[3](x), case[2](x, use_cache=False).logits) < 1e-5


@torch.inference_mode()
def test_what_is_saved_is_a_text_model(case, tmp_path):
    name, _, theirs, ours = case
    checkpoints.save(ours, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["model_type"] == MODELS[name][2] and not [key for key in values if "vision" in key or "image" in key]
    text, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    x = torch.randint(4, 120, (2, 48), generator=torch.Generator().manual_seed(2))
    assert difference(text(x, use_cache=False).logits, theirs(x, use_cache=False).logits) < 1e-5
    assert checkpoints.load(tmp_path).config == ours.config


def test_the_other_names_are_read_too(case, tmp_path):
    """Those of the modules, where the folder has the hub's, or the other way round."""
    name, folder, _, ours = case
    pairs = {
        "mistral3": (("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head"),
                     ("vision_tower.", "model.vision_tower."), ("multi_modal", "model.multi_modal")),
        "qwen3_vl": (("model.language_model.", "model."), ("model.visual.", "visual.")),
    }[MODELS[name][0]]
    stored = load_file(folder / "model.safetensors")
    for old, new in pairs:
        stored = {new + key.removeprefix(old) if key.startswith(old) else key: one for key, one in stored.items()}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.warns(UserWarning, match="left out"):
        again = checkpoints.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


INNER = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6)


def read(kind: str, text: object, **more):
    return read_config(dict(model_type=kind, text_config=text, vision_config={"depth": 1}) | more)[1]


def test_what_a_missing_key_means():
    mistral = read("mistral3", INNER | {"num_key_value_heads": 2})                  # no model_type inside: a Mistral
    assert mistral.layers[0].mixer == Attention(6, 2, 8, Rope(), 4096) and not mistral.tied
    grown = read("mistral3", INNER | {"model_type": "ministral3", "num_key_value_heads": 2})
    assert grown.layers[0].mixer == Attention(
        6, 2, 128, Rope(1e6, scaling=Yarn(16.0, 16384, attention_factor=1.0)), growth=LogSteps(16384, 0.1))
    assert (grown.context, grown.final_norm.eps, grown.tied) == (262144, 1e-5, False)
    qwen = read("qwen3_vl", INNER | {"model_type": "qwen3_vl_text", "num_key_value_heads": 2})
    assert qwen.layers[0].mixer == Attention(6, 2, 128, Rope(5e5), qk_norm=Norm()) and qwen.context == 128000


def test_a_missing_object_means_the_published_rope_of_mistral_4():
    config = read_config(INNER | dict(model_type="mistral4", num_key_value_heads=6))[1]
    mixer = config.layers[0].mixer
    assert mixer.rope == Rope(1e4, "interleaved", scaling=Yarn(128.0, 8192, attention_factor=1.0))
    assert mixer.growth == LogSteps(8192, 0.1) and mixer.scale == 128**-0.5 * (0.1 * math.log(128.0) + 1) ** 2
    with pytest.raises(ConfigError, match="partial_rotary_factor is 1.0; expected 0.5"):
        read_config(INNER | dict(model_type="mistral4", num_key_value_heads=6, rope_parameters={
            "rope_type": "yarn", "factor": 2.0, "partial_rotary_factor": 1.0}))


def test_a_head_is_tied_where_it_is_said():
    inside = INNER | {"model_type": "ministral3", "num_key_value_heads": 2, "tie_word_embeddings": True}
    assert read("mistral3", inside).tied and not read("mistral3", inside, tie_word_embeddings=False).tied


REFUSED = {
    "no text": ("mistral3", None, "text_config is None; expected an object"),
    "another text model": ("mistral3", INNER | {"model_type": "llama"}, "text_config.model_type is 'llama'"),
    "an unknown key": ("mistral3", INNER | {"num_key_value_heads": 2, "trick": 3}, "text_config.trick = 3"),
    "no growth": ("mistral3", INNER | {"model_type": "ministral3", "rope_parameters": {
        "rope_type": "default", "original_max_position_embeddings": 9}}, "llama_4_scaling_beta is missing"),
    "another Qwen": ("qwen3_vl", INNER | {"model_type": "qwen2_vl_text"}, "text_config.model_type is 'qwen2_vl_text'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    kind, text, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        read(kind, text)
