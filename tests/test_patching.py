"""Patching by interpolation and label smoothing, against central differences."""

import pytest
import torch
from torch import nn

from retrograd import Classification, Queries, hypergradient, record
from retrograd.errors import InputError
from retrograd.hypergradients import Patched, label_smoothing_gradient, patch

STEP = 1e-5


@pytest.fixture(scope="module")
def questions():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, generator=generator, dtype=torch.float64), torch.randint(0, 3, (6,), generator=generator)


def made(smoothing: float = 0.0):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(12, 3, generator=generator, dtype=torch.float64), torch.randint(0, 3, (12,), generator=generator)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    return record(
        model,
        data,
        Classification(label_smoothing=smoothing),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.5),
        epochs=3,
        batch_size=4,
    )


def test_ends_of_the_way_are_the_models_themselves(questions):
    run, asked = made(), Queries(questions, of="losses")
    found = patch(run, asked, (0.0, 1.0))
    for row, state in enumerate((run.state(0), run.final_state)):
        torch.testing.assert_close(found.values[row], asked.values(run.update_map, state).detach())
    assert found.best == [0.0, 1.0][int(found.values.mean(1).argmin())]


def test_slopes_are_central_differences(questions):
    run, asked = made(), Queries(questions, of="losses")
    points = (0.0, 0.4, 1.0, 1.3)
    found = patch(run, asked, points)
    for row, alpha in enumerate(points):
        sides = patch(run, asked, (alpha + STEP, alpha - STEP)).values
        torch.testing.assert_close(found.slopes[row], (sides[0] - sides[1]) / (2 * STEP), rtol=1e-6, atol=1e-8)


def test_hypergradient_of_a_patched_model(questions):
    run = made()
    asked = Patched(run, Queries(questions, of="losses", mean=True), 0.6)
    found = hypergradient(run, asked, ("example_weights", "learning_rate"))
    direction = torch.linspace(-1, 1, len(run.examples), dtype=torch.float64)

    def value(**changes) -> float:
        moved = run.rerun(**changes)
        return asked.values(moved.update_map, moved.final_state).item()

    sides = [value(weights=1 + sign * STEP * direction) for sign in (1, -1)]
    assert found.along({"example_weights": direction}).item() == pytest.approx((sides[0] - sides[1]) / (2 * STEP), rel=1e-6)
    sides = [value(hyper={"learning_rate": torch.tensor([0.2 + sign * STEP], dtype=torch.float64)}) for sign in (1, -1)]
    assert found["learning_rate"].item() == pytest.approx((sides[0] - sides[1]) / (2 * STEP), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_label_smoothing_is_a_central_difference(smoothing, questions):
    run = made(smoothing)
    asked = Queries(questions, of="measurements", mean=True)
    found = label_smoothing_gradient(run, asked)

    def value(change: float) -> float:
        again = made_with(run, Classification(label_smoothing=smoothing + change))
        return asked.values(again.update_map, again.final_state).item()

    if smoothing:
        slope = (value(STEP) - value(-STEP)) / (2 * STEP)
    else:  # torch takes none below 0
        slope = (-3 * value(0.0) + 4 * value(STEP) - value(2 * STEP)) / (2 * STEP)
    assert found.sum().item() == pytest.approx(slope, rel=1e-5)


def made_with(run, task):
    """Train the run anew, with another smoothing of the labels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    return record(
        model,
        run.examples,
        task,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.5),
        order=[one.example_ids for one in run.records],
    )


def test_what_is_refused(questions):
    run = made()
    with pytest.raises(InputError, match="at least one alpha"):
        patch(run, questions, ())
    run.update_map.task = Classification(label_smoothing=1.0)
    with pytest.raises(InputError, match="label_smoothing below 1"):
        label_smoothing_gradient(run, questions)
