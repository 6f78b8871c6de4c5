"""Reading a config.json so that no key that matters is passed over in silence.

A Reader counts the keys that were asked for. Each of them is one of four things:

    r.size("hidden_size")               needed; r.size("head_dim", None), needed but for a default
    r.must("qkv_bias", True)            the one value that is implemented; any other is refused
    IRRELEVANT, DEFAULTS                says nothing about the logits, or what every decoder is
    `neutral`                           not understood, but cannot change the logits: a null, a private key, a tool's
                                        mark. It is passed over, and one warning names all of them

A key that is none of these when the family has finished reading may well change the logits, so `close` refuses it by
name. Someone who knows better passes --ignore that_key. The family says what a missing key means: the defaults of
transformers' classes differ, and a default taken from the wrong one is a model that is subtly wrong.

Numbers are checked as they are read: NaN, infinities, text, booleans for numbers, and sizes that no file could fill.
"""

import re
import reprlib
import shlex
import warnings
from collections.abc import Collection, Iterable
from typing import Any

from nanollm.errors import ConfigError

# What a config.json says beside the architecture: who wrote it, how it was trained, what to sample, what to return.
IRRELEVANT = frozenset("""
    _attn_implementation _commit_hash _name_or_path architectures auto_map dtype model_type torch_dtype torchscript
    transformers_version
    attention_dropout attn_dropout_prob embd_pdrop hidden_dropout initializer_range output_router_logits pretraining_tp
    resid_pdrop router_aux_loss_coef router_jitter_noise use_cache
    bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id eos_token_id forced_bos_token_id
    forced_eos_token_id mask_token pad_token_id prefix sep_token_id suppress_tokens
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
    length_penalty max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences remove_invalid_values repetition_penalty temperature top_k top_p typical_p
    _from_model_config attention_softmax_in_fp32 attn_implementation attn_pdrop bias_dropout_fusion
    gradient_checkpointing scale_attention_softmax_in_fp32
    finetuning_task id2label label2id num_labels output_attentions output_hidden_states output_scores problem_type
    return_dict return_dict_in_generate task_specific_params tf_legacy_loss tokenizer_class use_bfloat16 use_return_dict
    xla_device chunk_size_feed_forward
""".split())

# Fields of all transformers' configs that say, at these values, what every decoder is; others would change the model.
DEFAULTS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"), (False, None)),
    "is_decoder": (False, True, None),  # true only matters to classes that can be encoders too
    "cross_attention_hidden_size": (None,), "pruned_heads": ({}, None),
}

# Marks that tools leave, whatever their value: of export, of training in parallel, of where a custom pipeline lies.
TOOLS = re.compile(r"""
    unsloth_\w+ | transformers\.js_config | custom_pipelines? | ignore_keys_at_rope_validation | line_by_line
    | output_past | params_dtype | runner_max_sequence_length
    | selective_checkpoint_enabled | sequence_parallel_enabled | use_flash_attention       # Neuron's, Megatron's
""", re.VERBOSE | re.ASCII)
# Which token plays which role is the tokenizer's to say. But this one is where a reward model's score is read.
TOKEN_ID = re.compile(r"(?!reward_)\w+_token_id", re.ASCII)

WHOLE = ("", "text_config.")  # where a config of a language model stands, in place of an object inside one
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu", "relu2": "relu2",
}
UNKNOWN = 10_000                                 # layers or experts, where no tensors are known that bound them
LARGEST = 2**31                                  # of one size; products of sizes are compared with the files
NEEDED: Any = object()                           # in place of a default
SHORT = reprlib.Repr()  # of a value in an error: a list may hold a million, or be as deep as JSON can be
SHORT.maxstring = SHORT.maxother = 80
SHORT.maxdict = SHORT.maxlist = 20


