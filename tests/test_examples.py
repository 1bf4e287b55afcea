"""The examples of docs/examples: on one rank, on two, and by the commands that they name."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
TOLERANCE = 1e-10


def _module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check(path, group):
    found = _module(path).run(group)
    assert found
    wrong = {name: value for name, value in found.items() if not value <= TOLERANCE}
    assert not wrong, f"{path.name}: {wrong}"


def _check_over_the_world():
    for path in EXAMPLES:
        if path.stem != "one_rank":
            _check(path, dist.group.WORLD)


def test_two_ranks_equal_the_foreign_model(ranks):
    ranks(2, _check_over_the_world)


@pytest.mark.slow
def test_four_ranks_equal_the_foreign_model(ranks):
    ranks(4, _check_over_the_world)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_one_rank_needs_no_group(path):
    assert not dist.is_initialized()
    _check(path, None)


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_command_of_the_docstring_runs(path):
    text = path.read_text()
    shown = path.relative_to(ROOT)
    command = [sys.executable, shown]
    if path.stem != "one_rank":
        assert f"    torchrun --nproc-per-node 2 {shown}\n" in text
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", shown]
    else:
        assert f"    python {shown}\n" in text
    made = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stderr
    assert "differs by" in made.stdout


def test_an_example_is_short_and_its_guide_names_it():
    guide = (ROOT / "docs" / "guide" / "layers.md").read_text()
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) < 100, path.name
        assert f"examples/{path.name}" in guide, path.name


def test_an_example_leaves_no_state_of_ours():
    state = torch.random.get_rng_state()
    _module(EXAMPLES[0])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("guide", "count"), [("kernels.md", 4), ("fp8.md", 1)])
def test_the_code_of_the_guides_to_the_kernels_runs(guide, count, capsys):
    text = (ROOT / "docs" / "guide" / guide).read_text()
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    for block in blocks:
        exec(compile(block, guide, "exec"), {})
        said = capsys.readouterr().out
        assert "float8_e4m3fn" in said or said == "True\n"
    assert len(blocks) == count
