"""The layouts in which Meta and Mistral publish: params.json beside consolidated.*.pth or consolidated.safetensors, or
the shards of the latter and their index.

    params.json                         Meta                                        Mistral
    dim n_layers n_heads n_kv_heads     as they say; n_kv_heads missing: n_heads    all stand there
    width of a head                     dim / n_heads                               head_dim
    width of the feed-forward           2/3 · 4 dim · ffn_dim_multiplier, rounded   hidden_dim
                                        up to a multiple of multiple_of
    vocab_size                          −1 in Llama 1 and 2: as many as there are   stands there
                                        rows
    rope_theta                          missing: 10000                              missing: 1e6, or 1e4 with a window
    stretched RoPE                      use_scaled_rope: "llama3" with factor 8     –
    experts                             –                                           moe: {num_experts,
                                                                                          num_experts_per_tok}

Both turn neighbouring channels in RoPE where Hugging Face turns halves; the weights are read as they lie, and the
config says `interleaved`. The names are the same for both.

Meta writes a file for each model-parallel rank. Matrices whose outputs are shared out are cut by rows, those whose
inputs are, by columns; norms are in every file:

    by rows       wq wk wv w1 w3 output, and tok_embeddings from Llama 3 on
    by columns    wo w2, and tok_embeddings of Llama 1 and 2

Llama 3.2 stretches RoPE by 32, by Hugging Face's config of it; params.json says the same as 3.1's, for which the
published code has 8. So the factor follows from the sizes, unless there is a rope_scaling_factor. The length of the
context is not said either; it is taken from what else differs between the generations, and changes no logit.

Published code: meta-llama/llama (model.py), meta-llama/llama-models (models/llama3/model.py, args.py),
mistralai/mistral-inference (args.py, transformer.py, moe.py).
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from checkpoints.layouts.found import LARGEST_CONFIG, Asked, Found
from checkpoints.names.ops import Halving, Interleaving, Op, Same, Stack
from checkpoints.names.reader import Reader
from checkpoints.names.table import Step, Table, expand, override, rule
from checkpoints.storage import files, pickles
from checkpoints.storage.files import Stored, equal_bytes
from nanollm.config import MLP, Attention, Llama3, ModelConfig, MoE, Rope
from nanollm.errors import CheckpointError, ConfigError

SINGLE = "consolidated.safetensors"
INDEX = "consolidated.safetensors.index.json"
MISTRAL_CONTEXT = 32_768                         # where Mistral's params.json has no max_seq_len
DIALECTS = ("llama", "mistral", "mixtral")
NAMES = override(
    {},
    rule("tok_embeddings", "embed"),
    rule("layers.{i}.attention_norm", "layers.{i}.pre_mixer"),
    rule("layers.{i}.attention.wq", "layers.{i}.mixer.q"),
    rule("layers.{i}.attention.wk", "layers.{i}.mixer.k"),
    rule("layers.{i}.attention.wv", "layers.{i}.mixer.v"),
    rule("layers.{i}.attention.wo", "layers.{i}.mixer.o"),
    rule("layers.{i}.ffn_norm", "layers.{i}.pre_ffn"),
    rule("layers.{i}.feed_forward.w1", "layers.{i}.ffn.gate"),
    rule("layers.{i}.feed_forward.w3", "layers.{i}.ffn.up"),
    rule("layers.{i}.feed_forward.w2", "layers.{i}.ffn.down"),
    rule("layers.{i}.feed_forward.gate", "layers.{i}.ffn.router"),
    *(rule(f"layers.{{i}}.feed_forward.experts.{{e}}.{w}.weight", f"layers.{{i}}.ffn.experts.{part}", Stack)
      for w, part in (("w1", "gate"), ("w3", "up"), ("w2", "down"))),
    rule("norm", "norm"),
    rule("output", "head"),
)
IGNORABLE = frozenset({"rope.freqs"})            # of Llama 1 and 2, in every rank's file
BY_COLUMNS = ("wo", "w2")                        # of the matrices that ranks share out
ORIGINAL, LOW, HIGH = 8192, 1.0, 4.0             # of Llama 3.1's stretch, in the published code
SCALED = dict(low_freq_factor=LOW, high_freq_factor=HIGH, original_max_position_embeddings=ORIGINAL)
FACTORS = {(2048, 16): 32.0, (3072, 28): 32.0}   # (dim, layers) of Llama 3.2 1B and 3B
RopeLayout = Literal["half", "interleaved"]


def find(path: Path, asked: Asked) -> Found | None:
    """The model of a folder with a params.json, or of one of its files. Raises CheckpointError or ConfigError."""
    if path.is_file():
        named = path.name == "params.json" or path.name.startswith("consolidated")
        return find(path.parent, asked) if named else None
    where = path / "params.json"
    if not where.exists() and not any(path.glob("consolidated*")):
        return None
    params = files.read_json(where, largest=LARGEST_CONFIG)
    if any((path / name).exists() for name in (SINGLE, INDEX)):
        stored, layout = files.read_shards(path, SINGLE, INDEX, files.read_header, ".safetensors"), "mistral"
    else:
        stored, layout = merged(pickles.read_ranks(path, asked.allow_pickle), params, str(path)), "meta"
    family = asked.family or dialect(params, layout)
    if family not in DIALECTS:
        expected = ", ".join(DIALECTS)
        raise ConfigError(f"{where}: --family {family}: the original layout is read for {expected}")
    embed, head = (stored.get(f"{name}.weight") for name in ("tok_embeddings", "output"))
    if embed is None or len(embed.shape) != 2:
        raise CheckpointError(f"{path}: no matrix tok_embeddings.weight")
    tied = head is None or files.equal_bytes(head, embed)
    most = min(len(stored), 10_000)
    values = read_params(params, str(where), family, embed.shape[0], tied, most, asked.ignore)
    return Found(path, layout, values, str(where), stored, (NAMES,), interleaved=True, ignorable=IGNORABLE)


def with_rope_layout(config: ModelConfig, layout: RopeLayout) -> ModelConfig:
    """The same model with its heads' channels in another order."""
    def turned(mixer: Any) -> Any:
        if isinstance(inner := getattr(mixer, "attention", None), Attention):       # whose rope such a mixer has
            return dataclasses.replace(mixer, attention=turned(inner))
        rope = getattr(mixer, "rope", None)
        if not isinstance(rope, Rope):
            return mixer
        return dataclasses.replace(mixer, rope=dataclasses.replace(rope, layout=layout))

    layers = tuple(dataclasses.replace(layer, mixer=turned(layer.mixer)) for layer in config.layers)
    return dataclasses.replace(config, layers=layers)


