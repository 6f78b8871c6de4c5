"""A conversation in a terminal: read a message, write the answer, and so on; what begins with / is a command.

    message ──→ Conversation (text/chat.py) ──fitted_ids──→ Session ──→ Written ──→ Conversation

Nothing that a person types ends it but Ctrl-D and /exit. A message that cannot be answered (too long for the context,
refused by the template) is taken back, with the reason; Ctrl-C ends an answer, and what there is of it stays in the
conversation. Where the context is full the oldest turns are no longer read, which is said.
"""

import re
from collections.abc import Callable
from pathlib import Path

from nanollm.errors import InputError, NanollmError, did_you_mean
from nanollm.inference import terminal
from nanollm.inference.context import past_context
from nanollm.inference.generation import Session
from nanollm.inference.request import Request
from nanollm.inference.terminal import note
from nanollm.inference.written import Written, warn
from nanollm.model import Decoder
from nanollm.text.chat import Conversation, read_chat, write_chat

COMMANDS = {
    "/help": "these lines",
    "/clear": "forget the conversation, but not the system message",
    "/undo": "take the last question and its answer back",
    "/retry": "answer the last question again",
    "/system TEXT": "put TEXT in place of the system message; without TEXT there is none",
    "/save FILE": "write the conversation as a line of JSON, as train.py --chat reads it",
    "/load FILE": "go on with a conversation from a file",
    "/stats": "tokens in the context, and the speed of the last answer",
    "/exit": "leave, as Ctrl-D does",
}
COMMAND = re.compile(r"(/[a-z]+)(?:[ \t]+(.*?))?[ \t]*")     # of one line; /usr/bin is none, and goes to the model


