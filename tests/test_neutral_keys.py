"""Keys of real config.json files that cannot change the logits: passed over, or the neutral value of what they are.

Each line has the keys of a class of real files. With them a folder must load with the logits that transformers gives
for the same folder, and the same key with a value that could matter must be refused.
"""

import json
import shlex
import warnings
from typing import Any

import pytest
import torch
import transformers

import checkpoints
from checkpoints.families import read_config
from checkpoints.names.reader import Reader, ignoring
from nanollm.errors import ConfigError
from tests.fixtures import FIXTURES
from tests.oracles import difference, reference_logits, tokens, write

OLD_FIELDS: dict[str, Any] = dict(  # of every config that transformers 4 wrote whole, at their defaults
    return_dict=True, output_hidden_states=False, output_attentions=False, torchscript=False, torch_dtype="float32",
    use_bfloat16=False, tf_legacy_loss=False, pruned_heads={}, chunk_size_feed_forward=0, is_encoder_decoder=False,
    is_decoder=False, cross_attention_hidden_size=None, add_cross_attention=False, tie_encoder_decoder=False,
    max_length=20, min_length=0, do_sample=False, early_stopping=False, num_beams=1, num_beam_groups=1,
    diversity_penalty=0.0, temperature=1.0, top_k=50, top_p=1.0, typical_p=1.0, repetition_penalty=1.0,
    length_penalty=1.0, no_repeat_ngram_size=0, encoder_no_repeat_ngram_size=0, bad_words_ids=None,
    num_return_sequences=1, output_scores=False, return_dict_in_generate=False, forced_bos_token_id=None,
    forced_eos_token_id=None, remove_invalid_values=False, exponential_decay_length_penalty=None,
    suppress_tokens=None, begin_suppress_tokens=None, architectures=["M"], finetuning_task=None,
    id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}, tokenizer_class=None, prefix=None, pad_token_id=0,
    sep_token_id=None, decoder_start_token_id=None, task_specific_params=None, problem_type=None,
    _name_or_path="owner/name", _attn_implementation_autoset=True, transformers_version="4.51.3",
)
# fixture → the keys that real files have beside its own, and those that the warning names
NEUTRAL: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": ({"output_past": True, "is_decoder": True, "n_vocab": 131, "line_by_line": False},
             "output_past, n_vocab, line_by_line"),
    "llama-2": ({
        **OLD_FIELDS, "layer_norm_eps": None, "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "unsloth_fixed": True, "unsloth_version": "2025.3", "mask_token": "<mask>", "unk_token_id": 0,
        "image_token_id": 7, "sequence_parallel_enabled": False, "selective_checkpoint_enabled": False,
        "ignore_keys_at_rope_validation": ["x"], "use_sliding_window": False, "sliding_window": 7,
        "max_window_layers": 1,
    }, "_attn_implementation_autoset, layer_norm_eps, transformers.js_config, unsloth_fixed, unsloth_version, "
       "sequence_parallel_enabled, selective_checkpoint_enabled, ignore_keys_at_rope_validation, use_sliding_window, "
       "sliding_window, max_window_layers"),
    "mistral-v0.2": ({"attention_bias": False, "use_sliding_window": False}, "use_sliding_window"),
    "mixtral-8x7b": ({"attention_bias": False, "moe_frequency": 1, "use_flash_attention": True}, "use_flash_attention"),
    "pythia": ({"rope_theta": 10_000, "partial_rotary_factor": 0.25, "rotary_emb_base": 10_000, "rotary_pct": 0.25,
                "custom_pipelines": {"text-generation": {}}}, "custom_pipelines"),
    "qwen3-moe": ({"qkv_bias": False, "use_qk_norm": True, "shared_expert_intermediate_size": 0}, ""),
    "gpt_bigcode-mha": ({"runner_max_sequence_length": None, "params_dtype": "float32"},
                        "runner_max_sequence_length, params_dtype"),
    "phi-moe-window": ({"expert_dropout": 0.0}, ""),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_logits_equal_transformers_with_the_keys_of_real_files(name, tmp_path):
    fixture, (keys, named) = FIXTURES[name], NEUTRAL[name]
    write(fixture, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", experts_implementation="eager").eval()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ours = checkpoints.load(tmp_path)
    lines = [str(one.message) for one in told if "passed over" in str(one.message)]
    assert lines == [f"{path}: passed over, as they cannot change the logits: {named}"] * bool(named)
    x = tokens(fixture)
    with torch.inference_mode():
        assert difference(ours(x), reference_logits(fixture, theirs, x)) < fixture.bound


LLAMA = dict(model_type="llama", vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
             num_attention_heads=6)
MISTRAL = LLAMA | dict(model_type="mistral", num_key_value_heads=2)


@pytest.mark.parametrize("values", [
    LLAMA | {"new_trick": 3}, LLAMA | {"new_trick": "on"}, LLAMA | {"new_trick": True}, LLAMA | {"new_trick": 0.0},
    LLAMA | {"new_trick": False}, LLAMA | {"new_trick": []},            # what was true where nobody said so
    LLAMA | {"is_causal": False}, LLAMA | {"draft_vocab_size": 16}, LLAMA | {"reward_token_id": 9},
    LLAMA | {"add_cross_attention": True}, LLAMA | {"is_encoder_decoder": True}, LLAMA | {"is_decoder": 1},
    LLAMA | {"pruned_heads": {"0": [1]}}, LLAMA | {"n_vocab": 98}, LLAMA | {"layer_norm_eps": 1e-5},
    LLAMA | {"sliding_window": 7}, LLAMA | {"sliding_window": 7, "use_sliding_window": True},
    MISTRAL | {"sliding_window": 7, "use_sliding_window": False}, MISTRAL | {"use_sliding_window": False},
    MISTRAL | {"attention_bias": True}, MISTRAL | {"model_type": "mixtral", "moe_frequency": 2},
    LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0, "output_past": True}},
], ids=lambda values: ", ".join(f"{key}={values[key]}" for key in values if key not in LLAMA))
def test_what_could_change_the_logits_is_refused(values):
    with pytest.raises(ConfigError, match="nothing here knows what these mean|which is what is implemented"):
        read_config(values)


@pytest.mark.parametrize("keys", [
    {"qkv_bias": True}, {"use_qk_norm": False}, {"shared_expert_intermediate_size": 24},
])
def test_qwen3_moe_has_no_other_wiring(keys):
    values = LLAMA | dict(model_type="qwen3_moe", num_key_value_heads=2)
    read_config(values)
    with pytest.raises(ConfigError, match=f"{next(iter(keys))} is .* which is what is implemented"):
        read_config(values | keys)


def test_one_line_names_the_keys_of_objects_inside_too():
    scaling = {"rope_type": "linear", "factor": 2.0, "note": None}
    with pytest.warns(UserWarning) as told:
        read_config(LLAMA | {"rope_scaling": scaling, "_private": 3, **{f"_key_{n}": n for n in range(30)}})
    assert [str(one.message) for one in told] == [
        "config.json: passed over, as they cannot change the logits: rope_scaling.note, _private, "
        + ", ".join(f"_key_{n}" for n in range(18)) + " and 12 more"]


def test_what_there_is_to_ignore_is_said_as_a_shell_reads_it():
    reader = Reader({"plain": 1, "two words": 2, "it's": 3}, prefix="rope.")
    with pytest.raises(ConfigError) as error:
        reader.close()
    options = shlex.split(str(error.value).partition("logits: ")[2])
    assert options == ["--ignore", "rope.plain", "--ignore", "rope.two words", "--ignore", "rope.it's"]
    assert ignoring(["a"]) == "--ignore a"
