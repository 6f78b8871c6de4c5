"""Messages that say what to do, of what, in plain grammar: damaged files, chat templates, options that do nothing."""

import json
import sys

import pytest
import transformers

import checkpoints
from checkpoints import convert
from checkpoints.storage import files, gguf
from nanollm.errors import CheckpointError, ConfigError, InputError, TokenizerError, counted
from nanollm.model import Decoder
from nanollm.presets import preset
from nanollm.text import templates
from nanollm.text.chat import Conversation
from nanollm.text.tokenizer import load
from tests.tok_folders import byte_bpe, write

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
NAMED = [{"name": "rag", "template": "R" + TEMPLATE}, {"name": "tool_use", "template": "T" + TEMPLATE}]


def folder_with(folder, **more):
    """A tokenizer folder, and files beside it by their stems."""
    byte_bpe().save(str(folder / "tokenizer.json"))
    return write(folder, **more)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "in"
    checkpoints.save(Decoder(preset("llama-toy")), folder)
    return folder


def test_counts():
    assert [counted(n, "row") for n in (0, 1, 2048)] == ["0 rows", "1 row", "2,048 rows"]


@pytest.mark.parametrize("change", [
    lambda data: b"", lambda data: data[:5], lambda data: data[:40], lambda data: data[:-3], lambda data: data + b"x"])
def test_a_damaged_file_is_downloaded_again(model, tmp_path, change):
    path = tmp_path / "model.safetensors"
    path.write_bytes(change((model / "model.safetensors").read_bytes()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*; download it again$"):
        files.read_header(path)


@pytest.mark.parametrize("data", [b"", b"GGUF\3\0\0\0", b"GGUF\3\0\0\0" + b"\1" + bytes(7) + b"\1" + bytes(7)])
def test_a_damaged_gguf_too(tmp_path, data):
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"m\.gguf: (empty|truncated .*); download it again$"):
        gguf.read_header(tmp_path / "m.gguf")


def test_json_that_was_cut(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON .*; download it again$"):
        files.read_json(tmp_path / "config.json")


def test_layers_are_bounded_by_the_tensors(model, tmp_path):
    told = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 10**6}
    (tmp_path / "config.json").write_text(json.dumps(told))
    (tmp_path / "model.safetensors").symlink_to(model / "model.safetensors")
    with pytest.raises(ConfigError, match=r"num_hidden_layers is 1000000; .* 1 to \d+, the number of tensors in the"):
        checkpoints.load(tmp_path)


def test_a_shard_size_that_does_nothing(model, tmp_path, monkeypatch, capsys):
    def run(*more):
        monkeypatch.setattr(sys, "argv", ["convert", str(model), str(tmp_path / "out"), "--dry-run", *more])
        convert.run()

    with pytest.warns(UserWarning, match="--shard-size does nothing with --to gguf, which is one file"):
        run("--shard-size", "1GB", "--to", "gguf")
    with pytest.raises(InputError, match="--shard-size -5GB: expected a size"):
        run("--shard-size", "-5GB")


# ---- chat templates

@pytest.mark.parametrize("name", ["rag", "tool_use"])
def test_a_named_template_is_chosen(tmp_path, name):
    folder = folder_with(tmp_path, tokenizer_config={
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": NAMED})
    tokenizer, chat = load(folder), [{"role": "user", "content": "Hi"}]
    with pytest.raises(TokenizerError, match="named rag, tool_use.* with --template rag or --template tool_use; or"):
        Conversation(tokenizer)
    templates.choose(tokenizer, name)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(chat, chat_template=name, add_generation_prompt=True)["input_ids"]
    assert Conversation(tokenizer, chat).prompt_ids() == expected


def test_the_template_of_a_processor(tmp_path):
    """chat_template.json counts where there is no other."""
    folder = folder_with(tmp_path, chat_template={"chat_template": TEMPLATE})
    assert load(folder).chat_template == TEMPLATE and folder / "chat_template.json" in load(folder).files
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "own"}))
    assert load(folder).chat_template == "own"
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.json").write_text('{"chat_template": 5}')
    with pytest.raises(TokenizerError, match=r"chat_template\.json: found 5, expected chat_template to be text"):
        load(folder)


@pytest.mark.parametrize("broken", ["{% for", "{{ raise_exception('no') }}", "{{ messages.nothing.at_all }}"])
def test_a_broken_template_is_found_before_the_first_question(tmp_path, broken):
    folder = folder_with(tmp_path)
    (folder / "chat_template.jinja").write_text(broken)
    conversation = Conversation(load(folder))
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja: chat template"):
        conversation.try_out()
    assert conversation.messages == []


def test_a_stop_id_beyond_the_vocabulary(tmp_path):
    folder = folder_with(tmp_path, config={"vocab_size": 512, "eos_token_id": 9999})
    assert any("config.json names the stop id 9999, and the ids end at 511" in one for one in load(folder).doctor())
