"""Chat templates, run where they can do no harm: messages and a Jinja program in, text out.

A chat template is a program that came with somebody's weights: `{% for i in range(99999) %}` twice nested, or
`{{ 'a' * 10**10 }}`, would hang or fill the machine (and does, in transformers). No check inside a process can stop a
single call into C such as 9**(9**9), so templates run in a child process, which three limits hold:

    time      TIME_LIMIT seconds of its own, counted by the kernel, which then ends it, even if the parent is dead
    memory    MEMORY_LIMIT bytes of address space (RLIMIT_AS, where the system has it)
    output    OUTPUT_LIMIT characters more than the messages have

The child starts once, in about a tenth of a second (jinja2, no torch), and then serves the whole session: a turn costs
about a millisecond. In it, Jinja's sandbox keeps the template from Python's internals, as in transformers:

    trim_blocks, lstrip_blocks, {% break %}, {% generation %}, raise_exception, strftime_now, tojson without HTML
    escapes
"""

import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from nanollm.errors import TokenizerError

TIME_LIMIT = 0.8                  # seconds of processor time for one rendering
WALL_LIMIT = 20.0                 # seconds on the clock, for a machine that is busy
START_LIMIT = 60.0                # seconds for the child to start, on a machine that is busy
MEMORY_LIMIT = 512 << 20          # bytes
OUTPUT_LIMIT = 1_000_000          # characters


def render(template: str, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True,
           **variables: Any) -> str:
    """The chat as text. Raises TokenizerError if the template refuses the messages, is broken, or meets a limit.

    >>> chat = [{"role": "user", "content": "Hi"}]
    >>> render("{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}", chat)
    'user: Hi\\n'
    """
    return render_cuts(template, messages, [(len(messages), add_generation_prompt)], **variables)[0]


def render_cuts(template: str, messages: list[dict[str, Any]], cuts: Sequence[tuple[int, bool]], *, bos_token: str = "",
                eos_token: str = "", tools: list[dict[str, Any]] | None = None, **extra: Any) -> list[str]:
    """The first n messages as text, for each (n, add_generation_prompt) of `cuts`: one request for a whole chat.

    Raises TokenizerError as `render` does. The limits hold for each text.
    """
    variables = dict(messages=messages, bos_token=bos_token, eos_token=eos_token, tools=tools, **extra)
    name = f"chat template {template[:60]!r}…" if len(template) > 60 else f"chat template {template!r}"
    try:
        request = json.dumps({"template": template, "variables": variables, "cuts": cuts}).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{name}: messages and variables must be plain JSON: {error}") from None
    try:
        answer = _renderer.ask(request)
    except TimeoutError:
        raise TokenizerError(f"{name}: exceeded the time limit of {TIME_LIMIT} s") from None
    except EOFError:
        raise TokenizerError(f"{name}: exceeded the memory limit of {MEMORY_LIMIT >> 20} MiB, or crashed") from None
    if "error" in answer:
        raise TokenizerError(f"{name}: {answer['error']}")
    return answer["texts"]


