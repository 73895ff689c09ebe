"""Losses and generators of synthesised images, against values computed by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import STUDENT, These
from undistill.attacks import Attack
from undistill.attacks.data_free.dafl import DAFL
from undistill.attacks.data_free.deep_inversion import DeepInversion
from undistill.attacks.data_free.fast import Fast
from undistill.attacks.data_free.synthesis import (
    BatchNormStatistics,
    Generator,
    agreed_divergence,
    disagreement,
    evaluating,
    shifted,
    total_variation,
)
from undistill.attacks.data_free.zskt import ZSKT
from undistill.data import Data
from undistill.models import Model
from undistill.training.compute import Compute
from undistill.training.fit import Fit
from undistill.training.recipe import Recipe
from undistill.victims.oracle import Oracle


def test_batch_norm_statistics_are_distances_of_means_and_of_variances() -> None:
    """Means 1 and -2 against 0 and 0: sqrt(5); variances 1 and 4 against 1 and 1: 3."""
    norm = nn.BatchNorm1d(2).eval()
    with BatchNormStatistics(norm) as statistics:
        norm(torch.tensor([[0.0, -4.0], [2.0, 0.0]]))
        assert statistics.distance == pytest.approx(math.sqrt(5) + 3)


def test_batch_norm_statistics_leave_the_network_as_it_was() -> None:
    norm = nn.BatchNorm1d(2).eval()
    with BatchNormStatistics(norm) as statistics:
        pass
    norm(torch.ones(3, 2))
    assert statistics.distance == 0


def test_total_variation_is_the_mean_step_between_neighbours() -> None:
    """Down: 0, 3 -> mean 1.5; across: 1, 4 -> mean 2.5."""
    assert total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 4.0]]]])) == pytest.approx(1.5 + 2.5)


def test_disagreement_is_one_less_for_each_bit_of_jensen_and_shannon() -> None:
    sure, other = torch.tensor([[400.0, 0.0]]), torch.tensor([[0.0, 400.0]])
    assert disagreement(sure, sure) == pytest.approx(1)
    assert disagreement(sure, other, T=1) == pytest.approx(0, abs=1e-6)
    # (1, 0) against (1/2, 1/2): H(3/4, 1/4) - 1/2 bits
    bits = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5
    assert disagreement(sure, torch.zeros(1, 2), T=1) == pytest.approx(1 - bits)


def test_disagreement_has_a_gradient_however_sure_the_answers_are() -> None:
    logits = torch.tensor([[4000.0, 0.0]], requires_grad=True)
    disagreement(logits, torch.tensor([[0.0, 4000.0]])).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_dafl_wants_sure_varied_answers_and_active_features() -> None:
    """Answers (1, 0) and (0, 1): one-hot 0, entropy log 2; features 1 and 3: mean 2."""
    answers, features = torch.tensor([[400.0, 0.0], [0.0, 400.0]]), torch.tensor([[1.0], [-3.0]])
    attack = DAFL(one_hot=1, entropy=5, activation=0.1)
    assert attack._loss(answers, [features]) == pytest.approx(-5 * math.log(2) - 0.2, abs=1e-5)
    unsure = attack._loss(torch.zeros(2, 2), [])
    assert unsure == pytest.approx(math.log(2) - 5 * math.log(2))


def test_only_what_both_decide_alike_counts_as_hard() -> None:
    """The second image is told apart; of the first KL((3/4, 1/4) || (1/2 + tiny)) counts half."""
    teacher = torch.tensor([[math.log(3.0), 0.0], [9.0, 0.0]])
    student = torch.tensor([[1e-6, 0.0], [0.0, 9.0]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert agreed_divergence(teacher, student) == pytest.approx(expected / 2, abs=1e-5)
    assert agreed_divergence(teacher, -teacher) == 0


def test_shifted_images_hold_the_same_pixels_elsewhere() -> None:
    images = torch.arange(64.0).view(1, 1, 8, 8)
    moved = {int((shifted(images) == 0).nonzero()[0, 2]) for _ in range(60)}
    assert moved == {6, 7, 0, 1, 2}
    assert shifted(images).sum() == images.sum()


def test_a_rival_is_put_back_into_the_mode_it_had() -> None:
    network = nn.Dropout().train()
    with evaluating(network) as rival:
        assert rival is network
        assert not network.training
    assert network.training


class Brightness(nn.Module):
    """Says class 1 for bright images, `sure` of it or less; its batch norm remembers pixels of that `mean`."""

    def __init__(self, sure: float, mean: float = 0.5) -> None:
        super().__init__()
        self.sure = sure
        self.norm = nn.BatchNorm2d(1, affine=False)
        self.norm.running_mean.fill_(mean)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        self.norm(images)
        bright = self.sure * (images.mean((1, 2, 3)) - 0.5)
        return torch.stack([-bright, bright], 1)


def test_inversion_goes_where_the_class_and_the_statistics_are() -> None:
    victim = Brightness(sure=8)
    labels = torch.tensor([0, 1] * 4)
    plain = {"steps": 60, "variation": 0.0, "l2": 0.0}
    free, bound = (DeepInversion(statistics=s, **plain)._invert(victim, None, labels, (1, 8, 8)) for s in (0, 100))
    dark, bright = (free[labels == label].float().mean() / 255 for label in (0, 1))
    assert (dark < 0.2, bright > 0.8) == (True, True)
    far = Brightness(sure=0, mean=0.9)
    assert DeepInversion(statistics=9, **plain)._invert(far, None, labels, (1, 8, 8)).float().mean() / 255 > 0.8
    assert abs(bound[labels == 1].float().mean() / 255 - 0.5) < abs(bright - 0.5)


def test_inversion_smooths_darkens_and_looks_for_disagreement() -> None:
    """Each weight alone, against the same pixels without it; the last looks for what the student gets less surely."""
    victim, student, labels = Brightness(sure=8), Brightness(sure=0.1), torch.tensor([0, 1] * 4)
    calm = {"steps": 30, "statistics": 0.0, "variation": 0.0, "l2": 0.0, "competition": 0.0}

    def images(**weight: float) -> Tensor:
        torch.manual_seed(0)
        network = Brightness(sure=0) if "competition" not in weight else victim
        made = DeepInversion(**(calm | weight))._invert(network, student, labels, (1, 8, 8))
        return made.float() / 255

    free = images()
    assert total_variation(images(variation=1.0)) < 0.5 * total_variation(free)
    assert images(l2=1.0).mean() < 0.5 * free.mean()
    reached = {}
    for weight in (0.0, 50.0):
        made = images(competition=weight)
        reached[weight] = disagreement(victim(made), student(made))
    assert reached[50.0] < reached[0.0] - 0.01


def test_fast_moves_its_generator_a_share_of_the_way_to_its_copy() -> None:
    """Reptile: with outer 1 it becomes the copy, with 0.25 it goes a quarter of that way."""
    victim, moved = Brightness(sure=8), {}
    for outer in (0.25, 1.0):
        torch.manual_seed(0)
        generator = Generator((1, 8, 8), latent=3, width=2)
        before = nn.utils.parameters_to_vector(generator.parameters()).detach().clone()
        Fast(outer=outer, inner=2)._images(victim, None, generator, 4, 2)
        moved[outer] = nn.utils.parameters_to_vector(generator.parameters()).detach() - before
    assert moved[1.0].norm() > 0
    assert torch.allclose(moved[0.25], 0.25 * moved[1.0], atol=1e-6)


def test_fast_looks_for_what_the_student_gets_less_surely() -> None:
    """The victim is surer of brighter images, the student of none: the adversary's gradient brightens class 1."""
    victim, student = Brightness(sure=8), Brightness(sure=0.1)
    generator = Generator((1, 8, 8), latent=3, width=4)
    light = {}
    for weight in (0.0, 50.0):
        torch.manual_seed(1)
        attack = Fast(inner=30, one_hot=0, statistics=0, adversarial=weight, lr=0.01, outer=1)
        spread = attack._images(victim, student, generator, 16, 2).float().mean((1, 2, 3)) / 255 - 0.5
        light[weight] = spread.abs().mean()
    assert light[50.0] > light[0.0] + 0.05


