"""An adapter's folder, read for a model that is understood and has no memory yet; then beside its weights, or in them.

    Folder      adapter_config.json, and the headers of the tensors
    fit()       these and a Source → an Adapter: by names and shapes; all problems are in one error
    Adapter     beside(model): A, B, m as modules (nanollm/training/lora.py)
                parts: what each weight becomes, for convert --merge

Tensors that replace some of the base are none of this: open_source takes them in the place of the base's own.
"""

import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints import export
from checkpoints.adapters import described
from checkpoints.adapters.described import Described
from checkpoints.adapters.rows import Arrangement, arrangement
from checkpoints.names.table import SHOWN, Step, expand
from checkpoints.source import Source
from checkpoints.storage import files, pickles, stream
from checkpoints.storage.files import Stored
from nanollm.errors import CheckpointError
from nanollm.model import Decoder
from nanollm.training import lora, lora_weights

SAFE, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
# the name of an adapter may stand behind the part: lora_A.default.weight
PART = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B|magnitude_vector|embedding_A|embedding_B)"
                  r"(\.(?!weight$|bias$)\w+)?(?P<leaf>\.weight|\.bias)?")
Parts = dict[str, Stored]                        # of a module: A, B, magnitude_vector, embedding_A, embedding_B


@dataclass(frozen=True)
class Folder:
    """An adapter's folder: what it says, its parts by module, and tensors that replace those of the base."""
    path: Path
    described: Described
    modules: dict[str, Parts]
    whole: dict[str, Stored]


@dataclass(frozen=True)
class Part:
    """The adapter of one weight of ours, W (N, K) or (E, N, K): A (…, r, K), B (…, N, r), m (N,), float32."""
    A: Tensor
    B: Tensor
    magnitude: Tensor | None
    alpha: float
    scale: float
    shared: str                                  # weights with the same word have one A
    pissa: bool

    def merged(self, W: Tensor) -> Tensor:
        """What W becomes, float32."""
        V, A, B = W.float(), self.A.to(W.device), self.B.to(W.device)
        if self.pissa:
            first, second = lora_weights.leading(V, A.shape[-2], self.scale)
            V = V - self.scale * second @ first
        V = V + self.scale * B @ A
        return V if self.magnitude is None else (self.magnitude.to(W.device) / V.norm(dim=1))[:, None] * V


@dataclass(frozen=True)
class Adapter:
    """What a folder adds to the weights of a model, by the names of our parameters."""
    path: Path
    described: Described
    parts: dict[str, Part]
    whole: list[str]                             # parameters that the folder has a new value for

    def beside(self, model: Decoder) -> Decoder:
        """Put A, B, m beside the weights, in place, and freeze the rest but for what the adapter has whole.

        A router, the head and the embedding can have no adapter here: it is merged, and a warning says so."""
        there = lora.targets(model)
        parts = {name.removesuffix(".weight"): part for name, part in self.parts.items()}
        if merged := [name for name in parts if name not in there]:
            warnings.warn(f"{self.path}: merged into the weight, which is trained whole from here on, as no adapter "
                          f"stands beside it: {', '.join(merged)}", stacklevel=3)
            with torch.no_grad():
                for name in merged:
                    W = model.get_parameter(f"{name}.weight")
                    W.copy_(parts.pop(name).merged(W))
        said = self.described
        lora.add(model, lora.LoRA(
            said.rank, said.alpha, said.dropout, said.rslora, said.dora, tuple(parts),
            {name: rank for name, part in parts.items() if (rank := part.A.shape[-2]) != said.rank},
            {name: part.alpha for name, part in parts.items() if part.alpha != said.alpha},
            "pissa" if said.pissa else "zero"))
        shared: dict[str, nn.Parameter] = {}
        with torch.no_grad():
            for name, module in lora.loras(model).items():
                part = parts[name]
                module.A = shared.setdefault(part.shared, module.A)
                module.A.copy_(part.A)
                module.B.copy_(part.B)
                if module.magnitude is not None:
                    module.magnitude.copy_(part.magnitude)  # type: ignore[arg-type]  # checked
        for name in (*self.whole, *(f"{name}.weight" for name in merged)):
            owner, _, leaf = name.rpartition(".")
            there_too = f"{owner}.base.{leaf}" if owner in parts else name
            model.get_parameter(there_too).requires_grad_()
        return model

    def replaces(self, stored: Stored) -> bool:
        """Whether a stored tensor is the adapter's own, in the place of one of the base."""
        return getattr(stored, "file", self.path).parent == self.path


