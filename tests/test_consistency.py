"""One meaning, however it is fed: whole, in chunks, token by token, in a ragged batch, packed with other documents.

The reference here is our own full forward pass of the prefix; that it is right is test_parity's business.
"""

import functools
import itertools

import pytest
import torch

from nanollm.cache import Cache
from nanollm.config import (
    MLP,
    RGLRU,
    RWKV,
    XIELU,
    Alibi,
    Attention,
    ChunkedAttention,
    ClippedGLU,
    CrossLayerAttention,
    DynamicNTK,
    ExpertGroups,
    FilteredAttention,
    GatedAttention,
    GatedDeltaNet,
    Hyena,
    Indexer,
    InputWeightedMoE,
    LatentAttention,
    LatentExpert,
    Layer,
    LayerEnd,
    LogLength,
    LogSteps,
    LogTokenSteps,
    LongRope,
    Mamba,
    Mamba2,
    ModelConfig,
    MoE,
    MultiHeadMamba,
    NarrowValueAttention,
    Norm,
    NormedMoE,
    NormedValueAttention,
    ParallelMixer,
    PerLayerInput,
    Proportional,
    Rope,
    ScaledMLP,
    SharedBlock,
    SharedBlockScan,
    ShortConv,
    SparseLatentAttention,
    SteppedNTK,
)
from nanollm.errors import InputError
from nanollm.layers.scan import selective_scan, selective_scan_chunked
from nanollm.layers.state import KVCache
from nanollm.model import Decoder
from tests.oracles import difference, make_loud

T = 40
LONG = LongRope((1.0, 1.5, 2.0, 2.5), (3.0, 4.0, 5.0, 6.0), original=16, attention_factor=1.2)


def attention(**fields) -> Attention:
    return Attention(4, 2, 8, **{"rope": Rope(), **fields})


def shared(number: int, **fields) -> SharedBlock:
    return SharedBlock(number, Attention(4, 2, 16, scale=0.1, **fields), MLP(24, "gelu"), Norm())  # a calm softmax


