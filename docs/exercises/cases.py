"""The smallest case of each exercise, with numbers that were worked out by hand: (what is done, expected, got).

A case is a function of the module that holds the student's functions. It stops where one raises, so the grader can say
at which numbers it happened.
"""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

Case = tuple[str, Any, Any]                 # words, expected (a number, a list …), what came out (a tensor, a list …)
X, o = True, False


def mask(module: ModuleType) -> Iterator[Case]:
    at = torch.tensor([[0, 1, 2, 3]])
    yield "four tokens see themselves and what came before", \
        [[[X, o, o, o], [X, X, o, o], [X, X, X, o], [X, X, X, X]]], module.allowed(at, at, None)
    yield "the same with a window of 2 keys", [[[X, o, o, o], [X, X, o, o], [o, X, X, o], [o, o, X, X]]], \
        module.allowed(at, at, 2)
    yield "one query at position 2, keys at 2 3 1: order does not matter", [[[X, o, X]]], \
        module.allowed(torch.tensor([[2]]), torch.tensor([[2, 3, 1]]), None)
    padded = torch.tensor([[0, -1]])
    yield "a token and padding", [[[X, o], [o, X]]], module.allowed(padded, padded, None)
    documents = torch.tensor([[0, 0, 1]])
    yield "positions 0 1 0, of documents 0 0 1", [[[X, o, o], [X, X, o], [o, o, X]]], \
        module.allowed(torch.tensor([[0, 1, 0]]), torch.tensor([[0, 1, 0]]), None, documents, documents)


def rmsnorm(module: ModuleType) -> Iterator[Case]:
    x, ones = torch.tensor([3.0, 4.0]), torch.ones(2)
    yield "x = 3 4, gain 1 1, ε = 0: divided by √((9 + 16)/2) = 3.5355", [0.8485, 1.1314], module.rms_norm(x, ones, 0.0)
    yield "x = 1 1, ε = 3: divided by √(1 + 3)", [0.5, 0.5], module.rms_norm(torch.ones(2), ones, 3.0)
    yield "gain 1 2", [0.8485, 2.2627], module.rms_norm(x, torch.tensor([1.0, 2.0]), 0.0)
    yield "gain 0 1 and offset 1, which is gain 1 2", [0.8485, 2.2627], \
        module.rms_norm(x, torch.tensor([0.0, 1.0]), 0.0, 1.0)
    yield "the dtype for x in bfloat16 and a float32 gain", "torch.bfloat16", \
        str(module.rms_norm(x.bfloat16(), ones, 0.0).dtype)


def sampling(module: ModuleType) -> Iterator[Case]:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def kept(logits: torch.Tensor = logits, **filters: float) -> list[int]:
        left = module.keep_likely(logits, **filters)
        return [i for i, z in enumerate(left[0].tolist()) if z > float("-inf")]

    yield "probabilities .5 .3 .15 .05: tokens that stay with top_k = 2", [0, 1], kept(top_k=2)
    yield "with top_p = 0.7: .5 is not enough, .5 + .3 is", [0, 1], kept(top_p=0.7)
    yield "with top_p = 0.9", [0, 1, 2], kept(top_p=0.9)
    yield "with top_p = 0.1: one stays in any case", [0], kept(top_p=0.1)
    yield "with min_p = 0.2: those with at least .2 × .5", [0, 1, 2], kept(min_p=0.2)
    yield "probabilities .05 .5 .15 .3, top_p = 0.7", [1, 3], kept(logits[:, [3, 0, 2, 1]], top_p=0.7)
    yield "the logit of the likeliest, which nothing changes", -0.6931, module.keep_likely(logits, top_p=0.7)[0, 0]


def dpo(module: ModuleType) -> Iterator[Case]:
    yield "Δ = 0: −log σ(0) = log 2", [0.6931], module.dpo(torch.tensor([0.0]), 0.5)
    yield "Δ = 2, −2 and β = 0.5: −log σ(1), −log σ(−1)", [0.3133, 1.3133], module.dpo(torch.tensor([2.0, -2.0]), 0.5)
    yield "Δ = 2, ε = 1/4: ¾ · 0.3133 + ¼ · 1.3133", [0.5633], module.dpo(torch.tensor([2.0]), 0.5, 0.25)
    yield "Δ = −1000, β = 1", [1000.0], module.dpo(torch.tensor([-1000.0]), 1.0)


