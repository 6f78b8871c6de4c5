"""Training in one file: a small Llama learns the bytes of a text, then writes some of its own.

    python examples/loop.py TEXT.txt --steps 500

A token is a byte, so the vocabulary is 256 and there is no tokenizer. What is left out here is in train.py: several
GPUs, gradient accumulation, packed documents, resuming. Shapes: B batch, T tokens, V = 256.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from nanollm import Decoder, ModelConfig, generate
from nanollm.config import MLP, Attention, Layer, Rope

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("text", type=Path, help="a text file")
parser.add_argument("--steps", type=int, default=500)
args = parser.parse_args()

B, T, RATE, WARMUP = 8, 128, 3e-3, 10
if not args.text.is_file() or args.text.stat().st_size < 10 * (T + 2):          # the last tenth is longer than T
    parser.error(f"{args.text}: expected a text file of at least {10 * (T + 2)} bytes")
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
data = torch.frombuffer(bytearray(args.text.read_bytes()), dtype=torch.uint8).long().to(device)
training, validation = data[: -len(data) // 10], data[-len(data) // 10 :]       # the last tenth is not trained on

layer = Layer(Attention(heads=4, kv_heads=2, head_dim=32, rope=Rope()), MLP(hidden=352))
model = Decoder(ModelConfig(vocab=256, dim=128, layers=(layer,) * 4, tied=True, context=T)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)


def loss_on(source: Tensor) -> Tensor:
    """Mean cross-entropy of B windows of the source, in nats per byte."""
    starts = torch.randint(len(source) - T, (B, 1), device=device)
    windows = source[starts + torch.arange(T + 1, device=device)]               # (B, T + 1)
    logits = model(windows[:, :-1])                                             # (B, T, V): of the next byte
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


for step in range(args.steps):
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
    optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / WARMUP) * cosine
    loss = loss_on(training)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 100 == 0 or step == args.steps - 1:
        with torch.no_grad():
            measured = sum(loss_on(validation).item() for _ in range(4)) / 4
        print(f"step {step + 1}: training loss {loss:.3f}, validation loss {measured:.3f} nats per byte")

print(bytes(generate(model, [10], 200, temperature=0.8, seed=1)).decode(errors="replace"))      # after a newline
