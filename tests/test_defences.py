"""Defences that train: CMIM and MildlyNasty."""

import torch
from torch import nn

from tests.conftest import RECIPE
from undistill.data import Data
from undistill.defences import Defence
from undistill.defences.cmim import CMIM
from undistill.defences.mildly_nasty import MildlyNasty
from undistill.models.model import last_layer
from undistill.runs.run import Run
from undistill.training.fit import Fit
from undistill.training.losses import conditional_information
from undistill.training.metrics import divergence, evaluate

CPU = torch.device("cpu")


def protected(defence: Defence, data: Data, honest: Run) -> nn.Module:
    teacher = honest.network()
    return defence.protect(teacher, teacher, lambda: honest.fresh(1), data.split, Fit(RECIPE, 0, CPU))


def test_answers_of_one_class_come_to_be_alike(toy: Data, honest: Run) -> None:
    """The conditional mutual information that CMIM minimises falls; at T = 1 the toy world's answers are certain."""
    plain, alike = (evaluate(protected(CMIM(weight=w), toy, honest), toy.test) / 4 for w in (0.0, 10.0))
    labels = toy.test.labels
    assert conditional_information(alike, labels) < 0.7 * conditional_information(plain, labels)


def test_a_mildly_nasty_teacher_differs_in_its_last_layer_alone(toy: Data, honest: Run) -> None:
    teacher = honest.network()
    network = protected(MildlyNasty(omega=0.05), toy, honest)
    layer = last_layer(network)
    own = {id(parameter) for parameter in layer.parameters()} if layer else set()
    last = {name for name, parameter in network.named_parameters() if id(parameter) in own}
    changed = {
        name for name, value in network.state_dict().items() if not torch.equal(value, teacher.state_dict()[name])
    }
    assert changed == last, "features and batch statistics stay"
    assert divergence(evaluate(network, toy.test), evaluate(teacher, toy.test)) > 0.1
