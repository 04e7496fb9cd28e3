"""Which solution a bilevel problem ends at: identities on quadratics, cold and warm starts, and distilled data."""

import math

import pytest
import torch
from torch import nn

from retrograd import Classification, FixedPoint, Outcome, Regression, Unrolled, fresh_start, hypergradient, meta_train, record
from retrograd.errors import CorruptRecord, InputError, ModelChanged
from retrograd.hypergradients import DistilledData, distil_dataset
from tests.tolerances import TOLERANCES

EXACT = TOLERANCES["exact_vs_autograd"]
DIFFERENCES = TOLERANCES["exact_vs_differences"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Quadratics: ½ ‖Φw − u‖² with more weights than targets, and an outcome that depends on one direction of w

PHI = torch.tensor([[1.0], [0.95], [0.9], [0.85]]).double() * torch.linalg.qr(normal(7, 4, seed=1))[0].T
ASKED = normal(1, 7, seed=2)
HESSIAN = PHI.T @ PHI * 2 / 4  # of the mean squared error
ALPHA = 1 / torch.linalg.eigvalsh(HESSIAN).max().item()


def off_by(model):
    return (model(ASKED)[0, 0] - 1).square() / 2


def trained(steps, start=None):
    model = nn.Linear(7, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.zeros(1, 7) if start is None else start)
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=ALPHA)  # noqa: E731
    order = torch.arange(4).repeat(steps, 1)
    return record(model, (PHI, torch.zeros(4, 1).double()), Regression(), optimizer=sgd, order=order)


def series(terms):
    """α Σ_{j<K} (I − αH)^j."""
    eye = torch.eye(7, dtype=torch.float64)
    return ALPHA * sum(torch.linalg.matrix_power(eye - ALPHA * HESSIAN, power) for power in range(terms))


@pytest.mark.filterwarnings("ignore::retrograd.errors.UntrustedGradient")
@pytest.mark.parametrize(("steps", "seed"), [(1, 3), (4, 4), (12, 5)])
def test_unrolled_descent_from_anywhere_is_a_neumann_series(steps, seed):
    run = trained(steps, normal(1, 7, seed=seed))
    unrolled = hypergradient(run, off_by, "labels")["labels"][0, :, 0]
    neumann = hypergradient(run, off_by, "labels", method=FixedPoint("neumann", iterations=steps, window=1))["labels"]
    miss = (ASKED @ run.final_state.params["weight"].T - 1).item()
    dense = miss * (2 / 4) * PHI @ series(steps) @ ASKED[0]
    torch.testing.assert_close(unrolled, dense, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(neumann[0, :, 0], dense, rtol=EXACT, atol=EXACT)


@pytest.mark.filterwarnings("ignore::retrograd.errors.UntrustedGradient")
@pytest.mark.parametrize("terms", [None, 2])
def test_a_cold_start_ends_at_the_solution_that_its_hypergradient_points_to(terms):
    exact = torch.linalg.pinv(PHI)
    direction = PHI @ (torch.linalg.pinv(HESSIAN) if terms is None else series(terms)) @ ASKED[0]
    slope = ASKED[0] @ exact @ direction * 2 / 4
    run = trained(24)  # the slowest direction is solved to 1e-13
    method = None if terms is None else FixedPoint("neumann", iterations=terms, window=1)
    outer = lambda leaves: torch.optim.SGD(leaves, lr=1 / slope.item())  # noqa: E731
    found = meta_train(run, off_by, "labels", optimizer=outer, steps=2, method=method).values["labels"][:, 0]
    torch.testing.assert_close(found, direction / (ASKED[0] @ exact @ direction), rtol=1e-9, atol=1e-9)
    if terms is None:  # the shortest u whose model gives 1
        along = exact.T @ ASKED[0]
        torch.testing.assert_close(found, along / along.square().sum(), rtol=1e-9, atol=1e-9)


class Angle(nn.Module):
    def __init__(self, angle):
        super().__init__()
        self.angle = nn.Parameter(torch.tensor(angle, dtype=torch.float64))

    def forward(self):
        return torch.stack([self.angle.cos(), self.angle.sin()])


class OnALine:
    """Trains w to lie on the line ⟨x(u), w⟩ = 1, x(u) a unit vector."""

    def losses(self, model, batch, meta):
        return (model(meta()[None]) - 1).square()[:, 0]

    def measurements(self, model, batch):
        return model(batch[0])[:, 0]


def test_a_warm_start_remembers_every_line_it_was_on():
    # Trained from 0, w is the point x(u) of the line, at distance 1. So the best of all u leaves √2 − 1 to the target (1, 1); a
    # warm start goes on from line to line, and gets there.
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.5)  # noqa: E731 one step, and it is there
    run = record(model, torch.arange(1), OnALine(), optimizer=sgd, order=torch.zeros(1, 1).long(), meta=Angle(-0.3))
    distance = Outcome(lambda model: (model.weight - 1).square().sum())
    outer = lambda leaves: torch.optim.SGD(leaves, lr=0.5)  # noqa: E731
    cold = meta_train(run, distance, optimizer=outer, steps=25)
    assert cold.values["meta/angle"].item() == pytest.approx(math.pi / 4, abs=1e-6)
    assert cold.history[-1].outcome == pytest.approx((2**0.5 - 1) ** 2, abs=1e-9)
    warm = meta_train(run, distance, optimizer=outer, steps=25, start="warm")
    retrained = warm.train().final_state.params["weight"][0]
    assert warm.history[-1].outcome < 0.02
    assert (retrained - 1).square().sum().item() == pytest.approx(1, abs=1e-6)  # at u = π/2, worse than every cold start


