"""Closed forms of linearised training against training the linear model step by step, and against real wide networks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrograd import Classification, Regression, record
from retrograd.curvature import EmpiricalKernel
from retrograd.dynamics.linearised_training import LinearisedTraining, descend
from retrograd.errors import InputError, NonFinite
from retrograd.params import flatten, unflatten
from tests.cases import CASES, RULES, normal


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> bool:
    return found.shape == expected.shape and bool((found - expected).norm() <= tolerance * expected.norm())


@pytest.fixture(scope="module")
def setting():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    inputs = torch.cat([normal(6, 3, seed=1), normal(1, 3, seed=1)[:1]])  # the last is like the first: an eigenvalue of 0
    inputs[6] = inputs[0]
    return model, (inputs, normal(7, 2, seed=2)), (normal(4, 3, seed=3), normal(4, 2, seed=4))


def trained_by_steps(model: nn.Module, data, asked, rate: float, steps: int) -> tuple[Tensor, Tensor]:
    """The linear model's outputs after plain gradient descent in its parameters."""
    params = {name: leaf.detach() for name, leaf in model.named_parameters()}
    at = flatten(params.values())

    def jacobian(inputs: Tensor) -> tuple[Tensor, Tensor]:
        function = lambda v: torch.func.functional_call(model, unflatten(v, params), (inputs,)).flatten()  # noqa: E731
        return function(at), torch.func.jacrev(function)(at)

    (start, own), (start_asked, other) = jacobian(data[0]), jacobian(asked[0])
    move = torch.zeros_like(at)
    for _ in range(steps):
        move = move - rate * own.T @ (start + own @ move - data[1].flatten()) * 2 / data[1].numel()
    return (start + own @ move).view(data[1].shape), (start_asked + other @ move).view(asked[1].shape)


@pytest.mark.parametrize("steps", [0, 1, 7, 400])
@pytest.mark.parametrize("share", [0.02, 0.9])  # of the largest rate: at .9 the fastest modes overshoot
def test_descent_is_that_of_the_linear_model(setting, steps, share):
    model, data, asked = setting
    rate = share * LinearisedTraining.of(model, data, learning_rate=1.0).largest_learning_rate
    training = LinearisedTraining.of(model, data, learning_rate=rate)
    expected, elsewhere = trained_by_steps(model, data, asked, rate, steps)
    assert close(training.outputs(steps), expected)
    assert close(training.predict(asked[0], steps), elsewhere)
    gram, cross = training.kernel.gram(data[0]), training.kernel.gram(asked[0], data[0])
    squares = lambda outputs: (outputs - data[1]).square().mean(1)  # noqa: E731
    found, others = descend(gram, training.start, squares, rate, steps, elsewhere=(cross, training.kernel.outputs(asked[0])))
    assert found.shape[0] == steps + 1
    assert close(found[-1], expected)
    assert others is not None
    assert close(others[-1], elsewhere)


def test_flow_is_the_limit_of_small_steps(setting):
    model, data, _ = setting
    fine, whole = LinearisedTraining.of(model, data, learning_rate=1e-4), LinearisedTraining.of(model, data, learning_rate=1e-2)
    assert close(whole.flow(30), fine.outputs(3000), 1e-3)
    assert close(whole.flow(0), whole.start)
    residual = (whole.start - data[1]).flatten()
    generator = -1e-2 * 2 / 14 * whole.kernel.gram(data[0]) * 25
    assert close(whole.flow(25), data[1] + (torch.linalg.matrix_exp(generator) @ residual).view(7, 2))


def test_modes_are_learnt_in_their_time(setting):
    model, data, _ = setting
    training = LinearisedTraining.of(model, data, learning_rate=0.05)
    modes = training.modes()
    assert modes.rates[0] > modes.rates[-1] >= 0
    assert torch.isinf(modes.time_constants[-1])  # the difference of two equal examples
    for number in (0, 3):
        constant = float(modes.time_constants[number])
        direction = modes.directions[number]
        left = [float(((training.outputs(steps) - data[1]) * direction).sum()) for steps in (0, round(constant) + 1)]
        assert left[0] == pytest.approx(float(modes.errors[number]))
        assert left[1] == pytest.approx(left[0] * (1 - float(modes.rates[number])) ** (round(constant) + 1))
        assert (1 - float(modes.rates[number])) ** constant == pytest.approx(torch.e**-1)
    assert len(training.modes(3).directions) == 3
    fast = LinearisedTraining.of(model, data, learning_rate=1.7 / 2 * training.largest_learning_rate).modes(1)
    assert float(fast.time_constants) == pytest.approx(-1 / torch.tensor(0.7).log().item())
    assert torch.isinf(
        LinearisedTraining.of(model, data, learning_rate=2 * training.largest_learning_rate).modes(1).time_constants
    )


