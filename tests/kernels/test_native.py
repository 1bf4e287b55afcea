"""The compiled library as Python sees it, on a machine without a driver."""

import importlib
import sys

import pytest
import torch

from warploom.kernels import backends, native
from warploom.kernels.norm import rms_cuda, rms_norm

CPU = torch.device("cpu")
built = pytest.mark.skipif(isinstance(native._loaded(), str), reason="warploom._csrc is not built")
driverless = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def test_rms_norm_has_a_backend_cuda():
    assert "cuda" in backends.available()["rms_norm"]
    with pytest.raises(RuntimeError, match=r"rms_norm: backend 'cuda' needs .*"):
        rms_norm(torch.ones(2, 4), torch.ones(4), backend="cuda")


@built
@driverless
def test_it_loads_without_a_driver_and_says_what_is_missing():
    sentence = "needs a CUDA device and its driver"
    assert sentence in (native.missing(None) or "")
    assert sentence in (native.missing(CPU) or "")
    library = native.library()
    x = torch.ones(8)
    arguments = (x.data_ptr(), 0, x.data_ptr(), x.data_ptr(), 0, x.data_ptr(), 1, 8, 8, 8, 1e-6)
    assert library.rms_norm_forward(*arguments, 2, 2, 0, 0)
    assert library.last_error() == (
        "needs a CUDA device and a driver for CUDA 13, none is found here"
    )


@pytest.fixture
def fresh():
    native._loaded.cache_clear()
    yield
    native._loaded.cache_clear()


def test_a_library_that_was_not_built_is_a_sentence(fresh, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert (native.missing(None) or "").startswith("needs warploom._csrc, which was not built: ")
    with pytest.raises(RuntimeError, match="csrc: needs warploom._csrc, which was not built"):
        native.source_hash()


def test_a_library_that_does_not_load_is_a_sentence(fresh, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "warploom._csrc", None)
    assert "which does not load here (import of warploom._csrc halted" in (
        native.missing(None) or ""
    )


@built
@pytest.mark.parametrize(
    ("capability", "lack"),
    [
        ((9, 0), None),
        ((10, 0), None),
        ((8, 0), r"needs compute capability 9.0 or 10.0, cuda:0 (NVIDIA A100) has 8.0: use"),
        ((12, 0), "has 12.0: use backend 'triton'"),
    ],
)
def test_the_capability_is_looked_at(capability, lack, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    found = native.missing(torch.device("cuda", 0))
    assert found is None if lack is None else lack in (found or "")


FORWARD = {
    "x": 16,
    "residual": 0,
    "weight": 16,
    "y": 16,
    "h": 0,
    "rstd": 16,
    "tokens": 1,
    "width": 8,
    "x_stride": 8,
    "residual_stride": 8,
    "eps": 1e-6,
    "type": 1,
    "weight_type": 1,
    "device": 0,
    "stream": 0,
}


@built
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokens": -1}, "tokens must be at least 0 and width at least 1, got -1 and 8"),
        ({"width": 0}, "tokens must be at least 0 and width at least 1, got 1 and 0"),
        ({"type": 3}, "a type must be 0 (float16), 1 (bfloat16) or 2 (float32), got 3"),
        (
            {"weight_type": 0},
            "the weight's type must be that of the rows (1) or 2 (float32), got 0",
        ),
        ({"y": 17}, "y must be the address of elements of 2 bytes, got 0x11"),
        ({"weight": 0}, "weight must be the address of elements of 2 bytes, got (nil)"),
        ({"h": 16}, "residual must be the address of elements of 2 bytes, got (nil)"),
        ({"residual": 16}, "h must be the address of elements of 2 bytes, got (nil)"),
    ],
)
def test_arguments_that_do_not_fit_are_a_sentence(change, sentence):
    library = native.library()
    assert library.rms_norm_forward(*(FORWARD | change).values()) == -1
    assert library.last_error() == sentence


@built
def test_wrong_kinds_of_arguments_are_type_errors():
    for words in (("a",), tuple(FORWARD.values())[1:], tuple((FORWARD | {"x": -1}).values())):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            native.library().rms_norm_forward(*words)


@built
def test_no_tokens_are_no_launch_and_parts_are_bounded():
    library = native.library()
    assert library.rms_norm_forward(*(FORWARD | {"tokens": 0}).values()) == 0
    assert library.rms_norm_parts(0, 4096, 1, 132) == 1
    assert library.rms_norm_parts(1 << 40, 4096, 1, 132) == 264
    assert library.rms_norm_parts(3, 4096, 1, 132) == 2  # two rows a block


def test_the_host_refuses_dtypes_that_the_library_does_not_know():
    x = torch.ones(2, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float32 are served, got torch.float64"):
        rms_cuda.forward(x, x[0], None, 1e-6)


def test_importing_kernels_does_not_load_the_library():
    code = "import sys, warploom.kernels.norm; print('warploom._csrc' in sys.modules)"
    run = importlib.import_module("subprocess").run
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
