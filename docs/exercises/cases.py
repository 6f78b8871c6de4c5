"""Small cases of each exercise, with numbers that were worked out by hand: (what is done, expected, got).

A case is a function of the module that holds the student's functions. It stops where one raises, so the grader can say
at which numbers it happened. The words of a case stand alone: a student sees those of the first that fails.
The last four exercises: harder_cases.py.
"""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from docs.exercises.compare import Case, dtype_name
from docs.exercises.harder_cases import gqa, rope, router, softmax

X, o = True, False


def dpo(module: ModuleType) -> Iterator[Case]:
    yield "Δ = 0: −log σ(0) = log 2", [0.6931], module.dpo(torch.tensor([0.0]), 0.5)
    yield "Δ = 2, −2 and β = 0.5: −log σ(1), −log σ(−1)", [0.3133, 1.3133], module.dpo(torch.tensor([2.0, -2.0]), 0.5)
    yield "Δ = 2, β = 0.5, ε = 1/4: ¾ · 0.3133 + ¼ · 1.3133", [0.5633], module.dpo(torch.tensor([2.0]), 0.5, 0.25)
    yield "Δ = −1000, β = 1: −log σ(−1000), no infinity", [1000.0], module.dpo(torch.tensor([-1000.0]), 1.0)
    yield "Δ = 1000, β = 1, ε = 1/4: ¼ · 1000, no infinity", [250.0], module.dpo(torch.tensor([1000.0]), 1.0, 0.25)


def mask(module: ModuleType) -> Iterator[Case]:
    def allowed(q: Any, k: Any, window: int | None = None, *documents: torch.Tensor) -> torch.Tensor:
        return module.allowed(torch.tensor(q), torch.tensor(k), window, *documents)

    four = [[0, 1, 2, 3]]
    yield "four tokens see themselves and what came before", \
        [[[X, o, o, o], [X, X, o, o], [X, X, X, o], [X, X, X, X]]], allowed(four, four)
    yield "four tokens with a window of 2 keys", [[[X, o, o, o], [X, X, o, o], [o, X, X, o], [o, o, X, X]]], \
        allowed(four, four, 2)
    yield "one query at position 2, keys at 2 3 1: order does not matter", [[[X, o, X]]], allowed([[2]], [[2, 3, 1]])
    yield "two rows: a query at 0, keys at 0 1; a query at 1, keys at 2 1", [[[X, o]], [[o, X]]], \
        allowed([[0], [1]], [[0, 1], [2, 1]])
    yield "a token and padding, which sees padding", [[[X, o], [o, X]]], allowed([[0, -1]], [[0, -1]])
    yield "a token at 1 and padding, with a window of 4 keys", [[[X, o], [o, X]]], allowed([[1, -1]], [[1, -1]], 4)
    documents = torch.tensor([[0, 0, 1]])
    yield "positions 0 1 0, of documents 0 0 1", [[[X, o, o], [X, X, o], [o, o, X]]], \
        allowed([[0, 1, 0]], [[0, 1, 0]], None, documents, documents)
    yield "one query at 1 of document 5, keys at 0 1 0 of documents 4 5 5", [[[o, X, X]]], \
        allowed([[1]], [[0, 1, 0]], None, torch.tensor([[5]]), torch.tensor([[4, 5, 5]]))


