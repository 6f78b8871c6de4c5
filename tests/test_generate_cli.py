"""generate.py beyond one prompt: --ask, --json, files of prompts, generation_config.json, and what was a traceback.

The models are scripted (terminals.py): they say "Yes", and end.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import transformers

import checkpoints
import generate as script
from nanollm.cache import Cache
from nanollm.errors import InputError
from nanollm.inference import machine
from nanollm.inference.batches import finished, read_jobs
from nanollm.inference.context import MEMORY, cache_bytes, default_context, past_context
from nanollm.inference.generation import answer_batch
from nanollm.inference.machine import fitted_new, free_memory, need_memory
from nanollm.inference.request import Request
from nanollm.inference.sample import Sampling, processed
from nanollm.inference.settings import read_settings, spellings
from nanollm.inference.written import until
from nanollm.presets import PRESETS, preset, transformer
from nanollm.text.chat import Conversation
from tests import forked
from tests.terminals import scripted
from tests.tok_folders import byte_bpe, write

QUESTION = [{"role": "user", "content": "really?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted(tmp_path_factory.mktemp("model"), ["Y", "e", "s"], context=64)


def cli(*arguments: object, text: str = "") -> forked.Ended:
    done = forked.start(1, script.run, *arguments, stdin=text).end()
    assert "Traceback" not in done.said, done.said
    return done


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ask_prints_the_answer_alone(folder: Path) -> None:
    for arguments, text in ((["--ask", "really?"], ""), (["--ask", "-"], "really?\n")):
        done = cli("--model", folder, *arguments, text=text)
        assert done.codes == [0] and done.out == "Yes\n" and "4 tokens" in done.err, done.said
    cut = cli("--model", folder, "--ask", "really?", "--max-new-tokens", 2)
    assert cut.out == "Ye\n" and "cut at --max-new-tokens 2]" in cut.err
    assert "more than the 64 that the model was trained for" in cli("--model", folder, "--ask", "x9 " * 40).err


def test_json(folder: Path) -> None:
    """One object a result; the ids of the chat are transformers'."""
    done = cli("--model", folder, "--ask", "really?", "--system", "Be kind.", "--json")
    messages = [{"role": "system", "content": "Be kind."}, *QUESTION]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert json.loads(done.out) == {"messages": messages, "answer": "Yes", "finish_reason": "stop",
                                    "prompt_tokens": len(ids), "tokens": 4}
    both = cli("--model", folder, "--prompt", "a\n", "--prompt", "é\n", "--json", "--max-new-tokens", 2)
    assert [json.loads(line) for line in both.out.splitlines()] == [
        {"prompt": text, "answer": "Ye", "finish_reason": "length", "prompt_tokens": len(theirs(text)["input_ids"]),
         "tokens": 2} for text in ("a\n", "é\n")]
    for prompts in (["a\n"], ["a\n", "é\n"]):
        options = [word for text in prompts for word in ("--prompt", text)]
        said = [json.loads(line) for line in cli("--model", folder, *options, "--json", "--stop", "e").out.splitlines()]
        found = [(one["answer"], one["finish_reason"], one["tokens"]) for one in said]
        assert found == [("Y", "stop", 2)] * len(prompts)


def test_log_probabilities_have_an_object_a_token(folder: Path, tmp_path: Path) -> None:
    """The stop token, too; in a file as on standard output. Values: test_generation.py."""
    said = json.loads(cli("--model", folder, "--ask", "really?", "--json", "--logprobs", 1).out)
    content = said["logprobs"]["content"]
    assert [one["token"] for one in content] == ["Y", "e", "s", "<|im_end|>"] and said["tokens"] == 4
    assert all(one["top_logprobs"] == [{name: one[name] for name in ("token", "logprob", "bytes")}] for one in content)
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": QUESTION}))
    cli("--model", folder, "--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", "--logprobs", 1)
    assert lines(tmp_path / "out.jsonl")[0]["logprobs"] == said["logprobs"]


