"""The static decode step (inference/static.py) against `feed`, and what a CUDA graph makes of it, without a GPU.

A tape stands in for the graph: it records the operations of one step, and runs them again on the same tensors, without
any Python of ours in between. So a number that Python decides, or a state at another address, shows as a wrong logit;
and an operation that waits for the device is refused, as a capture refuses it.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanollm.cache import Cache
from nanollm.config import MLP, Alibi, FilteredAttention, Layer, ModelConfig, MoE
from nanollm.errors import InputError
from nanollm.inference import graphed
from nanollm.inference.generation import feed
from nanollm.inference.graphed import GraphedDecoder, reader, uncapturable
from nanollm.inference.static import StaticStep
from nanollm.model import Decoder
from tests.oracles import difference, make_loud
from tests.test_consistency import BOUND, BY_LENGTH, KINDS, T, attention, tokens

STATIC = {name: layers for name, layers in KINDS.items() if name not in BY_LENGTH}
STATIC["filtered"] = (Layer(FilteredAttention(attention(), 16), MLP(48)),) * 2
WAITING = {  # experts whose definition reads from the device
    "softcap", "latent", "sinks", "chunked", "one branch", "experts between norms"}


class Tape(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(func.tags):
            raise RuntimeError(f"{func} waits for the device")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        fresh = [x.untyped_storage().data_ptr() not in read for x in made]
        if any(fresh) or func._schema.is_mutable:               # a view needs no second look: it is of the same memory
            self.calls.append((func, args, kwargs, made, fresh))
        return out

    def replay(self) -> None:
        for func, args, kwargs, made, fresh in self.calls:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, torch.Tensor)]
            for old, new, was_fresh in zip(made, again, fresh, strict=True):
                if was_fresh:
                    old.copy_(new)


def decoder(layers) -> Decoder:
    model = Decoder(ModelConfig(vocab=50, dim=32, layers=layers)).eval()
    make_loud(model)
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=STATIC)
def model(request) -> Decoder:
    made = decoder(STATIC[request.param])
    made.waits = request.param in WAITING
    return made


def fed(model: Decoder, x: torch.Tensor, positions: torch.Tensor | None = None, length: int = T) -> Cache:
    cache = Cache(model.config, len(x), length)
    feed(model, x, positions, cache)
    return cache


def test_it_is_what_feed_gives(model):
    x = tokens(2)
    cache, theirs = fed(model, x[:, :5]), fed(model, x[:, :5])
    step = StaticStep(model, cache)
    for n in range(5, T):
        expected = feed(model, x[:, n : n + 1], None, theirs)
        assert difference(step(x[:, n : n + 1]), expected) < BOUND, n
        assert cache.longest == theirs.longest and torch.equal(cache.lengths, theirs.lengths)


def test_steps_and_chunks_take_turns(model):
    """As the turns of a chat do: each leaves the cache as the other expects it."""
    x = tokens(1)
    cache, theirs = fed(model, x[:, :3]), fed(model, x[:, :3])
    step = StaticStep(model, cache)
    for start, end in ((3, 4), (4, 5), (5, 16), (16, 17), (17, 18), (18, 33), (33, 34)):
        part = x[:, start:end]
        found = step(part) if end - start == 1 else feed(model, part, None, cache)
        assert difference(found, feed(model, part, None, theirs)) < BOUND, (start, end)


def ragged(model: Decoder) -> tuple[list[Cache], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Two caches of prompts of 9, 4 and 6 tokens, and steps in which rows pause and stop."""
    x = tokens(3)
    lengths = torch.tensor([9, 4, 6])
    columns = torch.arange(9)[None]
    positions = torch.where(columns < lengths[:, None], columns, -1)
    caches, steps = [fed(model, x[:, :9], positions) for _ in range(2)], []
    for n in range(14):
        runs = torch.tensor([True, n != 3, n < 8])
        steps.append((x.gather(1, lengths[:, None]), torch.where(runs, lengths, -1)[:, None]))
        lengths = lengths + runs
    return caches, steps


def test_rows_of_their_own_length(model):
    (cache, theirs), steps = ragged(model)
    step = StaticStep(model, cache)
    for x, positions in steps:
        real = positions[:, 0] >= 0
        found, expected = step(x, positions), feed(model, x, positions, theirs)
        assert difference(found[real], expected[real]) < BOUND


# ---- what a graph does

class Taped(StaticStep):
    """Recorded at its first step, replayed at the others."""
    tape = None

    def run(self, ragged):
        if self.tape is not None:
            self.tape.replay()
            return self.logits
        self.tape = Tape()
        with self.tape:
            self.logits = self.body(ragged)
        return self.logits


