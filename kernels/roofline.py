"""The floor of every operation: no version of it can run faster on a device than its work at the device's ceilings.

    time  ≥  max( bytes / bandwidth,  FLOPs / matrix rate,  exp2 / their rate )
    Williams, Waterman & Patterson 2009, the roofline

    python -m kernels.roofline                  the floors of a decoder's operations on an H200, and what sets them
    python -m kernels.roofline --device a100

bytes counts each input read once and each output written once, whatever a kernel does; FLOPs are those of the matrix
products (2 a multiply-add); exp2 are counted where they cost as much as the rest: an attention spends one a pair of
tokens, a selective scan one a state and step. What is left out (a sum here, a sigmoid there) is small beside these.

Shapes: M rows, D width, B batch, T tokens, S keys, H query heads, K key/value heads, d head width, F feed-forward
width, E experts, k experts a token, I channels, N state, G groups, P channels a head, Q chunk, V vocabulary. `size` is
bytes an element, 2 for bfloat16.
"""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Ceilings: bytes a second of memory (read plus written), FLOPs a second of 16-bit products, exp2 a second."""
    name: str
    bytes: float
    flops: float
    exp2: float


# exp2: 16 a clock and multiprocessor. H200: memory and products as measured with a large copy and a large product of
# random numbers, which reach about 90 and 80 % of the data sheet; the others: data sheets, which no program reaches.
DEVICES = {
    "a100": Device("A100 SXM 80 GB (data sheet)", 2.04e12, 312e12, 16 * 108 * 1.41e9),
    "h100": Device("H100 SXM (data sheet)", 3.35e12, 989e12, 16 * 132 * 1.98e9),
    "h200": Device("H200 (measured)", 4.3e12, 790e12, 16 * 132 * 1.98e9),
    "b200": Device("B200 (data sheet)", 8.0e12, 2250e12, 16 * 148 * 1.97e9),
}


@dataclass(frozen=True)
class Work:
    """What an operation cannot do without."""
    bytes: float
    flops: float = 0
    exp2: float = 0

    def times(self, device: Device) -> dict[str, float]:
        """Seconds that each resource alone would take."""
        return {"bytes": self.bytes / device.bytes, "FLOPs": self.flops / device.flops, "exp2": self.exp2 / device.exp2}

    def floor(self, device: Device) -> float:
        """Seconds: the longest of them."""
        return max(self.times(device).values())

    def limit(self, device: Device) -> str:
        """Which resource that is."""
        times = self.times(device)
        return max(times, key=lambda resource: times[resource])


def norm(M: int, D: int, *, add: bool = False, backward: bool = False, size: int = 2) -> Work:
    """RMSNorm and LayerNorm: read x, write y; ADD: also read the other and write the sum.

    Backward: x, dy, dx; and the stream's."""
    tensors = (4 if add else 3) if backward else (4 if add else 2)
    return Work(tensors * M * D * size)


def rotate(tokens: int, heads: int, d: int, *, size: int = 2) -> Work:
    """RoPE of `heads` heads, query and key together, forward or backward: read, write, and the tables once."""
    return Work(2 * tokens * heads * d * size + 2 * tokens * d * size)


def gated(M: int, F: int, *, backward: bool = False, size: int = 2) -> Work:
    """act(gate)·up: two read, one written. Backward: three read, two written."""
    return Work((5 if backward else 3) * M * F * size)


