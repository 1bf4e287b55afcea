"""The mutation tool finds every site of a small package, breaks it, and says what survives."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tests import mutants
from tests.mutants import __main__ as tool
from tests.mutants import reach, sites

ROOT = Path(__file__).parents[1]

LAYER = '''"""A layer."""
from .collectives import gather, reduce as total
from .sharding import whole


def mean(x, count, mesh):
    return total(x, mesh.tp) / count


def half(x):
    return x / 2


class Layer:
    enter = gather

    def declare(self, partial):
        whole("é", partial=(self.group,), expert=True)
        whole("b", partial=partial)

    def backward(self, dx, part):
        dx += part
        self.size += 1
        return dx.add_(part).mean()
'''
FILES = {
    ".gitignore": "build\n",
    "parallel/collectives/__init__.py": '__all__ = ["barrier", "gather", "reduce"]\n'
    "def barrier(group): ...\ndef gather(x, group): return x\ndef reduce(x, group): return x\n",
    "parallel/layer.py": LAYER,
    "parallel/sharding.py": "def whole(name, **kwargs): ...\n",
    "models/cost.py": "def cost(x):\n    return x / 3\n",
    "tests/conftest.py": "",
    "tests/parallel/test_layer.py": "import sys, pathlib, types\n"
    "sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))\n"
    "from parallel.layer import mean\n"
    "def test(): assert mean(6, 2, types.SimpleNamespace(tp=None, shard=None)) == 3\n",
    "tests/mutants/equivalent.json": "{}",
    "tests/mutants/named.json": json.dumps(
        [{"thread": "Some #1", "what": "divides twice", "file": "parallel/layer.py",
          "find": r"mesh\.tp\) / count", "replace": "mesh.tp) / count / count"}]
    ),
}  # fmt: skip


@pytest.fixture
def package(tmp_path):
    tools = shutil.ignore_patterns("*.json", "__pycache__")
    shutil.copytree(ROOT / "tests/mutants", tmp_path / "tests/mutants", ignore=tools)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "docs").mkdir()
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def _ids(package):
    return [m.id.removeprefix("parallel/layer.py:") for m in sites.generated(package)]


def test_every_site_is_found_once(package):
    assert _ids(package) == [
        *("mean:/:drop", "mean:/:double"),
        *("mean:total:drop", "mean:total:double", "mean:total:other", "mean:mesh.tp:other"),
        *("half:/:drop", "half:/:double"),
        *("Layer:gather:drop", "Layer:gather:double", "Layer:gather:other"),
        "Layer:gather:drop adjoint",
        *(f"Layer.declare:partial=:{how}" for how in ("drop", "double", "other")),
        "Layer.declare:expert=:drop",
        *("Layer.backward:+=:drop", "Layer.backward:+=:double"),
        *("Layer.backward:mean:drop", "Layer.backward:mean:double"),
        *("Layer.backward:add_:drop", "Layer.backward:add_:double"),
    ]


def test_a_mutant_changes_its_site_and_nothing_else(package):
    changed = {m.id.split(":", 1)[1]: m.text for m in sites.generated(package)}

    def line(name):
        pairs = zip(LAYER.splitlines(), changed[name].splitlines(), strict=True)
        (different,) = [new.strip() for old, new in pairs if old != new]
        return different

    assert line("mean:/:drop") == "return (total(x, mesh.tp))"
    assert line("mean:/:double") == "return ((total(x, mesh.tp)) / (2 * (count)))"
    assert line("mean:mesh.tp:other") == "return total(x, mesh.shard) / count"
    assert line("Layer.backward:mean:drop") == "return dx.add_(part).sum()"
    assert line("Layer.declare:partial=:drop").startswith(
        'whole("é", partial=__import__("tests.mut'
    )
    for text in changed.values():
        compile(text, "layer", "exec")


def test_functions_say_that_they_were_entered():
    text = 'def one(x):\n    """Words."""\n    @wrap\n    def two(\n        y):\n        pass\n'
    lines = reach.instrument("a.py", text + "class A:\n    def three(x): ...\n").splitlines()
    assert [n for n, line in enumerate(lines) if "mark(" in line] == [2, 6]
    assert lines[2].endswith('mark("a.py:one")')
    assert lines[6].endswith('mark("a.py:one.two")')
    for name in sites.mutated(ROOT):
        compile(reach.instrument(name, (ROOT / name).read_text()), name, "exec")


def test_what_was_measured_tells_what_failed(tmp_path):
    (tmp_path / "times").write_text("a\t1\tpassed\na\t2\tpassed\nb\t1\tfailed\nc\t1\tskipped\n")
    (tmp_path / "7.entered").write_text("a\tx.py:f\nb\tx.py:g\n")
    assert reach.collect(tmp_path) == ({"a": {"seconds": 3.0, "entered": ["x.py:f"]}}, ["b"])


def test_survivors_need_a_reason(package, capsys, monkeypatch):
    words = ["--only", "parallel/layer.py", "--jobs", "1"]
    assert tool.main(["--list", *words], package) == 0
    assert "Some #1:divides twice:named" in capsys.readouterr().out
    kept = [m for m in sites.generated(package) if m.what == "/" and m.how == "double"]
    monkeypatch.setattr(tool, "generated", lambda root: kept)
    monkeypatch.setattr(tool, "IMPORTED", ("pytest",))
    assert tool.main(["--jobs", "1"], package) == 1
    shown = capsys.readouterr().out
    assert "2 killed, 1 survived" in shown
    assert "parallel/layer.py:half:/:double" in shown.split("without a reason")[1]
    reasons = {m.id: "nothing calls it" for m in kept if m.place == "half"}
    (package / "tests/mutants/equivalent.json").write_text(json.dumps(reasons))
    monkeypatch.setattr(tool, "Tree", None)  # all is known: nothing runs again
    assert tool.main(["--jobs", "1"], package) == 0
    page = (package / "docs/mutants.md").read_text()
    assert "**2 of 3 killed** (0 by a hang), 1 survive,\n1 of these" in page
    assert "| `parallel/layer.py` | 3 | 2 | 0 | 1 |" in page
    assert "- `parallel/layer.py:half:/:double`: nothing calls it" in page
    assert "| Some #1 | divides twice | `parallel/layer.py`: killed |" in page
    assert (package / "parallel/layer.py").read_text() == LAYER


def test_a_patch_must_find_its_place(package):
    (package / "parallel/layer.py").write_text("x = 1\n")
    with pytest.raises(
        SystemExit, match=r"Some #1 \(divides twice\) must match once in parallel/la"
    ):
        list(sites.named(package))


class _Group:
    def size(self):
        return 2

    def rank(self):
        return 1


def _gather(x, group):
    return torch.cat([x, x + 1])


def _all_reduce_(x, group, *, op="sum"):
    return x.add_(1)


def _gradient(fn, x):
    x = x.clone().requires_grad_()
    y = fn(x, _Group())
    y.backward(torch.arange(1.0, y.numel() + 1))
    return y.detach(), x.grad


def test_what_a_mutated_collective_does():
    _gather.__name__, _all_reduce_.__name__ = "gather", "all_reduce_"
    x = torch.tensor([1.0, 2.0])
    y, gradient = _gradient(mutants.drop(_gather), x)
    assert y.tolist() == [1, 2, 1, 2]
    y, gradient = _gradient(mutants.drop_adjoint(_gather), x)
    assert y.tolist() == [1, 2, 2, 3]  # the forward is right
    assert gradient.tolist() == [3, 4]  # the backward keeps its own part
    y, gradient = _gradient(mutants.double(_gather), x)
    assert y.tolist() == [1, 2, 2, 3]
    assert gradient.tolist() == [2 * (1 + 3), 2 * (2 + 4)]
    assert mutants.drop(_all_reduce_)(x.clone(), _Group()).tolist() == [1, 2]
    assert mutants.double(_all_reduce_)(x.clone(), _Group()).tolist() == [4, 6]
    assert mutants.drop(_all_reduce_)(x.clone(), None).tolist() == [2, 3]
    assert mutants.declared("double", ("g",)) == ("g", "g")
    assert mutants.declared("drop", ("g",)) == ()
    assert mutants.declared("drop", True) is False


def test_every_collective_of_the_library_is_known():
    unknown = [name for name in sites.exported(ROOT) if not sites.known(name)]
    assert not unknown, f"say in tests/mutants what becomes of {unknown}, or that no gradient"
    assert {m.path.split("/")[0] for m in sites.generated(ROOT)} == {"parallel", "models"}


def test_public_bugs_find_their_places():
    assert all(m.text for m in sites.named(ROOT))
