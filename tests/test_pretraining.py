"""Meta-learned pre-training: weights of tasks, the contrastive loss, and the paper's estimator as a method of the engine."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retrograd import All, FixedPoint, Regression, Unrolled, chain, hypergradient, meta_train, record
from retrograd.errors import InputError
from retrograd.hypergradients import ContrastiveLoss, MultitaskLoss, TaskWeights, pretraining_estimator
from tests.tolerances import TOLERANCES

TASKS, ALPHA = 3, 0.2
SMALL = TOLERANCES["exact_vs_differences"]
OWN = TOLERANCES["approximate_vs_own_formula"]
doubtful = pytest.mark.filterwarnings("ignore::retrograd.errors.UntrustedGradient")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    def __init__(self, outputs, seed):
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 2).double(), nn.Linear(2, outputs).double()
        for number, leaf in enumerate(self.parameters()):
            leaf.data.copy_(0.5 * normal(*leaf.shape, seed=seed + number))

    def forward(self, inputs):
        return self.head(torch.tanh(self.encoder(inputs)))


INPUTS, TARGETS = normal(12, 4), (normal(12, TASKS, seed=1) > 0).double()
OWN_INPUTS, OWN_TARGETS = normal(6, 4, seed=2), normal(6, 1, seed=3)


def validation(model):
    return (model(OWN_INPUTS[3:]) - OWN_TARGETS[3:]).square().mean()


def stages(optimizer="adam", steps=6, head_steps=4, normalised=True, logits=(0.3, -0.5, 0.1)):
    weights, model, tuned = TaskWeights(TASKS, normalised=normalised).double(), Net(TASKS, 10), Net(1, 30)
    weights.logits.data.copy_(torch.tensor(logits, dtype=torch.float64))
    made = {
        "adam": lambda leaves: torch.optim.Adam(leaves, lr=0.05),
        "sgd": lambda leaves: torch.optim.SGD(leaves, lr=ALPHA),
        "momentum": lambda leaves: torch.optim.SGD(leaves, lr=ALPHA, momentum=0.5, weight_decay=0.01),
    }[optimizer]
    order = torch.arange(12).roll(5).repeat(steps)[: 8 * steps].reshape(steps, 8)
    first = record(model, (INPUTS, TARGETS), MultitaskLoss(), optimizer=made, order=order, meta=weights, checkpoints=All())
    tuned.encoder.load_state_dict(model.encoder.state_dict())
    groups = [{"params": tuned.head.parameters()}, {"params": tuned.encoder.parameters(), "lr": 0.0}]
    second = record(
        tuned,
        (OWN_INPUTS[:3], OWN_TARGETS[:3]),
        Regression(),
        optimizer=torch.optim.SGD(groups, lr=0.1),
        order=torch.arange(3).repeat(head_steps, 1),
        checkpoints=All(),
    )
    return chain(first, second)


def ended(both):
    return both.stages[-1].update_map.ask(validation, both.final_state).item()


# ---------------------------------------------------------------------------------------------------------------------
# Weights of tasks


def test_weights_start_at_one_and_keep_their_mean():
    for normalised in (True, False):
        assert torch.equal(TaskWeights(4, normalised=normalised)(), torch.ones(4))
    weights = TaskWeights(4)
    weights.logits.data.copy_(torch.tensor([-8.0, 0.0, 1.0, -2.0]))
    assert torch.isclose(weights().mean(), torch.tensor(1.0))
    plain = TaskWeights(4, normalised=False)
    plain.load_state_dict(weights.state_dict())
    assert torch.allclose(plain(), 2 * torch.sigmoid(weights.logits))
    assert torch.allclose(weights(), plain() / plain().mean())


def test_loss_is_the_weighted_mean_over_examples_and_tasks():
    model, weights = Net(TASKS, 0), TaskWeights(TASKS).double()
    weights.logits.data.copy_(normal(TASKS, seed=5))
    found = MultitaskLoss().losses(model, (INPUTS, TARGETS), weights)
    chances = torch.sigmoid(model(INPUTS))
    every = -(TARGETS * chances.log() + (1 - TARGETS) * (1 - chances).log())
    assert torch.allclose(found, (every * weights()).sum(1) / TASKS)
    assert torch.allclose(MultitaskLoss().measurements(model, (INPUTS, TARGETS)), every.sum(1) / TASKS)
    assert torch.allclose(MultitaskLoss().losses(model, (INPUTS, TARGETS)), every.sum(1) / TASKS)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_derivative_through_both_stages_equals_differences(optimizer, normalised):
    logits = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64)
    both = stages(optimizer, normalised=normalised)
    found = hypergradient(both, validation, "meta")[0]["meta"]["logits"][0]
    for task in range(TASKS):
        step = torch.zeros(TASKS, dtype=torch.float64)
        step[task] = 1e-5
        ends = [ended(both.rerun({"meta": {"logits": logits + sign * step}}, {})) for sign in (1, -1)]
        assert abs((ends[0] - ends[1]) / 2e-5 - found[task]) <= SMALL * found.abs().max()


def test_normalised_weights_do_not_move_with_a_common_factor():
    both = stages(logits=(-20.0, -19.0, -21.0))  # sigma is exp here, so a shift of all is a factor of all
    found = hypergradient(both, validation, "meta")[0]["meta"]["logits"][0]
    assert abs(found.sum()) <= 1e-6 * found.abs().max()


# ---------------------------------------------------------------------------------------------------------------------
# The paper's estimator


def dense(both, products, learning_rate):
    """−(∂²L/∂φ∂θ)ᵀ α Σ_j (I − αH)^j v of the last batch of pre-training, with every matrix written out."""
    first, second = both.stages
    names = list(first.final_state.params)
    shapes = [first.final_state.params[name].shape for name in names]
    sizes = [shape.numel() for shape in shapes]
    flat = torch.cat([first.final_state.params[name].flatten() for name in names])
    phi = first.update_map.meta["logits"]
    rows = first.inputs(len(first) - 1).example_ids

    def unpacked(vector):
        leaves = [part.view(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True)]
        return dict(zip(names, leaves, strict=True))

    def loss(vector, phi):
        own = unpacked(vector)
        hidden = torch.tanh(INPUTS[rows] @ own["encoder.weight"].T + own["encoder.bias"])
        outputs = hidden @ own["head.weight"].T + own["head.bias"]
        shares = torch.sigmoid(phi)
        every = F.softplus(outputs) - TARGETS[rows] * outputs
        return (every * shares / shares.mean()).mean()

    def fine_tuned(vector):
        own, start = unpacked(vector), second.state(len(second) - 1).params
        hidden = torch.tanh(OWN_INPUTS @ own["encoder.weight"].T + own["encoder.bias"])

        def error(head, bias, part):
            return (hidden[part] @ head.T + bias - OWN_TARGETS[part]).square().mean()

        head, bias = (start[name].detach().requires_grad_() for name in ("head.weight", "head.bias"))
        slopes = torch.autograd.grad(error(head, bias, slice(0, 3)), (head, bias), create_graph=True)
        return error(head - 0.1 * slopes[0], bias - 0.1 * slopes[1], slice(3, 6))

    hessian = torch.autograd.functional.hessian(lambda vector: loss(vector, phi), flat)
    slope = torch.func.grad(loss)
    mixed = torch.autograd.functional.jacobian(lambda phi: slope(flat, phi), phi)
    v = torch.autograd.functional.jacobian(fine_tuned, flat)
    inner = torch.eye(len(flat), dtype=torch.float64) - learning_rate * hessian
    p = learning_rate * sum(torch.linalg.matrix_power(inner, j) @ v for j in range(products + 1))
    return -(mixed.T @ p)


@doubtful
@pytest.mark.parametrize("products", [0, 1, 5])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_estimator_is_the_papers_formula(optimizer, products):
    both = stages(optimizer, steps=10)
    found = hypergradient(both, validation, "meta", method=pretraining_estimator(ALPHA, products))[0]["meta"]["logits"][0]
    expected = dense(both, products, ALPHA)
    assert torch.allclose(found, expected, rtol=OWN, atol=OWN * expected.abs().max().item())


@doubtful
def test_series_is_that_of_the_optimizer_where_its_step_is_the_same_everywhere():
    both = stages("sgd")
    own = (FixedPoint(solver="neumann", iterations=3, window=1), Unrolled(last=1))
    first, second = (hypergradient(both, validation, "meta", method=m)[0] for m in (own, pretraining_estimator(ALPHA, 2)))
    assert torch.allclose(first.vector(), second.vector(), rtol=OWN)


@doubtful
def test_warm_start_with_the_estimator_goes_on():
    found = meta_train(
        stages("adam", steps=3, head_steps=2),
        validation,
        optimizer=lambda leaves: torch.optim.Adam(leaves, lr=0.1),
        steps=8,
        start="warm",
        method=pretraining_estimator(0.05),
    )
    assert len(found.history) == 8
    assert found.history[-1].outcome < found.history[0].outcome
    assert not torch.equal(found.meta["logits"], found.start["meta/logits"])


# ---------------------------------------------------------------------------------------------------------------------
# The contrastive loss


class Shifted(nn.Module):
    """Adds noise of a scale to be learned."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, inputs):
        return inputs + self.scale * torch.randn(inputs.shape, dtype=inputs.dtype)