# ---------------------------------------------------------------------------------------------------------------------
# Distilled data

DATA = (normal(30, 3, seed=5), torch.arange(30) % 3)
NUMBERS = (normal(30, 3, seed=5), normal(30, 2, seed=6))


def network(_, outputs=3):
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def flat(params):
    return torch.cat([leaf.flatten() for leaf in params.values()])


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_gradient_by_synthetic_data_equals_differences_of_training(kind):
    task, data = (Classification(), DATA) if kind == "classes" else (Regression(), NUMBERS)
    make = lambda seed: network(seed, data[1].unique().numel() if kind == "classes" else 2)  # noqa: E731
    run = distil_dataset(make, data, task, size=4, steps=6, learning_rate=0.3, outer_steps=1).found.recipe
    real = Outcome(lambda model: task.losses(model, data).mean())
    found = hypergradient(run, real, ("meta", "learning_rate"))
    moves = {name: normal(*leaf.shape, seed=7) for name, leaf in run.update_map.meta.items()}

    def value(size):
        meta = {name: leaf + size * moves[name] for name, leaf in run.update_map.meta.items()}
        again = run.rerun(meta=meta, hyper={"learning_rate": torch.tensor([0.3 + size], dtype=torch.float64)})
        return real.values(again.update_map, again.final_state).item()

    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    predicted = found.along({"meta": moves, "learning_rate": torch.ones(1)}).item()
    assert predicted == pytest.approx(slope, rel=DIFFERENCES)


def test_distilled_data_train_new_models_and_say_what_they_learned():
    classes = DATA[0].argmax(1)
    adam = lambda leaves: torch.optim.Adam(leaves, lr=0.2)  # noqa: E731
    options = {"size": 3, "steps": 3, "learning_rate": 2.0, "outer_steps": 15, "optimizer": adam}
    found = distil_dataset(network, (DATA[0], classes), **options)
    assert found.inputs.shape == (3, 3)
    torch.testing.assert_close(found.labels.sum(1), torch.ones(3).double())
    assert found.learning_rate != 2.0
    audited = found.audit((DATA[0], classes), repeats=2)
    assert [arm.name for arm in audited.arms] == ["meta-trained", "retrained", "permuted", "unchanged"]
    assert audited.learned > 0.2
    assert audited["retrained"].mean > audited["permuted"].mean
    longer = found.audit((DATA[0], classes), repeats=1, steps=6)
    assert longer["meta-trained"].mean == audited["meta-trained"].mean


def test_training_on_distilled_data_is_the_training_that_they_were_made_for():
    found = distil_dataset(network, DATA, size=4, steps=5, outer_steps=2, starts=1, begin="examples")
    own = found.found.train(initial=fresh_start(found.found.recipe, network, 9))
    with torch.random.fork_rng():
        torch.manual_seed(9)
        run = found.train(network(9))
    torch.testing.assert_close(flat(run.final_state.params), flat(own.final_state.params), rtol=EXACT, atol=EXACT)


def test_noise_examples_and_the_number_of_starts():
    options = {"size": 5, "steps": 2, "outer_steps": 3, "learn_rate": False}
    real = distil_dataset(network, DATA, begin="examples", **options).found.start["meta/inputs"]
    assert all(any(torch.equal(row, other) for other in DATA[0]) for row in real)
    one = distil_dataset(network, DATA, starts=1, **options)
    assert one.learning_rate == 0.1
    first = flat(one.found.run.state(0).params)
    assert torch.equal(first, flat(one.found.recipe.state(0).params))
    many = distil_dataset(network, DATA, **options)
    assert not torch.equal(first, flat(many.found.run.state(0).params))


def test_a_warm_start_is_audited_like_a_cold_one():
    found = distil_dataset(network, DATA, size=3, steps=2, outer_steps=4, start="warm", method=Unrolled(), learn_rate=False)
    again = flat(found.found.run.state(0).params)
    assert not torch.equal(again, flat(found.found.recipe.state(0).params))  # the last outer step went on
    audited = found.audit(DATA, repeats=2, steps=8)
    assert len(audited["retrained"].outcomes) == 2
    assert audited.memorised == audited["meta-trained"].mean - audited["retrained"].mean


def test_distilled_data_come_back_from_a_file(tmp_path):
    found = distil_dataset(network, DATA, size=3, steps=2, outer_steps=1)
    file = tmp_path / "distilled.safetensors"
    found.save(file)
    opened = DistilledData.open(file)
    assert torch.equal(opened.inputs, found.inputs)
    assert torch.equal(opened.labels, found.labels)
    assert (opened.learning_rate, opened.steps) == (found.learning_rate, 2)
    with pytest.raises(InputError, match="a file does not hold"):
        opened.audit(DATA)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptRecord, match="altered"):
        DistilledData.open(file)


def test_what_cannot_be_distilled_is_refused():
    with pytest.raises(InputError, match="at least 1"):
        distil_dataset(network, DATA, size=0)
    found = distil_dataset(network, DATA, size=3, steps=2, outer_steps=1)
    with pytest.raises(ModelChanged, match="another kind of model"):
        fresh_start(found.found.recipe, lambda seed: network(seed, 5), 0)