# ---- a folder

def read(path: Path, allow_pickle: bool = False) -> Folder:
    """The headers of an adapter's folder. Raises ConfigError or CheckpointError."""
    said = described.read(path)
    if not (path / SAFE).exists() and (path / PICKLE).exists():
        stored = pickles.read_file(path / PICKLE, allow_pickle)
    else:
        stored = files.read_header(path / SAFE)
    modules: dict[str, Parts] = {}
    whole: dict[str, Stored] = {}
    for name, one in stored.items():
        bare = name.removeprefix(PREFIX)
        found = PART.fullmatch(bare)
        if found and found["leaf"] == ".bias":
            raise CheckpointError(f"{one.file}: {name} is a bias of B (lora_bias), which is not read here")
        if found:
            modules.setdefault(found["module"], {})[found["part"]] = one
        elif ".original_module." not in bare:    # what peft keeps of the base beside a module that is saved whole
            whole[bare.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".").replace(
                ".modules_to_save.", ".")] = one
    if not stored:
        raise CheckpointError(f"{path / SAFE}: no tensors")
    return Folder(path, said, modules, whole)


# ---- a folder and a model

def fit(folder: Folder, source: Source) -> Adapter:
    """The adapter of a model. Raises CheckpointError with every part that has no weight, or is not of its shape."""
    parameters = source.parameters()
    index: dict[str, tuple[Step, int]] = {}      # stored name → its step, and which of the step's it is
    tables = export.peft_tables(source.config, export.origin_of(source))
    for names in tables if source.family.in_memory else (*tables, source.names):
        for step in expand(names, parameters, source.config):
            index = {name: (step, k) for k, name in enumerate(step.theirs)} | index
    problems: list[str] = []
    found: dict[tuple[str, ...], tuple[Step, dict[int, tuple[str, Parts]]]] = {}
    for module, parts in folder.modules.items():
        if (name := _weight_of(module, parts, index, parameters)) is None:
            problems.append(f"{module}: has an adapter, and the base no weight of that name")
        elif lacking := _lacking(parts, folder.described.dora):
            problems.append(f"{module}: {lacking}")
        else:
            step, k = index[name]
            if step.ours[0].startswith("shared."):
                problems.append(f"{module}: several layers use this weight. There each has its own adapter beside it; "
                                "here all would have one")
            found.setdefault(step.ours, (step, {}))[1][k] = (name, parts)
    known: dict[str, Part] = {}
    for step, theirs in found.values():
        arranged = arrangement(step, parameters)
        if arranged is None:
            problems.append(f"{next(iter(theirs.values()))[0]}: cannot have an adapter here, as "
                            f"{' and '.join(step.ours)} are more than its rows")
            continue
        wrong = list(_wrong(step, arranged, theirs, folder.described))
        problems += wrong
        if not wrong:
            known |= dict(_parts_of(step, arranged, theirs, folder.described))
    if problems:
        more = f"\n    … and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(f"{folder.path}: not an adapter of {source.folder}\n    "
                              + "\n    ".join(problems[:SHOWN]) + more)
    _warn_of_other(folder, source)
    adapter = Adapter(folder.path, folder.described, known, [])
    whole = [name for step in source.steps if any(adapter.replaces(source.stored[one]) for one in step.theirs)
             for name in step.ours]
    return dataclasses.replace(adapter, whole=whole)


def _weight_of(module: str, parts: Parts, index: Mapping[str, tuple[Step, int]],
               parameters: Mapping[str, Tensor]) -> str | None:
    """The stored weight that a module of transformers has its adapter for: its weight, or the one of its parameters
    with three dimensions that A and B fit. Names may lack what stands before the layers' in the base, or have more."""
    plain = ".".join(part for part in module.split(".") if part != "base_layer")
    if (name := f"{plain}.weight") in index:
        return name
    A, B = parts.get("A"), parts.get("B")
    for name, (step, k) in index.items():
        owner, _, leaf = name.rpartition(".")
        if owner == plain and leaf not in ("weight", "bias") and A is not None and B is not None:
            arranged = arrangement(step, parameters)
            if arranged is not None and (A.shape[-1:], B.shape[:1]) == (
                    arranged.shapes[k][-1:], arranged.shapes[k][-2:-1]):
                return name
    longer = [name for name in index if name.endswith(f".{plain}.weight") or f"{plain}.weight".endswith(f".{name}")]
    return longer[0] if len(longer) == 1 else None


