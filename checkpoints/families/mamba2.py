"""Mamba-2 and Codestral-Mamba; and the folders of both generations as their authors write them.

    x += mixer(norm(x))          num_heads · head_dim = expand · hidden_size

    mamba2           transformers' layout: untied unless the config says otherwise, n_groups of 8 unless it says 1
    (no model_type)  state-spaces/mamba-*, mamba2-*: sizes d_model and n_layer, and ssm_cfg, which has the arguments
                     of the mixer where they are not its defaults. `vocab_size` counts tokens: the matrices have as
                     many rows as the next multiple of `pad_vocab_size_multiple`, 50280 for 50277 and 8. Tied. Published
                     as pickles; a conversion to safetensors, which is read here, keeps their names

Codestral-Mamba's config says `norm_before_gate: true`, which nothing reads: the gate comes first. `time_step_limit`
bounds Δ; an infinity, JSON's own or transformers' {"__float__": "Infinity"}, is no bound. (transformers 5.23 forgets
the limit in its step for a single token.)
"""

import math
from typing import Any

from checkpoints.families.family import Family
from checkpoints.families.mamba import IRRELEVANT, MAMBA, MAMBA_NAMES
from checkpoints.names.config_rows import Expand, LayerCount, Rank, whole_multiple
from checkpoints.names.config_table import Draft, Keys, Row, flag, number, only, part, size, write_keys
from checkpoints.names.reader import Reader, is_number
from checkpoints.names.table import override, rule, under
from nanollm.config import Layer, Mamba, Mamba2, ModelConfig, Norm
from nanollm.errors import ConfigError

INFINITY = {"__float__": "Infinity"}  # as transformers writes it
INITIAL = frozenset({"A_init_range", "chunk_size", "conv_init", "dt_init", "dt_init_floor", "dt_max", "dt_min",
                     "dt_scale", "use_fast_path", "use_mem_eff_path"})  # of ssm_cfg: first values, and which code runs

MAMBA2_NAMES = override(
    MAMBA_NAMES, *under("backbone.layers.{i}.mixer", "layers.{i}.mixer", {"dt_bias": "dt_bias", "norm": "norm"}))
ORIGINAL_NAMES = override(MAMBA2_NAMES, rule("backbone.embedding", "embed"))


def inner(draft: Draft) -> int:
    """Channels of the scan."""
    return draft["mixer.heads"] * draft["mixer.head_dim"]


class ExpandHeads(Row):
    """expand · dim = heads · head_dim. Either of `expand` and `num_heads` follows from the other."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        times, dim, head_dim = r.size(key, 2), draft["dim"], draft["mixer.head_dim"]
        if inner(draft) != times * dim:
            raise r.error("num_heads", f"expand · hidden_size / head_dim ({times} · {dim} / {head_dim})")

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: whole_multiple(inner(draft), draft["dim"])}


class StepLimits(Row):
    """The least and the largest Δ; infinity is no limit."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        value = r.get(key, [0.0, INFINITY])
        low, high = value if isinstance(value, (list, tuple)) and len(value) == 2 else (math.nan, math.nan)
        endless = high == INFINITY or (isinstance(high, float) and high >= 1e38)    # Nemotron 3 Ultra 1e308
        if not is_number(low, -1e-30) or not (endless or is_number(high, low)):
            raise r.error(key, "two numbers, the least and the largest step")
        draft["mixer.least_step"], draft["mixer.largest_step"] = float(low), None if endless else float(high)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        if "mixer.least_step" not in draft:
            return {}
        return {key: [draft["mixer.least_step"], draft["mixer.largest_step"] or INFINITY]}


