"""The state of a run on disk, its checkpoints: sharded, checksummed, without pickle, and each complete or absent.

    runs/demo/steps/00000200/         a checkpoint: it gets this name in one rename, when all of it is written
        rank-0.safetensors            the shards that rank 0 holds, of parameters and of the optimizers' state
        rank-1.safetensors
        manifest.json                 which file has which part of which tensor, a CRC-32 for each file, and the facts
                                      of the run that are not tensors
        manifest.crc32                of manifest.json
    runs/demo/steps/.00000300.tmp/    one that is being written, or was when the process was killed: never read, and
                                      deleted before the next one is written

    write     copy the shards to CPU memory
              in a thread, while training goes on: file, fsync, CRC
              when all ranks are done: manifest, fsync, rename, delete old checkpoints
    read      manifest and its CRC
              for each shard that is wanted: the files that overlap it, CRC first, then that part

Killing the run at any point leaves all complete checkpoints. If one rank fails to write (a full disk), all ranks give
up that checkpoint, and `Saver.finish` returns the problem to the run. A run may go on with another number of ranks,
because any rank can read any file.
"""

import contextlib
import json
import math
import os
import shutil
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from nanollm.errors import RunError
from nanollm.training.distributed import World, local

FORMAT = 1
Box = list[list[int]]           # [start, end) in each dimension; of a single number: []


