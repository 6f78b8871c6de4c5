"""The quantised product against nanollm/inference/quantize.py."""

import pytest
import torch

import kernels
from kernels.quantized import quantized_linear_op, row_kernel, rows_kernel, sum_kernel
from nanollm.inference.quantize import pack, quantize_weight, quantized_linear
from tests.kernels.checks import DEVICE, DTYPES, INTERPRETED, agree, between_nans, far, poisoned, programs_from


def real_launches():
    """For tests/kernels/compiled.py: a wide projection, and a narrow one whose inputs are split; one row, and a few;
    float32."""
    for bits in (4, 8):
        for N, K, M, dtype in ((28672, 8192, 1, torch.bfloat16), (28672, 8192, 4, torch.bfloat16),
                               (1024, 4096, 1, torch.float16), (28672, 8192, 2, torch.float32)):
            packed = torch.empty(N, K // 8, dtype=torch.int32) if bits == 4 else torch.empty(N, K, dtype=torch.int8)
            scale = torch.empty(N, K // 128 if bits == 4 else 1)
            zero = torch.empty(scale.shape, dtype=torch.int8) if bits == 4 else None
            kernels.quantized_linear(torch.empty(M, K, dtype=dtype), packed, scale, zero, None)


def inputs(N, K, bits, group, dtype, *leading):
    """x, and a weight N(0, 0.25) with a bias, quantised: packed, s, z, b."""
    packed, scale, zero = quantize_weight(torch.randn(N, K) / 2, bits, group)
    return torch.randn(*leading, K).to(dtype), packed, scale, zero, torch.randn(N).to(dtype)


def held(*given):
    """`agree` without gradients: there are none."""
    with torch.no_grad():
        agree(kernels.quantized_linear, quantized_linear, *given, backward=False)


FORMATS = [(4, 32), (4, 64), (4, 128), (8, None)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits, group", FORMATS)
@pytest.mark.parametrize("leading", [(1, 1), (2,), (5,), (2, 8)], ids=str)
def test_a_few_rows(leading, bits, group, dtype):
    held(*inputs(20, 640, bits, group, dtype, *leading))


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("bits, group", FORMATS)
@pytest.mark.parametrize("N, K", [(1, 128), (7, 384), (65, 128), (9, 1152)])
def test_sizes_that_no_tile_divides(N, K, bits, group, M):
    held(*inputs(N, K, bits, group, torch.bfloat16, M))


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("bits, K", [(4, 32), (4, 96), (8, 16), (8, 48)])
def test_less_than_a_tile(bits, K, M):
    held(*inputs(5, K, bits, 32, torch.float16, M))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits, group", FORMATS)
@pytest.mark.parametrize("M", [1, 4])
def test_split_inputs(M, bits, group, dtype, monkeypatch):
    """Few outputs and many inputs: the programs of a device share them, and a bias is added once."""
    splits, launched = [], sum_kernel.run
    monkeypatch.setattr(sum_kernel, "run", lambda *args, **kwargs: splits.append(args[3]) or launched(*args, **kwargs))
    held(*inputs(3, 5 * 512 + 128, bits, group, dtype, M))
    assert splits[0] > 1 or not INTERPRETED


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits, group", FORMATS)
def test_integers_exactly(bits, group, dtype, M):
    """Small integers and scales of a power of two leave nothing to round: each code in each place must be right."""
    N, K, low = 17, 256, 0 if bits == 4 else -128
    codes = torch.randint(low, low + 2**bits, (N, K), dtype=torch.int32)
    codes[0], codes[1], codes[2], codes[3, ::2] = low, low + 2**bits - 1, 2 ** (bits - 1) - 1, low
    scale = torch.randint(-2, 3, (N, K // group if bits == 4 else 1)).float().exp2()
    zero = torch.randint(0, 16, scale.shape, dtype=torch.int8) if bits == 4 else None
    if bits == 4:
        zero[0], zero[1], zero[2] = 15, 0, 7
    x = torch.zeros(M, K)
    x[:, torch.randperm(K)[:5]] = torch.randint(-3, 4, (M, 5)).float()
    packed = pack(codes) if bits == 4 else codes.to(torch.int8)
    assert bits == 8 or (packed[1] == -1).all()                 # the sign bit is a bit of the last code
    shifted = codes.double() - (0 if zero is None else zero.double().repeat_interleave(group, 1))
    right = x.double() @ (shifted * scale.double().repeat_interleave(K // scale.shape[1], 1)).T
    given = (x.to(dtype), packed, scale, zero, None)
    ours = kernels.quantized_linear(*(t if t is None else t.to(DEVICE) for t in given))
    assert torch.equal(ours.double().cpu(), right.to(dtype).double())


def test_the_order_of_sums_is_always_the_same_and_nothing_is_read_beyond():
    given = [t.to(DEVICE) for t in inputs(40, 640, 4, 64, torch.float16, 3)]
    with poisoned():
        first, *others = [kernels.quantized_linear(*map(between_nans, given)) for _ in range(3)]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.slow
def test_as_torch_sees_it():
    for bits, group in FORMATS[2:]:
        x, *rest = (None if t is None else t.to(DEVICE) for t in inputs(24, 256, bits, group, torch.float32, 2, 3))
        torch.library.opcheck(quantized_linear_op, (x, *rest), test_utils=("test_schema", "test_faketensor"))

        def double(x, rest=rest):
            first = kernels.quantized_linear(x, *rest)[..., :1]
            return kernels.quantized_linear(first.expand_as(x).contiguous(), *rest)

        with torch.no_grad():
            assert torch.equal(torch.compile(double, fullgraph=True, backend="aot_eager")(x), double(x))


@pytest.mark.skipif(not INTERPRETED, reason="runs one program out of many, which only the interpreter can")
@pytest.mark.parametrize("kernel, M, options", [
    (row_kernel, 1, dict(BN=8, BLOCKS=16, STAGES=1)),
    (rows_kernel, 2, dict(BN=8, BLOCKS=4, ROWS=16)),
])
def test_beyond_two_to_the_31_elements(kernel, M, options):
    """The last outputs of a weight of 2³⁴ codes, and partial sums of more than 2³¹ numbers."""
    N, K = 2**26 + 8, 288
    x, tail = torch.randn(M, K).half(), inputs(8, K, 4, 32, torch.float16, 1)[1:4]
    packed, scale, zero = (far((N, t.shape[1]), t.dtype) for t in tail)
    for whole, last in zip((packed, scale, zero), tail, strict=True):
        whole[-8:] = last
    out = far((M, N), torch.float16)
    constants = dict(BITS=4, BLOCKS_A_GROUP=1, BIAS=False) | options
    with programs_from(N // 8 - 1):
        kernel[(1, 1, 1)](x, packed, scale, zero, None, out, M, N, K // 32, **constants)
    torch.testing.assert_close(out[:, -8:], quantized_linear(x, *tail, None), rtol=2e-3, atol=2e-3)

    N, splits = 2**28, 9
    partial, y = far((splits, 1, N), torch.float32), torch.empty(N)
    partial[-1, 0, -512:] = torch.randn(512)
    with programs_from(N // 512 - 1):
        sum_kernel[(1, 1)](partial, None, y, splits, N, BIAS=False, BLOCK=512)
    assert torch.equal(y[-512:], partial[-1, 0, -512:])


X, PACKED = torch.zeros(2, 128), torch.zeros(6, 16, dtype=torch.int32)
SCALE, ZERO = torch.ones(6, 4), torch.zeros(6, 4, dtype=torch.int8)
EIGHT = torch.zeros(6, 128, dtype=torch.int8)


@pytest.mark.parametrize("given, reason", [
    ((torch.zeros(17, 128), PACKED, SCALE, ZERO, None), "x has 17 rows, supported are up to 16"),
    ((torch.zeros(0, 128), PACKED, SCALE, ZERO, None), "nothing in x"),
    ((torch.zeros(2, 120), PACKED, SCALE, ZERO, None), "x has shape (2, 120), packed holds 128 inputs"),
    ((X, PACKED.long(), SCALE, ZERO, None), "packed is int64 of 2 dimensions"),
    ((X, PACKED, torch.ones(6, 8), ZERO, None), "scale has shape (6, 8), expected 6 rows of groups"),
    ((X, PACKED, SCALE.half(), ZERO, None), "scale is float16, expected float32"),
    ((X, PACKED, SCALE, None, None), "zero must be int8"),
    ((X, PACKED, SCALE, ZERO.int(), None), "zero must be int8"),
    ((X, EIGHT, SCALE[:, :1], ZERO, None), "8 bits need a scale of shape (6, 1), no zero"),
    ((torch.zeros(2, 24), EIGHT[:, :24], SCALE[:, :1], None, None), "a multiple of 16 inputs"),
    ((X, PACKED, SCALE, ZERO, torch.zeros(5)), "bias has shape (5,), expected (6,)"),
    ((torch.zeros(128, 2).T, PACKED, SCALE, ZERO, None), "rows must follow one another"),
    ((torch.zeros(2, 128, requires_grad=True), PACKED, SCALE, ZERO, None), "there is no backward"),
    ((X.double(), PACKED, SCALE, ZERO, None), "float64, supported are"),
    ((X, PACKED, SCALE, ZERO.to("meta"), None), "zero is on meta"),
])
def test_refusals(given, reason):
    with pytest.raises(ValueError, match="kernels.quantized_linear.*" + reason.replace("(", r"\(").replace(")", r"\)")):
        kernels.quantized_linear(*given)
