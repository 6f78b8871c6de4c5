"""The decoding loop: sessions, batches, stop strings; and generate.py as a person runs it.

Its processes are forked (forked.py); tests/kernels/test_decoder.py starts it from a command line.
"""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
import transformers

import checkpoints
import generate as script
from nanollm.config import MLP, Attention, Layer, Mamba, ModelConfig, Rope
from nanollm.errors import InputError
from nanollm.inference.generation import PREFILL, Session, feed, generate, generate_batch, new_cache, stream_text
from nanollm.inference.quantize import quantize
from nanollm.model import Decoder
from nanollm.text import tokenizer
from tests import forked
from tests.oracles import Fixture, difference, make_loud, write
from tests.tok_folders import WORDS, metaspace_bpe, sentencepiece_model

# ---- generation.py

@pytest.fixture(scope="module")
def model() -> Decoder:
    attention = Attention(4, 2, 8, Rope(), window=9)
    decoder = Decoder(
        ModelConfig(
            60, 32,
            (
                Layer(attention, MLP(48)), Layer(Mamba(48, 4, 4, 2), None, pre_ffn=None),
                Layer(Attention(4, 1, 8, Rope()), MLP(48)),
            ),
        )
    ).eval()
    make_loud(decoder)
    return decoder


def test_a_session_goes_on_where_it_stopped(model):
    """The second turn reads only what is new, and says what a fresh start would say."""
    first, session = [5, 17, 3, 44], Session(model, 100)
    answer = list(session.generate(first, 6))
    prompt = first + answer + [9, 8, 7]
    fed = []
    hook = model.embed.register_forward_hook(lambda _, args, __: fed.append(args[0].shape[1]))
    second = list(session.generate(prompt, 6))
    hook.remove()
    assert fed[0] == 4 and second == list(generate(model, prompt, 6))  # the last answer token and three new ones
    other = [9] + prompt[1:]
    assert list(session.generate(other, 6)) == list(generate(model, other, 6)), "another beginning must start anew"
    assert list(session.generate(other, 3)) == list(generate(model, other, 3)), "the same prompt again"


def test_a_long_prompt_is_read_in_pieces(model, monkeypatch):
    monkeypatch.setattr("nanollm.inference.generation.PREFILL", 7)
    tokens, cache = torch.randint(0, 60, (1, 30)), new_cache(model, 1, 40)
    assert PREFILL > 7 and difference(feed(model, tokens, None, cache), model(tokens)[:, -1]) < 1e-5
    prompts = [torch.randint(0, 60, (n,)).tolist() for n in (3, 22, 8)]
    assert generate_batch(model, prompts, 9) == [list(generate(model, prompt, 9)) for prompt in prompts]


def test_limits_and_stops(model):
    prompt = [1, 2, 3]
    all_of_it = list(generate(model, prompt, 12))
    assert len(all_of_it) == 12 and list(generate(model, prompt, 0)) == []
    stop = all_of_it[4]
    assert list(generate(model, prompt, 12, stop_ids=[stop])) == all_of_it[: all_of_it.index(stop) + 1]
    assert len(list(Session(model, 8).generate(prompt, 100))) == 5, "the session's length ends it"
    assert list(generate(model, prompt, 12, temperature=1.0, seed=3)) == list(
        generate(model, prompt, 12, temperature=1.0, seed=3)
    )
    assert generate_batch(model, [prompt], 0) == [[]]


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([], "the prompt is empty"), ([1, 60], "token 60 is outside the model's vocabulary of 60"),
        ([-1], "token -1"), ([1] * 9, "the prompt has 9 tokens, this session holds 8"),
    ],
)
def test_bad_prompts(model, prompt, message):
    with pytest.raises(InputError, match=message):
        next(Session(model, 8).generate(prompt, 4))


@pytest.mark.parametrize(
    "text, stop, expected",
    [
        ("one two three", ["two"], "one "), ("one two three", ["three", "two"], "one "),
        ("one two", ["four"], "one two"), ("aaab", ["aab"], "a"), ("stop", ["stop"], ""), ("sto", ["stop"], "sto"),
        ("", ["x"], ""), ("ab", [], "ab"),
    ],
)
def test_stop_strings_wherever_the_pieces_are_cut(text, stop, expected):
    for size in (1, 2, 3, 100):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert "".join(stream_text(iter(pieces), stop)) == expected


# ---- generate.py

