"""Layers, tokens and context that a model gets before it is tuned: growing.py, against transformers."""

import argparse
import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import checkpoints
from nanollm.config import MLP, Attention, DynamicNTK, Layer, Linear, ModelConfig, Rope, Yarn
from nanollm.errors import InputError
from nanollm.model import Decoder
from nanollm.text.tokenizer import load
from nanollm.training import growing
from tests import oracles
from tests.fixtures import FIXTURES, ONCE, slow_but
from tests.tok_folders import byte_bpe, write

NOTHING = dict(init=Path("model"), tokenizer=None, out=Path("run"), seed=0, expand=None, expand_all=False,
               grow_vocab=None, grow_from=None, add_tokens=None, rope_scaling=None, rope_factor=None)
BLOCK = Layer(Attention(4, 2, 8, Rope()), MLP(48))


def asked(**more) -> argparse.Namespace:
    return argparse.Namespace(**NOTHING | more)


def small(layers: int = 6, **more) -> Decoder:
    return Decoder(ModelConfig(61, 32, (BLOCK,) * layers, context=64, **more), seed=1).eval()


@torch.inference_mode()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    found = model(ids)
    return found if isinstance(found, torch.Tensor) else found.logits


def saved(model: Decoder, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("error")                      # it is written as its family, and nothing stays behind
        checkpoints.save(model, folder)
    return folder


def theirs(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager").eval()


def fixture(name: str, folder: Path) -> Decoder:
    oracles.write(FIXTURES[name], folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return checkpoints.load(folder)


# ---- LLaMA-Pro

@pytest.mark.parametrize("name", slow_but(ONCE, FIXTURES))
def test_new_layers_change_no_logit_of_any_family_by_a_bit(name, tmp_path):
    model = fixture(name, tmp_path / "model")
    ids = oracles.tokens(FIXTURES[name])
    grown = growing.grow(model, asked(expand=len(model.layers)))
    assert len(grown.layers) == 2 * len(model.layers)
    assert torch.equal(logits(grown, ids), logits(model, ids))
    # and each of them can learn: something in it has a gradient
    grown.requires_grad_(True)
    grown(ids).square().mean().backward()
    for number in growing.new_layers(len(grown.layers), len(model.layers)):
        assert max(p.grad.abs().max() for p in grown.layers[number].parameters() if p.grad is not None) > 0, number


def published_groups(layers: int, expand: int) -> list[tuple[int, bool]]:
    """The loop of LLaMA-Pro's block_expansion.py (TencentARC): which layer stands where, and whether it is new."""
    split, output = layers // expand, []
    for i in range(layers):
        output.append((i, False))
        if (i + 1) % split == 0:
            output.append((i, True))
    return output


@pytest.mark.parametrize(("layers", "expand"), [(6, 2), (6, 3), (6, 6), (6, 1), (8, 4)])
def test_new_layers_stand_where_llama_pro_puts_them(layers, expand):
    model = small(layers)
    grown = growing.grow(model, asked(expand=expand))
    expected = published_groups(layers, expand)
    assert [place for place, (_, new) in enumerate(expected) if new] == growing.new_layers(layers + expand, expand)
    for place, (number, new) in enumerate(expected):
        old = dict(model.layers[number].named_parameters())
        for name, value in grown.layers[place].named_parameters():
            zero = new and name in ("mixer.o.weight", "ffn.down.weight")
            assert torch.equal(value, torch.zeros_like(value) if zero else old[name]), (place, name)
            assert not new or value.data_ptr() != old[name].data_ptr()


def test_layers_that_do_not_come_out_even_are_spread_and_too_many_are_refused():
    assert growing.new_layers(7 + 3, 3) == [2, 5, 9]        # copies of layers 1, 3 and 6
    with pytest.raises(InputError, match="--expand 7: the model has 6 layers"):
        growing.grow(small(), asked(expand=7))


def test_a_pattern_of_layers_keeps_its_kinds():
    slides = dataclasses.replace(BLOCK, mixer=dataclasses.replace(BLOCK.mixer, window=5))
    model = Decoder(ModelConfig(61, 32, (slides, BLOCK, slides, BLOCK), context=64), seed=1).eval()
    grown = growing.grow(model, asked(expand=2))
    assert grown.config.layers == (slides, BLOCK, BLOCK, slides, BLOCK, BLOCK)


DEEPER = ["llama-3.1", "gemma2-27b", "qwen3-0.6b", "falcon-40b", "mixtral-8x22b", "mamba-130m", "phi-qk-norm",
          "gpt2-unscaled"]


@pytest.mark.parametrize("name", slow_but(DEEPER[:4], DEEPER))
def test_transformers_loads_the_deeper_folder_with_equal_logits(name, tmp_path):
    model = fixture(name, tmp_path / "model")
    grown = growing.grow(model, asked(expand=1))
    folder = saved(grown, tmp_path / "deeper")
    assert transformers.AutoConfig.from_pretrained(folder).num_hidden_layers == len(model.layers) + 1
    ids = oracles.tokens(FIXTURES[name])
    assert oracles.difference(logits(grown, ids), logits(theirs(folder), ids)) <= FIXTURES[name].bound
    assert torch.equal(logits(checkpoints.load(folder), ids), logits(model, ids))


def test_a_folder_that_counts_its_layers_under_an_older_key_stays_one_of_its_family(tmp_path):
    grown = growing.grow(fixture("falcon-7b", tmp_path / "model"), asked(expand=1))
    values = json.loads((saved(grown, tmp_path / "deeper") / "config.json").read_text())
    assert values["n_layer"] == 4 and "num_hidden_layers" not in values


def test_a_plan_is_of_the_grown_model():
    model = small()
    options = asked(expand=2, rope_scaling="yarn", rope_factor=4.0)
    assert growing.planned(model.config, options) == growing.grow(model, options).config != model.config
    assert growing.planned(model.config, asked()) is model.config


# ---- tokens

@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """A tokenizer of 450 tokens and two special ones."""
    folder = tmp_path_factory.mktemp("words")
    byte_bpe(("<s>", "</s>")).save(str(folder / "tokenizer.json"))
    return write(folder, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
                                           "eos_token": "</s>"})


def with_words(words: Path, folder: Path, fixture: str, vocab: int) -> Decoder:
    """A model of so many rows, as transformers writes it, with that tokenizer beside it."""
    oracles.write(dataclasses.replace(FIXTURES[fixture], keys=FIXTURES[fixture].keys | {"vocab_size": vocab}), folder)
    for path in words.iterdir():
        shutil.copyfile(path, folder / path.name)
    return checkpoints.load(folder)


@pytest.mark.parametrize("name", ["llama-3.1", "qwen3-0.6b", "phi-1"])      # a head of its own; a tied one; a bias
def test_mean_rows_are_those_of_transformers(name, words, tmp_path):
    """transformers draws around the mean, with 1e-9 times the covariance of the rows."""
    vocab, more = load(words).vocab_size - 3, 3
    model = with_words(words, tmp_path / "model", name, vocab)
    grown = growing.grow(model, asked(init=tmp_path / "model", grow_vocab="mean"))
    assert grown.config == dataclasses.replace(model.config, vocab=vocab + more)
    assert (grown.head.weight is grown.embed.weight) == model.config.tied
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    other.resize_token_embeddings(vocab + more, mean_resizing=True)
    pairs = [(grown.embed.weight, other.get_input_embeddings().weight),
             (grown.head.weight, other.get_output_embeddings().weight)]
    if model.config.head_bias:
        pairs.append((grown.head.bias, other.get_output_embeddings().bias))
    for ours, reference in pairs:
        assert torch.equal(ours[:vocab], reference[:vocab])
        # six standard deviations of what transformers draws
        assert (ours[vocab:] - reference[vocab:]).abs().max() <= 6 * (1e-9 ** 0.5) * reference[:vocab].std(0).max()
        assert ours[vocab:].abs().max() > 0
    ids = torch.randint(0, vocab, (2, 20))
    assert torch.equal(logits(grown, ids)[..., :vocab], logits(model, ids))
    # Hewitt's bound: an old token keeps V/(V + n) of its probability at the least
    before, after = (logits(one, ids).double().softmax(-1)[..., :vocab] for one in (model, grown))
    assert (after >= before * vocab / (vocab + more) * (1 - 1e-6)).all()

    folder = saved(grown, tmp_path / "grown")
    ids = torch.randint(0, vocab + more, (2, 20))
    assert oracles.difference(logits(checkpoints.load(folder), ids), logits(theirs(folder), ids)) < 1e-5


def test_where_nothing_grows_it_is_said(words, tmp_path):
    model = with_words(words, tmp_path / "model", "llama-3.1", load(words).vocab_size + 5)
    with pytest.warns(UserWarning, match="--grow-vocab: nothing grows"):
        assert growing.grow(model, asked(init=tmp_path / "model", grow_vocab="mean")).config == model.config


@pytest.mark.parametrize("how", ["zero", "normal"])
def test_other_rows(how, words, tmp_path):
    vocab = load(words).vocab_size - 200
    model = with_words(words, tmp_path / "model", "llama-3.1", vocab)
    options = asked(init=tmp_path / "model", grow_vocab=how)
    grown, again = growing.grow(model, options), growing.grow(model, options)
    for one, same, old in ((grown.embed, again.embed, model.embed), (grown.head, again.head, model.head)):
        assert torch.equal(one.weight, same.weight) and torch.equal(one.weight[:vocab], old.weight)
        assert one.weight[vocab:].std() == pytest.approx(0.02 if how == "normal" else 0, rel=0.05)
    assert how == "zero" or not torch.equal(grown.embed.weight[vocab:], grown.head.weight[vocab:])


def test_new_rows_may_be_the_mean_of_a_text(words, tmp_path):
    model = with_words(words, tmp_path / "model", "llama-3.1", 450)
    grown = growing.grow(model, asked(init=tmp_path / "model", grow_vocab="mean", grow_from="hello world"))
    reference = transformers.AutoTokenizer.from_pretrained(words)("hello world", add_special_tokens=False)["input_ids"]
    assert len(reference) > 1
    for ours, old in ((grown.embed.weight, model.embed.weight), (grown.head.weight, model.head.weight)):
        assert torch.allclose(ours[450:], old[reference].mean(0).expand(2, -1), atol=1e-6)
    with pytest.raises(InputError, match="--grow-from '': its tokens are .*expected one or more below 450"):
        growing.grow(model, asked(init=tmp_path / "model", grow_vocab="mean", grow_from=""))


def test_a_padded_vocabulary_has_rows_already(words, tmp_path):
    model = with_words(words, tmp_path / "model", "llama-3.1", 480)
    options = asked(init=tmp_path / "model", add_tokens=["<|im_start|>", "<|im_end|>"], out=tmp_path)
    assert growing.grow(model, options) is model
    assert load(tmp_path / "vocabulary").special_tokens["<|im_end|>"] == 453
    assert growing.grow(model, asked()) is model


# ---- context

@pytest.mark.parametrize("name", ["llama-2", "qwen3-0.6b", "pythia"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_transformers_loads_the_longer_model_with_equal_logits(name, kind, tmp_path):
    fixture = dataclasses.replace(FIXTURES[name], keys=FIXTURES[name].keys | {"max_position_embeddings": 16})
    oracles.write(fixture, tmp_path / "model")
    model = checkpoints.load(tmp_path / "model")
    grown = growing.grow(model, asked(rope_scaling=kind, rope_factor=4.0))
    rope = next(layer.mixer.rope for layer in grown.config.layers)
    assert rope.scaling == {"linear": Linear(4.0), "dynamic": DynamicNTK(4.0, 16), "yarn": Yarn(4.0, 16)}[kind]
    assert (grown.config.context, growing.reach(grown.config)) == (16 if kind == "dynamic" else 64, 64)
    folder = saved(grown, tmp_path / "longer")
    values, ids = json.loads((folder / "config.json").read_text()), oracles.tokens(fixture)
    written = values["rope_parameters"]
    assert written["rope_type"] == kind and written["factor"] == 4
    assert values["max_position_embeddings"] == grown.config.context
    reference = logits(theirs(folder), ids)                  # 48 tokens, three times the old context
    assert oracles.difference(logits(grown, ids), reference) <= 1e-5
    assert oracles.difference(logits(model, ids), reference) > 1e-2
    assert torch.equal(logits(checkpoints.load(folder), ids), logits(grown, ids))


@pytest.mark.parametrize(("name", "message"), [
    ("llama-3.1", "is scaled already, Llama3"), ("gemma3-27b", "have 2 different RoPEs"),
    ("gpt2-unscaled", "no layer has RoPE"),
])
def test_what_has_no_plain_rope_is_refused(name, message, tmp_path):
    with pytest.raises(InputError, match=message):
        growing.grow(fixture(name, tmp_path / "model"), asked(rope_scaling="linear", rope_factor=2.0))


@pytest.mark.parametrize(("more", "message"), [
    (dict(init=None, expand=2), "--expand grows a model that exists"),
    (dict(init=None, add_tokens=["<a>"]), "--add-tokens grows a model that exists"),
    (dict(expand_all=True), "--expand-all says"),
    (dict(grow_from="hello"), "--grow-from says"),
    (dict(grow_from="hello", grow_vocab="zero"), "--grow-from asks for a mean, --grow-vocab for zero"),
    (dict(rope_scaling="yarn"), "go together"), (dict(rope_factor=2.0), "go together"),
    (dict(rope_scaling="yarn", rope_factor=1.0), "--rope-factor 1: expected more than 1"),
])
def test_options_that_do_not_go_together(more, message):
    with pytest.raises(InputError, match=message):
        growing.check(asked(**more))