class Chat:
    """The conversation, the model that answers, and what the last answer took."""

    def __init__(self, model: Decoder, conversation: Conversation, request: Request, *, context: int) -> None:
        """context: tokens of the conversation that the model reads, its answer included.

        The request's seed counts one up with each answer, so that /retry draws another.
        """
        self.model, self.conversation, self.request, self.context = model, conversation, request, context
        self.session, self.last = Session(model, context), Written()
        self.answers, self.past = 0, False                 # past: it was said that the model's own context is passed
        self.files: set[Path] = set()                      # that it was saved to or loaded from
        self.check_system(self.system)

    def run(self) -> None:
        """Until Ctrl-D, /exit, or the end of the input."""
        keyboard, told = terminal.Keyboard(), ""
        if keyboard.edited:
            told = '/help lists the commands. Ctrl-C ends an answer, Ctrl-D the chat. Several lines: between two """'
        while True:
            try:                                           # all that takes time is in here, where Ctrl-C does no harm
                if told:
                    note(told)
                told = ""
                text = keyboard.message()
                command = COMMAND.fullmatch(text or "")
                if text is None or command and command[1] == "/exit":
                    if text is None and keyboard.edited:
                        note("")                           # the shell's prompt begins on a line of its own
                    return
                if command:
                    self.obey(command[1], command[2] or "")
                elif text.strip():
                    self.ask(text.strip())
            except KeyboardInterrupt:
                told = "\nCtrl-D or /exit leaves the chat."
            except NanollmError as error:
                told = f"error: {error}"

    def ask(self, text: str) -> None:
        """A question, and its answer. Where there is none the question is taken back."""
        left_out = self.conversation.left_out
        self.conversation.add("user", text)
        try:
            answered = self.answer()
        except (NanollmError, KeyboardInterrupt) as error:
            self.take_back(left_out)
            if isinstance(error, NanollmError):
                raise type(error)(f"{error}; the message is taken back") from None
            raise
        if not answered:
            self.take_back(left_out)
            note("[stopped before the answer began; the question is taken back]")

    def take_back(self, left_out: int) -> None:
        """The last question, which has no answer. left_out: turns that were left out before it."""
        self.conversation.undo()
        self.conversation.left_out = left_out

    def answer(self) -> bool:
        """Answer the question at the end of the conversation. False: Ctrl-C came before a word of it."""
        before, room = self.conversation.left_out, min(self.request.max_new_tokens, self.context // 4)
        try:
            ids = self.conversation.fitted_ids(self.context, room)
        except InputError as error:
            raise InputError(f"{error}. Shorten it, or the system message (/system TEXT), or start the chat with a "
                             f"--context of more than {self.context:,}") from None
        if (left_out := self.conversation.left_out) > before:
            note(f"[the context of {self.context:,} tokens is full: of {len(self.conversation.turns)} turns the oldest "
                 f"{left_out} {'is' if left_out == 1 else 'are'} no longer read]")
        if self.answers == 0:
            warn(self.request.tokenizer, ids)
        self.last = answer = Written()
        request = self.request.next_seed(self.answers)
        try:
            with terminal.ctrl_c_noted() as interrupted:
                tokens = self.session.generate(ids, request.max_new_tokens, **request.how(continues=False))
                answer.write(tokens, request.tokenizer, request.stop_texts, continues=request.keeps_space(False),
                             show=terminal.show, interrupted=interrupted)
        except KeyboardInterrupt:                          # the second, in the middle of a step
            self.session = Session(self.model, self.context)
        terminal.show("\n")
        self.answers += 1
        by_ctrl_c = answer.answer.ended == "interrupted"
        if by_ctrl_c and not answer.text.strip():
            return False
        self.conversation.add("assistant", answer.text.strip())
        kept = "; cut by Ctrl-C, kept as it is: /retry answers again"
        note(f"[{answer.speed}{kept if by_ctrl_c else answer.cut(request.max_new_tokens)}]")
        past = past_context(self.model.config, len(ids) + len(answer.answer.tokens))
        if past and not self.past:
            note(f"[{past}]")
            self.past = True
        return True

    def obey(self, name: str, argument: str) -> None:
        """A command. Raises InputError for one that there is not, or that lacks its file."""
        names = {command.split()[0]: command for command in COMMANDS}
        if name not in names:
            raise InputError(f"{name}: no such command{did_you_mean(name, names)}; /help lists them. "
                             "A message that begins with a space may have / after it")
        if names[name].endswith("FILE") and not argument:
            raise InputError(f"{name}: expected {names[name]}")
        do: Callable[[str], None] = getattr(self, f"do_{name[1:]}")
        do(argument)

    def do_help(self, _: str) -> None:
        for command, what in COMMANDS.items():
            note(f"{command:<14}{what}")

    def do_clear(self, _: str) -> None:
        system = self.system
        self.conversation.messages, self.conversation.left_out = [], 0
        self.conversation.set_system(system)
        self.last = Written()
        note("[the conversation begins anew]")

    def do_undo(self, _: str) -> None:
        question = self.conversation.undo()
        note("[there is nothing to take back]" if question is None else f"[taken back: {str(question)[:60]}]")

    def do_retry(self, _: str) -> None:
        """Where no new answer comes the old one stays."""
        turns, messages = self.conversation.turns, self.conversation.messages
        if not turns:
            raise InputError("/retry: there is no question yet")
        if self.request.sampling.temperature == 0:
            note("[at temperature 0 the answer will be the same]")
        old, left_out = messages[turns[-1] + 1 :], self.conversation.left_out
        del messages[turns[-1] + 1 :]
        answered = False
        try:
            answered = self.answer()
        finally:
            if not answered:
                messages += old
                self.conversation.left_out = left_out

    def do_system(self, text: str) -> None:
        self.check_system(text)
        self.conversation.set_system(text)
        note(f"[system message: {text or 'none'}]")

    def do_save(self, file: str) -> None:
        path = Path(file).expanduser()
        write_chat(path, self.conversation.messages, ours=path.resolve() in self.files)
        self.files.add(path.resolve())
        note(f"[{len(self.conversation.messages)} messages are in {file}]")

    def do_load(self, file: str) -> None:
        path = Path(file).expanduser()
        messages = read_chat(path)
        self.conversation.messages, self.conversation.left_out, self.last = messages, 0, Written()
        self.files.add(path.resolve())
        asks = "; the last is a question: /retry answers it" if messages and messages[-1]["role"] == "user" else ""
        note(f"[{len(messages)} messages from {file}{asks}]")

    def do_stats(self, _: str) -> None:
        used = len(self.conversation.prompt_ids()) if self.conversation.messages else 0
        note(f"[{used:,} of {self.context:,} tokens in the context, turns: {len(self.conversation.turns)}; "
             f"the last answer: {self.last.speed if self.last.times else 'none yet'}]")

    def check_system(self, text: str) -> None:
        """Raise InputError for a system message that leaves no room for a question in the context."""
        trial = Conversation(self.conversation.tokenizer)
        trial.set_system(text)
        trial.add("user", "Hi")
        if (used := len(trial.prompt_ids())) >= self.context:
            raise InputError(f"the system message and a question of one word are {used:,} tokens, and the context "
                             f"holds {self.context:,} with the answer; shorten it, or give a larger --context")

    @property
    def system(self) -> str:
        """The system message, or ""."""
        return next((one["content"] for one in self.conversation.messages if one["role"] == "system"), "")
