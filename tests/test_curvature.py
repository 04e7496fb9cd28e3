"""Every curvature next to the dense matrix of its own formula, and the Fisher matrix next to the Gauss-Newton matrix."""

import copy
import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retrograd import All, Classification, Examples, Regression, record
from retrograd.curvature import (
    EKFAC,
    KFAC,
    BlockOperator,
    Curvature,
    DiagonalBlock,
    Fisher,
    KroneckerBlock,
    Operator,
    factors,
    gauss_newton_product,
    pseudo_gradients,
)
from retrograd.errors import InputError
from retrograd.noise import Noise
from retrograd.params import unflatten
from retrograd.task import BoundModel, Samples, SplitTask
from tests.cases import BATCH, CASES, RULES, normal
from tests.reference.dense_curvature import (
    SEED,
    TRACES,
    dense,
    dense_gauss_newton,
    gradient_rows,
    matrix_of,
    reference,
)
from tests.tolerances import TOLERANCES

RELATIVE = TOLERANCES["approximate_vs_own_formula"]
FUNCTIONS = {
    "identity": (lambda s: s, lambda m: m),
    "damped inverse": (
        lambda s: 1 / (s + 0.1 * s.mean()),
        lambda m: torch.linalg.inv(m + 0.1 * m.trace() / len(m) * torch.eye(len(m), dtype=m.dtype)),
    ),
    "exponential": (lambda s: torch.exp(-2 * s), lambda m: torch.matrix_exp(-2 * m)),
}


@pytest.fixture(scope="module")
def runs():
    return {
        name: CASES[name].record(RULES["sgd"], All())
        for name in ("plain", "groups", "batchnorm", "dropout", "tied", "cnn", "attention")
    }


def assert_close(found, expected, relative=RELATIVE):
    error = (found - expected).norm() / expected.norm()
    assert error <= relative, f"relative error {error:.1e}"


# ---------------------------------------------------------------------------------------------------------------------
# Operators against their formulas


@pytest.mark.parametrize("method", [KFAC, EKFAC])
@pytest.mark.parametrize("name", sorted(TRACES))
def test_kronecker_factors_equal_dense_products(runs, name, method):
    run = runs[name]
    states = [run.state(3), run.final_state]
    operator = method(batch_size=5, samples=2).fit(run, states, seed=SEED)
    assert isinstance(operator, Operator)
    assert isinstance(operator, BlockOperator)
    matrix = reference(name, run, states, method is EKFAC, samples=2)
    params = states[0].params
    assert_close(dense(operator, params), matrix)
    places = unflatten(torch.arange(len(matrix)), params)
    for ours, theirs in FUNCTIONS.values():
        found = dense(operator, params, ours)
        for block in operator.blocks:  # damping is relative to a block, so each one is compared alone
            index = torch.cat([places[key].flatten() for key in block.names])
            assert_close(found[index[:, None], index], theirs(matrix[index[:, None], index]))


@pytest.mark.parametrize("name", ["plain", "attention", "tied"])
@pytest.mark.parametrize("samples", [1, 6])
def test_fisher_equals_its_dense_matrix(runs, name, samples):
    """With one sample there are fewer gradients than parameters, with six more."""
    run = runs[name]
    states = [run.state(3), run.final_state]
    operator = Fisher(samples=samples, batch_size=5).fit(run, states, seed=SEED)
    rows = torch.cat([gradient_rows(run, state, samples) for state in states])
    for ours, theirs in FUNCTIONS.values():
        assert_close(dense(operator, states[0].params, ours), theirs(rows.T @ rows / len(rows)))


@pytest.mark.parametrize("name", sorted(TRACES))
def test_ekfac_is_no_further_from_the_fisher_matrix_than_kfac(runs, name):
    run, state = runs[name], runs[name].final_state
    rows = gradient_rows(run, state)
    fisher = rows.T @ rows / len(rows)
    near, far = (dense(method().fit(run, [state], seed=SEED), state.params) for method in (EKFAC, KFAC))
    assert (near - fisher).norm() < (far - fisher).norm()
    assert torch.allclose(near.trace(), fisher.trace(), rtol=1e-10)  # a rotation and a diagonal keep the trace


@pytest.mark.parametrize("name", ["plain", "groups", "batchnorm", "tied", "cnn", "attention"])
def test_gauss_newton_products_are_exact(runs, name):
    run, state = runs[name], runs[name].state(5)
    expected = dense_gauss_newton(run, state)
    units = unflatten(torch.eye(len(expected), dtype=torch.float64), state.params)
    for size in (256, 3):
        found = gauss_newton_product(run, state, units, batch_size=size)
        assert_close(matrix_of(found, state.params), expected, 1e-12)


