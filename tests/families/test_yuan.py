"""Yuan 2.0: its keys, the order of its rows, what a document is to its filters, and export without the config that it
had."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import checkpoints
from checkpoints.families import read_config, write_config
from checkpoints.families.yuan import YUAN, Pairs
from nanollm.cache import Cache
from nanollm.config import MLP, Attention, FilteredAttention, Layer, ModelConfig, Norm, Rope
from nanollm.errors import ConfigError
from nanollm.model import Decoder
from nanollm.training.flops import flops_per_token
from tests.arranged import fill, stored_tensors
from tests.fixtures.yuan import FIXTURES
from tests.oracles import difference, make_loud, write

SIZES = dict(
    model_type="yuan", vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
    num_attention_heads=6, rms_norm_eps=1e-5,
)
MIXER = FilteredAttention(Attention(6, 6, 8, Rope()), 24, Norm(eps=1e-6))


def read(**keys) -> ModelConfig:
    return read_config(SIZES | keys)[1]


def test_keys():
    norm = Norm(eps=1e-5)
    assert read() == ModelConfig(97, 48, (Layer(MIXER, MLP(80), norm, None, norm),) * 2, norm, tied=True, context=8192)
    flags = dict(
        reset_attention_mask=True, reset_position_ids=True, eod_token=77185, use_shareqk=False, causal_mask=True,
        use_flash_attention=True,
    )
    assert (
        read(**flags) == read()
        and read(max_position_embeddings=4096).context == read(model_max_length=4096).context == 4096
    )


@pytest.mark.parametrize(
    "keys, complaint",
    [
        (dict(use_shareqk=True), "use_shareqk is True"), (dict(causal_mask=False), "causal_mask is False"),
        (dict(reset_attention_mask="yes"), "reset_attention_mask is 'yes'; expected False or True"),
        (
            dict(num_attention_heads=16), "num_attention_heads is 16; expected an even number of times",
        ),  # 3 channels a head
        (dict(num_attention_heads=5), "num_attention_heads is 5; expected an even number of times in hidden_size"),
        (dict(rope_theta=1e6), "nothing here knows .* rope_theta"),
        (
            dict(attention_projection_size=64, moe_config={"moe_num_experts": 32}),
            "nothing here knows .* attention_projection_size",
        ),  # Yuan2-M32
    ],
)
def test_refusals(keys, complaint):
    with pytest.raises(ConfigError, match=complaint):
        read(**keys)


def test_what_is_written_reads_back():
    config = read(tie_word_embeddings=False)
    assert read_config(write_config(config, YUAN)[1])[1] == config
    other = dataclasses.replace(config.layers[0], mixer=dataclasses.replace(MIXER, hidden=16))
    with pytest.raises(ConfigError, match="hidden is 16, and would be read as 24"):
        write_config(dataclasses.replace(config, layers=(other,) * 2), YUAN)


@pytest.mark.parametrize("heads", [1, 2, 3, 6])
def test_pairs_are_inverses(heads):
    layer = Layer(FilteredAttention(Attention(heads, heads, 4), 8), MLP(4))
    ours = [torch.randn(4 * heads, 5), torch.randn(4 * heads, 5)]
    stored = stored_tensors(Pairs, ours, layer)
    again = [torch.full_like(tensor, torch.nan) for tensor in ours]
    fill(Pairs, stored, again, layer)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    assert Pairs.shapes(ours, layer) == [tuple(one.shape) for one in stored]
    rows = torch.cat(stored).unflatten(0, (heads, 2, 4))                                    # the drawing in yuan.py
    assert torch.equal(rows[:, 0].flatten(0, 1), ours[0]) and torch.equal(rows[:, 1].flatten(0, 1), ours[1])


def test_a_folder_with_its_config_written_anew(tmp_path):
    write(FIXTURES["yuan2-2b"], tmp_path / "in")
    model = checkpoints.load(tmp_path / "in")
    family = model.origin.family
    values = write_config(model.config, family)[1]
    model.origin = dataclasses.replace(model.origin, values=values, names=family.tables(model.config)[0])
    checkpoints.save(model, tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert checkpoints.load(tmp_path / "out").config == model.config


@pytest.fixture
def decoder() -> Decoder:
    model = (
        Decoder(ModelConfig(50, 32, (Layer(FilteredAttention(Attention(4, 4, 8, Rope()), 16), MLP(48)),) * 2))
        .eval()
        .requires_grad_(False)
    )
    make_loud(model)
    return model


def test_a_chunk_with_padding_before_it_goes_on_where_its_row_stopped(decoder):
    """The filters look back past padding to what the cache remembers."""
    x, cache = torch.randint(0, 50, (2, 12)), Cache(decoder.config, 2, 12)
    whole = decoder(x)
    decoder(x[:, :6], cache=cache)
    places = torch.tensor([[6, 7, 8, 9], [-1, -1, 6, 7]])
    logits = decoder(torch.stack([x[0, 6:10], torch.cat([x[1, :2], x[1, 6:8]])]), places, cache)
    assert difference(logits[0], whole[0, 6:10]) < 1e-5 and difference(logits[1, 2:], whole[1, 6:8]) < 1e-5
    last = decoder(torch.stack([x[0, 10:11], x[1, 8:9]]), torch.tensor([[10], [8]]), cache)
    assert difference(last[0], whole[0, 10:11]) < 1e-5 and difference(last[1], whole[1, 8:9]) < 1e-5


def test_flops_are_those_that_torch_counts(decoder):
    decoder.requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decoder(torch.zeros(1, 24, dtype=torch.long)).sum().backward()
    assert flops_per_token(decoder.config, 24) == counter.get_total_flops() / 24


def test_positions_part_documents_for_the_filters_too(decoder):
    """What the family's docstring says of <eod>: with positions two documents are two, filters included."""
    x, places = torch.randint(0, 50, (1, 20)), torch.cat([torch.arange(8), torch.arange(12)])[None]
    assert difference(decoder(x, places)[:, 8:], decoder(x[:, 8:])) < 1e-5
    assert difference(decoder(x)[:, 8:], decoder(x[:, 8:])) > 1e-2
