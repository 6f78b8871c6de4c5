"""peft over transformers, as an oracle: a tiny loud model, an adapter of peft's beside it, and both as folders."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.fixtures import FIXTURES
from tests.oracles import tokens, write

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

SAFE = "adapter_model.safetensors"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ALL = "all-linear"


class Made(NamedTuple):
    """A base and an adapter."""
    base: Path                                   # folders
    adapter: Path
    model: nn.Module                             # peft's
    x: Tensor                                    # tokens

    def logits(self) -> Tensor:
        with torch.no_grad():
            return self.model(self.x).logits


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def base(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' model of a folder, in eval mode; in bfloat16 with the attention whose bits are ours."""
    attention = "eager" if dtype == torch.float32 else "sdpa"
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, experts_implementation="eager").eval()


def make(fixture: str, root: Path, dtype: torch.dtype = torch.float32, loud: bool = True, **config: Any) -> Made:
    """An adapter whose A, B and m are far from their first values."""
    folder = root / "base"
    with quiet():
        if not folder.exists():
            write(FIXTURES[fixture], folder, dtype)
        torch.manual_seed(3)
        model = peft.get_peft_model(base(folder, dtype), peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **config})).eval()
        if loud:
            draw = torch.Generator().manual_seed(5)
            for name, p in model.named_parameters():
                if p.requires_grad:
                    noise = torch.randn(p.shape, generator=draw)
                    p.data.copy_(p.data * (1 + 0.3 * noise) if "magnitude" in name else 0.2 * noise)
        model.save_pretrained(root / "adapter")
    return Made(folder, root / "adapter", model, tokens(FIXTURES[fixture]))


def read(made: Made, adapter: Path) -> nn.Module:
    """What peft loads from a folder that we wrote."""
    with quiet():
        return peft.PeftModel.from_pretrained(base(made.base), adapter).eval()


def peft_linear(linear: nn.Linear, **config: Any) -> nn.Module:
    """One of peft's own modules, over a Linear."""
    holder = nn.Module()
    holder.inner = linear
    with quiet():
        return peft.inject_adapter_in_model(
            peft.LoraConfig(target_modules=["inner"], **{"r": 4, "lora_alpha": 8, **config}), holder).inner


def bit_equal(a: Path, b: Path) -> bool:
    """Whether two folders have the same parts, bit for bit."""
    ours, theirs = load_file(a / SAFE), load_file(b / SAFE)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
