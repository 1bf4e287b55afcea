"""csrc compiled for the CPU: every thread of every block runs, under g++'s sanitizers."""

import ctypes
import fcntl
import functools
import hashlib
import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from warploom.kernels import native
from warploom.kernels.norm import rms, rms_cuda

ROOT = Path(__file__).parents[2]
SETUP = runpy.run_path(str(ROOT / "setup.py"))
EMULATOR = Path(__file__).parent / "emulator.h"
LONG, INT = ctypes.c_int64, ctypes.c_int
FUNCTIONS = {  # as csrc/warploom.h declares them; a pointer may be any integer
    "rms_norm_forward": [*[LONG] * 10, ctypes.c_float, INT, INT, INT, LONG],
    "rms_norm_parts": [LONG, LONG, INT, INT],
    "rms_norm_backward": [*[LONG] * 14, INT, INT, INT, INT, LONG],
}


@functools.cache
def library(folder: Path) -> SimpleNamespace:
    """Compile the operators once a state of the sources; return what stands for `_csrc`."""
    digits = hashlib.sha256(SETUP["source_hash"]().encode() + EMULATOR.read_bytes()).hexdigest()
    built = folder / f"emulated-{digits[:16]}.so"
    with (folder / "lock").open("w") as lock:  # of test processes side by side one compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            _compile(built)
    loaded = ctypes.CDLL(str(built))
    loaded.warploom_last_error.restype = ctypes.c_char_p
    found = SimpleNamespace(last_error=lambda: loaded.warploom_last_error().decode())
    for name, kinds in FUNCTIONS.items():
        function = getattr(loaded, f"warploom_{name}")
        function.argtypes, function.restype = kinds, LONG if name.endswith("parts") else INT
        setattr(found, name, function)
    found.packs = LONG.in_dll(loaded, "emulated_packs")
    return found


def _compile(built: Path) -> None:
    host = f"-include,{EMULATOR},-fPIC,-Wall,-Wextra,-Werror"
    host += ",-Wno-unknown-pragmas,-fvisibility=hidden,-fno-strict-aliasing"
    host += ",-fsanitize=undefined,-fno-sanitize-recover"
    part = built.with_suffix(".part")
    operators = sorted((ROOT / "csrc").glob("*.cu"))
    command = [
        SETUP["find_nvcc"](),
        "-x",
        "c++",
        "-std=c++17",
        "-O1",
        "-shared",
        "-Xcompiler",
        host,
    ]
    subprocess.run([*command, *operators, "-o", part], check=True)
    part.rename(built)


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> SimpleNamespace:
    """Let backend `cuda` of CPU tensors run in the emulator."""
    if not SETUP["find_nvcc"]():
        pytest.skip("needs nvcc, for the headers of CUDA")
    found = library(folder)
    monkeypatch.setattr(native, "_loaded", lambda: found)
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(rms_cuda, "processors", lambda device: 1)  # blocks stride over rows
    choose = rms.choose
    monkeypatch.setattr(
        rms, "choose", lambda op, d, t, b=None: b if b == "cuda" else choose(op, d, t, b)
    )
    return found
