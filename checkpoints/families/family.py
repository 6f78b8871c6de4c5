"""What there is to know about a family: the table of its config.json, what no key says, and its tables of tensor names.

    GRANITE = LLAMA.but("granite", "GraniteForCausalLM", missing={"max_position_embeddings": 2048},
                        keys={"attention_multiplier": number("mixer.scale", missing=1.0), …})

To add one: a file in this folder with FAMILIES = {model_type: Family} and a fixture in tests/fixtures. If the decoder
can already express it, that is all. docs/fork.md has an example.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from checkpoints.names.config_rows import Kinds
from checkpoints.names.config_table import Keys, Part, part, read_keys, write_keys
from checkpoints.names.layer_kinds import LayerKinds, kind_of
from checkpoints.names.reader import Reader
from checkpoints.names.table import Table
from nanollm.config import ModelConfig
from nanollm.errors import ConfigError

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # the tokenizer's to say; a missing key would mean a number
DTYPES = ("dtype", "torch_dtype")  # what the weights are, filled in when they are written


@dataclass(frozen=True, eq=False)
class Family:
    """A lineage, both ways. Several model_types may share one.

    left_out    of a multimodal family: prefixes of the tensors of its other towers. What is loaded is a text model, and
                is saved as FAMILIES[name]
    ahead       what predicts the token after the next one, and is left out: tensors, separated by spaces, where one is
                stored its whole layer or module ({i}: of the layer behind the model's own); or prefixes, with the dot
    about       what it is, in a line, where the first line of its file speaks of others
    """
    name: str  # the model_type it writes
    architecture: str  # transformers' class of it
    keys: Keys  # config.json: key → row
    layer: Part  # a layer, as far as no key says it
    names: tuple[Table, ...]  # of tensors; several where they changed over time, the newest first, which is written
    model: Part = field(default_factory=lambda: part(ModelConfig))  # what surrounds the layers, likewise
    names_of: Callable[[ModelConfig], tuple[Table, ...]] | None = None  # in place of `names` where the config decides
    in_memory: Callable[[ModelConfig], tuple[Table, ...]] | None = None  # where transformers has other names in memory
    ignorable: frozenset[str] = frozenset()  # stored tensors that are no weights, with {i} for numbers
    irrelevant: frozenset[str] = frozenset()  # keys of this family that do not reach the logits
    left_out: tuple[str, ...] = ()
    ahead: str = ""
    about: str = ""

    def but(
        self, name: str, architecture: str = "", *, keys: Keys | None = None, without: tuple[str, ...] = (),
        missing: Mapping[str, Any] | None = None, norm: Part | None = None, layer: Mapping[str, Any] | None = None,
        model: Mapping[str, Any] | None = None, **more: Any,
    ) -> "Family":
        """Another family, which differs from this one in

        keys, without    rows of its own, and keys that it does not have
        missing          what missing keys mean: the same rows otherwise
        norm             what the final norm is, and those before the mixer and the feed-forward
        layer, model     other fields that no key says: path → value
        more             any field of Family; `about` is of this one alone
        """
        around = ({"final_norm": norm} if norm else {}) | dict(model or {})
        inside = ({"pre_mixer": norm, "pre_ffn": norm} if norm else {}) | dict(layer or {})
        table = {key: row for key, row in self.keys.items() if key not in without} | (keys or {})
        table |= {key: table[key].where_missing(value) for key, value in (missing or {}).items()}
        return replace(self, name=name, architecture=architecture or self.architecture, keys=table,
                       layer=self.layer.but(inside), model=self.model.but(around), **({"about": ""} | more))

    def tables(self, config: ModelConfig) -> tuple[Table, ...]:
        """The tables of tensor names for a model; the first is what is written."""
        return self.names_of(config) if self.names_of else self.names

    def saved_as(self, config: ModelConfig) -> str:
        """The model_type that a model read from a folder with other towers is saved as."""
        return self.name

    def read(self, r: Reader) -> ModelConfig:
        """Raises ConfigError on an impossible value; the caller closes the Reader."""
        return read_keys(self.keys, r, self.model, self.layer)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """What it cannot say is found by reading it back. Raises ConfigError for a model of other parts."""
        for slot in ("mixer", "ffn"):
            rows = [row for row in self.keys.values() if isinstance(row, (Kinds, LayerKinds))]
            said = [kinds for row in rows if (kinds := row.kinds_in(slot))]
            kinds = said[0] if said else [kind_of(self.layer, slot)]
            for i, layer in enumerate(config.layers):
                if (found := type(getattr(layer, slot))) not in kinds:
                    wanted = " or ".join(kind.__name__ for kind in kinds)
                    raise ConfigError(f"layers[{i}].{slot} is {found.__name__}, not {wanted}")
        values = {"architectures": [self.architecture], "model_type": self.name}
        return values | write_keys(self.keys, config) | dict.fromkeys((*TOKENS, *DTYPES))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied or pickled with a model, a family stays the one it is."""
        import checkpoints.families as known
        name = next((kind for kind, family in known.FAMILIES.items() if family is self), self.name)
        return known.family_called, (name,)


def difference(ours: Any, read: Any, path: str) -> str:
    """The first place where two configs part, as a sentence."""
    pairs: list[tuple[str, Any, Any]] = []
    if dataclasses.is_dataclass(ours) and type(ours) is type(read):
        names = [field.name for field in dataclasses.fields(ours)]
        pairs = [(f".{name}", getattr(ours, name), getattr(read, name)) for name in names]
    elif isinstance(ours, tuple) and isinstance(read, tuple) and len(ours) == len(read):
        pairs = [(f"[{i}]", *pair) for i, pair in enumerate(zip(ours, read, strict=True))]
    for step, a, b in pairs:
        if a != b:
            return difference(a, b, path + step)
    return f"{path} is {ours!r}, and would be read as {read!r}"
