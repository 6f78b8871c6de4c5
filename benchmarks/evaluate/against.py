"""The same requests, answered by transformers through lm_eval's own HFLM, one at a time: are our answers the same?

    loglikelihood            |ours − theirs| ≤ 1e-4, or 1e-6 of it where that is more; the same greedy flag
    loglikelihood_rolling    the same bound: a sum of thousands of float32 is known to about 1e-6 of it
    generate_until           the same text
    chats                    the same text, from each list of messages

Both in float32. HFLM tokenizes itself, reads config.json itself, and pads nothing, since its batches are of one. It is
told to take its softmax in float64: torch's log_softmax in float32 over 49,152 tokens was off by 2.6e-6 a token on
SmolLM2, always in one direction, so sums of it differ from a sum that is exact by more than the models do.
generation_config.json is left out of it: a repetition penalty there would change what greedy means.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM

from benchmarks.evaluate.harness import Asked, NanoLM
from nanollm.errors import InputError

ABSOLUTE, RELATIVE = 1e-4, 1e-6


def reference(folder: Path, context: int, device: torch.device) -> HFLM:
    """transformers' model of a folder, as the harness runs it. Raises InputError where it cannot be loaded."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: --against hf needs a Hugging Face folder; python -m checkpoints.convert writes "
                         "one")
    try:
        hf = HFLM(pretrained=str(folder), dtype="float32", softmax_dtype="float64", device=str(device), batch_size=1,
                  max_length=context)
    except Exception as error:                                  # whatever transformers says of a folder
        raise InputError(f"{folder}: transformers cannot load it: {str(error).splitlines()[0]}") from error
    hf.model.generation_config = transformers.GenerationConfig(
        eos_token_id=hf.model.generation_config.eos_token_id, pad_token_id=hf.tokenizer.pad_token_id)
    return hf


class Report:
    """What was compared, by task and kind, and what differed."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.largest: dict[tuple[str, str], float] = {}
        self.different: list[str] = []

    def add(self, asked: Asked, theirs: Any) -> None:
        """One request."""
        task = asked.instance.task_name or "?"
        self.counts[task, asked.kind] += 1
        if asked.kind == "generate_until":
            same, told = asked.answer == theirs, f"{asked.answer!r:.90}, theirs {theirs!r:.90}"
        else:
            (ours, greedy), (other, flag) = (each if isinstance(each, tuple) else (each, None)
                                             for each in (asked.answer, theirs))
            gap = abs(ours - other)
            self.largest[task, asked.kind] = max(gap, self.largest.get((task, asked.kind), 0.0))
            same = gap <= max(ABSOLUTE, RELATIVE * abs(other)) and greedy == flag
            told = f"{asked.answer}, theirs {theirs}"
        if not same:
            self.different.append(f"{task}, document {asked.instance.doc_id}: {told}")

    def lines(self) -> list[str]:
        """For a person."""
        names = {"loglikelihood": "log-likelihoods", "loglikelihood_rolling": "texts", "generate_until": "generations"}
        found = []
        for (task, kind), count in self.counts.items():
            gap = self.largest.get((task, kind))
            found.append(f"{task:32}{count:6} {names[kind]:16}"
                         + ("" if gap is None else f"  largest difference {gap:.1e}"))
        total = self.counts.total()
        if self.different:
            return [*found, f"{len(self.different)} of {total} requests differ from transformers':",
                    *(f"  {line}" for line in self.different[:10])]
        return [*found, f"all {total} requests equal those of transformers {transformers.__version__} (float32: "
                        f"log-likelihoods within {ABSOLUTE:g}, or {RELATIVE:g} of them; same greedy flags and text)"]


def compare(lm: NanoLM, hf: HFLM) -> Report:
    """All that was asked of ours, asked of theirs."""
    report = Report()
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        mine: Sequence[Asked] = [each for each in lm.asked if each.kind == kind]
        if mine:
            answers = getattr(hf, kind)([each.instance for each in mine], disable_tqdm=True)
            for each, theirs in zip(mine, answers, strict=True):
                report.add(each, theirs)
    for messages, prompt, text in lm.chats:
        other = hf.apply_chat_template(messages, add_generation_prompt=prompt)
        if text != other:
            report.different.append(f"chat template: {text!r:.200}, theirs {other!r:.200}")
    return report
