"""What a reader who knows no machine learning needs: the first box of the page, and the words explained."""

import re

from markupsafe import Markup, escape

from undistill.auditing.schema import Report
from undistill.auditing.wording import is_above_zero, price
from undistill.data.source import Source

FEW = 3  # seeds below which nothing is claimed, or little


def advice(report: Report) -> dict[str, str]:
    """One sentence each: what was protected, what that costs, what stays open, and what to do next."""
    verdict = report.verdict
    return {
        "Protected": _what(report),
        "Price": price(verdict.cost),
        "What stays open": (
            "Whoever may query the model often enough can train a copy from its top answers alone; the table below "
            "says how good such copies were."
        ),
        "What to do": _next(report),
    }


def _what(report: Report) -> str:
    """The model, its defence, and whether that was seen to work."""
    title, damage = Source.parse(report.data).title, report.verdict.damage
    model = f"A model of {title} with {report.classes} classes"
    defences = report.victim.spec.partition(" ")[2]
    if not defences:
        return f"{model}, by nothing: no defence was applied."
    if damage.n < FEW:
        shown = f"whether imitators learn less from it cannot be said from {damage.n} seed{'s' * (damage.n > 1)}"
    elif is_above_zero(damage):
        shown = "plain imitators were seen to learn less from it"
    else:
        shown = "that plain imitators learn less from it was not seen"
    return f"{model}, by {defences}; {shown}."


def _next(report: Report) -> str:
    verdict = report.verdict
    if any(pair.may_be_memory for pair in report.pairs):
        return "Measure again on images that the model has not seen (undistill adopt --test DATA)."
    if verdict.damage.n < FEW:
        return f"Measure again with at least {FEW} seeds (--seeds {FEW}) before you rely on any difference here."
    if not is_above_zero(verdict.damage):
        return "Do not rely on this protection: it was not shown to work here. Strengthen it, or limit queries."
    if report.flags:
        return "Read the warnings below first; then limit how often each client may query the model."
    return "Limit how often each client may query the model, and keep this report with the model that you ship."


GLOSSARY = {
    "student": "A network that a thief trains; its teacher is the model whose answers it imitates.",
    "scratch": "Training on true labels alone, without anybody's answers.",
    "top answer": "The class to which the model gives the highest probability.",
    "distillation": "Training a network to give the same probabilities as another one.",
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