def test_all_labels_together_give_the_gauss_newton_matrix(runs, monkeypatch):
    """A target √(K p_k) onehot(k) has the gradient √(K p_k) (p − onehot(k)): the mean over k is the expectation."""
    run, state, label = runs["plain"], runs["plain"].final_state, itertools.count()

    def enumerated(self, model, batch, noise):
        logits = model(batch[0])
        k = next(label) % logits.shape[1]
        weights = (logits.shape[1] * logits.softmax(1)[:, k]).sqrt()
        return batch[0], F.one_hot(torch.full((len(logits),), k), logits.shape[1]) * weights[:, None]

    monkeypatch.setattr(Classification, "sampled", enumerated)
    operator = Fisher(samples=3).fit(run, [state])
    assert_close(dense(operator, state.params), dense_gauss_newton(run, state), 1e-10)


def signs(monkeypatch):
    """Normal numbers become ±1 in all combinations of two components: four draws have mean 0 and covariance 1."""
    draw = itertools.count(-1)  # the first call is the one that tries out the layers

    def normal(self, *shape):
        signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=2)), dtype=torch.float64)
        return signs[next(draw) % 4].expand(len(self._state), *shape)

    monkeypatch.setattr(Noise, "normal", normal)


@pytest.mark.parametrize("name", ["cnn", "attention"])
def test_targets_of_a_regression_give_the_gauss_newton_matrix(runs, monkeypatch, name):
    run, state = runs[name], runs[name].final_state
    signs(monkeypatch)
    assert_close(dense(Fisher(samples=4).fit(run, [state]), state.params), dense_gauss_newton(run, state), 1e-10)


def test_drawn_labels_approach_the_gauss_newton_matrix(runs):
    run, state = runs["plain"], runs["plain"].final_state
    exact = dense_gauss_newton(run, state)
    few, many = (dense(Fisher(samples=count).fit(run, [state], seed=SEED), state.params) for count in (2, 100))
    assert (many - exact).norm() < 0.15 * exact.norm()
    assert (many - exact).norm() < 0.3 * (few - exact).norm()


# ---------------------------------------------------------------------------------------------------------------------
# Where theory says that it is exact


def fit_linear(task, inputs, targets, outputs):
    model = nn.Linear(inputs.shape[1], outputs).double()
    return record(
        model, (inputs, targets), task, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), epochs=1, batch_size=4, seed=0
    )


@pytest.mark.parametrize("method", [KFAC, EKFAC])
def test_linear_regression_is_exact(monkeypatch, method):
    """Output gradients have the same distribution for every input, so the expectation of the product factors."""
    run = fit_linear(Regression(), normal(12, 3, seed=1), normal(12, 2, seed=2), 2)
    signs(monkeypatch)
    state = run.final_state
    assert_close(dense(method(samples=4).fit(run, [state]), state.params), dense_gauss_newton(run, state), 1e-10)