@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What transformers writes: a loud Llama, a byte-level tokenizer, a ChatML template."""
    path = tmp_path_factory.mktemp("model")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer, backend.decoder = (
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel(),
    )
    corpus = ["the quick brown fox jumps over the lazy dog\n"] * 20
    alphabet = sorted(set("".join(corpus)) - {" ", "\n"}) + ["Ġ", "Ċ", "<", ">"]
    backend.train_from_iterator(
        corpus,
        tokenizers.trainers.BpeTrainer(
            vocab_size=100, initial_alphabet=alphabet, special_tokens=["<|im_start|>", "<|im_end|>"]
        ),
    )
    theirs = write(Fixture("llama", {"vocab_size": backend.get_vocab_size()}), path)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(path)
    theirs.generation_config.eos_token_id = 1
    theirs.generation_config.save_pretrained(path)
    path.with_name("ids.json").write_text(
        json.dumps(
            theirs.generate(
                torch.tensor([tokenizer("the fox")["input_ids"]]), max_new_tokens=20, do_sample=False, eos_token_id=1
            )[0].tolist()
        )
    )
    return path


def cli(*arguments: str, text: str = "") -> forked.Ended:
    return forked.start(1, script.run, *arguments, stdin=text).end()


def test_prompt(folder):
    """The same text as transformers' generate, special tokens hidden; the speed on standard error."""
    done = cli("--model", str(folder), "--prompt", "the fox", "--max-new-tokens", "20")
    assert done.codes == [0], done.err
    expected = transformers.AutoTokenizer.from_pretrained(folder).decode(
        json.loads(folder.with_name("ids.json").read_text()), skip_special_tokens=True
    )
    assert done.out == expected + "\n"
    assert "tokens/s" in done.err


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantized(folder, bits):
    """The text that the model quantised by hand gives."""
    done = cli("--model", str(folder), "--prompt", "the fox", "--max-new-tokens", "8", "--quantize", bits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, prompt = quantize(checkpoints.load(folder), int(bits[3:])), tokenizer("the fox")["input_ids"]
    expected = tokenizer.decode([*prompt, *generate(model, prompt, 8, stop_ids=[1, 2])], skip_special_tokens=True)
    assert done.codes == [0] and done.out == expected + "\n", done.err


OPTIONS = {                                              # of generate.py, and of transformers' generate
    "repetition": (["--repetition-penalty", "1.5"], dict(repetition_penalty=1.5)),
    "2-grams": (["--no-repeat-ngram", "2"], dict(no_repeat_ngram_size=2)),
    "ends": (["--logit-bias", "1=100"], dict(sequence_bias={(1,): 100.0})),
    "ends later": (["--logit-bias", "1=100", "--min-new-tokens", "5"],
                   dict(sequence_bias={(1,): 100.0}, min_new_tokens=5)),
}


@pytest.mark.parametrize("name", [*OPTIONS, "ban"])
def test_options_of_the_choice_are_those_of_transformers(folder, name):
    """Greedy text, from its generate and from ours; each option changes it."""
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([words("the fox")["input_ids"]])
    plain = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=1)[0, ids.shape[1] :]
    if name == "ban":
        text = words.decode(plain[2:4])
        spelled = [words(each)["input_ids"] for each in (text, f" {text}")]
        options, how = ["--ban", text], dict(bad_words_ids=spelled)
    else:
        options, how = OPTIONS[name]
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=1, **how)[0, ids.shape[1] :]
    assert not torch.equal(expected, plain), "the example shows nothing"
    done = cli("--model", str(folder), "--prompt", "the fox", "--max-new-tokens", "12", *options)
    assert done.out == "the fox" + words.decode(expected, skip_special_tokens=True) + "\n", done.err


@pytest.mark.parametrize("option", ["presence-penalty", "frequency-penalty"])
def test_penalties_of_openai_are_passed_on(folder, option):
    words, model = tokenizer.load(folder), checkpoints.load(folder)
    new = generate(model, words.encode("the fox"), 40, stop_ids=words.stop_ids, **{option.replace("-", "_"): 1.9})
    done = cli("--model", str(folder), "--prompt", "the fox", "--max-new-tokens", "40", f"--{option}", "1.9")
    assert done.out == "the fox" + words.decode(new, continues=True) + "\n", done.err
    assert done.out != cli("--model", str(folder), "--prompt", "the fox", "--max-new-tokens", "40").out


