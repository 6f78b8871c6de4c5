"""nanollm's own layout: a model under the names that it has here. Any model that can be built can be kept so.

    config.json     {"model_type": "nanollm", "decoder": ModelConfig.to_dict(), "was": …}
    tensors         as named_parameters() has them: embed.weight, layers.3.mixer.q.weight, …

transformers does not know it; `python -m checkpoints.convert` takes it to a layout that it knows, if there is one. If
the model came from a Hugging Face folder, "was" takes it back there byte for byte: its config.json, which of the
family's tables its names were of, and which keys were passed over.
"""

from typing import Any

from checkpoints.families.family import Family
from checkpoints.names.config_table import part
from checkpoints.names.reader import Reader
from checkpoints.names.table import Rule, Table, rule
from nanollm.config import Layer, ModelConfig


class OwnNames(Table):
    """The table in which every name stands for itself."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> Rule:
        return rule(name, name)


class OwnLayout(Family):
    """Any model: config.json holds ModelConfig.to_dict() whole."""

    def read(self, r: Reader) -> ModelConfig:
        """Raises ConfigError on what to_dict did not write, and on more layers than there are tensors."""
        r.get("was", None)  # says nothing about the logits
        decoder = r.get("decoder")
        runs = decoder.get("layers") if isinstance(decoder, dict) else None
        if not isinstance(runs, list) or not all(
            isinstance(run, list) and len(run) == 2 and type(run[0]) is int and run[0] > 0 for run in runs
        ) or sum(run[0] for run in runs) > r.most:
            raise r.error("decoder", f"a ModelConfig as to_dict writes it, of at most {r.most} layers")
        return ModelConfig.from_dict(decoder)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"model_type": self.name, "decoder": config.to_dict(), "dtype": None}


NANOLLM = OwnLayout("nanollm", "", keys={}, layer=part(Layer), names=(OwnNames(),))
