"""Configurations by shape: what a search finds, where it may run, which entries count.

The kernel is a fake with an injected clock: `times` says how long each configuration takes.
"""

import json
import threading

import pytest
import torch

from warploom.benchmarks.kernels import search
from warploom.benchmarks.kernels.search import searching
from warploom.kernels import backends, tuning

DEVICE = torch.device("cuda", 0)
SLOW, FAST, CLOSE = {"BLOCK": 64}, {"BLOCK": 128}, {"BLOCK": 256}
TIMES = {64: 1.0, 128: 0.5, 256: 0.99}


@pytest.fixture(autouse=True)
def capability(monkeypatch):
    monkeypatch.setattr(tuning, "_capability", lambda device: "9.0")
    monkeypatch.setattr(search, "time_ms", lambda measured, device, repeats: measured())
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    yield
    tuning.use()
    tuning._STATE.frozen = False


class Kernel:
    """Counts its measurements."""

    def __init__(self, times=TIMES):
        self.times, self.measured = times, []

    def measure(self, configuration):
        self.measured.append(configuration["BLOCK"])
        return self.times[configuration["BLOCK"]]

    def __call__(self, key=(4096,), candidates=(SLOW, FAST, CLOSE), **rest):
        return tuning.tuned("rms_norm", key, candidates, self.measure, device=DEVICE, **rest)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "cache" / "tuned.json"


def test_without_being_asked_nothing_is_searched():
    kernel = Kernel()
    assert kernel() == SLOW
    assert not kernel.measured


def test_a_search_finds_the_fastest_and_remembers_it(file):
    kernel = Kernel()
    with searching(file):
        assert kernel() == FAST
        assert kernel() == FAST, "the second time it is looked up"
    assert kernel.measured == [64, 128, 256]
    assert kernel() == SLOW, "outside, a user's searches do not count"
    tuning.use(file)
    assert kernel() == FAST
    assert kernel(key=(8192,)) == SLOW, "another key has no entry"
    assert kernel(candidates=(SLOW, CLOSE)) == SLOW, "what is no candidate is not taken"
    entry = json.loads(file.read_text())["rms_norm"]["9.0"]["4096"]
    assert entry == {"configuration": FAST, "ms": 0.5, "source": backends.source_hash("rms_norm")}
    assert [path.name for path in file.parent.iterdir()] == ["tuned.json"]


def test_the_default_stays_where_another_is_hardly_faster(file):
    with searching(file):
        assert Kernel()(candidates=(SLOW, CLOSE)) == SLOW


def test_a_search_keeps_to_its_time(file):
    kernel = Kernel()
    with searching(file, seconds=0.0):
        assert kernel() == SLOW
    assert kernel.measured == [64], "the default is always measured"


def test_two_searches_share_a_file(file):
    with searching(file):
        Kernel()(key=("forward", 64))
        Kernel()(key=("forward", 128))
    assert set(json.loads(file.read_text())["rms_norm"]["9.0"]) == {"forward,64", "forward,128"}


@pytest.mark.parametrize("how", ["frozen", "freeze", "deterministic", "capture", "compiling"])
def test_a_search_is_refused(file, monkeypatch, how):
    kernel = Kernel()
    if how == "freeze":
        tuning.freeze()
    elif how == "capture":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    elif how == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    elif how == "deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with searching(file):
        if how == "frozen":
            with tuning.frozen():
                assert kernel() == SLOW
            assert not kernel.measured
            assert kernel() == FAST, "after the block it is allowed again"
            return
        assert kernel() == SLOW
    assert not kernel.measured
    assert not file.exists()


def test_the_search_reaches_other_threads(file):
    """The backward of a GPU runs in threads of autograd."""
    found = []
    with searching(file):
        thread = threading.Thread(target=lambda: found.append(Kernel()()))
        thread.start()
        thread.join()
    assert found == [FAST]


def test_entries_of_older_code_do_not_count(file):
    with searching(file):
        Kernel()()
    table = json.loads(file.read_text())
    table["rms_norm"]["9.0"]["4096"]["source"] = "0" * 64
    file.write_text(json.dumps(table))
    tuning.use(file)
    assert Kernel()() == SLOW


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_broken_file_is_told_once_and_replaced(file, caplog, text):
    file.parent.mkdir()
    file.write_text(text)
    tuning.use(file)
    assert Kernel()() == SLOW
    assert Kernel()(key=(1,)) == SLOW
    assert len(caplog.records) == 1
    assert f"{file} is ignored" in caplog.text
    with searching(file):
        assert Kernel()() == FAST
    assert json.loads(file.read_text())["rms_norm"]


def test_devices_without_triton_take_the_default(file):
    with searching(file):
        for device in ("cpu", "meta"):
            found = tuning.tuned("rms_norm", (1,), [SLOW, FAST], None, device=torch.device(device))
            assert found == SLOW


def test_the_number_of_candidates_is_bounded():
    with pytest.raises(ValueError, match="rms_norm must have 1 to 8 candidates, got 9"):
        Kernel()(candidates=[{"BLOCK": n} for n in range(9)])
    with pytest.raises(ValueError, match="got 0"):
        Kernel()(candidates=[])


def test_the_table_that_ships_holds_operators():
    table = json.loads(tuning.SHIPPED.read_text())
    assert set(table) <= set(backends.available())


def test_by_warps_doubles_and_halves_within_bounds():
    assert [c["num_warps"] for c in tuning.by_warps({"BLOCK": 64, "num_warps": 4})] == [4, 8, 2]
    assert [c["num_warps"] for c in tuning.by_warps({"num_warps": 1})] == [1, 2]
    assert [c["num_warps"] for c in tuning.by_warps({"num_warps": 32})] == [32, 16]
    assert [c["num_warps"] for c in tuning.by_warps({"num_warps": 16})] == [16, 8]
    assert all(c.get("BLOCK") == 64 for c in tuning.by_warps({"BLOCK": 64, "num_warps": 4}))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_search_does_not_turn_in_place_again_and_again(inplace):
    """What a search calls many times must not change its own input."""
    pytest.importorskip("triton", reason="needs the package triton")
    from tests.kernels.launches import recorded

    from warploom.kernels.rope import rotary

    def warps(pick):
        x, table = torch.empty(8, 4, 64, dtype=torch.bfloat16), torch.empty(8, 32)
        with recorded(pick) as found:
            rotary(x, x.clone(), table, table, inplace=inplace, backend="triton")
        return [launch.options["num_warps"] for launch in found]

    first, second = warps(0), warps(1)
    assert second == (first if inplace else [2 * w for w in first])
