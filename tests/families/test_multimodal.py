"""Gemma-3, Qwen-VL and Qwen3.5 folders: the language model is loaded, and a warning says what was left out; what is
saved is a text model.

The oracle is transformers' multimodal class, given text.
"""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import checkpoints
from checkpoints.families import read_config
from nanollm.config import Attention, Linear, Rope, Yarn
from nanollm.errors import ConfigError
from tests.fixtures.gemma4 import BORROWING, GEMMA4, PER_LAYER, UNIFIED
from tests.fixtures.gemma4 import EXPERTS as EXPERTS_BESIDE
from tests.fixtures.qwen3_5 import MROPE
from tests.fixtures.qwen3_next import EXPERTS, MIXERS
from tests.oracles import difference, make_loud

TEXT = dict(
    vocab_size=131, hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=2,
    rms_norm_eps=1e-2, max_position_embeddings=128, bos_token_id=1, eos_token_id=[2, 3], pad_token_id=0,
)
GEMMA = dict(
    num_hidden_layers=7, head_dim=20, sliding_window=9, query_pre_attn_scalar=13,
    rope_scaling={"rope_type": "linear", "factor": 8.0},
)
QWEN = dict(num_hidden_layers=2, rope_theta=1e5, rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]})
QWEN3_5 = MIXERS | dict(num_hidden_layers=4, linear_num_key_heads=3, rms_norm_eps=1e-2, **MROPE)
QWEN3_5_VISION = dict(
    depth=1, hidden_size=16, out_hidden_size=64, num_heads=2, intermediate_size=16, num_position_embeddings=16)
IDS = dict(image_token_id=128, video_token_id=129, vision_start_token_id=127, vision_end_token_id=126)
MODELS = {
    "gemma3": dict(
        text_config=TEXT | GEMMA, mm_tokens_per_image=4, image_token_index=130,
        vision_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        ),
    ),
    "gemma4": dict(
        text_config=TEXT | GEMMA4 | PER_LAYER | BORROWING | EXPERTS_BESIDE, audio_config=None,
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                           num_key_value_heads=2, head_dim=8, patch_size=4, position_embedding_size=16),
    ),
    "gemma4_unified": dict(
        text_config=TEXT | UNIFIED, audio_config=None,
        vision_config=dict(patch_size=4, mm_embed_dim=16, mm_posemb_size=16, output_proj_dims=64)),
    "qwen2_vl": TEXT | QWEN | IDS | dict(vision_config=dict(depth=1, embed_dim=16, hidden_size=64, num_heads=2)),
    "qwen2_5_vl": TEXT
    | QWEN
    | IDS
    | dict(
        tie_word_embeddings=True,
        vision_config=dict(
            depth=1, hidden_size=16, out_hidden_size=64, num_heads=2, intermediate_size=16, fullatt_block_indexes=[0]
        ),
    ),
    "qwen3_5": IDS | dict(text_config=TEXT | QWEN3_5, vision_config=QWEN3_5_VISION),
    "qwen3_5_moe": IDS | dict(text_config=TEXT | QWEN3_5 | EXPERTS, vision_config=QWEN3_5_VISION),
}
GAIN = dict.fromkeys(("qwen3_5", "qwen3_5_moe"), 0.1)  # louder, three states in a row make of one rounding 1e-5
TEXT_CLASS = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "gemma4_unified": "gemma4_unified_text",
              "qwen2_vl": "qwen2", "qwen2_5_vl": "qwen2", "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
INSIDE = ("model.", "model.language_model.")
LANGUAGE = {  # how a text model's names begin, and how those of the folder do
    "gemma3": ("", "language_model."), "gemma4": INSIDE, "gemma4_unified": INSIDE,
    "qwen2_vl": ("", ""), "qwen2_5_vl": ("", ""), "qwen3_5": INSIDE, "qwen3_5_moe": INSIDE,
}
MODULES = {"gemma3": (("language_model.model.", "model.language_model."), ("vision_tower.", "model.vision_tower."),
                      ("multi_modal_projector.", "model.multi_modal_projector.")),
           "qwen2_vl": (("model.", "model.language_model."), ("visual.", "model.visual."))}
