"""Reading a config.json so that no key is passed over in silence.

A Reader counts the keys that were asked for. Each of them is one of three things:

    r.size("hidden_size")               needed; r.size("head_dim", None), needed but for a default
    r.must("qkv_bias", True)            the one value that is implemented; any other is refused
    IRRELEVANT                          says nothing about the logits

A key that is none of these when the family has finished reading may well change the logits, so `close` refuses it by
name. Someone who knows better passes ignore=["that_key"]. The family says what a missing key means: the defaults of
transformers' classes differ, and a default taken from the wrong one is a model that is subtly wrong.

Numbers are checked as they are read: NaN, infinities, text, booleans for numbers, and sizes that no file could fill.
"""

import reprlib
from collections.abc import Collection
from typing import Any

from nanollm.errors import ConfigError

# What a config.json says beside the architecture: who wrote it, how it was trained, what to sample, what to return.
IRRELEVANT = frozenset("""
    _attn_implementation _commit_hash _name_or_path architectures auto_map dtype model_type torch_dtype torchscript
    transformers_version
    attention_dropout attn_dropout_prob embd_pdrop hidden_dropout initializer_range output_router_logits pretraining_tp
    resid_pdrop router_aux_loss_coef router_jitter_noise use_cache
    bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id eos_token_id forced_bos_token_id
    forced_eos_token_id pad_token_id prefix sep_token_id suppress_tokens
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences remove_invalid_values repetition_penalty temperature top_k top_p typical_p
    _from_model_config attention_softmax_in_fp32 attn_implementation attn_pdrop bias_dropout_fusion
    gradient_checkpointing scale_attention_softmax_in_fp32
    finetuning_task id2label label2id output_attentions output_hidden_states output_scores problem_type return_dict
    return_dict_in_generate task_specific_params tf_legacy_loss tokenizer_class use_bfloat16 chunk_size_feed_forward
""".split())

# Of all transformers' configs: at these values they say what every decoder is, at others they would change the model.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("is_decoder", "is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"), (False,)),
    "cross_attention_hidden_size": (None,), "pruned_heads": ({},),
}

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu2": "relu2",
}
LARGEST = 2**31                                  # of one size; products of sizes are compared with the files
NEEDED: Any = object()                           # in place of a default
SHORT = reprlib.Repr()  # of a value in an error: a list may hold a million, or be as deep as JSON can be
SHORT.maxstring = SHORT.maxother = 80
SHORT.maxdict = SHORT.maxlist = 20


class Reader:
    """`most` bounds the counts that decide how much there is to build (layers, experts): the tensors on disk, if
    known."""

    def __init__(
        self, values: dict[str, Any], where: str = "config.json", ignore: Collection[str] = (), most: int = 10_000,
        prefix: str = "",
    ) -> None:
        self.values, self.where, self.ignore, self.most, self.prefix = values, where, ignore, most, prefix
        self.seen: set[str] = set()

    def error(self, key: str, expected: str) -> ConfigError:
        found = f"is {brief(self.values[key])}" if key in self.values else "is missing"
        return ConfigError(f"{self.where}: {self.prefix}{key} {found}; expected {expected}")

    def get(self, key: str, default: Any = NEEDED) -> Any:
        """The value, unchecked."""
        self.seen.add(key)
        if key not in self.values and default is NEEDED:
            raise self.error(key, "a value")
        return self.values.get(key, default)

    def size(self, key: str, default: Any = NEEDED, most: int = LARGEST, or_null: bool = False) -> Any:
        """A positive whole number. With a default of None, or where null is a value of its own, None."""
        value = self.get(key, default)
        if value is None and (or_null or default is None):
            return None
        if type(value) is not int or not 0 < value <= most:
            raise self.error(key, f"a whole number from 1 to {most}")
        return value

    def count(self, key: str, default: Any = NEEDED) -> Any:
        """A size that is also a number of tensors on disk."""
        return self.size(key, default, most=self.most)

    def number(self, key: str, default: Any = NEEDED, above: float = 0.0) -> Any:
        """A float above a bound. With a default of None, None."""
        value = self.get(key, default)
        if value is None and default is None:
            return None
        if not is_number(value, above):
            raise self.error(key, f"a finite number above {above:g}")
        return float(value)

    def flag(self, key: str, default: Any = NEEDED) -> bool:
        value = self.get(key, default)
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def must(self, key: str, *implemented: Any) -> Any:
        """One of the values that are implemented; the first is what a missing key means."""
        value = self.get(key, implemented[0])
        if not any(value == one and (type(value) is bool) == (type(one) is bool) for one in implemented):
            raise self.error(key, " or ".join(map(brief, implemented)) + ", which is what is implemented")
        return value

    def activation(self, key: str, default: str) -> str:
        return ACTIVATIONS[self.must(key, *dict.fromkeys((default, *ACTIVATIONS)))]

    def inside(self, key: str) -> "Reader | None":
        """A Reader of the object under this key, to be closed by the caller. None if the key is missing, null or {}."""
        value = self.get(key, None)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "an object")
        return Reader(value, self.where, self.ignore, self.most, f"{self.prefix}{key}.") if value else None

    def close(self, irrelevant: Collection[str] = ()) -> None:
        """Refuse keys that nothing read, unless they are irrelevant (to all families, or by this argument) or in
        `ignore`."""
        passed = self.seen | set(irrelevant)
        unread = [key for key in self.values if key not in passed and f"{self.prefix}{key}" not in self.ignore]
        if not self.prefix:
            unread = [key for key in unread if key not in IRRELEVANT and self.values[key] not in NEUTRAL.get(key, ())]
        if unread:
            listed = ", ".join(f"{self.prefix}{key} = {brief(self.values[key])}" for key in unread)
            names = ", ".join(f'"{self.prefix}{key}"' for key in unread)
            raise ConfigError(f"{self.where}: nothing here knows what these mean: {listed}. "
                              f"If you know that they do not change the logits: ignore=[{names}]")


def is_number(value: Any, above: float = 0.0) -> bool:
    return type(value) in (int, float) and above < value < 1e38       # false for NaN, infinities, booleans


def brief(value: Any) -> str:
    text = SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