def rope_layout(config: ModelConfig) -> RopeLayout:
    """The order of the channels in a model's heads; "half" where none turn."""
    ropes = (getattr(layer.mixer, "rope", None) for layer in config.layers)
    return next((rope.layout for rope in ropes if isinstance(rope, Rope)), "half")


def for_heads_in(names: Table, here: RopeLayout, there: RopeLayout) -> Table:
    """The table of a layout whose heads are in the order `there`, for a model whose heads are in the order `here`."""
    if here == there:
        return names
    op: Op = Interleaving if here == "half" else Halving
    parts = [names[f"layers.{{i}}.mixer.{part}"] for part in "qk"]
    assert all(each.op is Same for each in parts), "heads that are packed with others have no other order"
    return override(names, *(dataclasses.replace(each, op=op) for each in parts))


# ---- reading

def dialect(params: dict[str, Any], layout: str) -> str:
    """Whose params.json this is. Mistral's alone says how wide a head is."""
    if "moe" in params:
        return "mixtral"
    return "mistral" if layout == "mistral" or "head_dim" in params else "llama"


def read_params(params: dict[str, Any], where: str, dialect: str, rows: int, tied: bool, most: int = 10_000,
                ignore: Collection[str] = ()) -> dict[str, Any]:
    """What a config.json of Hugging Face's would say.

    rows: of the embedding; tied: the head is the embedding; most: layers and experts; ignore: keys to pass over.

    Raises ConfigError on a key that is not known, or a size that cannot be."""
    r = Reader(params, where, ignore, most)
    dim, heads = r.size("dim"), r.size("n_heads")
    values = {
        "model_type": dialect,
        "hidden_size": dim,
        "num_hidden_layers": r.count("n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": r.size("n_kv_heads", heads, or_null=True) or heads,
        "rms_norm_eps": r.number("norm_eps", 1e-5),
        "tie_word_embeddings": r.flag("tied_embeddings", tied),
    } | (_read_meta(r, dim, heads, rows) if dialect == "llama" else _read_mistral(r, dialect))
    r.close({"max_batch_size", "model_type"})
    r.warn()
    return values


def hidden_width(dim: int, multiple: int, factor: float | None) -> int:
    """F, as Meta's FeedForward has it."""
    hidden = int(2 * 4 * dim / 3)
    if factor is not None:
        hidden = int(factor * hidden)
    return multiple * -(-hidden // multiple)


def _read_meta(r: Reader, dim: int, heads: int, rows: int) -> dict[str, Any]:
    if dim % heads:
        raise r.error("n_heads", f"a divisor of dim ({dim})")
    theta, scaled = r.number("rope_theta", 10_000.0, above=1), r.flag("use_scaled_rope", False)
    factor = r.number("rope_scaling_factor", FACTORS.get((dim, r.get("n_layers")), 8.0))
    if scaled:
        context = 131_072
    else:
        older = 2048 if r.get("norm_eps", 1e-5) < 1e-5 else 4096
        context = {500_000.0: 8192, 1_000_000.0: 16_384}.get(theta, older)
    r.size("max_seq_len", None)                          # how much memory the published code takes for its cache
    return {
        "vocab_size": rows if r.get("vocab_size", -1) == -1 else r.size("vocab_size"),
        "intermediate_size": hidden_width(dim, r.size("multiple_of", 256), r.number("ffn_dim_multiplier", None)),
        "rope_theta": theta,
        "rope_scaling": {"rope_type": "llama3", "factor": factor, **SCALED} if scaled else None,
        "max_position_embeddings": context,
    }


def _read_mistral(r: Reader, dialect: str) -> dict[str, Any]:
    if r.get("sliding_window", None) is not None and r.get("_sliding_window", None) is not None:
        raise r.error("_sliding_window", "not to stand beside sliding_window")
    window = r.size("sliding_window", None) or r.size("_sliding_window", None)
    context = r.size("max_seq_len", None) or r.size("max_position_embeddings", None) or MISTRAL_CONTEXT
    values = {
        "vocab_size": r.size("vocab_size"),
        "head_dim": r.size("head_dim"),
        "intermediate_size": r.size("hidden_dim"),
        "rope_theta": r.number("rope_theta", None, above=1) or (1e6 if window is None else 1e4),
        "sliding_window": window,
        "max_position_embeddings": context,
    }
    moe = r.inside("moe")
    if (moe is not None) != (dialect == "mixtral"):
        raise r.error("moe", "an object for mixtral, and for it alone")
    if moe is not None:
        experts = moe.count("num_experts")
        values |= {"num_local_experts": experts, "num_experts_per_tok": moe.size("num_experts_per_tok")}
        moe.close()
    return values


@dataclass(frozen=True)
class Sliced(Stored):
    """A matrix whose parts are in the files of several ranks. file and start are those of the first part."""
    parts: tuple[Stored, ...]
    columns: bool                                # cut by columns, else by rows

    def read_run(self, first: int, run: Tensor) -> None:
        """As Stored.read_run. By columns, the rows that the run touches are put together from all parts."""
        rows, width = self.parts[0].shape
        if self.columns:
            whole = width * len(self.parts)
            top, end = first // whole, -(-(first + run.numel()) // whole)
            beside = torch.empty(end - top, len(self.parts), width, dtype=self.dtype)
            for n, part in enumerate(self.parts):
                own = torch.empty(end - top, width, dtype=self.dtype)
                part.read_run(top * width, own)
                beside[:, n] = own
            run.copy_(beside.view(-1)[first - top * whole :][: run.numel()].view(run.shape))
            return
        flat = run.view(-1)
        while len(flat):
            n, inside = divmod(first, rows * width)
            count = min(rows * width - inside, len(flat))
            self.parts[n].read_run(inside, flat[:count])
            first, flat = first + count, flat[count:]


def merged(ranks: list[dict[str, Stored]], params: dict[str, Any], folder: str) -> dict[str, Stored]:
    """The tensors of one model from the files of its ranks. Raises CheckpointError if they do not belong together."""
    if len(ranks) == 1:
        return ranks[0]
    whole: dict[str, Stored] = {}
    for name in ranks[0]:
        parts = tuple(rank[name] for rank in ranks if name in rank)
        if len(parts) < len(ranks) or len({(part.dtype, part.shape) for part in parts}) > 1:
            raise CheckpointError(f"{folder}: {name} is not in all of the {len(ranks)} files with one shape and dtype")
        if len(parts[0].shape) == 1:                     # norms, and the table of RoPE's frequencies
            if not all(equal_bytes(parts[0], part) for part in parts[1:]):
                raise CheckpointError(f"{folder}: {name} differs between the files of the ranks; "
                                      "every rank should have the same")
            whole[name] = parts[0]
            continue
        if len(parts[0].shape) != 2:
            raise CheckpointError(f"{folder}: {name} is {parts[0].shape} in each file; a vector or a matrix expected")
        rows, width = parts[0].shape
        columns = name.split(".")[-2] in BY_COLUMNS or (name == "tok_embeddings.weight" and width != params.get("dim"))
        shape = (rows, width * len(parts)) if columns else (rows * len(parts), width)
        size = sum(part.size for part in parts)
        whole[name] = Sliced(parts[0].file, parts[0].dtype, shape, parts[0].start, size, parts, columns)
    extra = sorted(set().union(*ranks) - set(ranks[0]))
    if extra:
        raise CheckpointError(f"{folder}: {extra[0]} is not in the first of the {len(ranks)} files")
    return whole


# ---- writing

def steps_of(names: Table, parameters: Mapping[str, Tensor], config: ModelConfig) -> list[Step]:
    """As table.expand. A head that is the embedding is written as well: the published code knows no tied one."""
    steps = expand(names, parameters, config)
    return [*steps, Step(("output.weight",), ("embed.weight",), Same, None)] if config.tied else steps


def write_params(config: ModelConfig, kind: str) -> dict[str, Any]:
    """params.json of a dialect, for a model whose RoPE turns neighbours: what the published code takes, and no more.

    Meta's has no key for the length of the context, neither for a tied head. What else it cannot say shows when it is
    read back.
    Raises ConfigError for other layers than it has keys for."""
    layer = config.layers[0]
    attention, ffn = layer.mixer, layer.ffn
    expert = ffn.expert if isinstance(ffn, MoE) else ffn
    alike = len(set(config.layers)) == 1
    if not (alike and isinstance(attention, Attention) and isinstance(expert, MLP)) or attention.rope is None:
        raise ConfigError(f"{kind}: the original layout is one of attention with RoPE and MLPs, the same in all layers")
    shared = {
        "dim": config.dim,
        "n_layers": len(config.layers),
        "n_heads": attention.heads,
        "n_kv_heads": attention.kv_heads,
        "vocab_size": config.vocab,
        "norm_eps": config.final_norm.eps,
        "rope_theta": attention.rope.theta,
    }
    if kind != "llama":
        moe = {"moe": {"num_experts": ffn.experts, "num_experts_per_tok": ffn.top_k}} if isinstance(ffn, MoE) else {}
        own = {"head_dim": attention.head_dim, "hidden_dim": expert.hidden, "sliding_window": attention.window}
        length = {} if config.context in (None, MISTRAL_CONTEXT) else {"max_seq_len": config.context}
        return shared | own | length | moe
    scaling = attention.rope.scaling
    stretched = {"use_scaled_rope": True, "rope_scaling_factor": scaling.factor} if isinstance(scaling, Llama3) else {}
    return shared | _width_in_words(config.dim, expert.hidden) | stretched


def _width_in_words(dim: int, hidden: int) -> dict[str, Any]:
    """multiple_of, and ffn_dim_multiplier if need be, that give this width."""
    for multiple in (4096 >> shift for shift in range(13)):
        if hidden_width(dim, multiple, None) == hidden:
            return {"multiple_of": multiple}
    multiple = math.gcd(hidden, 256)
    factor = (hidden - multiple / 2) / int(2 * 4 * dim / 3)                # amid those that are rounded to it
    for digits in range(1, 16):
        if hidden_width(dim, multiple, round(factor, digits)) == hidden:
            return {"multiple_of": multiple, "ffn_dim_multiplier": round(factor, digits)}
    raise ConfigError(f"layers[0].ffn.hidden is {hidden}: no ffn_dim_multiplier gives it for dim {dim}")
