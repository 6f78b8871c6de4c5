"""What a decoder is, as data: a tuple of layers, each saying which mixer, which feed-forward and which norms it has.

    ModelConfig ── vocab, dim, embed_…, final_norm, head…
        └── layers: (Layer, Layer, …)
                      ├── mixer: Attention(rope=Rope(scaling=…), qk_norm=Norm) | Mamba | …
                      ├── ffn:   MLP | MoE | None
                      └── pre_mixer, post_mixer, pre_ffn, post_ffn: Norm | None

Families differ in *which object stands at index i*: a window on every other layer, experts on the last ten, a scan
in between. Nothing below knows a family's name. To read a `config.json`, see `checkpoints/families/`.

The parts are in config/parts.py (Norm, Rope, Attention, MLP), scaling.py (long contexts), and the rarer ones in the
other files of this folder. All can be imported from here. Every dataclass is frozen, so equal layers can share one
object and a config can be a dictionary key. `ModelConfig.to_dict` / `from_dict` are exact inverses and plain JSON.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from nanollm.config.checks import FeedForward, Mixer, Part, need, need_positive, need_sizes, present
from nanollm.config.chunked import ChunkedAttention, InputWeightedMoE
from nanollm.config.cross_layer import CrossLayerAttention, LayerEnd, NormedValueAttention, PerLayerInput, need_sources
from nanollm.config.encoding import decoded, encoded
from nanollm.config.gated import GatedAttention, GatedDeltaNet, NarrowValueAttention
from nanollm.config.mixers import XIELU, ClippedGLU, ExpertGroups, FilteredAttention, LatentAttention, LatentExpert, MoE
from nanollm.config.normed_moe import NormedMoE
from nanollm.config.parallel import ParallelMixer, ScaledMLP
from nanollm.config.parts import ACTIVATIONS, MLP, Activation, Alibi, Attention, Norm, Rope
from nanollm.config.positions import Positions, Sines
from nanollm.config.scaling import (
    DynamicNTK,
    Linear,
    Llama3,
    LogLength,
    LogSteps,
    LogTokenSteps,
    LongRope,
    Proportional,
    Scaling,
    SteppedNTK,
    Yarn,
)
from nanollm.config.scans import RGLRU, RWKV, SCANS, Hyena, Mamba, Mamba2, MultiHeadMamba, ShortConv
from nanollm.config.shared import WITH_SCAN, SharedBlock, SharedBlockScan
from nanollm.config.sparse import Indexer, SparseLatentAttention
from nanollm.errors import ConfigError

__all__ = [
    "ACTIVATIONS", "Activation", "Alibi", "Attention", "ChunkedAttention", "ClippedGLU", "CrossLayerAttention",
    "DynamicNTK", "ExpertGroups", "FeedForward", "FilteredAttention", "GatedAttention", "GatedDeltaNet", "Hyena",
    "Indexer", "InputWeightedMoE", "LatentAttention", "LatentExpert", "Layer", "LayerEnd", "Linear", "Llama3",
    "LogLength", "LogSteps", "LogTokenSteps", "LongRope", "MLP", "Mamba", "Mamba2", "Mixer", "MoE", "ModelConfig",
    "MultiHeadMamba", "NarrowValueAttention", "Norm", "NormedMoE", "NormedValueAttention", "ParallelMixer", "Part",
    "PerLayerInput", "Positions", "Proportional", "RGLRU", "RWKV", "Rope", "SCANS", "ScaledMLP", "Scaling",
    "SharedBlock", "SharedBlockScan", "ShortConv", "Sines", "SparseLatentAttention", "SteppedNTK", "WITH_SCAN",
    "XIELU", "Yarn",
]


def need_whole_vectors(owner: Any, *fields: str) -> None:
    """Norms of the residual stream know nothing of heads."""
    for field in fields:
        norm = getattr(owner, field)
        need(norm is None or norm.scope == "head", owner, field, "a norm whose scope is 'head', which is for q and k")


@dataclass(frozen=True)
class Layer(Part):
    """One residual block; block.py draws how the parts are wired. An absent norm is None, and absent in the module."""
    mixer: Mixer | None                     # moves information between tokens: Attention, Mamba; None: the ffn is all
    ffn: FeedForward | None                 # what each token does alone: MLP, MoE; None: the mixer is all (Mamba)
    pre_mixer: Norm | None = Norm()         # before the mixer; OLMo-2 None
    post_mixer: Norm | None = None          # on what the mixer adds, before it is added; Gemma-2
    pre_ffn: Norm | None = Norm()           # before the feed-forward; None where it reads what the mixer reads (Phi)
    post_ffn: Norm | None = None            # as post_mixer
    parallel: bool = False                  # the feed-forward reads the same input as the mixer; GPT-NeoX
    residual_scale: float = 1.0             # times what mixer and feed-forward add to the stream; Granite 0.22
    end: LayerEnd | None = None             # what is done with the stream at last; Gemma 4

    def __post_init__(self) -> None:
        need(self.mixer is None or isinstance(self.mixer, Mixer), self, "mixer", "Attention, another mixer, or None")
        need(self.ffn is None or isinstance(self.ffn, FeedForward), self, "ffn", "MLP, another feed-forward, or None")
        need_whole_vectors(self, "pre_mixer", "post_mixer", "pre_ffn", "post_ffn")
        need_positive(self, "residual_scale")
        need(self.end is None or None not in (self.mixer, self.ffn), self, "end", "None where there is but one branch")
        alone = self.pre_ffn is None and self.post_ffn is None and not self.parallel
        expected = "a feed-forward, or pre_ffn None, post_ffn None and parallel False"
        need(self.ffn is not None or alone, self, "ffn", expected)
        alone = self.ffn is not None and self.pre_mixer is None and self.post_mixer is None and not self.parallel
        need(self.mixer is not None or alone, self, "mixer", "a mixer, or a feed-forward, no norm for it, not parallel")


@dataclass(frozen=True)
class ModelConfig(Part):
    """A decoder: what stands before, in and after its layers. model.py."""
    vocab: int                              # V, rows of the embedding; 128256
    dim: int                                # D, width of the residual stream; 4096
    layers: tuple[Layer, ...]               # from the embedding to the head; (Layer(…),) * 32
    final_norm: Norm = Norm()               # before the head
    tied: bool = False                      # the head is the embedding
    float32_residual: bool = False          # the residual stream is float32, whatever the weights are; Mamba True
    context: int | None = None              # positions it was trained for; a caller may warn past it; 4096
    embed_scale: float = 1.0                # times the embedding, once rounded to the working dtype; Gemma √dim
    embed_norm: Norm | None = None          # right after the embedding; BLOOM
    positions: int | Positions | Sines | None = None    # rows of a learned table, added to the embedding; GPT-2 1024
    head_bias: bool = False                 # Phi-2 True
    head_scale: float = 1.0                 # of the logits; Command-R 0.0625
    head_softcap: float | None = None       # logits become c·tanh(logit / c); Gemma-2 30.0
    unit_head: bool = False                 # every row of the head is brought to length 1 first; Baichuan2

    def __post_init__(self) -> None:
        counted = ["positions"] if isinstance(self.positions, int) else []
        need_sizes(self, "vocab", "dim", *present(self, "context"), *counted)
        need_positive(self, "embed_scale", "head_scale", *present(self, "head_softcap"))
        need_whole_vectors(self, "final_norm", "embed_norm")
        need(len(self.layers) > 0, self, "layers", "at least one")
        need_sources(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: each dataclass with its class name under "is", the layers as runs [count, layer]."""
        runs = [[len(list(same)), encoded(layer)] for layer, same in itertools.groupby(self.layers)]
        return {**encoded(dataclasses.replace(self, layers=self.layers[:1])), "layers": runs}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`. Raises ConfigError on anything that `to_dict` does not write."""
        try:
            layers = tuple(layer for count, entry in data["layers"] for layer in [decoded(entry)] * count)
            return decoded({**data, "layers": layers})
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"not a ModelConfig as to_dict writes it: {type(error).__name__}: {error}") from None
