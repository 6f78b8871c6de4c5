"""Which of two answers does a model find the likelier, and by how much? And how does it answer itself?

    python docs/prefer.py FOLDER held.jsonl                     the model itself
    python docs/prefer.py FOLDER held.jsonl runs/dpo            with an adapter
"""

import sys
from pathlib import Path

import torch

import checkpoints
from nanollm.data import preferences
from nanollm.data.chat_writing import Writer
from nanollm.inference.generation import generate
from nanollm.text import tokenizer
from nanollm.text.chat import Conversation
from nanollm.training import lora
from nanollm.training.log_probs import answer_log_probs

folder, file, adapter, *_ = *sys.argv[1:], None
words = tokenizer.load(folder)
model = lora.merge(checkpoints.load(folder, dtype=torch.float32, adapter=adapter))
items, writer = preferences.Sets([Path(file)], None).items[0], Writer(words)
written = [preferences.as_written(item, *map(writer.examples, item.answers)) for item in items]
rows = preferences.Pairs(file, written, 2048)
batch = rows.stack([rows.row(i) for i in range(rows.rows)])
with torch.inference_mode():
    chosen, rejected = answer_log_probs(model, batch.tokens, batch.targets).total.chunk(2)
print(f"of {len(items)} pairs the better answer is likelier in {int((chosen > rejected).sum())}; "
      f"its log p is larger by {(chosen - rejected).mean():.2f} on average")
for item in items[:3]:
    ids = [*generate(model, Conversation(words, item.prompt.messages).prompt_ids(), 40, stop_ids=words.stop_ids)]
    print(f"  {item.prompt.messages[-1]['content']}  →  {words.decode(ids)}")