MODULES["gemma4"] = (INSIDE[1:] * 2, ("model.vision_tower.",) * 2, ("model.embed_vision.",) * 2)
MODULES["gemma4_unified"] = (INSIDE[1:] * 2, ("model.vision_embedder.",) * 2, ("model.embed_vision.",) * 2)
MODULES["qwen2_5_vl"] = MODULES["qwen2_vl"]
MODULES["qwen3_5"] = MODULES["qwen3_5_moe"] = (INSIDE[1:] * 2, ("model.visual.",) * 2)  # on the hub as the modules


def write(kind, folder):
    """transformers' folder, whose names are the hub's; its model."""
    model = transformers.AutoModelForImageTextToText.from_config(
        transformers.AutoConfig.for_model(kind, **MODELS[kind])
    ).eval()
    make_loud(model, gain=GAIN.get(kind, 0.25))
    model.save_pretrained(folder)
    return model


def of_folder(kind, names):
    """Names of a text model → those of the folder."""
    old, new = LANGUAGE[kind]
    return {new + name.removeprefix(old) if name.startswith(old) else name: name for name in names}


def load(folder, *towers):
    """Loaded; the warning must count the tensors under each of these prefixes, and their bytes."""
    stored = load_file(folder / "model.safetensors")
    parts = [[tensor for name, tensor in stored.items() if name.startswith(tower)] for tower in towers]
    told = [
        rf"{tower}… \({len(part)} tensors?, {sum(tensor.nbytes for tensor in part):,} bytes\)"
        for tower, part in zip(towers, parts, strict=True)
    ]
    with pytest.warns(UserWarning, match="left out: " + ", ".join(told) + "$"):
        return checkpoints.load(folder)


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    """(kind, folder, transformers' model, ours)"""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = write(request.param, folder)
    return request.param, folder, theirs, load(folder, *(old for old, _ in MODULES[request.param][1:]))


@pytest.mark.parametrize("length", [1, 24, 80])
@torch.inference_mode()
def test_text_alone_gives_the_same_logits(case, length):
    x = torch.randint(4, 120, (2, length), generator=torch.Generator().manual_seed(1))
    assert difference(case[3](x), case[2](x, use_cache=False).logits) < 1e-5


def test_the_names_of_the_modules_are_read_too(case, tmp_path):
    kind, folder, _, ours = case
    stored = load_file(folder / "model.safetensors")
    for old, new in MODULES[kind]:
        stored = {
            new + name.removeprefix(old) if name.startswith(old) else name: tensor for name, tensor in stored.items()
        }
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    again = load(tmp_path, *(new for _, new in MODULES[kind][1:]))
    assert again.config == ours.config and all(
        torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True)
    )


@torch.inference_mode()
def test_what_is_saved_is_a_text_model(case, tmp_path):
    kind, folder, theirs, ours = case
    checkpoints.save(ours, tmp_path / "out")
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values["model_type"] == TEXT_CLASS[kind] and not [key for key in values if "vision" in key or "image" in key]
    assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (1, [2, 3], 0)
    stored, kept = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    towers = tuple(old for old, _ in MODULES[kind][1:])
    names = of_folder(kind, kept)
    assert names.keys() == {name for name in stored if not name.startswith(towers)}
    assert all(torch.equal(kept[name], stored[outer]) for outer, name in names.items())

    text, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    x = torch.randint(4, 120, (2, 48), generator=torch.Generator().manual_seed(2))
    assert difference(text(x, use_cache=False).logits, theirs(x, use_cache=False).logits) < 1e-6
    again = checkpoints.load(tmp_path / "out")  # no warning, or pytest makes it an error
    assert again.config == ours.config


# ---- config.json

SIZES = dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34)
GEMMA_4B = dict(
    model_type="gemma3", architectures=["Gemma3ForConditionalGeneration"], boi_token_index=255999,
    eoi_token_index=256000, eos_token_id=[1, 106], image_token_index=262144, initializer_range=0.02,
    mm_tokens_per_image=256, torch_dtype="bfloat16", vision_config={"model_type": "siglip_vision_model"},
    text_config=dict(
        model_type="gemma3_text", rope_scaling={"factor": 8.0, "rope_type": "linear"}, sliding_window=1024, **SIZES
    ),
)
QWEN_7B = dict(
    model_type="qwen2_vl", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
    num_attention_heads=28, num_key_value_heads=4, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1e6,
    max_position_embeddings=32768, max_window_layers=28, sliding_window=32768, use_sliding_window=False,
    rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
    vision_config={"model_type": "qwen2_vl", "depth": 32}, vision_start_token_id=151652, vision_end_token_id=151653,
    vision_token_id=151654, image_token_id=151655, video_token_id=151656,
)


