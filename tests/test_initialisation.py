"""Learned starts: derivatives of many tasks at once against autograd and differences, and what is learned from solutions."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from retrograd import Classification
from retrograd.errors import InputError
from retrograd.hypergradients import LearnedInitialiser, adapt, initialisation_gradient, meta_initialise, solve
from tests.tolerances import TOLERANCES

EXACT = TOLERANCES["exact_vs_autograd"]
RATE, STEPS = 0.3, 3


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()


SUPPORT, QUERY = (normal(3, 5, 2, seed=1), normal(3, 5, 1, seed=2)), (normal(3, 4, 2, seed=3), normal(3, 4, 1, seed=4))


def by_autograd(model, order):
    """Mean over tasks of the gradient by the start, one task after the other and with the whole graph."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in model.named_parameters()}
    total = torch.zeros((), dtype=torch.float64)
    for task in range(3):
        own = leaves if order == "exact" else {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
        for _ in range(STEPS):
            loss = (functional_call(model, own, SUPPORT[0][task]) - SUPPORT[1][task]).square().mean()
            grads = torch.autograd.grad(loss, list(own.values()), create_graph=True)
            own = {name: leaf - RATE * grad for (name, leaf), grad in zip(own.items(), grads, strict=True)}
            if order == "first":
                shift = {name: own[name].detach() - leaves[name].detach() for name in own}
                own = {name: leaves[name] + shift[name] for name in own}  # moves with the start one to one
        total = total + (functional_call(model, own, QUERY[0][task]) - QUERY[1][task]).square().mean() / 3
    return total, dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


@pytest.mark.parametrize("order", ["exact", "first"])
def test_gradient_by_the_start_of_all_tasks_equals_autograd_task_by_task(order):
    model = network()
    before = copy.deepcopy(model.state_dict())
    run = adapt(model, SUPPORT, steps=STEPS, learning_rate=RATE)
    found, loss = initialisation_gradient(run, QUERY, order=order)
    expected_loss, expected = by_autograd(model, order)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=EXACT)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf, rtol=EXACT, atol=EXACT)
    assert all(torch.equal(leaf, before[name]) for name, leaf in model.state_dict().items())


def test_tasks_do_not_know_of_each_other():
    alone = adapt(network(), tuple(part[1:2] for part in SUPPORT), steps=STEPS, learning_rate=RATE).final_state.params
    together = adapt(network(), SUPPORT, steps=STEPS, learning_rate=RATE).final_state.params
    for name, leaf in alone.items():
        torch.testing.assert_close(together[name][1], leaf[0], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("order", ["exact", "first"])
def test_meta_initialise_makes_the_steps_of_its_outer_optimizer(order):
    model, twin = network(), network()
    options = {"steps": STEPS, "learning_rate": RATE, "outer_steps": 2, "order": order}
    history = meta_initialise(model, lambda _: (SUPPORT, QUERY), optimizer=lambda own: torch.optim.SGD(own, lr=0.1), **options)
    for number in range(2):
        loss, gradient = by_autograd(twin, order)
        assert history[number] == pytest.approx(loss.item(), rel=EXACT)
        with torch.no_grad():
            for name, leaf in twin.named_parameters():
                leaf -= 0.1 * gradient[name]
    for leaf, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(leaf, other, rtol=EXACT, atol=EXACT)
        assert leaf.grad is None


def test_classes_are_learned_too():
    model = nn.Sequential(nn.Linear(2, 3)).double()
    data = (normal(4, 6, 2, seed=5), torch.arange(24).reshape(4, 6) % 3)
    history = meta_initialise(model, lambda _: (data, data), Classification(), steps=2, learning_rate=0.5, outer_steps=10)
    assert history[-1] < history[0]


# ---------------------------------------------------------------------------------------------------------------------
# Starts from previous solutions: f_c(x) = ‖x − Wc‖² + (1 − cos 3(x − Wc))

W = normal(2, 3, seed=6)


def objective(points, contexts):
    off = points - contexts @ W
    return (off.square() + 1 - torch.cos(3 * off)).sum(1)


def test_solving_problems_together_is_descent_on_each():
    contexts, points = normal(5, 2, seed=7), normal(5, 3, seed=8)
    found = solve(objective, contexts, points, steps=4, learning_rate=0.05).final_state.params["points"]
    for _ in range(4):
        off = points - contexts @ W
        points = points - 0.05 * (2 * off + 3 * torch.sin(3 * off))
    torch.testing.assert_close(found, points, rtol=EXACT, atol=EXACT)


def test_regression_finds_the_least_squares_start():
    contexts, solutions, weights = normal(20, 2, seed=9), normal(20, 3, seed=10), 0.5 + normal(20, seed=11).abs()
    learned = LearnedInitialiser(nn.Linear(2, 3, bias=False).double())
    history = learned.fit(contexts, solutions, weights=weights, epochs=400, rate=0.1)
    root = weights.sqrt()[:, None]
    expected = contexts @ torch.linalg.lstsq(root * contexts, root * solutions).solution
    torch.testing.assert_close(learned(contexts), expected, rtol=1e-5, atol=1e-5)
    assert history[-1] < history[0]
    assert not learned(contexts).requires_grad


def test_tuning_descends_along_the_gradient_through_training():
    contexts = normal(6, 2, seed=12)
    learned = LearnedInitialiser(nn.Linear(2, 3).double())
    twin = copy.deepcopy(learned.network)
    points = twin(contexts)
    for _ in range(3):
        off = points - contexts @ W
        points = points - 0.05 * (2 * off + 3 * torch.sin(3 * off))
    value = objective(points, contexts).mean()
    expected = torch.autograd.grad(value, list(twin.parameters()))
    seen = []
    step = torch.optim.Adam.step

    def spy(optimizer, *arguments, **options):
        seen.extend(leaf.grad.clone() for group in optimizer.param_groups for leaf in group["params"])
        return step(optimizer, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", spy)
        history = learned.tune(objective, contexts, steps=3, learning_rate=0.05, epochs=1)
    assert history == pytest.approx([value.item()], rel=EXACT)
    for leaf, other in zip(seen, expected, strict=True):
        torch.testing.assert_close(leaf, other, rtol=EXACT, atol=EXACT)


def test_no_tasks_or_steps_are_refused():
    with pytest.raises(InputError, match="at least one step and one task"):
        adapt(network(), SUPPORT, steps=0)
