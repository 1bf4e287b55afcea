"""The guide's table of models names every size, with its exact count."""

import importlib
import inspect
import re
from pathlib import Path

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
