"""How many chats of a file does a model answer word for word, asked greedily through its own template? And what has
become of its perplexity on text that it was not taught, the beginning of LICENSE?

    python docs/ask.py runs/demo-tuned chats.jsonl
    python docs/ask.py FOLDER facts.jsonl runs/FOLDER-tuned         the last is an adapter
    python docs/ask.py FOLDER facts.jsonl runs/qlora nf4            one that was trained beside weights in few bits
"""

import sys
from pathlib import Path

import torch

import checkpoints
from nanollm.data import sft
from nanollm.inference.generation import generate
from nanollm.text import tokenizer
from nanollm.text.chat import Conversation
from nanollm.training import lora

folder, file, adapter, kind, *_ = *sys.argv[1:], None, None
words = tokenizer.load(folder)
model = lora.merge(checkpoints.load(folder, dtype=torch.float32, adapter=adapter, quantize=kind))
for name, chats in zip(("taught", "held out"), sft.split(sft.read(Path(file))), strict=True):
    right = 0
    for chat in chats:
        *before, answer = chat.messages
        ids = [*generate(model, Conversation(words, before).prompt_ids(), 100, stop_ids=words.stop_ids)]
        right += ids[-1] in words.stop_ids and words.decode(ids) == answer["content"]
    print(f"{name}: {right} of {len(chats)}")

text = torch.tensor([words.encode((Path(__file__).parent.parent / "LICENSE").read_text())[:1000]])
with torch.inference_mode():
    logits = model(text[:, :-1])[0].float()
print(f"perplexity of LICENSE: {torch.nn.functional.cross_entropy(logits, text[0, 1:]).exp():.2f}")