def rmsnorm(module: ModuleType) -> Iterator[Case]:
    x, ones = torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.ones(2)
    yield "two vectors 3 4 and 1 1, gain 1 1, ε = 0: divided by √((9 + 16)/2) = 3.5355, and by 1", \
        [[0.8485, 1.1314], [1.0, 1.0]], module.rms_norm(x, ones, 0.0)
    yield "x = 1 1, gain 1 1, ε = 3: divided by √(1 + 3)", [0.5, 0.5], module.rms_norm(x[1], ones, 3.0)
    yield "x = 3 4, gain 1 2, ε = 0", [0.8485, 2.2627], module.rms_norm(x[0], torch.tensor([1.0, 2.0]), 0.0)
    yield "x = 3 4, ε = 0, gain 0 1 and offset 1, which is gain 1 2", [0.8485, 2.2627], \
        module.rms_norm(x[0], torch.tensor([0.0, 1.0]), 0.0, 1.0)
    yield "the dtype of the result for x in bfloat16 and a float32 gain", "bfloat16", \
        dtype_name(module.rms_norm(x.bfloat16(), ones, 0.0).dtype)
    yield "the dtype of the result for x in bfloat16 and a float32 gain, cast after the gain", "bfloat16", \
        dtype_name(module.rms_norm(x.bfloat16(), ones, 0.0, 0.0, True).dtype)
    small = torch.full((2,), 1 / 512, dtype=torch.bfloat16)
    yield "x = 1 1 in float32, gain 1/512 in bfloat16, offset 1: 1 + 1/512 is 1 in bfloat16, not in float32", \
        [1.00195, 1.00195], module.rms_norm(x[1], small, 0.0, 1.0)
    gain = torch.tensor([1.5, 1.5]).bfloat16()
    yield "x = 3 4 and gain 1.5 in bfloat16: x̂ = 1.1314 is rounded to 1.1328 first, and 1.6992 then to 1.7031", \
        1.703125, module.rms_norm(x[0].bfloat16(), gain, 0.0)[1].float()
    yield "x = 3 4 and gain 1.5 in bfloat16, cast after the gain: 1.1314 · 1.5 = 1.6971 is rounded once, to 1.6953", \
        1.6953125, module.rms_norm(x[0].bfloat16(), gain, 0.0, 0.0, True)[1].float()
    large = torch.tensor([256.0, 1.0]).bfloat16()
    yield "x = 256 1 in bfloat16, where 256² + 1 is 256²; ε = 0, gain 1 1: its second number is 1 / 181.02", \
        0.005524, module.rms_norm(large, ones.bfloat16(), 0.0)[1].float()


def sampling(module: ModuleType) -> Iterator[Case]:
    def kept(probabilities: list[float], **filters: float) -> list[int]:
        left = module.keep_likely(torch.tensor([probabilities]).log(), **filters)
        return [i for i, z in enumerate(left[0].tolist()) if z > float("-inf")]

    four, words = [0.5, 0.3, 0.15, 0.05], "probabilities .5 .3 .15 .05, tokens that stay with"
    yield f"{words} no filter", [0, 1, 2, 3], kept(four)
    yield f"{words} top_k = 2", [0, 1], kept(four, top_k=2)
    yield f"{words} top_k = 9, which is more than there are", [0, 1, 2, 3], kept(four, top_k=9)
    yield f"{words} top_p = 0.7: .5 is not enough, .5 + .3 is", [0, 1], kept(four, top_p=0.7)
    yield f"{words} top_p = 0.9", [0, 1, 2], kept(four, top_p=0.9)
    yield f"{words} top_p = 0.1: one stays in any case", [0], kept(four, top_p=0.1)
    yield f"{words} min_p = 0.2: those with at least .2 × .5", [0, 1, 2], kept(four, min_p=0.2)
    yield f"{words} top_k = 2 and top_p = 0.6: what top-k left has .625 .375, and .625 is enough", [0], \
        kept(four, top_k=2, top_p=0.6)
    yield "probabilities .05 .5 .15 .3, tokens that stay with top_p = 0.7", [1, 3], \
        kept([0.05, 0.5, 0.15, 0.3], top_p=0.7)
    tied, words = [0.5, 0.25, 0.25], "probabilities .5 .25 .25, how many stay with"
    yield f"{words} top_p = 0.5: the first reaches it", 1, len(kept(tied, top_p=0.5))
    yield f"{words} top_p = 0.75: two reach it", 2, len(kept(tied, top_p=0.75))
    yield f"{words} top_p = 0.76: two are not enough", 3, len(kept(tied, top_p=0.76))
    rows = torch.tensor([four, four[::-1]]).log()
    yield "two rows, .5 .3 .15 .05 and .05 .15 .3 .5, with top_k = 3, top_p = 0.7: which stay", \
        [[X, X, o, o], [o, o, X, X]], module.keep_likely(rows, 3, 0.7).isfinite()
    yield "the logit log .5 of the likeliest, which nothing changes", -0.6931, module.keep_likely(rows, top_p=0.7)[0, 0]


