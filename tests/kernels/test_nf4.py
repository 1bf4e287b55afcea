"""NF4 against bitsandbytes, bit for bit; without it against values that it once gave."""

import hashlib
import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.specimen import item

from warploom.kernels.quant import Nf4, nf4_dequantize, nf4_quantize
from warploom.kernels.quant.formats import NF4_VALUES as VALUES
from warploom.kernels.quant.formats import middles
from warploom.kernels.quant.nf4 import second_values

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes (extra quant)"
)


def _hash(*tensors):
    return hashlib.sha256(
        b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
    ).hexdigest()[:16]


def _weights(size, dtype=torch.float32):
    """Numbers that need no generator: a fixed formula in integers."""
    n = torch.arange(size)
    return (((n * 7919 + n * n * 31) % 20011 - 10005).float() / (1 + n % 97)).to(dtype)


def _theirs(x, block, double):
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        x, blocksize=block, quant_type="nf4", compress_statistics=double
    )
    with torch.compiler.set_stance("force_eager"):  # it compiles for each odd size
        return packed, state, functional.dequantize_4bit(packed, state)


def _compare(x, block, double):
    packed, state, value = _theirs(x, block, double)
    got = nf4_quantize(x, block=block, double=double)
    assert torch.equal(got.packed, packed)
    assert torch.equal(got.absmax, state.absmax)
    if double:
        assert torch.equal(got.code, state.state2.code)
        assert torch.equal(got.absmax2, state.state2.absmax)
        assert torch.equal(got.offset, state.offset)
    assert torch.equal(nf4_dequantize(got).flatten(), value.flatten())
    return got, state


@item("values", ops=("nf4_quantize", "nf4_dequantize"))
@needs_bitsandbytes
@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 700) | st.sampled_from([4096, 4097, 64 * 257]),
    block=st.sampled_from([32, 64, 128, 512, 4096]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    double=st.booleans(),
    scale=st.sampled_from([0.0, 1e-30, 0.02, 1000.0]),
    seed=st.integers(0, 9),
)
def test_bits_of_bitsandbytes(size, block, dtype, double, scale, seed):
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale
    x[::7] = 0
    _compare(x.to(dtype), block, double)


@needs_bitsandbytes
def test_bits_of_bitsandbytes_in_a_matrix_and_at_the_middles():
    _compare(torch.randn(64, 80, dtype=torch.bfloat16), 64, True)
    middle = middles(torch.tensor(VALUES))
    ends = torch.tensor([1.0, -1.0]).repeat(8)[:2]
    near = [torch.nextafter(middle, middle + s) for s in (1, -1)]
    x = torch.cat([ends, middle, *near])
    _compare(torch.nn.functional.pad(x, (0, 64 - x.numel())), 64, False)


@needs_bitsandbytes
def test_the_second_level_in_a_large_sample():
    """The scales are 20,000 different ones, of which each is the largest of its block."""
    x = torch.rand(20000, 1) * torch.linspace(-1, 1, 32)
    _compare(x, 32, True)


@needs_bitsandbytes
@pytest.mark.parametrize("double", [False, True])
def test_state_dictionaries_are_exchanged(double):
    from bitsandbytes.functional import QuantState

    got, state = _compare(torch.randn(12, 40, dtype=torch.bfloat16), 64, double)
    read = Nf4.from_state(got.packed, state.as_dict(packed=True))
    assert torch.equal(nf4_dequantize(read), nf4_dequantize(got))
    assert read.shape == got.shape
    theirs = QuantState.from_dict(dict(got.state()), torch.device("cpu"))
    assert theirs == state


def test_golden_values():
    """Made with bitsandbytes 0.50.2 on a CPU."""
    got = nf4_quantize(_weights(32 * 20000), block=32)
    value = nf4_dequantize(got)
    found = _hash(got.packed), _hash(got.absmax), _hash(got.absmax2, got.offset), _hash(value)
    assert found == GOLDEN
    assert _hash(second_values()) == TABLE


GOLDEN = ("13058b00f406e3d2", "c219f1e7b3b2d9a4", "78ac52c783fbcbf5", "48161cd8630338e3")
TABLE = "e732639a65f497b4"


def test_values_come_back_and_zeros_stay():
    x = torch.tensor(VALUES).repeat(8) * 3
    x[64:] = 0
    assert torch.equal(nf4_dequantize(nf4_quantize(x, double=False)), x)


@pytest.mark.parametrize("size", [0, 1, 63, 65, 1000])
def test_the_error_is_half_a_step_of_the_block(size):
    """The widest step is from -1 to -0.696; the scale, quantised itself, errs a little too."""
    x = torch.randn(size)
    got = nf4_quantize(x)
    assert got.packed.shape == ((size + 1) // 2, 1)
    if size:
        assert (nf4_dequantize(got) - x).abs().max() <= 0.16 * x.abs().max()


@item("NaN and inf", ops=("nf4_quantize", "nf4_dequantize"))
def test_a_nan_poisons_its_block():
    x = torch.randn(256)
    x[70] = float("nan")
    y = nf4_dequantize(nf4_quantize(x, double=False))
    assert y.isnan().view(4, 64).all(1).tolist() == [False, True, False, False]
    assert y.isnan().sum() == 64


@item("layout", ops=("nf4_quantize", "nf4_dequantize"))
def test_other_dtype_and_any_layout():
    x = torch.randn(6, 50, 4)[:, ::2].transpose(0, 2)
    got = nf4_quantize(x)
    assert torch.equal(got.packed, nf4_quantize(x.contiguous()).packed)
    y = nf4_dequantize(got, dtype=torch.bfloat16)
    assert torch.equal(y, nf4_dequantize(got).bfloat16())


@pytest.mark.parametrize("double", [False, True])
def test_all_parts_move(double):
    got = nf4_quantize(torch.randn(128), double=double)
    assert all(a is b for a, b in zip(got.to("cpu"), got, strict=True))
    assert {x.device.type for x in got.to("meta") if isinstance(x, torch.Tensor)} == {"meta"}


@item("bad input", ops=("nf4_quantize", "nf4_dequantize"))
def test_errors_say_what_was_found():
    x = torch.ones(128)
    with pytest.raises(ValueError, match=r"block must be one of \[32, .*\], got 100"):
        nf4_quantize(x, block=100)
    with pytest.raises(ValueError, match="got torch.float64"):
        nf4_quantize(x.double())
    got = nf4_quantize(x)
    with pytest.raises(ValueError, match="needs 100 bytes and 4 scales, got 64 and 2"):
        nf4_dequantize(got._replace(shape=(200,)))
    with pytest.raises(ValueError, match="got torch.int8 and 64"):
        nf4_dequantize(got, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"must have quant_state.bitsandbytes__nf4, got absmax"):
        Nf4.from_state(got.packed, {"absmax": got.absmax})


@pytest.mark.gpu
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", [32, 64, 512, 4096])
def test_triton_gives_the_same_bits_on_the_device(block, double):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(4096, 1001, dtype=dtype)
        got = nf4_quantize(x.cuda(), block=block, double=double, backend="triton")
        want = nf4_quantize(x, block=block, double=double)
        assert torch.equal(got.packed.cpu(), want.packed)
        if not double:
            assert torch.equal(got.absmax.cpu(), want.absmax)
        here = [t.cpu() if isinstance(t, torch.Tensor) else t for t in got]
        y = nf4_dequantize(got, backend="triton")
        assert torch.equal(y.cpu(), nf4_dequantize(Nf4(*here)))