def test_where_a_table_of_positions_ends(tmp_path: Path) -> None:
    """An answer goes up to there, alike in --ask and --chat; what is told is the end of the context, in JSON length."""
    with pytest.warns(UserWarning, match="own layout"):
        folder = scripted(tmp_path, ["a", "b", "c"], endless=True, positions=40)
    conversation = Conversation(checkpoints.tokenizer(folder))
    conversation.add("user", "x")
    ids = len(conversation.prompt_ids())
    done = cli("--model", folder, "--ask", "x", "--max-new-tokens", 99)
    assert done.out == ("abc" * 40)[: 41 - ids] + "\n" and "; cut at the end of the context]" in done.err, done.said
    done = cli("--model", folder, "--ask", "x", "--max-new-tokens", 99, "--json")
    assert json.loads(done.out)["finish_reason"] == "length" and json.loads(done.out)["tokens"] == 41 - ids
    done = cli("--model", folder, "--prompt", "xyz\n", "--max-new-tokens", 41 - 3)
    assert done.out == "xyz\n" + ("abc" * 40)[: 41 - 4] + "\n" and "; cut at the end of the context]" in done.err
    done = cli("--model", folder, "--ask", "x" * 99)
    assert done.codes == [1] and "the model has 40 positions" in done.err
    done = cli("--model", folder, "--chat", "--max-new-tokens", 99, text="x\n")
    assert "; cut at the end of the context]" in done.err


def test_special_tokens_in_a_prompt(folder: Path) -> None:
    """As text, or with --special as tokens: as many as transformers counts, which always reads them."""
    prompt = "<|im_start|>user\nHi<|im_end|>\n"
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    counts = {option: json.loads(cli("--model", folder, "--prompt", prompt, "--json", *option).out)["prompt_tokens"]
              for option in ((), ("--special",))}
    assert counts["--special",] == len(theirs(prompt)["input_ids"]) < counts[()]