def rule(module: ModuleType) -> Iterator[Case]:
    from nanollm.config import MLP, Attention, Layer

    layer, words = Layer(Attention(6, 2, 1), MLP(8)), "q 0 1 2 3 4 5, k 10 11, v 20 21, two key/value heads"
    q, k, v = (torch.tensor(rows)[:, None] for rows in ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [10.0, 11.0], [20.0, 21.0]))
    pieces = list(module.Groups.pieces([q, k, v], layer))
    yield f"{words}: rows of the file", [0.0, 1.0, 2.0, 10.0, 20.0, 3.0, 4.0, 5.0, 11.0, 21.0], \
        torch.cat([view for _, view in pieces]).flatten()
    yield f"{words}: all in the first and only stored tensor", [0] * len(pieces), [which for which, _ in pieces]
    for number, piece in enumerate(pieces):
        piece[1].fill_(100.0 + number)
    yield f"{words}: the last piece was filled with a number, which arrives in v", 99.0 + len(pieces), v[-1, 0]
    yield f"{words}: the first piece was filled with 100, which arrives in q", 100.0, q[0, 0]
    wide = Layer(Attention(2, 2, 2), MLP(8))
    q, k, v = (at + torch.tensor([[0.0], [1.0], [2.0], [3.0]]) for at in (0, 10, 20))
    yield "two heads of width 2, q 0 1 2 3, k 10 11 12 13, v 20 21 22 23: rows of the file", \
        [0.0, 1.0, 10.0, 11.0, 20.0, 21.0, 2.0, 3.0, 12.0, 13.0, 22.0, 23.0], \
        torch.cat([view for _, view in module.Groups.pieces([q, k, v], wide)]).flatten()


def scan(module: ModuleType) -> Iterator[Case]:
    half = -0.693147                                                                        # −log 2: exp of it is ½

    def run(x: list[float], delta: list[float], D: float = 0.0, begins: list[bool] | None = None,
            h: float = 0.0) -> tuple[Any, Any]:
        line = torch.ones(1, len(x), 1)
        starts = None if begins is None else torch.tensor([begins])
        y, h = module.selective_scan(torch.tensor(x)[None, :, None], torch.tensor(delta)[None, :, None],
                                     torch.tensor([[half]]), line, 2 * line, torch.tensor([D]),
                                     torch.full((1, 1, 1), h), starts)
        return y[0, :, 0], h[0, 0, 0]

    one, ones = torch.ones(1, 1), [1.0, 1.0, 1.0]
    yield "one step: A = −log 2, Δ = 1 halve h = 1, x = 1 is added", [[[1.5]]], \
        module.step(one, one, torch.tensor([[half]]), one, torch.ones(1, 1, 1))
    yield "one step of two channels: h = 1, x = 1 2, Δ = 1 1, A = (0 −log 2) (−log 4 0), B = 1 10", \
        [[[2.0, 10.5], [2.25, 21.0]]], module.step(
            torch.tensor([[1.0, 2.0]]), torch.ones(1, 2), torch.tensor([[0.0, half], [2 * half, 0.0]]),
            torch.tensor([[1.0, 10.0]]), torch.ones(1, 2, 2))
    words = "A = −log 2, Δ = 1 1 1, B = 1, C = 2, x = 1 1 1, h = 0 before"
    yield f"{words}: the last h", 1.75, run(ones, ones)[1]
    yield f"{words}: y = C h", [2.0, 3.0, 3.5], run(ones, ones)[0]
    yield "A = −log 2, Δ = 1 1 1, B = 1, C = 2, x = 1 2 3, h = 0 before, and D = 1, which adds x: y", \
        [3.0, 7.0, 11.5], run([1.0, 2.0, 3.0], ones, 1.0)[0]
    yield "A = −log 2, Δ = 1, B = 1, C = 2, x = 1, h = 4 before: y = 2 (½ · 4 + 1)", [6.0], run([1.0], [1.0], h=4.0)[0]
    yield "A = −log 2, Δ = 1 0 1, B = 1, C = 2, x = 1 1 1: Δ = 0 passes the token over, y", [2.0, 2.0, 3.0], \
        run(ones, [1.0, 0.0, 1.0])[0]
    yield f"{words}, and a document begins at the third: y", [2.0, 3.0, 2.0], run(ones, ones, begins=[o, o, X])[0]
    yield f"{words}, and documents begin at the first and the second: y", [2.0, 2.0, 3.0], \
        run(ones, ones, begins=[X, X, o])[0]
    x = torch.tensor([[[1.0, 10.0]]])
    yield "two channels, two states, one token: x = 1 10, h = 0 before, Δ = 1, B = 1 2, C = 1 10, D = 0 1: y", \
        [[[21.0, 220.0]]], module.selective_scan(
            x, torch.ones(1, 1, 2), torch.zeros(2, 2), torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 10.0]]]),
            torch.tensor([0.0, 1.0]), torch.zeros(1, 2, 2))[0]


