"""docs/benchmarks.md from what `bench.py` measured."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

Figures = dict[str, float | str]
Table = Sequence[Sequence[str]]

WAYS = ("exact", "fp32", "fast")

PAGE = """# Benchmarks

`make bench` measures and writes this page. {machine}. Medians of {rounds} rounds; behind ± the half range
between rounds. Images 3 x 32 x 32, batch 128, ten classes. **Plain** is the loop in `benchmarks/plain.py`, which does
what public distillation code does: fp32, default layout, PIL transforms for each sample in a DataLoader (in this
process or in two workers, the better of both), teacher run at every step, `.item()` at every step. **Exact** is our
loop in fp32 and default layout, for which equal bits are promised; **fp32** takes the layout that a trial chose, and
**fast** the precision too (`--fast`). Ratios compare within one run of this page. {gpu}

## One training step

Milliseconds; in brackets how many times faster than plain. "First" includes the frozen network's answers, "again" is
a step whose answers are remembered: a second omega, a second student, a second attack.

{steps}

## Where a step's time goes

Data is what drawing, cropping, flipping and converting a batch takes. Arithmetic is what torch's flop counter counts
for forward and backward, as a rate and as the share of a 4096 x 4096 matrix product of the same precision, measured in
the same process. Above 100 % the library's convolutions are faster than its matrix product.

{shares}

## An audit of eight cells

Four attacks by two students over one ResNet-18 victim, {images:,.0f} images, six epochs. Queries are what students
asked; runs are the images on which the victim was really run, the test images included. "Trials recorded" is the same
audit once more, without any answer, in a folder where the engines were already chosen: choosing costs the same for an
audit of any size.

{audits}

The answer store took {stored:,.0f} bytes; its formula (docs/scaling.md) says {formula:,.0f} and a header of under 400
for each of {files} files.

## Cost against size

Exact compute, ResNetC-20 victim, plain CNN students, two epochs; the pool's workers and torchrun's processes have one
thread each. Seconds, and the ratio to size 1.

{scaling}
"""


def write_page(rows: Sequence[Figures], environment: dict[str, str | int], page: Path) -> None:
    measured = {str(row["key"]): _median([r for r in rows if r["key"] == row["key"]]) for row in rows}
    audit = measured["audit fast"]
    tests, epochs, classes, half = 128, 6, 10, 2
    columns = [f"{way}, {turn}" for way in WAYS for turn in ("first", "again")]
    page.write_text(
        PAGE.format(
            machine=", ".join(f"{name} {value}" for name, value in environment.items()),
            rounds=len({row["round"] for row in rows}),
            gpu=""
            if "NVIDIA" in str(environment["device"])
            else "No GPU was at hand for it; what was measured on one is in [the log](log/gpu.md), and `python -m "
            "benchmarks.gpu` measures more.",
            steps=_table(["training", "network", "plain", *columns], _steps(measured)),
            shares=_table(["network", "way", "step", "data", "GFLOP/s", "of the matrix rate"], _shares(measured)),
            images=audit["attackers_images"],
            audits=_table(["", "seconds", "faster", "queries", "runs", "peak memory"], _audits(measured)),
            stored=audit["stored"],
            formula=(epochs * float(audit["attackers_images"]) + tests) * classes * half,
            files=epochs + 1,
            scaling=_table(["what grows", "1", "2", "4", "8"], _scaling(measured)),
        )
    )


def _median(rows: Sequence[Figures]) -> Figures:
    """Of every figure; the half range of the time."""
    result = {
        name: value if isinstance(value, str) else statistics.median(float(row[name]) for row in rows)
        for name, value in rows[-1].items()
    }
    times = [float(row.get("ms", row.get("seconds", 0))) for row in rows]
    return result | {"half_range": (max(times) - min(times)) / 2}


def _steps(measured: dict[str, Figures]) -> Iterator[list[str]]:
    for key in _cases(measured, "step"):
        _, training, model, teacher = key.split(" ")
        plain = measured[f"{key} plain"]
        cells = [f"{plain['ms']:.0f} ± {plain['half_range']:.0f}"]
        for ours in (measured[f"{key} {way}"] for way in WAYS):
            first, again = float(ours["ms"]) + float(ours["answer_ms"]), float(ours["ms"])
            times = [f"{ms:.0f} ± {ours['half_range']:.0f} ({float(plain['ms']) / ms:.1f}x)" for ms in (first, again)]
            cells += times if training != "normal" else ["", times[1]]
        yield [training, model if teacher == model else f"{model} from {teacher}", *cells]


def _shares(measured: dict[str, Figures]) -> Iterator[list[str]]:
    for key in _cases(measured, "step normal"):
        for way in WAYS:
            row = measured[f"{key} {way}"]
            ms, rate = float(row["ms"]), float(row["flops"]) / float(row["ms"]) * 1000
            share = f"{float(row['data_ms']) / ms:.1%}"
            compute = str(row["compute"]).removeprefix("Compute")
            of_matrix = f"{rate / float(row['matrix_rate']):.0%}"
            yield [key.split(" ")[2], compute, f"{ms:.0f} ms", share, f"{rate / 1e9:.0f}", of_matrix]


def _audits(measured: dict[str, Figures]) -> Iterator[list[str]]:
    names = {"plain": "plain", "exact": "exact", "fast": "fast", "again": "fast, trials recorded"}
    plain = measured["audit plain"]
    for way, name in names.items():
        row = measured[f"audit {way}"]
        seconds = f"{row['seconds']:.1f} ± {row['half_range']:.1f}"
        runs = float(row.get("computed", row["queries"]))
        faster = f"{float(plain['seconds']) / float(row['seconds']):.1f}x"
        yield [name, seconds, faster, f"{row['queries']:,.0f}", f"{runs:,.0f}", f"{row['peak_mib']:,.0f} MiB"]


def _scaling(measured: dict[str, Figures]) -> Iterator[list[str]]:
    for what in ("samples", "cells", "pool", "torchrun"):
        one = float(measured[f"{what} 1"]["seconds"])
        sizes = [measured.get(f"{what} {size}") for size in (1, 2, 4, 8)]
        yield [what, *(f"{row['seconds']:.1f} ({float(row['seconds']) / one:.2f})" if row else "" for row in sizes)]


def _cases(measured: dict[str, Figures], prefix: str) -> Iterable[str]:
    return dict.fromkeys(key.rsplit(" ", 1)[0] for key in measured if key.startswith(prefix))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
