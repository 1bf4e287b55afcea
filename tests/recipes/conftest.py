import pytest
from tests.recipes import tiny


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A small corpus, whose token store all tests share."""
    return tiny.corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def tiny_run(text, tmp_path):
    """`tiny_run(**changes)`: a run of seconds in a folder of its own."""

    def make(**changes):
        folder = changes.pop("folder", tmp_path / "run")
        return tiny.tiny_run(changes.pop("corpus", text), folder, **changes)

    return make
