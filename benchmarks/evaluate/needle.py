"""Needle in a haystack: one sentence in a long text, then a question about it; by length of the prompt and by depth.

    … text … The secret number of Ravenna is 48213. … text … What is the secret number of Ravenna?

Found is an answer that has the number in it; each cell of the picture is a prompt of so many tokens with the sentence
at such a share of it. The number and the city differ from cell to cell, the same each time. The text is a file, as
often as it takes; a sentence is put behind a space. With a chat template the whole is one question; without one it ends
with "The secret number of Ravenna is", which the model continues.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.evaluate.text import read
from nanollm.errors import InputError
from nanollm.inference.context import own_context, past_context
from nanollm.inference.generation import generate
from nanollm.inference.terminal import note
from nanollm.model import Decoder
from nanollm.text.chat import Conversation
from nanollm.text.tokenizer import Tokenizer
from nanollm.training import plot

CITIES = ("Ravenna", "Tampere", "Cusco", "Nagoya", "Tartu", "Leuven", "Oaxaca", "Bergen")
NEW = 24                # tokens of an answer: a number and a few words around it
ROOM = 100              # tokens of a prompt for needle, question and template


@dataclass(frozen=True)
class Needle:
    """A sentence and its question."""
    city: str
    number: int

    @property
    def begun(self) -> str:
        """Without its end, for a model that goes on."""
        return f"The secret number of {self.city} is"

    def prompt(self, haystack: str, depth: float, chat: bool) -> str:
        """The haystack with the sentence at a share of it, and what is asked. The cut is at a space."""
        at = len(haystack) if depth >= 1 else max(haystack.rfind(" ", 0, round(depth * len(haystack))) + 1, 0)
        text = f"{haystack[:at]} {self.begun} {self.number}. {haystack[at:]}\n\n"
        return text + (f"What is the secret number of {self.city}?" if chat else self.begun)


def grid(model: Decoder, tokenizer: Tokenizer, text: str, lengths: Sequence[int], depths: Sequence[float],
         chat: bool) -> list[list[float]]:
    """1 where the number was found, else 0: a row a depth, a column a length."""
    draw = random.Random(0)
    ids = tokenizer.encode(text, bos=False)
    found = [[0.0] * len(lengths) for _ in depths]
    with tqdm(total=len(lengths) * len(depths), desc="needles", disable=None, leave=False) as bar:
        for column, length in enumerate(lengths):
            wanted = length - ROOM
            haystack = tokenizer.decode((ids * (wanted // len(ids) + 1))[:wanted], continues=True)
            for row, depth in enumerate(depths):
                needle = Needle(draw.choice(CITIES), draw.randrange(10_000, 100_000))
                prompt = needle.prompt(haystack, depth, chat)
                if chat:
                    conversation = Conversation(tokenizer)
                    conversation.add("user", prompt)
                    asked = conversation.prompt_ids()
                else:
                    asked = tokenizer.encode(prompt)
                answer = tokenizer.decode(list(generate(model, asked, NEW, stop_ids=tokenizer.stop_ids)))
                found[row][column] = float(str(needle.number) in answer.replace(",", ""))
                bar.update()
    return found


def report(model: Decoder, tokenizer: Tokenizer, path: Path, lengths: list[int] | None, depths: int | None,
           chat: bool, out: Path | None) -> None:
    """Print the grid, and draw it in `out`. Raises InputError where there is nothing to search."""
    text = read(path)
    if not text.strip():
        raise InputError(f"{path}: it is empty, expected text to hide a sentence in")
    own = own_context(model.config) or 2048
    lengths = lengths or [own // 8, own // 4, own // 2, own - NEW]
    if min(lengths) < 2 * ROOM:
        raise InputError(f"--lengths {min(lengths)}: expected {2 * ROOM} tokens or more, of which {ROOM} are for the "
                         "sentence and the question")
    if told := past_context(model.config, max(lengths)):
        note(f"[{told}]")
    count = depths or 5
    places = [row / (count - 1) for row in range(count)]
    found = grid(model, tokenizer, text, lengths, places, chat)
    print("depth  " + "".join(f"{length:>8,}" for length in lengths) + "   tokens")
    for place, row in zip(places, found, strict=True):
        print(f"{place:5.0%}  " + "".join(f"{'found' if cell else '–':>8}" for cell in row))
    share = sum(map(sum, found)) / (len(lengths) * count)
    print(f"found {share:.0%} of {len(lengths) * count}")
    if out:
        title = f"needle in {path.name}: {share:.0%} found"
        if not plot.found_where(out / "needle.png", lengths, places, found, title):
            raise InputError("--out: matplotlib, which draws the picture, is not installed; pip install -e '.[train]'")
        note(f"[{out / 'needle.png'}]")