def test_tiny_eigenvalues_lose_no_digits():
    """f = w x with x = 1e-9: after a step far from convergence nothing is lost to cancellation."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    inputs = torch.tensor([[1e-9]], dtype=torch.float64)
    training = LinearisedTraining.of(model, (inputs, torch.ones(1, 1, dtype=torch.float64)), learning_rate=1.0)
    found = training.predict(torch.ones(1, 1, dtype=torch.float64), 1000)
    assert float(found) == pytest.approx(1000 * 2 * 1e-9, rel=1e-12)


def test_early_stopping_finds_the_lowest_error():
    """Noisy targets in many features: the error elsewhere falls, then rises."""
    inputs, weights = normal(30, 28, seed=1), normal(28, 1, seed=2) / 28**0.5
    targets = inputs @ weights + normal(30, 1, seed=3)
    asked = normal(200, 28, seed=4)
    model = nn.Linear(28, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    training = LinearisedTraining.of(model, (inputs, targets), learning_rate=0.05)
    steps = [0, *(2**power for power in range(14))]
    found = training.early_stopping((asked, asked @ weights), steps)
    assert (found.training.diff() <= 0).all()
    assert found.best == steps[int(found.held_out.argmin())]
    assert 0 < found.best < steps[-1]
    assert found.held_out.min() < 0.8 * found.held_out[-1]
    expected = (training.predict(asked, found.best) - asked @ weights).square().mean()
    assert found.held_out.min().item() == pytest.approx(expected.item())


def test_other_losses_descend_like_the_linear_model():
    """A linear classifier is its own linearisation: descent on the outputs is training itself."""
    inputs, labels = CASES["plain"].data(10, 1)
    model = nn.Linear(3, 3).double()
    kernel = EmpiricalKernel.of(model)
    losses = lambda outputs: F.cross_entropy(outputs, labels, reduction="none")  # noqa: E731
    found, others = descend(kernel.gram(inputs), kernel.outputs(inputs), losses, 0.5, 20)
    assert others is None
    run = record(
        model, (inputs, labels), Classification(), optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
        epochs=20, batch_size=10,
    )  # fmt: skip
    for step in (1, 20):
        assert close(found[step], run.update_map.ask(lambda model: model(inputs), run.state(step)).detach())


def test_a_wide_network_follows_its_linearisation():
    """Reference: one hidden layer of tanh, outputs of size 1 whatever the width."""
    width, inputs = 2048, normal(10, 2, seed=1)

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            draw = torch.Generator().manual_seed(0)
            self.inside = nn.Parameter(torch.randn(2, width, generator=draw, dtype=torch.float64))
            self.outside = nn.Parameter(torch.randn(width, 1, generator=draw, dtype=torch.float64))

        def forward(self, inputs: Tensor) -> Tensor:
            return torch.tanh(inputs @ self.inside / 2**0.5) @ self.outside / width**0.5

    targets = torch.sin(inputs[:, :1])
    run = record(
        Wide(), (inputs, targets), Regression(), optimizer=lambda p: torch.optim.SGD(p, lr=0.5), epochs=60, batch_size=10
    )
    for training in (
        LinearisedTraining.of(run, learning_rate=0.5),
        LinearisedTraining.of(run, (inputs, targets), learning_rate=0.5, state=run.state(0)),
    ):
        trained = run.update_map.ask(lambda model: model(inputs), run.final_state).detach()
        assert (training.outputs(60) - trained).norm() <= 0.01 * targets.norm()
        assert (training.outputs(0) - training.outputs(60)).norm() >= 0.3 * targets.norm()


def test_it_refuses(setting):
    model, data, asked = setting
    kernel = EmpiricalKernel.of(model)
    gram, start = kernel.gram(data[0]), kernel.outputs(data[0])
    training = LinearisedTraining.of(model, data, learning_rate=0.1)
    for problem, call in {
        "has other losses.*descend": lambda: LinearisedTraining.of(CASES["plain"].record(RULES["sgd"]), learning_rate=0.1),
        "needs data": lambda: LinearisedTraining.of(model, learning_rate=0.1),
        "must be equal": lambda: LinearisedTraining.of(model, (data[0], data[1][:, :1]), learning_rate=0.1),
        "above 0": lambda: LinearisedTraining.of(model, data, learning_rate=-0.1),
        "from 0 on, got -1": lambda: training.outputs(-1),
        "at which to look": lambda: training.early_stopping(asked, []),
        "they must be equal": lambda: training.early_stopping((asked[0], asked[1][:, :1]), [1]),
        "need a kernel of 14 rows": lambda: descend(gram[:2, :2], start, lambda z: z.mean(1), 0.1, 1),
        "one loss for each of 7": lambda: descend(gram, start, lambda z: z.mean(), 0.1, 1),
    }.items():
        with pytest.raises(InputError, match=problem):
            call()
    with pytest.raises(NonFinite, match="more than the kernel bears"):
        descend(gram, start, lambda outputs: outputs.square().mean(1), 1e9, 60)
