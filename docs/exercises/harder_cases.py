"""Small cases, as in cases.py, of the exercises that were the hardest to write: rope, gqa, router, softmax."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from docs.exercises.compare import Case, dtype_name


def rope(module: ModuleType) -> Iterator[Case]:
    from nanollm.config import DynamicNTK, Rope, Yarn

    def turned(x: list[float], position: int, **fields: Any) -> torch.Tensor:
        rope, at = Rope(**fields), torch.tensor([[position]])
        cos, sin = module.rotation_tables(rope, 4, at, at)
        return module.rotate(torch.tensor(x)[None, None, None], cos, sin, rope.layout)[0, 0, 0]

    at = torch.tensor([[1, 0]])
    for layout, cos, sin in (("half", [0.5403, 1.0, 0.5403, 1.0], [-0.8415, -0.01, 0.8415, 0.01]),
                             ("interleaved", [0.5403, 0.5403, 1.0, 1.0], [-0.8415, 0.8415, -0.01, 0.01])):
        tables = module.rotation_tables(Rope(layout=layout), 4, at, at)
        yield f"d = 4, angles 1 and 0.01 a position, {layout}, positions 1 and 0: cos, (B, 1, T, r)", \
            [[[cos, [1.0] * 4]]], tables[0]
        yield f"d = 4, angles 1 and 0.01 a position, {layout}, positions 1 and 0: sin, with the sign of its channel", \
            [[[sin, [0.0] * 4]]], tables[1]
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    for layout, signs, expected in (("half", [-1.0, -1.0, 1.0, 1.0], [-3.0, -4.0, 1.0, 2.0]),
                                    ("interleaved", [-1.0, 1.0, -1.0, 1.0], [-2.0, 1.0, -4.0, 3.0])):
        yield f"rotate x = 1 2 3 4 with cos = 0 and sin = {signs}, {layout}: swap(x) · sin", [[[expected]]], \
            module.rotate(x, torch.zeros(1, 1, 1, 4), torch.tensor(signs)[None, None, None], layout)
    yield "x = 1 2 3 4 at position 0", [1.0, 2.0, 3.0, 4.0], turned([1.0, 2.0, 3.0, 4.0], 0)
    yield "x = 1 0 0 0 at position 1, half: channels 0 and 2 turn by 1 radian", [0.5403, 0.0, 0.8415, 0.0], \
        turned([1.0, 0.0, 0.0, 0.0], 1)
    yield "x = 0 0 1 0 at position 1, half: the partner goes the other way", [-0.8415, 0.0, 0.5403, 0.0], \
        turned([0.0, 0.0, 1.0, 0.0], 1)
    yield "x = 0 1 0 0 at position 100, half: channels 1 and 3 turn by 0.01 a position", [0.0, 0.5403, 0.0, 0.8415], \
        turned([0.0, 1.0, 0.0, 0.0], 100)
    yield "x = 1 0 0 0 at position 1, interleaved: channels 0 and 1", [0.5403, 0.8415, 0.0, 0.0], \
        turned([1.0, 0.0, 0.0, 0.0], 1, layout="interleaved")
    yield "x = 1 0 5 6 at position 1, half, fraction 0.5: the last two pass", [0.5403, 0.8415, 5.0, 6.0], \
        turned([1.0, 0.0, 5.0, 6.0], 1, fraction=0.5)
    yield "x = 1 0 0 0 at position 1, half, YaRN with an attention factor of 2: cos and sin are both doubled", \
        [1.0806, 0.0, 1.6829, 0.0], turned([1.0, 0.0, 0.0, 0.0], 1, scaling=Yarn(1.0, 4096, attention_factor=2.0))
    growing = Rope(scaling=DynamicNTK(2.0, 4))
    tables = module.rotation_tables(growing, 4, torch.tensor([[100], [100]]), torch.tensor([[4], [8]]))
    x = torch.tensor([0.0, 1.0, 0.0, 0.0]).expand(2, 1, 1, 4)
    yield "two rows of lengths 4 and 8, dynamic NTK: at position 100 channel 1 turns by 1, in the longer row by ⅓", \
        [[0.0, 0.5403, 0.0, 0.8415], [0.0, 0.9450, 0.0, 0.3272]], module.rotate(x, *tables, "half")[:, 0, 0]
    yield "the dtypes of cos, of sin, and of x in bfloat16 once it is rotated", "float32 float32 bfloat16", \
        " ".join(dtype_name(each.dtype) for each in (*tables, module.rotate(x.bfloat16(), *tables, "half")))
    tables = module.rotation_tables(Rope(), 4, torch.tensor([[1]]), torch.tensor([[1]]))
    x = torch.tensor([[[[5.0, 0.0, 0.0, 0.0]]]]).bfloat16()
    yield "x = 5 0 0 0 in bfloat16 and tables in float32, position 1: 2.7015 and 4.2074 are rounded once", \
        [[[[2.703125, 0.0, 4.21875, 0.0]]]], module.rotate(x, *tables, "half").float()


class SoftmaxDtypes(TorchDispatchMode):
    """Notes in which dtypes a softmax, or an exponential, is computed: on a CPU the numbers do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_softmax", "_log_softmax", "exp", "exp2", "logsumexp"):
            self.seen.add(dtype_name(args[0].dtype))
        return func(*args, **(kwargs or {}))


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
    yield "scores 0 and log 3, values 0 and 1, with scale 2: scores 0 and log 9", [[0.9]], \
        attend([[1.0]], keys, values, scale=2.0)
    yield "scores 0 and 1000, capped at log 3, values 0 and 1", [[0.75]], \
        attend([[1.0]], [[0.0, 1000.0]], values, softcap=1.0986)
    yield "keys 0 and 500, scale 2, capped at log 3, values 0 and 1: the cap comes after the scale", [[0.75]], \
        attend([[1.0]], [[0.0, 500.0]], values, scale=2.0, softcap=1.0986)
    yield "scores 1000 and 1000, capped at log 3, the second masked, values 0 and 1: the mask comes after the cap", \
        [[0.0]], attend([[1.0]], [[1000.0, 1000.0]], values, torch.tensor([[[[True, False]]]]), softcap=1.0986)
    yield "one key of score 0, value 1, and a sink of score 0", [[0.5]], \
        attend([[0.0]], [[0.0]], [[1.0]], sinks=torch.zeros(1))
    yield "two heads, one key of score 0, value 1, and sinks of scores 0 and log 3", [[0.5], [0.25]], \
        attend(two, two, [[1.0], [1.0]], sinks=torch.tensor([0.0, 1.0986]))
    yield "scores 0 and log 3, values 0 and 1, and a bool mask: the second key alone", [[1.0]], \
        attend([[1.0]], keys, values, torch.tensor([[[[False, True]]]]))
    yield "scores 0 and log 3, values 0 and 1, and a bool mask that shows no key: the mean, not NaN", [[0.5]], \
        attend([[1.0]], keys, values, torch.tensor([[[[False, False]]]]))
    yield "scores 0 and log 3, values 0 and 1, and a float mask log 9, 0, which is added", [[0.25]], \
        attend([[1.0]], keys, values, torch.tensor([[[[2.1972, 0.0]]]]))
    halves = [torch.ones(1, 1, 2, 1).bfloat16() for _ in range(3)]
    with SoftmaxDtypes() as softmax:
        result = module.attend_plainly(*halves, None, 1.0)
    q, k, v = (torch.tensor(rows)[None, None].bfloat16() for rows in ([[16.0, 1.0]], [[16.0, 0.0], [16.0, 1.0]],
                                                                      [[0.0], [1.0]]))
    yield "q = 16 1, keys 16 0 and 16 1 in bfloat16, values 0 and 1: scores 256 and 257, which is 256 there, so ½", \
        [[[[0.5]]]], module.attend_plainly(q, k, v, None, 1.0).float()
    yield "q, k, v in bfloat16: the dtype of the result", "bfloat16", dtype_name(result.dtype)
    yield "q, k, v in bfloat16: the dtype in which the softmax is computed", "float32", " ".join(sorted(softmax.seen))