KINDS = {
    "full": (Layer(attention(), MLP(48)),) * 2,
    "window": (Layer(attention(window=7), MLP(48)), Layer(attention(), MLP(48))),
    "windows": (Layer(attention(window=7), MLP(48)), Layer(attention(window=3), MLP(48))),
    "dynamic": (Layer(attention(rope=Rope(scaling=DynamicNTK(2.0, 16))), MLP(48)),) * 2,
    "longrope": (Layer(attention(rope=Rope(scaling=LONG)), MLP(48)),) * 2,
    "alibi": (
        Layer(attention(rope=None, alibi=Alibi()), MLP(48)),
        Layer(attention(rope=None, alibi=Alibi(), window=5), MLP(48)),
    ),
    "coarse alibi": (
        Layer(attention(rope=None, alibi=Alibi(coarse=True)), MLP(48)),
        Layer(Attention(6, 2, 8, alibi=Alibi()), MLP(48)),
    ),
    "norms of heads": (
        Layer(attention(qk_norm=Norm("layer", scope="each"), clip=1.0), MLP(48), parallel=True, pre_ffn=None),
        Layer(
            attention(qk_norm=Norm(scope="all"), sinks=True, window=5), MLP(48, gated=False, bias=True),
            post_mixer=Norm("rms_outer"),
        ),
    ),
    "xielu": (Layer(attention(), XIELU(48)),) * 2,
    "log steps": (Layer(attention(growth=LogSteps(8, 0.5)), MLP(48)),) * 2,
    "log n": (
        Layer(attention(growth=LogLength(8), rope=Rope(scaling=SteppedNTK(8))), MLP(48), Norm("layer", gain=False)),
    ) * 2,
    "softcap": (Layer(attention(softcap=2.0, qk_norm=Norm()), MoE(4, 2, MLP(20), True, MLP(12), True)),) * 2,
    "latent": (
        Layer(
            LatentAttention(4, 8, 4, 6, 12, 10, Rope(layout="interleaved")),
            MoE(
                8, 3, MLP(20), True, MLP(12), score="sigmoid", correction=True, groups=ExpertGroups(4, 2, 2), scale=2.5
            ),
        ),
        Layer(
            LatentAttention(4, 6, 8, 10, 12, None, Rope(rounds="result"), scale=0.2),
            MoE(4, 2, MLP(20), False, sparse=0.1),
        ),
    ),
    "latent dynamic": (
        Layer(LatentAttention(4, 8, 8, 6, 12, 10, Rope(scaling=DynamicNTK(2.0, 16))), MLP(48)),
        Layer(LatentAttention(4, 8, 8, 6, 12, None, Rope(scaling=DynamicNTK(2.0, 16), rounds="result")), MLP(48)),
    ),
    "chunked": (
        Layer(ChunkedAttention(4, 2, 8, Rope(), 7, Norm(gain=False)), InputWeightedMoE(4, 2, MLP(20), True, MLP(12))),
        Layer(Attention(4, 2, 8, growth=LogTokenSteps(5, 0.1)),
              InputWeightedMoE(4, 1, MLP(20), False, score="sigmoid")),
        Layer(ChunkedAttention(4, 1, 8, Rope(fraction=0.5), 16), MLP(48)),
    ),
    "narrow values": (
        Layer(NarrowValueAttention(attention(window=6, sinks=True), 5, 0.7), MLP(48)),
        Layer(NarrowValueAttention(attention(qkv_bias=True), 7), MLP(48)),
    ),
    "sparse latent": (
        Layer(SparseLatentAttention(4, 8, 4, 6, 12, 10, Rope(), indexer=Indexer(16, 10, 5)), MLP(48)),
        Layer(SparseLatentAttention(4, 8, 4, 6, 12, 10, Rope()), MLP(48)),
        Layer(SparseLatentAttention(4, 6, 8, 10, 12, 9, Rope(), indexer=Indexer(16, 8, 9, "interleaved")), MLP(48)),
    ),
    "sinks": (
        Layer(attention(sinks=True, window=6), MoE(4, 2, ClippedGLU(20, limit=0.5), True, router_bias=True)),
        Layer(attention(sinks=True), MLP(48)),
    ),
    "mamba": (Layer(Mamba(64, 4, 4, 3), None, pre_ffn=None),) * 2,
    "heads of mamba": (
        Layer(MultiHeadMamba(64, 4, 4, 3, heads=2), None, pre_ffn=None), Layer(MultiHeadMamba(36, 3, 3, 2, heads=3),
                                                                                MLP(48)),
    ),
    "mamba-2": (
        Layer(Mamba2(8, 8, 2, 6, 4, least_step=0.05, largest_step=0.5), None, pre_ffn=None),
        Layer(Mamba2(6, 8, 1, 5, 3), MLP(48)),
    ),
    "one branch": (
        Layer(None, MLP(48, "relu2", gated=False), None),
        Layer(Mamba2(6, 8, 2, 5, 3), None, pre_ffn=None), Layer(attention(rope=None), None, pre_ffn=None),
        Layer(None, MoE(4, 2, LatentExpert(12, MLP(20, "relu2", gated=False)), True, MLP(12, gated=False)), None),
        Layer(None, MoE(4, 2, MLP(20, "relu2", gated=False), True), None, post_ffn=Norm(), residual_scale=0.5),
    ),
    "rwkv": (Layer(RWKV(32, 48, Norm("layer", bias=True)), None, None, pre_ffn=None),) * 2,
    "griffin": (
        Layer(RGLRU(40, 4, 4), MLP(48)), Layer(attention(window=6), MLP(48)), Layer(RGLRU(32, 2, 2, "silu"), MLP(48)),
    ),
    "hyena": (
        Layer(Hyena(32, 4, 2, 3), MLP(48)), Layer(attention(window=6), MLP(48)),
        Layer(Hyena(24, 1, 3, 4), MLP(48), post_mixer=Norm("rms_outer")),
    ),
    "short convolution": (
        Layer(ShortConv(40, 3), MLP(48)), Layer(attention(window=6), MLP(48)),
        Layer(ShortConv(32, 4, bias=True), MLP(48)),
    ),
    "side by side": (
        Layer(ParallelMixer(attention(), Mamba2(6, 8, 2, 5, 3, eps=None, scales=(0.5, 1.5, 0.8, 1.2, 0.7)), keys=0.5),
              ScaledMLP(MLP(48), 0.5, 1.5)),
        Layer(ParallelMixer(attention(rope=None), Mamba2(4, 8, 1, 6, 4), 1.5, 0.5, 0.7, 2.0), MLP(48)),
    ),
    "shared": (
        Layer(SharedBlockScan(shared(0, rope=Rope()), Mamba2(6, 8, 2, 5, 3), Norm(), 3), None, None, pre_ffn=None),
        Layer(SharedBlockScan(shared(1), Mamba2(6, 8, 2, 5, 3), Norm(), qkv_rank=2), None, None, pre_ffn=None),
        Layer(SharedBlockScan(shared(0, rope=Rope()), MultiHeadMamba(48, 4, 3, 3, heads=2), Norm()), MLP(48), None),
    ),
    "keys of a layer before": tuple(
        Layer(mixer, MLP(48), end=LayerEnd(PerLayerInput(6), Norm())) for mixer in (
            NormedValueAttention(4, 2, 8, Rope(), 7, Norm(), kept=True),
            NormedValueAttention(4, 2, 8, Rope(scaling=Proportional(0.5)), values_are_keys=True, kept=True),
            CrossLayerAttention(4, 2, 8, Rope(), 7, Norm()), CrossLayerAttention(4, 2, 8, Rope(), qk_norm=Norm()),
            NormedValueAttention(2, 2, 8, Rope(), 7, kept=True), CrossLayerAttention(4, 2, 8, Rope(theta=1e3), 7))
    ),
    "experts between norms": (
        Layer(NormedValueAttention(4, 2, 8, Rope()), NormedMoE(4, 2, MLP(20), True, MLP(12)), pre_ffn=None,
              end=LayerEnd()),
    ) * 2,
    "filtered": (
        Layer(FilteredAttention(attention(), 16), MLP(48)),
        Layer(FilteredAttention(Attention(3, 3, 8, Rope(scaling=DynamicNTK(2.0, 16))), 24), MLP(48)),
    ),
    "delta": (
        Layer(GatedDeltaNet(4, 2, 6, 8, 4), MLP(48)),
        Layer(GatedAttention(attention(rope=Rope(fraction=0.5), qk_norm=Norm(offset=1.0))), MLP(48)),
        Layer(GatedDeltaNet(3, 3, 8, 5, 3, reflects=True), MLP(48)),
        Layer(GatedAttention(attention(window=6, qkv_bias=True)), MLP(48)),
        Layer(GatedAttention(attention(window=6), "head", "softplus"), MLP(48)),
    ),
    "hybrid": (
        Layer(Mamba(64, 4, 4, 3), MLP(48)), Layer(attention(window=6), MLP(48)), Layer(Mamba(48, 3, 2, 3), MLP(48)),
    ),
}
BY_LENGTH = {"dynamic", "longrope", "log n", "latent dynamic", "filtered"}    # their angles depend on it
BOUND = 1e-5


