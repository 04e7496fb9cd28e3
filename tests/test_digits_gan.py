"""The GAN on digits: its losses and its question by hand, its record, and scores against retraining."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from retrograd import All, Unrolled, attribute, check, random_subsets, record, retrain
from retrograd.cases.digits_gan import DigitsCase, DigitsGAN, digits_classifier, digits_gan, frechet_distance, margin
from retrograd.errors import InputError, ReplayDrift, ReplayMismatch
from retrograd.game import CoupledGame
from retrograd.trajectory import Examples, MemoryCheckpoints, Recorder, Trajectory, batch_order

COUNT, BATCH = 12, 4


@pytest.fixture(scope="module")
def case() -> DigitsCase:
    return digits_gan(COUNT, latent=3, hidden=4, penalty=0.5, dtype=torch.float64)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.02, betas=(0.5, 0.99), eps=1e-2)


@pytest.fixture(scope="module")
def run(case) -> Any:
    return record(
        case.networks(0), case.images, case.game, optimizer=adam, epochs=2, batch_size=BATCH, checkpoints=All(), seed=1
    )


@pytest.fixture(scope="module")
def queries(case, run) -> Any:
    return case.queries(run.update_map.model, 3, seed=4)


def test_images_are_divided(case):
    assert case.images.shape == (COUNT, 64)
    assert case.images.dtype == torch.float64
    assert 0 <= case.images.min() < case.images.max() <= 1
    assert (case.game.classifier(case.held_out).argmax(1) == case.held_out_labels).double().mean() > 0.9
    assert torch.equal(digits_gan(COUNT, seed=0).images.double(), case.images)
    assert not torch.equal(digits_gan(COUNT, seed=1).images.double(), case.images)
    assert isinstance(case.game, CoupledGame)


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_losses_by_hand(case, penalty):
    model, game = case.networks(3), DigitsGAN(case.game.classifier, 3, penalty)
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    torch.manual_seed(7)
    found = game.loss(model, case.images[:4], weights)
    torch.manual_seed(7)
    made = model["generator"](torch.randn(4, 3, dtype=torch.float64))
    seen = []
    for image in case.images[:4]:
        leaf = image.clone().requires_grad_()
        logit = model["discriminator"](leaf)
        (slope,) = torch.autograd.grad(logit, leaf)
        seen.append(F.softplus(-logit[0]) + penalty / 2 * slope.square().sum())
    fake = model["discriminator"](made)
    reals = (seen[0] + 2 * seen[2] + seen[3]) / 4
    torch.testing.assert_close(found["discriminator"], reals + F.softplus(fake).mean())
    torch.testing.assert_close(found["generator"], F.softplus(-fake).mean())


def test_the_question_by_hand(case, run, queries):
    noise, classes = queries
    model = run.update_map.model
    probabilities = case.game.classifier(model["generator"](noise)).softmax(1)
    assert torch.equal(classes, probabilities.argmax(1))
    own = probabilities.gather(1, classes[:, None])[:, 0]
    torch.testing.assert_close(run.measurements(queries), (own / (1 - own)).log().detach())
    assert margin(torch.tensor([[200.0, 0.0]]), torch.tensor([0])).isfinite().all()


def test_the_record_replays(run):
    assert run.state(len(run)).equals(run.checkpoints.load(len(run)))
    assert len(run) == 12
    assert run.drift == 0.0
    before, after = run.state(1), run.state(2)
    moved = {name for name in before.params if not torch.equal(before.params[name], after.params[name])}
    assert moved == {name for name in before.params if name.startswith("generator")}


def changed(run: Any, queries: Any, example: int, size: float = 1e-5) -> Tensor:
    ones = torch.ones(len(run.examples), dtype=torch.float64)
    up, down = (
        run.rerun(weights=ones.index_fill(0, torch.tensor(example), 1 + sign * size)).measurements(queries) for sign in (1, -1)
    )
    return (up - down) / (2 * size)


def test_scores_equal_differences_of_retraining(run, queries):
    scores = attribute(run, queries, method=Unrolled(), check_roughness=False).values
    assert scores.shape == (3, COUNT)
    assert scores.abs().min() > 1e-8
    for example in (0, 5):
        torch.testing.assert_close(scores[:, example], changed(run, queries, example), rtol=1e-5, atol=1e-9)


def test_many_are_trained_together(run, queries):
    kept = random_subsets(run, 3, 0.75)
    together, alone = (retrain(run, queries, kept, together=count).outcomes for count in (3, 1))
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    assert (alone[0] != run.measurements(queries)).all()


@pytest.mark.filterwarnings("ignore:replays of this run")
def test_an_ordinary_loop_with_two_optimizers(case):
    """As anyone would write it: the fakes are detached, the penalty is autograd's, and sums are made in another order."""
    model, images, game = case.networks(0), case.images, case.game
    critics, makers = (
        torch.optim.Adam(model[player].parameters(), lr=rate, betas=(0.5, 0.99), eps=1e-2)
        for player, rate in (("discriminator", 0.02), ("generator", 0.01))
    )
    recorder = Recorder(model, images, game, [critics, makers])
    for ids in batch_order(Examples(images), 2, BATCH, seed=0):
        with recorder.step(ids):
            made = model["generator"](torch.randn(BATCH, 3, dtype=torch.float64)).detach()
            reals = images[ids].requires_grad_()
            logits = model["discriminator"](reals)
            (slopes,) = torch.autograd.grad(logits.sum(), reals, create_graph=True)
            critics.zero_grad()
            penalty = game.penalty / 2 * slopes.square().sum(1).mean()
            (F.softplus(-logits).mean() + F.softplus(model["discriminator"](made)).mean() + penalty).backward()
            critics.step()
        with recorder.step(ids):
            makers.zero_grad()
            made = model["generator"](torch.randn(BATCH, 3, dtype=torch.float64))
            F.softplus(-model["discriminator"](made)).mean().backward()
            makers.step()
    run = recorder.finish()
    assert len(run) == 12
    question = case.queries(model, 2)
    scores = attribute(run, question, method=Unrolled(), check_roughness=False).values
    torch.testing.assert_close(scores[:, 3], changed(run, question, 3), rtol=1e-4, atol=1e-7)