def test_a_single_input_is_exact():
    run = fit_linear(Classification(), normal(1, 3, seed=1).expand(12, 3).contiguous(), torch.arange(12) % 3, 3)
    rows = gradient_rows(run, run.final_state)
    assert rows.norm(dim=1).unique().numel() > 1
    operator = KFAC().fit(run, [run.final_state], seed=SEED)
    assert_close(dense(operator, run.final_state.params), rows.T @ rows / len(rows), 1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Invariances


@pytest.mark.parametrize(
    ("name", "method"),
    [("plain", EKFAC), ("cnn", EKFAC), ("attention", EKFAC), ("cnn", KFAC), ("attention", Fisher)],
)
def test_batches_order_and_slices_do_not_matter(runs, monkeypatch, name, method):
    run, states = runs[name], [runs[name].state(2), runs[name].final_state]
    params, invert = states[0].params, FUNCTIONS["damped inverse"][0]
    expected = dense(method().fit(run, states, seed=SEED), params, invert)
    order = torch.randperm(len(run.examples), generator=torch.Generator().manual_seed(1))
    shuffled = copy.copy(run)
    shuffled.examples = Examples(run.examples.batch(order), ids=order)
    found = [method(batch_size=size).fit(run, states, seed=SEED) for size in (1, BATCH)]
    found.append(method(batch_size=5).fit(shuffled, states[::-1], seed=SEED))
    found.append(method(examples=order.tolist()).fit(run, states, seed=SEED))
    monkeypatch.setattr(factors, "_KEPT_SCALARS", 100)  # a second pass instead of memory
    monkeypatch.setattr(pseudo_gradients, "SCALARS_AT_ONCE", 1)
    monkeypatch.setattr("retrograd.curvature.ekfac.SCALARS_AT_ONCE", 1)
    found.append(method().fit(run, states, seed=SEED))
    for operator in found:
        assert_close(dense(operator, params, invert), expected, 1e-10)
    other = dense(method().fit(run, states, seed=SEED + 1), params, invert)
    assert (other - expected).norm() > 1e-3 * expected.norm()


class Masked(nn.Module):
    """Averages over the places whose last feature is 1."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, inputs):
        mask = inputs[..., 3:]
        return self.last((torch.tanh(self.first(inputs[..., :3])) * mask).sum(1) / mask.sum(1))


@pytest.mark.parametrize("method", [KFAC, EKFAC, Fisher])
def test_padding_does_not_matter(method):
    model = Masked().double()
    inputs = normal(9, 3, 4, seed=7)
    inputs[..., 3] = 1
    labels = torch.arange(9) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = record(model, (inputs, labels), Classification(), optimizer=optimizer, epochs=1, batch_size=3, seed=0)
    padding = normal(9, 5, 4, seed=8)
    padding[..., 3] = 0
    padded = copy.copy(run)
    padded.examples = Examples((torch.cat([inputs, padding], 1), labels))
    state = run.final_state
    expected, found = (dense(method().fit(own, [state], seed=SEED), state.params) for own in (run, padded))
    assert_close(found, expected, 1e-10)


def test_states_are_averaged(runs):
    run = runs["plain"]
    states = [run.state(1), run.state(4), run.final_state]
    alone = torch.stack([dense(Fisher().fit(run, [state], seed=SEED), state.params) for state in states])
    assert_close(dense(Fisher().fit(run, states, seed=SEED), states[0].params), alone.mean(0), 1e-10)
    same = EKFAC().fit(run, [states[0]] * 3, seed=SEED)
    assert_close(dense(same, states[0].params), dense(EKFAC().fit(run, states[:1], seed=SEED), states[0].params), 1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Coverage


def kinds(operator):
    return {name: type(block) for block in operator.blocks for name in block.names}


@pytest.mark.parametrize("name", ["plain", "groups", "batchnorm", "tied", "cnn", "attention"])
@pytest.mark.parametrize("method", [KFAC(), EKFAC(), Fisher()])
def test_every_trained_parameter_is_covered_and_no_other(runs, name, method):
    assert isinstance(method, Curvature)
    run, state = runs[name], runs[name].final_state
    operator = method.fit(run, [state])
    vectors = {key: normal(2, *leaf.shape, seed=1) for key, leaf in reversed(state.params.items())}
    result = operator.apply(lambda s, _: torch.ones_like(s), vectors)
    assert list(result) == list(vectors)
    assert all(torch.allclose(result[key], vectors[key], atol=1e-12) for key in vectors)
    with pytest.raises(InputError, match="lack"):
        operator.apply(lambda s, _: s, {key: vectors[key] for key in list(vectors)[1:]})
    if name == "groups" and isinstance(operator, BlockOperator):  # the first weight is frozen, its bias is not
        assert "0.weight" not in operator.names
        assert kinds(operator)["0.bias"] is DiagonalBlock
        assert kinds(operator)["2.weight"] is KroneckerBlock


class Odd(nn.Module):
    """Layers that are not what they seem."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Linear(3, 3)  # called two times
        self.sideways = nn.Linear(3, 3)  # the batch is not the first axis
        self.elsewhere = nn.Linear(3, 3)  # its weight is used without it, too
        self.never = nn.Linear(3, 3)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
        self.activation = nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs):  # [batch, 3, 3], and three examples are tried out
        hidden = self.activation(self.twice(torch.tanh(self.twice(inputs))))
        hidden = hidden + torch.tanh(self.sideways(hidden.transpose(0, 1))).transpose(0, 1)
        hidden = self.elsewhere(hidden) + torch.tanh(hidden @ self.elsewhere.weight)
        return (self.scale * self.normed(hidden)).mean(1)


