"""A reward, as a function that train.py --reward-function docs.rewards:three_words is given; and what a model gets.

    python -m docs.rewards FOLDER held.jsonl                    the model itself: four answers to each prompt
    python -m docs.rewards FOLDER held.jsonl runs/grpo          with an adapter
"""

import json
import sys
from pathlib import Path

import checkpoints
from nanollm.inference.many import answers
from nanollm.text import tokenizer
from nanollm.text.chat import Conversation


def three_words(completions, **columns):
    """1 for an answer of three words, 1/2 for one word more or less, 1/3 for two …"""
    return [1 / (1 + abs(len(text.split()) - 3)) for text in completions]


if __name__ == "__main__":
    folder, file, adapter, *_ = *sys.argv[1:], None
    model, words = checkpoints.load(folder, adapter=adapter), tokenizer.load(folder)
    questions = [json.loads(line)["prompt"] for line in Path(file).read_text().splitlines()] * 4
    prompts = [Conversation(words, [{"role": "user", "content": text}]).prompt_ids() for text in questions]
    found = answers(model, prompts, range(100, 100 + len(prompts)), 12, 1.0, words.stop_ids)
    texts = [words.decode(ids) for ids, *_ in found]
    rewards = three_words(texts)
    print(f"{len(texts)} answers: reward {sum(rewards) / len(rewards):.3f}, {rewards.count(1.0)} of three words, "
          f"{sum(cut for *_, cut in found)} cut at 12 tokens")
    for question, text in zip(questions[:8], texts, strict=False):
        print(f"  {question}  →  {text!r}")
