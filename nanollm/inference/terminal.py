"""The terminal: messages come in, a model's text goes out.

    line       as long as it may be, with arrow keys and history, where Python has readline. Without it (Windows) the
               system edits the line, and a Unix terminal cuts it at 4,095 bytes
    message    one line; or several: between two lines that are only \"\"\", after each line that ends in a backslash,
               or pasted, where the terminal says what was pasted (bracketed paste: xterm and all that follow it)
    text       control characters are shown as \\x1b …, where a terminal would obey them. A model can write what moves
               the cursor, retitles the window or fills the clipboard; in a file or a pipe the text is as it was written
    Ctrl-C     while an answer is written, only noted: the step that runs is finished, and the session stays whole

Text goes to standard output, everything else to standard error.
"""

import contextlib
import importlib
import signal
import sys
from collections.abc import Callable, Iterator

from nanollm.errors import InputError

BLOCK = '"""'
# ASCII without \n and \t, DEL, and the C1 controls, of which \x9b alone begins a sequence
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def visible(text: str) -> str:
    """The text, with control characters spelled out.

    >>> visible("red: \\x1b[31m")
    'red: \\\\x1b[31m'
    """
    return text.translate(CONTROLS)


def show(text: str) -> None:
    """Print a model's text, or a user's, on standard output, at once."""
    if sys.stdout is not None:                           # closed: `>&-`
        print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)


def silent(_: str) -> None:
    """In place of `show`."""


def note(text: str) -> None:
    """Print a line on standard error."""
    if sys.stderr is not None:                           # None would be standard output to `print`
        print(visible(text), file=sys.stderr, flush=True)


def standard_input() -> str:
    """All of it. Raises InputError where it is closed, or not UTF-8."""
    if sys.stdin is None:
        raise InputError("standard input: it is closed, expected text")
    return _decoded(sys.stdin.buffer.read())


def _decoded(data: bytes) -> str:
    try:
        return data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: found the byte 0x{data[error.start]:02x} at {error.start}, expected UTF-8; "
                         "iconv -t utf-8 converts text, if you tell it from what (-f latin1)") from None


class Keyboard:
    """Messages, one after the other, from a terminal, or from a file or a pipe, where no prompt is shown."""

    def __init__(self) -> None:
        self.edited = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
        if self.edited:
            with contextlib.suppress(ImportError):       # to import it is enough: `input` then edits lines with it
                readline = importlib.import_module("readline")
                readline.parse_and_bind("set enable-bracketed-paste on")         # Python turns it off, unlike bash

    def message(self) -> str | None:
        """The next one; None at the end of the input (Ctrl-D). Ctrl-C raises KeyboardInterrupt.

        Raises InputError for a line that is not UTF-8, and where the end comes within a message, of which nothing is
        sent then; the next call reads on.
        """
        lines: list[str] = []
        block = False
        while True:
            try:
                line = self._line(". " if lines or block else "> ")
            except EOFError:
                if not lines and not block:
                    return None
                if self.edited:
                    note("")                               # what is said next begins on a line of its own
                end = f"a line that is only {BLOCK}" if block else "a line that does not end in a backslash"
                raise InputError(f"the message was not finished, and is dropped; expected {end}") from None
            if line.strip() == BLOCK and (block or not lines):
                if block:
                    return "\n".join(lines)
                block = True
            elif block:
                lines.append(line)
            elif line.endswith("\\"):
                lines.append(line[:-1])
            else:
                return "\n".join([*lines, line])

    def _line(self, prompt: str) -> str:
        """Without its end. Raises EOFError."""
        if self.edited:
            try:
                return input(prompt)
            except UnicodeDecodeError as error:
                raise InputError(f"the line is not text in the terminal's encoding, {error.encoding}; "
                                 "it was not sent") from None
        if sys.stdin is None:
            raise EOFError
        if sys.stdin.isatty() and sys.stderr is not None:                        # the answers go to a file
            print(prompt, end="", file=sys.stderr, flush=True)
        data = sys.stdin.buffer.readline()
        if not data:
            raise EOFError
        return _decoded(data).removesuffix("\n")


@contextlib.contextmanager
def ctrl_c_noted() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C only makes the function that is handed out say True; a second one raises KeyboardInterrupt."""
    noted = False

    def take_note(*_: object) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    before = signal.signal(signal.SIGINT, take_note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)
