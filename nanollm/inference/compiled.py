"""Decoding on a CPU as compiled code: a program for each kind of layer that runs it for one new token, and another for
the prompt that a sequence begins with.

    model = compile_decoding(checkpoints.load(folder))
    compile_decoding(model, rows=(1, 4))                        programs for one row and for four, of any lengths

PyTorch runs a token as some thousand small operations, and between two of them the weights that stream by have thrown
the next one's code out of the caches: half of the time goes there. torch's compiler (Inductor) makes a few loops in C++
of a layer instead. Two of its operations are written out here, as sums that it turns into one loop with what
surrounds them:

    product      y_n = Σ_k W_nk x_k            outputs n, n + N/8, n + 2N/8 … at a time: memory answers eight streams
                                               that lie far apart sooner than one (17 GB/s in place of 11)
                 y_n = s_n Σ_k Q_nk x_k        the same of weights in 8 bits
    attention    y = Σ_s softmax(q·k_s)_s v_s  of one query, over the keys that are there

Layers of one config share a program: their weights and states are its inputs. How many keys there are, and for how many
a cache has room, is open, and so are the numbers of the experts that a token chooses. A prompt gains by what stands
between its products: norms, rotation and gate are a loop each. Short prompts and other batches run as before, and so
does a layer that cannot be traced (of several rows, one with experts); a warning says so, once.

Sums are rounded less often than in the model as it was, so logits in bfloat16 differ by as much as two orders of
summation do. Tracing and compiling take a C++ compiler and, the first time on a machine, up to a minute; torch keeps
the result on disk.

Shapes: n rows, T = 1. D model width, N outputs, K inputs, H query heads, K key/value heads, S keys, d head width.
"""

import copy
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nanollm import ops
from nanollm.config import MLP
from nanollm.config.positions import places
from nanollm.errors import InputError
from nanollm.inference.prepare import head_product, linears, side_by_side, widen
from nanollm.inference.quantize import QuantizedLinear
from nanollm.inference.rows import RowCache
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.state import KVCache, SlotMapping, State
from nanollm.model import Decoder

Program = Callable[..., Sequence[Tensor]]
STREAMS = 8
LEAST_PROMPT = 128      # tokens; shorter ones choose other products, see cpu_products.few
MOST_ROWS = 4           # of 4 rows the loop of a product takes 1.5 times as long as of one, of 8 rows 3.5 times
SERVED = 1, MOST_ROWS   # rows that an engine with compiled steps has programs for: two and three run as four
# a program's own frame in C++ too, and without looking at each weight's strides at each call: 3 ms a token of SmolLM2
OPTIONS = {"cpp_wrapper": True, "size_asserts": False}


def compile_decoding(model: Decoder, head_bits: int | None = None, rows: Sequence[int] = (1,)) -> Decoder:
    """Let each layer and the head of a model run compiled where one token a row follows, in place; return the model.

    On another device than a CPU, or where kernels were asked for by NANOLLM_KERNELS=triton, nothing is done.
    head_bits: 8 for a head in 8 bits, as in `prepare`. rows: the numbers of rows to make programs for, each at most
    MOST_ROWS.

    The programs are made here, by a few tokens of no meaning. InputError for a model that was compiled before."""
    if not model.embed.weight.is_cpu or ops.mode() == "triton":
        return model
    if any(isinstance(layer, CompiledBlock) for layer in model.layers):
        raise InputError("the model is compiled already")
    for owner in side_by_side(model):
        for name, linear in linears(owner):
            widen(owner, name, linear)
    programs: dict[Any, Program | None] = {}
    for index, layer in enumerate(model.layers):
        model.layers[index] = CompiledBlock(layer, model.config.layers[index], programs, rows)
    model.head.packed = CompiledProduct(head_product(model.head, head_bits), rows)
    for n in rows:
        cache = RowCache(model, n, 8)
        for _ in range(4):
            cache.read_together(0, [[0]] * n)
    if (places(model.config.positions) or LEAST_PROMPT) >= LEAST_PROMPT:        # or no prompt is as long
        RowCache(model, 1, LEAST_PROMPT + 1).read_together(0, [[0] * LEAST_PROMPT])
    return model


