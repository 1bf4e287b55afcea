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


@pytest.fixture(scope="module")
def server(folder):
    """A server of the module's `folder`, on a port of its own."""
    from tests.recipes.serving import live  # needs what GPU machines lack

    with live(folder) as made:
        yield made


@pytest.fixture(scope="module")
def alone(folder):
    """An engine that nobody else uses."""
    from tests.recipes.serving import engine_of

    from warploom.recipes.rollout.codec import Codec

    return engine_of(folder, Codec(folder), running=64)