class Reader:
    """`most` bounds the counts that decide how much there is to build (layers, experts): the tensors on disk, if
    known."""

    def __init__(
        self, values: dict[str, Any], where: str = "config.json", ignore: Collection[str] = (), most: int = UNKNOWN,
        prefix: str = "",
    ) -> None:
        self.values, self.where, self.ignore, self.most, self.prefix = values, where, ignore, most, prefix
        self.seen: set[str] = set()
        self.passed: list[str] = []              # what `close` found neutral, here and in the objects inside

    def error(self, key: str, expected: str) -> ConfigError:
        """An error that says what stands under the key, and what was expected."""
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
        try:
            return self.size(key, default, most=self.most)
        except ConfigError as error:
            known = "" if self.most == UNKNOWN else ", the number of tensors in the files"
            raise ConfigError(f"{error}{known}") from None

    def number(self, key: str, default: Any = NEEDED, above: float = 0.0) -> Any:
        """A float above a bound. With a default of None, None."""
        value = self.get(key, default)
        if value is None and default is None:
            return None
        if not is_number(value, above):
            raise self.error(key, f"a finite number above {above:g}")
        return float(value)

    def flag(self, key: str, default: Any = NEEDED) -> bool:
        """true or false."""
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
        """Our name of an activation."""
        return ACTIVATIONS[self.must(key, *dict.fromkeys((default, *ACTIVATIONS)))]

    def of(self, values: dict[str, Any], prefix: str | None = None) -> "Reader":
        """A Reader of other values in the same file: an object inside it, or the same keys rewritten."""
        other = Reader(values, self.where, self.ignore, self.most, self.prefix if prefix is None else prefix)
        other.passed = self.passed
        return other

    def inside(self, key: str) -> "Reader | None":
        """A Reader of the object under this key, to be closed by the caller. None if the key is missing, null or {}."""
        value = self.get(key, None)
        if value is not None and not isinstance(value, dict):
            raise self.error(key, "an object")
        return self.of(value, f"{self.prefix}{key}.") if value else None

    def close(self, irrelevant: Collection[str] = ()) -> None:
        """Refuse keys that nothing read, unless they are irrelevant (to all families, or by this argument), neutral, or
        in `ignore`."""
        passed = self.seen | set(irrelevant)
        unread = [key for key in self.values if key not in passed and f"{self.prefix}{key}" not in self.ignore]
        if self.prefix in WHOLE:
            unread = [key for key in unread if not known(key, self.values[key])]
        neutral = [key for key in unread if self.neutral(key)]
        self.passed += [f"{self.prefix}{key}" for key in neutral]
        if refused := [key for key in unread if key not in neutral]:
            listed = ", ".join(f"{self.prefix}{key} = {brief(self.values[key])}" for key in refused)
            raise ConfigError(f"{self.where}: nothing here knows what these mean: {listed}. If you know that they do "
                              f"not change the logits: {ignoring(f'{self.prefix}{key}' for key in refused)}")

    def neutral(self, key: str) -> bool:
        """Whether a key that nothing read cannot change the logits all the same."""
        value = self.values[key]
        if value is None or key.startswith("_"):
            return True
        if self.prefix not in WHOLE:
            return False
        if key in ("sliding_window", "max_window_layers"):                  # of a window that is switched off
            return self.values.get("use_sliding_window") is False
        if key == "use_sliding_window":                                     # Mistral slides whatever it says
            return value is False and (self.values.get("sliding_window", 0) is None
                                       or "sliding_window" not in self.seen)
        if key == "n_vocab":
            return type(value) is int and value == self.values.get("vocab_size")
        return bool(TOOLS.fullmatch(key))

    def warn(self) -> None:
        """One warning with the names of all keys that were passed over."""
        if self.passed:
            warnings.warn(f"{self.where}: passed over, as they cannot change the logits: "
                          f"{brief_list(dict.fromkeys(self.passed))}", stacklevel=2)


def known(key: str, value: Any) -> bool:
    """Whether a key of the top level is one of all configs, at a value that says nothing about the logits."""
    return (key in IRRELEVANT or any(value is one or value == one == {} for one in DEFAULTS.get(key, ()))
            or bool(TOKEN_ID.fullmatch(key)))


def ignoring(names: Iterable[str]) -> str:
    """The options of a command that pass these keys or tensors over, as a shell reads them."""
    return " ".join(f"--ignore {shlex.quote(name)}" for name in names)


def brief_list(names: Iterable[str], most: int = 20) -> str:
    """Names from a file, the first of them where there are many."""
    found = [brief(name)[1:-1] for name in names]
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def is_number(value: Any, above: float = 0.0) -> bool:
    """Whether a value is a finite number above a bound."""
    return type(value) in (int, float) and above < value < 1e38       # false for NaN, infinities, booleans


def brief(value: Any) -> str:
    """A value as an error shows it, cut where it is long."""
    text = SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
