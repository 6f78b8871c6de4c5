"""LoRA in one file: two small matrices beside each weight of a model are trained on chats, and saved as peft has them.

    python examples/lora.py FOLDER CHATS.jsonl OUT
    python generate.py --model FOLDER --adapter OUT --chat

FOLDER is a Hugging Face folder or hub id whose tokenizer has a chat template; lines of CHATS.jsonl as in finetune.py.
The weights stay as they are, in the dtype of FOLDER; A and B are float32. train.py --lora-rank does the same with
checkpoints, on many GPUs, and beside weights in 4 bits.
"""

import argparse
from pathlib import Path

import torch
from torch.nn import functional as F

import checkpoints
from nanollm import tokenizer
from nanollm.data import sft
from nanollm.data.stream import Stream
from nanollm.training import lora

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder")
parser.add_argument("chats", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--dora", action="store_true")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--context", type=int, default=1024)
parser.add_argument("--lr", type=float, default=2e-4)
args = parser.parse_args()
if args.out.exists():
    raise SystemExit(f"{args.out} exists; name another folder")

model = checkpoints.load(args.folder).train()
lora.add(model, lora.LoRA(args.rank, alpha=2 * args.rank, dora=args.dora))      # all else is frozen
parameters = list(lora.adapters(model).values())
print(f"{sum(p.numel() for p in parameters) / 1e6:.2f} M of {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M "
      "parameters are trained")

words = tokenizer.load(args.folder)
writer = sft.Writer(words)
examples = [example for chat in sft.read(args.chats) for example in writer.examples(chat)]
stream = Stream([sft.Chats(str(args.chats), examples, args.context, pad=words.eos_id or 0)], None, seed=0)
optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
for step in range(args.steps):
    batch = stream.batch(step * args.batch_size, args.batch_size)
    logits = model(batch.tokens, batch.positions).float()                       # (B, T, V)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())       # targets of −100 are passed over
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == args.steps - 1:
        print(f"step {step + 1}: loss {loss:.3f}")

checkpoints.save_adapter(model, args.out, base=args.folder)
