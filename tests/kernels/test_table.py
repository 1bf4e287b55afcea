"""The page of proofs is what the tests say, and leaves nothing out."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_CODE = """
from tests.kernels import table
cells = table.collect()
print("\\n".join(table.empty(cells)) + "---")
print(table.table(cells), end="")
"""


def test_the_page_is_made_from_the_tests_and_no_item_lacks_one():
    done = subprocess.run([sys.executable, "-c", _CODE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    empty, page = done.stdout.split("---\n", 1)
    assert not empty, empty
    command = "python -m tests.kernels.table > docs/kernels.md"
    assert page == (ROOT / "docs" / "kernels.md").read_text(), f"run {command}"


def test_an_item_that_lacks_a_test_is_seen():
    from collections import defaultdict

    from tests.kernels.table import Found, empty, operators

    cells = defaultdict(Found)
    assert len(empty(cells)) > 10 * len(operators())
