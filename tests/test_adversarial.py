"""Adversarial training: perturbations against closed forms, derivatives of runs against differences of retraining."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from retrograd import Classification, Regression, TracIn, Unrolled, attribute, hypergradient, record, retrain
from retrograd.adversarial import Adversarial, SignedClassification, radius_for
from retrograd.errors import InputError
from retrograd.trajectory import StateVectors
from tests.cases import CASES, EXAMPLES, normal, tabular
from tests.tolerances import TOLERANCES

SIGNED = SignedClassification()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> bool:
    return found.shape == expected.shape and bool((found - expected).norm() <= tolerance * expected.norm())


def signed(count: int, seed: int) -> tuple[Tensor, Tensor]:
    inputs = normal(count, 3, seed=seed)
    return inputs, torch.where(inputs[:, 0] + 0.3 * inputs[:, 1] > 0, 1.0, -1.0).double()


def linear(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(3, 1, bias=False).double()


# ---------------------------------------------------------------------------------------------------------------------
# The perturbation


@pytest.mark.parametrize(("norm", "loss"), [("l2", "exponential"), ("linf", "logistic")])
def test_closed_form_of_a_linear_model(norm, loss):
    model, (inputs, targets), task = linear(), signed(6, 1), SignedClassification(loss)
    theta = model.weight.detach()[0]
    away = 0.3 * theta.sign() if norm == "linf" else 0.3 * theta / theta.norm()
    expected = inputs - targets[:, None] * away
    for steps in (0, 1, 20):
        found = Adversarial(task, 0.3, norm, steps=steps).perturbed(model, (inputs, targets))
        assert close(found[0], expected)
        assert found[1] is targets
    dual = theta.abs().sum() if norm == "linf" else theta.norm()
    margins = targets * (inputs @ theta) - 0.3 * dual
    wanted = torch.exp(-margins) if loss == "exponential" else torch.log1p(torch.exp(-margins))
    assert close(Adversarial(task, 0.3, norm, steps=0).losses(model, (inputs, targets)).detach(), wanted)


def test_closed_form_of_two_classes():
    model, (inputs, _) = nn.Linear(3, 2).double(), signed(6, 1)
    batch = (inputs, torch.arange(6) % 2)
    iterated = Adversarial(Classification(), 0.2, steps=50, step_size=0.02).perturbed(model, batch)
    assert close(Adversarial(Classification(), 0.2, steps=0).perturbed(model, batch)[0], iterated[0], 1e-6)


def test_closed_form_outlives_underflow():
    model = linear()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[300.0, 0.0, 0.0]]))
    inputs, targets = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    found = Adversarial(SIGNED, 0.5, steps=0).perturbed(model, (inputs, targets))[0]  # the loss is e^{−600}
    assert close(found, torch.tensor([[1.5, 1.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_ascent_stays_within_radius_and_bounds_and_raises_the_loss(norm):
    model, batch = CASES["plain"].model(), tabular(20, 5)
    clean = Classification().losses(model, batch)
    for task in (
        Adversarial(Classification(), 0.4, norm, steps=8),
        Adversarial(Classification(), 0.4, norm, steps=8, random_start=True),
        Adversarial(Classification(), 0.4, norm, steps=3, step_size=5.0, bounds=(-1.0, 1.0)),
    ):
        torch.manual_seed(0)
        inputs = batch[0] if task.bounds is None else batch[0].clamp(-1, 1)
        worst = task.perturbed(model, (inputs, batch[1]))[0]
        delta = worst - inputs
        lengths = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
        assert (lengths <= 0.4 + 1e-9).all()
        if task.bounds is None:
            assert (lengths >= 0.39).all()
            assert (task.losses(model, batch) > clean).all()
            assert close(task.measurements(model, batch).detach(), Classification().measurements(model, batch).detach())
        else:
            assert worst.abs().max() <= 1 + 1e-12


def test_images_and_dicts_and_modes():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)
    ).double()
    inputs = normal(5, 1, 4, 4, seed=1)

    class FromDict:
        def losses(self, model, batch):
            return Classification().losses(model, (batch["pixels"], batch["labels"]))

        measurements = losses

    before = {name: leaf.clone() for name, leaf in model.named_buffers()}
    batch = {"pixels": inputs, "labels": torch.arange(5) % 2}
    model[1].eval()
    found = Adversarial(FromDict(), 0.3, key="pixels").perturbed(model, batch)
    lengths = (found["pixels"] - inputs).flatten(1).norm(dim=1)
    assert ((lengths > 0.2) & (lengths <= 0.3 + 1e-9)).all()
    assert found["labels"] is batch["labels"]
    assert all(torch.equal(leaf, before[name]) for name, leaf in model.named_buffers())
    assert [module.training for module in model] == [True, False, True, True, True, True]


# ---------------------------------------------------------------------------------------------------------------------
# Runs

MLP = CASES["plain"]
TASKS = {
    "l2": Adversarial(MLP.task, 0.3, steps=3),
    "l2 from a random start": Adversarial(MLP.task, 0.3, steps=2, random_start=True),
    "linf": Adversarial(MLP.task, 0.2, "linf", steps=2),
    "linear": Adversarial(SIGNED, 0.2, steps=0),
    "batch norm": Adversarial(CASES["batchnorm"].task, 0.2, steps=2),
    "convolutions": Adversarial(CASES["cnn"].task, 0.2, steps=2),
    "attention": Adversarial(CASES["attention"].task, 0.2, steps=2),
}
MODELS = {"batch norm": CASES["batchnorm"], "convolutions": CASES["cnn"], "attention": CASES["attention"]}


def recorded(name: str, **options):
    case, task = MODELS.get(name, MLP), TASKS[name]
    data = signed(EXAMPLES, 100) if name == "linear" else case.examples
    model = linear() if name == "linear" else case.model()
    optimizer = lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.5)  # noqa: E731
    run = record(model, data, options.pop("task", task), optimizer=optimizer, epochs=2, batch_size=7, **options)
    return run, (signed(3, 200) if name == "linear" else case.data(3, 200))


@pytest.mark.parametrize("name", TASKS)
def test_scores_are_differences_of_retraining(name):
    run, queries = recorded(name)
    scores = attribute(run, queries, method=Unrolled(), check_roughness=False).values
    step, found = 1e-5, []
    for example in (0, 11):
        sides = []
        for sign in (1, -1):
            weights = torch.ones(EXAMPLES, dtype=torch.float64)
            weights[example] += sign * step
            sides.append(run.rerun(weights=weights).measurements(queries))
        found.append((sides[0] - sides[1]) / (2 * step))
    expected = torch.stack(found, dim=1)
    error = (scores[:, [0, 11]] - expected).norm() / expected.norm()
    assert error <= TOLERANCES["exact_vs_differences"], f"relative error {error:.1e}"
    if name == "l2":  # the perturbation matters
        clean = attribute(recorded(name, task=TASKS[name].task)[0], queries, check_roughness=False).values
        assert (scores - clean).norm() > 1e-2 * clean.norm()


@pytest.mark.parametrize("name", ["l2 from a random start", "linf", "linear"])
def test_every_way_through_a_step_agrees(name):
    run, queries = recorded(name)
    loop = attribute(run, queries, method=Unrolled(route="loop"), check_roughness=False).values
    batched = attribute(run, queries, method=Unrolled(route="batched"), check_roughness=False).values
    assert close(loop, batched)
    # pushforward: adjointness
    state, inputs = run.state(1), run.inputs(1)
    draw = torch.Generator().manual_seed(0)

    def vectors() -> StateVectors:
        def drawn() -> dict[str, Tensor]:
            return {n: torch.randn(2, *p.shape, generator=draw, dtype=p.dtype) for n, p in state.params.items()}

        return StateVectors(drawn(), {"velocity": drawn()}, {})

    tangents, costates = vectors(), vectors()
    forward = run.update_map.pushforward(state, inputs, tangents)
    back = run.update_map.pullback(state, inputs, costates)
    assert close(forward.inner(costates), tangents.inner(back.costates), 1e-9)
    # many models at once
    weights = torch.ones(2, EXAMPLES, dtype=torch.float64)
    weights[1, 3] = 0
    together = retrain(run, queries, weights, together=2).outcomes
    alone = torch.stack([run.rerun(weights=own).measurements(queries) for own in weights])
    assert close(together, alone, 1e-9)


def test_differences_of_gradients_and_approximate_methods_work():
    run, queries = recorded("l2")
    found = attribute(run, queries, method=TracIn(2)).values
    assert torch.isfinite(found).all()
    newton = attribute(run, queries, method=Unrolled(curvature="gauss_newton"), check_roughness=False).values
    assert torch.isfinite(newton).all()


def test_a_constant_perturbation_is_the_usual_step():
    """∂ℓ/∂θ at inputs that were found before, as a plain loop does it."""
    task = Adversarial(MLP.task, 0.3, steps=3, perturbation="constant")
    run, _ = recorded("l2", task=task)
    model = MLP.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    for step in range(len(run)):
        batch = run.inputs(step).batch
        worst = batch[0].clone()
        for _ in range(3):
            point = worst.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(MLP.task.losses(model, (point, batch[1])).sum(), point)
            delta = worst + 0.25 * gradient / gradient.norm(dim=1, keepdim=True) - batch[0]
            worst = batch[0] + delta * (0.3 / delta.norm(dim=1, keepdim=True)).clamp(max=1)
        optimizer.zero_grad()
        MLP.task.losses(model, (worst, batch[1])).mean().backward()
        optimizer.step()
    for name, leaf in model.named_parameters():
        assert close(run.final_state.params[name], leaf.detach(), 1e-9)
    differentiated, _ = recorded("l2")
    assert not close(run.final_state.params["0.weight"], differentiated.final_state.params["0.weight"], 1e-6)


class Radius(nn.Module):
    """A radius that grows by a learnt pace."""

    def __init__(self, start: float = 0.2, pace: float = 0.05):
        super().__init__()
        self.start = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.pace = nn.Parameter(torch.tensor(pace, dtype=torch.float64))

    def forward(self, step: int) -> Tensor:
        return self.start + self.pace * step


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_hypergradients_by_the_radius_and_by_other_inputs(norm):
    task = Adversarial(MLP.task, None, norm, steps=2)
    run, queries = recorded("l2", task=task, meta=Radius())
    found = hypergradient(run, queries, wrt=["meta", "learning_rate", "inputs"])
    step = 1e-5
    for name in ("start", "pace"):
        sides = []
        for sign in (1, -1):
            meta = {key: leaf + sign * step * (key == name) for key, leaf in run.update_map.meta.items()}
            sides.append(run.rerun(meta=meta).measurements(queries).mean())
        expected = (sides[0] - sides[1]) / (2 * step)
        assert float(found["meta"][name]) == pytest.approx(float(expected), rel=1e-5)
    sides = [run.rerun(hyper={"learning_rate": torch.tensor([0.2 + s * step], dtype=torch.float64)}) for s in (1, -1)]
    expected = (sides[0].measurements(queries).mean() - sides[1].measurements(queries).mean()) / (2 * step)
    assert float(found["learning_rate"]) == pytest.approx(float(expected), rel=1e-5)


def test_a_fixed_radius_is_that_of_a_meta_module_that_says_so():
    fixed, _ = recorded("l2")
    asked, _ = recorded("l2", task=replace(TASKS["l2"], radius=None), meta=Radius(0.3, 0.0))
    assert all(close(asked.final_state.params[name], leaf) for name, leaf in fixed.final_state.params.items())


def test_random_starts_are_those_of_the_step():
    run, _ = recorded("l2 from a random start")
    again, _ = recorded("l2 from a random start")
    other, _ = recorded("l2 from a random start", seed=1)
    assert run.final_state.equals(again.final_state)
    assert run.state(1).equals(run.rerun().state(1))
    assert not run.state(1).equals(other.state(1))


def test_recorded_run_is_the_plain_loop():
    """The two-point set of the reference with its closed form, 100 steps."""
    inputs = torch.tensor([[1.0, 2.0], [1.0, -0.5]], dtype=torch.float64)
    data, steps = (inputs, torch.ones(2, dtype=torch.float64)), 100
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    task = Adversarial(SIGNED, radius_for(steps), steps=0)
    run = record(model, data, task, optimizer=lambda p: torch.optim.SGD(p, lr=0.2), epochs=steps, batch_size=2)
    theta, radius = torch.zeros(2, dtype=torch.float64), 1 - steps**-0.5
    for _ in range(steps):
        length = theta.norm()
        unit = theta / length if length > 0 else theta
        shares = torch.exp(-inputs @ theta + radius * length) / 2
        theta = theta + 0.2 * (shares @ inputs - radius * shares.sum() * unit)
    assert close(run.final_state.params["weight"][0], theta, 1e-12)
    direction = theta / theta.norm()
    assert float((direction - torch.tensor([1.0, 0.0])).norm()) == pytest.approx(0.176, abs=0.002)


def test_it_refuses():
    assert radius_for(400, 2.0) == pytest.approx(1.9)

    class Coupled:
        def loss(self, model, batch, weights):
            return model(batch[0]).sum()

        def measurements(self, model, batch):
            return model(batch[0])[:, 0]

    class Whole:
        def losses(self, model, batch):
            return model(batch[0])[:, 0]

        measurements = losses

    model, batch = linear(), signed(4, 1)
    plain = Adversarial(SIGNED, 0.1)
    bent = nn.Sequential(nn.Linear(3, 1), nn.Tanh()).double()
    for problem, call in {
        "norm must be": lambda: Adversarial(SIGNED, 0.1, "l1"),  # type: ignore
        "perturbation must be": lambda: Adversarial(SIGNED, 0.1, perturbation="some"),  # type: ignore
        "from 0 on": lambda: Adversarial(SIGNED, -0.1),
        "radius is a length": lambda: Adversarial(SIGNED, math.inf),
        "step_size above 0": lambda: Adversarial(SIGNED, 0.1, step_size=0.0),
        "no start, no step_size": lambda: Adversarial(SIGNED, 0.1, steps=0, random_start=True),
        "lowest and the highest": lambda: Adversarial(SIGNED, 0.1, bounds=(1.0, 0.0)),
        "couple examples": lambda: Adversarial(Coupled(), 0.1),  # type: ignore
        "leaves the radius to a meta-module": lambda: Adversarial(SIGNED, None).losses(model, batch),
        "must be floating-point tensors, got torch.int64": lambda: plain.perturbed(model, (torch.arange(4), batch[1])),
        "has a Tanh": lambda: Adversarial(SIGNED, 0.1, steps=0).perturbed(bent, batch),
        "one output or two classes": lambda: Adversarial(Classification(), 0.1, steps=0).perturbed(
            nn.Linear(3, 3).double(), (batch[0], torch.arange(4) % 3)
        ),
        "has no outputs": lambda: Adversarial(Whole(), 0.1).outputs(model, batch),
        "one output an example": lambda: SIGNED.losses(nn.Linear(3, 2).double(), batch),
        "'exponential' or 'logistic'": lambda: SignedClassification("hinge"),  # type: ignore
        "at least one step": lambda: radius_for(0),
        "given twice": lambda: recorded("l2", meta=Radius()),
        "must return one number": lambda: recorded("l2", task=Adversarial(MLP.task, None), meta=nn.Embedding(3, 3)),
    }.items():
        with pytest.raises(Exception, match=problem + "|Expected type|must be Tensor"):
            call()
    with pytest.raises(InputError, match="given twice"):
        recorded("l2", meta=Radius())
    with pytest.raises(InputError, match="Regression"):
        Adversarial(Regression(), 0.1).losses(nn.Linear(3, 2).double(), (batch[0], batch[1][:, None]))
