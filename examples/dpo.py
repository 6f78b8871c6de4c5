"""DPO in one file: adapters beside the weights of a model learn which of two answers is the better one.

    python examples/dpo.py FOLDER PAIRS.jsonl OUT
    python generate.py --model FOLDER --adapter OUT --chat

FOLDER is a Hugging Face folder or hub id whose tokenizer has a chat template. A line of PAIRS.jsonl is one pair:
{"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"}. The loss is −log σ(β(ρ_w − ρ_l)), ρ = log π(y|x) − log
π_ref(y|x). Before the first step B is 0, so the model is its own reference: its log-probabilities are computed once.
train.py --preference does the same with other losses, checkpoints, and on many GPUs.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import checkpoints
from nanollm import cli, tokenizer
from nanollm.data import preferences
from nanollm.data.chat_writing import Writer
from nanollm.training import lora

parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder")
parser.add_argument("pairs", type=Path)
parser.add_argument("out", type=Path)
for name, default in {"--rank": 16, "--epochs": 1, "--batch-size": 4}.items():
    parser.add_argument(name, type=cli.whole(), default=default)
parser.add_argument("--beta", type=float, default=0.1)
parser.add_argument("--lr", type=float, default=1e-5)
args = parser.parse_args()


def log_probs(batch: preferences.PairBatch) -> Tensor:
    """log p of each answer (2B,): the better ones first. Targets of −100, the prompt and the padding, count nothing."""
    each = model(batch.tokens).float().log_softmax(-1).gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0]
    return (each * (batch.targets >= 0)).sum(1)


model, words = checkpoints.load(args.folder), tokenizer.load(args.folder)
lora.add(model, lora.LoRA(args.rank, alpha=2 * args.rank))                      # all else is frozen
items, writer = preferences.Sets([args.pairs], None).items[0], Writer(words)
pairs = [preferences.as_written(item, *map(writer.examples, item.answers)) for item in items]
rows = preferences.Pairs(str(args.pairs), pairs, context=model.config.context or 1 << 30)
order = torch.randperm(rows.rows, generator=torch.Generator().manual_seed(0)).split(args.batch_size)
batches = [rows.stack([rows.row(int(i)) for i in some]) for some in order]
with torch.no_grad():
    reference = [log_probs(batch) for batch in batches]
optimizer = torch.optim.AdamW(lora.adapters(model).values(), lr=args.lr, weight_decay=0.0)
for step, (batch, before) in enumerate([*zip(batches, reference, strict=True)] * args.epochs):
    better, worse = (log_probs(batch) - before).chunk(2)
    loss = -F.logsigmoid(args.beta * (better - worse)).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss:.3f}, the better answer's log-ratio is larger by {(better - worse).mean():.2f}")
checkpoints.save_adapter(model, args.out, base=args.folder)