def test_log_probabilities_are_transformers(folder):
    """Of the chosen and the likeliest tokens, as it computes them; the bytes join to the text."""
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    done = cli("--model", str(folder), "--prompt", "the fox", "--max-new-tokens", "9", "--json", "--logprobs", "3",
               "--repetition-penalty", "1.3", "--temperature", "0.9", "--top-k", "5", "--seed", "1",
               "--logit-bias", "1=-100")
    said = json.loads(done.out)
    content = said["logprobs"]["content"]
    assert b"".join(bytes(one["bytes"]) for one in content) == said["answer"].encode()
    assert said["tokens"] == len(content) == 9
    ids = words("the fox")["input_ids"]
    for one in content:
        with torch.no_grad():
            likely = theirs(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        top = likely.topk(3)
        spelled = [words.decode([id]) for id in top.indices]
        assert [each["token"] for each in one["top_logprobs"]] == spelled
        assert [each["logprob"] for each in one["top_logprobs"]] == pytest.approx(top.values.tolist(), abs=1e-4)
        (id,) = [id for id in range(len(likely)) if words.decode([id]) == one["token"]]
        assert one["logprob"] == pytest.approx(likely[id].item(), abs=1e-4)
        ids.append(id)
    done = cli("--model", str(folder), "--prompt", "the fox", "--max-new-tokens", "2", "--json", "--logprobs")
    assert [one["top_logprobs"] for one in json.loads(done.out)["logprobs"]["content"]] == [[], []]


def test_batch_and_stdin(folder):
    done = cli(
        "--model", str(folder), "--prompt", "the fox", "--prompt", "-", "--max-new-tokens", "5", "--stop", "zzzz",
        text="dog",
    )
    assert done.codes == [0] and done.out.count("---") == 2 and "for 2 prompts" in done.err, done.err


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_an_answer_begins_alike_alone_and_in_a_batch(kind, tmp_path):
    """With the space that its first token has, where a text of its own would lose it; as the library decodes prompt
    and answer together."""
    theirs: sentencepiece.SentencePieceProcessor | tokenizers.Tokenizer
    if kind == "tokenizer.model":
        (tmp_path / kind).write_bytes(data := sentencepiece_model())
        theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    else:
        (theirs := metaspace_bpe()).save(str(tmp_path / kind))
    write(Fixture("llama", {"vocab_size": tokenizer.load(tmp_path).vocab_size}), tmp_path)
    words, model = tokenizer.load(tmp_path), checkpoints.load(tmp_path)
    rest = {}
    for prompt in WORDS[:30]:
        ids = words.encode(prompt)
        new = [*generate(model, ids, 2, stop_ids=words.stop_ids)]
        text = theirs.decode(ids + new)
        if not {"\ufffd", "⁇"} & {*text}:                   # of which libraries write different numbers
            rest[prompt] = text.removeprefix(prompt)
    prompts = sorted(rest, key=lambda prompt: not rest[prompt].startswith(" "))[:5]
    assert rest[prompts[0]].startswith(" "), "the example needs an answer that begins with a space"
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    together = cli("--model", str(tmp_path), *asked, "--max-new-tokens", "2").out
    assert together == "".join(f"--- {prompt}\n{rest[prompt]}\n" for prompt in prompts)
    alone = cli("--model", str(tmp_path), "--prompt", prompts[0], "--max-new-tokens", "2").out
    assert alone == f"{prompts[0]}{rest[prompts[0]]}\n"


def test_bos_is_put_before_a_prompt_when_asked(folder, tmp_path):
    """DeepSeek-V3's files: add_bos_token, and a tokenizer.json that adds none. What to do is said, and works."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said | {"bos_token": "<|im_start|>",
                                                                       "add_bos_token": True}))
    words, model = tokenizer.load(tmp_path), checkpoints.load(tmp_path)
    bare = words.encode("the fox", bos=False)
    for option, ids, warned in (([], bare, True), (["--bos"], [words.bos_id, *bare], False),
                                (["--no-bos"], bare, False)):
        done = cli("--model", str(tmp_path), "--prompt", "the fox", "--max-new-tokens", "8", *option)
        new = generate(model, ids, 8, stop_ids=words.stop_ids)
        assert done.out == "the fox" + words.decode(new, continues=True) + "\n", done.err
        assert ("add_bos_token" in done.err and "--bos" in done.err) == warned
    assert cli("--model", str(tmp_path), "--chat", "--bos").codes == [2]


def test_chat(folder):
    """From a pipe: the answers alone on standard output; an empty line is none, and does not end it."""
    said = "the fox\n\nthe dog\n"
    done = cli("--model", str(folder), "--chat", "--system", "the dog", "--max-new-tokens", "8", text=said)
    assert done.codes == [0] and len(done.out.splitlines()) == 2 and ">" not in done.out, done.said
    assert done.err.count("tokens/s; cut at --max-new-tokens 8]") == 2


@pytest.mark.parametrize("arguments, message", [
    (["--prompt", "x"], "--model"),
    (["--model", "x"], "one of the arguments --prompt --ask --chat --prompts --serve is required"),
    (["--model", "x", "--prompt", "x", "--max-new-token", "3"], "did you mean --max-new-tokens?"),
    (["--model", "x", "--prompt", "x", "--top-p", "7"], "--top-p 7.0: expected 0 to 1"),
    (["--model", "no/such folder", "--prompt", "x"], "no such folder"),
])
def test_bad_arguments_are_one_line(arguments, message):
    done = cli(*arguments)
    assert done.codes[0] in (1, 2) and message in done.err and "Traceback" not in done.err and done.out == ""


def test_a_bad_folder_is_one_line_and_an_exit_code(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    done = cli("--model", str(tmp_path), "--prompt", "x")
    assert (
        done.codes == [1]
        and done.err.startswith("error: ")
        and "config.json" in done.err
        and len(done.err.splitlines()) == 1
    )