def cache(module: ModuleType) -> Iterator[Case]:
    from nanollm.layers.state import SlotMapping

    def filled(size: int, ring: bool, chunks: list[list[list[int]]], alike: bool = True) -> tuple[Any, Any]:
        """The cache after chunks of positions (B, T), whose keys are 10 × the position and in row b 100 b more; and
        what the last call returned."""
        rows, before = len(chunks[0]), 0
        state = module.KVCache(rows, 1, size, (1, 2), torch.float32, torch.device("cpu"), ring)
        held = torch.full((rows, size + 1), -1)
        for chunk in chunks:
            positions = torch.tensor(chunk)
            after = max(before, 1 + int(positions.max()))
            slots = SlotMapping(held, positions, ring, alike, before, after)
            k = (10.0 * positions + 100.0 * torch.arange(rows)[:, None])[:, None, :, None]
            found = state.extend(k, torch.cat([k, -k], -1), slots)
            before = after
        return state, found

    state, found = filled(4, False, [[[0, 1]], [[2]]])
    words = "4 slots, keys 0 10 20 at positions 0 1, then 2"
    yield f"{words}: the slots", [0.0, 10.0, 20.0, 0.0], state.k[0, 0, :4, 0]
    yield f"{words}: the keys that the second call returns", [0.0, 10.0, 20.0], found[0][0, 0, :, 0]
    yield f"{words}: the values that it returns, which are of width 2", [[0.0, 0.0], [10.0, -10.0], [20.0, -20.0]], \
        found[1][0, 0]
    yield "4 slots, a first call with positions 0 1: it returns its own keys", [0.0, 10.0], \
        filled(4, False, [[[0, 1]]])[1][0][0, 0, :, 0]
    state, found = filled(3, True, [[[0]], [[1]], [[2]], [[3]]])
    yield "a ring of 3, positions 0 1 2 3 one by one: 3 is in slot 0", [30.0, 10.0, 20.0], found[0][0, 0, :, 0]
    state, found = filled(3, True, [[[0, 1, 2]], [[3, 4]]])
    yield "a ring of 3, positions 0 1 2, then 3 4 at once: the old and the new are returned", \
        [0.0, 10.0, 20.0, 30.0, 40.0], found[0][0, 0, :, 0]
    yield "a ring of 3, positions 0 1 2, then 3 4 at once: what the ring holds then", [30.0, 40.0, 20.0], \
        state.k[0, 0, :3, 0]
    state, found = filled(3, True, [[[0, 1, 2, 3, 4]]])
    yield "a ring of 3, a first call with positions 0 1 2 3 4 (slots.fresh): all five keys are returned", \
        [0.0, 10.0, 20.0, 30.0, 40.0], found[0][0, 0, :, 0]
    yield "a ring of 3, a first call with positions 0 1 2 3 4: what the ring holds then", [30.0, 40.0, 20.0], \
        state.k[0, 0, :3, 0]
    state, _ = filled(3, False, [[[0, 1]], [[2, -1]]], alike=False)
    yield "3 slots, positions 0 1, then 2 −1: padding goes to the last slot, the bin", [0.0, 10.0, 20.0, -10.0], \
        state.k[0, 0, :, 0]
    state, found = filled(4, False, [[[0, 1], [0, -1]], [[2], [1]]], alike=False)
    yield "two rows at 0 1 and 0 −1, then 2 and 1, keys of the second 100 more: what the second call returns", \
        [[0.0, 10.0, 20.0], [100.0, 110.0, 0.0]], found[0][:, 0, :, 0]


