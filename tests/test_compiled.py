"""Compiled decoding gives what the model gives: every mixer as it is traced, some layers as they are compiled."""

import copy
import shutil
import warnings

import pytest
import torch
import torch._inductor.config

from nanollm.cache import Cache
from nanollm.config import MLP, Attention, Layer, Mamba, ModelConfig, MoE, Norm, Rope
from nanollm.errors import InputError
from nanollm.inference import compiled
from nanollm.inference.compiled import LEAST_PROMPT, compile_decoding
from nanollm.inference.generation import generate
from nanollm.inference.prepare import linears, prepare, side_by_side, widen
from nanollm.inference.quantize import quantize
from nanollm.inference.rows import RowCache
from nanollm.model import Decoder
from tests.oracles import difference, make_loud
from tests.test_consistency import KINDS, tokens

# which cannot be traced, by the name in KINDS, and how many kinds of layers in each: two experts that have a row each,
# layers that read what others chose
UNTRACED = {"chunked": 1, "sparse latent": 3, "shared": 3, "keys of a layer before": 6}
COMPILER = shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")


def decoder(layers: tuple[Layer, ...], vocab: int = 50, dim: int = 32, **more) -> Decoder:
    model = Decoder(ModelConfig(vocab=vocab, dim=dim, layers=layers, **more)).eval().requires_grad_(False)
    make_loud(model)
    return model


@torch.inference_mode()
def stepwise(model: Decoder, length: int, room: int) -> torch.Tensor:
    """Logits of the tokens behind the fifth, fed one by one."""
    x, cache = tokens(1, length), Cache(model.config, 1, room, model.embed.weight.dtype)
    model(x[:, :5], cache=cache)
    return torch.cat([model(x[:, n : n + 1], cache=cache)[:, -1] for n in range(5, length)])


