"""The front doors open quickly, and without any optional package.

One process imports torch and forks a child for each import, so that a door is timed with torch
already there and nothing of ours. The seconds are the processor's: a busy machine adds none.
Bytecode is there after the first round, and the objects of torch are not searched for garbage.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECONDS = 0.3  # what an import may add to that of torch
DOORS = {
    "warploom.kernels.norm": "rms_norm",
    "warploom.kernels.rope": "rotary rotary_tables",
    "warploom.kernels.activation": "swiglu",
    "warploom.kernels.loss": "linear_cross_entropy linear_log_probs",
    "warploom.kernels.attention": "flash_attention flash_attention_varlen",
    "warploom.kernels.gemm": "",
    "warploom.kernels.quant": "",
    "warploom.kernels.moe": "",
    "warploom.kernels.optim": "",
    "warploom.kernels.backends": "available choose",
    "warploom.parallel.mesh": "Mesh",
    "warploom.parallel.tensor": "ColumnLinear RowLinear VocabEmbedding",
    "warploom.parallel.context": "ring_attention",
    "warploom.parallel.expert": "MoE",
    "warploom.parallel.pipeline": "Schedule execute",
    "warploom.models.decoder": "Decoder",
    "warploom.models.hf": "load save",
    "warploom.recipes.rollout": "Engine Sampling",
}
OPTIONAL = ("triton", "transformers", "matplotlib", "rich", "tyro", "pynvml", "tensorboard")
PROBE = """
import gc, importlib, json, os, sys, time
import torch
import torch.distributed
doors, blocked, rounds, sys.pycache_prefix = json.loads(sys.argv[1])
sys.dont_write_bytecode = False
gc.collect()
gc.freeze()

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def probe(module, names):
    before = set(sys.modules)
    start = time.process_time()
    door = importlib.import_module(module)
    seconds = time.process_time() - start
    missing = [name for name in names.split() if not hasattr(door, name)]
    brought = sorted({name.split(".")[0] for name in set(sys.modules) - before})
    return {"seconds": seconds, "missing": missing, "brought": brought}

def forked(module, names):
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            found = probe(module, names)
        except BaseException as error:
            found = {"error": repr(error)}
        os.write(writer, json.dumps(found).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        found = json.loads(pipe.read())
    os.waitpid(child, 0)
    return found

if blocked:
    for name in [n for n in sys.modules if n.split(".")[0] in blocked]:
        del sys.modules[name]
    sys.meta_path.insert(0, Absent())
print(json.dumps({m: [forked(m, n) for _ in range(rounds)] for m, n in doors.items()}))
"""


def _probe(doors, blocked, rounds):
    with tempfile.TemporaryDirectory() as bytecode:
        words = json.dumps([doors, blocked, rounds, bytecode])
        done = subprocess.run(
            [sys.executable, "-c", PROBE, words], cwd=ROOT, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _exists(module):
    path = ROOT.joinpath(*module.split(".")[1:])
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


@pytest.fixture(scope="module")
def doors():
    found = {module: names for module, names in DOORS.items() if _exists(module)}
    assert found
    return found


def test_an_import_is_quick_and_brings_no_optional_package(doors):
    found = _probe(doors, [], 3)
    for module, rounds in found.items():
        assert not [r["error"] for r in rounds if "error" in r], module
        assert not rounds[0]["missing"], f"{module} lacks {rounds[0]['missing']}"
        assert not set(OPTIONAL) & set(rounds[0]["brought"]), f"{module} imports them when imported"
    slow = {m: min(r["seconds"] for r in rounds) for m, rounds in found.items()}
    assert not {m: s for m, s in slow.items() if s > SECONDS}


def test_an_import_needs_no_optional_package(doors):
    found = _probe(doors, OPTIONAL, 1)
    assert not {m: r[0]["error"] for m, r in found.items() if "error" in r[0]}


def test_the_probe_sees_a_slow_import_and_a_missing_package(tmp_path, monkeypatch):
    (tmp_path / "door_slow.py").write_text(
        "import time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass\n"
    )
    (tmp_path / "door_needy.py").write_text("import tyro\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = _probe({"door_slow": "x", "door_needy": ""}, OPTIONAL, 1)
    assert found["door_slow"][0]["seconds"] > SECONDS
    assert found["door_slow"][0]["missing"] == ["x"]
    assert "tyro" in found["door_needy"][0]["error"]