def altered(run: Any, step: int, name: str, size: float) -> Trajectory:
    """The run with its first and last state only, in one of which a parameter is not what it was."""
    checkpoints = MemoryCheckpoints()
    for stored in (0, len(run)):
        state = run.state(stored)
        checkpoints.save(replace(state, params={**state.params, name: state.params[name] + size}) if stored == step else state)
    return Trajectory(run.update_map, run.examples, run.records, checkpoints, All())


@pytest.mark.parametrize("name", ["discriminator.4.bias", "generator.0.4.bias"])
def test_rounding_of_a_player_whose_turn_it_is_not_is_forgiven(run, name):
    """It does not move, so that rounding from earlier steps is all that differs: no part of this step."""
    drifting = altered(run, 0, name, 1e-9)
    with pytest.warns(ReplayDrift):
        assert len(list(drifting.reverse())) == len(run)
    assert drifting.drift < 1e-5


@pytest.mark.parametrize("name", ["discriminator.0.weight", "generator.0.0.weight"])
def test_a_player_that_moved_in_anothers_turn_is_found_in_what_is_stored(run, name):
    with pytest.raises(ReplayMismatch):  # the last turn is the generator's
        list(altered(run, len(run), name, 1e-4).reverse())


def test_frechet_distance_of_known_normals():
    draw = torch.Generator().manual_seed(0)
    white = torch.randn(200, 3, generator=draw, dtype=torch.float64)
    white = (white - white.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(white.T.cov())).T  # covariance I exactly
    scale, shift = torch.tensor([2.0, 3.0, 0.5], dtype=torch.float64), torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)
    expected = (1 + 4) + (1 + 4 + 0.25)  # ‖m‖² + Σ (s − 1)²
    assert frechet_distance(white, white * scale + shift) == pytest.approx(expected)
    assert frechet_distance(white, white) == pytest.approx(0, abs=1e-9)
    mixing = torch.randn(3, 3, generator=draw, dtype=torch.float64)
    first, second = torch.eye(3, dtype=torch.float64), mixing @ mixing.T
    root = torch.linalg.eigvalsh(second).clamp(min=0).sqrt()
    assert frechet_distance(white, white @ mixing.T) == pytest.approx(
        float((first.diag() + second.diag()).sum() - 2 * root.sum())
    )


def test_distance_of_images(case):
    real, noise = case.distance(case.held_out[::2]), case.distance(torch.rand(300, 64, dtype=torch.float64))
    assert real < 0.2 < noise


def test_networks_begin_with_their_seed_only(case):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (case.networks(seed).state_dict() for seed in (0, 0, 1))
    digits_classifier(case.images, torch.zeros(COUNT, dtype=torch.int64), steps=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if name.endswith("weight"))
    spread = case.networks(0)["generator"][0][2].weight.std().item()
    assert spread == pytest.approx(math.sqrt(2 / 4), rel=0.6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: digits_gan(0), "count must be from 1 to 1397"),
        (lambda: digits_gan(1500), "count must be from 1 to 1397"),
        (lambda: DigitsGAN(torch.nn.Identity(), penalty=-1.0), "penalty at least 0"),
        (lambda: DigitsGAN(torch.nn.Identity(), latent=0), "latent must be at least 1"),
    ],
)
def test_refusals(wrong, message):
    with pytest.raises(InputError, match=message):
        wrong()


def test_scores_can_be_checked_by_retraining(case, run, queries):
    """How many models fit together is measured though the penalty's torch.func keeps hooks on saved tensors out."""
    scores = check(attribute(run, queries, method=Unrolled(), check_roughness=False), run, subsets=16)
    assert scores.check is not None
    assert scores.check.predicted.shape == (16, 3)