MAMBA2 = MAMBA.but(
    "mamba2", "Mamba2ForCausalLM", names=(MAMBA2_NAMES, ORIGINAL_NAMES), layer={"mixer": part(Mamba2)},
    missing={"tie_word_embeddings": False},
    keys={
        "num_heads": size("mixer.heads", missing=128), "head_dim": size("mixer.head_dim", missing=64),
        "expand": ExpandHeads(), "intermediate_size": only(inner), "d_inner": only(inner),
        "state_size": size("mixer.state", missing=128), "n_groups": size("mixer.groups", missing=8),
        "layer_norm_epsilon": number("final_norm.eps", "pre_mixer.eps", "mixer.eps", missing=1e-5),
        "time_step_limit": StepLimits(),
    },
    without=("expand", "intermediate_size", "d_inner", "time_step_rank", "ssm_cfg"),
    irrelevant=IRRELEVANT | {"chunk_size", "norm_before_gate", "time_step_rank"},
)


class HeadWidth(Row):
    """How wide a head is; their number is expand · dim / headdim."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        width, channels = r.size(key, 64), r.size("expand", 2) * draft["dim"]
        if channels % width:
            raise r.error(key, f"a divisor of expand · d_model ({channels})")
        draft["mixer.heads"], draft["mixer.head_dim"] = channels // width, width

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {"expand": whole_multiple(inner(draft), draft["dim"]), key: draft["mixer.head_dim"]}


class Arguments(Row):
    """Which mixer, and the arguments of its published class; what is missing has that class's default."""

    shared = {"d_conv": size("mixer.conv", missing=4), "conv_bias": flag("mixer.conv_bias", missing=True),
              "bias": flag("mixer.bias", missing=False)}
    kinds: dict[str, tuple[type, Keys]] = {
        "Mamba1": (Mamba, shared | {
            "expand": Expand(missing=2), "d_state": size("mixer.state", missing=16), "dt_rank": Rank(),
        }),
        "Mamba2": (Mamba2, shared | {
            "headdim": HeadWidth(), "d_state": size("mixer.state", missing=128), "dt_limit": StepLimits(),
            "ngroups": size("mixer.groups", missing=1), "norm_before_gate": only(False),
            "d_ssm": only(None), "D_has_hdim": only(False), "rmsnorm": only(True),
        }),
    }

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        ssm = r.inside(key) or r.of({}, f"{key}.")
        mixer, keys = self.kinds[ssm.must("layer", *self.kinds)]
        draft["mixer"] = part(mixer)
        for name, row in keys.items():
            row.read(ssm, draft, name)
        ssm.close(INITIAL)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        found = draft["mixer"].kind
        layer = next((name for name, (mixer, _) in self.kinds.items() if mixer is found), None)
        if layer is None:
            raise ConfigError(f"layers[0].mixer is {found.__name__}, not Mamba or Mamba2")
        values: dict[str, Any] = {"layer": layer}
        for name, row in self.kinds[layer][1].items():
            values |= row.write(draft, name)
        return {key: values}


class PaddedVocab(Row):
    """vocab_size counts tokens, and is rounded up to rows. It is written as the rows, with a multiple of 1."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        rows, tokens = r.size("pad_vocab_size_multiple", 8), r.size(key, 50277)
        draft["vocab"] = -(-tokens // rows) * rows

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: draft["vocab"], "pad_vocab_size_multiple": 1}


class Untyped(Family):
    """A config.json without model_type, architectures, or any other of transformers' keys."""

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return write_keys(self.keys, config)


ORIGINAL = Untyped(
    "state-spaces", "",
    keys={
        "vocab_size": PaddedVocab(), "d_model": size("dim"), "n_layer": LayerCount(),
        "ssm_cfg": Arguments(), "rms_norm": only(True, written=True),
        "tie_embeddings": flag("tied", missing=True), "residual_in_fp32": flag("float32_residual", missing=True),
        "d_intermediate": only(0), "attn_layer_idx": only([]), "attn_cfg": only({}),  # no MLPs, no attention
    },
    layer=part(Layer, ffn=None, pre_mixer=part(Norm, eps=1e-5), pre_ffn=None),  # no key says ε
    model=part(ModelConfig, final_norm=part(Norm, eps=1e-5)),
    names=(ORIGINAL_NAMES,), irrelevant=frozenset({"fused_add_norm"}),
)
FAMILIES = {"mamba2": MAMBA2, "state-spaces": ORIGINAL}