def test_fast_goes_where_the_statistics_are() -> None:
    """Two victims that are sure of nothing, whose batch norms remember dark and bright pixels."""
    attack, light = Fast(inner=30, one_hot=0, statistics=9, adversarial=0, lr=0.01, outer=1), {}
    for mean in (0.1, 0.9):
        torch.manual_seed(0)
        images = attack._images(Brightness(sure=0, mean=mean), None, Generator((1, 8, 8), latent=3, width=4), 16, 2)
        light[mean] = images.float().mean() / 255
    assert light[0.1] < 0.45
    assert light[0.9] > 0.55


def test_fast_keeps_the_images_of_its_best_step() -> None:
    """At a learning rate that throws the generator about, the last images are not the best."""
    victim, losses = Brightness(sure=8), {}
    for inner in (1, 2, 3, 4, 5, 6):
        torch.manual_seed(0)
        attack = Fast(inner=inner, statistics=9, one_hot=0, lr=3, outer=0.1)
        images = attack._images(victim, None, Generator((1, 8, 8), latent=3, width=4), 16, 2).float() / 255
        with BatchNormStatistics(victim) as statistics:
            victim(images)
            losses[inner] = float(statistics.distance)
    best = [losses[inner] for inner in sorted(losses)]
    assert best == sorted(best, reverse=True)
    assert len(set(best)) < len(best), "some step made it worse, and was not kept"


