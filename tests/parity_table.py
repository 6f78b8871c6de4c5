"""Measure every fixture of test_parity once more and write what was found as docs/parity.md.

    python -m tests.parity_table
"""

import platform
import tempfile
from datetime import date
from pathlib import Path

import torch
import transformers

import checkpoints
from nanollm.generation import generate
from tests.fixtures import FIXTURES
from tests.oracles import TOKENS, Fixture, difference, reference_logits, tokens, write

REPORT = Path(__file__).parent.parent / "docs" / "parity.md"

HEAD = """# Parity with transformers, family by family

Written by `python -m tests.parity_table`; `tests/test_parity.py` holds every line of it.
{machine}

Tiny models that transformers writes with loud random weights (`tests/oracles.py`), loaded through `checkpoints.load`.
Differences are the largest difference of any logit over the spread of the logits, float32, {tokens} tokens, batch 2, against
transformers' eager and sdpa attention. bfloat16: `bit-equal` means every logit of the sdpa pass. greedy: 64 tokens with
our cache against transformers' `generate` (its full pass where its cache differs from it).

| family | model_type | eager | sdpa | bfloat16 | greedy |
|---|---|--:|--:|---|---|
"""


def greedy_agrees(fixture: Fixture, theirs: transformers.PreTrainedModel, ours: torch.nn.Module, new: int = 64) -> bool:
    """64 tokens with our cache, and the reference's."""
    prompt = tokens(fixture, batch=1, length=12)
    if fixture.length_dependent or fixture.logits is not None or not fixture.cache:
        expected = prompt
        for _ in range(new):
            expected = torch.cat([expected, reference_logits(fixture, theirs, expected)[:, -1:].argmax(-1)], 1)
    else:
        expected = theirs.generate(prompt, max_new_tokens=new, do_sample=False, eos_token_id=None)
    return list(generate(ours, prompt[0].tolist(), new)) == expected[0, 12:].tolist()


def bfloat16(fixture: Fixture, x: torch.Tensor) -> str:
    """Bit-equal, or how far either is from the float32 logits of the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = reference_logits(fixture, write(fixture, Path(folder), torch.bfloat16), x, *fixture.attention[-1:])
        ours, exact = checkpoints.load(folder)(x), checkpoints.load(folder, dtype=torch.float32)(x)
    if torch.equal(ours, theirs):
        return "bit-equal"
    error = lambda logits: (logits.float() - exact).square().mean().sqrt() / exact.std()
    return f"error {error(ours):.3f}, theirs {error(theirs):.3f}"


@torch.inference_mode()
def row(name: str) -> str:
    """One line of the table."""
    fixture = FIXTURES[name]
    x = tokens(fixture)
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = write(fixture, Path(folder)), checkpoints.load(folder)
    kind = ours.origin.values["model_type"]
    against = [difference(ours(x), reference_logits(fixture, theirs, x, attention)) for attention in (fixture.attention or (None,))]
    return f"| {name} | {kind} | {against[0]:.0e} | {against[-1]:.0e} | {bfloat16(fixture, x)} | {'equal' if greedy_agrees(fixture, theirs, ours) else 'DIFFER'} |"


if __name__ == "__main__":
    torch.set_num_threads(1)
    machine = f"{platform.machine()}, one thread, torch {torch.__version__}, transformers {transformers.__version__}, {date.today()}."
    REPORT.write_text(HEAD.format(machine=machine, tokens=TOKENS) + "\n".join(map(row, FIXTURES)) + "\n")
    print(REPORT.read_text())
