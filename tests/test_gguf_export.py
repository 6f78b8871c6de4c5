"""Models written as GGUF: tensor by tensor what test_gguf.py writes after llama.cpp's converter, keys that the gguf
package reads, and a tokenizer that comes back. tests/test_published.py runs them in llama.cpp."""

import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import AddedToken

from checkpoints import convert
from checkpoints.layouts import gguf_tokens, gguf_tokens_export
from checkpoints.layouts.gguf_pretokenizers import PRE
from checkpoints.source import open_source
from nanollm.errors import CheckpointError, ConfigError, TokenizerError
from nanollm.text import tokenizer as tokenizers
from tests.fixtures import FIXTURES
from tests.oracles import difference, reference_logits, tokens, write
from tests.test_gguf import MODELS, write_gguf
from tests.test_gguf_tokens import DATA, TEXTS, SentencePieceProcessor, sentencepiece_gguf, small

NO_TOKENIZER = pytest.mark.filterwarnings("ignore:model.gguf is written without a tokenizer")


def export(folder, to, quantized=None, dtype=None, verify=True):
    convert.convert(convert.plan(open_source(folder), "gguf", dtype, quantized), to, verify=verify)
    return to / "model.gguf"


@NO_TOKENIZER
@pytest.mark.parametrize("name", [name for name in MODELS if name != "mistral-window"])
def test_what_the_converter_writes(name, tmp_path):
    """Names, types, shapes and numbers of all tensors, and the keys of the architecture that both have."""
    model = write(MODELS[name], tmp_path / "hf")
    theirs = gguf.GGUFReader(write_gguf(tmp_path / "theirs.gguf", model))
    path = export(tmp_path / "hf", tmp_path / "out")
    ours = gguf.GGUFReader(path)
    expected = {one.name: one for one in theirs.tensors}
    assert {one.name for one in ours.tensors} == expected.keys()
    for one in ours.tensors:
        there = expected[one.name]
        assert one.tensor_type == there.tensor_type and one.shape.tolist() == there.shape.tolist(), one.name
        assert np.allclose(one.data, there.data, rtol=1e-6 if "rope" in one.name else 0, atol=0), one.name
    for key, field in ours.fields.items():
        unread = key.startswith(("GGUF.", "general.name", "tokenizer.")) or key.endswith("moe.feed_forward_length")
        if key in theirs.fields and not unread:
            assert np.allclose(field.contents(), theirs.fields[key].contents(), rtol=1e-6) if isinstance(
                field.contents(), (int, float)) else field.contents() == theirs.fields[key].contents(), key
    fixture = MODELS[name]
    x = tokens(fixture)
    family = "mistral" if fixture.kind == "mistral" else None
    again = open_source(path, family=family).fill(None)
    assert difference(again(x), reference_logits(fixture, model, x)) < fixture.bound


@NO_TOKENIZER
def test_a_window_is_told_to_the_family_that_reads_it(tmp_path):
    """No other key says it, as llama.cpp ignores it; --family mistral takes it."""
    write(MODELS["mistral-window"], tmp_path / "hf")
    path = export(tmp_path / "hf", tmp_path / "out")
    assert open_source(path, family="mistral").config.layers[0].mixer.window == 9


@NO_TOKENIZER
@pytest.mark.parametrize("wanted", ["F16", "BF16", "Q8_0"])
def test_types(wanted, tmp_path):
    """Matrices as asked, vectors and routers exact; rows of 40 are no blocks of 32, so those are F16."""
    model = write(MODELS["mixtral"], tmp_path / "hf")
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(wanted)
    path = export(tmp_path / "hf", tmp_path / "out", None if dtype else wanted, dtype)
    for one in gguf.GGUFReader(path).tensors:
        plain = len(one.shape) == 1 or "ffn_gate_inp" in one.name
        assert one.tensor_type == (Kind.F32 if plain else Kind[wanted]), one.name
    head = next(one for one in gguf.GGUFReader(path).tensors if one.name == "output.weight")
    expected = gguf.quantize(model.lm_head.weight.numpy(force=True), Kind[wanted])
    assert head.data.tobytes() == expected.tobytes()
    write(FIXTURES["qwen3-moe"], tmp_path / "narrow")     # experts 40 wide
    path = export(tmp_path / "narrow", tmp_path / "out2", "Q8_0")
    found = {one.name: one.tensor_type for one in gguf.GGUFReader(path).tensors}
    assert found["blk.0.ffn_down_exps.weight"] == Kind.F16 and found["blk.0.ffn_up_exps.weight"] == Kind.Q8_0


