"""`manifest.json` of an exported folder: what it is, what was measured of it, and the hash of every file."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from undistill.auditing.curve import harmless, queries_within
from undistill.auditing.schema import Count, NotNegative, Number, Part, Report, Share, Text
from undistill.core.errors import StoreError
from undistill.core.files import parse_json, read_text, sha256
from undistill.data.pictures import Shaping
from undistill.report.decision import decide

MANIFEST = "manifest.json"


class Audited(Part):
    """Findings of an audit of the model."""

    decision: Text = ""
    """Ship, ship with limits, or do not ship."""
    sentence: Text
    made: Text
    suite: Text
    best_copy: Share
    """Accuracy of the best thief's copy."""
    queries: dict[Text, Count] = Field(default_factory=dict)
    """For each gap in accuracy, such as '0.05', the fewest queries that bought a copy within it; none that did not."""
    harmless: Count | None = None
    """The most queries of the curve up to which no copy came within the first of `GAPS`; None without a curve."""
    report_sha256: Text


class Manifest(Part):
    """The whole of manifest.json."""

    format: Literal[1] = 1
    name: Text
    undistill: Text
    classes: Annotated[list[Text], Field(min_length=2, max_length=100_000)]
    shape: tuple[int, int, int]
    """Channels, height, width of an image."""
    shaping: Shaping = "squash"
    """How a picture of another shape was brought to it for training."""
    background: Text = "white"
    """Colour behind transparent pictures."""
    outputs: Annotated[list[Text], Field(min_length=1, max_length=2)]
    form: Literal["label", "top", "full"]
    network: Text
    defences: list[Text]
    responses: list[Text]
    calibrated_on: dict[Text, Text]
    bits: NotNegative | None
    """The most bits that an answer carries beyond its label; null where nothing bounds them."""
    price: Number | None
    found: dict[Text, Number]
    data: Text
    data_sha256: Text
    identity: Text
    """Hash of everything on which answers depend."""
    weights_sha256: Text = ""
    accuracy: Share
    """On validation images."""
    compared: Count
    """Validation images on which the files answer as the run does."""
    tolerance: NotNegative
    """Largest difference of a probability that was allowed."""
    largest: NotNegative
    """Largest difference that there was, rows at a threshold aside."""
    at_threshold: Count
    """Rows that differed by more, since rounding moved them over a threshold of a response."""
    audited: Audited | None
    files: dict[Text, Text]
    """SHA-256 of every other file."""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an exported folder, all of whose files are as they were written; else `StoreError`."""
    path = folder / MANIFEST
    if not path.is_file():
        raise StoreError(f"{folder} is no exported folder; 'undistill export RUN --to DIR' makes one.")
    try:
        manifest = Manifest.model_validate(parse_json(read_text(path)))
    except (ValidationError, ValueError) as error:
        raise StoreError(f"{path} is damaged ({str(error).splitlines()[0]}); export the run again.") from None
    for name, digest in manifest.files.items():
        if Path(name).name != name or not (folder / name).is_file() or sha256(folder / name) != digest:
            raise StoreError(f"{folder / name} is missing or not the file that was exported; export the run again.")
    return manifest


def audited(report: Report, digest: str) -> Audited:
    """The findings of a report that those need who get the model."""
    thief = ("victim", report.verdict.best_attack, report.verdict.best_student)
    best = [cell for cell in report.cells if cell.column == thief]
    return Audited(
        decision=decide(report).choice,
        sentence=report.verdict.sentence,
        made=report.made,
        suite=report.suite,
        best_copy=sum(cell.accuracy for cell in best) / len(best) if best else 0.0,
        queries=queries_within(report),
        harmless=harmless(report),
        report_sha256=digest,
    )