def router(module: ModuleType) -> Iterator[Case]:
    from nanollm.config import MLP, ExpertGroups, MoE

    logits, words = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log(), "probabilities .4 .1 .3 .2, two experts a token"
    weights, chosen = module.route(logits, MoE(4, 2, MLP(8), False))
    yield f"{words}: the two best", [[0, 2]], chosen
    yield f"{words}: their weights", [[0.4, 0.3]], weights
    yield f"{words}, renormalize=True: .4/.7, .3/.7", [[0.5714, 0.4286]], \
        module.route(logits, MoE(4, 2, MLP(8), True))[0]
    yield f"{words}, renormalize=0.1: .4/.8, .3/.8", [[0.5, 0.375]], module.route(logits, MoE(4, 2, MLP(8), 0.1))[0]
    yield f"{words}, renormalize=True, scale=7: 4, 3", [[4.0, 3.0]], \
        module.route(logits, MoE(4, 2, MLP(8), True, scale=7.0))[0]
    yield "four sigmoids of −200, which are 0, two experts a token, renormalize=True: 0, and not NaN", [[0.0, 0.0]], \
        module.route(torch.full((1, 4), -200.0), MoE(4, 2, MLP(8), True, score="sigmoid"))[0]
    fair, words = MoE(4, 1, MLP(8), False, score="sigmoid", correction=True), "four sigmoids of ½, correction 0 0 1 0"
    weights, chosen = module.route(torch.zeros(1, 4), fair, torch.tensor([0.0, 0.0, 1.0, 0.0]))
    yield f"{words}: the choice", [[2]], chosen
    yield f"{words}: its weight, in which the correction is not", [[0.5]], weights
    grouped = MoE(4, 1, MLP(8), False, groups=ExpertGroups(2, 1, 2))
    yield "groups (.4 .05) (.3 .25), as good as the sum of both: the best of the second", [[2]], \
        module.route(torch.tensor([[0.4, 0.05, 0.3, 0.25]]).log(), grouped)[1]
    both = MoE(4, 1, MLP(8), False, score="sigmoid", correction=True, groups=ExpertGroups(2, 1, 2))
    yield "groups of sigmoids (½ ½) (½ ½), correction (0 0) (−1 2): the second group, and its second", [[3]], \
        module.route(torch.zeros(1, 4), both, torch.tensor([0.0, 0.0, -1.0, 2.0]))[1]
    yield "groups of sigmoids (½ ½) (½ ½), correction (−2 −2) (−1 −1.1): the second, though it is below 0", [[2]], \
        module.route(torch.zeros(1, 4), both, torch.tensor([-2.0, -2.0, -1.0, -1.1]))[1]
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [-1.0, 0.0, 1.0, 2.0]]).bfloat16()
    for score, best in (("softmax", 0.6439), ("sigmoid", 0.8808)):
        weights, chosen = module.route(logits, MoE(4, 1, MLP(8), False, score=score))
        words = f"two tokens, logits 2 1 0 −1 and −1 0 1 2 in bfloat16, {score} in float32"
        yield f"{words}: the choices", [[0], [3]], chosen
        yield f"{words}: the weights", [[best], [best]], weights
        yield f"{words}: the dtype of the weights", "float32", dtype_name(weights.dtype)
    weights, chosen = module.route(logits[:1].float(), MoE(4, 2, MLP(8), False, sparse=0.25))
    yield "logits 2 1 0 −1, sparse=0.25: what sparse_route chooses", [[0, 1]], chosen
    yield "logits 2 1 0 −1, sparse=0.25: the weights of sparse_route, σ(2 − 1) and 1", [[0.7311, 1.0]], weights