def odd_run(model):
    data = (normal(8, 3, 3, seed=3), torch.arange(8) % 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return record(model, data, Classification(), optimizer=optimizer, epochs=1, batch_size=4, seed=0)


def test_layers_that_are_not_what_they_seem():
    torch.manual_seed(0)
    model = Odd().double()
    run = odd_run(model)
    state = run.final_state
    operator = EKFAC(batch_size=3).fit(run, [state], seed=SEED)
    kronecker = {name for name, kind in kinds(operator).items() if kind is KroneckerBlock}
    assert kronecker == {"twice.weight", "twice.bias"}
    assert set(operator.names) == set(state.params)
    rows = gradient_rows(run, state)
    matrix, fisher = dense(operator, state.params), rows.T @ rows / len(rows)
    places = unflatten(torch.arange(len(fisher)), state.params)
    for name, place in places.items():
        if name not in kronecker:
            index = place.flatten()
            assert torch.allclose(matrix[index, index], fisher[index, index], rtol=1e-10, atol=1e-14)
    # Both calls count, before squaring: the eigenvalues are those of whole gradients in the block's own basis.
    block = next(block for block in operator.blocks if isinstance(block, KroneckerBlock))
    whole = torch.cat([rows[:, places["twice.weight"]], rows[:, places["twice.bias"]][..., None]], 2)
    assert_close(block.eigenvalues, (block.out_basis.T @ whole @ block.in_basis).square().mean(0))


def test_fused_transformer_layers_are_not_missed():
    """In evaluation mode torch computes a whole layer without calling its parts."""
    torch.manual_seed(0)

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=True)
            self.first, self.out = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, inputs):
            return self.out(self.layer(self.first(inputs)).mean(1))

    run = odd_run(Pooled().double())
    state = run.final_state
    operator = EKFAC().fit(run, [state], seed=SEED)
    found = kinds(operator)
    assert found["layer.linear1.weight"] is found["layer.linear2.bias"] is found["first.weight"] is KroneckerBlock
    assert found["layer.self_attn.in_proj_weight"] is found["layer.self_attn.out_proj.weight"] is DiagonalBlock
    rows = gradient_rows(run, state)
    assert torch.allclose(dense(operator, state.params).trace(), rows.square().sum(1).mean(), rtol=1e-8)


def test_nothing_is_left_behind(runs):
    run = runs["dropout"]
    model = run.update_map.model.train()
    model.zero_grad()
    before = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    random = torch.get_rng_state()
    EKFAC().fit(run, [run.final_state])
    Fisher().fit(run, [run.final_state])
    gauss_newton_product(run, run.final_state, {k: leaf[None] for k, leaf in run.final_state.params.items()})
    assert all(torch.equal(leaf, before[name]) for name, leaf in model.state_dict().items())
    assert all(leaf.grad is None for leaf in model.parameters())
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing targets, and refusals


def test_noise_belongs_to_the_example():
    ids = torch.tensor([5, -3, 2**40])
    noise = Noise(ids, 1, 2)
    first, second = noise.uniform(4), noise.uniform(4)
    again = Noise(ids.flip(0), 1, 2)
    assert torch.equal(again.uniform(4), first.flip(0))
    assert torch.equal(again.uniform(4), second.flip(0))
    assert not torch.equal(Noise(ids, 2, 1).uniform(4), first)
    assert Noise(ids, 0).uniform().shape == (3,)
    many = Noise(torch.arange(20_000), 0).normal(2)
    assert many.mean(0).abs().max() < 0.03
    assert (many.T.cov() - torch.eye(2)).abs().max() < 0.03


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_drawn_classes_have_the_second_moment_of_the_model(smoothing):
    task = Classification(label_smoothing=smoothing)
    assert isinstance(task, Samples)
    logits = torch.tensor([[0.0, 1.0, -2.0]], dtype=torch.float64).expand(20_000, 3).clone().requires_grad_()
    labels = torch.zeros(20_000, dtype=torch.int64)
    batch = task.sampled(nn.Identity(), (logits, labels), Noise(torch.arange(20_000), 0))
    (grads,) = torch.autograd.grad(task.losses(nn.Identity(), batch).sum(), logits)
    p = logits[0].softmax(0)
    units = torch.eye(3, dtype=torch.float64)
    # each is w_k (p − e_k), with the same w_k whenever k is drawn, and √q_k w_k = √p_k
    seen = grads.unique(dim=0)
    assert len(seen) == 3
    for row in seen:
        k = int(row.argmin())
        weight = -row[k] / (1 - p[k])
        assert torch.allclose(row, weight * (p - units[k]), atol=1e-12)
        share = (grads - row).abs().max(1).values.lt(1e-9).double().mean()
        assert abs(share * weight**2 - p[k]) < 0.02
    assert (grads.T @ grads / 20_000 - (p.diag() - torch.outer(p, p))).abs().max() < 0.01


