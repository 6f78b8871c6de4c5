"""The page of the server, in a headless Chromium (apt install chromium); skipped by name where there is none."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import checkpoints
from nanollm.inference import ticket as ticket_file
from nanollm.model import Decoder
from nanollm.presets import transformer
from tests.browser import CHROMIUM, Browser
from tests.terminals import CHATML
from tests.tok_folders import byte_bpe, write

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt install chromium")]
test_server = pytest.importorskip("tests.test_server", reason="needs the packages openai, starlette and uvicorn")

HOSTILE = """<img src=x onerror="window.hacked=1"> <script>window.hacked=2</script> [x](javascript:alert(1))
[home](https://example.org/a) and **bold *both* words** and `a < b`

```python
print("<b>**no**</b>")
```
1. one
2. two

# A heading

| a | b |
|---|---|
| 1 | <i>2</i> |
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("page")
    byte_bpe(("<|im_start|>", "<|im_end|>")).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHATML)
    return checkpoints.tokenizer(write(
        folder, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}))


@pytest.fixture(scope="module")
def page(words) -> Iterator[tuple[Browser, object]]:
    model = Decoder(transformer(words.vocab_size, 32, 1, 4, 2, 48))
    with test_server.Served(model.eval(), words, length=4000) as served, Browser() as browser:
        browser.open(served.running.address)
        yield browser, served


def says(monkeypatch: pytest.MonkeyPatch, words, text: str) -> list:
    """Let the model say this; what it was asked is kept."""
    script, heard = words.encode(text + "<|im_end|>", special=True), []

    def next_tokens(logits, sampling, prompts, answers, *_):
        if not answers[0]:
            heard.append((words.decode(prompts[0], skip_special=False), sampling))
        return torch.tensor([script[len(answers[0]) % len(script)]]), logits.float()

    monkeypatch.setattr(ticket_file, "GREEDY", None)
    monkeypatch.setattr(ticket_file, "next_tokens", next_tokens)
    return heard


def test_what_a_model_writes_is_shown_and_never_run(page, words, monkeypatch):
    browser, _ = page
    heard = says(monkeypatch, words, HOSTILE)
    browser.until("document.title === 'toy'")
    browser.run("document.getElementById('question').focus()")
    browser.type("<b>Hi</b>")
    browser.press_enter()
    browser.until("document.querySelector('.note') !== null")
    assert heard[0][0] == "<|im_start|>user\n<b>Hi</b><|im_end|>\n<|im_start|>assistant\n"
    assert browser.run("document.querySelector('.user').textContent") == "<b>Hi</b>"
    assert browser.run("window.hacked") is None
    assert browser.run("document.querySelectorAll('#chat img, #chat script, #chat b, #chat i').length") == 0
    assert "<script>window.hacked=2</script> [x](javascript:alert(1))" in browser.run(
        "document.querySelector('.assistant').textContent")
    assert browser.run("[...document.querySelectorAll('#chat a')].map(a => a.href)") == ["https://example.org/a"]
    for tag, text in (("pre code", 'print("<b>**no**</b>")'), ("strong", "bold both words"), ("em", "both"),
                      ("ol", "onetwo"), ("h2", "A heading"), ("td:last-child", "<i>2</i>"), ("p code", "a < b")):
        assert browser.run(f"document.querySelector('.assistant {tag}').textContent") == text


def test_settings_and_the_next_turn(page, words, monkeypatch):
    browser, _ = page
    heard = says(monkeypatch, words, "Yes")
    browser.run("document.getElementById('clear').click()")
    browser.run("document.getElementById('temperature').value = 0.5; document.getElementById('seed').value = 7;"
                "document.getElementById('system').value = 'Be brief.'")
    for question, notes in (("One", 1), ("Two", 2)):
        browser.run("document.getElementById('question').focus()")
        browser.type(question)
        browser.press_enter()
        browser.until(f"document.querySelectorAll('.note').length === {notes}")
    assert (heard[1][1].temperature, heard[1][1].seed) == (0.5, 7)
    assert heard[1][0].replace("<|im_end|>\n", "").split("<|im_start|>")[1:] == [
        "system\nBe brief.", "user\nOne", "assistant\nYes", "user\nTwo", "assistant\n"]


def test_an_answer_streams_and_stops(page, words, monkeypatch):
    browser, served = page
    endless = words.encode("word ")
    monkeypatch.setattr(ticket_file, "GREEDY", None)
    monkeypatch.setattr(ticket_file, "next_tokens", lambda logits, sampling, prompts, answers, *_: (
        torch.tensor([endless[len(answers[0]) % len(endless)]]), logits.float()))
    browser.run("document.getElementById('clear').click()")
    browser.run("document.getElementById('question').focus()")
    browser.type("Go on")
    browser.press_enter()
    browser.until("(document.querySelector('.assistant')?.textContent.length || 0) > 40")
    first = browser.run("document.querySelector('.assistant').textContent.length")
    browser.until(f"document.querySelector('.assistant').textContent.length > {first}")
    assert browser.run("document.getElementById('send').textContent") == "Stop"
    browser.run("document.getElementById('send').click()")
    browser.until("document.querySelector('.note')?.textContent === 'stopped'")
    assert served.idle() and browser.run("document.getElementById('send').textContent") == "Send"


def test_light_dark_and_errors(page, words, monkeypatch):
    browser, served = page
    pictures = {scheme: (browser.look(800, 600, scheme), browser.run("getComputedStyle(document.body).backgroundColor"))
                for scheme in ("light", "dark")}
    assert pictures["light"][1] == "rgb(255, 255, 255)" and pictures["dark"][1] == "rgb(23, 24, 27)"
    assert all(picture.startswith(b"\x89PNG") for picture, _ in pictures.values())
    browser.run("document.getElementById('clear').click()")
    browser.run("document.getElementById('temperature').value = -1; document.getElementById('question').focus()")
    browser.type("Hm")
    browser.press_enter()
    browser.until("document.querySelector('.error') !== null")
    assert browser.run("document.querySelector('.error').textContent").startswith("temperature -1: expected 0 (greedy)")
    browser.run("document.getElementById('temperature').value = ''")
