"""What this machine and this installation are: recorded beside every run, printed by the doctor.

Everything is collected without touching a GPU's memory, and a tool that is not there is a fact
(`None`), not an error. The figures of GPUs come from NVML where `nvidia-ml-py` is installed: power
limit and clocks decide a measured speed as much as the model of the GPU does.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import warploom

_GIB = 2**30
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "bf16", "sve")
_VARIABLES = ("CUDA_", "NCCL_", "OMP_", "MKL_", "TORCH_", "PYTORCH_", "TRITON_", "GLOO_")


@dataclass(frozen=True, slots=True)
class Optional:
    """A package that warploom can use and does not require."""

    extra: str
    """The extra that installs it, as in `pip install warploom[hf]`; empty where none does."""
    package: str
    """Its name as a distribution."""
    module: str
    """Its name in an import statement."""
    enables: str
    """What one can do with it."""
    used: bool = False
    """Whether code of this version uses it already."""


OPTIONAL = (
    Optional(
        "hf",
        "transformers",
        "transformers",
        "logits compared with the Hugging Face model; the peer of warploom bench train",
        used=True,
    ),
    Optional("hf", "jinja2", "jinja2", "chat templates", used=True),
    Optional("data", "datatrove", "datatrove", "filters and deduplication for corpora"),
    Optional("data", "xxhash", "xxhash", "fast hashes for deduplication"),
    Optional("data", "trafilatura", "trafilatura", "text out of HTML pages"),
    Optional("eval", "lm-eval", "lm_eval", "the public evaluation tasks"),
    Optional("eval", "math-verify", "math_verify", "mathematical answers checked"),
    Optional("rl", "reasoning-gym", "reasoning_gym", "seeded reasoning tasks with scorers"),
    Optional("rl", "sympy", "sympy", "symbolic answers compared"),
    Optional("rl", "jsonschema", "jsonschema", "rewards for structured output"),
    Optional(
        "quant",
        "bitsandbytes",
        "bitsandbytes",
        "compared with our NF4: in its tests, and as a peer of warploom bench kernels",
        used=True,
    ),
    Optional(
        "megatron",
        "megatron-core",
        "megatron.core",
        "our layers in Megatron-Core's GPT: warploom.parallel.interop",
        used=True,
    ),
    Optional(
        "te",
        "transformer-engine",
        "transformer_engine",
        'backend="te" of some operators, when named; a peer of warploom bench kernels',
        used=True,
    ),
    Optional(
        "gpu", "nvidia-ml-py", "pynvml", "power limit, clocks and driver of each GPU", used=True
    ),
    Optional("smol", "gguf", "gguf", "weights in GGUF files", used=True),
    Optional("track", "tensorboard", "tensorboard", "curves in TensorBoard", used=True),
    Optional("track", "wandb", "wandb", "curves in Weights & Biases"),
    Optional("track", "mlflow", "mlflow", "curves in MLflow"),
    Optional(
        "plot",
        "matplotlib",
        "matplotlib",
        "the loss curve as a picture, and the roofline of warploom bench kernels",
        used=True,
    ),
    Optional("text", "pyarrow", "pyarrow", "corpora in Parquet"),
    Optional("text", "zstandard", "zstandard", "corpora compressed by zstd"),
    Optional("serve", "uvicorn", "uvicorn", "a model served over HTTP", used=True),
    Optional("serve", "starlette", "starlette", "a model served over HTTP", used=True),
    Optional("docs", "mkdocs-material", "material", "this documentation, built", used=True),
    Optional(
        "bench",
        "pytest-benchmark",
        "pytest_benchmark",
        "the operators timed under pytest: tests/benchmarks",
        used=True,
    ),
    Optional(
        "bench",
        "liger-kernel",
        "liger_kernel",
        'backend="liger" of some operators, when named; a peer of warploom bench kernels',
        used=True,
    ),
    Optional(
        "dev", "triton", "triton", "Triton kernels, and their tests in the interpreter", used=True
    ),
    Optional("", "flash-attn", "flash_attn", 'backend="flash_attn" of attention', used=True),
    Optional(
        "",
        "apex",
        "apex",
        'NVIDIA\'s: backend="apex" of some operators, when named; a peer of warploom bench kernels',
        used=True,
    ),
)


def environment() -> dict[str, Any]:
    """Collect what this machine has.

    Returns:
        A dictionary that `json` can write: `python`, `warploom`, `torch`, `cuda`, `tools`,
        `communication`, `cpu`, `gpus`, `packages`, `variables`; memory in GiB, power in watts,
        clocks in MHz. What is not there is None.
    """
    return {
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "warploom": {"version": warploom.__version__, "commit": commit()},
        "torch": {
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "cuda": _cuda(),
        "tools": {"nvcc": _compiler("nvcc"), "ptxas": _compiler("ptxas")},
        "communication": _communication(),
        "cpu": _cpu(),
        "gpus": gpus(),
        "packages": {optional.package: _version(optional) for optional in OPTIONAL},
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
    }


def commit() -> str | None:
    """Find the commit of the clone that this code runs from.

    Returns:
        The hash, followed by `+changes` when tracked files differ from it; None outside a clone.
    """
    root = str(Path(__file__).resolve().parents[2])
    if not Path(root, "pyproject.toml").exists():  # installed: an enclosing clone is not ours
        return None
    head = _output("git", "-C", root, "rev-parse", "HEAD")
    if head is None:
        return None
    changes = _output("git", "-C", root, "status", "--porcelain", "--untracked-files=no")
    return head.strip() + ("+changes" if changes else "")


def apex_warning() -> str | None:
    """Say so when the `apex` that is installed is not NVIDIA's.

    Returns:
        One sentence, or None when apex is NVIDIA's or not there.
    """
    spec = importlib.util.find_spec("apex")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    if spec is None or any(Path(folder, "normalization").is_dir() for folder in folders):
        return None
    return (
        f"apex must be NVIDIA's, but {spec.origin or folders} is another project of that name: "
        "pip uninstall apex, and build NVIDIA's from its sources"
    )


def gpus() -> list[dict[str, Any]]:
    """List the CUDA devices that this process sees.

    Returns:
        One dictionary a device: name, capability, memory in GiB, multiprocessors; with NVML also
        driver, power limit in watts and clocks in MHz.
    """
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        figures = {
            "name": device.name,
            "capability": f"{device.major}.{device.minor}",
            "memory_gib": round(device.total_memory / _GIB, 1),
            "multiprocessors": device.multi_processor_count,
        }
        found.append(figures | _nvml(f"GPU-{device.uuid}"))
    return found


def _nvml(uuid: str) -> dict[str, Any]:
    if importlib.util.find_spec("pynvml") is None:
        return {}
    import pynvml  # type: ignore[import-not-found, unused-ignore]

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)

        def ask(question: Callable[..., Any], *words: object) -> Any:
            try:
                answer = question(handle, *words)
            except pynvml.NVMLError_NotSupported:
                return None
            return answer

        watts = ask(pynvml.nvmlDeviceGetEnforcedPowerLimit)  # in milliwatts
        return {
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "power_limit_w": None if watts is None else watts / 1000,
            "clock_mhz": ask(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
            "max_clock_mhz": ask(pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": ask(pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_MEM),
            "temperature_c": ask(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
        }
    finally:
        pynvml.nvmlShutdown()


def _cuda() -> dict[str, Any] | None:
    if torch.version.cuda is None:
        return None
    return {
        "version": torch.version.cuda,
        "available": torch.cuda.is_available(),
        "cudnn": torch.backends.cudnn.version(),
        "architectures": torch.cuda.get_arch_list(),
    }


def _communication() -> dict[str, Any]:
    nccl = None
    if dist.is_available() and dist.is_nccl_available():
        nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
    return {"nccl": nccl, "gloo": dist.is_available() and dist.is_gloo_available()}


def _cpu() -> dict[str, Any]:
    text = _read("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    words = set(flags[1].split()) if flags else set()
    cores = set(re.findall(r"^core id\s*:\s*(\d+)$", text, re.MULTILINE))
    sockets = set(re.findall(r"^physical id\s*:\s*(\d+)$", text, re.MULTILINE))
    return {
        "model": model[1] if model else platform.machine(),
        "cores": len(cores) * max(1, len(sockets)) or None,
        "threads": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB, 1),
        "instructions": [name for name in _INSTRUCTIONS if name in words],
    }


def _compiler(name: str) -> dict[str, str] | None:
    places = [shutil.which(name)]
    if home := os.environ.get("CUDA_HOME"):
        places.append(str(Path(home, "bin", name)))
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name))
    for place in places:
        text = _output(place, "--version") if place and Path(place).exists() else None
        version = re.search(r"V(\d+\.\d+\.\d+)", text or "")
        if place and version:
            return {"version": version[1], "path": place}
    return None


def _version(optional: Optional) -> str | None:
    """Give the version of an installed package, "unknown" without metadata, None when absent."""
    if importlib.util.find_spec(optional.module.partition(".")[0]) is None:
        return None
    try:
        return importlib.metadata.version(optional.package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _output(*command: str) -> str | None:
    """Run a command; None when it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout if done.returncode == 0 else None


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""
