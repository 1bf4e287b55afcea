"""Compile a Triton kernel for a GPU that is not here, and read what the assembler says of it."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

CAPABILITIES = (90, 100)
SHARED_LIMIT = 227 * 1024  # bytes a program may have on sm_90 and sm_100


@dataclass(frozen=True)
class Report:
    """Registers a thread, bytes spilled a thread, bytes of shared memory, and the PTX."""

    registers: int
    spilled: int
    shared: int
    ptx: str


def cross_compile(kernel, types, constants, capability, *, num_warps=4) -> Report:
    """Compile `kernel` with arguments of `types` (by position) for an SM of `capability`.

    A type ends in `:16` when the argument is divisible by 16, as aligned pointers and usual
    strides are.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    arguments = [name for name in names if name not in constants]
    assert len(arguments) == len(types), f"{kernel.__name__}: {arguments}"
    signature = dict(zip(arguments, (t.removesuffix(":16") for t in types), strict=True))
    signature |= dict.fromkeys(constants, "constexpr")
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, t in zip(arguments, types, strict=True)
        if t.endswith(":16")
    }
    source = ASTSource(kernel, {name: signature[name] for name in names}, constants, attributes)
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    log = _assemble(ptx, capability)
    return Report(
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        spilled=sum(int(n) for n in re.findall(r"(\d+) bytes spill", log)),
        shared=compiled.metadata.shared,
        ptx=ptx,
    )


def _assemble(ptx: str, capability: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [
            get_ptxas(capability).path,
            "-v",
            f"--gpu-name={target}",
            "-o",
            f"{folder}/out",
            str(file),
        ]
        done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    assert done.returncode == 0, done.stderr
    return done.stderr


def vector_accesses(ptx: str) -> tuple[int, int]:
    """Count 16-byte (or wider) loads and stores of global memory."""
    wide = r"\.v4\.b32|\.v2\.b64|\.v4\.b64|\.v8\.b32"
    return tuple(len(re.findall(rf"{word}\.global[.\w:]*(?:{wide})", ptx)) for word in ("ld", "st"))
