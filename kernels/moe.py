"""Mixture of experts: every token through the k experts that its router chose, as a few products over all experts.

    y[n] = Σ_j w[n, j] · down_e (act(g) ⊙ u),     g = gate_e x[n],  u = up_e x[n],  e = chosen[n, j]
    (nanollm/layers/moe.py)

Shapes: N tokens, k experts a token, R = N·k rows (one a choice), E experts, D model width, F width of an expert.
    x, y (N, D);   gate, up (E, F, D);   down (E, D, F);   w (N, k) float32;   chosen (N, k);   g, u, h (R, F).

Roofline. Three products forward, six backward, each 2RDF FLOPs:
    forward 6RDF, backward 12RDF FLOPs;   with few rows an expert, bytes: the weights of the experts that were hit, 6DF
    each in bf16.
    R/E FLOPs a byte: an H200 is balanced at 184 rows an expert; with fewer it reads weights, with more its tensor cores
    are the limit.

    order = stable sort of the R choices n·k + j by expert; expert e has the rows bounds[e] to bounds[e + 1] of it

        x   (N, D) ──gather──┬─ gate_e ─→ g ─┐                                order[row] // k is the token of a row
                             └─ up_e   ─→ u ─┴─ act(g) ⊙ u ─→ h (R, F)        one program: two products of one x
        h   (R, F) ──────────── down_e ─→ rows (R, D), at order[row]          so that a token's k rows are side by side
        rows (N, k, D) ── Σ_j w[n, j] · ─→ y (N, D)                           float32, in the order of j: no atomics

A program computes one tile of rows of one expert by one block of columns (kernels/grouped.py). Sorting, counting and
the list of tiles stay on the device.

Backward. With s = down_eᵀ dY[n], a vector of F for each row, everything follows row by row:

    dw = ⟨down_e h, dY⟩ = ⟨h, s⟩          the rows of the forward need not be kept, nor h, which g and u give again
    dh = w·s;   du = dh ⊙ act(g);   dg = dh ⊙ u ⊙ act′(g)
    dx[n] = Σ_j gate_eᵀ dg + up_eᵀ du     both products in one program, then the sum over the token's k rows
    dgate_e = Σ_rows dg ⊗ x;   dup_e = Σ_rows du ⊗ x;   ddown_e = Σ_rows dY ⊗ w·h         over the rows of an expert

Kept from the forward are g, u and the order: 2RF numbers, where autograd of the definition keeps 4RF + 2RD.
g, u, h and the rows are rounded to the working dtype, as the definition rounds them; the sum over j is rounded once.
"""

import torch
import triton
from torch import Tensor

from kernels.activation import ACTIVATIONS
from kernels.common import NEVER, operation, tuned, unlike
from kernels.grouped import back_kernel, combine_kernel, gates_backward_kernel, outer_kernel, table_kernel, up_kernel


