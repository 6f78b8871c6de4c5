"""How many chats of a file does a model answer word for word, asked greedily through its own template?

    python docs/ask.py runs/demo-tuned chats.jsonl
"""

import sys
from pathlib import Path

import checkpoints
from nanollm.data import sft
from nanollm.inference.generation import generate
from nanollm.text import tokenizer
from nanollm.text.chat import Conversation

model, words = checkpoints.load(sys.argv[1]), tokenizer.load(sys.argv[1])
for name, chats in zip(("taught", "held out"), sft.split(sft.read(Path(sys.argv[2]))), strict=True):
    right = 0
    for chat in chats:
        *before, answer = chat.messages
        ids = [*generate(model, Conversation(words, before).prompt_ids(), 100, stop_ids=words.stop_ids)]
        right += ids[-1] in words.stop_ids and words.decode(ids) == answer["content"]
    print(f"{name}: {right} of {len(chats)}")
