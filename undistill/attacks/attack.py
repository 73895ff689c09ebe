"""`Attack`: how a student is taught from a victim's answers, and what the thief needs for it.

A new attack is one file in a folder beside this one; CONTRIBUTING.md says how. It is found by itself, and tested by
`tests/test_contracts.py`.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

from torch import nn

from undistill.core.spec import Spec
from undistill.data.batches import Batch
from undistill.data.split import Split
from undistill.training.fit import Fit
from undistill.training.objectives import Terms
from undistill.training.recipe import Recipe
from undistill.victims.answer import Answer, Form
from undistill.victims.bought import Bought
from undistill.victims.oracle import Access, Oracle


class ThiefData(StrEnum):
    """Data that a thief has of his own."""

    LABELLED = "labelled"
    UNLABELLED = "unlabelled"
    """Images without labels: there are none in his batches."""
    SURROGATE = "surrogate"
    """Other images than the owner's."""
    NONE = "none"


class Role(StrEnum):
    """Role of a result in the comparison. The first four are floors: no defence that keeps accuracy can stop them.

    An audit finds its floors and its plain attack by these, whatever they are called.
    """

    NO_TEACHER = "no teacher"
    LABELS = "labels"
    """Labels of the thief's own, used better than plainly."""
    TOP_ANSWERS = "top answers"
    SEMI_SUPERVISED = "semi-supervised"
    """Top answers, and images beside them that nobody labelled."""
    PLAIN = "plain"
    """Plain distillation."""
    ADAPTIVE = "adaptive"
    RECOVERY = "recovery"
    """Undoes a known defence."""
    BOUND = "upper bound"
    """An attack with knowledge that no thief has, which shows how far others could get at best."""
    SURROGATE = "surrogate data"
    """Answers to other images than the owner's."""
    DATA_FREE = "data-free"
    """The victim's weights and no data."""
    BLACK_BOX = "black box"
    """Queries and no data."""
    WHITE_BOX = "white box"
    """The victim's weights, and images."""
    OTHER = "other"


FLOORS = (Role.NO_TEACHER, Role.LABELS, Role.TOP_ANSWERS, Role.SEMI_SUPERVISED)


class Buying(StrEnum):
    """How a thief spends a budget of queries."""

    EACH_VIEW = "each view"
    """He asks again for every augmented view: N x epochs queries."""
    ONCE = "once"
    """He buys the answer to each image once: N queries."""
    CHOSEN = "chosen"
    """He chooses what to ask, and minds `oracle.ledger.left`."""


class Fresh(Protocol):
    """New students of one architecture."""

    def __call__(self, number: int = 0) -> nn.Module:
        """The student of that number, the same for the same seed."""

    def stages(self, network: nn.Module) -> Sequence[nn.Module]:
        """The parts of a student after which its feature maps can be read, from the input to the output."""


def tries(**values: Sequence[Any]) -> Mapping[str, Sequence[Any]]:
    """A search space: for each field the values that a careful thief tries."""
    return MappingProxyType(values)


class Attack(Spec):
    """Fields are hyper-parameters; the problem comes as arguments; an attack never grades itself."""

    needs: ClassVar[Access] = Access.NONE
    """The access that the oracle must grant."""
    form: ClassVar[Form] = Form.LABEL
    """The least that answers must show."""
    data: ClassVar[ThiefData] = ThiefData.LABELLED
    role: ClassVar[Role] = Role.OTHER
    buying: ClassVar[Buying] = Buying.EACH_VIEW
    passes_over_spare: ClassVar[bool] = False
    """Whether its epochs pass over all images of the thief, also over those for which he bought nothing."""
    space: ClassVar[Mapping[str, Sequence[Any]]] = tries()
    """Values of its fields that a careful thief tries; an audit tries learning rates and clipping by itself."""

    @property
    def buys(self) -> Buying:
        """How this thief spends a budget."""
        return self.buying

    @property
    def asks_own_images(self) -> bool:
        """Whether it asks about nothing but the thief's own images, each as it is."""
        return False

    def check(self, victim: nn.Module | None, fresh: "Fresh") -> None:
        """`Unsuitable` for a victim or for students with which it cannot be tried; `victim` is None for a black box.

        An audit asks before it trains anything.
        """

    def images(self, count: int) -> int:
        """How many it learns from of the `count` images that the thief may have."""
        return count

    def queries_per_image(self, recipe: Recipe) -> int:
        """How often it asks for each training image in a training by `recipe`; it sizes what a budget buys."""
        return 1 if self.buys == Buying.ONCE else recipe.epochs

    @abstractmethod
    def run(self, oracle: Oracle, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        """Train a student, `fresh()`, against `oracle` on the attacker's own `data`; return it."""


class QueryAttack(Attack):
    """The common base of attacks that ask for answers to the thief's own images."""

    listed = False
    needs = Access.QUERY
    quiet = ("once",)
    once: bool = False
    """Buy one answer for each image as it is, and take it for all its views; else ask for every view."""

    @property
    def buys(self) -> Buying:
        return Buying.ONCE if self.once else self.buying

    @property
    def asks_own_images(self) -> bool:
        return self.once and self.data != ThiefData.SURROGATE

    def asking(self, oracle: Oracle, data: Split) -> Callable[[Batch], Answer]:
        """The answer to each batch of a training on `data`: from the victim, or from what was bought of it."""
        return Bought.of(oracle, data) if self.once else oracle


class Distillation(QueryAttack):
    """An attack that is one loss: a student imitates the answers to its batches."""

    listed = False
    capturable: ClassVar[bool] = False
    """Whether a GPU may replay steps of its objective, see `Fit`."""

    @abstractmethod
    def objective(self, student: nn.Module, batch: Batch, answer: Answer) -> Terms:
        """The terms of the loss of `student` on a batch to which the victim gave `answer`."""

    def run(self, oracle: Oracle, fresh: Fresh, data: Split, fit: Fit) -> nn.Module:
        ask = self.asking(oracle, data)

        def objective(student: nn.Module, batch: Batch) -> Terms:
            return self.objective(student, batch, ask(batch))

        return fit(fresh(), data, objective, capturable=self.capturable)


def bought_once(attack: Attack) -> Attack:
    """The attack of a thief who buys each answer once."""
    return attack.model_copy(update={"once": True}) if isinstance(attack, QueryAttack) else attack
