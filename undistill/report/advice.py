"""The first box of the page, for readers who know no machine learning, and the words that it explains."""

import re
from statistics import fmean

from markupsafe import Markup, escape

from undistill.attacks.attack import Role
from undistill.auditing.schema import Report
from undistill.auditing.verdict import best_thief, columns, students_of
from undistill.auditing.wording import TITLE, UNPROTECTED, is_above_zero, points
from undistill.core.errors import UndistillError
from undistill.data.source import Source
from undistill.report.decision import FEW


def advice(report: Report) -> dict[str, str]:
    """Texts below the decision, by heading: the model, whether its protection was seen to work, what is open."""
    return {
        "Protected": _what(report),
        "Does it work?": _works(report),
        "What stays open": _open(report),
    }


def _what(report: Report) -> str:
    names = report.class_names
    try:
        title = Source.parse(report.data).title
    except UndistillError:  # code of somebody else, which no page may execute
        title = report.data
    examples = f" ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" if names else ""
    applied = report.title.removeprefix(TITLE)
    defences = re.findall(r"(?:^|, |:)(\w+)\(", applied) or [applied]
    by = f"Its protection, {' and '.join(defences)}, is meant to spoil copies of it."
    if report.pairs[0].reached:
        by = "It was asked as a black box: whether anything protects it is not known."
    elif applied == UNPROTECTED:
        by = "It has no protection."
    return f"A model that sorts the images of “{title}” into {report.classes} classes{examples}. {by}"


def _works(report: Report) -> str:
    damage = report.verdict.damage
    if damage is None:
        return "That cannot be said: no unprotected twin of the model is known, beside which copies could be compared."
    if damage.n < FEW:
        return f"That cannot be said: each copy was trained only {damage.n} time{'s' * (damage.n > 1)}."
    if is_above_zero(damage):
        return (
            f"Against thieves who simply imitate it, yes: their copies are {points(damage.mean)} worse than copies of "
            "the unprotected model."
        )
    return (
        "That was not seen: copies of the protected model were not measurably worse than copies of the unprotected one."
    )


def _open(report: Report) -> str:
    found = columns(report.cells)
    best = best_thief(report)
    copies = list(students_of(report.cells)[best].values())
    kinds = len({cell.column[1] for cell in report.cells if cell.side == "victim" and cell.role != Role.BOUND})
    did = f"asked it {max(cell.queries for cell in copies):,} times"
    why = "Whatever the protection, a thief can learn from each right answer; only fewer answers slow him down."
    if any(cell.threat and cell.threat.access == "weights" for cell in copies):
        did = "had its file"
        why = "Whoever has the file has the model: no protection of answers changes that."
    return (
        f"The best of {kinds} kind{'s' * (kinds > 1)} of thieves that were tried {did}, and got a copy that sorts "
        f"{100 * fmean(found[best].values()):.0f} of 100 images rightly. {why}"
    )


GLOSSARY = {
    "student": "A network that a thief trains; its teacher is the model whose answers it imitates.",
    "scratch": "Training on true labels alone, without anybody's answers.",
    "top answer": "The class to which the model gives the highest probability.",
    "distillation": "Training a network to give the same probabilities as another one.",
    "best thief": "The thief whose copy was the most accurate on validation images, by whatever means.",
    "worst case": "The thief whom answers took furthest beyond what labels alone give, chosen by validation images.",
    "seed": "The number from which all randomness of a training is drawn; other seeds show the spread by luck.",
    "floor": "A student that no such protection can stop, beside which others are read.",
    "ECE": "Expected calibration error: by how much the stated confidence differs from the share of right answers.",
    "NLL": "Negative log-likelihood: how surprised the model is by the true class; lower is better.",
    "nats": "Unit of difference between two sets of probabilities; 0 means that they are equal.",
    "95 % interval": "A range that holds the true value in 95 of 100 such measurements.",
}


def word(name: str, shown: str = "") -> Markup:
    """A word of the list, explained where the pointer rests on it; the link leads to its entry."""
    text = Markup('<a class="word" href="#{}" title="{}">{}</a>')
    return text.format(anchor(name), GLOSSARY[name], shown or name)


def anchor(name: str) -> str:
    """Where a word's entry stands on the page."""
    return "word-" + re.sub(r"\W+", "-", name).strip("-")


def explained(text: str) -> Markup:
    """`text` as HTML, in which each word of the list is explained where it comes first."""
    found = {match[0]: match for name in GLOSSARY for match in [re.search(rf"\b{re.escape(name)}\b", text)] if match}
    html, at = Markup(""), 0
    for match in sorted(found.values(), key=lambda match: match.start()):
        if match.start() >= at:
            html, at = html + escape(text[at : match.start()]) + word(match[0]), match.end()
    return html + escape(text[at:])
