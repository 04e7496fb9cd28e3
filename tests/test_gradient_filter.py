"""Gradient filtering: a Kalman filter by the book, on products and variances that autograd confirms."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from retrograd import Classification
from retrograd.errors import InputError, NonFinite, SolverFailed, UnsupportedTraining
from retrograd.optim import GradientFilter
from retrograd.optim.gradient_filter import most_probable_improvement
from tests.tolerances import TOLERANCES

EXACT = TOLERANCES["exact_vs_autograd"]


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=EXACT)


class Vector(nn.Module):
    """The parameters themselves, as a model."""

    def __init__(self, values):
        super().__init__()
        self.theta = nn.Parameter(values.clone())


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def least_squares(model, batch):
    """Losses whose Hessians x xᵀ differ between examples."""
    inputs, targets = batch
    return (inputs @ model.theta - targets).square() / 2


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def classes(size=6, seed=1):
    return draws(size, 3, seed=seed), torch.arange(size) % 3


def autograd_rows(model, batch):
    """Gradient of each example, [example, P], by a loop of ordinary backward passes, with its graph."""
    rows = []
    for inputs, label in zip(*batch, strict=True):
        loss = F.cross_entropy(model(inputs[None]), label[None])
        found = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        rows.append(torch.cat([leaf.flatten() for leaf in found]))
    return torch.stack(rows)


def flat(params):
    return torch.cat([leaf.flatten() for leaf in params.values()])


def test_equals_the_generalised_least_squares_estimate():
    # What a Kalman filter without prior gives is the best linear unbiased estimate from all observations at once. Moved to
    # the last point, observation i errs by v_i less all later process noise: one correlated regression on a constant.
    model, size, steps = Vector(draws(4)), 5, 12
    optimizer = GradientFilter(model, least_squares, lr=0.1)
    moved, observed, noise, process, deltas = [], [], [], [], None
    for step in range(steps):
        inputs, targets = draws(size, 4, seed=2 * step), draws(size, seed=2 * step + 1)
        theta = model.theta.detach().clone()
        gradients = inputs * (inputs @ theta - targets)[:, None]
        products = torch.zeros_like(gradients) if deltas is None else inputs * (inputs @ (theta - deltas))[:, None]
        observed.append(gradients.mean(0))
        noise.append(gradients.var(0).sum() / size)
        moved.append(products.mean(0))
        process.append(products.var(0).sum() / size)
        deltas = theta
        optimizer.step((inputs, targets))
    transported = torch.stack([observed[i] + sum(moved[i + 1 :], torch.zeros(4).double()) for i in range(steps)])
    later = torch.stack([sum(process[i + 1 :], torch.tensor(0.0).double()) for i in range(steps)])
    index = torch.arange(steps)
    covariance = later[torch.maximum(index[:, None], index)] + torch.diag(torch.stack(noise))
    weights = torch.linalg.solve(covariance, torch.ones(steps, dtype=torch.float64))
    assert_equal(optimizer.filtered_gradient()["theta"], weights @ transported / weights.sum())
    assert optimizer.latest.uncertainty == pytest.approx(float(1 / weights.sum()), rel=EXACT)


@pytest.mark.parametrize("change", ["hessian", "difference"])
def test_one_step_from_autograd(change):
    model, size = network(), 6
    optimizer = GradientFilter(model, Classification(), lr=0.3, change=change)
    before, first, second = copy.deepcopy(model), classes(seed=1), classes(seed=2)
    start = autograd_rows(before, first).detach()
    loss = optimizer.step(first)
    assert loss.item() == pytest.approx(Classification().losses(before, first).mean().item(), rel=EXACT)
    delta = flat(dict(model.named_parameters())).detach() - flat(dict(before.named_parameters())).detach()
    assert_equal(delta, -0.3 * start.mean(0))
    rows = autograd_rows(model, second)
    if change == "hessian":
        loops = [torch.autograd.grad(row @ delta, list(model.parameters()), retain_graph=True) for row in rows]
        changes = torch.stack([torch.cat([leaf.flatten() for leaf in found]) for found in loops])
    else:
        changes = (rows - autograd_rows(before, second)).detach()
    rows = rows.detach()
    optimizer.step(second)
    predicted = start.var(0).sum() / size + changes.var(0).sum() / size
    noise = rows.var(0).sum() / size
    gain = predicted / (predicted + noise)
    assert optimizer.latest.gain == pytest.approx(gain.item(), rel=EXACT)
    assert optimizer.latest.noise == pytest.approx(noise.item(), rel=EXACT)
    assert optimizer.latest.uncertainty == pytest.approx(((1 - gain) * predicted).item(), rel=EXACT)
    mean = (1 - gain) * (start.mean(0) + changes.mean(0)) + gain * rows.mean(0)
    assert_equal(flat(optimizer.filtered_gradient()), mean)


def test_self_tuned_step_from_autograd():
    model, size = network(), 6
    optimizer = GradientFilter(model, Classification())
    params = {name: leaf.detach().clone() for name, leaf in model.named_parameters()}
    batch = classes()
    mean = autograd_rows(model, batch).detach().mean(0)
    direction = dict(zip(params, mean.split([leaf.numel() for leaf in params.values()]), strict=True))

    def losses(alpha):
        moved = {name: leaf + alpha * direction[name].view_as(leaf) for name, leaf in params.items()}
        return F.cross_entropy(functional_call(model, moved, (batch[0],)), batch[1], reduction="none")

    curvatures = torch.func.jacfwd(torch.func.jacfwd(losses))(torch.tensor(0.0, dtype=torch.float64))
    slope, curvature = float(mean @ mean), float(curvatures.mean())
    error = float(autograd_rows(model, batch).detach().var(0).sum() / size / len(mean))
    curvature_error, loss_error = float(curvatures.var() / size), float(losses(0.0).detach().var() / size)
    optimizer.step(batch)

    def badness(alpha):  # mean over standard deviation: its least is the most probable improvement
        variance = 2 * loss_error + error * slope * alpha**2 + curvature_error * alpha**4 / 4
        return (-slope * alpha + curvature * alpha**2 / 2) / math.sqrt(variance)

    alpha = optimizer.latest.step_size
    assert alpha is not None
    assert badness(alpha) < min(badness(alpha * 0.999), badness(alpha * 1.001), badness(alpha * 0.1), badness(alpha * 10))
    assert_equal(flat(dict(model.named_parameters())).detach(), flat(params) - alpha * mean)


@pytest.mark.parametrize("curvature", [-2.0, 0.0, 3.0])
@pytest.mark.parametrize("loss_error", [1e-6, 1.0])
def test_most_probable_improvement_is_a_root_for_curvature_of_any_sign(curvature, loss_error):
    slope, slope_error, curvature_error = 2.0, 0.5, 0.7
    alpha = most_probable_improvement(slope, curvature, slope_error, curvature_error, loss_error)
    terms = (2 * loss_error * curvature * alpha, -2 * loss_error * slope)
    terms += (slope_error * slope * curvature * alpha**3 / 2, slope * curvature_error * alpha**4 / 4)
    assert alpha > 0
    assert abs(sum(terms)) <= 1e-12 * max(map(abs, terms))


def test_filtered_losses_follow_the_true_loss():
    # Noise that the parameters do not feel (added to the loss) hides f; the filter carries its estimate along the steps.
    model, eigenvalues = Vector(draws(5) * 3), torch.linspace(0.5, 2.0, 5, dtype=torch.float64)

    def losses(model, batch):
        return (eigenvalues * (model.theta - 0.1 * batch[:, :5]).square()).sum(1) / 2 + 3 * batch[:, 5]

    optimizer, filtered, seen = (
        GradientFilter(model, losses, lr=0.1, params=[{"params": [model.theta], "self_tuned": True}]),
        [],
        [],
    )
    for step in range(40):
        # E over x ~ N(0, I) of the losses, in closed form.
        truth = float((eigenvalues * model.theta.detach().square()).sum() / 2 + 0.005 * eigenvalues.sum())
        loss = optimizer.step(draws(4, 6, seed=step))
        filtered.append(optimizer.state_dict()["state"]["filter"]["loss"] - truth)
        seen.append(loss.item() - truth)
    assert torch.tensor(filtered[10:]).square().mean() < torch.tensor(seen[10:]).square().mean() / 4


def test_without_noise_it_is_gradient_descent():
    start, eigenvalues = draws(6), torch.linspace(0.1, 3.0, 6, dtype=torch.float64)
    ours, plain = Vector(start), Vector(start)
    optimizer = GradientFilter(ours, lambda model, batch: (eigenvalues * model.theta.square()).sum() / 2 + 0 * batch, lr=0.4)
    descent = torch.optim.SGD(plain.parameters(), lr=0.4)
    for _ in range(30):
        optimizer.step(torch.ones(4, dtype=torch.float64))
        descent.zero_grad()
        ((eigenvalues * plain.theta.square()).sum() / 2).backward()
        descent.step()
    assert_equal(ours.theta, plain.theta)


def test_self_tuned_without_noise_is_steepest_descent():
    start, eigenvalues = draws(3), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    model = Vector(start)
    optimizer = GradientFilter(model, lambda model, batch: (eigenvalues * model.theta.square()).sum() / 2 + 0 * batch)
    for _ in range(5):
        gradient = eigenvalues * model.theta.detach()
        optimizer.step(torch.ones(2, dtype=torch.float64))
        expected = gradient.square().sum() / (eigenvalues * gradient.square()).sum()
        assert optimizer.latest.step_size == pytest.approx(expected.item(), rel=1e-8)


def test_errs_less_than_the_batch_gradient_and_without_bias():
    errors = []
    for seed in range(12):
        model = Vector(torch.ones(4, dtype=torch.float64))
        optimizer = GradientFilter(model, lambda model, noise: (model.theta.square() / 2 + model.theta * noise).sum(-1), lr=0.1)
        for step in range(12):
            batch, truth = draws(4, 4, seed=100 * seed + step), model.theta.detach().clone()
            optimizer.step(batch)
            errors.append((step, optimizer.filtered_gradient()["theta"] - truth, batch.mean(0)))
    late = [(ours, plain) for step, ours, plain in errors if step >= 5]
    ours, plain = (torch.stack(side) for side in zip(*late, strict=True))
    assert ours.square().mean() < plain.square().mean() / 4
    assert ours.mean().abs() < 0.06  # the standard deviation of this mean is about 0.02


def test_state_continues_bit_for_bit():
    def loop(optimizer, scheduler, steps):
        for step in steps:
            optimizer.step(classes(seed=step))
            scheduler.step()

    for lr in (0.2, None):
        one, two = network(), network()
        straight, first = GradientFilter(one, Classification(), lr=lr), GradientFilter(two, Classification(), lr=lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(straight, 0.9)
        loop(straight, schedule, range(8))
        early = torch.optim.lr_scheduler.ExponentialLR(first, 0.9)
        loop(first, early, range(4))
        saved = copy.deepcopy((two.state_dict(), first.state_dict(), early.state_dict()))
        three = network(seed=5)
        second = GradientFilter(three, Classification(), lr=lr)
        late = torch.optim.lr_scheduler.ExponentialLR(second, 0.9)
        three.load_state_dict(saved[0])
        second.load_state_dict(saved[1])
        late.load_state_dict(saved[2])
        loop(second, late, range(4, 8))
        for ours, theirs in zip(one.parameters(), three.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert straight.latest == second.latest


def test_state_survives_a_file(tmp_path):
    model = network()
    optimizer = GradientFilter(model, Classification())
    optimizer.step(classes())
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again = GradientFilter(model, Classification())
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.state_dict()["state"]["filter"] == optimizer.state_dict()["state"]["filter"]


def test_groups_have_their_own_rates_and_others_stay():
    model = network()
    before = copy.deepcopy(model)
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": [model[2].weight]}]
    optimizer = GradientFilter(model, Classification(), lr=0.1, params=groups)
    optimizer.step(classes())
    mean = optimizer.filtered_gradient()
    assert list(mean) == ["0.weight", "0.bias", "2.weight"]
    for name, rate in (("0.weight", 0.5), ("0.bias", 0.5), ("2.weight", 0.1)):
        assert_equal(model.get_parameter(name), before.get_parameter(name) - rate * mean[name])
    assert torch.equal(model.get_parameter("2.bias"), before.get_parameter("2.bias"))
    optimizer.add_param_group({"params": [model[2].bias]})
    assert list(optimizer.filtered_gradient()) == list(mean)
    optimizer.step(classes())
    assert optimizer.latest.gain == 1.0  # nothing was predicted for the new parameter, so the filter began anew


def test_a_factor_on_the_self_tuned_step():
    ends = []
    for factor in (1.0, 0.5):
        model = network()
        optimizer = GradientFilter(model, Classification())
        optimizer.param_groups[0]["lr"] = factor
        start = flat(dict(model.named_parameters())).detach().clone()
        optimizer.step(classes())
        ends.append(flat(dict(model.named_parameters())).detach() - start)
    assert_equal(ends[0], 2 * ends[1])


def test_parts_keep_the_gradient_and_estimate_the_same_noise():
    found = {}
    for parts in (None, 4, 5):  # 5 does not divide 48: six parts
        model = network()
        optimizer = GradientFilter(model, Classification(), lr=0.1, parts=parts)
        optimizer.step(classes(48))
        found[parts] = optimizer.filtered_gradient(), optimizer.latest.noise
    for parts in (4, 5):
        assert_equal(flat(found[parts][0]), flat(found[None][0]))
        assert found[parts][1] == pytest.approx(found[None][1], rel=0.6)
    rows = autograd_rows(network(), classes(48)).detach().view(6, 8, -1).mean(1)
    assert found[5][1] == pytest.approx(float(rows.var(0).sum() / 6), rel=EXACT)


def test_nested_batches_dropout_and_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = nn.Linear(4, 4, bias=False)
            self.out = nn.Linear(4, 4, bias=False)
            self.out.weight = self.inside.weight

        def forward(self, x):
            return self.out(F.dropout(torch.tanh(self.inside(x)), 0.5, self.training))

    def losses(model, batch):
        return (model(batch["x"]) - batch["pair"][0]).square().mean(1)

    model = Tied().double()
    for change in ("hessian", "difference"):
        optimizer = GradientFilter(model, losses, change=change)
        for seed in range(3):
            x = draws(6, 4, seed=seed)
            optimizer.step({"x": x, "pair": (x.roll(1, 1), [x])})
        assert list(optimizer.filtered_gradient()) == ["inside.weight"]
        assert 0 < (optimizer.latest.step_size or 0) < math.inf


def test_attention_can_be_trained():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(8, 24)

        def forward(self, x):
            query, key, value = self.mix(x).unflatten(-1, (2, 12)).transpose(1, 2).chunk(3, -1)
            return F.scaled_dot_product_attention(query, key, value).sum((1, 2))

    optimizer = GradientFilter(Attention(), lambda model, x: model(x).square().mean(1))
    for seed in range(2):
        optimizer.step(draws(3, 5, 8, seed=seed).float())
    assert 0 < optimizer.latest.gain < 1


def test_non_finite_names_the_parameter_and_changes_nothing():
    model = network()
    optimizer = GradientFilter(model, Classification(), lr=0.1)
    optimizer.step(classes())
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    inputs, labels = classes()
    inputs[2, 1] = torch.nan
    with pytest.raises(NonFinite, match="losses of the batch"):
        optimizer.step((inputs, labels))
    assert all(torch.equal(before[name], leaf) for name, leaf in model.state_dict().items())
    assert optimizer.state_dict()["state"]["filter"] == state["state"]["filter"]

    root = nn.ParameterDict({"fine": torch.ones(2), "steep": torch.zeros(1)})
    losses = lambda model, x: (model["fine"] * x).sum(1) + model["steep"].abs().sqrt().sum()  # noqa: E731
    with pytest.raises(NonFinite, match="gradient of parameter 'steep'"):
        GradientFilter(root, losses, lr=0.1).step(torch.ones(3, 2))


def test_a_straight_loss_has_no_self_tuned_step():
    model = Vector(torch.zeros(2))
    with pytest.raises(SolverFailed, match="Give lr"):
        GradientFilter(model, lambda model, x: x @ model.theta).step(torch.ones(3, 2))
    assert model.theta.tolist() == [0, 0]


def test_refusals():
    model = network()
    with pytest.raises(InputError, match="one loss per example; got 3"):
        GradientFilter(model, 3)
    with pytest.raises(InputError, match="lr must be at least 0"):
        GradientFilter(model, Classification(), lr=-0.1)
    with pytest.raises(InputError, match="not in the model"):
        GradientFilter(model, Classification(), lr=0.1, params=network().parameters())
    with pytest.raises(InputError, match="parts must be at least 2"):
        GradientFilter(model, Classification(), lr=0.1, parts=1)
    with pytest.raises(InputError, match='must be "hessian" or "difference"'):
        GradientFilter(model, Classification(), lr=0.1, change="secant")
    optimizer = GradientFilter(model, Classification(), lr=0.1)
    with pytest.raises(InputError, match="no filtered gradient before the first step"):
        optimizer.filtered_gradient()
    with pytest.raises(InputError, match="filtered before the first step"):
        assert optimizer.latest
    with pytest.raises(InputError, match="drop_last=True"):
        optimizer.step(classes(1))
    with pytest.raises(InputError, match="leading axis of the same length"):
        optimizer.step((classes(4)[0], classes(5)[1]))
    with pytest.raises(InputError, match="got a str"):
        optimizer.step((classes(4)[0], "labels"))
    with pytest.raises(InputError, match="reduction='none'"):
        GradientFilter(model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), lr=0.1).step(classes())
    with pytest.raises(RuntimeError) as raised:
        GradientFilter(model, lambda model, batch: model(batch[0]).sum(1) * model(batch[0]).sum().item(), lr=0.1).step(
            classes()
        )
    assert "torch.func.vmap" in raised.value.__notes__[0]
    normed = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    with pytest.raises(UnsupportedTraining, match="'1' is batch normalisation"):
        GradientFilter(normed, Classification(), lr=0.1).step(classes())
    normed[1].eval()
    GradientFilter(normed, Classification(), lr=0.1).step(classes())