def pairs(T: int, window: int | None = None, documents: int = 1) -> int:
    """Query-key pairs of one causal row of T tokens, cut in equal documents; a query sees at most `window` keys."""
    T = T // documents
    W = T if window is None else min(window, T)
    return documents * (W * (W + 1) // 2 + (T - W) * W)


def attend(B: int, H: int, K: int, T: int, d: int, *, window: int | None = None, documents: int = 1,
           backward: bool = False, size: int = 2) -> Work:
    """q·k and p·v, 4d FLOPs a pair; backward five products for two.

    Bytes: q, k, v, o; backward the same again, and as many gradients."""
    seen = B * H * pairs(T, window, documents)
    tensors = B * T * d * (2 * H + 2 * K) * size
    return Work(tensors * (2 if backward else 1), 4 * d * seen * (2.5 if backward else 1), seen)


def decode(B: int, H: int, K: int, S: int, d: int, *, size: int = 2) -> Work:
    """One new token a row against S keys: k and v are read once for all the heads that share them."""
    return Work(2 * B * S * K * d * size + 2 * B * H * d * size, 4 * B * H * S * d, B * H * S)


def expert_mlp(tokens: int, D: int, F: int, E: int, k: int, *, backward: bool = False, size: int = 2) -> Work:
    """Three products a token and expert, six more for their gradients.

    Each expert that is hit is read once (and its gradient written)."""
    hit = min(E, tokens * k)
    weights, rows = 3 * hit * D * F * size, 2 * tokens * D * size
    return Work((weights + rows) * (2 if backward else 1), 6 * tokens * k * D * F * (2 if backward else 1))


def mamba_scan(B: int, T: int, I: int, N: int, *, backward: bool = False, size: int = 2) -> Work:
    """x, Δ, z read and y written, and an exp2 a state and step (two more for softplus and silu).

    Backward: as many gradients."""
    return Work((8 if backward else 4) * B * T * I * size + 2 * B * T * N * size, 0, B * T * I * (N + 2))


def causal_conv(B: int, T: int, I: int, *, backward: bool = False, size: int = 2) -> Work:
    """x read, y written. Backward: x, dy, dx."""
    return Work((3 if backward else 2) * B * T * I * size)


def ssd(B: int, T: int, H: int, P: int, G: int, N: int, Q: int, *, backward: bool = False, size: int = 2) -> Work:
    """C Bᵀ a group, its product with x a head, states in and out.

    Bytes: x, y, B, C, Δ, and what a chunked form writes and reads: the states."""
    tensors = B * T * (2 * H * P + 2 * G * N) * size + B * T * H * 4
    states = 2 * B * (T // Q) * H * P * N * 4
    flops = 2 * B * T * (G * Q * N + H * Q * P + 2 * H * N * P)
    return Work((tensors + states) * (2 if backward else 1), flops * (2.5 if backward else 1))


def delta_walk(B: int, T: int, H: int, P: int, N: int, Q: int, *, backward: bool = False) -> Work:
    """W, Y and K read, U and the states written, two products a chunk; three more for the gradients.

    All float32: of a floor in FLOPs of 16-bit products no more than a twelfth can be reached."""
    states, rows = B * (T // Q) * H * P * N, B * T * H * (2 * P + 2 * N)
    return Work((states + rows) * 4 * (2 if backward else 1), 4 * B * T * H * N * P * (2.5 if backward else 1))


def linear_cross_entropy(M: int, D: int, V: int, *, backward: bool = True, size: int = 2) -> Work:
    """Logits, and with gradients dx and dW: 2MDV each. Bytes: x and W, and their gradients; logits need not exist."""
    return Work((M * D + V * D) * size * (2 if backward else 1), 2 * M * D * V * (3 if backward else 1))


def quantized_linear(M: int, N: int, K: int, bits: int, group: int) -> Work:
    """Packed weights, a scale and zero a group, and little else."""
    return Work(N * K * bits / 8 + (4 * N * K / group if bits == 4 else 4 * N) + 2 * M * (N + K), 2 * M * N * K)


def examples() -> dict[str, Work]:
    """One real shape an operation: a Llama-3-8B layer on 16,384 tokens, and state-space and expert models beside it."""
    return {
        "rms_norm           16384 x 4096": norm(16384, 4096),
        "rms_norm backward": norm(16384, 4096, backward=True),
        "add_rms_norm": norm(16384, 4096, add=True),
        "add_rms_norm backward": norm(16384, 4096, add=True, backward=True),
        "rotate             16384 x 40 heads x 128": rotate(16384, 40, 128),
        "gated              16384 x 14336": gated(16384, 14336),
        "gated backward": gated(16384, 14336, backward=True),
        "attend             2 x 8192 x 32 heads x 128": attend(2, 32, 8, 8192, 128),
        "attend backward": attend(2, 32, 8, 8192, 128, backward=True),
        "attend window 1024 1 x 16384 x 32 heads x 128": attend(1, 32, 8, 16384, 128, window=1024),
        "decode             32 rows x 8192 keys x 8 x 128": decode(32, 32, 8, 8192, 128),
        "expert_mlp         32768 x 2048, 8 of 128 x 768": expert_mlp(32768, 2048, 768, 128, 8),
        "expert_mlp backward": expert_mlp(32768, 2048, 768, 128, 8, backward=True),
        "mamba_scan         8 x 2048 x 4096 x 16": mamba_scan(8, 2048, 4096, 16),
        "mamba_scan backward": mamba_scan(8, 2048, 4096, 16, backward=True),
        "causal_conv        8 x 2048 x 4096": causal_conv(8, 2048, 4096),
        "ssd                8 x 2048 x 64 x 64 x 128": ssd(8, 2048, 64, 64, 1, 128, 256),
        "delta_walk         8 x 2048 x 32 x 128 x 128": delta_walk(8, 2048, 32, 128, 128, 64),
        "linear_cross_entropy  4096 x 4096 x 128256": linear_cross_entropy(4096, 4096, 128256),
        "quantized_linear   28672 x 8192 int8": quantized_linear(1, 28672, 8192, 8, 8192),
        "quantized_linear   28672 x 8192 int4": quantized_linear(1, 28672, 8192, 4, 128),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The least time that each operation can take, and what sets it.")
    parser.add_argument("--device", choices=DEVICES, default="h200", help="whose ceilings to use (%(default)s)")
    device = DEVICES[parser.parse_args().device]
    ceilings = f"{device.bytes / 1e12:.2f} TB/s, {device.flops / 1e12:.0f} TFLOP/s, {device.exp2 / 1e12:.2f} T exp2/s"
    print(f"{device.name}: {ceilings}\n")
    for name, work in examples().items():
        parts = "".join(f"  {what} {t * 1e3:.3f}" for what, t in work.times(device).items())
        print(f"{name:48} {work.floor(device) * 1e3:8.3f} ms   set by {work.limit(device):6}{parts}")
