"""Prompts from a file, answers to a file, a batch at a time.

    in     {"prompt": "Once"}                                                      continued as it stands
           {"messages": [{"role": "user", "content": "Hi"}], "id": 7}              through the model's template
    out    {"prompt": "Once", "answer": " upon a time", "finish_reason": "length"}
           {"messages": […], "id": 7, "answer": "Hello!", "finish_reason": "stop"}

Line n of the one belongs to line n of the other; where a prompt gets several answers, each has its line, with "index".
So a run that was stopped goes on where its file ends: lines that are there are compared with the prompts and passed
over, and an incomplete last one is written again. All prompts are read and encoded before the first is answered: what
is wrong with one is said at once, with its line.

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

from nanollm.config.positions import places
from nanollm.errors import InputError, NanollmError, counted
from nanollm.inference.generation import answer_batch
from nanollm.inference.request import Request
from nanollm.inference.terminal import note, standard_input
from nanollm.model import Decoder
from nanollm.text.chat import Conversation, messages_of


@dataclass(frozen=True)
class Job:
    """A line of the file."""
    line: dict[str, Any]
    ids: Sequence[int]
    continues: bool                # the answer goes on from the prompt's text


def read_jobs(path: Path, request: Request, special: bool = False) -> list[Job]:
    """All lines of a file of prompts; empty ones are passed over.

    path: - is standard input. special: a "prompt" may have special tokens. Raises InputError or TokenizerError, with
    the file and the line.
    """
    jobs, tokenizer = [], request.tokenizer
    file, data = ("standard input", standard_input().encode()) if str(path) == "-" else (str(path), _read(path))
    for number, line in _lines(data, file):
        where = f"{file}, line {number}"
        if ("prompt" in line) == ("messages" in line):
            raise InputError(f'{where}: found {", ".join(line) or "nothing"}, expected "prompt" or "messages"')
        if taken := [name for name in request.added if name in line]:
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
    if not jobs:
        raise InputError(f'{file}: there is no prompt in it; expected lines like {{"prompt": "Once"}}')
    return jobs


def finished(path: Path, jobs: Sequence[Job], request: Request) -> int:
    """How many answers a file has to these jobs. What a stopped run left of a line at its end is cut off.

    Raises InputError where anything in it belongs to other prompts; then the file is as it was.
    """
    if not path.is_file():                                 # none yet; or /dev/stdout, of which nothing can be read
        return 0
    n, added = request.n, set(request.added)
    done, expected = 0, "go on with the prompts that it was made from, or give another --out"
    data = _read(path)
    whole = data.rfind(b"\n") + 1
    for number, line in _lines(data[:whole], str(path)):
        asked = {name: value for name, value in line.items() if name not in added}
        belongs = done < n * len(jobs) and asked == jobs[done // n].line and added <= line.keys()
        if not belongs or n > 1 and line["index"] != done % n:
            raise InputError(f"{path}, line {number}: not the answer to prompt {done // n + 1}; {expected}")
        done += 1
    if rest := data[whole:]:
        begun = json_line(jobs[done // n].line)[:-2].encode() if done < n * len(jobs) else b""       # without }\n
        if not begun or not begun.startswith(rest[: len(begun)]):
            raise InputError(f"{path}: its last line is not the answer to prompt {done // n + 1}; {expected}")
        os.truncate(path, whole)
    return done


def need_place(out: Path) -> None:
    """Raise InputError where a file cannot be written. One that was not there still is not, afterwards."""
    there = out.exists()
    if there and not out.is_file() and not out.is_dir():   # a pipe, which has a reader only once
        return
    try:
        out.open("a").close()
    except OSError as error:
        raise InputError(f"{out}: {error.strerror}") from None
    if not there:
        out.unlink()


def answer_jobs(model: Decoder, request: Request, jobs: Sequence[Job], done: int, out: Path, batch_size: int) -> None:
    """Write the answers that `out` lacks, those after the first `done`; a progress bar where there is a terminal.

    batch_size: prompts, each with all its samples. A seed is that of the first prompt, and counts one up with each.
    """
    rows, n, most = places(model.config.positions), request.n, request.max_new_tokens
    for number, job in enumerate(jobs, 1):
        if rows is not None and len(job.ids) + most > rows + 1:
            raise InputError(f"prompt {number} has {len(job.ids)} tokens, and with {most} new ones it is "
                             f"longer than the {rows} positions of the model: give a smaller --max-new-tokens")
    written = done
    try:
        with out.open("a", encoding="utf-8") as file, tqdm(total=n * len(jobs), initial=done, unit="answer",
                                                          disable=None) as bar:
            for start in range(done // n, len(jobs), batch_size):
                batch = [job for job in jobs[start : start + batch_size] for _ in range(n)]
                answers = answer_batch(model, [job.ids for job in batch[::n]], most, samples=n,
                                       **request.next_seed(start).how(continues=True))
                for at, (job, answer) in enumerate(zip(batch, answers, strict=True), start * n):
                    if at >= done:                         # a run may have been stopped between two samples of a prompt
                        text = request.text(answer, job.continues)
                        file.write(json_line(job.line | request.told(answer, text, at % n)))
                        bar.update()
                file.flush()
                written = max(done, (start + batch_size) * n)
    except KeyboardInterrupt:
        goes_on = f"; the same command goes on where {out} ends" if written else " before the first answer"
        note(f"[stopped{goes_on}]")
        raise
    except OSError as error:
        goes_on = "; the same command goes on where the file ends" if written else ""
        raise InputError(f"{out}: {error.strerror}{goes_on}") from None
    note(f"[{counted(n * len(jobs), 'answer')} in {out}]")


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


def _lines(data: bytes, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file, with the number of their line."""
    for number, text in enumerate(data.splitlines(), 1):
        if text.strip():
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{file}, line {number}: not JSON ({error!s:.80})") from None
            if not isinstance(value, dict):
                raise InputError(f"{file}, line {number}: found {str(value)[:80]}, expected an object")
            yield number, value
