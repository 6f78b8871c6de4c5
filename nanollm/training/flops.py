"""How fast a run could be, and how fast it is: the FLOPs of a token, the peak of a GPU, the speed of a step.

    FLOPs of a token    6 · (weights it meets) + 12 · Σ_layers H d min(T, W)    forward and backward; forward is a third
    MFU                 FLOPs of a token · tokens a second / peak               model FLOPs utilisation

MFU counts what the model needs: nothing that is recomputed, and attention as if every token attended to all T of its
row. Half of that is masked, but published figures count it too (Chowdhery et al. 2022, arXiv 2204.02311, appendix B;
nanoGPT; torchtitan).

Shapes: T tokens of the context, H heads, d head width, W window; I channels, N state, R rank of a scan.
"""

import argparse
import resource
import sys
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch

from nanollm import config as c
from nanollm.layers import MODULES
from nanollm.layers.layer_end import LayerEnd

if TYPE_CHECKING:
    from nanollm.training.distributed import World  # imported, it would cost show.py a second

NODE = 8                    # GPUs that share the fast links
NETWORK = 50e9              # bytes a second of each GPU's own network adapter: 400 Gb/s, as in the vendor's machines


class Device(NamedTuple):
    """The vendor's figures: dense products, not "with sparsity"; bytes a second, and of a link in one direction."""
    memory: float           # bytes
    bfloat16: float         # FLOP/s
    float32: float          # FLOP/s without TF32, which torch leaves off
    bandwidth: float        # of the memory
    link: float             # to the other GPUs of the machine; the advertised figure adds both directions
    name: str               # as torch.cuda.get_device_name says it

    def between(self, ranks: int, apart: int = 1) -> float:
        """Bytes a second for each GPU in a collective of `ranks` GPUs, every `apart`-th of the run.

        Between machines a group uses the network adapters of all its GPUs. So a group of whole machines is eight times
        as fast as a group with one GPU in each machine.
        """
        in_node = min(ranks, max(1, NODE // apart))
        return self.link if ranks == in_node else min(self.link, in_node * NETWORK)


DEVICES = {
    # NVIDIA data sheets: H100 (SXM), H200 (SXM), HGX B200 (an eighth of it), A100 (SXM: 40 and 80 GB), L40S.
    # RTX 4090: Ada white paper, appendix A.
    "h100":    Device(80e9, 989.4e12, 66.9e12, 3.35e12, 450e9, "NVIDIA H100 80GB HBM3"),
    "h200":    Device(141e9, 989.4e12, 66.9e12, 4.8e12, 450e9, "NVIDIA H200"),
    "b200":    Device(180e9, 2250e12, 75e12, 7.7e12, 900e9, "NVIDIA B200"),
    "a100":    Device(80e9, 312e12, 19.5e12, 2.039e12, 300e9, "NVIDIA A100-SXM4-80GB"),
    "a100-40": Device(40e9, 312e12, 19.5e12, 1.555e12, 300e9, "NVIDIA A100-SXM4-40GB"),
    "l40s":    Device(48e9, 362.05e12, 91.6e12, 864e9, 32e9, "NVIDIA L40S"),             # linked by PCIe 4.0 ×16
    "4090":    Device(24e9, 165.2e12, 82.6e12, 1.008e12, 32e9, "NVIDIA GeForce RTX 4090"),
}


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """FLOP/s of dense products on the GPU that is there; None for a CPU, and for a GPU that is not in DEVICES."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return next((getattr(known, dtype) for known in DEVICES.values() if known.name == name), None)


def peak_memory(device: torch.device) -> float:
    """The most bytes so far: of tensors on a GPU, or of this whole process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


class Speed:
    """What a step of a run came to, for its log."""

    def __init__(self, config: c.ModelConfig, options: argparse.Namespace, world: "World") -> None:
        self.device = world.device
        peak = peak_flops(world.device, options.dtype)
        # MFU at one token a second
        self.share = peak and flops_per_token(config, options.context) / (peak * world.size)

    def entry(self, tokens: int, seconds: float, waited: float) -> dict[str, float]:
        """Of a step over so many tokens, padding not counted, that took `seconds`, `waited` of them for its rows."""
        found = {
            "tokens_per_second": round(tokens / seconds),
            "data_wait": round(waited / seconds, 4),
            "memory_gb": round(peak_memory(self.device) / 1e9, 3),
        }
        return found if self.share is None else found | {"mfu": round(tokens / seconds * self.share, 4)}


# ---- FLOPs

def flops_per_token(config: c.ModelConfig, context: int) -> float:
    """Of one token, forward and backward.

    A multiply-add is 2 FLOPs; the backward pass takes twice the forward pass, for the gradients of input and weight.
    """
    return 6.0 * _multiply_adds(config, context)


def decode_flops(config: c.ModelConfig, context: int) -> float:
    """Of one new token, the last of `context`, forward only."""
    return 2.0 * _multiply_adds(config, context)


def prefill_flops(config: c.ModelConfig, context: int) -> float:
    """Of a prompt of `context` tokens, forward only and divided by its tokens. The t-th token attends to t keys.

    The FLOPs of the t-th token grow linearly in t up to a layer's window, and linearly after it, so each stretch
    between two windows is an arithmetic series.
    """
    windows = {getattr(layer.mixer, "window", None) or 0 for layer in config.layers}
    edges = sorted({0, context} | {window for window in windows if window < context})
    # a multiply-add is 2 FLOPs, and a series is n (first + last) / 2
    flops = sum((b - a) * (_multiply_adds(config, a + 1) + _multiply_adds(config, b)) for a, b in pairwise(edges))
    return flops / context


def _multiply_adds(config: c.ModelConfig, context: int) -> int:
    """Of one token, forward: the sum of what each module counts for itself.

    A tied head counts as the head, an expert where it is chosen. Embedding, norms, RoPE and activations count nothing.
    """
    layers = 0
    for layer, count in Counter(config.layers).items():
        layers += count * MODULES[type(layer.mixer)].multiply_adds(layer.mixer, config.dim, context)
        layers += count * MODULES[type(layer.ffn)].multiply_adds(layer.ffn, config.dim) if layer.ffn else 0
        layers += count * LayerEnd.multiply_adds(layer.end, config.dim) if layer.end else 0
    return layers + config.dim * config.vocab
