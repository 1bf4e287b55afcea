"""The report of a finished run: the same facts as a table, a page and a JSON file.

The page is one HTML file without outside references: curves as SVG, everything else as tables.
"""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .charts import Series, level, save_png, svg
from .folder import RunFolder, write_json, write_text
from .progress import duration
from .style import CSS

Facts = Mapping[str, Any]


def write(folder: RunFolder, facts: Facts, lines: Sequence[Facts]) -> None:
    """Write loss.png, report.html and, last, report.json.

    Args:
        folder: Where.
        facts: What `finish` collected, JSON values.
        lines: The metrics, one mapping a step.
    """
    missing = save_png(folder.path / "loss.png", "Loss", "nats a token", _loss_curves(lines, facts))
    notes = [*facts["notes"], *([missing] if missing else [])]
    write_text(folder.path / "report.html", page({**facts, "notes": notes}, lines))
    write_json(folder.report, {**facts, "notes": notes})


def rows(facts: Facts) -> list[tuple[str, str, str]]:
    """Return the final table: what, value, beside what it is to be read."""
    speed, held, memory = facts["speed"], facts["held_out"], facts["memory"]
    return [
        (
            "tokens/s",
            f"{speed['tokens_per_s']:,.0f}",
            f"{speed['tokens_per_s_per_rank']:,.0f} a rank; a step is {speed['step_time_s']:.3f} s",
        ),
        (
            "MFU",
            f"{100 * speed['mfu']:.1f} %",
            f"of {speed['peak_flops']:.3g} FLOP/s: {speed['peak']}",
        ),
        (
            "peak memory",
            f"{memory['peak_gib']:.2f} GiB",
            f"the largest of {memory['ranks']} ranks; {memory['planned_gib']:.2f} planned for "
            f"weights, optimizer and activations",
        ),
        (
            "held-out loss",
            f"{held['nats_per_token']:.4f} nats/token",
            f"{held['bits_per_byte']:.4f} bits/byte, {held['tokens']:,} tokens",
        ),
        *((f"  {b['name']}", _nats(b), _bits(b)) for b in facts["baselines"]),
        (
            "trained",
            f"{facts['tokens']:,} tokens",
            f"{facts['steps']:,} steps in {duration(facts['training_s'])}; data waits "
            f"{100 * speed['data_wait_share']:.2f} % of the time{_fp8(facts['run'])}",
        ),
    ]


def _fp8(run: Facts) -> str:
    return f"; projections in FP8 ({run['fp8']} scales)" if run.get("fp8") else ""


def _nats(baseline: Facts) -> str:
    nats = baseline.get("nats_per_token")
    return "" if nats is None else f"{nats:.4f} nats/token"


def _bits(baseline: Facts) -> str:
    note = f", {baseline['note']}" if baseline.get("note") else ""
    return f"{baseline['bits_per_byte']:.4f} bits/byte{note}"


def print_table(folder: RunFolder, facts: Facts) -> None:
    """Print the final table, and where everything is."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    table = Table(title=f"{folder.path}: {facts['parameters']['total']:,} parameters")
    table.add_column("")
    table.add_column("measured", justify="right")
    table.add_column("")
    for row in rows(facts):
        table.add_row(*row)
    console.print(table, markup=False, highlight=False)
    for note in facts.get("notes", ()):
        console.print(note, markup=False, highlight=False)
    console.print(
        f"report {folder.path / 'report.html'}\nweights {folder.model}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _curve(lines: Iterable[Facts], key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def _loss_curves(lines: Sequence[Facts], facts: Facts) -> list[Series]:
    last = float(facts["steps"])
    levels = [
        level(b["name"], b["nats_per_token"], last)
        for b in facts["baselines"]
        if b.get("nats_per_token") is not None
    ]
    train = Series("training batch", _curve(lines, "loss"))
    return [train, Series("held-out text", _curve(lines, "held_out_loss")), *levels]


def page(facts: Facts, lines: Sequence[Facts]) -> str:
    """Return the report as one HTML page."""
    name = Path(facts["folder"]).name
    figures = [
        ("Loss", svg("Loss", "nats a token", _loss_curves(lines, facts))),
        ("Throughput", svg("Throughput", "tokens/s", _one(lines, "tokens_per_s"))),
        ("Learning rate", svg("Learning rate", "rate", _one(lines, "learning_rate"))),
        ("Gradient norm", svg("Gradient norm", "norm", _one(lines, "grad_norm"))),
        ("Memory", svg("Memory", "GiB, rank 0", _one(lines, "peak_memory_gib"))),
    ]
    samples = "".join(
        f'<pre class="sample"><b>{html.escape(s["prompt"])}</b>{html.escape(s["text"])}</pre>'
        for s in facts["samples"]
    )
    body = [
        f"<h1>{html.escape(name)}</h1>",
        f"<p>{facts['parameters']['total']:,} parameters, {facts['tokens']:,} tokens, "
        f"{facts['steps']:,} steps. Finished {html.escape(facts['finished'])}.</p>",
        *(f"<p>{html.escape(note)}</p>" for note in facts.get("notes", ())),
        _table([("", "measured", ""), *rows(facts)]),
        '<div class="charts">',
        *(f"<figure><figcaption>{t}</figcaption>{drawn}</figure>" for t, drawn in figures),
        "</div>",
        "<h2>Planned and measured</h2>",
        _table([("", "planned", "measured", ""), *_planned(facts)]),
        "<h2>Samples</h2>",
        f"<p>{html.escape(facts['sampling'])}</p>",
        samples,
        *_details("Configuration", facts["run"]),
        *_details("Corpus", facts["corpus"]),
        *_details("Environment", facts["environment"]),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}'
        f'</title><meta name="viewport" content="width=device-width"><style>{CSS}</style></head>'
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _one(lines: Sequence[Facts], key: str) -> list[Series]:
    return [Series(key, _curve(lines, key))]


def _planned(facts: Facts) -> list[tuple[str, str, str, str]]:
    flops, memory = facts["flops"], facts["memory"]
    ratio = flops["measured"] / flops["planned"]
    return [
        (
            "FLOPs of one micro-batch, a rank",
            f"{flops['planned']:.4g}",
            f"{flops['measured']:.4g}",
            f"{ratio:.3f} of the plan; {flops['note']}",
        ),
        ("FLOPs of the run", f"{flops['run']:.4g}", "", flops["formula"]),
        (
            "memory of a rank, GiB",
            f"{memory['planned_gib']:.2f}",
            f"{memory['peak_gib']:.2f}",
            memory["note"],
        ),
    ]


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    cells = "".join(f"<th>{html.escape(c)}</th>" for c in head)
    made = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>" for line in body
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{made}</tbody></table>"


def _details(title: str, value: Any) -> list[str]:
    text = html.escape(json.dumps(value, indent=1, ensure_ascii=False))
    return [f"<details><summary>{title}</summary><pre>{text}</pre></details>"]