def rope(module: ModuleType) -> Iterator[Case]:
    from nanollm.config import Rope

    def turned(x: list[float], position: int, **fields: Any) -> torch.Tensor:
        rope, at = Rope(**fields), torch.tensor([[position]])
        cos, sin = module.rotation_tables(rope, 4, at, at)
        return module.rotate(torch.tensor(x)[None, None, None], cos, sin, rope.layout)[0, 0, 0]

    yield "x = 1 2 3 4 at position 0", [1.0, 2.0, 3.0, 4.0], turned([1.0, 2.0, 3.0, 4.0], 0)
    yield "x = 1 0 0 0 at position 1, half: channels 0 and 2 turn by 1 radian", [0.5403, 0.0, 0.8415, 0.0], \
        turned([1.0, 0.0, 0.0, 0.0], 1)
    yield "x = 0 0 1 0: the partner goes the other way", [-0.8415, 0.0, 0.5403, 0.0], turned([0.0, 0.0, 1.0, 0.0], 1)
    yield "x = 0 1 0 0 at position 100: channels 1 and 3 turn by 0.01 a position", [0.0, 0.5403, 0.0, 0.8415], \
        turned([0.0, 1.0, 0.0, 0.0], 100)
    yield "x = 1 0 0 0 at position 1, interleaved: channels 0 and 1", [0.5403, 0.8415, 0.0, 0.0], \
        turned([1.0, 0.0, 0.0, 0.0], 1, layout="interleaved")
    yield "x = 1 0 5 6, fraction 0.5: the last two pass", [0.5403, 0.8415, 5.0, 6.0], \
        turned([1.0, 0.0, 5.0, 6.0], 1, fraction=0.5)


def gqa(module: ModuleType) -> Iterator[Case]:
    def attend(q: Any, k: Any, v: Any, mask: Any = None, scale: float = 1.0, **more: Any) -> torch.Tensor:
        q, k, v = (torch.tensor(each)[None, ..., None] for each in (q, k, v))               # (1, heads, tokens, 1)
        return module.attend_plainly(q, k, v, mask, scale, **more)[0, ..., 0]

    three = [[0.0, 0.0, 0.0]]
    yield "causal, all scores alike, values 0 2 4: means of what is seen", [[0.0, 1.0, 2.0]], \
        attend(three, three, [[0.0, 2.0, 4.0]], module.CAUSAL)
    two = [[0.0], [0.0]]
    yield "4 query heads share 2 value heads, 1 and 2", [[1.0], [1.0], [2.0], [2.0]], \
        attend(two * 2, two, [[1.0], [2.0]])
    keys, values = [[0.0, 1.0986]], [[0.0, 1.0]]                                            # 1.0986 = log 3
    yield "scores 0 and log 3, values 0 and 1: ¾", [[0.75]], attend([[1.0]], keys, values)
    yield "with scale 2: scores 0 and log 9", [[0.9]], attend([[1.0]], keys, values, scale=2.0)
    yield "scores 0 and 1000, capped at log 3", [[0.75]], attend([[1.0]], [[0.0, 1000.0]], values, softcap=1.0986)
    yield "one key of score 0, value 1, and a sink of score 0", [[0.5]], \
        attend([[0.0]], [[0.0]], [[1.0]], sinks=torch.zeros(1))
    yield "a bool mask: the second key alone", [[1.0]], attend([[1.0]], keys, values, torch.tensor([[[[False, True]]]]))
    yield "a float mask adds to the scores", [[0.5]], attend([[1.0]], keys, values, torch.tensor([[[[1.0986, 0.0]]]]))


def router(module: ModuleType) -> Iterator[Case]:
    from nanollm.config import MLP, ExpertGroups, MoE

    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log()
    weights, chosen = module.route(logits, MoE(4, 2, MLP(8), False))
    yield "probabilities .4 .1 .3 .2: the two best experts", [[0, 2]], chosen
    yield "and their weights", [[0.4, 0.3]], weights
    yield "renormalised: .4/.7, .3/.7", [[0.5714, 0.4286]], module.route(logits, MoE(4, 2, MLP(8), True))[0]
    fair = MoE(4, 1, MLP(8), False, score="sigmoid", correction=True, scale=3.0)
    weights, chosen = module.route(torch.zeros(1, 4), fair, torch.tensor([0.0, 0.0, 1.0, 0.0]))
    yield "four sigmoids of ½, correction 0 0 1 0: the choice", [[2]], chosen
    yield "its weight, times 3: the correction is not in it", [[1.5]], weights
    grouped = MoE(4, 1, MLP(8), False, groups=ExpertGroups(2, 1, 2))
    yield "groups (.4 .05) (.3 .25), as good as the sum of both: the best of the second", [[2]], \
        module.route(torch.tensor([[0.4, 0.05, 0.3, 0.25]]).log(), grouped)[1]