def lora(module: ModuleType) -> Iterator[Case]:
    from nanollm.layers.linear import Linear
    from nanollm.layers.moe import Stacked

    def adapted(bias: float | None = None, **fields: Any) -> Any:
        base = Linear(2, 1, bias=bias is not None)
        layer = module.LoRALinear(base, 1, 0.5, **fields).eval()
        for p, value in ((base.weight, [[1.0, 1.0]]), (base.bias, [bias]), (layer.A, [[1.0, 0.0]]), (layer.B, [[2.0]]),
                         (layer.magnitude, [5.0])):
            if p is not None:
                p.data = torch.tensor(value)
        return layer

    x, words = torch.tensor([[3.0, 4.0]]), "W = 1 1, A = 1 0, B = 2, s = ½"
    yield f"{words}, x = 3 4:  7 + ½ · 2 · 3", [[10.0]], adapted()(x)
    yield f"{words}, x = 3 4 and a bias of 1", [[11.0]], adapted(1.0)(x)
    yield f"{words}, merged: W + s B A", [[2.0, 1.0]], adapted().merged()
    yield f"{words}, x = 3 4, a dropout of 1 in training drops all that A reads, and nothing that W reads", [[7.0]], \
        adapted(dropout=1.0).train()(x)
    yield f"{words}, x = 3 4, a dropout of 1 when the module does not train", [[10.0]], adapted(dropout=1.0)(x)
    words = f"DoRA with {words}, m = 5"
    yield f"{words}, merged: the row 2 1 of length √5 becomes one of length 5", [[4.4721, 2.2361]], \
        adapted(dora=True).merged()
    yield f"{words}, x = 3 4:  3 · 4.4721 + 4 · 2.2361", [[22.3607]], adapted(dora=True)(x)
    yield f"{words}, x = 3 4 and a bias of 1, which is not stretched", [[23.3607]], adapted(1.0, dora=True)(x)
    for name, what, factor in (("forward, x = 3 4", lambda layer: layer(x), 3.0),
                               ("merged, all its numbers summed", lambda layer: layer.merged(), 1.0)):
        layer = adapted(dora=True)
        what(layer).sum().backward()
        yield f"{words}, {name}: the gradient of B, to which ‖V‖ is a constant: 5/√5 · ½ · {factor:g}", \
            [[1.11803 * factor]], layer.B.grad
        yield f"{words}, {name}: the gradient of m, which is no constant", [4.47214 if factor == 3 else 1.34164], \
            layer.magnitude.grad
    base = Linear(2, 1, bias=False).bfloat16()
    base.weight.data = torch.tensor([[256.0, 0.0]]).bfloat16()
    layer = module.LoRALinear(base, 1, 0.5)
    layer.A.data, layer.B.data = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0078125]])
    yield "in bfloat16, W x = 256 and s B A x = 1.0039 in float32: rounded after the sum, to 258", [[258.0]], \
        layer(torch.tensor([[1.0, 0.0]]).bfloat16()).float()
    yield "W in bfloat16, A and B in float32: the dtypes of the result and of merged()", "bfloat16 float32", \
        " ".join(dtype_name(each.dtype) for each in (layer(torch.zeros(1, 2).bfloat16()), layer.merged()))
    layer = module.LoRALinear(Stacked(torch.nn.Parameter(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))), 1, 0.5)
    layer.A.data, layer.B.data = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[[2.0]], [[4.0]]])
    yield "two experts, W = 1 0 and 0 1, A likewise, B = 2 and 4, s = ½, x = 3 4: the second gives 4 + ½ · 4 · 4", \
        [[12.0]], layer(x, 1)
    yield "two experts, W = 1 0 and 0 1, A likewise, B = 2 and 4, s = ½, merged", [[[2.0, 0.0]], [[0.0, 3.0]]], \
        layer.merged()


CASES: dict[str, Callable[[ModuleType], Iterator[Case]]] = {
    each.__name__: each
    for each in (dpo, mask, rmsnorm, sampling, rule, scan, cache, lora, rope, gqa, router, softmax)
}