def box(tensor: Tensor) -> Box:
    """Which part of the whole tensor this rank holds. A tensor that is not sharded is held by every rank."""
    part = [[0, size] for size in tensor.shape]
    if isinstance(tensor, DTensor):
        placement, mesh = tensor.placements[-1], tensor.device_mesh
        assert isinstance(placement, Shard), tensor.placements
        total, rank = tensor.shape[placement.dim], mesh.get_local_rank(mesh.ndim - 1)
        each = -(-total // mesh.size(-1))           # as torch.chunk cuts: the last ranks may have less, or nothing
        part[placement.dim] = [min(total, rank * each), min(total, (rank + 1) * each)]
    return part


def overlap(a: Box, b: Box) -> Box:
    """The part of a tensor that lies in both boxes; it may be empty."""
    return [[max(p, r), min(q, s)] for (p, q), (r, s) in zip(a, b, strict=True)]


def volume(part: Box) -> int:
    """The number of elements in a box."""
    return math.prod(max(0, end - start) for start, end in part)


def within(part: Box, whole: Box) -> tuple[slice, ...]:
    """Where `part` lies in a tensor that holds `whole`."""
    return tuple(slice(start - first, end - first) for (start, end), (first, _) in zip(part, whole, strict=True))


def is_writer(tensor: Tensor, world: World) -> bool:
    """Whether this rank writes its part: of equal copies, the one with the lowest rank is written."""
    if not isinstance(tensor, DTensor):
        return world.rank == 0
    return tensor.device_mesh.ndim == 1 or tensor.device_mesh.get_local_rank(0) == 0


def crc(path: Path) -> int:
    """The CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


@dataclass
class Saver:
    """Writes checkpoints of one run, one at a time, while training goes on."""
    folder: Path                                # runs/demo/steps
    world: World
    keep: int                                   # how many complete checkpoints are kept
    thread: threading.Thread | None = None
    result: dict[str, Any] = field(default_factory=dict)        # of this rank's thread
    step: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    spared: int | None = None                   # the step of one that is kept beside the newest

    def begin(self, step: int, tensors: Mapping[str, Tensor], facts: dict[str, Any], spared: int | None = None) -> None:
        """Copy this rank's shards and start to write them. All ranks call it, after `finish` of the one before."""
        assert self.thread is None
        self.step, self.facts, self.spared, self.result = step, facts, spared, {"pieces": {}, "shapes": {}}
        mine: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            self.result["shapes"][name] = [str(tensor.dtype).removeprefix("torch."), *tensor.shape]
            if is_writer(tensor, self.world) and volume(box(tensor)):
                mine[name] = local(tensor).detach().to("cpu", copy=True).contiguous()
                self.result["pieces"][name] = box(tensor)
        draft = self.draft(step)
        if self.world.rank == 0:
            for old in self.folder.glob(".*.tmp"):
                shutil.rmtree(old, ignore_errors=True)
            try:
                draft.mkdir(parents=True)
            except OSError as error:
                self.result["error"] = f"{draft}: {error.strerror}"
        self.world.all_gather_objects(None)                     # a barrier: no rank writes before the folder is there
        # a daemon: what ends the run does not wait for it
        place = draft / f"rank-{self.world.rank}.safetensors"
        self.thread = threading.Thread(target=self._write, args=(place, mine), daemon=True)
        self.thread.start()

    def draft(self, step: int) -> Path:
        """The folder of a checkpoint that is not complete."""
        return self.folder / f".{step:08}.tmp"

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        try:
            write_shards(path, tensors)
            self.result |= {"file": path.name, "crc32": crc(path), "bytes": path.stat().st_size}
        except Exception as error:                              # of any kind: the main thread must know it
            self.result.setdefault("error", f"{path}: {error}")

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is still at work."""
        return self.thread is not None and self.thread.is_alive()

    def finish(self) -> str | None:
        """Wait for the files of all ranks and make them a checkpoint.

        Returns None if there was nothing to finish or all went well, else the problem, the same on every rank. Then
        nothing of this checkpoint is left, and older checkpoints are unchanged.
        """
        if self.thread is None:
            return None
        self.thread.join()
        self.thread = None
        said = self.world.all_gather_objects(self.result)
        problem = next((one["error"] for one in said if "error" in one), None)
        if self.world.rank == 0:
            try:
                if problem is None:
                    self._complete(said)
            except OSError as error:
                problem = f"{self.draft(self.step)}: {error}"
            if problem is not None:
                shutil.rmtree(self.draft(self.step), ignore_errors=True)
        return self.world.all_gather_objects(problem)[0]

    def _complete(self, said: list[dict[str, Any]]) -> None:
        draft, whole = self.draft(self.step), self.folder / f"{self.step:08}"
        files = [{key: one[key] for key in ("file", "bytes", "crc32", "pieces")} for one in said]
        write_manifest(draft, {
            "format": FORMAT, "step": self.step, "ranks": self.world.size, "facts": self.facts,
            "tensors": said[0]["shapes"], "files": files,
        })
        if whole.exists():                                      # the run went back to an earlier checkpoint
            retire(whole)
        publish(draft, whole)
        for old in complete(self.folder)[: -self.keep]:
            if int(old.name) != self.spared:
                with contextlib.suppress(OSError):              # the new one is complete; the next one tries again
                    retire(old)


def write_shards(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file and force it to disk."""
    save_file(tensors, path)
    sync(path)


def write_manifest(folder: Path, values: dict[str, Any]) -> None:
    """Write the manifest and its checksum, and force both to disk."""
    text = json.dumps(values).encode()
    for name, content in (("manifest.json", text), ("manifest.crc32", f"{zlib.crc32(text):08x}\n".encode())):
        (folder / name).write_bytes(content)
        sync(folder / name)
    sync(folder)


def publish(draft: Path, whole: Path) -> None:
    """Give a complete checkpoint its name, in one step."""
    os.rename(draft, whole)
    sync(whole.parent)


def retire(folder: Path) -> None:
    """Delete a checkpoint. It loses its name first, so that a half-deleted one is never taken for a whole one."""
    aside = folder.parent / f".{folder.name}.old.tmp"
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- reading

def complete(folder: Path) -> list[Path]:
    """The checkpoints in runs/NAME/steps, the latest step last."""
    found = (path for path in folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir())
    return sorted(found, key=lambda path: int(path.name))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises RunError where the manifest is missing or is not, byte for byte, what was written."""
    try:
        text, stated = (folder / "manifest.json").read_bytes(), (folder / "manifest.crc32").read_bytes()
    except OSError as error:
        raise damaged(folder, f"{Path(error.filename).name}: {error.strerror}") from None
    if stated != f"{zlib.crc32(text):08x}\n".encode():
        raise damaged(folder, f"manifest.json has CRC-32 {zlib.crc32(text):08x}, manifest.crc32 says {stated[:20]!r}")
    manifest = json.loads(text)
    if manifest.get("format") != FORMAT:
        raise RunError(f"{folder}: manifest.json has format {manifest.get('format')}, this version reads {FORMAT}; "
                       "go on with the version that wrote it")
    return manifest


def load(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read this rank's shards into `tensors`, in place, and return the facts.

    Raises RunError, before any tensor is changed, where the checkpoint is damaged or holds other tensors than these.
    """
    manifest = read_manifest(folder)
    ours = {name: [str(tensor.dtype).removeprefix("torch."), *tensor.shape] for name, tensor in tensors.items()}
    for name in sorted({*ours, *manifest["tensors"]}):
        if ours.get(name) != manifest["tensors"].get(name):
            raise RunError(f"{folder}: {name} is {manifest['tensors'].get(name, 'absent')} there, "
                           f"this run has {ours.get(name, 'none')}; go on with the options that it was written with")
    wanted = {name: box(tensor) for name, tensor in tensors.items()}
    parts: dict[str, list[tuple[Box, Tensor]]] = {name: [] for name in tensors}
    for file in manifest["files"]:
        shared = {name: overlap(piece, wanted[name]) for name, piece in file["pieces"].items()}
        shared = {name: part for name, part in shared.items() if volume(part)}
        if not shared:
            continue
        path = folder / file["file"]
        try:
            found = crc(path)
        except OSError as error:
            raise damaged(folder, f"{path.name}: {error.strerror}") from None
        if found != file["crc32"]:
            raise damaged(folder, f"{path.name} has CRC-32 {found:08x} and {path.stat().st_size} bytes, "
                                  f"expected {file['crc32']:08x} and {file['bytes']}")
        with safetensors.safe_open(path, framework="pt") as stored:
            for name, part in shared.items():
                place = within(part, file["pieces"][name])
                parts[name].append((part, stored.get_slice(name)[place] if place else stored.get_tensor(name)))
    for name in tensors:
        have = sum(volume(part) for part, _ in parts[name])
        if have != volume(wanted[name]):
            raise damaged(folder, f"{name}: {volume(wanted[name])} numbers are wanted, {have} of them are there")
    for name, tensor in tensors.items():
        mine = local(tensor).detach()
        for part, values in parts[name]:
            mine[within(part, wanted[name])].copy_(values)
    return manifest["facts"] | {"step": manifest["step"]}


def damaged(folder: Path, what: str) -> RunError:
    """An error that says which checkpoint is damaged and what to do."""
    return RunError(f"{folder}: damaged: {what}; move this folder away to go on from the checkpoint before it")