@pytest.fixture
def uncompiled(monkeypatch):
    """Traces are run as they are, operation by operation."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)


@pytest.fixture
def no_cache():
    """What torch has kept of an earlier run is not taken: a first compilation can fail where a second one would not."""
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_traced_is_the_layer(uncompiled, kind):
    model = decoder(KINDS[kind], final_norm=Norm())
    expected = stepwise(model, 20, 24)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ready = compile_decoding(model)
    assert len([one for one in caught if "not compiled" in str(one.message)]) == UNTRACED.get(kind, 0)
    assert difference(stepwise(ready, 20, 24), expected) < 1e-5
    # in a cache with more room, and in one whose rings are full, the same programs run
    made = len(ready.layers[0].programs)
    assert difference(stepwise(ready, 20, 100), expected) < 1e-5
    assert difference(stepwise(ready, 20, 20), expected) < 1e-5
    assert len(ready.layers[0].programs) == made


# kinds whose prompts are traced: those with keys in no ring, and a plain MLP
PROMPTS = {"full", "window", "dynamic", "longrope", "alibi", "coarse alibi", "norms of heads", "log steps", "log n",
           "latent dynamic", "sinks", "delta", "narrow values"}


@torch.inference_mode()
def prompted(model: Decoder, length: int, room: int) -> torch.Tensor:
    """Logits of a prompt, and of two tokens behind it."""
    x, cache = tokens(1, length + 2), Cache(model.config, 1, room, model.embed.weight.dtype)
    parts = x[:, :length], x[:, length : length + 1], x[:, length + 1 :]
    return torch.cat([model(part, cache=cache) for part in parts], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_has_a_program_too(uncompiled, kind):
    model = decoder(KINDS[kind], final_norm=Norm())
    expected = {n: prompted(model, n, n + 3) for n in (LEAST_PROMPT, LEAST_PROMPT + 37)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ready = compile_decoding(model)
    made = len([program for (key, *_), program in ready.layers[0].programs.items() if key[3] and program])
    assert (made > 0) == (kind in PROMPTS)
    for n, logits in expected.items():
        assert difference(prompted(ready, n, n + 3), logits) < 1e-5


def test_a_model_with_fewer_positions_than_such_a_prompt_is_compiled(uncompiled):
    layer = Layer(Attention(4, 4, 8, None), MLP(48))
    model = decoder((layer,) * 2, positions=40)
    expected = stepwise(model, 20, 24)
    assert difference(stepwise(compile_decoding(model), 20, 24), expected) < 1e-5


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_layers_are_traced_too(uncompiled, bits):
    mixer = Attention(4, 2, 16, Rope())
    layers = Layer(mixer, MLP(128)), Layer(mixer, MLP(128)), Layer(mixer, MoE(4, 2, MLP(64), True))
    model = quantize(decoder(layers, dim=64).bfloat16(), bits)
    as_it_is = prepare(copy.deepcopy(model), head_bits=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ready = compile_decoding(model, head_bits=8)
    assert difference(stepwise(ready, 12, 16).float(), stepwise(as_it_is, 12, 16).float()) < 0.03


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled(no_cache, dtype):
    layers = (
        Layer(Attention(4, 2, 16, Rope(), qkv_bias=True, qk_norm=Norm()), MLP(96)),
        Layer(Attention(4, 2, 16, Rope(), window=6), MoE(8, 2, MLP(48), True)),
        Layer(Mamba(64, 4, 4, 3), None, pre_ffn=None),
        Layer(Attention(4, 2, 16, Rope(), qkv_bias=True, qk_norm=Norm()), MLP(96)),
    )
    if dtype == torch.bfloat16:
        layers = layers[:2]
    model = decoder(layers, dim=64, head_bias=True, head_softcap=30.0).to(dtype)
    exact = stepwise(copy.deepcopy(model).double(), 20, 24)
    before = difference(stepwise(model, 20, 24).double(), exact)
    ready = compile_decoding(copy.deepcopy(model))
    programs = ready.layers[0].programs
    assert len(programs) == len(set(layers)) + 1 and all(programs.values())     # one of them a prompt's
    for room in (24, 40):
        assert difference(stepwise(ready, 20, room).double(), exact) < max(2 * before, 2e-6)
    exact, as_it_was = (prompted(one, 150, 160).double() for one in (copy.deepcopy(model).double(), model))
    assert difference(prompted(ready, 150, 160).double(), exact) < max(2 * difference(as_it_was, exact), 2e-6)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_compiled_quantised(no_cache, bits):
    model = quantize(decoder((Layer(Attention(4, 2, 16, Rope()), MLP(128)),) * 2, dim=64).bfloat16(), bits)
    expected = stepwise(copy.deepcopy(model), 12, 16)
    ready = compile_decoding(model)
    assert all(ready.layers[0].programs.values())
    assert difference(stepwise(ready, 12, 16).float(), expected.float()) < 0.03


def test_without_a_compiler_the_model_runs_as_it_is(monkeypatch):
    def missing(graph, inputs, options):
        raise RuntimeError("No working C++ compiler found\nin any place")

    monkeypatch.setattr(torch._inductor, "compile", missing)
    model = decoder((Layer(Attention(4, 2, 8, Rope()), MLP(48)),) * 2)
    expected = list(generate(model, [1, 2, 3], 8))
    with pytest.warns(UserWarning, match="compiled: No working C\\+\\+ compiler found$") as caught:
        compile_decoding(model)
    assert sorted(str(one.message).split(" not ")[0] for one in caught) == [
        "layers with Attention and MLP are", "the head is"]
    assert list(generate(model, [1, 2, 3], 8)) == expected


@pytest.mark.parametrize("kind", ["full", "windows", "alibi", "norms of heads", "mamba-2", "side by side"])
def test_several_rows_have_a_program_of_their_own(uncompiled, kind):
    """Three rows of different lengths, one of them idle now and then; past the window."""
    def run() -> torch.Tensor:
        rows = RowCache(model, 3, 40)
        for row, length in enumerate((9, 4, 13)):
            rows.read(row, [(5 * at + row) % 50 for at in range(length)])
        return torch.cat([rows.read_together(0, [[t], [t + 1], [t + 2] if t % 3 else []]) for t in range(12)])

    model = decoder(KINDS[kind], final_norm=Norm())
    expected = run()
    ready = compile_decoding(model, rows=(1, 3))
    assert {n for _, _, n, _ in ready.layers[0].ready} == {1, 3} and difference(run(), expected) < 1e-5


def test_a_model_is_compiled_once(uncompiled):
    model = compile_decoding(decoder((Layer(Attention(4, 2, 8, Rope()), MLP(48)),)))
    with pytest.raises(InputError, match="compiled already"):
        compile_decoding(model)


def test_gradients_and_batches_run_as_before(uncompiled):
    """Bit for bit as the model whose products stand side by side, which on some processors round otherwise."""
    mixer = Attention(4, 2, 8, Rope())
    model = decoder((Layer(mixer, MLP(48)), Layer(mixer, MoE(4, 2, MLP(20), True))))
    wide = copy.deepcopy(model)
    for owner in side_by_side(wide):
        for name, linear in linears(owner):
            widen(owner, name, linear)
    expected = wide(tokens(2))
    assert difference(expected, model(tokens(2))) < 1e-6
    assert torch.equal(compile_decoding(model)(tokens(2)), expected)


def test_products_of_one_row_are_torchs():
    draw = torch.Generator().manual_seed(0)
    for outputs in (12, 7):                      # in four streams, and in one
        x, weight, bias = (torch.randn(*shape, generator=draw) for shape in ((1, 9), (outputs, 9), (outputs,)))
        assert difference(compiled.row_product(x, weight.t()), x @ weight.t()) < 1e-6
        codes, scales = torch.randint(-127, 128, (outputs, 9), generator=draw).to(torch.int8), weight[:, 0].abs()
        assert difference(compiled.row_product8(x, codes, scales), x @ (codes * scales[:, None]).t()) < 1e-6
        assert difference(compiled.row_product_plus(bias, x, weight.t()), torch.addmm(bias, x, weight.t())) < 1e-6
    q, k, v = (torch.randn(1, 2, n, 8, generator=draw) for n in (3, 11, 11))
    mask = torch.randn(1, 1, 1, 11, generator=draw)
    for given in (None, mask):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=given, scale=0.3)
        assert difference(compiled.attend_one(q, k, v, attn_mask=given, scale=0.3)[0], expected) < 1e-6