def lora(module: ModuleType) -> Iterator[Case]:
    from nanollm.layers.linear import Linear

    def adapted(**fields: Any) -> Any:
        base = Linear(2, 1, bias=False)
        layer = module.LoRALinear(base, 1, 0.5, **fields).eval()
        for p, value in ((base.weight, [[1.0, 1.0]]), (layer.A, [[1.0, 0.0]]), (layer.B, [[2.0]])):
            p.data = torch.tensor(value)
        return layer

    x = torch.tensor([[3.0, 4.0]])
    layer = adapted()
    yield "W = 1 1, A = 1 0, B = 2, s = ½, x = 3 4:  7 + ½ · 2 · 3", [[10.0]], layer(x)
    yield "W + s B A", [[2.0, 1.0]], layer.merged()
    layer = adapted(dora=True)
    layer.magnitude.data = torch.tensor([5.0])
    yield "DoRA with m = 5: the row 2 1 of length √5 becomes one of length 5", [[4.4721, 2.2361]], layer.merged()
    yield "and W x: 3 · 4.4721 + 4 · 2.2361", [[22.3607]], layer(x)


def cache(module: ModuleType) -> Iterator[Case]:
    from nanollm.layers.state import SlotMapping

    def filled(size: int, ring: bool, chunks: list[list[int]], alike: bool = True) -> tuple[Any, Any]:
        """The cache after chunks of positions, whose keys are 10 × the position, and what the last call returned."""
        state = module.KVCache(1, 1, size, (1, 2), torch.float32, torch.device("cpu"), ring)
        held, before = torch.full((1, size + 1), -1), 0
        for chunk in chunks:
            real = [at for at in chunk if at >= 0]
            slots = SlotMapping(held, torch.tensor([chunk]), ring, alike, before, before + len(real))
            k = 10.0 * torch.tensor(chunk)[None, None, :, None]
            found = state.extend(k, torch.cat([k, -k], -1), slots)
            before += len(real)
        return state, found

    state, found = filled(4, False, [[0, 1], [2]])
    yield "positions 0 1, then 2, have keys 0 10 20: the slots", [0.0, 10.0, 20.0, 0.0], state.k[0, 0, :4, 0]
    yield "what the last call returns", [0.0, 10.0, 20.0], found[0][0, 0, :, 0]
    yield "and its values, which are wider", [[0.0, 0.0], [10.0, -10.0], [20.0, -20.0]], found[1][0, 0]
    yield "a first call returns its own", [0.0, 10.0], filled(4, False, [[0, 1]])[1][0][0, 0, :, 0]
    state, found = filled(3, True, [[0], [1], [2], [3]])
    yield "a ring of 3, positions 0 1 2 3: 3 is in slot 0", [30.0, 10.0, 20.0], found[0][0, 0, :, 0]
    state, found = filled(3, True, [[0, 1, 2], [3, 4]])
    yield "a ring of 3, then positions 3 4 at once: all five are returned", [0.0, 10.0, 20.0, 30.0, 40.0], \
        found[0][0, 0, :, 0]
    yield "and the ring holds 3 4 2", [30.0, 40.0, 20.0], state.k[0, 0, :3, 0]
    state, _ = filled(3, False, [[0, 1], [2, -1]], alike=False)
    yield "padding (position −1) goes to the last slot, the bin", [0.0, 10.0, 20.0, -10.0], state.k[0, 0, :, 0]


def rule(module: ModuleType) -> Iterator[Case]:
    from nanollm.config import MLP, Attention, Layer

    layer = Layer(Attention(4, 2, 1), MLP(8))
    q, k, v = (torch.tensor(rows)[:, None] for rows in ([0.0, 1.0, 2.0, 3.0], [10.0, 11.0], [20.0, 21.0]))
    pieces = list(module.Groups.pieces([q, k, v], layer))
    yield "q 0 1 2 3, k 10 11, v 20 21, two key/value heads: rows of the file", \
        [0.0, 1.0, 10.0, 20.0, 2.0, 3.0, 11.0, 21.0], torch.cat([view for _, view in pieces]).flatten()
    yield "all in the first and only stored tensor", [0] * len(pieces), [which for which, _ in pieces]
    pieces[-1][1].fill_(99.0)
    yield "a number written into the last piece arrives in v", [20.0, 99.0], v.flatten()