@pytest.fixture(scope="module", params=KINDS)
def model(request) -> Decoder:
    decoder = Decoder(ModelConfig(vocab=50, dim=32, layers=KINDS[request.param])).eval()
    decoder.by_length = request.param in BY_LENGTH
    make_loud(decoder)
    return decoder.requires_grad_(False)


def tokens(rows: int, length: int = T, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


@functools.cache
def whole(model: Decoder, rows: int) -> torch.Tensor:
    """Logits (rows, T, V) of all of tokens(rows)."""
    return model(tokens(rows))


@functools.cache
def prefix(model: Decoder, rows: int, n: int) -> torch.Tensor:
    """The reference: logits (rows, V) of the last of the first n of tokens(rows). What follows changes nothing in them
    (test_the_future_changes_nothing), but where the angles depend on the length."""
    return model(tokens(rows)[:, :n])[:, -1] if model.by_length else whole(model, rows)[:, n - 1]


def test_token_by_token(model):
    x, cache = tokens(2), Cache(model.config, 2, T)
    for n in range(1, T + 1):
        assert difference(model(x[:, n - 1 : n], cache=cache)[:, -1], prefix(model, 2, n)) < BOUND, n


@pytest.mark.parametrize("cuts", [(0, 11, 12, 30, 40), (0, 1, 40), (0, 20, 27, 33, 40), (0, 39, 40)])
def test_chunks(model, cuts):
    x, cache = tokens(2), Cache(model.config, 2, T)
    for start, end in itertools.pairwise(cuts):
        logits = model(x[:, start:end], cache=cache)
        assert logits.shape[1] == end - start
        assert difference(logits[:, -1], prefix(model, 2, end)) < BOUND, (start, end)


def ragged(lengths: list[int], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and positions (B, longest) with the padding on the left or on the right, filled with a real token id."""
    x, longest = tokens(len(lengths)), max(lengths)
    padded, positions = torch.full((len(lengths), longest), 7), torch.full((len(lengths), longest), -1)
    for row, n in enumerate(lengths):
        place = slice(longest - n, longest) if left else slice(0, n)
        padded[row, place], positions[row, place] = x[row, :n], torch.arange(n)
    return padded, positions


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_ragged_batch(model, left, cached):
    lengths, x = [5, 17, 11, 1], tokens(4)
    padded, positions = ragged(lengths, left)
    cache = Cache(model.config, 4, T) if cached else None
    logits = model(padded, positions, cache)
    assert logits.isfinite().all()
    for row, n in enumerate(lengths):
        assert difference(logits[row][positions[row] == n - 1], prefix(model, 4, n)[row : row + 1]) < BOUND
    if not cached:
        return
    for step in range(20):  # on past the windows, each row at its own position; row 1 stops at 25
        new = torch.stack([x[row, n + step] for row, n in enumerate(lengths)])[:, None]
        live = [row for row in range(4) if row != 1 or step < 8]
        places = torch.tensor([[n + step if row in live else -1] for row, n in enumerate(lengths)])
        logits = model(new, places if step >= 8 else None, cache)
        for row in live:
            assert difference(logits[row], prefix(model, 4, lengths[row] + step + 1)[row : row + 1]) < BOUND, (
                row, step,
            )


def test_a_row_may_go_on_behind_padding(model):
    """Rows that wait while others are fed: of the second call row 0 has six tokens, row 1 four behind padding,
    row 2 one, row 3 none."""
    x, cache = tokens(4), Cache(model.config, 4, T)
    model(x[:, :10], cache=cache)
    padded, positions = torch.full((4, 6), 7), torch.full((4, 6), -1)
    for row, n in enumerate((6, 4, 1)):
        padded[row, 6 - n :], positions[row, 6 - n :] = x[row, 10 : 10 + n], torch.arange(10, 10 + n)
    logits = model(padded, positions, cache)
    for row, n in enumerate((6, 4, 1)):
        assert difference(logits[row, -1:], prefix(model, 4, 10 + n)[row : row + 1]) < BOUND
    fed = torch.tensor([16, 14, 11, 10])
    logits = model(x.gather(1, fed[:, None]), fed[:, None], cache)
    for row, n in enumerate(fed.tolist()):
        assert difference(logits[row], prefix(model, 4, n + 1)[row : row + 1]) < BOUND


def same(model: Decoder, one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit. With experts up to rounding: how many tokens share an expert decides how its matrix product is
    cut."""
    if any(isinstance(layer.ffn, MoE) for layer in model.config.layers):
        return difference(one, other) < BOUND
    return torch.equal(one, other)


def test_packed_documents_do_not_see_each_other(model):
    a, b, c = tokens(1, 13, 1), tokens(1, 22, 2), tokens(1, 5, 3)
    def pack(*parts):
        return model(torch.cat(parts, 1), torch.cat([torch.arange(part.shape[1]) for part in parts])[None])
    logits = pack(a, b, c)
    for part, document in zip(logits.split([13, 22, 5], 1), (a, b, c), strict=True):
        assert difference(part, model(document)) < BOUND
    changed = pack(tokens(1, 13, 4), b, c)
    assert same(model, changed[:, 13:], logits[:, 13:]), "another first document changed the ones behind it"


def test_the_future_changes_nothing(model):
    x, y = tokens(1), tokens(1)
    y[:, 20:] = tokens(1, 20, 9)
    if any(getattr(getattr(layer.mixer, "rope", None), "scaling", None) for layer in model.config.layers):
        x, y = x[:, :30], y[:, :30]                     # of the same length: their angles follow it
    assert same(model, model(x)[:, :20], model(y)[:, :20])


def test_a_ring_holds_one_window_and_wraps_many_times():
    config = ModelConfig(50, 32, (Layer(attention(window=7), MLP(48)),) * 2)
    decoder = Decoder(config).eval().requires_grad_(False)
    make_loud(decoder)
    x, cache = tokens(1, 100), Cache(config, 1, 64)     # longer than the cache: every layer has a window
    for n in range(1, 101):
        logits = decoder(x[:, n - 1 : n], cache=cache)
    assert difference(logits[:, -1], decoder(x)[:, -1]) < BOUND
    assert all(isinstance(state, KVCache) and state.k.shape[2] == 8 for state in cache.states)


# ---- what a cache refuses

def test_cache_errors():
    config = ModelConfig(50, 32, KINDS["full"])
    decoder, cache = Decoder(config).eval(), Cache(config, 1, 8)
    decoder(tokens(1, 5), cache=cache)
    with pytest.raises(InputError, match="holds 8 positions, position 8 was fed"):
        decoder(tokens(1, 4), cache=cache)
    with pytest.raises(InputError, match="go on by one"):
        decoder(tokens(1, 2), torch.tensor([[0, 1]]), cache)
    with pytest.raises(InputError, match="batch of 1, the tokens have 2 rows"):
        decoder(tokens(2, 1), cache=cache)
    with pytest.raises(InputError, match="expected \\(batch, tokens\\)"):
        decoder(torch.tensor([1, 2]))
    assert difference(decoder(tokens(1)[:, 5:8], cache=cache)[:, -1], decoder(tokens(1)[:, :8])[:, -1]) < 1e-5, (
        "a refused call left a trace"
    )


# ---- the two forms of the scan

@pytest.mark.parametrize("length", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("documents", [False, True])
def test_chunked_scan_is_the_scan_with_its_gradients(length, documents):
    torch.manual_seed(0)
    I, N = 6, 4
    inputs = [
        torch.randn(2, length, I), torch.rand(2, length, I) * 0.5, -torch.rand(I, N) * 4, torch.randn(2, length, N),
        torch.randn(2, length, N), torch.randn(I), torch.randn(2, I, N),
    ]
    inputs = [z.double().requires_grad_() for z in inputs]
    begins = torch.rand(2, length) < 0.2 if documents else None
    results = []
    for scan in (selective_scan, selective_scan_chunked):
        y, h = scan(*inputs, begins)
        results.append([y, h, *torch.autograd.grad((y * y).sum() + (h * h * h).sum(), inputs)])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-10, rtol=1e-10)