def by_expert(chosen: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """chosen (N, k) → order (R,): the choices n·k + j sorted by expert, those of one expert in the order of the tokens;
    bounds (E + 1,) int32: expert e has the rows bounds[e] to bounds[e + 1] of it."""
    experts, order = chosen.flatten().sort(stable=True)
    return order, torch.searchsorted(experts, torch.arange(E + 1, device=chosen.device), out_int32=True)


def tile_table(bounds: Tensor, R: int, ROWS: int) -> Tensor:
    """(2, tiles) int32: expert and first row of each tile; expert −1 for those that nobody needs, which come last."""
    E = bounds.numel() - 1
    table = bounds.new_empty(2, R // ROWS + min(E, R))
    with torch.cuda.device_of(bounds):
        table_kernel[(E + 1,)](bounds, table, table.shape[1], E, ROWS, BLOCK=max(128, triton.next_power_of_2(E)))
    return table


def tiling(name: str, x: Tensor, R: int, E: int) -> dict[str, int]:
    """The tuned sizes of a product, by the rows of an expert on average. float32, without tensor cores, has its own."""
    return tuned(name + "_float32" if x.dtype == torch.float32 else name, triton.cdiv(R, E), x.device)


# ---- the operations as torch sees them

@torch.library.custom_op("nanollm::expert_mlp", mutates_args=())
def expert_mlp_op(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, weights: Tensor, chosen: Tensor, activation: str,
                  save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, and for the backward g, u (empty unless save), order, bounds."""
    (E, F, D), (N, K) = gate.shape, chosen.shape
    R = N * K
    order, bounds = by_expert(chosen, E)
    y, g, u, _, _ = expert_mlp_fake(x, gate, up, down, weights, chosen, activation, save)
    h, rows = x.new_empty(R, F), x.new_empty(R, D)
    ROWS = tuned("moe_rows", triton.cdiv(R, E), x.device)["ROWS"]
    table = tile_table(bounds, R, ROWS)
    tiles = table.shape[1]
    with torch.cuda.device_of(x):
        meta = tiling("moe_up", x, R, E)
        up_kernel[(tiles * triton.cdiv(F, meta["COLUMNS"]),)](
            x, gate, up, order, bounds, table, h, g, u, tiles, D, F, K=K, ACT=activation, SAVE=save, ROWS=ROWS, **meta)
        meta = tiling("moe_down", x, R, E)
        back_kernel[(tiles * triton.cdiv(D, meta["COLUMNS"]),)](
            h, down, None, None, rows, order, bounds, table, tiles, D, F, PAIR=False, ROWS=ROWS, **meta)
        combine(rows, weights, y)
    return y, g, u, order, bounds


def combine(rows: Tensor, weights: Tensor | None, y: Tensor) -> None:
    """y (N, D) = the sum of each token's rows, weighted where there are weights."""
    (N, D), meta = y.shape, tuned("moe_combine", y.shape[1], y.device)
    combine_kernel[(N, triton.cdiv(D, meta["COLUMNS"]))](
        rows, weights, y, D, K=rows.shape[0] // N, WEIGHTED=weights is not None, **meta)


@expert_mlp_op.register_fake
def expert_mlp_fake(x, gate, up, down, weights, chosen, activation, save):
    kept = (chosen.numel() if save else 0, gate.shape[1])
    return (x.new_empty(x.shape), x.new_empty(kept), x.new_empty(kept),
            chosen.new_empty(chosen.numel()), chosen.new_empty(gate.shape[0] + 1, dtype=torch.int32))


@torch.library.custom_op("nanollm::expert_mlp_backward", mutates_args=())
def expert_mlp_backward_op(
    dy: Tensor, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, weights: Tensor, g: Tensor, u: Tensor,
    order: Tensor, bounds: Tensor, activation: str, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dgate, dup, ddown (empty unless wanted), and dw."""
    (E, F, D), (N, K) = gate.shape, weights.shape
    R = N * K
    dx, dgate, dup, ddown, _ = expert_mlp_backward_fake(
        dy, x, gate, up, down, weights, g, u, order, bounds, activation, wanted)
    ROWS = tuned("moe_rows_backward", triton.cdiv(R, E), x.device)["ROWS"]
    table = tile_table(bounds, R, ROWS)
    tiles = table.shape[1]
    with torch.cuda.device_of(x):
        meta = tiling("moe_gates_backward", x, R, E)
        blocks = triton.cdiv(F, meta["COLUMNS"])
        dg, du, wh = torch.empty_like(g), torch.empty_like(g), torch.empty_like(g)
        shares = weights.new_empty(N, K, blocks)
        gates_backward_kernel[(tiles * blocks,)](
            dy, down, weights, g, u, order, bounds, table, dg, du, wh, shares, tiles, D, F,
            K=K, ACT=activation, ROWS=ROWS, **meta)
        if wanted[0]:
            meta, rows = tiling("moe_up_backward", x, R, E), x.new_empty(R, D)
            back_kernel[(tiles * triton.cdiv(D, meta["COLUMNS"]),)](
                dg, gate, du, up, rows, order, bounds, table, tiles, D, F, PAIR=True, ROWS=ROWS, **meta)
            combine(rows, None, dx)
        meta = tiling("moe_outer", x, R, E)
        grid = (triton.cdiv(F, meta["F_BLOCK"]) * triton.cdiv(D, meta["D_BLOCK"]), E)
        for want, a, b, out in zip(wanted[1:], (dg, du, wh), (x, x, dy), (dgate, dup, ddown), strict=True):
            if want:
                outer_kernel[grid](a, b, out, order, bounds, D, F, K=K, TRANSPOSE=out is ddown, **meta)
    return dx, dgate, dup, ddown, shares.sum(-1)


@expert_mlp_backward_op.register_fake
def expert_mlp_backward_fake(dy, x, gate, up, down, weights, g, u, order, bounds, activation, wanted):
    parts = zip((x, gate, up, down), wanted, strict=True)
    return (*(t.new_empty(t.shape if want else (0,)) for t, want in parts), weights.new_empty(weights.shape))


def _save(ctx, inputs, output):
    x, gate, up, down, weights, _, ctx.activation, _ = inputs
    ctx.save_for_backward(x, gate, up, down, weights, *output[1:])
    ctx.set_materialize_grads(False)            # g and u have no gradients: no zeros are made for them


def _backward(ctx, dy, *_):
    *wanted, weighted = ctx.needs_input_grad[:5]
    *grads, dweights = expert_mlp_backward_op(dy.contiguous(), *ctx.saved_tensors, ctx.activation, wanted)
    grads = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    return *grads, dweights if weighted else None, None, None, None


expert_mlp_op.register_autograd(_backward, setup_context=_save)


def _refuses(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, weights: Tensor, chosen: Tensor,
             activation: str) -> str | None:
    if x.ndim != 2 or gate.ndim != 3 or chosen.ndim != 2:
        return f"x, gate and chosen must have 2, 3 and 2 dimensions, they have {x.ndim}, {gate.ndim} and {chosen.ndim}"
    (N, D), (E, F, _), (_, k) = x.shape, gate.shape, chosen.shape
    expected = {"gate": (gate, (E, F, D)), "up": (up, (E, F, D)), "down": (down, (E, D, F)),
                "chosen": (chosen, (N, k)), "weights": (weights, (N, k))}
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            return f"{name} has shape {tuple(tensor.shape)}, expected {shape}"
        if not tensor.is_contiguous():
            return f"{name} must be contiguous"
        if name in ("gate", "up", "down") and tensor.dtype != x.dtype:
            return f"{name} is {str(tensor.dtype)[6:]}, x is {str(x.dtype)[6:]}"
    if not x.is_contiguous():
        return "x must be contiguous"
    if weights.dtype != torch.float32 or chosen.dtype != torch.int64:
        found = f"{str(weights.dtype)[6:]} and {str(chosen.dtype)[6:]}"
        return f"weights and chosen must be float32 and int64, they are {found}"
    if min(N, k, E, F, D) < 1 or max(N * k, D, F) >= NEVER or E > 4096:
        found = f"{N} tokens by {k} of {E} experts, widths {D} and {F}"
        return f"{found}: supported are sizes from 1 to below 2³¹ and up to 4096 experts"
    if activation not in ACTIVATIONS:
        return f"activation is {activation!r}, supported are {', '.join(ACTIVATIONS)}"
    return unlike(x, gate=gate, up=up, down=down, weights=weights, chosen=chosen)


@operation(_refuses)
def expert_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, weights: Tensor, chosen: Tensor,
               activation: str) -> Tensor:
    """x (N, D), gate and up (E, F, D), down (E, D, F), weights (N, k) float32, chosen (N, k) int64 → (N, D) as x."""
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, gate, up, down, weights))
    return expert_mlp_op(x, gate, up, down, weights, chosen, activation, save)[0]
