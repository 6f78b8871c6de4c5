"""Decoding on an NVIDIA GPU without Python: the static step (static.py) captured as a CUDA graph, replayed each token.

A step of a 1B model is some thousand kernels of a few microseconds each, and to launch one takes Python as long. A
graph is launched once a token:

    eager     Python ─ launch ─ launch ─ launch ─ …          graph     Python ─ replay
    GPU                  ▪        ▪        ▪                 GPU                ▪▪▪▪▪…

    read = reader(feed, model, cache)                   feed, bound to both; a single token a row is replayed on a GPU
    logits = read(prompt, None)                         (B, T) → (B, V)
    logits = read(token, None)                          the first captures (three steps of time), the others replay

What a graph holds are addresses: the states of the cache, the buffers of the step, the weights. It is of use as long as
the cache, and as long as the weights stay where they are.

Not captured, because an operation in it waits for the device or copies from the CPU (`uncapturable`): experts without
the kernel, those of clipped GLUs, and ALiBi. There, and where `static.refuses`, decoding goes on as before.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from nanollm import ops
from nanollm.cache import Cache
from nanollm.inference.static import StaticStep, refuses
from nanollm.layers.moe import ClippedExperts, Experts, PlainExperts
from nanollm.model import Decoder

Feed = Callable[[Decoder, Tensor, Tensor | None, Cache], Tensor]
Read = Callable[[Tensor, Tensor | None], Tensor]


class GraphedDecoder(StaticStep):
    """The static step, captured when it is first needed: once for rows that are alike, once for ragged ones."""

    def __init__(self, model: Decoder, cache: Cache) -> None:
        super().__init__(model, cache)
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor] | None] = {}      # ragged → graph, its logits

    def run(self, ragged: bool) -> Tensor:
        """Replay, after a capture where there is none yet. Where it failed, once, the step runs uncaptured."""
        if ragged not in self.graphs:
            self.graphs[ragged] = None
            try:
                with torch.cuda.device(self.cache.device):
                    self.graphs[ragged] = self.capture(ragged)
            except RuntimeError as error:
                warnings.warn(f"decoding without a CUDA graph, slower: {str(error).splitlines()[0]}", stacklevel=3)
        recorded = self.graphs[ragged]
        if recorded is None:
            return self.body(ragged)
        graph, logits = recorded
        graph.replay()
        return logits

    def capture(self, ragged: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Record the step without a trace in what the cache remembers.

        It runs twice before: kernels are compiled, and libraries take their workspaces, at a first call. A second run
        writes the same keys to the same slots; what else it changes is put back.
        """
        before = [[buffer.clone() for buffer in buffers] for _, _, buffers in self.buffers]

        def restore() -> None:
            for (_, _, buffers), copies in zip(self.buffers, before, strict=True):
                for buffer, copy in zip(buffers, copies, strict=True):
                    buffer.copy_(copy)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.body(ragged)
                restore()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: what other threads do on this GPU meanwhile, such as allocate, does not end the capture
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                logits = self.body(ragged)
        finally:                                                # nothing ran, but in Python states were replaced
            self.attach()
            restore()
        return graph, logits


def has_graphs(device: torch.device) -> bool:
    """Whether steps on this device are captured: not on AMD's GPUs, where that is untested."""
    return device.type == "cuda" and torch.version.cuda is not None


def uncapturable(model: Decoder) -> str | None:
    """Why a step of this model cannot be captured; None: nothing that is known."""
    for layer in model.config.layers:
        if getattr(layer.mixer, "alibi", None) is not None:
            return "the slopes of ALiBi are copied from the CPU"
    for module in model.modules():
        if isinstance(module, ClippedExperts):
            return "experts with a clipped GLU have no kernel, and their definition waits for the device"
        if isinstance(module, PlainExperts):
            return "experts without gates have no kernel, and their definition waits for the device"
        if isinstance(module, Experts) and (ops.mode() == "torch" or not ops.has_triton()):
            return "the definition of the experts waits for the device, and their kernel is switched off"
    return None


def reader(feed: Feed, model: Decoder, cache: Cache) -> Read:
    """feed(model, tokens, positions, cache) as a function of tokens (B, T) and positions: T = 1 is replayed on a GPU.

    A step that cannot be captured goes through feed.
    """
    step: GraphedDecoder | None = None
    possible = has_graphs(cache.device) and uncapturable(model) is None

    def read(tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        nonlocal step
        if not possible or tokens.shape[1] != 1 or refuses(cache):
            return feed(model, tokens, positions, cache)
        step = step or GraphedDecoder(model, cache)
        return step(tokens, positions)

    return read