def test_zskt_teaches_its_student_on_the_noise_of_the_generators_step(
    toy: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    forward = Generator.forward
    monkeypatch.setattr(Generator, "forward", lambda self, noise: seen.append(noise.clone()) or forward(self, noise))
    victim, student = (Model.parse(STUDENT).build(toy.shape, toy.num_classes, seed).eval() for seed in (0, 1))
    fit = Fit(Recipe(epochs=1, batch_size=16), 0, torch.device("cpu"))
    ZSKT(student_steps=2, width=4).run(Oracle(victim, ZSKT.needs), These(student), toy.attackers(0.1, 0), fit)
    first, second = seen[:3], seen[3:6]
    for group in (first, second):
        assert all(torch.equal(noise, group[0]) for noise in group), "the generator's step, then two of the student"
    assert not torch.equal(first[0], second[0])


def test_zskt_looks_for_what_the_student_believes_least(toy: Data) -> None:
    """A student that stands still: the generator alone moves, and KL(victim || student) grows."""
    victim, student = (Model.parse(STUDENT).build(toy.shape, toy.num_classes, seed).eval() for seed in (0, 1))
    fit = Fit(Recipe(epochs=8, batch_size=16, lr=1e-9), 0, torch.device("cpu"))
    ZSKT(student_steps=1, lr=0.01, width=4).run(Oracle(victim, ZSKT.needs), These(student), toy.attackers(0.1, 0), fit)
    assert fit.history[-1]["belief"] > 1.1 * fit.history[0]["belief"]


def test_zskt_is_the_victims_divergence_from_the_student(toy: Data) -> None:
    """KL(victim || student) of two networks that answer everything alike, by hand; the other way it is 0.51."""

    class Alike(nn.Module):
        def __init__(self, *probabilities: float) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor(probabilities).log())

        def forward(self, images: Tensor) -> Tensor:
            return self.logits + 0 * images.mean((1, 2, 3))[:, None]

    fit = Fit(Recipe(epochs=1, lr=1e-9), 0, torch.device("cpu"))
    victim, student = Alike(0.9, 0.05, 0.05), Alike(0.5, 0.25, 0.25)
    ZSKT(width=4).run(Oracle(victim, ZSKT.needs), These(student), toy.attackers(0.1, 0), fit)
    assert fit.history[0]["belief"] == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.05 / 0.25))


@pytest.mark.parametrize("name", ["DAFL()", "DeepInversion(count=8, steps=2)", "Fast(every=2, warmup=1)", "ZSKT()"])
def test_the_victim_is_laid_out_as_the_student_is(name: str, toy: Data) -> None:
    victim, seen = Model.parse("ConvNet(width=4)").build(toy.shape, toy.num_classes, 0), []

    def look(layer: nn.Module, _: object) -> None:
        seen.append(layer.weight.is_contiguous(memory_format=torch.channels_last))

    [layer for layer in victim.modules() if isinstance(layer, nn.Conv2d)][-1].register_forward_pre_hook(look)
    recipe = Recipe(epochs=2, compute=Compute(layout="channels_last"))
    student = Model.parse("ConvNet(width=2)").build(toy.shape, toy.num_classes, 0)
    attack = Attack.parse(name)
    attack.run(Oracle(victim, attack.needs), These(student), toy.attackers(0.1, 0), Fit(recipe, 0, torch.device("cpu")))
    assert seen[-1]
