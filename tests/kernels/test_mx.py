"""mx_quantize against the specification written out in float64, and what it must keep."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tests.kernels.specimen import item
from tests.kernels.test_quant import E4M3, E5M2, EDGES, SHIFT, _encode

from warploom.kernels.quant import mx_quantize

EXPONENT = {E4M3: 8, E5M2: 15}


def _spec(x, dtype, rounding):
    """Codes and bytes of the scales of `[T, D]` float32, block by block, in float64."""
    tokens, width = x.shape
    codes = np.zeros(x.shape, np.uint8)
    scales = np.zeros((tokens, -(-width // 32)), np.uint8)
    for i, j in np.ndindex(*scales.shape):
        part = np.s_[i, j * 32 : (j + 1) * 32]
        a = np.abs(x[part].astype(np.float64)).max()
        if not np.isfinite(a):
            scales[i, j] = 255
            with np.errstate(all="ignore"):
                codes[part] = _encode(x[part] * np.float32(0), dtype)
            continue
        if rounding == "ceil":
            a = float(np.float32(a) / np.float32(SHIFT[dtype][2]))  # the quotient is rounded
        fraction, exponent = np.frexp(a)  # a = fraction 2^exponent, fraction in [0.5, 1)
        power = exponent - 1 - EXPONENT[dtype] if rounding == "floor" else exponent
        power -= rounding == "ceil" and fraction == 0.5
        power = max(int(power), -127) if a else -127
        scales[i, j] = power + 127
        codes[part] = _encode(x[part].astype(np.float64) * 2.0**-power, dtype)
    return codes, scales


def _same(x, dtype, rounding, data, scale):
    codes, scales = _spec(x, dtype, rounding)
    assert torch.equal(scale.view(torch.uint8), torch.from_numpy(scales))
    nan = data.float().isnan()
    assert torch.equal(nan, torch.from_numpy(codes == 0x7F))
    assert torch.equal(data.view(torch.uint8)[~nan], torch.from_numpy(codes)[~nan])


@item("values", "NaN and inf", ops=("mx_quantize",))
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_codes_and_scales_to_the_last_bit(data):
    dtype = data.draw(st.sampled_from([E4M3, E5M2]))
    rounding = data.draw(st.sampled_from(["floor", "ceil"]))
    shape = data.draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    values = st.sampled_from(EDGES) | st.floats(width=32)
    x = data.draw(hnp.arrays(np.float32, shape, elements=values, fill=st.just(np.float32(0.75))))
    got = mx_quantize(torch.from_numpy(x), dtype=dtype, rounding=rounding, transpose=True)
    _same(x, dtype, rounding, got.data, got.scale)
    _same(np.ascontiguousarray(x.T), dtype, rounding, got.data_t, got.scale_t)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("rounding", ["floor", "ceil"])
def test_every_exponent(dtype, rounding):
    """Blocks whose largest value is just at, below and above each power of two."""
    power = torch.ldexp(torch.ones(()), torch.arange(-149, 128)).float()
    edges = [power, torch.nextafter(power, torch.tensor(0.0)), power * 1.75]
    x = torch.cat([*edges, torch.nextafter(edges[2], torch.tensor(1e38))]).unsqueeze(1)
    x = torch.cat([x, x.expand(-1, 31) * torch.linspace(-1, 1, 31)], 1)
    got = mx_quantize(x, dtype=dtype, rounding=rounding)
    _same(x.numpy(), dtype, rounding, got.data, got.scale)


@pytest.mark.parametrize("rounding", ["floor", "ceil"])
def test_quantising_again_changes_nothing(rounding):
    first = mx_quantize(torch.randn(40, 96), rounding=rounding)
    again = mx_quantize(first.dequantize(), rounding=rounding)
    assert torch.equal(again.dequantize(), first.dequantize())


def test_only_floor_saturates():
    x = torch.full((1, 32), 1.9)  # 1.9 * 2^8 is above 448
    assert mx_quantize(x, rounding="floor").dequantize()[0, 0] == 1.75
    assert mx_quantize(x, rounding="ceil").dequantize()[0, 0] == 1.875


def test_any_number_of_dimensions_and_the_carrier():
    x = torch.randn(2, 3, 70, requires_grad=True)
    got = mx_quantize(x)
    assert got.scale.shape == (2, 3, 3)
    assert got.scale.dtype == torch.float8_e8m0fnu
    dy = torch.randn(2, 3, 70)
    assert torch.equal(torch.autograd.grad(got.dequantize(), x, dy)[0], dy)


@item("bad input", ops=("mx_quantize",))
def test_errors_say_what_was_found():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="must be floor or ceil, got 'nearest'"):
        mx_quantize(x, rounding="nearest")
    with pytest.raises(ValueError, match="got torch.float32 and torch.int8"):
        mx_quantize(x, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"two for a transposed copy, got \[3\]"):
        mx_quantize(x[0], transpose=True)


@pytest.mark.gpu
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rounding", ["floor", "ceil"])
def test_triton_gives_the_same_bits_on_the_device(rounding, transpose):
    x = torch.randn(1000, 5000) * torch.randn(1000, 1).exp()
    x[0, :19] = torch.tensor(EDGES)
    for dtype in (E4M3, E5M2):
        want = mx_quantize(x, dtype=dtype, rounding=rounding, transpose=transpose)
        got = mx_quantize(
            x.cuda(), dtype=dtype, rounding=rounding, transpose=transpose, backend="triton"
        )
        for a, b in zip(got, want, strict=True):
            if b is not None:
                a, b = a.cpu().float().nan_to_num(7), b.float().nan_to_num(7)
                assert torch.equal(a, b)
