"""The report says what the run has measured, in a page that needs nothing else."""

import importlib.util
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.recipes import tiny

from warploom.models.cost import flops_per_token
from warploom.recipes.evaluation.baselines import ngram_baselines, xz_baseline
from warploom.recipes.runner import report
from warploom.recipes.runner.charts import Series, level, save_png, svg, ticks
from warploom.recipes.runner.data import open_store
from warploom.recipes.runner.folder import RunFolder
from warploom.recipes.runner.metrics import read
from warploom.recipes.runner.train import train


@pytest.fixture(scope="module")
def done(text, tmp_path_factory):
    run = tiny.tiny_run(text, tmp_path_factory.mktemp("report") / "run")
    train(run)
    folder = Path(run.folder)
    facts = json.loads((folder / "report.json").read_text())
    return run, facts, (folder / "report.html").read_text(), read(folder / "metrics.jsonl")


class _Tags(HTMLParser):
    """Every tag, and whether each that opens is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(done):
    _, _, page, _ = done
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert not [a for tag, a in tags.seen if "src" in a or "href" in a]
    assert "url(" not in page
    assert "@import" not in page
    assert [tag for tag, _ in tags.seen].count("svg") == 5
    assert "nan" not in re.findall(r'points="([^"]*)"', page)


def test_the_page_shows_what_was_measured(done):
    run, facts, page, lines = done
    for shown in ("Planned and measured", "Samples", "Environment", "bigram", "trigram", "xz"):
        assert shown in page
    assert f"{facts['held_out']['nats_per_token']:.4f} nats/token" in page
    assert facts["held_out"]["nats_per_token"] == lines[-1]["held_out_loss"]
    assert facts["tokens"] == run.steps * run.batch_tokens
    assert facts["run"]["learning_rate"] == run.learning_rate
    assert facts["environment"]["torch"]["version"]


def test_speed_is_the_median_of_the_steps(done):
    run, facts, _, lines = done
    times = sorted(line["step_time_s"] for line in lines[2:])
    assert facts["speed"]["step_time_s"] == times[len(times) // 2]
    assert facts["speed"]["tokens_per_s"] == pytest.approx(512 / times[len(times) // 2])
    mfus = sorted(line["mfu"] for line in lines[2:])
    assert facts["speed"]["mfu"] == mfus[len(mfus) // 2]
    whole = flops_per_token(run.architecture, run.sequence).training
    for line in lines:  # documents shorten attention
        per_token = line["mfu"] * facts["speed"]["peak_flops"] / line["tokens_per_s"]
        assert 0.5 * whole < per_token <= whole * (1 + 1e-9)


def test_flops_are_planned_and_counted(done):
    _, facts, _, _ = done
    # counted: attention's backward computes the scores again, which the plan leaves out
    assert 1.0 <= facts["flops"]["measured"] / facts["flops"]["planned"] < 1.15


def test_baselines_are_fitted_on_the_rows_that_were_seen(done):
    run, facts, _, _ = done
    from warploom.recipes.corpus.packing import PackedRows
    from warploom.recipes.corpus.sampling import Sampler

    store = open_store(run, Path("unused"), verify=True)
    pad = store.tokenizer.pad
    rows, held = (PackedRows(s, run.sequence, pad) for s in (store.train, store.heldout))
    seen = Sampler(rows.full, 8, run.seed).seen(run.steps)
    limit = 2048 // 64
    chosen = [i * held.padded // limit for i in range(limit)]
    expected = ngram_baselines(
        [rows.read(seen)], [held.read(chosen)], store.tokenizer.byte_counts()
    )
    found = {b["name"]: b for b in facts["baselines"]}
    for one in expected:
        assert found[one.name]["nats_per_token"] == pytest.approx(one.nats_per_token, rel=1e-9)
    xz = xz_baseline(store.train.text(store.tokenizer), store.heldout.text(store.tokenizer))
    assert found[xz.name]["bits_per_byte"] == xz.bits_per_byte


def test_a_missing_matplotlib_is_said_in_words(done, tmp_path, monkeypatch):
    _, facts, _, lines = done
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    folder = RunFolder(tmp_path)
    report.write(folder, facts, lines)
    assert not (tmp_path / "loss.png").exists()
    assert "matplotlib is not installed" in (tmp_path / "report.html").read_text()
    assert "matplotlib is not installed" in folder.finished()["notes"][0]


def test_text_is_escaped(done, tmp_path):
    _, facts, _, lines = done
    evil = {**facts, "samples": [{"prompt": "<script>", "text": "</pre><b>&", "temperature": "0"}]}
    page = report.page(evil, lines)
    assert "<script>" not in page
    assert "&lt;/pre&gt;&lt;b&gt;&amp;" in page


@pytest.mark.parametrize(
    ("low", "high", "most"),
    [(0, 1, 5), (3.1, 6.3, 5), (0, 1e-4, 5), (5, 5, 4), (-2, 7, 6), (0, 123456, 6), (0, 0, 5)],
)
def test_ticks_are_round_and_enclose(low, high, most):
    found = ticks(low, high, most)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= most + 2
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps))


def test_a_curve_is_where_its_values_are():
    drawn = svg("Loss", "nats", [Series("a", [(0, 0.0), (10, 10.0)]), level("b", 5.0, 10)])
    lines = re.findall(r'points="([^"]*)"', drawn)
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in lines[0].split())
    (_, y2), (_, y3) = (map(float, p.split(",")) for p in lines[1].split())
    assert x0 < x1
    assert y0 > y1  # up is less in SVG
    assert y2 == y3 == pytest.approx((y0 + y1) / 2)
    assert "nan" not in svg("Loss", "nats", [Series("a", [(1, math.nan), (2, 1.0)])])
    assert "nothing was measured" in svg("Loss", "nats", [Series("a", [])])


def test_a_long_curve_is_thinned_and_keeps_its_end():
    drawn = svg("Loss", "nats", [Series("a", [(i, i) for i in range(100_000)])])
    points = re.findall(r'points="([^"]*)"', drawn)[0].split()
    assert 500 < len(points) <= 601
    assert float(points[-1].split(",")[0]) > 600


def test_the_png_is_drawn(tmp_path):
    path = tmp_path / "loss.png"
    assert save_png(path, "Loss", "nats", [Series("a", [(1, 2.0), (2, 1.0)])]) is None
    assert path.read_bytes()[:4] == b"\x89PNG"