class _Renderer:
    """The parent's end of the child process: one request, one answer, each a line of JSON."""

    def __init__(self) -> None:
        self.lock, self.owner = threading.Lock(), 0
        self.child: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> dict[str, Any]:
        """Raises TimeoutError when the time is over, EOFError if the child died of something else."""
        with self.lock:
            if self.owner != os.getpid() or self.child is None or self.child.poll() is not None:
                self._start()                             # the first call, after a kill, or in a forked process
            # the child counts its own time, but not on Windows, which has no such clock
            return self._exchange(request, WALL_LIMIT if hasattr(signal, "setitimer") else TIME_LIMIT)

    def _start(self) -> None:
        root = str(Path(__file__).resolve().parent.parent.parent)
        program = "import sys; sys.path.insert(0, sys.argv[1]); from nanollm.text.render import _serve; _serve()"
        self.child = subprocess.Popen([sys.executable, "-I", "-c", program, root],
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.owner = os.getpid()
        limits = {"memory": MEMORY_LIMIT, "time": TIME_LIMIT, "output": OUTPUT_LIMIT}
        try:
            self._exchange(json.dumps(limits).encode(), START_LIMIT)
        except (EOFError, TimeoutError):
            raise TokenizerError("the process that runs chat templates did not start: is jinja2 installed?") from None

    def _exchange(self, line: bytes, limit: float) -> dict[str, Any]:
        late, child = threading.Event(), self.child
        assert child is not None and child.stdin is not None and child.stdout is not None, "_start has opened them"

        def end() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(limit, end)
        timer.start()
        try:
            child.stdin.write(line + b"\n")
            child.stdin.flush()
            answer = child.stdout.readline()
        except BrokenPipeError:
            answer = b""
        except BaseException:                             # Ctrl-C: no later request may read the answer to this one
            self.close()
            raise
        finally:
            timer.cancel()
        if answer.endswith(b"\n") and not late.is_set():
            return json.loads(answer)
        over = late.is_set() or (hasattr(signal, "SIGPROF") and child.wait() == -signal.SIGPROF)
        self.close()
        raise TimeoutError if over else EOFError

    def close(self) -> None:
        """End the process, if it is this process's own."""
        if self.child is not None and self.owner == os.getpid():
            self.child.kill()
            self.child.wait()
            for pipe in (self.child.stdin, self.child.stdout):
                with contextlib.suppress(OSError):        # what was not yet written is of no use
                    if pipe is not None:
                        pipe.close()
        self.child = None


_renderer = _Renderer()
atexit.register(_renderer.close)


# ---- what runs in the child

def _serve() -> None:
    """Answers requests from stdin, a line each, until it closes. The first line holds the limits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)           # Ctrl-C in a terminal is sent to this process, too
    limits = json.loads(sys.stdin.readline())
    with contextlib.suppress(ImportError, ValueError, OSError):        # Windows has none, macOS refuses this one
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (limits["memory"], limits["memory"]))
    compiled = functools.lru_cache(maxsize=2)(_environment().from_string)
    print("{}", flush=True)
    for line in sys.stdin:
        _seconds_left(limits["time"])
        try:
            request = json.loads(line)
            written: list[str] = []
            template, variables = compiled(request["template"]), request["variables"]
            for count, asks in request["cuts"]:
                _seconds_left(limits["time"])
                cut = variables | {"messages": variables["messages"][:count], "add_generation_prompt": asks}
                written.append(_write(template, cut, limits["output"] + len(line)))
            answer: dict[str, Any] = {"texts": written}
        except MemoryError:
            raise                                         # ends this process; the parent says why and starts another
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
        _seconds_left(0)                                  # no limit
        print(json.dumps(answer), flush=True)


def _write(template: Any, variables: dict[str, Any], limit: int) -> str:
    pieces, size = [], 0
    for piece in template.generate(**variables):
        size += len(piece)
        if size > limit:
            raise OverflowError(f"exceeded the output limit of {limit} characters")
        pieces.append(piece)
    return "".join(pieces)


def _seconds_left(seconds: float) -> None:
    """Let the kernel end this process with SIGPROF after so much work; 0: never.

    That also works in the middle of a call into C, where no handler would run.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _environment() -> Any:
    """Jinja as chat templates expect it: what transformers 5 offers them, `utils/chat_template_utils.py`."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %} marks what the assistant said, for training; it prints the inside."""
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Namespace(jinja2.utils.Namespace):
        """Without names that Python or Jinja give a meaning, such as __html__."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} begins with an underscore")
            super().__setitem__(name, value)

    def namespace(*args: Any, **kwargs: Any) -> Namespace:
        made = Namespace()
        for name, value in dict(*args, **kwargs).items():
            made[name] = value
        return made

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
               sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions = [Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "namespace": namespace,
                            "strftime_now": lambda format: datetime.now().strftime(format)}
    return environment
