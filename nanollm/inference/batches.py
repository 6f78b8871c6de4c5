"""Prompts from a file, answers to a file, a batch at a time.

    in     {"prompt": "Once"}                                                      continued as it stands
           {"messages": [{"role": "user", "content": "Hi"}], "id": 7}              through the model's template
    out    {"prompt": "Once", "answer": " upon a time", "finish_reason": "length"}
           {"messages": […], "id": 7, "answer": "Hello!", "finish_reason": "stop"}

Line n of the one belongs to line n of the other. So a run that was stopped goes on where its file ends: lines that are
there are compared with the prompts and passed over, and an incomplete last one is written again. All prompts are read
and encoded before the first is answered: what is wrong with one is said at once, with its line.

In float32 an answer is the same whatever stands beside it in the batch. In bfloat16 a near tie of two tokens may fall
otherwise, and at a temperature the draws are those of the batch.
"""

import json
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanollm.errors import InputError, NanollmError
from nanollm.inference.generation import StopText, answer_batch
from nanollm.inference.terminal import note
from nanollm.inference.written import finish_reason, until
from nanollm.model import Decoder
from nanollm.text.chat import Conversation, messages_of
from nanollm.text.tokenizer import Tokenizer

ADDED = ("answer", "finish_reason")


@dataclass(frozen=True)
class Job:
    """A line of the file."""
    line: dict[str, Any]
    ids: Sequence[int]
    continues: bool                # the answer goes on from the prompt's text


def read_jobs(path: Path, tokenizer: Tokenizer, special: bool = False) -> list[Job]:
    """All lines of a file of prompts; empty ones are passed over. special: a "prompt" may have special tokens.

    Raises InputError or TokenizerError, with the file and the line.
    """
    jobs = []
    for number, line in _lines(_read(path), path):
        where = f"{path}, line {number}"
        if ("prompt" in line) == ("messages" in line):
            raise InputError(f'{where}: found {", ".join(line) or "nothing"}, expected "prompt" or "messages"')
        if taken := [name for name in ADDED if name in line]:
            raise InputError(f"{where}: it has {taken[0]} already, which is what will be added")
        try:
            if "prompt" in line:
                if not isinstance(line["prompt"], str):
                    raise InputError(f"prompt is {str(line['prompt'])[:80]}, expected text")
                ids = tokenizer.encode(line["prompt"], special=special)
            else:
                ids = Conversation(tokenizer, messages_of(line, "messages"), line.get("tools")).prompt_ids()
            if not ids:
                raise InputError("the prompt is empty, and the tokenizer puts no token before it")
        except NanollmError as error:
            raise type(error)(f"{where}: {error}") from None
        jobs.append(Job(line, array("i", ids), "prompt" in line))
    return jobs


def finished(path: Path, jobs: Sequence[Job]) -> int:
    """How many of the jobs a file of answers has. What a stopped run left of a line at its end is cut off.

    Raises InputError where anything in it belongs to other prompts; then the file is as it was.
    """
    if not path.is_file():                                 # none yet; or /dev/stdout, of which nothing can be read
        return 0
    done, expected = 0, "go on with the prompts that it was made from, or give another --out"
    data = _read(path)
    whole = data.rfind(b"\n") + 1
    for number, line in _lines(data[:whole], path):
        asked = {name: value for name, value in line.items() if name not in ADDED}
        if done >= len(jobs) or asked != jobs[done].line or not set(ADDED) <= line.keys():
            raise InputError(f"{path}, line {number}: not the answer to prompt {done + 1}; {expected}")
        done += 1
    if rest := data[whole:]:
        begun = json_line(jobs[done].line)[:-2].encode() if done < len(jobs) else b""        # without }\n
        if not begun or not begun.startswith(rest[: len(begun)]):
            raise InputError(f"{path}: its last line is not the answer to prompt {done + 1}; {expected}")
        os.truncate(path, whole)
    return done


def answer_jobs(model: Decoder, tokenizer: Tokenizer, jobs: Sequence[Job], done: int, out: Path, batch_size: int,
                max_new_tokens: int, stop: Sequence[str], sampling: dict[str, Any]) -> None:
    """Write the answers that `out` lacks, those after the first `done`; a progress bar where there is a terminal.

    sampling: of `generate_batch`; a seed is that of the first prompt, and counts one up with each.
    """
    rows, seed = model.config.positions, sampling["seed"]
    for number, job in enumerate(jobs, 1):
        if rows is not None and len(job.ids) + max_new_tokens > rows + 1:
            raise InputError(f"prompt {number} has {len(job.ids)} tokens, and with {max_new_tokens} new ones it is "
                             f"longer than the {rows} positions of the model: give a smaller --max-new-tokens")
    try:
        with out.open("a", encoding="utf-8") as file, tqdm(total=len(jobs), initial=done, unit="prompt",
                                                          disable=None) as bar:
            for start in range(done, len(jobs), batch_size):
                batch = jobs[start : start + batch_size]
                drawn = sampling | {"seed": seed if seed is None else seed + start}
                answers = answer_batch(model, [job.ids for job in batch], max_new_tokens, stop_ids=tokenizer.stop_ids,
                                       stop=lambda: StopText(tokenizer.stream(continues=True), stop), **drawn)
                for job, answer in zip(batch, answers, strict=True):
                    text = until(tokenizer.decode(answer.tokens, continues=job.continues), stop)
                    file.write(json_line(job.line | {"answer": text, "finish_reason": finish_reason(answer.ended)}))
                file.flush()
                bar.update(len(batch))
    except KeyboardInterrupt:
        note(f"[stopped; the same command goes on where {out} ends]")
        raise
    except OSError as error:
        raise InputError(f"{out}: {error.strerror}; the same command goes on where the file ends") from None


def json_line(value: dict[str, Any]) -> str:
    """As it can be written in UTF-8: half a surrogate pair, which JSON may hold, is spelled out, and then all else."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value)
    return text + "\n"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _lines(data: bytes, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file, with the number of their line."""
    for number, text in enumerate(data.splitlines(), 1):
        if text.strip():
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not JSON ({error!s:.80})") from None
            if not isinstance(value, dict):
                raise InputError(f"{path}, line {number}: found {str(value)[:80]}, expected an object")
            yield number, value
