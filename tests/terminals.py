"""A script in a terminal of its own, as a person has it: a pty, with keys that are typed and a screen that is read.

    with Terminal(generate.run, "--model", folder, "--chat") as terminal:
        terminal.say("Hello")              once the script waits for a line
        terminal.see("tokens/s")           waits for it, and returns what has been printed up to there
        terminal.type(CTRL_C)              the terminal makes SIGINT of it, for all that run in it

The process is forked (forked.py), begins a session and takes the pty as its controlling terminal.

`scripted` makes a model that says what it is told: a table of which token follows which, in the shape of a Llama. With
one-hot embeddings e_i, layers of zeros and the head's row P_j = e_i where j follows i, the largest logit after token i
is that of j.
"""

import os
import pty
import select
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import checkpoints
from nanollm.model import Decoder
from nanollm.presets import transformer
from tests import forked
from tests.tok_folders import byte_bpe, write

CTRL_C, CTRL_D, UP, LEFT, HOME = "\x03", "\x04", "\x1b[A", "\x1b[D", "\x1b[H"
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


class Terminal:
    """Its screen as one text, the echo of what was typed included."""

    def __init__(self, function: Callable[[], None], *arguments: object) -> None:
        self.keys, self.other_end = pty.openpty()          # the other end is kept open until the process has it
        self.screen, self.seen = "", 0
        forked.serve()
        environment = {"TERM": "xterm", "COLUMNS": "200", "LINES": "50"}
        words = [str(argument) for argument in arguments]
        self.process = forked.context.Process(target=become,
                                              args=(function, words, environment, os.ttyname(self.other_end)))
        self.process.start()

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        os.close(self.keys)
        os.close(self.other_end)

    def type(self, text: str) -> None:
        """Press these keys; what the terminal prints meanwhile is read, or it would wait."""
        data = text.encode()
        while data:
            readable, writable, _ = select.select([self.keys], [self.keys], [], 30)
            if readable:
                self._read()
            if writable:
                data = data[os.write(self.keys, data[:512]) :]

    def say(self, text: str, prompt: str = "> ") -> None:
        """Type a line, once readline waits for it. What comes earlier the system edits, as it edits lines: 4,095 bytes
        at most, and no arrow keys."""
        self.see("\x1b[?2004h" + prompt)                   # bracketed paste on, and the prompt
        self.type(text + "\r")

    def see(self, text: str, seconds: float = 30) -> str:
        """Wait until `text` is printed, after all that was seen before; return what came up to its end."""
        assert self.sees(text, seconds), f"no {text!r} in {self.screen[self.seen :]!r}"
        before, self.seen = self.seen, self.screen.index(text, self.seen) + len(text)
        return self.screen[before : self.seen]

    def sees(self, text: str, seconds: float) -> bool:
        """Whether that is printed within so many seconds."""
        until = time.monotonic() + seconds
        while text not in self.screen[self.seen :]:
            if time.monotonic() > until or (not self.process.is_alive() and not self._drain()):
                return False
            if select.select([self.keys], [], [], 0.2)[0]:
                self._read()
        return True

    def end(self, seconds: float = 30) -> int | None:
        """Its exit status, once it has left by itself; None if it has not."""
        until = time.monotonic() + seconds
        while self.process.is_alive() and time.monotonic() < until:
            self._drain()
        self._drain()
        return self.process.exitcode

    def _drain(self) -> bool:
        """Read what is there; whether there was anything."""
        found = False
        while select.select([self.keys], [], [], 0.05)[0]:
            self._read()
            found = True
        return found

    def _read(self) -> None:
        self.screen += os.read(self.keys, 65536).decode(errors="replace")


def become(function: Callable[[], None], arguments: list[str], environment: dict[str, str], name: str) -> None:
    """In the new process. That the terminal is the controlling one is what makes a signal of Ctrl-C."""
    os.setsid()
    terminal = os.open(name, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(terminal, number)
    os.close(terminal)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    forked.run_as_script(function, arguments, environment)


def scripted(folder: Path, answer: Sequence[str], *, endless: bool = False, context: int = 4096,
             positions: int | None = None, **generation: object) -> Path:
    """A model that answers each chat with these tokens, all different and each one of the byte-level vocabulary, then
    ends; or begins anew, without end. positions: rows of a table of positions, all zeros. generation: of
    generation_config.json."""
    words = byte_bpe(("<|im_start|>", "<|im_end|>"))
    size, letters = words.get_vocab_size(), words.get_vocab()
    spelled = [words.encode(text).ids for text in answer]
    assert all(len(ids) == 1 for ids in spelled) and len({*answer}) == len(answer)
    chain = [letters["Ċ"], *(ids[0] for ids in spelled)]                   # the template ends with a new line: Ċ
    model = Decoder(replace(transformer(size, 512, 1, 2, 1, 8, context=context), positions=positions))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
        model.embed.weight[:, :size] = torch.eye(size)
        for here, there in zip(chain, [*chain[1:], chain[1] if endless else letters["<|im_end|>"]], strict=True):
            model.head.weight[there, here] = 1.0
    checkpoints.save(model, folder)
    words.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHATML)
    return write(folder, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"},
                 generation_config={"eos_token_id": letters["<|im_end|>"], **generation})