def _lacking(parts: Parts, dora: bool) -> str:
    if "embedding_A" in parts or "embedding_B" in parts:
        return "" if {"embedding_A", "embedding_B"} == parts.keys() else (
            f"has {', '.join(parts)}; expected embedding_A and embedding_B")
    expected = {"A", "B"} | ({"magnitude_vector"} if dora else set())
    return "" if parts.keys() == expected else (
        f"has {', '.join(sorted(parts))}; expected {', '.join(sorted(expected))}"
        f"{'' if dora else ', as use_dora is false'}")


def _wrong(step: Step, arranged: Arrangement, theirs: Mapping[int, tuple[str, Parts]],
           said: Described) -> Iterable[str]:
    """What is wrong with the adapters of one step."""
    if len(theirs) < len(step.theirs):
        lacks = next(name for k, name in enumerate(step.theirs) if k not in theirs)
        yield f"{lacks}: has no adapter, and {next(iter(theirs.values()))[0]} has, which is a part of the same weight"
    for k, (name, parts) in theirs.items():
        *E, N, K = arranged.shapes[k]
        experts, rank = (E[0] if E else 1), said.rank_of(_module(name, E))
        if "A" in parts:
            expected = {"A": (rank * experts, K), "B": (N, rank * experts), "magnitude_vector": (N,)}
        else:
            expected = {"embedding_A": (rank, N), "embedding_B": (K, rank)}
        for part, one in parts.items():
            if one.shape != expected[part]:
                yield f"{name}: lora_{part} is {one.shape}, expected {expected[part]} for rank {rank} by {said.where}"
        if said.pissa and len(step.ours) > 1:
            yield f"{name}: is {len(step.ours)} weights here, which a PiSSA that is not converted to LoRA cannot have"


def _module(name: str, experts: list[int]) -> str:
    """The name that patterns of adapter_config.json are for."""
    return name if experts else name.removesuffix(".weight")


def _parts_of(step: Step, arranged: Arrangement, theirs: Mapping[int, tuple[str, Parts]],
              said: Described) -> Iterable[tuple[str, Part]]:
    """The adapter of each of our weights in a step."""
    A: dict[tuple[int, int | None], Tensor] = {}
    B: dict[tuple[int, int | None], Tensor] = {}
    for k, (name, parts) in theirs.items():
        values = {part: _tensor(one, name) for part, one in parts.items()}
        if "embedding_A" in values:
            values = {"A": values["embedding_B"].T, "B": values["embedding_A"].T}
        *E, N, K = arranged.shapes[k]
        if E:
            A |= {(k, e): one for e, one in enumerate(values["A"].view(E[0], -1, K))}
            B |= {(k, e): one for e, one in enumerate(values["B"].view(N, -1, E[0]).permute(2, 0, 1))}
        else:
            A[k, None], B[k, None] = values["A"], values["B"]
        if said.dora:
            ms = {k: values["magnitude_vector"]}
    for j, ours in enumerate(step.ours):
        places = [(e, place) for (i, e), place in arranged.places.items() if i == j]
        own_A = [A[place.stored, place.expert] for _, place in places]
        own_B = [B[place.stored, place.expert][place.rows] for _, place in places]
        stacked = places[0][0] is not None
        k = places[0][1].stored
        name = theirs[k][0]
        module = _module(name, list(arranged.shapes[k][:-2]))
        alike = len({place.stored for _, place in places}) == 1
        yield ours, Part(
            torch.stack(own_A) if stacked else own_A[0], torch.stack(own_B) if stacked else own_B[0],
            ms[k][places[0][1].rows] if said.dora else None, said.alpha_of(module), said.scale_of(module),
            name if alike else ours, said.pissa)


def _tensor(stored: Stored, name: str) -> Tensor:
    value = torch.empty(stored.shape)
    stream.read(stored, 0, value, name)
    return value


def _warn_of_other(folder: Folder, source: Source) -> None:
    """One line where the adapter says that it was made for a model of another name."""
    said = folder.described.base
    if not said:
        return
    here = source.folder.resolve()
    same = Path(said).name == here.name or said.replace("/", "--") in str(here) or Path(said).resolve() == here
    if not same:
        warnings.warn(f"{folder.path}: made for {said}, and put on {source.folder}: names and shapes fit, the values "
                      "may not", stacklevel=3)