@pytest.mark.parametrize("rows", ["alike", "ragged"])
def test_a_replay_is_the_step(model, rows):
    """Nothing between two steps is decided in Python, no tensor has moved."""
    if model.waits:
        pytest.skip("the definition of the experts reads from the device, as test_what_is_not_captured says")
    if rows == "ragged":
        (cache, theirs), steps = ragged(model)
    else:
        x = tokens(2)
        cache, theirs = fed(model, x[:, :5]), fed(model, x[:, :5])
        steps = [(x[:, n : n + 1], None) for n in range(5, T)]
    step = Taped(model, cache)
    for n, (x, positions) in enumerate(steps):
        real = torch.ones(len(x), dtype=torch.bool) if positions is None else positions[:, 0] >= 0
        found, expected = step(x, positions), feed(model, x, positions, theirs)
        assert difference(found[real], expected[real]) < BOUND, n


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda as far as a capture needs it; the graph is a tape. What a capture runs, a real one does not run."""
    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", lambda tape, capture_error_mode: tape)


@pytest.mark.parametrize("kind", ["full", "windows", "mamba", "mamba-2", "griffin", "filtered"])
def test_a_capture_leaves_no_trace(kind, cuda):
    """A chat of two turns; the capture of the first serves the second."""
    model, x = decoder(STATIC[kind]), tokens(1)
    cache, theirs = fed(model, x[:, :5]), fed(model, x[:, :5])
    step = GraphedDecoder(model, cache)
    for start, end in ((5, 6), (6, 7), (7, 8), (8, 20), (20, 21), (21, 22)):
        part = x[:, start:end]
        found = step(part) if end - start == 1 else feed(model, part, None, cache)
        assert difference(found, feed(model, part, None, theirs)) < BOUND, (start, end)
    assert len(step.graphs) == 1 and step.graphs[False][0].calls


def test_rows_alike_and_ragged_rows_have_a_graph_each(cuda):
    model, x = decoder(STATIC["hybrid"]), tokens(2)
    cache, theirs = fed(model, x[:, :5]), fed(model, x[:, :5])
    step = GraphedDecoder(model, cache)
    for n, positions in enumerate((None, None, [[7], [7]], [[8], [-1]], [[9], [8]])):
        positions = None if positions is None else torch.tensor(positions)
        part = x[:, 5 + n : 6 + n]
        found, expected = step(part, positions), feed(model, part, positions, theirs)
        real = slice(None) if positions is None else positions[:, 0] >= 0
        assert difference(found[real], expected[real]) < BOUND, n
    assert step.graphs.keys() == {False, True}


def test_a_capture_that_fails_costs_speed_and_nothing_else(cuda):
    """Here the experts wait for the device, after a scan whose state Python has replaced by then."""
    layers = (STATIC["mamba"][0], Layer(attention(), MoE(4, 2, MLP(20), True)))
    model, x = decoder(layers), tokens(1)
    cache, theirs = fed(model, x[:, :5]), fed(model, x[:, :5])
    step = GraphedDecoder(model, cache)
    with pytest.warns(UserWarning, match="without a CUDA graph, slower: .* waits for the device"):
        found = [step(x[:, n : n + 1]).clone() for n in range(5, 12)]
    for n, logits in enumerate(found, 5):
        assert difference(logits, feed(model, x[:, n : n + 1], None, theirs)) < BOUND, n


def test_what_is_not_captured(monkeypatch):
    assert uncapturable(decoder(KINDS["full"])) is None
    assert "ALiBi" in uncapturable(decoder((Layer(attention(rope=None, alibi=Alibi()), MLP(48)),)))
    assert "clipped GLU" in uncapturable(decoder(KINDS["sinks"]))
    experts = decoder(KINDS["softcap"])
    monkeypatch.setattr(graphed.ops, "has_triton", lambda: True)
    assert uncapturable(experts) is None
    with graphed.ops.using("torch"):
        assert "waits for the device" in uncapturable(experts)


@pytest.mark.parametrize("kind, gpu, expected", [("full", False, [5, 1, 1, 3, 1]), ("full", True, [5, 3]),
                                                 ("dynamic", True, [5, 1, 1, 3, 1])])
def test_reader_chooses(kind, gpu, expected, cuda, monkeypatch):
    """On a GPU single tokens are replayed; prompts, and what has no static step, go through feed."""
    monkeypatch.setattr(graphed, "has_graphs", lambda device: gpu)
    model, x, through_feed = decoder(KINDS[kind]), tokens(1), []

    def listening(model, x, positions, cache):
        through_feed.append(x.shape[1])
        return feed(model, x, positions, cache)

    cache, theirs = (Cache(model.config, 1, T) for _ in range(2))
    read = reader(listening, model, cache)
    for start, end in ((0, 5), (5, 6), (6, 7), (7, 10), (10, 11)):
        found = read(x[:, start:end], None)
        assert difference(found, feed(model, x[:, start:end], None, theirs)) < BOUND
    assert through_feed == expected


# ---- what it refuses

def test_refusals():
    model, x = decoder(KINDS["full"]), tokens(1)
    with pytest.raises(InputError, match="the cache is empty; feed it a prompt first"):
        StaticStep(model, Cache(model.config, 1, T))
    follows = decoder(KINDS["dynamic"])
    with pytest.raises(InputError, match="no static decode step: the angles of RoPE follow the length"):
        StaticStep(follows, fed(follows, x[:, :4]))
    step = StaticStep(model, fed(model, x[:, :7], length=8))
    with pytest.raises(InputError, match=r"tokens have shape \(1, 2\), this step takes \(1, 1\)"):
        step(x[:, :2])
    step(x[:, 7:8])
    with pytest.raises(InputError, match="the cache holds 8 positions, position 8 was fed"):
        step(x[:, 8:9])
    assert step.cache.longest == 8 and step.lengths.tolist() == [8]
    with pytest.raises(InputError, match="go on by one"):
        step(x[:, 8:9], torch.tensor([[3]]))


def test_the_slots_that_hold_nothing_are_read_and_masked(monkeypatch):
    """That the mask is what keeps them out: without it the logits differ."""
    model, x = decoder(KINDS["full"]), tokens(1)
    cache, theirs = fed(model, x[:, :5]), fed(model, x[:, :5])
    for state in cache.states:
        state.k[:, :, 5:] = 7.0
        state.v[:, :, 5:] = -3.0
    expected = feed(model, x[:, 5:6], None, theirs)
    assert difference(StaticStep(model, cache)(x[:, 5:6]), expected) < BOUND
    cache = fed(model, x[:, :5])
    monkeypatch.setattr("nanollm.inference.static.AllSlots.full", True)
    assert difference(StaticStep(model, cache)(x[:, 5:6]), expected) > 100 * BOUND
