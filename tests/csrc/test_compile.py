"""What nvcc made of csrc: registers, spills, wide accesses, size, time; and the stand-alone runner.

The module is the one that `make setup` built. Its warnings were errors when it was built.
"""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from warploom.kernels import native

ROOT = Path(__file__).parents[2]
SETUP = runpy.run_path(str(ROOT / "setup.py"))
REGISTERS = {  # most a thread may take, by kernel; a block of 512 leaves each thread 128
    "forward_kernel": 96,
    "backward_kernel": 128,
    "forward_walk_kernel": 64,
    "backward_walk_kernel": 96,
    "shares_kernel": 40,
}
KERNELS = 200  # instantiations of both architectures: what the time of a build grows with
SECONDS = 300  # of a build beside other work; alone it takes 45 of processor time
BYTES = 6 << 20

nvcc = pytest.mark.skipif(SETUP["find_nvcc"]() is None, reason="needs nvcc")


@pytest.fixture(scope="module")
def module():
    found = importlib.util.find_spec("warploom._csrc")
    assert found, "nvcc is here but warploom._csrc is not built: `make setup`"
    assert found.origin
    return Path(found.origin)


@pytest.fixture(scope="module")
def cuobjdump():
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("needs the cuobjdump of triton's package")
    tool = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"

    def dump(flag, file):
        done = subprocess.run([tool, flag, file], capture_output=True, text=True, check=True)
        return done.stdout

    return dump


def _stem(function):
    return next(name for name in sorted(REGISTERS, key=len, reverse=True) if name in function)


@nvcc
def test_the_module_was_built_from_these_sources(module):
    assert native.source_hash() == SETUP["source_hash"](), "csrc has changed: `make setup`"


@nvcc
def test_registers_stack_and_architectures(module, cuobjdump):
    listed = cuobjdump("--dump-resource-usage", module)
    used = {"sm_90a": {}, "sm_100a": {}}
    for part in listed.split("\narch = ")[1:]:
        architecture = part.split("\n", 1)[0]
        for name, registers, stack, local in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", part
        ):
            used[architecture][name] = int(registers)
            assert int(registers) <= REGISTERS[_stem(name)], f"{name} on {architecture}"
            assert int(stack) == int(local) == 0, f"{name} on {architecture} spills"
    assert used["sm_90a"].keys() == used["sm_100a"].keys() != set()
    assert {_stem(name) for name in used["sm_90a"]} == set(REGISTERS)
    assert sum(map(len, used.values())) <= KERNELS


@nvcc
@pytest.mark.slow
def test_rows_move_in_16_bytes(module, cuobjdump):
    """A load and a store for each pack of a row that a thread has in flight."""
    code = cuobjdump("-sass", module).split("Function : ")[1:]
    kernels = [part for part in code if re.match(r"\S*(forward|backward)_kernelI", part)]
    assert kernels
    for part in kernels:
        assert len(re.findall(r"LDG\.E\S*\.128", part)) >= 4, part.split("\n", 1)[0]
        assert len(re.findall(r"STG\.E\S*\.128", part)) >= 4, part.split("\n", 1)[0]
        assert not re.findall(r"\b(LDL|STL)\b", part), part.split("\n", 1)[0]


@nvcc
def test_size_and_time(module):
    assert module.stat().st_size <= BYTES
    logs = sorted((ROOT / "build").glob("csrc-*/.ninja_log"))
    if not logs:
        pytest.skip("no log of ninja: the module was not built in this folder")
    for line in logs[-1].read_text().splitlines()[1:]:
        begin, end, _, target, _ = line.split("\t")
        assert (int(end) - int(begin)) / 1000 <= SECONDS, target


@nvcc
def test_only_the_interface_is_exported_and_libc_needed(module):
    if not shutil.which("nm") or not shutil.which("readelf"):
        pytest.skip("needs binutils")
    run = lambda *words: subprocess.run(words, capture_output=True, text=True, check=True).stdout  # noqa: E731
    defined = {line.split()[-1] for line in run("nm", "-D", "--defined-only", module).splitlines()}
    assert {n for n in defined if n != "PyInit__csrc" and not n.startswith("warploom_")} == set()
    needed = re.findall(r"NEEDED.*\[(\S+?)\]", run("readelf", "-d", module))
    assert not [
        name for name in needed if not re.match(r"(libc|libm|ld-linux|librt|lib(dl|pthread))", name)
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the runner would use it")
@pytest.mark.parametrize("compiler", [pytest.param(True, marks=[nvcc, pytest.mark.slow]), False])
def test_the_runner_says_in_a_sentence_what_is_missing(compiler, tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    if not compiler:
        environment["NVCC"] = "/nowhere/nvcc"
    done = subprocess.run(
        [ROOT / "csrc/run"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 2, done.stderr
    lack = "a GPU of compute capability 9.0 or 10.0, this machine has none" if compiler else "nvcc"
    assert re.fullmatch(rf"csrc/run needs {lack}.*\n", done.stderr)


def test_without_nvcc_the_build_says_so_in_a_line_and_goes_on(tmp_path):
    environment = {"PATH": "/nowhere"}
    code = "import runpy; print(*(e.name for e in runpy.run_path('setup.py')['extensions']()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        check=True,
    )
    assert done.stdout == "warploom._cpu\n"
    assert re.fullmatch(r"csrc: no nvcc .* is not built, everything else is\n", done.stderr)


def test_without_a_compiler_the_build_goes_on_without_the_operators_of_the_cpu(tmp_path):
    environment = {"PATH": "/nowhere", "CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
    words = ["build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"]
    done = subprocess.run(
        [sys.executable, "setup.py", *words],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 'building extension "warploom._cpu" failed' in done.stderr
    assert not [*tmp_path.rglob("*.so")]


def test_a_compiler_that_is_named_must_be_there(monkeypatch):
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    with pytest.raises(SystemExit, match="NVCC or CUDA_HOME name /nowhere/nvcc, which is no"):
        SETUP["extensions"]()


@nvcc
@pytest.mark.slow
def test_a_compiler_that_fails_ends_the_build_with_its_words(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "src"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    with (tmp_path / "csrc/rms_norm.cu").open("a") as source:
        source.write("#error broken on purpose\n")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode
    assert "broken on purpose" in done.stdout + done.stderr
    assert "its message is above" in done.stderr
