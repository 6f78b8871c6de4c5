"""Folders of multimodal models, of which the language model is loaded, and saved as the text model that it is."""

from dataclasses import dataclass

from checkpoints.families.family import Family
from checkpoints.names.reader import Reader
from checkpoints.names.table import Table, moved
from nanollm.config import ModelConfig


@dataclass(frozen=True, eq=False)
class TextInside(Family):
    """A config.json whose "text_config" is the language model's, of one of the `kinds`."""
    kinds: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: Family, *kinds: str, **more: object) -> "TextInside":
        """A folder around a model that is of this family but for `more`, any field of Family."""
        fields = dict(keys=text.keys, layer=text.layer, model=text.model, names=text.names, ignorable=text.ignorable)
        return cls(text.name, text.architecture, kinds=kinds, **{**fields, **more})  # type: ignore[arg-type]

    def read(self, r: Reader) -> ModelConfig:
        """The language model. Raises ConfigError where there is no text_config."""
        text = r.inside("text_config")
        if text is None:
            raise r.error("text_config", "an object, the config of the language model")
        text.must("model_type", *self.kinds)
        config = super().read(text)
        text.close(self.irrelevant)
        r.must("tie_word_embeddings", config.tied)
        return config


def inside(names: tuple[Table, ...]) -> tuple[Table, ...]:
    """The names of a text model where it stands inside another, in both layouts: that of the hub's older folders,
    language_model.model.…, and that of transformers' modules now, model.language_model.…"""
    return tuple(each for table in names for each in (
        moved(table, "", "language_model."), moved(table, "model.", "model.language_model.")))