def test_contrastive_loss_is_its_formula():
    count, tau = 4, 0.5
    views, weights = [normal(count, 3, seed=number) for number in (7, 8)], torch.arange(1.0, 5.0, dtype=torch.float64)
    drawn = iter(views)
    found = ContrastiveLoss(tau).loss(nn.Identity(), torch.zeros(count, 3), weights, lambda _: next(drawn))
    every = torch.cat(views)
    total = 0.0
    for anchor in range(2 * count):
        scores = [math.exp(F.cosine_similarity(every[anchor], every[other], dim=0).item() / tau) for other in range(2 * count)]
        partner = (anchor + count) % (2 * count)
        loss = -math.log(scores[partner] / (sum(scores) - scores[anchor]))
        total += weights[anchor % count].item() * loss / 2 / count
    assert found.item() == pytest.approx(total, rel=1e-10)


def test_augmentation_of_contrastive_pretraining_is_differentiated():
    model, tuned = Net(3, 10), Net(1, 30)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    order = torch.arange(12).repeat(4).reshape(6, 8)
    first = record(model, INPUTS, ContrastiveLoss(), optimizer=optimizer, order=order, meta=Shifted(), checkpoints=All())
    tuned.encoder.load_state_dict(model.encoder.state_dict())
    second = record(
        tuned,
        (OWN_INPUTS[:3], OWN_TARGETS[:3]),
        Regression(),
        optimizer=lambda leaves: torch.optim.SGD(leaves, lr=0.1),
        order=torch.arange(3).repeat(3, 1),
    )
    both = chain(first, second)
    found = hypergradient(both, validation, "meta")[0]["meta"]["scale"].item()
    ends = [ended(both.rerun({"meta": {"scale": torch.tensor(0.3 + step, dtype=torch.float64)}}, {})) for step in (1e-5, -1e-5)]
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(found, rel=SMALL)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_refuses_what_makes_no_sense():
    with pytest.raises(InputError, match="at least one task"):
        TaskWeights(0)
    with pytest.raises(InputError, match="temperature must be positive"):
        ContrastiveLoss(0.0)
    with pytest.raises(InputError, match="products must be at least 0"):
        pretraining_estimator(0.1, products=-1)
    with pytest.raises(InputError, match="learning rate above 0"):
        pretraining_estimator(0.0)
    with pytest.raises(InputError, match=r"one for each task, \[batch, task\]"):
        MultitaskLoss().losses(Net(2, 0), (INPUTS, TARGETS), None)
