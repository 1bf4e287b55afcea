"""A run on meshes of every axis: the same losses as on one process, on any of them resumed."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from tests.recipes.tiny import corpus, losses, tiny_run, train_on

from warploom.models.architecture import Experts
from warploom.models.families import llama
from warploom.recipes.runner.parallel import Parallel
from warploom.recipes.runner.watch import Watch

EXPERTS = Experts(count=4, top_k=2, hidden=64, score="softmax_after", balance=0.01)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"))


def _near(got, want):
    assert [step for step, _, _ in got] == [step for step, _, _ in want]
    for (_, a, b), (_, c, d) in zip(got, want, strict=True):
        assert abs(float(a) - float(c)) < 2e-5 * abs(float(c))
        assert abs(float(b) - float(d)) < 2e-4 * abs(float(d))


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("pp2", {"parallel": Parallel(schedule="zbv"), "recompute": "selective"}),
        (
            "cp2",
            {
                "parallel": Parallel(balance="document", zero=3),
                "watch": Watch(fingerprints=True, stragglers_every=3),
            },
        ),
        ("dp2,ep2", {"parallel": Parallel(zero=2, offload=True, offload_activations=True)}),
    ],
)
def test_a_run_is_the_same_on_any_mesh(text, tmp_path, mesh, options):
    experts = EXPERTS if "ep" in mesh else None
    sizes = dataclasses.replace(
        llama.tiny(), layers=4, vocabulary=300, width=32, head_dim=8, hidden=64, max_positions=128
    )
    made = dataclasses.replace(sizes, tied=experts is None, experts=experts)

    def run(folder, **changes):
        return tiny_run(text, tmp_path / folder, steps=6, architecture=made, **changes)

    code, words = train_on(run("one"), 1, tmp_path / "one.txt")
    assert code == [0], words
    code, words = train_on(run("many", mesh=mesh, **options), 2, tmp_path / "many.txt")
    assert code == [0, 0], words
    assert ("the others wait most for rank" in words) == ("watch" in options)
    _near(losses(tmp_path / "many"), losses(tmp_path / "one"))
    saved = [load_file(tmp_path / f / "model" / "model.safetensors") for f in ("one", "many")]
    assert saved[0].keys() == saved[1].keys()
    for name, tensor in saved[0].items():
        torch.testing.assert_close(saved[1][name], tensor, atol=1e-3, rtol=0, msg=name)