def test_a_byte_that_turned_is_noticed(tmp_path, monkeypatch):
    write(MODELS["llama"], tmp_path / "hf")
    plan = convert.plan(open_source(tmp_path / "hf"), "gguf", None, "Q8_0")
    compare = convert._compare

    def turned(move, conversion, places, ring):
        path = next(iter(places.values())).file
        data = bytearray(path.read_bytes())
        data[-40] ^= 1
        path.write_bytes(data)
        monkeypatch.setattr(convert, "_compare", compare)
        compare(move, conversion, places, ring)

    monkeypatch.setattr(convert, "_compare", turned)
    with pytest.warns(UserWarning, match="without a tokenizer"), pytest.raises(
            CheckpointError, match="what was written is not what"):
        convert.convert(plan, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, words", [
    ("falcon-7b", "a falcon model is not written as GGUF; those are llama, mistral"),
    ("yuan2-2b", "a yuan model is not written as GGUF"), ("falcon-h1-0.5b", "a falcon_h1 model is not written as GGUF"),
    ("nemotron-3-super", "a nemotron_h model is not written as GGUF"),
    ("qwen2-moe-sliding", "a GGUF cannot say what the model is"),
    ("llama-dynamic", "a GGUF cannot say what the model is"),
    ("llama-3.1", "a GGUF cannot say what the model is: .*divisors other than Llama 3.1's"),    # original context 16
    ("gemma3-27b", r"mixer.scale is 0.277\d+, and would be read as None"),
    ("phi-qk-norm", r"(?s)12 parameters that this family has no name for:.*layers.0.mixer.q_norm.gain"),
])
def test_what_a_gguf_cannot_say(name, words, tmp_path):
    write(FIXTURES[name], tmp_path / "hf")
    with pytest.raises(ConfigError, match=words) as caught:
        convert.plan(open_source(tmp_path / "hf"), "gguf")
    assert str(tmp_path / "hf") in str(caught.value)


# ---- tokenizers

def round_trip(ours, rows=None):
    """Through the keys of a GGUF, as a tokenizer again."""
    keys = gguf_tokens_export.keys_of(ours, rows or ours.vocab_size)
    path = Path(tempfile.mkdtemp()) / "x.gguf"
    w = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        {bool: w.add_bool, int: w.add_uint32, str: w.add_string, list: w.add_array}[type(value)](key, value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()
    return keys, gguf_tokens.load(path)


def same(a, b):
    for text in TEXTS:
        ids = a.encode(text, special=True)
        assert ids == b.encode(text, special=True) and a.encode(text) == b.encode(text), text
        assert a.decode(ids) == b.decode(ids)
    assert (a.bos_id, a.eos_id, a.stop_ids, a.prefix) == (b.bos_id, b.eos_id, b.stop_ids, b.prefix)
    assert a.special_tokens == b.special_tokens


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "smollm", "deepseek-v3", "gpt-4o"])
def test_byte_level_there_and_back(pre, tmp_path):
    ours = gguf_tokens.load(small(tmp_path / "x.gguf", pre, add_bos_token=True))
    keys, again = round_trip(ours, rows=ours.vocab_size + 3)
    assert PRE[keys["tokenizer.ggml.pre"]] == PRE[pre] and keys["tokenizer.ggml.tokens"][-1].startswith("[PAD")
    same(ours, again)


@pytest.mark.parametrize("name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def test_sentencepiece_there_and_back(name, tmp_path):
    """From a tokenizer.model, whose scores are written; and from a tokenizer.json, of whose merges scores are made."""
    (tmp_path / "sp").mkdir()
    (tmp_path / "sp" / "tokenizer.model").write_bytes((DATA / name).read_bytes())
    same(tokenizers.load(tmp_path / "sp"), round_trip(tokenizers.load(tmp_path / "sp"))[1])
    fast = gguf_tokens.load(sentencepiece_gguf(tmp_path / "x.gguf", SentencePieceProcessor(str(DATA / name))))
    same(fast, round_trip(fast)[1])


def test_tokenizers_that_a_gguf_cannot_say(tmp_path):
    ours = gguf_tokens.load(small(tmp_path / "x.gguf"))
    with pytest.warns(UserWarning, match=r"the model has \d+ rows and none for them: '<note>'"):
        keys = gguf_tokens_export.keys_of(ours, ours.vocab_size - 1)
    assert len(keys["tokenizer.ggml.tokens"]) == ours.vocab_size - 1
    ours.backend.backend.add_special_tokens([AddedToken("<|wide|>", rstrip=True, special=True)])
    with pytest.warns(UserWarning, match=r"a GGUF cannot say lstrip, rstrip and single_word of <\|wide\|>"):
        gguf_tokens_export.keys_of(ours, 1000)
    ours = gguf_tokens.load(tmp_path / "x.gguf")
    ours.backend.backend.pre_tokenizer = None
    with pytest.raises(TokenizerError, match="llama.cpp has no pre-tokenizer that cuts text as this one does"):
        gguf_tokens_export.keys_of(ours, 1000)


def test_the_command(tmp_path):
    write(FIXTURES["llama-3"], tmp_path / "hf")
    command = [sys.executable, "-m", "checkpoints.convert", str(tmp_path / "hf")]
    for more, words in ((["out.gguf", "--to", "gguf"], "expected a folder, in which model.gguf is written"),
                        (["out", "--dtype", "q8_0"], "--dtype q8_0 goes with --to gguf")):
        found = subprocess.run([*command, *more], capture_output=True, text=True, cwd=tmp_path.parent)
        assert found.returncode and words in found.stderr
