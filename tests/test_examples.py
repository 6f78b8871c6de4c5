"""examples/: each script is short, and does what its first lines say, on a tiny model."""

import json
import re
import runpy
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers

import checkpoints
from nanollm.errors import CheckpointError
from nanollm.inference.generation import generate
from nanollm.text import tokenizer
from nanollm.text.chat import Conversation
from tests.fixtures import FIXTURES
from tests.oracles import difference, make_loud, write
from tests.tok_folders import byte_bpe
from tests.toys import grammar

EXAMPLES = Path(__file__).parent.parent / "examples"
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


LINES = {"mixture_of_depths.py": 100, "grpo.py": 100}     # a module of its own and a loop; a sampler and a reward


def run(capsys, name: str, *args: str | Path) -> str:
    """Run a script as `python examples/name …` does, in this process; what it prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, args)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_each_is_short_and_run_here(path):
    assert path.read_text().count("\n") < LINES.get(path.name, 60)
    assert f'"{path.name}"' in Path(__file__).read_text()


def test_loop_learns_and_writes(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("".join(path.read_text() for path in sorted(grammar(tmp_path).glob("*.py"))))
    said = run(capsys, "loop.py", text, "--steps", "15")
    losses = [float(found) for found in re.findall(r"validation loss ([\d.]+)", said)]
    assert len(losses) == 2 and losses[0] > 4.5 and losses[1] < losses[0] - 1
    assert len(said.rpartition("nats per byte\n")[2]) > 100                  # the sample


def test_mixture_of_depths_sees_the_future_by_top_k_and_not_by_its_threshold(tmp_path, monkeypatch, capsys):
    """Another last token changes outputs before it, where it takes the place of one that was chosen. In eval mode it
    does not, although tokens go through the routed layers."""
    text = tmp_path / "text.txt"
    text.write_text("".join(path.read_text() for path in sorted(grammar(tmp_path).glob("*.py"))))
    monkeypatch.setattr(sys, "argv", ["mixture_of_depths.py", str(text), "--steps", "25"])
    script = runpy.run_path(str(EXAMPLES / "mixture_of_depths.py"))
    losses = [float(found) for found in re.findall(r"by top-k, ([\d.]+) by", capsys.readouterr().out)]
    assert len(losses) == 2 and losses[1] < losses[0] - 1
    model, routed = script["model"], script["routed"]
    rows = script["training"][:33].repeat(256, 1)
    rows[:, -1] = torch.arange(256)                                             # rows that differ in the last token

    def spread() -> float:
        with torch.no_grad():
            before = model(rows)[:, :-1]
        return (before - before[:1]).abs().max().item()

    future = spread()
    assert future > 1e-2
    model.eval()
    still = spread()
    assert still < 1e-4 and all(0 < layer.share < 1 for layer in routed), (still, [layer.share for layer in routed])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Qwen3 that transformers wrote, quiet enough to learn, with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("examples") / "tiny"
    backend = byte_bpe(("<|im_start|>", "<|im_end|>"), vocab=300)
    fixture = FIXTURES["qwen3-0.6b"]
    keys = {**fixture.keys, "vocab_size": backend.get_vocab_size()}
    write(type(fixture)("qwen3", keys, gain=0.1), folder, torch.bfloat16)
    backend.save(str(folder / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return folder


def test_finetune_teaches_an_answer(folder, tmp_path, capsys):
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a brown fox"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 4)
    said = run(capsys, "finetune.py", folder, tmp_path / "chats.jsonl", tmp_path / "out",
               "--steps", "40", "--batch-size", "2", "--context", "64", "--lr", "0.01")
    assert "4 examples in" in said and "; 0 longer" in said
    model, words = checkpoints.load(tmp_path / "out"), tokenizer.load(tmp_path / "out")
    assert model.embed.weight.dtype == torch.bfloat16                        # as it was stored
    answer = [*generate(model, Conversation(words, talk[:1]).prompt_ids(), 20, stop_ids=words.stop_ids)]
    assert words.decode(answer) == talk[1]["content"] and answer[-1] in words.stop_ids


@pytest.mark.slow
def test_lora_teaches_an_answer_that_peft_gives(folder, tmp_path, capsys):
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a brown fox"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 4)
    run(capsys, "lora.py", folder, tmp_path / "chats.jsonl", tmp_path / "out", "--steps", "250", "--batch-size", "2",
        "--context", "64", "--lr", "0.005")
    model, words = checkpoints.load(folder, adapter=tmp_path / "out"), tokenizer.load(folder)
    prompt = Conversation(words, talk[:1]).prompt_ids()
    answer = [*generate(model, prompt, 20, stop_ids=words.stop_ids)]
    assert words.decode(answer) == talk[1]["content"] and answer[-1] in words.stop_ids
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert theirs(torch.tensor([prompt])).logits[0, -1].argmax() == answer[0]
    with pytest.raises(SystemExit, match="exists"):
        run(capsys, "lora.py", folder, tmp_path / "chats.jsonl", tmp_path / "out")


def test_dpo_makes_the_better_answer_likelier_and_peft_agrees(folder, tmp_path, capsys):
    pairs = [{"prompt": f"hello {i}", "chosen": "a brown fox", "rejected": "lazy dogs"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    said = run(capsys, "dpo.py", folder, tmp_path / "pairs.jsonl", tmp_path / "out", "--epochs", "6", "--lr", "0.002")
    found = [(float(loss), float(margin)) for loss, margin in re.findall(r"loss ([\d.]+), .* by (-?[\d.]+)", said)]
    assert found[0] == (0.693, 0.0) and len(found) == 12 and found[-1][0] < 0.5 and found[-1][1] > 3
    words = tokenizer.load(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = Conversation(words, [{"role": "user", "content": "hello"}]).prompt_ids()

    def log_p(model: torch.nn.Module, text: str) -> float:
        answer = words.encode(text, bos=False)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return logits.gather(-1, torch.tensor(answer)[:, None]).sum().item()

    def margin(model: torch.nn.Module) -> float:
        return log_p(model, "a brown fox") - log_p(model, "lazy dogs")

    before = margin(base)
    assert margin(peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()) > before + 2


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_becomes_a_gpt2(bias, tmp_path, capsys):
    """GPT-2 as nanoGPT stores it: matrices turned over, torch.compile's prefix, and no biases where it has none."""
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=131, n_embd=48, n_layer=2, n_head=4, n_positions=64, activation_function="gelu")).eval()
    make_loud(theirs)
    if not bias:
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.zeros_(parameter)
    turned = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    weights = {f"_orig_mod.{name}": tensor.T if name.endswith(turned) else tensor
               for name, tensor in theirs.state_dict().items() if bias or not name.endswith("bias")}
    sizes = dict(n_layer=2, n_head=4, n_embd=48, block_size=64, bias=bias, vocab_size=131, dropout=0.0)
    torch.save({"model": weights, "optimizer": torch.optim.AdamW(theirs.parameters()).state_dict(),
                "model_args": sizes, "iter_num": 7, "best_val_loss": torch.tensor(1.0), "config": {}},
               tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="nanoGPT's checkpoint.*python examples/from_nanogpt.py .*ckpt.pt OUT"):
        checkpoints.load(tmp_path / "ckpt.pt")
    run(capsys, "from_nanogpt.py", tmp_path / "ckpt.pt", tmp_path / "out")
    x = torch.randint(131, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        reference = theirs(x).logits
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert difference(checkpoints.load(tmp_path / "out")(x), reference) < 1e-5
        assert difference(again(x).logits, reference) < 1e-5


def test_grpo_raises_the_reward(folder, tmp_path, capsys):
    """The tiny model answers in many words or none; and its sampler is the model that is trained."""
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "hello"}) + "\n")
    said = run(capsys, "grpo.py", folder, tmp_path / "prompts.jsonl", tmp_path / "out", "--steps", "10", "--lr", "0.01",
               "--batch-size", "1", "--group", "16", "--max-new-tokens", "8", "--temperature", "0.8")
    rewards = [float(found) for found in re.findall(r"reward ([\d.]+)", said)]
    assert len(rewards) == 10 and sum(rewards[-3:]) > sum(rewards[:3]) + 0.3
    assert all(float(found) < 0.02 for found in re.findall(r"at most (\S+)", said))
    assert (tmp_path / "out/adapter_model.safetensors").exists()


