import pytest
from tests.recipes import tiny

from warploom.recipes.runner import peak


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A small corpus, whose token store all tests share."""
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def ceiling(monkeypatch):
    """Take a number for what the machine multiplies; `trained` of test_train.py measures it."""
    monkeypatch.setattr(peak, "matmul_ceiling", lambda device, dtype: 1e11)


@pytest.fixture
def tiny_run(text, tmp_path):
    """`tiny_run(**changes)`: a run of seconds in a folder of its own."""

    def make(**changes):
        folder = changes.pop("folder", tmp_path / "run")
        return tiny.tiny_run(changes.pop("corpus", text), folder, **changes)

    return make