def test_a_model_that_is_sure_is_drawn_from_evenly():
    """Of 500 examples with 1 − p = 1e-4 drawing from p would mostly show nothing at all."""
    logits = torch.tensor([[10.0, 0.0, 0.0]], dtype=torch.float64).expand(500, 3).clone().requires_grad_()
    batch = Classification().sampled(nn.Identity(), (logits, None), Noise(torch.arange(500), 0))
    (grads,) = torch.autograd.grad(Classification().losses(nn.Identity(), batch).sum(), logits)
    p = logits[0].softmax(0)
    squares = grads.square().sum(1)
    assert squares.sum() / 500 == pytest.approx((1 - p.square().sum()).item(), rel=0.1)
    assert squares.max() < 10 * squares.mean()
    certain = torch.tensor([[1e4, 0.0]], dtype=torch.float64)  # p is 1 to the last digit
    targets = Classification().sampled(nn.Identity(), (certain, None), Noise(torch.arange(1), 0))[1]
    assert targets.tolist() == [[1.0, 0.0]]


@dataclass(frozen=True)
class Plain:
    """A task that cannot draw."""

    def losses(self, model, batch):
        return (model(batch[0]) - batch[1]).square().mean(1)

    measurements = losses


class Doubled(Regression):
    """Knows its outputs, but not what its own losses make of them."""

    def losses(self, model, batch):
        return 2 * super().losses(model, batch)


class Squared(Regression):
    """Overrides what it should."""

    def losses_of(self, outputs, batch):
        return super().losses_of(outputs, batch).square()


@dataclass(frozen=True)
class Huber:
    """A user's own task; its outputs are not what the module returns."""

    def outputs(self, model, batch):
        return torch.tanh(model(batch[0]))

    def losses_of(self, outputs, batch):
        return F.huber_loss(outputs, batch[1], reduction="none", delta=0.5).sum(1)

    def losses(self, model, batch):
        return self.losses_of(self.outputs(model, batch), batch)

    measurements = losses


@pytest.mark.parametrize("task", [Huber(), Squared(), Classification(label_smoothing=0.2)], ids=["own", "subclass", "smoothed"])
def test_gauss_newton_products_of_any_task_that_knows_its_outputs(task):
    targets = torch.arange(5) % 2 if isinstance(task, Classification) else normal(5, 2, seed=2)
    run = fit_linear(task, normal(5, 3, seed=1), targets, 2)
    state, inputs = run.final_state, run.examples.batch(run.examples.ids)
    bound, expected = BoundModel(run.update_map.model), 0
    for row in range(5):
        batch = tuple(column[row : row + 1] for column in inputs)
        jacobian = torch.func.jacrev(lambda params, batch=batch: bound(task.outputs, params, batch)[0])(state.params)
        jacobian = torch.cat([jacobian[name].flatten(1) for name in state.params], 1)
        outputs = bound(task.outputs, state.params, batch)[0]
        curvature = torch.func.hessian(lambda out, batch=batch: task.losses_of(out[None], batch)[0])(outputs)
        expected = expected + jacobian.T @ curvature @ jacobian / 5
    units = unflatten(torch.eye(len(expected), dtype=torch.float64), state.params)
    assert isinstance(task, SplitTask)
    assert_close(matrix_of(gauss_newton_product(run, state, units, batch_size=2), state.params), expected, 1e-12)


def test_refusals(runs):
    run = fit_linear(Plain(), normal(4, 3, seed=1), normal(4, 2, seed=2), 2)
    state = run.final_state
    for method in (KFAC(), EKFAC(), Fisher()):
        with pytest.raises(InputError, match=r"sampled\(model, batch, noise\)"):
            method.fit(run, [state])
        with pytest.raises(InputError, match="at least one state"):
            method.fit(runs["plain"], [])
    vectors = {name: leaf[None] for name, leaf in state.params.items()}
    with pytest.raises(InputError, match="Plain's losses"):
        gauss_newton_product(run, state, vectors)
    doubled = fit_linear(Doubled(), normal(4, 3, seed=1), normal(4, 2, seed=2), 2)
    with pytest.raises(InputError, match=r"Doubled\.losses and Doubled\.losses_of"):
        gauss_newton_product(doubled, doubled.final_state, vectors)
    run, state = runs["plain"], runs["plain"].final_state
    for wrong in (KFAC(batch_size=0), EKFAC(samples=0), Fisher(examples=[]), EKFAC(examples=99), KFAC(examples=[99])):
        with pytest.raises(InputError):
            wrong.fit(run, [state])
    assert set(EKFAC(examples=5).fit(run, [state]).names) == set(state.params)
