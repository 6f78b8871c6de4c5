"""generate.py --chat in a terminal, key by key: long lines, arrow keys, pastes, Ctrl-C, a full context, each command.

The models are scripted (terminals.py): what they answer is known, so the screen says what was done with it.
"""

import json
import time
from pathlib import Path

import pytest

import checkpoints
import generate
from nanollm.inference import generation, terminal
from nanollm.text.chat import Conversation
from tests.terminals import CTRL_C, CTRL_D, HOME, LEFT, UP, Terminal, scripted

PASTED = "\x1b[200~{}\x1b[201~"            # bracketed paste: what xterm and its kind put around it


@pytest.fixture(scope="module")
def brief(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It answers "Yes" and stops."""
    return scripted(tmp_path_factory.mktemp("brief"), ["Y", "e", "s"], context=16_384)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It answers "abcabcabc…"."""
    return scripted(tmp_path_factory.mktemp("endless"), ["a", "b", "c"], endless=True, context=100_000)


def saved(screen: Terminal, file: Path) -> list[dict[str, str]]:
    """The conversation, by way of /save."""
    screen.say(f"/save {file}")
    screen.see("messages are in")
    return json.loads(file.read_text())["messages"]


def said(messages: list[dict[str, str]], role: str = "user") -> list[str]:
    return [message["content"] for message in messages if message["role"] == role]


def test_lines_of_any_length_arrow_keys_and_pastes(brief: Path, tmp_path: Path) -> None:
    """What was typed is what the model was asked: edited lines, one from the history, pasted paragraphs, blocks, and a
    line longer than the 4,095 bytes that a terminal edits by itself."""
    long = "abcdefghi " * 599 + "the end!!!"
    assert len(long) == 6000
    with Terminal(generate.run, "--model", brief, "--chat") as screen:
        for line in (f"world{HOME}hello ", f"corect{LEFT * 4}r", f"{UP}!", PASTED.format("One.\n\n/two\n"),
                     " /usr is a folder", "/usr/bin is one"):
            screen.say(line)
            screen.see("tokens/s]")
        screen.say('"""')
        for line in ("first", "", "/second\\", '"""'):
            screen.say(line, ". ")
        screen.say("up to\\")
        screen.say("here", ". ")
        screen.say(long)
        messages = saved(screen, tmp_path / "chat.json")
        screen.see("> ")
        screen.type(CTRL_D)
        assert screen.end() == 0
    assert said(messages) == ["hello world", "correct", "correct!", "One.\n\n/two",
                              "/usr is a folder", "/usr/bin is one", "first\n\n/second\\", "up to\nhere", long]
    assert said(messages, "assistant") == ["Yes"] * 9


def test_ctrl_c_ends_an_answer_and_not_the_chat(endless: Path, tmp_path: Path) -> None:
    """What there is of the answer stays, is marked, and is what the next turn reads. At the prompt Ctrl-C says how to
    leave; what was typed is forgotten."""
    with Terminal(generate.run, "--model", endless, "--chat", "--max-new-tokens", 50_000) as screen:
        for question in ("go", "once more"):
            screen.say(question)
            screen.see("abcabc")
            screen.type(CTRL_C)
            assert "cut by Ctrl-C" in screen.see("answers again]")
            screen.see("> ")
            screen.type("half a line")
            screen.see("half a line")
            screen.type(CTRL_C)
            while not screen.sees("leaves the chat.", 2):              # Python may have looked for signals just before,
                screen.type(CTRL_C)                                    # and then waits for a key
            screen.see("Ctrl-D or /exit leaves the chat.")
        messages = saved(screen, tmp_path / "chat.json")
        screen.say("/exit")
        assert screen.end() == 0
    assert said(messages) == ["go", "once more"]
    for answer in said(messages, "assistant"):
        assert len(answer) > 5 and answer == ("abc" * len(answer))[: len(answer)]


def test_what_is_left_out_when_the_context_is_full(tmp_path: Path) -> None:
    """Whole oldest turns, as few as will do, and the system message never; a message that is too long is taken back."""
    folder = scripted(tmp_path / "model", ["a", "b", "c"], endless=True, context=120)
    asked = Conversation(checkpoints.tokenizer(folder))
    asked.set_system("Be kind.")
    options = ("--model", folder, "--chat", "--max-new-tokens", 20, "--system", "Be kind.")
    with Terminal(generate.run, *options) as screen:
        for turn in range(5):
            screen.say(f"question {turn}")
            printed = screen.see("--max-new-tokens 20]")
            asked.add("user", f"question {turn}")
            left_out = asked.left_out
            assert len(asked.fitted_ids(120, 20)) + 20 <= 120
            assert ("is full" in printed) == (asked.left_out > left_out), printed
            asked.add("assistant", ("abc" * 7)[:20])
        assert asked.left_out and "no longer read" in screen.screen
        screen.say("word " * 200)
        screen.see("the context holds 120 with the answer")
        screen.say("short")
        screen.see("--max-new-tokens 20]")
        messages = saved(screen, tmp_path / "chat.json")
    assert messages[0] == {"role": "system", "content": "Be kind."}
    assert said(messages) == [*(f"question {turn}" for turn in range(5)), "short"], "what is not read is kept"


def test_each_command(brief: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "chat.json", tmp_path / "other"
    other.write_text("no chat")
    with Terminal(generate.run, "--model", brief, "--chat") as screen:
        def after(line: str, text: str) -> None:
            screen.say(line)
            screen.see(text)

        after("/stats", "0 of 16,384 tokens in the context, turns: 0; the last answer: none yet]")
        after("one", "tokens/s]")
        after("two", "tokens/s]")
        assert said(saved(screen, file)) == ["one", "two"]
        chat = Conversation(checkpoints.tokenizer(brief), json.loads(file.read_text())["messages"])
        used = len(chat.prompt_ids())
        after("/stats", f"[{used} of 16,384 tokens in the context, turns: 2; the last answer: 4 tokens")
        after("/undo", "[taken back: two]")
        after("/retry", "the answer will be the same]")
        screen.see("tokens/s]")
        after("/system Be brief.", "[system message: Be brief.]")
        again = saved(screen, file)
        assert [one["content"] for one in again] == ["Be brief.", "one", "Yes"]
        after("/clear", "begins anew]")
        assert saved(screen, file) == again[:1]
        after("/stats", "the last answer: none yet]")
        after("/undo", "nothing to take back]")
        after("/retry", "there is no question yet")
        file.write_text(json.dumps(again))
        after(f"/load {file}", "[3 messages from")
        assert saved(screen, tmp_path / "copy.json") == again
        after("/system", "[system message: none]")
        after("/help", "leave, as Ctrl-D does")
        after("/sav x", "did you mean /save?")
        after("/nope", "/nope: no such command; /help")
        after("/save", "expected /save FILE")
        after(f"/save {other}", "it exists, and this chat was neither saved there nor loaded from it")
        after(f"/load {other}", "found what is not JSON")
        after(f"/load {tmp_path / 'none'}", "No such file or directory")
        after(f"/save {tmp_path / 'no' / 'folder'}", "No such file or directory")
        after("three", "tokens/s]")
        screen.say("/exit now")
        assert screen.end() == 0
    assert other.read_text() == "no chat" and "Traceback" not in screen.screen


def test_a_terminal_obeys_no_model(tmp_path: Path) -> None:
    """Title, bell, colours: spelled out, be they of the model or of the prompt."""
    folder = scripted(tmp_path, ["\x1b", "]", "0", ";", "x", "\x07", "\n"], endless=True)
    with Terminal(generate.run, "--model", folder, "--prompt", "a\x1b[2J\n", "--max-new-tokens", "6") as screen:
        screen.see("tokens/s]")
        assert screen.end() == 0
    assert "a\\x1b[2J\r\n\\x1b]0;x\\x07\r\n" in screen.screen and "\x1b" not in screen.screen
    spelled = terminal.visible("".join(map(chr, range(0xA0))))
    assert {char for char in spelled if not char.isprintable()} == {"\t", "\n"}


def test_a_second_ctrl_c_does_not_wait_for_the_step(endless: Path) -> None:
    """Nor does the chat end."""
    with Terminal(slow_run, "--model", endless, "--chat") as screen:
        screen.say("go")
        screen.see("slowly")
        screen.type(CTRL_C)
        assert not screen.sees("[stopped", 0.5), "the first only asks for the end"
        while not screen.sees("[stopped before the answer began; the question is taken back]", 2):
            screen.type(CTRL_C)                            # two signals that come together are one
        screen.say("/exit")
        assert screen.end() == 0


def slow_run() -> None:
    """generate.py with a model whose first step takes a minute."""
    def feed(*_: object) -> None:
        print("slowly", flush=True)
        time.sleep(60)

    generation.feed = feed
    generate.run()


def test_only_a_file_of_this_chat_is_overwritten(brief: Path, tmp_path: Path) -> None:
    """Its other keys stay. A chat that ends with a question is answered by /retry."""
    theirs, mine = tmp_path / "theirs.json", tmp_path / "mine.json"
    for file in (theirs, mine):
        file.write_text(json.dumps({"messages": [{"role": "user", "content": "old"}], "source": "x"}))
    with Terminal(generate.run, "--model", brief, "--chat") as screen:
        screen.say("one")
        screen.see("tokens/s]")
        screen.say(f"/save {theirs}")
        screen.see("neither saved there nor loaded from it; give another name")
        screen.say(f"/load {mine}")
        screen.see("1 messages from")
        screen.see("the last is a question: /retry answers it]")
        screen.say("/stats")
        screen.see("the last answer: none yet]")
        screen.say("/retry")
        screen.see("tokens/s]")
        messages = saved(screen, mine)
    assert messages == [{"role": "user", "content": "old"}, {"role": "assistant", "content": "Yes"}]
    assert json.loads(mine.read_text())["source"] == "x"
    assert json.loads(theirs.read_text())["messages"][0]["content"] == "old"


def test_a_block_that_ctrl_d_ends_is_not_sent(brief: Path, tmp_path: Path) -> None:
    """The chat goes on."""
    with Terminal(generate.run, "--model", brief, "--chat") as screen:
        screen.say('"""')
        screen.say("half", ". ")
        screen.see("\x1b[?2004h. ")
        screen.type(CTRL_D)
        screen.see("the message was not finished, and is dropped")
        screen.say("whole")
        screen.see("tokens/s]")
        messages = saved(screen, tmp_path / "chat.json")
    assert said(messages) == ["whole"]


def test_a_message_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    """/stats says the same before and after; a system message is measured when it is set."""
    folder = scripted(tmp_path, ["a", "b", "c"], endless=True, context=120)
    with Terminal(generate.run, "--model", folder, "--chat", "--max-new-tokens", 20) as screen:
        def stats() -> str:
            screen.say("/stats")
            return screen.see(" turns: ").rpartition("[")[2]

        for turn in range(5):
            screen.say(f"question {turn}")
            screen.see("--max-new-tokens 20]")
        before = stats()
        screen.say("word " * 200)
        told = screen.see("the message is taken back")
        assert "/system TEXT" in told and "--context of more than 120" in told
        assert stats() == before
        screen.say("/system " + "word " * 200)
        screen.see("the system message and a question of one word are")
        assert stats() == before


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_ends_an_answer_that_is_no_chat(endless: Path, as_json: bool) -> None:
    """What there is of it is printed, and the shell's prompt begins on a line of its own."""
    options = ("--json",) if as_json else ()
    with Terminal(noted_run, "--model", endless, "--ask", "go", "--max-new-tokens", 50_000, *options) as screen:
        screen.see("begun")
        if as_json:
            time.sleep(0.5)
        else:
            screen.see("abcabc")
        screen.type(CTRL_C)
        told = screen.see(" tokens/s]")
        assert screen.end() == 130
    if as_json:
        one = json.loads(told[told.index("{") : told.index("\r\n[stopped; ")])
        assert one["finish_reason"] == "interrupted" and one["answer"] == ("abc" * len(one["answer"]))[: one["tokens"]]
        assert one["tokens"] > 1
    else:
        assert "\r\n[stopped; " in told


def noted_run() -> None:
    """generate.py that says when it has begun to answer."""
    feed = generation.feed

    def first(*how: object) -> object:
        generation.feed = feed
        print("begun", flush=True)
        return feed(*how)

    generation.feed = first
    generate.run()