def test_surgery_changes_what_it_is_asked_to_and_nothing_else(folder, tmp_path, capsys):
    before = checkpoints.load(folder)
    vocab = before.config.vocab
    said = run(capsys, "surgery.py", folder, tmp_path / "out", "--window", "7", "--vocab", str(vocab + 5))
    assert "7 old tokens differ by at most 0.0e+00" in said
    after = checkpoints.load(tmp_path / "out")
    assert [layer.mixer.window for layer in after.config.layers] == [7, None, 7] and after.config.vocab == vocab + 5
    assert after.config.tied and after.head.weight is after.embed.weight
    assert torch.allclose(after.embed.weight[vocab:].float(), before.embed.weight.float().mean(0), atol=1e-3)
    long = torch.randint(vocab, (1, 20))
    with torch.no_grad():
        assert not torch.equal(after(long)[:, -1, :vocab], before(long)[:, -1])        # past the window
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["model_type"] == "qwen3" and values["layer_types"][::2] == ["sliding_attention"] * 2
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("words, said", [
    (["surgery.py", "FOLDER", "OUT", "--vocab", "5"], "--vocab 5: expected at least"),
    (["surgery.py", "MISSING", "OUT", "--vocab", "5"], "MISSING: no such folder"),
    (["finetune.py", "FOLDER", "MISSING", "OUT"], "MISSING"),
    (["finetune.py", "FOLDER", "CHATS", "FULL", "--steps", "1"], "FULL: exists and is not an empty folder"),
    (["loop.py", "MISSING"], "MISSING: expected a text file of at least 1300 bytes"),
    (["from_nanogpt.py", "MISSING", "OUT"], "MISSING: torch does not read it"),
    (["from_nanogpt.py", "CHATS", "OUT"], "CHATS: torch does not read it"),
    (["from_nanogpt.py", "OTHER", "OUT"], "OTHER: not nanoGPT's"),
    (["from_nanogpt.py", "OTHER", "FULL"], "FULL: exists; nothing is overwritten"),
], ids=lambda case: " ".join(case) if isinstance(case, list) else "")
def test_bad_input_is_told(words, said, folder, tmp_path, capsys, monkeypatch):
    """As an error, not as a traceback; a fine-tuning that could not be saved does not begin."""
    monkeypatch.setattr(torch.optim.AdamW, "step", None)
    paths = {"FOLDER": folder} | {name: tmp_path / name for name in ("OUT", "MISSING", "FULL", "CHATS", "OTHER")}
    paths["FULL"].mkdir()
    (paths["FULL"] / "mine").touch()
    paths["CHATS"].write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    torch.save({"weights": torch.zeros(2)}, paths["OTHER"])
    with pytest.raises(SystemExit) as ended:
        run(capsys, *(paths.get(word, word) for word in words))
    told = capsys.readouterr().err if ended.value.code == 2 else ended.value.code
    for name, path in paths.items():
        said = said.replace(name, str(path))
    assert said in told and not paths["OUT"].exists()


def test_surgery_grows_a_head_of_its_own(tmp_path, capsys):
    write(FIXTURES["llama-1"], tmp_path / "llama")
    run(capsys, "surgery.py", tmp_path / "llama", tmp_path / "grown", "--vocab", "140")
    grown = checkpoints.load(tmp_path / "grown")
    assert grown.head.weight.shape[0] == grown.embed.weight.shape[0] == 140
    assert grown.head.weight is not grown.embed.weight
