import math

import pytest
import torch
from torch import nn

from undistill.core.errors import AccessDenied, BudgetExceeded
from undistill.core.unshown import LOG_ZERO
from undistill.data.batches import Batch
from undistill.victims.oracle import Access, Oracle


def batch(size: int = 5) -> Batch:
    return Batch(torch.rand(size, 1, 4, 4), torch.zeros(size, dtype=torch.int64), torch.arange(size), 0)


@pytest.fixture
def victim() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def test_answers_are_log_probabilities_without_gradient(victim: nn.Module) -> None:
    question = batch()
    answer = Oracle(victim, Access.QUERY)(question)
    assert torch.allclose(answer.log_p.exp().sum(1), torch.ones(5))
    assert torch.allclose(answer.log_p, victim(question.images).log_softmax(1))
    assert answer.shown.all()
    assert not answer.log_p.requires_grad


def test_impossible_answers_have_a_finite_floor() -> None:
    class Certain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[0.0, -math.inf]]).expand(len(x), 2)

    assert Oracle(Certain(), Access.QUERY)(batch()).log_p.min() == LOG_ZERO


def test_every_answer_is_counted_and_the_budget_holds(victim: nn.Module) -> None:
    oracle = Oracle(victim, Access.QUERY, budget=12)
    oracle(batch())
    oracle(batch())
    assert oracle.ledger.billed == 10
    with pytest.raises(BudgetExceeded, match="budget of 12 is spent: 10 images answered, 5 more asked"):
        oracle(batch())
    assert oracle.ledger.billed == 10
    oracle(batch(2))
    assert oracle.ledger.billed == 12


def test_weights_are_locked_unless_granted(victim: nn.Module) -> None:
    question = batch().images
    copy = Oracle(victim, Access.WEIGHTS).weights
    assert torch.equal(copy(question), victim(question))
    nn.init.zeros_(next(copy.parameters()))
    assert not torch.equal(copy(question), victim(question)), "an attack may change its copy, not the victim"
    for access in (Access.NONE, Access.QUERY):
        with pytest.raises(AccessDenied, match=r"set its `needs` to Access\.WEIGHTS"):
            _ = Oracle(victim, access).weights


def test_without_access_no_answers(victim: nn.Module) -> None:
    with pytest.raises(AccessDenied, match=r"Access\.QUERY"):
        Oracle(victim, Access.NONE)(batch())


def test_the_victim_neither_learns_nor_drops_out() -> None:
    victim = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)).train()
    oracle, question = Oracle(victim, Access.QUERY), batch()
    assert torch.equal(oracle(question).log_p, oracle(question).log_p)
    assert not any(parameter.requires_grad for parameter in victim.parameters())
