"""GRPO in one file: a model answers questions, a function rewards the answers, and adapters learn the better ones.

    python examples/grpo.py FOLDER PROMPTS.jsonl OUT
    python generate.py --model FOLDER --adapter OUT --chat

FOLDER is a Hugging Face folder or hub id whose tokenizer has a chat template. A line of PROMPTS.jsonl is one question:
{"prompt": "What is the capital of Peru?"}. The reward is yours: write another `reward` below.

    A_i = (R_i − mean R) / (std R + 1e-4)              over the answers to one prompt, the group
    L   = −1/n Σ_i Σ_t A_i π(y_t) / π_old(y_t)         n tokens in all; the fraction is 1, its gradient that of log π

Each batch of answers is learnt from once, so nothing is clipped. train.py --grpo does the same with clipping, a KL to
the model as it was, other normalisers, several updates a batch, checkpoints, and on many GPUs.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from torch import Tensor

import checkpoints
from nanollm import cli, tokenizer
from nanollm.inference.many import answers
from nanollm.text.chat import Conversation
from nanollm.training import lora

parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder")
parser.add_argument("prompts", type=Path)
parser.add_argument("out", type=Path)
for name, default in {"--rank": 16, "--steps": 20, "--batch-size": 2, "--group": 8, "--max-new-tokens": 16}.items():
    parser.add_argument(name, type=cli.whole(), default=default)
parser.add_argument("--temperature", type=float, default=1.0)
parser.add_argument("--lr", type=float, default=1e-4)
args = parser.parse_args()


def reward(prompt: str, answer: str) -> float:
    """1 for an answer of three words, 1/2 for one more or less, 1/3 for two …"""
    return 1 / (1 + abs(len(answer.split()) - 3))


def log_probs(prompts: list[list[int]], said: list[list[int]]) -> tuple[Tensor, Tensor]:
    """log p of each token of the answers, and where there is one: (B, T − 1) each. The end of an answer is a token."""
    rows = [prompt + answer for prompt, answer in zip(prompts, said, strict=True)]
    tokens, mask = torch.zeros(2, len(rows), max(map(len, rows)), dtype=torch.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, len(prompts[i]) : len(row)] = torch.tensor(row), 1
    logits = model(tokens).float()[:, :-1] / args.temperature           # as they were sampled
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0], mask[:, 1:]


model, words = checkpoints.load(args.folder), tokenizer.load(args.folder)
lora.add(model, lora.LoRA(args.rank, alpha=2 * args.rank))                      # all else is frozen
questions = [json.loads(line)["prompt"] for line in args.prompts.read_text().splitlines()]
optimizer = torch.optim.AdamW(lora.adapters(model).values(), lr=args.lr, weight_decay=0.0)
draw = random.Random(0)
for step in range(args.steps):
    asked = [question for question in draw.choices(questions, k=args.batch_size) for _ in range(args.group)]
    prompts = [Conversation(words, [{"role": "user", "content": question}]).prompt_ids() for question in asked]
    seeds = [draw.getrandbits(32) for _ in asked]
    found = answers(model, prompts, seeds, args.max_new_tokens, args.temperature, words.stop_ids)
    said, sampled = [ids for ids, *_ in found], torch.cat([torch.tensor(log_p) for _, log_p, _ in found])
    rewards = torch.tensor([reward(question, words.decode(ids)) for question, ids in zip(asked, said, strict=True)])
    groups = rewards.view(args.batch_size, args.group)
    advantage = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1, 1)
    log_p, mask = log_probs(prompts, said)
    loss = -((log_p - log_p.detach()).exp() * advantage * mask).sum() / mask.sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    apart = (log_p.detach()[mask.bool()] - sampled).abs().max()
    print(f"step {step + 1}: reward {rewards.mean():.3f}, {mask.sum() / len(said):.1f} tokens an answer; log p of "
          f"sampler and trainer differ by at most {apart:.1e}")
checkpoints.save_adapter(model, args.out, base=args.folder)