def softmax(module: ModuleType) -> Iterator[Case]:
    from kernels.attention import attention_op

    def attend(scores: list[float], values: list[float], first: int = 0, last: int | None = None,
               slope: float | None = None, scale: float = 1.0, softcap: float | None = None) -> tuple[float, float]:
        """One query of score·log 2 for each key, so that p = 2^score: its result and log2 Σ p."""
        n = len(scores)
        q, k, v = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, n, 16), torch.zeros(1, 1, n, 16)
        q[..., 0], k[0, 0, :, 0], v[0, 0, :, 0] = 1.0, torch.tensor(scores) * 0.6931472, torch.tensor(values)
        ends = n - 1 if last is None else last
        sees = torch.tensor([[first]], dtype=torch.int32), torch.tensor([[ends]], dtype=torch.int32)
        slopes = None if slope is None else torch.tensor([slope * 0.6931472])
        out, total = attention_op(q, k, v, *sees, slopes, scale, softcap)
        return out[0, 0, 0, 0].item(), total[0, 0, 0].item()

    yield "two keys of score 0, values 0 and 1: the mean, and log2 of 1 + 1", [0.5, 1.0], attend([0.0, 0.0], [0.0, 1.0])
    yield "scores 0 and 2, values 0 and 1: ⅘", 0.8, attend([0.0, 2.0], [0.0, 1.0])[0]
    yield "q kᵀ 0 and 1 with scale 2, values 0 and 1: ⅘", 0.8, attend([0.0, 1.0], [0.0, 1.0], scale=2.0)[0]
    many = [0.0] * 256
    yield "256 keys of score 0 and value 1, then one of score 8 and value 0: half and half, and log2 of 256 + 256", \
        [0.5, 9.0], attend([*many, 8.0], [*[1.0] * 256, 0.0])
    yield "first one of score 8 and value 1, then 256 of score and value 0: half and half, and log2 of 256 + 256", \
        [0.5, 9.0], attend([8.0, *many], [1.0, *many])
    yield "scores 0 and 1000, values 0 and 1: no overflow", 1.0, attend([0.0, 1000.0], [0.0, 1.0])[0]
    yield "scores −1000 and −1000, values 0 and 1: the mean", 0.5, attend([-1000.0, -1000.0], [0.0, 1.0])[0]
    yield "values 7 1 1 of score 0, and a query that does not see the first", 1.0, \
        attend([0.0, 0.0, 0.0], [7.0, 1.0, 1.0], first=1)[0]
    yield "values 1 1 7 of score 0, and a query that does not see the last", 1.0, \
        attend([0.0, 0.0, 0.0], [1.0, 1.0, 7.0], last=1)[0]
    yield "values 1 1 NaN of score 0, and a query that does not see the last", 1.0, \
        attend([0.0, 0.0, 0.0], [1.0, 1.0, float("nan")], last=1)[0]
    yield "two keys of score 0, values 0 and 1, ALiBi that halves with each place: 1 / (½ + 1)", 0.6667, \
        attend([0.0, 0.0], [0.0, 1.0], slope=1.0)[0]
    yield "q kᵀ 0 and 1000 · log 2, soft cap 2 · log 2, values 0 and 1: scores 0 and 2, ⅘", 0.8, \
        attend([0.0, 1000.0], [0.0, 1.0], softcap=2 * 0.6931472)[0]
