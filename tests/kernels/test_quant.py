"""fp8_quantize against formats written out code by code, and numpy's correctly rounded division."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tests.kernels.specimen import item

from warploom.kernels.quant import fp8_quantize

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SHIFT = {E4M3: (3, 7, 448.0), E5M2: (2, 15, 57344.0)}  # bits of the mantissa, bias, largest
MEMBERS = ("data", "scale", "data_t", "scale_t", "amax")


def _codes(dtype):
    """Value of each positive finite code, in order, from the definition of the format."""
    mantissa, bias, top = SHIFT[dtype]
    values = []
    for code in range(128):
        exponent, rest = code >> mantissa, code & ((1 << mantissa) - 1)
        whole = rest + (1 << mantissa if exponent else 0)
        values.append(whole * 2.0 ** (max(exponent, 1) - bias - mantissa))
        if values[-1] == top:
            return np.array(values)
    raise AssertionError(dtype)


def _encode(y, dtype):
    """Round float32 to the nearest code, ties to the even one, saturating; NaN is 0x7F."""
    table, y = _codes(dtype), np.asarray(y, np.float64)
    size = np.minimum(np.abs(y), table[-1])
    above = np.searchsorted(table, size).clip(1, len(table) - 1)
    low, high = size - table[above - 1], table[above] - size
    code = np.where((low < high) | ((low == high) & (above % 2 == 1)), above - 1, above)
    code = code + np.where(np.signbit(y), 128, 0)
    return np.where(np.isnan(y), 0x7F, code).astype(np.uint8)


def _scales(a, dtype, power_of_two):
    top = np.float32(SHIFT[dtype][2])
    with np.errstate(all="ignore"):
        a = np.maximum(a.astype(np.float32), top * np.float32(2.0**-126))
        scale = a / top
        if not power_of_two:
            return scale, top / a
        fraction, exponent = np.frexp(scale)  # scale = fraction 2^exponent, fraction in [0.5, 1)
        exact = np.ldexp(np.float32(1), exponent - (fraction == 0.5)).astype(np.float32)
        scale = np.where(np.isfinite(scale), exact, scale)
        return scale, np.float32(1) / scale


def _spec(x, scaling, dtype, power_of_two):
    """Codes and scales of `[T, D]` float32, group by group."""
    tokens, width = x.shape
    rows, columns = {
        "tensor": (tokens, width),
        "row": (1, width),
        "block": (1, 128),
        "tile": (128, 128),
    }[scaling]
    codes = np.zeros((tokens, width), np.uint8)
    scales = np.zeros((-(-tokens // max(rows, 1)), -(-width // columns)), np.float32)
    for i, j in np.ndindex(*scales.shape):
        part = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        scales[i, j], inverse = _scales(np.abs(x[part]).max(), dtype, power_of_two)
        with np.errstate(all="ignore"):
            codes[part] = _encode(x[part] * inverse, dtype)
    return codes, scales


def _same(codes, scales, got, scale):
    """Compare bits; a NaN is one whatever its bits are."""
    nan = torch.from_numpy(codes) == 0x7F if codes.size else torch.zeros(codes.shape, dtype=bool)
    assert torch.equal(got.float().isnan(), nan)
    bits = got.view(torch.uint8)
    assert torch.equal(bits[~nan], torch.from_numpy(codes)[~nan])
    want = torch.from_numpy(scales).reshape(scale.shape)
    torch.testing.assert_close(scale, want, rtol=0, atol=0, equal_nan=True)


EDGES = [0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 448.0, 464.0, 447.9, 1.0, 2.0**-9, 2.0**-10, 1.0625]
EDGES += [1.1875, 57344.0, 61440.0, 3.4028235e38, -3.4028235e38, float("inf"), float("nan")]


@item("values", "NaN and inf", ops=("fp8_quantize",))
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_codes_and_scales_to_the_last_bit(data):
    scaling = data.draw(st.sampled_from(["tensor", "row", "block", "tile"]))
    dtype, power_of_two = data.draw(st.sampled_from([E4M3, E5M2])), data.draw(st.booleans())
    shape = data.draw(st.tuples(st.integers(1, 140), st.integers(1, 140)))
    values = st.sampled_from(EDGES) | st.floats(width=32)
    x = data.draw(hnp.arrays(np.float32, shape, elements=values, fill=st.just(np.float32(0.75))))
    got = fp8_quantize(
        torch.from_numpy(x), scaling=scaling, dtype=dtype, power_of_two=power_of_two, transpose=True
    )
    _same(*_spec(x, scaling, dtype, power_of_two), got.data, got.scale)
    _same(*_spec(np.ascontiguousarray(x.T), scaling, dtype, power_of_two), got.data_t, got.scale_t)


@item("values", ops=("fp8_quantize",))
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_every_code_and_every_tie(dtype):
    """With scale 1: codes stay, the middle of two goes to the even one, what is above saturates."""
    table = torch.from_numpy(_codes(dtype)).float()
    middle = (table[1:] + table[:-1]) / 2
    x = torch.cat([table, middle, torch.nextafter(middle, table[1:]), table[-1:] * 1.5])
    x = torch.cat([x, -x])
    got = fp8_quantize(x, dtype=dtype, scale=torch.tensor(1.0))
    assert torch.equal(got.data.view(torch.uint8), torch.from_numpy(_encode(x.numpy(), dtype)))
    assert got.amax == table[-1] * 1.5
    inside = x.abs() <= table[-1]
    assert torch.equal(got.data.view(torch.uint8)[inside], x.to(dtype).view(torch.uint8)[inside])


def test_the_inverse_is_rounded_once():
    """Where x MAX / a is nearly a tie, 1 / (a / MAX), rounded twice, goes the other way."""
    a = 1 + torch.rand(4000, 1)
    ties = torch.tensor([17.0, 19.0, 27.0, 232.0, 248.0])
    x = torch.cat([a, (ties.double() * a.double() / 448).float()], 1)
    got = fp8_quantize(x, scaling="row")
    _same(*_spec(x.numpy(), "row", E4M3, False), got.data, got.scale)


@pytest.mark.parametrize("scaling", ["tensor", "row", "block", "tile"])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_value_is_near(scaling, power_of_two):
    """Half a step of e4m3, 2^-4 of the value, or half of the least step of the group."""
    x = torch.randn(200, 300, dtype=torch.float64) * torch.randn(200, 1).exp()
    got = fp8_quantize(x, scaling=scaling, power_of_two=power_of_two)
    error = (got.dequantize() - x).abs()
    assert (error <= x.abs() * 2**-4 * (1 + 1e-5) + float(got.scale.max()) * 2**-10).all()
    if power_of_two:
        assert (torch.frexp(got.scale)[0] == 0.5).all()


def test_the_delayed_scale_is_used_and_the_next_one_prepared():
    x = torch.randn(5, 7)
    now = fp8_quantize(x)
    later = fp8_quantize(x * 2, scale=now.scale, transpose=True)
    assert later.amax == 2 * now.amax
    assert later.scale is not None
    assert torch.equal(later.scale, now.scale)
    assert later.data.float().abs().max() == 448  # saturated
    assert torch.equal(later.data_t.float(), later.data.float().t())


def test_a_consumer_returns_its_gradient_for_the_carrier():
    x = torch.randn(4, 6, requires_grad=True)
    q = fp8_quantize(x, scaling="row")
    assert q.carrier.untyped_storage().nbytes() == 4
    dy = torch.randn(4, 6)
    assert torch.equal(torch.autograd.grad(q.carrier, x, dy)[0], dy)
    q = fp8_quantize(x, scaling="row")
    assert torch.equal(torch.autograd.grad(q.dequantize(torch.bfloat16), x, dy.bfloat16())[0],
                       dy.bfloat16().float())  # fmt: skip


def test_any_number_of_dimensions():
    x = torch.randn(2, 3, 200)
    got = fp8_quantize(x, scaling="block")
    flat = fp8_quantize(x.view(6, 200), scaling="block")
    assert got.scale.shape == (2, 3, 2)
    assert torch.equal(got.data.view(6, 200).float(), flat.data.float())
    assert torch.equal(got.dequantize(), flat.dequantize().view(2, 3, 200))


@item("bad input", ops=("fp8_quantize",))
def test_errors_say_what_was_found():
    x = torch.ones(2, 3)
    for kwargs, words in (
        ({"scaling": "group"}, "must be tensor, row, block or tile, got 'group'"),
        ({"dtype": torch.int8}, "got torch.float32 and torch.int8"),
        ({"scaling": "row", "scale": torch.tensor(1.0)}, r"got torch.float32 \[\] with 'row'"),
    ):
        with pytest.raises(ValueError, match=words):
            fp8_quantize(x, **kwargs)
    with pytest.raises(ValueError, match=r"got \[2, 3, 4\]"):
        fp8_quantize(torch.ones(2, 3, 4), transpose=True)
    with pytest.raises(ValueError, match="got torch.int32"):
        fp8_quantize(x.int())


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", ["tensor", "row", "block", "tile"])
@pytest.mark.parametrize("transpose", [False, True])
def test_triton_gives_the_same_bits_on_the_device(scaling, transpose):
    x = torch.randn(1000, 5000) * torch.randn(1000, 1).exp()
    x[0, :19] = torch.tensor(EDGES)
    for dtype in (E4M3, E5M2):
        for power_of_two in (False, True):
            fixed = {"scaling": scaling, "dtype": dtype, "power_of_two": power_of_two}
            want = fp8_quantize(x, transpose=transpose, **fixed)
            got = fp8_quantize(x.cuda(), transpose=transpose, backend="triton", **fixed)
            for name in MEMBERS:
                a, b = getattr(got, name), getattr(want, name)
                if b is not None:
                    a, b = a.cpu().float().nan_to_num(7), b.float().nan_to_num(7)
                    assert torch.equal(a, b), name
