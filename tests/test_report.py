import re
import shutil
from datetime import UTC, date, datetime
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from torch import nn

from tests.browser import CHROMIUM, browser
from tests.conftest import STUDENT
from undistill.api import audit
from undistill.auditing.flags import CHECKS
from undistill.auditing.schema import Interval
from undistill.core.errors import StoreError
from undistill.report.advice import GLOSSARY, advice, explained
from undistill.report.decision import decide
from undistill.report.evidence import Pictured, read_evidence, write_evidence
from undistill.report.page import percent, points, read_report, render
from undistill.runs.run import Run


@pytest.fixture(scope="module")
def folder(victim: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reports") / "audit"
    audit(victim, out, students=[STUDENT], seeds=2, device="cpu", by="the owner")
    return out


class Addresses(HTMLParser):
    """Everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data") and value]


def test_the_page_needs_no_network(folder: Path) -> None:
    html = (folder / "report.html").read_text()
    page = Addresses()
    page.feed(html)
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.found)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"@import|url\((?!#)", html)
    assert page.tags.count("svg") == 5, "students, for phones too; answers, maps, training"


FIGURES = """[...document.querySelectorAll("svg path")].filter(path => path.getBoundingClientRect().width > 0)
    .map(path => path.closest("svg")).filter((one, place, all) => all.indexOf(one) === place).length"""
LOST = """[...document.querySelectorAll("a[href]")].filter(one => !document.getElementById(one.hash.slice(1))).length"""
REACHED = """[...document.querySelectorAll("a[href], [tabindex='0']")].filter(one => one.checkVisibility()).length"""
UNREACHABLE = """[...document.querySelectorAll("[role=img]")]
    .filter(one => one.scrollWidth > one.clientWidth + 1 && one.tabIndex !== 0).length"""


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(folder: Path, width: int) -> None:
    """Nothing is fetched or complained of, nothing scrolls sideways, and the keyboard reaches what can be reached."""
    with browser() as page:
        page.open(folder / "report.html", width)
        assert page.value("innerWidth") == width
        assert page.value("document.documentElement.scrollWidth") <= width
        assert page.value(FIGURES) == 4
        assert page.value(LOST) == page.value(UNREACHABLE) == 0
        reached = set()
        for _ in range(page.value(REACHED)):
            page.press("Tab")
            reached.add(page.value("[...document.querySelectorAll('*')].indexOf(document.activeElement)"))
        assert len(reached) == page.value(REACHED) > 8, "words, tables, figures that scroll"
        assert page.complaints == []
        assert {address for address in page.fetched if not address.startswith("data:")} == {
            (folder / "report.html").as_uri()
        }


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_the_page_prints_on_a4_and_begins_with_the_decision(folder: Path) -> None:
    with browser() as page:
        page.open(folder / "report.html", 1280)
        printed = page.pdf()
        page.call("Emulation.setEmulatedMedia", media="print")
        page.open(folder / "report.html", 690)  # the width of A4 between its margins, in pixels of CSS
        box = page.value("document.querySelector('#decision').getBoundingClientRect().bottom")
    sizes = {tuple(map(round, map(float, found.split()))) for found in re.findall(rb"/MediaBox *\[([^]]*)\]", printed)}
    assert sizes == {(0, 0, 595, 842)}
    assert box < 500, "half of what A4 holds between its margins"


def test_words_are_explained_where_they_come_first() -> None:
    html = explained("ECE and <b> of a seed; ECE again, reseeded")
    assert html == (
        f'<a class="word" href="#word-ECE" title="{GLOSSARY["ECE"]}">ECE</a> and &lt;b&gt; of a '
        f'<a class="word" href="#word-seed" title="{GLOSSARY["seed"]}">seed</a>; ECE again, reseeded'
    )


def test_the_first_box_claims_what_was_seen(folder: Path) -> None:
    report = read_report(folder)

    def said(mean: float, low: float | None, n: int) -> str:
        damage = Interval(mean=mean, low=low, high=None if low is None else 2 * mean - low, n=n)
        changed = report.model_copy(update={"verdict": report.verdict.model_copy(update={"damage": damage})})
        return advice(changed)["Does it work?"]

    assert said(0.1, 0.05, 3).startswith("Against thieves who simply imitate it, yes: their copies are 10.0 points")
    assert said(0.1, -0.05, 3).startswith("That was not seen: copies of the protected")
    assert said(0.1, None, 1) == "That cannot be said: each copy was trained only 1 time."
    box = advice(report)
    assert box["Protected"] == (
        "A model that sorts the images of “toy” into 3 classes (0, 1, 2). Its protection, Nasty, is meant to spoil "
        "copies of it."
    )
    bare = report.model_copy(update={"title": "Audit of an unprotected model"})
    assert advice(bare)["Protected"].endswith("It has no protection.")
    cells = [
        cell.model_copy(update={"threat": cell.threat.model_copy(update={"access": "weights"})})
        for cell in report.cells
    ]
    assert (
        "that were tried had its file, and got" in advice(report.model_copy(update={"cells": cells}))["What stays open"]
    )
    assert "that were tried asked it" in box["What stays open"]
    foreign = {"title": "Audit of def.py:my_noise(s=1), Rounding(digits=1)", "data": "my.py:Data(n=3)"}
    said = advice(report.model_copy(update=foreign))["Protected"]
    assert said.startswith("A model that sorts the images of “my.py:Data(n=3)”")
    assert "Its protection, my_noise and Rounding, is meant" in said
    right, before = (100 * teacher.accuracy for teacher in (report.victim, report.honest))
    assert f"{right:.3g} rightly; without protection {before:.3g}." in decide(report).cost
    cost = Interval(mean=0.02, low=-0.021, high=0.061, n=300)
    dear = report.model_copy(update={"verdict": report.verdict.model_copy(update={"cost": cost})})
    assert "it may also be anything from 2.1 more to 6.1 fewer." in decide(dear).cost
    assert "The best of 4 kinds of thieves" in box["What stays open"]


def test_the_page_says_who_when_and_of_what(folder: Path) -> None:
    report, html = read_report(folder), (folder / "report.html").read_text()
    assert report.by == "the owner"
    assert date.fromisoformat(report.made) <= datetime.now(UTC).date()
    assert report.class_names == ["0", "1", "2"]
    pair = report.pairs[0]
    for said in (report.by, report.made, "0, 1, 2", pair.victim_sha256, pair.honest_sha256, pair.data_sha256):
        assert said in html
    assert len({pair.victim_sha256, pair.honest_sha256, pair.data_sha256}) == 3


def test_the_best_thief_comes_before_the_damage(folder: Path) -> None:
    report, html = read_report(folder), (folder / "report.html").read_text()
    best = max((one for one in report.trials if one.side == "victim"), key=lambda one: one.validation)
    assert report.verdict.best_attack == (best.listed or best.attack), (
        "chosen by other images than those on which it is measured"
    )
    made = [cell.accuracy for cell in report.cells if cell.side == "victim" and cell.attack == best.attack]
    highest = fmean(made)
    cards = re.findall(r'<div class="card"><b>([^<]*)</b>', html)
    assert cards[1].startswith(f"{100 * highest:.1f}")
    assert cards[2] == points(report.verdict.damage)


def test_the_box_for_everyone_and_the_verdict_come_first(folder: Path) -> None:
    html = (folder / "report.html").read_text()
    report = read_report(folder)
    text = re.sub(r"<style>.*?</style>|<[^>]*>", " ", html.split("<body>")[1], flags=re.S)
    text = unescape(" ".join(text.split()))
    assert text.startswith(f"{report.title} Do not ship. Why ")
    assert (
        text.index("What it costs")
        < text.index("What stays open")
        < text.index(report.verdict.sentence)
        < text.index("accuracy of the best thief")
    )
    assert "Top answers still get through" in text
    assert STUDENT in text
    for flag in report.flags:
        assert flag.name in html


def test_pages_are_made_again_from_the_figures_alone(folder: Path) -> None:
    before = (folder / "report.html").read_bytes(), (folder / "report.md").read_bytes()
    for name in ("report.html", "report.md"):
        (folder / name).unlink()
    assert render(folder) == folder / "report.html"
    assert before == ((folder / "report.html").read_bytes(), (folder / "report.md").read_bytes())


def test_evidence_shows_both_teachers(folder: Path, toy) -> None:
    evidence = read_evidence(folder / "evidence.npz")
    assert evidence.images.shape == (3, 1, 12, 12)
    assert sorted(evidence.labels) == [0, 1, 2]
    assert np.allclose(evidence.honest.sum(1), 1, atol=1e-5)
    assert np.abs(evidence.honest - evidence.victim).sum() > 0.1
    assert set(evidence.maps) == {"honest features", "victim features", "honest answers", "victim answers"}
    assert evidence.maps["honest answers"].shape == (len(evidence.point_labels), 2)


def test_missing_and_damaged_reports_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="'undistill audit' or 'undistill demo' writes one"):
        render(tmp_path)
    (tmp_path / "report.json").write_text('{"format": 1}')
    with pytest.raises(StoreError, match="is no report of this version"):
        render(tmp_path)
    (tmp_path / "report.json").write_bytes((folder / "report.json").read_bytes())
    (tmp_path / "evidence.npz").write_bytes((folder / "evidence.npz").read_bytes()[:200])
    with pytest.raises(StoreError, match=r"evidence\.npz is missing or damaged"):
        render(tmp_path)


def test_class_names_cannot_inject_html(folder: Path, tmp_path: Path) -> None:
    report = read_report(folder)
    evil = report.model_copy(update={"title": "<script>alert(1)</script>"})
    (tmp_path / "report.json").write_text(evil.model_dump_json())
    with np.load(folder / "evidence.npz") as archive:
        arrays = dict(archive) | {"classes": np.array(["<script>", "&", r"$\foo$"])}
    np.savez(tmp_path / "evidence.npz", **arrays)
    assert "<script>" not in render(tmp_path).read_text()


def test_class_names_with_a_leading_underscore_are_in_the_legend(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "report.json", tmp_path)
    with np.load(folder / "evidence.npz") as archive:
        np.savez(tmp_path / "evidence.npz", **(dict(archive) | {"classes": np.array(["_cat", "dog", "owl"])}))
    assert render(tmp_path).read_text().count(">_cat<") == 2, "title of its picture, and the legend of the maps"


def test_maps_of_a_single_feature(toy, tmp_path: Path) -> None:
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 3))
    write_evidence(tmp_path / "evidence.npz", toy, dict.fromkeys(("honest", "victim"), Pictured.of(network, toy)))
    assert np.isfinite(read_evidence(tmp_path / "evidence.npz").maps["honest features"]).all()


def test_a_network_that_answers_everything_alike_is_mapped(toy, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(144, 3))
    nn.init.zeros_(network[1].weight)
    write_evidence(tmp_path / "evidence.npz", toy, dict.fromkeys(("honest", "victim"), Pictured.of(network, toy)))
    assert np.isfinite(read_evidence(tmp_path / "evidence.npz").maps["victim answers"]).all()


def test_numbers_are_written_for_people() -> None:
    assert percent(0.9123) == "91.2 %"
    assert percent(Interval(mean=0.9, low=0.88, high=0.92, n=3)) == "90.0 ± 2.0 %"
    assert points(Interval(mean=-0.021, low=None, high=None, n=1)) == "-2.1"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.9123, "91.2 %"),
        (Interval(mean=0.9, low=0.85, high=0.95, n=3), "90.0 ± 5.0 %"),
        (Interval(mean=0.9, low=0.75, high=1.05, n=3), "90.0 % (75 to 100)"),
        (Interval(mean=0.4, low=-1.0, high=1.8, n=2), "40.0 % (0 to 100)"),
        (Interval(mean=0.4, low=None, high=None, n=1), "40.0 %"),
    ],
)
def test_shares_stay_between_0_and_100(value: float | Interval, shown: str) -> None:
    assert percent(value) == shown


def test_every_flag_is_documented() -> None:
    """Raised if, explanation, what to do: four cells, none of them empty."""
    rows = [line for line in Path("docs/flags.md").read_text().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0].strip("`") for row in cells] == list(CHECKS)
    assert all(len(row) == 4 and all(row) for row in cells)