def scan(module: ModuleType) -> Iterator[Case]:
    def run(x: list[float], delta: list[float], D: float = 0.0, begins: list[bool] | None = None) -> tuple[Any, Any]:
        line = torch.ones(1, len(x), 1)
        starts = None if begins is None else torch.tensor([begins])
        y, h = module.selective_scan(torch.tensor(x)[None, :, None], torch.tensor(delta)[None, :, None],
                                     torch.tensor([[-0.693147]]), line, 2 * line, torch.tensor([D]),
                                     torch.zeros(1, 1, 1), starts)
        return y[0, :, 0], h[0, 0, 0]

    one = torch.ones(1, 1)
    h = module.step(one, one, torch.tensor([[-0.693147]]), one, torch.ones(1, 1, 1))
    yield "one step: A = −log 2, Δ = 1 halve h = 1, x = 1 is added", [[[1.5]]], h
    y, h = run([1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    yield "x = 1 1 1: the last h", 1.75, h
    yield "y = C h with C = 2", [2.0, 3.0, 3.5], y
    yield "with D = 1, which adds x", [3.0, 4.0, 4.5], run([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], 1.0)[0]
    yield "Δ = 0 in the middle: that token is passed over", [2.0, 2.0, 3.0], run([1.0, 1.0, 1.0], [1.0, 0.0, 1.0])[0]
    yield "a document begins at the third", [2.0, 3.0, 2.0], \
        run([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], begins=[False, False, True])[0]


def softmax(module: ModuleType) -> Iterator[Case]:
    from kernels.attention import attention_op

    def attend(scores: list[float], values: list[float], first: int = 0) -> tuple[float, float]:
        """One query of score·log 2 for each key, so that p = 2^score: its result and log2 Σ p."""
        n = len(scores)
        q, k, v = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, n, 16), torch.zeros(1, 1, n, 16)
        q[..., 0], k[0, 0, :, 0], v[0, 0, :, 0] = 1.0, torch.tensor(scores) * 0.6931472, torch.tensor(values)
        sees = torch.tensor([[first]], dtype=torch.int32), torch.tensor([[n - 1]], dtype=torch.int32)
        out, total = attention_op(q, k, v, *sees, None, 1.0, None)
        return out[0, 0, 0, 0].item(), total[0, 0, 0].item()

    yield "two keys of score 0, values 0 and 1: the mean, and log2 of 1 + 1", [0.5, 1.0], attend([0.0, 0.0], [0.0, 1.0])
    yield "scores 0 and 2: ⅘", 0.8, attend([0.0, 2.0], [0.0, 1.0])[0]
    many = [0.0] * 256
    yield "256 keys of score 0 and value 1, then one of score 8 and value 0: half and half", [0.5, 9.0], \
        attend([*many, 8.0], [*[1.0] * 256, 0.0])
    yield "first one of score 8 and value 1, then 256 of score and value 0", [0.5, 9.0], \
        attend([8.0, *many], [1.0, *many])
    yield "scores 0 and 1000: no overflow", 1.0, attend([0.0, 1000.0], [0.0, 1.0])[0]
    yield "a query that does not see the first key", 1.0, attend([0.0, 0.0, 0.0], [7.0, 1.0, 1.0], first=1)[0]


CASES: dict[str, Callable[[ModuleType], Iterator[Case]]] = {
    each.__name__: each
    for each in (mask, rmsnorm, sampling, dpo, rope, gqa, router, lora, cache, rule, scan, softmax)
}


def same(expected: Any, got: Any) -> bool:
    """Equal up to what four digits show."""
    if isinstance(expected, str):
        return expected == got
    want, have = torch.as_tensor(expected), torch.as_tensor(got).detach()
    if want.shape != have.shape or (want.dtype == torch.bool) != (have.dtype == torch.bool):
        return False
    return torch.allclose(want.double(), have.double(), atol=2e-4, rtol=1e-4)


def shown(value: Any) -> str:
    """A number, a list or a tensor in few digits; ■ and · of a mask."""
    if isinstance(value, str):
        return value
    tensor = torch.as_tensor(value).detach()
    if tensor.dtype == torch.bool:
        rows = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]
        return "  ".join("".join("■" if x else "·" for x in row) for row in rows.tolist()) + _shape(tensor)
    return _numbers(tensor.tolist()) + _shape(tensor)


def _numbers(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_numbers, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _shape(tensor: torch.Tensor) -> str:
    return f"   {tuple(tensor.shape)}" if tensor.dim() > 1 else ""