def has_compiler() -> bool:
    """Whether torch finds the C++ compiler that it would call."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return bool(get_cpp_compiler())
    except RuntimeError:
        return False


class CompiledBlock(nn.Module):
    """A block that runs compiled where it can."""
    lock = threading.Lock()

    def __init__(self, block: nn.Module, config: Any, programs: dict[Any, Program | None],
                 rows: Sequence[int] = (1,)) -> None:
        super().__init__()
        self.block, self.config, self.programs, self.rows = block, config, programs, rows
        self.rotation = rotation_of(config.mixer)
        self.ready: dict[Any, tuple[list[Tensor], Program | None]] = {}         # inputs → weights and program

    def forward(self, x: Tensor, ctx: ForwardContext, state: State | None = None) -> Tensor:
        """x (n, T, D) → (n, T, D), as the block; compiled for one token of each of so many rows as there are programs
        for, and for a prompt."""
        slots = ctx.slots(state) if isinstance(state, KVCache) else None
        prompt = slots is not None and slots.fresh
        if state is None or torch.is_grad_enabled() or not x.is_cpu or not (
                self.takes_prompt(x, ctx, state) if prompt else self.takes_step(x, ctx)):
            return self.block(x, ctx, state)
        tensors = [x, ctx.positions, *(ctx.rotation(*self.rotation) if self.rotation else ()),
                   *((slots.index, slots.key_positions) if slots else ()), *contiguous(state)]
        kind = x.dtype, type(state), len(x), prompt
        if kind not in self.ready:
            self.ready[kind] = self.program(kind, tensors, ctx, slots, state)
        weights, program = self.ready[kind]
        return self.block(x, ctx, state) if program is None else program(*tensors, *weights)[0]

    def takes_step(self, x: Tensor, ctx: ForwardContext) -> bool:
        """Whether there is a program for this call, of one token a row."""
        return x.shape[1] == 1 and len(x) in self.rows and ctx.regular == (len(x) == 1)

    def takes_prompt(self, x: Tensor, ctx: ForwardContext, state: State) -> bool:
        """The same of a call that begins a sequence, in one row. A layer with a scan or experts takes it as it is: what
        they run follows the length, or the choices of the router."""
        plain = type(state) is KVCache and not state.ring and isinstance(self.config.ffn, MLP)
        traced = any(program is not None for _, program in self.ready.values())
        return plain and traced and len(x) == 1 and x.shape[1] >= LEAST_PROMPT and ctx.regular

    def program(self, kind: Any, tensors: list[Tensor], ctx: ForwardContext, slots: SlotMapping | None,
                state: State) -> tuple[list[Tensor], Program | None]:
        """The weights of this block, and the program of all blocks like it, made by the first."""
        places = weight_places(self.block)
        weights, _ = pytree.tree_flatten([owner[name] for owner, name in places])
        key = kind, self.config, tuple((tuple(weight.shape), weight.dtype) for weight in weights)
        with self.lock:
            if key not in self.programs:
                self.programs[key] = compile_step(self, places, tensors, weights, ctx, slots, state)
            return weights, self.programs[key]


class CompiledProduct(nn.Module):
    """The product of the head, compiled for these numbers of rows."""

    def __init__(self, linear: nn.Module, rows: Sequence[int] = (1,)) -> None:
        super().__init__()
        self.linear, self.rows = linear, rows
        self.ready: dict[Any, tuple[list[Tensor], Program | None]] = {}

    def forward(self, x: Tensor) -> Tensor:                     # (…, D) → (…, V)
        kind = x.dtype, x.shape[:-1].numel()
        if kind[1] not in self.rows or torch.is_grad_enabled() or not x.is_cpu:
            return self.linear(x)
        rows = x.reshape(kind[1], -1)
        if kind not in self.ready:
            self.linear(rows)                   # puts scales into this dtype
            self.ready[kind] = self.program(rows)
        weights, program = self.ready[kind]
        return self.linear(x) if program is None else program(rows, *weights)[0].view(*x.shape[:-1], -1)

    def program(self, row: Tensor) -> tuple[list[Tensor], Program | None]:
        """The weights, and the program that takes them."""
        places = weight_places(self.linear)
        weights, arrangement = pytree.tree_flatten([owner[name] for owner, name in places])

        def run(row: Tensor, *values: Tensor) -> tuple[Tensor]:
            with replaced(places, pytree.tree_unflatten(values, arrangement)):
                return (self.linear(row),)

        return weights, compile_function("the head is", run, [row], weights)


# ---- from Python to a program

def compile_function(what: str, function: Callable[..., tuple[Tensor]], tensors: Sequence[Tensor],
                     weights: Sequence[Tensor], open_dims: Mapping[int, int] | None = None,
                     endless: bool = False) -> Program | None:
    """A program that gives what the function gives, of tensors and weights of these shapes; None, with a warning that
    begins with `what`, where it cannot be traced, compiled or run.

    The function may change tensors. open_dims: number of a tensor → the one dimension of it that may have any size of 2
    and more. endless: that may be large beside anything that the function compares it with, such as a window."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    fake_mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))

    def fake(number: int, tensor: Tensor) -> Tensor:
        """Its shape without its values."""
        plain = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)  # none of inference mode
        if open_dims is None or number not in open_dims:
            return fake_mode.from_tensor(plain, static_shapes=True)
        sizes = [DimDynamic.DYNAMIC if at == open_dims[number] else DimDynamic.STATIC for at in range(plain.ndim)]
        return fake_mode.from_tensor(plain, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    try:
        with torch.inference_mode(False), torch.no_grad():
            fakes: list[Any] = [fake(number, tensor) for number, tensor in enumerate([*tensors, *weights])]
            with fake_mode:
                graph = make_fx(function, decomposition_table=WRITTEN_OUT)(*fakes)
            if endless:
                need_any_size(fake_mode.shape_env)
            program = torch._inductor.compile(graph, fakes, options=OPTIONS)
        program(*(tensor.clone() for tensor in tensors), *weights)              # a trial
        return program
    except Exception as error:                  # whatever the compiler stumbles over, the model runs without it
        reason = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(f"{what} not compiled: {reason[0][:200]}", stacklevel=2)
        return None


def need_any_size(shapes: Any) -> None:
    """Raise InputError where Python chose by a size, and would have chosen otherwise were all of them much larger."""
    larger = {symbol: hint + 2**20 for symbol, hint in shapes.backed_var_to_val.items()}
    for guard in shapes.guards:
        if guard.expr.xreplace(larger) != True:  # noqa: E712  # an expression of sympy's
            raise InputError(f"they ask for a size: {guard.expr}")


def compile_step(block: CompiledBlock, places: list[tuple[dict[str, Any], str]], tensors: list[Tensor],
                 weights: list[Tensor], ctx: ForwardContext, slots: SlotMapping | None,
                 state: State) -> Program | None:
    """A program of `tensors` and `weights` that gives what the block gives, and changes the state as it does."""
    first = len(tensors) - len(tensors_of(state))               # here those of the state begin
    _, arrangement = pytree.tree_flatten([owner[name] for owner, name in places])
    open_dims: dict[int, int] = {}
    if slots is not None:
        open_dims = {first - 1: 1} | dict.fromkeys((first, first + 1), 2)      # keys and values come first
    prompt = slots is not None and slots.fresh
    if prompt:
        open_dims |= {0: 1, 1: 1, first - 2: 1} | dict.fromkeys(range(2, first - 2), 2)

    def step(*values: Tensor) -> tuple[Tensor]:
        """The block's forward pass with these values in the places of its own."""
        if any(getattr(part, "HANDS_ON", False) for part in (block.block.mixer, block.block.end)):
            raise InputError("they read what is no part of them")
        given, own = list(values[: len(tensors)]), values[len(tensors) :]
        x, positions = given[:2]
        mapping = None
        if slots is not None:
            index, key_positions = given[first - 2 : first]
            mapping = with_values(slots, index=index, key_positions=key_positions, used=key_positions.shape[1],
                                  rows=torch.arange(len(x))[:, None])
        traced = ForwardContext(positions, len(x) == 1, ctx.dtype, Lengths(positions[:, -1] + 1, mapping))
        if block.rotation:
            traced.once(("rotation", *block.rotation), lambda: (given[2], given[3]))
        before, after = with_tensors(state, given[first:]), with_tensors(state, given[first:])
        with replaced(places, pytree.tree_unflatten(own, arrangement)):
            y = block.block(x, traced, after)
        for old, new in zip(tensors_of(before), tensors_of(after), strict=True):
            if new is not old:
                old.copy_(new)
        return (y,)

    parts = [type(part).__name__ for part in (block.config.mixer, block.config.ffn) if part is not None]
    what = f"layers with {' and '.join(parts)} are"
    return compile_function(what, step, tensors, weights, open_dims, endless=prompt)


class Lengths:
    """What a block asks of a cache (state.RowLengths)."""

    def __init__(self, lengths: Tensor, mapping: SlotMapping | None) -> None:
        self.lengths, self.mapping = lengths, mapping

    def slots(self, state: KVCache, positions: Tensor) -> SlotMapping:
        assert self.mapping is not None
        return self.mapping


# ---- operations written out

def realized(x: Tensor) -> Tensor:
    """x, computed before the loop that reads it and not in each of its rounds."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def row_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (n, K), Wᵀ (K, N) → (n, N), for few rows: in one loop, so that each weight is read once."""
    if x.shape[0] > MOST_ROWS or not x.is_floating_point():
        return NotImplemented
    outputs, x32 = weight.t(), realized(x.float())
    streams = STREAMS if outputs.shape[0] % STREAMS == 0 else 1
    parts = outputs.reshape(streams, outputs.shape[0] // streams, -1).unbind()
    return torch.stack([torch.cat([(part.float() * row).sum(-1) for part in parts], -1) for row in x32]).to(x.dtype)


def row_product_plus(bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """b + x Wᵀ."""
    if x.shape[0] > MOST_ROWS or beta != 1 or alpha != 1:
        return NotImplemented
    return bias + row_product(x, weight)


def attend_one(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, *,
               attn_mask: Tensor | None = None, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """q (n, K, G, d), k and v (n, K, S, d) → (n, K, G, d); softmax and sums in float32."""
    if causal or q.shape[2] >= LEAST_PROMPT:                    # a prompt: its queries are T, and torch's loop is good
        return NotImplemented
    q32 = realized(q.float() * (q.shape[-1] ** -0.5 if scale is None else scale))
    scores = (q32[:, :, :, None] * k.float()[:, :, None]).sum(-1)                       # (1, K, G, S)
    if attn_mask is not None:
        least = torch.finfo(torch.float32).min   # not −∞: a row that is idle, and sees nothing, would become NaN
        scores = (scores + attn_mask).clamp(min=least)
    p = realized((scores - scores.amax(-1, keepdim=True)).exp())
    total = realized(p.sum(-1, keepdim=True))
    return ((p[..., None] * v.float()[:, :, None]).sum(-2) / total).to(q.dtype), total[..., 0]


def row_product8(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """x (n, K), Q (N, K) int8, s (N,) → (n, N)."""
    if x.shape[0] > MOST_ROWS:
        return NotImplemented
    return (scales.float() * row_product(x.float(), codes.t())).to(x.dtype)


aten = torch.ops.aten
WRITTEN_OUT: dict[Any, Callable[..., Any]] = {
    aten.mm.default: row_product,
    aten.addmm.default: row_product_plus,
    aten._weight_int8pack_mm.default: row_product8,
    aten._scaled_dot_product_flash_attention_for_cpu.default: attend_one,
}


# ---- the tensors of a block

def rotation_of(mixer: Any) -> tuple[Any, int] | None:
    """What the mixer asks of `ForwardContext.rotation`."""
    mixer = getattr(mixer, "attention", mixer)
    rope = getattr(mixer, "rope", None)
    return None if rope is None else (rope, getattr(mixer, "rope_dim", None) or mixer.head_dim)


def weight_places(block: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where the weights of a block are: a dictionary and a key each."""
    places: list[tuple[dict[str, Any], str]] = []
    for module in block.modules():
        if isinstance(module, QuantizedLinear) and module.ordered is not None:
            places += [(vars(module), "ordered"), (module._buffers, "scale"), (module._buffers, "bias")]
        else:
            owners: list[dict[str, Any]] = [module._parameters, module._buffers]
            places += [(owner, name) for owner in owners for name in owner]
    return [(owner, name) for owner, name in places if owner[name] is not None]


@contextmanager
def replaced(places: Sequence[tuple[dict[str, Any], str]], values: Sequence[Any]) -> Iterator[None]:
    """Put values in their places, for a while."""
    before = [owner[name] for owner, name in places]
    try:
        for (owner, name), value in zip(places, values, strict=True):
            owner[name] = value
        yield
    finally:
        for (owner, name), value in zip(places, before, strict=True):
            owner[name] = value


def tensors_of(state: State) -> list[Tensor]:
    """The tensors that a state is made of."""
    if type(state) is KVCache:                   # as below, ten times as fast: asked for each layer and token
        return [state.k, state.v]
    return [leaf for leaf in pytree.tree_leaves(vars(state)) if isinstance(leaf, Tensor)]


def contiguous(state: State) -> list[Tensor]:
    """The same, each made contiguous: programs read no strides, and a prompt may leave views of other tensors."""
    tensors = tensors_of(state)
    if not all(tensor.is_contiguous() for tensor in tensors):
        tensors = [tensor.contiguous() for tensor in tensors]
        vars(state).update(vars(with_tensors(state, tensors)))
    return tensors


def with_tensors(state: State, tensors: Sequence[Tensor]) -> Any:
    """The same state made of other tensors."""
    given = iter(tensors)
    values = pytree.tree_map(lambda leaf: next(given) if isinstance(leaf, Tensor) else leaf, vars(state))
    return with_values(state, **values)


def with_values(thing: Any, **values: Any) -> Any:
    """A copy with other values of some attributes."""
    new = copy.copy(thing)
    vars(new).update(values)
    return new
