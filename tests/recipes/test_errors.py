"""A config's own sentence comes out of tyro as it is; tyro's own words stay tyro's."""

from dataclasses import dataclass, field

import pytest
import tyro

from warploom.recipes.errors import UserError, unboxed


@dataclass(frozen=True)
class Inner:
    steps: int = 1

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, got {self.steps}")


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("kind", "words"), [(Inner, ["--steps", "0"]), (Outer, ["--inner.steps", "0"])]
)
def test_the_sentence_of_a_config_is_raised_and_nothing_is_printed(kind, words, capsys):
    with pytest.raises(UserError, match=r"^steps must be at least 1, got 0$"), unboxed():
        tyro.cli(kind, args=words)
    assert capsys.readouterr().err == ""


def test_runs_by_name_too(capsys):
    runs = {"a": ("one", Outer()), "b": ("two", Outer())}
    with pytest.raises(UserError, match="got -1"), unboxed():
        tyro.extras.overridable_config_cli(runs, args=["a", "--inner.steps", "-1"])
    assert capsys.readouterr().err == ""


def test_what_tyro_cannot_parse_is_said_by_tyro(capsys):
    with pytest.raises(SystemExit) as stop, unboxed():
        tyro.cli(Inner, args=["--step", "2"])
    assert stop.value.code == 2
    assert "--steps" in capsys.readouterr().err


def test_what_is_well_said_passes():
    with unboxed():
        assert tyro.cli(Inner, args=["--steps", "2"]) == Inner(2)