def read(values, **more):
    return read_config(values | more)[1]


def test_what_the_hub_leaves_out_of_gemma():
    config = read(GEMMA_4B)
    assert (config.vocab, config.context, config.tied, len(config.layers)) == (262208, 131072, True, 34)
    local, whole = config.layers[0].mixer, config.layers[5].mixer
    assert local == Attention(8, 4, 256, Rope(1e4), 1024, local.qk_norm)
    assert whole == Attention(8, 4, 256, Rope(1e6, scaling=Linear(8.0)), None, local.qk_norm)
    assert [i for i, layer in enumerate(config.layers) if layer.mixer.window is None] == [5, 11, 17, 23, 29]


def test_both_layouts_of_qwen_read_alike():
    text = {
        key: value for key, value in QWEN_7B.items() if not key.startswith(("vision", "image", "video", "model_type"))
    }
    outer = {key: value for key, value in QWEN_7B.items() if key not in text}
    nested = outer | {"text_config": text | {"model_type": "qwen2_vl_text"}}
    plain = {key: value for key, value in text.items() if key != "rope_scaling"} | {"model_type": "qwen2"}
    assert read(QWEN_7B) == read(nested) == read(nested | text) == read(plain)
    assert (
        read(nested, tie_word_embeddings=True).tied
        and read(nested, text_config=nested["text_config"] | {"tie_word_embeddings": True}).tied
    )
    yarn = read(
        QWEN_7B,
        rope_scaling={
            "type": "yarn", "mrope_section": [16, 24, 24], "factor": 4.0, "original_max_position_embeddings": 32768,
        },
    )
    assert yarn.layers[0].mixer.rope == Rope(1e6, scaling=Yarn(4.0, 32768))


def test_what_a_missing_key_means_in_qwen():
    text = dict(
        model_type="qwen2_5_vl_text", vocab_size=97, hidden_size=128, intermediate_size=80, num_hidden_layers=82,
        num_attention_heads=16,
    )
    config = read(dict(model_type="qwen2_5_vl", text_config=text | {"use_sliding_window": True}))
    assert (
        config.layers[0].mixer == Attention(16, 8, 8, Rope(1e6), qkv_bias=True)
        and config.final_norm.eps == 1e-5
        and not config.tied
    )
    assert [i for i, layer in enumerate(config.layers) if layer.mixer.window] == [80, 81]


NESTED = {key: value for key, value in QWEN_7B.items() if key.startswith(("vision", "model_type"))}
REFUSED = {
    "no text": (GEMMA_4B | {"text_config": None}, "text_config is None; expected an object"),
    "another text model": (
        GEMMA_4B | {"text_config": GEMMA_4B["text_config"] | {"model_type": "llama"}},
        "text_config.model_type is 'llama'",
    ),
    "an unknown key inside": (
        GEMMA_4B | {"text_config": GEMMA_4B["text_config"] | {"new_trick": 3}}, "text_config.new_trick = 3",
    ),
    "an unknown key outside": (GEMMA_4B | {"new_trick": 3}, "new_trick = 3"),
    "tied here and not there": (
        GEMMA_4B | {"tie_word_embeddings": False}, "tie_word_embeddings is False; expected True",
    ),
    "a cap that is not applied": (
        GEMMA_4B | {"text_config": GEMMA_4B["text_config"] | {"final_logit_softcapping": 30.0}},
        "text_config.final_logit_softcapping is 30.0",
    ),
    "Qwen said twice": (
        QWEN_7B
        | {"text_config": SIZES | {"vocab_size": 152064, "num_attention_heads": 32, "model_type": "qwen2_vl_text"}},
        "hidden_size is 3584; expected 2560",
    ),
    "Qwen, unknown rope": (
        QWEN_7B | {"rope_scaling": {"type": "axial", "mrope_section": [16, 24, 24]}}, "rope_type is 'axial'",
    ),
    "Qwen, another text model": (
        NESTED | {"text_config": SIZES | {"model_type": "qwen3_vl_text"}},
        "text_config.model_type is 'qwen3_vl_text'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    values, cause = REFUSED[case]
    with pytest.raises(ConfigError, match=cause):
        read_config(values)