def test_a_file_of_prompts(folder: Path, tmp_path: Path) -> None:
    """Prompts and chats, other keys kept; a run that was stopped anywhere goes on, to the same file."""
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked = [{"prompt": "a\n"}, {"messages": QUESTION, "id": 7}, {"id": "é", "prompt": "longer than the first\n"},
             {"prompt": "no line ends here"}, {"messages": QUESTION}]
    file.write_text("\n".join(map(json.dumps, asked)) + "\n\n")
    run = ("--model", folder, "--prompts", file, "--out", out, "--batch-size", 2, "--max-new-tokens", 5, "--stop", "es")
    first = cli(*run)
    assert first.codes == [0]
    whole = out.read_bytes()
    said = {"answer": "Y", "finish_reason": "stop"}
    assert lines(out)[:3] == [one | said for one in asked[:3]] and lines(out)[4] == asked[4] | said
    assert lines(out)[3]["finish_reason"] in ("stop", "length") and "é" in whole.decode()
    for size in (0, 10, len(whole) // 2, whole.rindex(b"\n", 0, -1) + 1, len(whole)):
        out.write_bytes(whole[:size])
        done = cli(*run)
        assert done.codes == [0] and out.read_bytes() == whole, done.said
    assert "has all 5 answers" in done.err and "[5 answers in " in first.err


def test_a_file_of_answers_to_other_prompts_is_left_alone(folder: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    request = Request(checkpoints.tokenizer(folder), 5, Sampling())
    file.write_text('{"prompt": "a"}\n')
    for there in ('{"prompt": "b", "answer": "", "finish_reason": "stop"}\n', '{"prompt": "a"}\n', "a text", "a\nb\n",
                  '{"prompt": "a", "answer": "", "finish_reason": "stop"}\n{"prompt"'):
        out.write_text(there)
        with pytest.raises(InputError, match="out.jsonl"):
            finished(out, read_jobs(file, request), request)
        assert out.read_text() == there


@pytest.mark.parametrize("line, message", [
    ("{", "not JSON"), ("[]", "expected an object"), ('{"id": 1}', "found id"), ('{"prompt": 3}', "expected text"),
    ('{"prompt": "a", "messages": []}', "found prompt, messages"), ('{"prompt": "a", "answer": ""}', "it has answer"),
    ('{"messages": "a"}', 'expected {"messages"'), ('{"messages": [{"content": "a"}]}', "message 1"),
    ('{"prompt": "\\ud800"}', "lone surrogate"), ('{"prompt": ""}', "the prompt is empty"),
])
def test_a_bad_line_is_named_before_the_first_answer(folder: Path, tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(Exception, match="in.jsonl, line 2: ") as error:
        read_jobs(file, Request(checkpoints.tokenizer(folder), 5, Sampling()))
    assert message in str(error.value)


def test_where_the_answers_go_is_tried_before_the_model_is_read(folder: Path, tmp_path: Path) -> None:
    """And nothing is left there. Prompts may come from standard input."""
    weights = folder / "model.safetensors"
    kept, prompts, out = weights.read_bytes(), '{"prompt": "a\\n"}\n', tmp_path / "out.jsonl"
    weights.write_bytes(b"no weights")
    try:
        done = cli("--model", folder, "--prompts", "-", "--out", tmp_path / "none" / "x.jsonl", text=prompts)
        assert done.err == f"error: {tmp_path / 'none' / 'x.jsonl'}: No such file or directory\n"
        assert "model.safetensors" in cli("--model", folder, "--prompts", "-", "--out", out, text=prompts).err
        assert not out.exists()
    finally:
        weights.write_bytes(kept)
    done = cli("--model", folder, "--prompts", "-", "--out", out, text=prompts)
    assert done.codes == [0] and done.err.endswith(f"[1 answer in {out}]\n") and lines(out)[0]["answer"] == "Yes"
    assert "standard input, line 1: not JSON" in cli("--model", folder, "--prompts", "-", "--out", out, text="x").err


# ---- generation_config.json

@pytest.mark.parametrize("said", [
    {"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "top_k": 20, "min_p": 0.05}, {},
    {"temperature": 0.6, "top_k": 20}, {"do_sample": False}, {"do_sample": True, "top_p": 1.0, "top_k": 0},
    {"repetition_penalty": 1.1}, {"do_sample": True, "repetition_penalty": 1.2}, {"repetition_penalty": 1.0},
    {"no_repeat_ngram_size": 3, "min_new_tokens": 4}, {"do_sample": True, "no_repeat_ngram_size": 0},
])
def test_settings_are_what_transformers_reads(said: dict, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    values = dict(read_settings(tmp_path).values)
    for field, key, nothing in (("repetition_penalty",) * 2 + (1.0,), ("min_new_tokens",) * 2 + (0,),
                                ("no_repeat_ngram", "no_repeat_ngram_size", 0)):                  # greedy has them, too
        assert values.pop(field, nothing) == (getattr(theirs, key) or nothing)
    if not theirs.do_sample:
        assert values == {}
        return
    filled = theirs._get_default_generation_params() | {"min_p": None}
    for name, nothing in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("min_p", None)):
        there = getattr(theirs, name)
        there = nothing if there is None else there
        assert values.get(name, nothing) == there and name in filled


def test_bans_of_the_file_are_those_of_transformers(tmp_path: Path) -> None:
    """A stop token among the bad words is none, among the suppressed tokens it is; what is no list is named."""
    said = {"bad_words_ids": [[5], [7], [8, 9], [2]], "suppress_tokens": [3, 7, 30], "eos_token_id": [2, 7]}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    read = read_settings(tmp_path)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    model._prepare_special_tokens(theirs, device="cpu")
    processors = model._get_logits_processor(theirs, input_ids_seq_length=2, device="cpu")
    for prompt in ([1, 2], [9, 8], [8, 30]):
        logits = torch.randn(1, 40)
        expected = processors(torch.tensor([prompt]), logits.clone())
        assert torch.equal(processed(logits, Sampling(**read.values), [prompt], [[]], [2, 7]), expected)
    for wrong in ({"bad_words_ids": [5]}, {"bad_words_ids": [[]]}, {"suppress_tokens": ["x"]}, {"suppress_tokens": 3},
                  {"bad_words_ids": [[-1]]}, {"min_new_tokens": 1.5}, {"no_repeat_ngram_size": -1}):
        (tmp_path / "generation_config.json").write_text(json.dumps(wrong))
        (name, value), = wrong.items()
        assert read_settings(tmp_path) == ({}, [f"{name} {value}"])


def test_settings_are_defaults_of_questions(tmp_path: Path) -> None:
    """Said on standard error; an option wins over the file; temperature 0 ends it all; a --prompt stays greedy."""
    folder = scripted(tmp_path, ["Y", "e", "s"], do_sample=True, temperature=0.001, top_p=0.9, repetition_penalty=1.3,
                      num_beams=2)
    done = cli("--model", folder, "--ask", "really?")
    assert done.out == "Yes\n"
    assert "[generation_config.json: temperature 0.001, top_p 0.9, repetition_penalty 1.3; " in done.err
    assert "num_beams 2, which is not followed" in done.err
    y, e, s = (checkpoints.tokenizer(folder).encode(letter)[0] for letter in "Yes")
    write(folder, generation_config={"suppress_tokens": [0], "bad_words_ids": [[y, e], [s]]})
    done = cli("--model", folder, "--ask", "really?", "--max-new-tokens", 2, "--ban", '"')
    assert done.out.startswith("Y") and not {"e", "!", '"'} & {*done.out}, "0 is !, 1 is \", and all else is as likely"
    assert "[generation_config.json: banned: 3 words of tokens; " in done.err
    (folder / "generation_config.json").write_text(json.dumps({"suppress_tokens": [1 << 20]}))
    done = cli("--model", folder, "--ask", "x")
    assert "a ban of generation_config.json: token id 1048576: expected 0 to" in done.err
    write(folder, generation_config={"do_sample": True, "temperature": 0.001, "top_p": 0.9, "repetition_penalty": 1.3})
    told = cli("--model", folder, "--ask", "x", "--temperature", 0.002).err
    assert "[generation_config.json: top_p 0.9, repetition_penalty 1.3; " in told
    for arguments in (["--ask", "x", "--temperature", 0], ["--prompt", "x\n"]):
        assert "generation_config" not in cli("--model", folder, *arguments).err


def test_options_that_change_nothing_are_named(folder: Path) -> None:
    told = cli("--model", folder, "--prompt", "a\n", "--ignore", "foo", "--ignore", "rope_theta").err
    assert "config.json: to ignore foo changes nothing: no key and no tensor has that name" in told
    told = cli("--model", folder, "--prompt", "a\n", "--top-p", 0.9, "--seed", 1, "--context", 99).err
    assert "at temperature 0 --top-p, --seed changes nothing" in told and "--context changes nothing" in told
    told = cli("--model", folder, "--prompt", "a\n", "--n", 2, "--batch-size", 2).err
    assert "the 2 answers to a prompt are all alike" in told and "--batch-size changes nothing" in told


# ---- several answers, log-probabilities, bans

def test_several_answers(folder: Path, tmp_path: Path) -> None:
    """To a prompt, to a question, to a file of them: the draws of `answer_batch`, in order, with their index."""
    words, model = checkpoints.tokenizer(folder), checkpoints.load(folder)
    prompts = ["a\n", "é\n"]
    drawn = ("--temperature", 7, "--seed", 3, "--max-new-tokens", 4)
    answers = answer_batch(model, [words.encode(text) for text in prompts], 4, samples=3, temperature=7, seed=3,
                           stop_ids=words.stop_ids)
    expected = [{"prompt": text, "index": index} for text in prompts for index in range(3)]
    expected = [one | {"answer": words.decode(answer.tokens), "finish_reason": answer.ended}
                for one, answer in zip(expected, answers, strict=True)]
    assert len({one["answer"] for one in expected}) == 6
    asked = ("--prompt", prompts[0], "--prompt", prompts[1])
    done = cli("--model", folder, *asked, "--n", 3, "--json", *drawn)
    said = [json.loads(line) for line in done.out.splitlines()]
    assert [one | {"prompt_tokens": 0, "tokens": 0} for one in said] == [
        one | {"prompt_tokens": 0, "tokens": 0} for one in expected] and "tokens for 6 answers" in done.err
    plain = cli("--model", folder, *asked, "--n", 3, *drawn).out
    assert plain == "".join(f"--- {one['prompt']} ({one['index'] + 1} of 3)\n{one['answer']}\n" for one in expected)
    question = cli("--model", folder, "--ask", "really?", "--n", 2, "--max-new-tokens", 2)
    assert question.out == "--- answer (1 of 2)\nYe\n--- answer (2 of 2)\nYe\n"
    assert "tokens/s in all; 2 cut at --max-new-tokens 2]" in question.err

    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    run = ("--model", folder, "--prompts", file, "--out", out, "--n", 3, "--logprobs", 1)
    assert cli(*run, *drawn).codes == [0]
    assert [{name: value for name, value in one.items() if name != "logprobs"} for one in lines(out)] == expected
    assert "has all 6 answers" in cli(*run).err
    out.unlink()
    run += ("--max-new-tokens", 4)                        # greedy, so always the same file
    assert cli(*run).codes == [0]
    whole = out.read_bytes()
    starts = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for size in (starts[0], starts[1] + 9, starts[3], len(whole) - 4):
        out.write_bytes(whole[:size])
        assert cli(*run).codes == [0] and out.read_bytes() == whole
    out.write_bytes(whole[starts[0]:])
    assert "line 1: not the answer to prompt 1" in cli(*run).err


def test_a_file_whose_lines_have_an_index(folder: Path, tmp_path: Path) -> None:
    """Theirs, where one answer is asked for; where several are it would be written over."""
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"prompt": "a\\n", "index": 7}\n')
    run = ("--model", folder, "--prompts", file, "--out", out)
    assert cli(*run).codes == [0]
    assert lines(out) == [{"prompt": "a\n", "index": 7, "answer": "Yes", "finish_reason": "stop"}]
    assert "it has index already" in cli(*run, "--n", 2, "--temperature", 1).err


def test_the_tokens_of_a_ban(folder: Path) -> None:
    """Those of the text after other text, and after a space. A token that there is not is named, and where it was."""
    words = checkpoints.tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("Yes", "the quick", "é"):
        assert set(spellings(words, text)) == {tuple(theirs(each)["input_ids"]) for each in (text, f" {text}")}
    assert cli("--model", folder, "--ask", "x", "--logit-bias", "1048576=1").err.startswith(
        "error: --logit-bias: token id 1048576: expected 0 to")


def test_guesses_change_nothing_in_an_answer(folder: Path, tmp_path: Path) -> None:
    """--draft and --lookup, greedy and drawn: what is printed is what is printed without them."""
    small = scripted(tmp_path / "small", ["N", "o"], context=64)
    for ask in (["--ask", "really?", "--json"], ["--prompt", "YeYe", "--temperature", "3", "--seed", "5"]):
        plain = cli("--model", folder, "--max-new-tokens", 12, *ask).out
        for way in (["--lookup"], ["--draft", folder], ["--draft", small]):
            done = cli("--model", folder, "--max-new-tokens", 12, *ask, *way)
            assert done.codes == [0] and done.out == plain, done.said
    byte_bpe(vocab=400).save(str(write(tmp_path / "other") / "tokenizer.json"))
    done = cli("--model", folder, "--ask", "x", "--draft", tmp_path / "other")
    assert done.codes == [1] and "it has other tokens than" in done.err


# ---- context

def test_the_context_is_the_models_or_what_a_cache_of_a_gibibyte_holds() -> None:
    for name in PRESETS:
        config = preset(name)
        context = default_context(config, torch.bfloat16)
        assert cache_bytes(config, context, torch.bfloat16) <= MEMORY
        assert context == (config.context or 4096) or cache_bytes(config, context + 1, torch.bfloat16) > MEMORY
    assert default_context(preset("llama-8b"), torch.bfloat16) == 8191       # 128 KiB a token, and one slot more
    config = transformer(50, 32, 2, 4, 2, 48, context=64)
    held = [vars(state) for state in Cache(config, 1, 64, torch.float32).states]
    assert cache_bytes(config, 64, torch.float32) == sum(
        each.nbytes for state in held for each in state.values() if isinstance(each, torch.Tensor))
    assert past_context(config, 64) is None and "65 tokens are more than the 64" in str(past_context(config, 65))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells the memory that is free")
def test_no_more_memory_is_taken_than_there_is(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A --context that does not fit is refused, with one that does; --max-new-tokens becomes what does."""
    config, cpu = preset("llama-8b"), torch.device("cpu")
    # one moment for both: what other processes take between two readings is no business of this test
    (tmp_path / "meminfo").write_text(Path("/proc/meminfo").read_text())
    (tmp_path / "stat").write_text(Path("/proc/stat").read_text())
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    free = free_memory(cpu)
    assert free is not None and 0 < free <= psutil.virtual_memory().available       # less in a container
    monkeypatch.setattr(machine, "free_memory", lambda _: 100 * 131_072)      # 100 slots, of which one is the bin
    need_memory(config, 99, torch.bfloat16, cpu)
    with pytest.raises(InputError, match=r"--context 100: its cache takes 13,238,272 bytes, and 13,107,200 are free; at"
                       r" most --context 99 fits"):
        need_memory(config, 100, torch.bfloat16, cpu)
    assert fitted_new(config, 1, 40, 49, torch.bfloat16, cpu) == 49
    assert fitted_new(config, 1, 40, 1 << 30, torch.bfloat16, cpu) == 89 - 40               # nine tenths of the memory
    assert fitted_new(config, 2, 20, 1 << 30, torch.bfloat16, cpu) == 44 - 20
    with pytest.raises(InputError, match="2 × 45 tokens of prompts"):
        fitted_new(config, 2, 45, 99, torch.bfloat16, cpu)
    monkeypatch.setattr(machine, "free_memory", lambda _: 1 << 36)
    assert fitted_new(config, 1, 40, 1 << 30, torch.bfloat16, cpu) == 8192 and MEMORY == 8192 * 131_072
    monkeypatch.undo()
    done = cli("--model", folder, "--chat", "--context", 1 << 31)
    assert done.codes == [1] and done.err.startswith("error: --context 2147483648: its cache takes ")
    (tmp_path / "in.jsonl").write_text('{"prompt": "a\\n"}\n')
    for way in (["--ask", "x"],
                ["--prompt", "a\n"], ["--prompt", "a\n", "--prompt", "b\n"],
                ["--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl"]):
        done = cli("--model", folder, "--max-new-tokens", 1 << 31, *way)
        assert done.codes == [0] and "no memory for --max-new-tokens 2147483648: the limit is " in done.err, done.said
    assert lines(tmp_path / "out.jsonl")[0]["answer"] == "Yes"


def test_until() -> None:
    assert until("one two three", ["three", "two"]) == "one " and until("one", ["x"]) == until("one", []) == "one"


# ---- no tracebacks

@pytest.mark.parametrize("arguments, message", [
    (["--prompt", "x", "--temperature", "1e-38"], "--temperature 1e-38: expected 1e-06 to 100, or 0"),
    (["--prompt", "x", "--temperature", "nan"], "--temperature nan: expected 0 to 100"),
    (["--prompt", "x", "--seed", "1e20"], "invalid int value"),
    (["--prompt", "x", "--seed", str(10**20)], "--seed 100000000000000000000: expected"),
    (["--prompt", "x", "--device", "cuda:77"], "--device cuda:77: "),
    (["--prompt", "x", "--device", "nix"], "--device nix: "),
    (["--ask", "x", "--ask", "y"], "--ask twice: expected one"), (["--ask", ""], "--ask '': expected a question"),
    (["--ask", "-"], "--ask -: standard input is empty"),
    (["--ask", "x", "--system", "y", "--system", "z"], "--system twice"),
    (["--prompts", "-", "--out", "out.jsonl"], "standard input: there is no prompt in it"),
    (["--chat", "--temp", "1"], "did you mean --template or --temperature?"),
    (["--chat", "--qqq"], "unknown option --qqq; --help lists them"),
    (["--prompt", "x", "--device", "meta"], "it computes nothing"), (["--prompt", "x", "--stop", ""], "--stop ''"),
    (["--prompt", "-", "--prompt", "-"], "standard input can be read once"),
    (["--prompt", "x", "--system", "y"], "--system goes with --ask and --chat"),
    (["--chat", "--json"], "--json goes with"), (["--prompts", "x.jsonl"], "go together"),
    (["--ask", "x", "--chat"], "not allowed with"), (["--ask", "x", "--special"], "--special goes with"),
    (["--prompts", "none.jsonl", "--out", "out.jsonl"], "none.jsonl: No such file"),
    (["--chat", "--lookup"], "--draft and --lookup go with one answer"),
    (["--prompt", "x", "--draft", "y", "--lookup"], "not allowed with"),
    (["--chat", "--n", "2"], "--n goes with"), (["--prompt", "x", "--logprobs"], "--logprobs goes with --json"),
    (["--prompt", "x", "--n", "0"], "--n 0: expected 1 to"), (["--prompt", "x", "--ban", ""], "--ban ''"),
    (["--prompt", "x", "--logit-bias", "x=1"], "--logit-bias: x=1: expected ID=BIAS"),
    (["--prompt", "x", "--logit-bias", "1=1e9"], "1=1e9: expected a bias of -100 to 100"),
    (["--prompt", "x", "--presence-penalty", "3"], "--presence-penalty 3.0: expected -2 to 2"),
    (["--prompt", "\udcff"], "lone surrogate"),
])
def test_bad_input_is_one_line(folder: Path, arguments: list[str], message: str) -> None:
    done = cli("--model", folder, *arguments)
    assert done.codes[0] in (1, 2) and message in done.err and done.out == "", done.said


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """With what forked processes have no way of: streams that are closed, or of another encoding."""
    command = command.replace("GENERATE", f"{sys.executable} generate.py --model {folder}")
    return subprocess.run(["bash", "-c", command], cwd=Path(script.__file__).parent, capture_output=True,
                          env=os.environ | environment, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("command, out, message", [
    (r"printf 'caf\xe9' | GENERATE --ask -", b"", b"found the byte 0xe9 at 3, expected UTF-8"),
    (r"printf 'one\n\xff\ntwo\n' | GENERATE --chat", b"Yes\nYes\n", b"found the byte 0xff at 0"),
    ("GENERATE --prompt $'\\u00e9\\n'", b"\\xe9\nYes\n", b"tokens/s"), ("GENERATE --ask - <&-", b"", b"it is closed"),
    ("GENERATE --chat <&-", b"", b""), ("GENERATE --ask x >&-", b"", b"4 tokens"),
    ("GENERATE --ask x 2>&-", b"Yes\n", b""), ("GENERATE --ask x | true", b"", b""),
    ("GENERATE --prompts <(echo '{\"prompt\": \"a\"}') --out /dev/full", b"", b"/dev/full: No space left"),
])
def test_streams_of_all_kinds(folder: Path, command: str, out: bytes, message: bytes) -> None:
    done = shell(command, folder, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C.UTF-8")
    assert done.stdout == out and message in done.stderr and b"Traceback" not in done.stderr, done
