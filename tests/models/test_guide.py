"""The guide's table of models names every size, with its exact count."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from warploom.models import families
from warploom.models.architecture import Architecture
from warploom.models.cost import parameters

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "models.md"


def test_every_named_size_is_listed_with_its_count():
    listed = {}
    for module, cells in re.findall(r"^\| .*? \| `(\w+)` \| (.*) \|$", GUIDE.read_text(), re.M):
        for name, count in re.findall(r"`(\w+)` ([\d,]+)", cells):
            listed[module, name] = int(count.replace(",", ""))
    found = {}
    for path in Path(families.__file__).parent.glob("*.py"):
        module = importlib.import_module(f"{families.__name__}.{path.stem}")
        for name, make in vars(module).items():
            own = inspect.isfunction(make) and make.__module__ == module.__name__
            if not own or name == "tiny" or name.startswith("_"):
                continue
            signature = inspect.signature(make)
            if signature.return_annotation is Architecture and not signature.parameters:
                found[path.stem, name] = sum(parameters(make()).values())
    assert listed == found
    assert len(found) > 50


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "words", "made"),
    [
        ("guide/models.md", (), "my-gemma-trained"),
        ("recipes/pretrain.md", ("small", "--steps", "3", "--schedule.warmup", "1"), "runs/small"),
    ],
)
def test_the_code_of_a_page_runs(page, words, made, tmp_path):
    text = (GUIDE.parents[1] / page).read_text()
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    (tmp_path / "mine.py").write_text("\n".join(blocks))
    (tmp_path / "docs").symlink_to(GUIDE.parents[1])
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=1", "mine.py", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert (tmp_path / made).is_dir()
