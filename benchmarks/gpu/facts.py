"""What this machine is, and what it reaches: bytes a second of a copy, FLOPs a second of a product. These two are the
roofline that the other parts hold their figures against."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.gpu.items import Item, Row, Setting, clock
from kernels.roofline import DEVICES, Device

PACKAGES = ("torch", "triton", "numpy", "transformers", "pytest", "liger-kernel", "flash-attn", "mamba-ssm",
            "causal-conv1d")


def items(setting: Setting) -> Iterator[Item]:
    yield Item("machine", lambda tell: machine(setting))
    yield Item("bandwidth", lambda tell: bandwidth(setting))
    yield Item("products", lambda tell: products(setting))
    yield Item("launch", lambda tell: launch(setting))


def machine(setting: Setting) -> Row:
    """Names and versions."""
    found: Row = {"device": platform.machine(), "CPUs": os.cpu_count(), "Python": platform.python_version()}
    if setting.device.type == "cuda":
        about = torch.cuda.get_device_properties(0)
        found |= {"device": about.name, "memory GB": round(about.total_memory / 1e9, 1),
                  "multiprocessors": about.multi_processor_count, "capability": f"{about.major}.{about.minor}",
                  "CUDA of torch": torch.version.cuda, "driver": driver()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"table": [{"fact": fact, "here": value} for fact, value in found.items()]}


def driver() -> str:
    """As nvidia-smi says it."""
    if shutil.which("nvidia-smi") is None:
        return "unknown: there is no nvidia-smi"
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    return said.stdout.strip() or said.stderr.strip()


def bandwidth(setting: Setting) -> Row:
    """Of a copy of 2 GiB, read and write counted; and of a sum, which only reads."""
    size = 2**20 if setting.dry else 2**31
    source = torch.randn(size // 4, device=setting.device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / clock(lambda: target.copy_(source), setting.device)
    read = source.nbytes / clock(lambda: source.sum(), setting.device)
    return {"fact": "memory", "bytes": copy, "here": f"copy {copy / 1e12:.3g} TB/s, sum {read / 1e12:.3g} TB/s"}


def products(setting: Setting) -> Row:
    """Of two large bfloat16 matrices of random numbers: zeros would run faster."""
    n = 256 if setting.dry else 8192
    a, b = (torch.randn(n, n, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * n**3 / clock(lambda: a @ b, setting.device)
    return {"fact": "bfloat16 products", "flops": rate, "here": f"{rate / 1e12:.3g} TFLOP/s"}


def launch(setting: Setting) -> Row:
    """Of Python and torch for the smallest operation: a thousand of them, then one wait."""
    x = torch.zeros(1, device=setting.device)

    def thousand() -> None:
        for _ in range(1000):
            x.add_(1)

    return {"fact": "an operation from Python", "here": f"{clock(thousand, setting.device, 5) * 1e3:.3g} µs"}


def ceilings(setting: Setting) -> Device:
    """As measured in this session; where that failed, of the H200 in kernels/roofline.py."""
    known, found = DEVICES["h200"], {}
    for row in setting.rows("facts"):
        found |= {key: row[key] for key in ("bytes", "flops") if key in row}
    names = "measured in this session" if len(found) == 2 else f"{known.name}, for what was not measured"
    return replace(known, name=names, **found)


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
