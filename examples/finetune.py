"""Fine-tuning in one file: load a model folder, train it on chats with a plain loop, save it.

    python examples/finetune.py FOLDER CHATS.jsonl OUT

FOLDER is a Hugging Face folder or hub id whose tokenizer has a chat template. A line of CHATS.jsonl is one chat:
{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}. Only answers have a loss.
Training takes 16 bytes a parameter, all in float32. train.py --init does the same on many GPUs.
"""

import argparse
from pathlib import Path

import torch
from torch.nn import functional as F

import checkpoints
from checkpoints.storage import writing
from nanollm import cli, tokenizer
from nanollm.data import sft
from nanollm.data.stream import Stream


def run() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("chats", type=Path)
    parser.add_argument("out", type=Path)
    for name, default in {"--steps": 100, "--batch-size": 8, "--context": 1024}.items():
        parser.add_argument(name, type=cli.whole(), default=default)
    parser.add_argument("--lr", type=float, default=2e-5)
    args = parser.parse_args()
    writing.need_place(args.out)                                     # said now, not after the training
    model = checkpoints.load(args.folder)
    stored = model.embed.weight.dtype                                # written back as it was
    model = model.float().to("cuda" if torch.cuda.is_available() else "cpu").train()
    words = tokenizer.load(args.folder)

    # one example a chat, packed into rows of --context tokens; a packed chat sees no other
    writer = sft.Writer(words)
    examples = [example for chat in sft.read(args.chats) for example in writer.examples(chat)]
    rows = sft.Chats(str(args.chats), examples, args.context, pad=words.eos_id or 0)
    stream = Stream([rows], None, seed=0)
    print(f"{len(examples)} examples in {rows.rows} rows; {rows.dropped} longer than --context are left out")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(args.steps):
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)          # down in a line
        batch = stream.batch(step * args.batch_size, args.batch_size).to(model.embed.weight.device)
        logits = model(batch.tokens, batch.positions)                               # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())       # targets of −100 are passed over
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step + 1}: loss {loss:.3f}")
    checkpoints.save(model.to(stored), args.out)                     # with the config.json and the tokenizer of FOLDER


cli.main(run)
