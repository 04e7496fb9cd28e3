"""Hypergradients against autograd through the whole run, and against central differences of training again."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from retrograd import (
    All,
    Examples,
    FirstOrder,
    Forward,
    Outcome,
    Queries,
    Regression,
    Sqrt,
    Trajectory,
    Treeverse,
    Unrolled,
    hypergradient,
    record,
)
from retrograd.errors import InputError, UntrustedGradient
from retrograd.trajectory import InputVectors
from tests.cases import RULES, normal
from tests.reference import hypergradient_autograd as reference
from tests.setups import SETUPS
from tests.test_update_map import vectors
from tests.tolerances import TOLERANCES

EXACT, DIFFERENCES = TOLERANCES["exact_vs_autograd"], TOLERANCES["exact_vs_differences"]
PAIRS = [
    ("plain", "sgd"),
    ("plain", "adam"),
    ("clipped", "momentum"),
    ("clipped", "rmsprop momentum"),
    ("groups", "nesterov"),
    ("groups", "adamw"),
    ("batchnorm", "momentum"),
    ("batchnorm", "adam"),
    ("dropout", "sgd decay"),
    ("dropout", "adamw"),
    ("regression", "nesterov"),
    ("regression", "rmsprop"),
    ("meta", "momentum"),
    ("meta", "adamw"),
    ("coupled", "sgd"),
    ("coupled", "adam"),
    ("everything", "nesterov"),
    ("everything", "adamw"),
    ("everything", "rmsprop momentum"),
]
every_pair = pytest.mark.parametrize(("setup", "rule"), PAIRS, ids=map("-".join, PAIRS))
_RUNS: dict[tuple[str, str], Trajectory] = {}
_FOUND: dict[tuple[str, str], Any] = {}


def run_of(setup: str, rule: str) -> Trajectory:
    if (setup, rule) not in _RUNS:
        _RUNS[setup, rule] = SETUPS[setup].record(RULES[rule])
    return _RUNS[setup, rule]


def queries_of(setup: str) -> Queries:
    return Queries(SETUPS[setup].case.queries)


def names_of(run: Trajectory) -> set[str]:
    # torch does not dampen a parameter's first gradient, so there is no dampening of that step to differentiate by.
    return run.update_map.inputs_of(run.inputs(0)) - {"dampening"} | {"example_weights", "initial_params"}


def exact(setup: str, rule: str) -> Any:
    """All derivatives by unrolling, hyperparameters of each step apart."""
    if (setup, rule) not in _FOUND:
        run = run_of(setup, rule)
        method = Unrolled(route="batched")
        _FOUND[setup, rule] = hypergradient(run, queries_of(setup), names_of(run), method=method, per_step=True)
    return _FOUND[setup, rule]


def leaves(value: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {"": value} if isinstance(value, Tensor) else value


def distance(found: Any, expected: Any) -> float:
    """Largest difference of any leaf relative to the largest entry of all of them; NaN counts as infinitely far."""
    found, expected = leaves(found), leaves(expected)
    assert found.keys() == expected.keys()
    size = max(leaf.abs().max().item() for leaf in expected.values()) or 1.0
    worst = 0.0
    for name, leaf in expected.items():
        assert found[name].shape == leaf.shape
        error = (found[name] - leaf).abs().max().item() / size
        worst = max(worst, error if error == error else float("inf"))
    return worst


# ---------------------------------------------------------------------------------------------------------------------
# The truth


@every_pair
def test_every_input_equals_autograd_through_the_run(setup: str, rule: str):
    run, found = run_of(setup, rule), exact(setup, rule)
    expected, norms = reference.hypergradients(SETUPS[setup], RULES[rule], run)
    clip_norm = SETUPS[setup].case.clip_norm
    if clip_norm is not None:  # clipping is at work in some steps
        assert max(norms) > clip_norm
        expected["clip_norm"] = expected["clip_norm"][..., None]
    assert found.values.keys() == names_of(run)
    for name in names_of(run):
        own = {key: leaf for key, leaf in leaves(expected[name]).items() if not key or key in leaves(found[name])}
        assert distance(found[name], own if isinstance(found[name], dict) else expected[name]) < EXACT, name
        assert sum(leaf.abs().sum() for leaf in own.values()) > 0, name
    assert found.notes["exact"] is True
    assert found.doubts == ()


def changed(run: Trajectory, setup: str, name: str, moves: Any, h: float) -> Trajectory:
    """Train again with one input moved by h."""
    own = SETUPS[setup]
    if name == "example_weights":
        return run.rerun(weights=1 + h * moves / own.case.all_weights)  # factors on the recorded weights
    if name == "initial_params":
        state = run.state(0)
        params = {key: leaf + h * moves[key] for key, leaf in state.params.items()}
        return run.rerun(initial=type(state)(params, state.slots, state.buffers, 0))
    if name == "meta":
        return run.rerun(meta={key: leaf + h * moves[key] for key, leaf in run.update_map.meta.items()})
    if name == "clip_norm":
        assert own.case.clip_norm is not None
        return run.rerun(clip_norm=own.case.clip_norm + h * moves.item())
    if name in ("inputs", "labels"):
        inputs, targets = own.examples
        if name == "labels" and not targets.is_floating_point():
            targets = torch.nn.functional.one_hot(targets, moves.shape[1]).double()
        data = (inputs + h * moves, targets) if name == "inputs" else (inputs, targets + h * moves)
        return run.rerun(examples=Examples(data, run.examples.ids))
    now = torch.tensor([[group[name] for group in step.hyper] for step in run.records], dtype=torch.float64)
    return run.rerun(hyper={name: now + h * moves})


@pytest.mark.parametrize(
    ("setup", "rule"),
    [
        ("plain", "adam"),
        ("clipped", "momentum"),
        ("groups", "nesterov"),
        ("batchnorm", "momentum"),
        ("dropout", "adamw"),
        ("regression", "rmsprop"),
        ("meta", "adamw"),
        ("coupled", "sgd"),
        ("everything", "rmsprop momentum"),
    ],
)
def test_every_input_equals_differences_of_training_again(setup: str, rule: str):
    run, found = run_of(setup, rule), exact(setup, rule)
    queries = SETUPS[setup].case.queries
    # ε inside of the root can't move to both sides of 0 where a second moment is 0.
    for place, name in enumerate(sorted(names_of(run) - {"epsilon_root"})):
        shapes = {key: leaf.shape[1:] for key, leaf in leaves(found[name]).items()}
        if name == "clip_norm":  # one number for all steps, as training again takes it
            along, moves = found[name].sum((1, 2)), torch.ones(1, dtype=torch.float64)
        else:
            scale = 0.1 if name == "epsilon" else 1.0
            drawn = {key: scale * normal(*shape, seed=place + 7 * row) for row, (key, shape) in enumerate(shapes.items())}
            moves = drawn if isinstance(found[name], dict) else drawn[""]
            along = found.along({name: moves})
        error = float("inf")
        for h in (1e-4, 1e-5, 1e-3, 1e-6):  # the bottom of a V: truncation to one side, rounding to the other
            ends = [changed(run, setup, name, moves, sign * h).measurements(queries) for sign in (1, -1)]
            error = min(error, (((ends[0] - ends[1]) / (2 * h) - along).abs().max() / along.abs().max()).item())
            if error < DIFFERENCES:
                break
        assert error < DIFFERENCES, name


@pytest.mark.parametrize(
    ("setup", "rule"),
    [("everything", "nesterov"), ("groups", "adamw"), ("coupled", "adam"), ("clipped", "rmsprop momentum")],
)
def test_forward_equals_unrolled(setup: str, rule: str):
    run = run_of(setup, rule)
    names = names_of(run) - {"example_weights", "initial_params", "inputs", "labels"}
    found, expected = hypergradient(run, queries_of(setup), names, method=Forward()), exact(setup, rule)
    for name in names:
        per_step = expected[name]
        assert distance(found[name], per_step if isinstance(per_step, dict) else per_step.sum(1)) < EXACT, name
    assert found.notes["exact"] is True
    torch.testing.assert_close(found.outcome, run.measurements(SETUPS[setup].case.queries), rtol=1e-12, atol=1e-14)


@given(st.sampled_from(PAIRS), st.sampled_from([1, 3, 6]), st.integers(0, 10_000))
def test_derivatives_by_inputs_are_adjoint(pair: tuple[str, str], step: int, seed: int):
    """⟨λ, A δ + B v⟩ = ⟨Aᵀ λ, δ⟩ + ⟨Bᵀ λ, v⟩, with v over all that a step takes."""
    run = run_of(*pair)
    state, inputs, map_ = run.state(step), run.inputs(step), run.update_map
    wrt = frozenset(map_.inputs_of(inputs))
    tangents, costates = vectors(state, 2, seed), vectors(state, 2, seed + 1)
    moves = normal(2, len(inputs.example_ids), seed=seed + 2)
    for route in ("batched", "loop"):
        pulled = map_.pullback(state, inputs, costates, route, wrt=wrt)

        def random(own: dict) -> dict:
            return {name: normal(*leaf.shape, seed=seed + 3 + row) for row, (name, leaf) in enumerate(own.items())}

        own = InputVectors(random(pulled.inputs.hyper), random(pulled.inputs.meta), random(pulled.inputs.batch))
        assert {*own.hyper, *own.batch} | ({"meta"} if own.meta else set()) == wrt
        pushed = map_.pushforward(state, inputs, tangents, moves, own)
        terms = [costates.inner(pushed), -pulled.costates.inner(tangents), -(pulled.scores * moves).sum(1)]
        for left, right in ((pulled.inputs.hyper, own.hyper), (pulled.inputs.leaves(), own.leaves())):
            terms += [-(left[name] * right[name]).reshape(2, -1).sum(1) for name in left]
        total = torch.stack(terms)
        assert (total.sum(0).abs() < TOLERANCES["adjointness"] * total.abs().sum(0)).all()


# ---------------------------------------------------------------------------------------------------------------------
# What must not matter


@pytest.mark.parametrize(("setup", "rule"), [("everything", "adamw"), ("clipped", "momentum")])
def test_results_do_not_depend_on_the_checkpoint_schedule(setup: str, rule: str):
    names = {"example_weights", "learning_rate", "inputs", "initial_params", "clip_norm"}
    found = []
    for schedule in (All(), Sqrt(), Treeverse(states=2)):
        run = SETUPS[setup].record(RULES[rule], schedule)
        found.append(hypergradient(run, queries_of(setup), names, method=Unrolled(route="batched")))
    for other in found[1:]:
        assert torch.equal(other.vector(*sorted(names)), found[0].vector(*sorted(names)))


@pytest.mark.parametrize(("setup", "rule"), [("everything", "nesterov"), ("coupled", "adam")])
def test_routes_and_slices_of_queries_agree(setup: str, rule: str):
    run, whole = run_of(setup, rule), exact(setup, rule)
    names = names_of(run)
    loop = hypergradient(run, queries_of(setup), names, method=Unrolled(route="loop"), per_step=True)
    auto = hypergradient(run, queries_of(setup), names, per_step=True)
    inputs, targets = SETUPS[setup].case.queries
    for name in names:
        assert distance(loop[name], whole[name]) < EXACT
        assert distance(auto[name], whole[name]) < EXACT
    one = hypergradient(run, Queries((inputs[2:3], targets[2:3])), names, per_step=True)
    assert torch.allclose(one.vector(*sorted(names)), whole.vector(*sorted(names))[2:3], rtol=1e-10, atol=1e-13)
    mean = hypergradient(run, (inputs, targets), names, per_step=True)
    assert torch.allclose(
        mean.vector(*sorted(names)), whole.vector(*sorted(names)).mean(0, keepdim=True), rtol=1e-9, atol=1e-13
    )
    assert torch.allclose(mean.outcome, whole.outcome.mean()[None])


@pytest.mark.parametrize("name", ["batchnorm", "dropout"])
def test_a_function_of_the_model_is_an_outcome(name: str):
    run, whole = run_of(name, "adam"), None
    inputs, targets = SETUPS[name].case.queries

    def margins(model: nn.Module) -> Tensor:
        return SETUPS[name].case.task.measurements(model, (inputs, targets))

    names = ("example_weights", "learning_rate", "initial_params")
    whole = hypergradient(run, Queries((inputs, targets)), names)
    for given_ in (margins, Outcome(margins)):
        assert torch.allclose(hypergradient(run, given_, names).vector(*names), whole.vector(*names), rtol=1e-10, atol=1e-13)
    scalar = hypergradient(run, lambda model: margins(model).sum(), names)
    assert torch.allclose(scalar.vector(*names), whole.vector(*names).sum(0, keepdim=True), rtol=1e-9, atol=1e-13)
    assert scalar.outcome.shape == (1,)


def test_hyperparameters_of_all_steps_are_the_sum_over_steps():
    run, apart = run_of("groups", "adamw"), exact("groups", "adamw")
    names = ("learning_rate", "weight_decay", "beta1", "beta2", "epsilon")
    together = hypergradient(run, queries_of("groups"), names)
    for name in names:
        assert apart[name].shape == (4, 8, 2)
        assert distance(together[name], apart[name].sum(1)) < EXACT
    assert not torch.allclose(together["learning_rate"][:, 0], together["learning_rate"][:, 1])


def test_rows_follow_the_data_whatever_the_ids_and_repetitions():
    """An example that is in a batch twice, ids that are no row numbers, and one that is in no batch."""
    data = (normal(4, 3, seed=1), normal(4, 1, seed=2))
    ids = [70, 10, 40, 20]

    def trained(examples: Any, order: list) -> Trajectory:
        model = nn.Linear(3, 1).double()
        model.load_state_dict({"weight": normal(1, 3, seed=3), "bias": normal(1, seed=4)})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        return record(model, examples, Regression(), optimizer=optimizer, order=[torch.tensor(own) for own in order])

    def asked(model: Any) -> Tensor:
        return model.weight.square().sum()

    names = ("example_weights", "inputs", "labels")
    rows = trained(data, [[0, 0, 1], [1, 2, 2]])
    named = trained(Examples(data, ids=ids), [[70, 70, 10], [10, 40, 40]])
    found = hypergradient(rows, asked, names)
    for name in names:
        assert torch.equal(hypergradient(named, asked, names)[name], found[name])
        assert not found[name][0, 3].any()
    moves, h = normal(4, seed=5), 1e-5
    ends = [asked(_bound(rows.rerun(weights=1 + sign * h * moves))) for sign in (1, -1)]
    quotient = (ends[0] - ends[1]) / (2 * h)
    assert quotient.item() == pytest.approx(found.along({"example_weights": moves}).item(), rel=1e-7)


def _bound(run: Trajectory) -> nn.Module:
    model = nn.Linear(3, 1).double()
    model.load_state_dict(run.final_state.params)
    return model.requires_grad_(False)


class _Keyed:
    """Batches are dicts; a mask of integers goes beside the numbers."""

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return batch["importance"] * (model(batch["pixels"])[:, 0] - batch["kind"]).square()

    def measurements(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch["pixels"])[:, 0]


class _Alone:
    """Batches are one tensor."""

    def losses(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)[:, 0].cosh()

    measurements = losses


def test_batches_that_are_dicts_or_single_tensors():
    pixels, kind, importance = normal(5, 3, seed=1), torch.tensor([0, 1, 2, 1, 0]), 0.5 + normal(5, seed=2).abs()
    keyed = {"pixels": pixels, "kind": kind, "importance": importance}
    for task, data, name in (
        (_Keyed(), keyed, "pixels"),
        (_Keyed(), keyed, "importance"),
        (_Alone(), pixels, "inputs"),
    ):
        model = nn.Linear(3, 1).double()
        model.load_state_dict({"weight": normal(1, 3, seed=3), "bias": normal(1, seed=4)})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        run = record(model, data, task, optimizer=optimizer, epochs=2, batch_size=2)
        before = data if isinstance(data, Tensor) else data[name]
        moves, h, ends = normal(*before.shape, seed=6), 1e-5, []
        found = hypergradient(run, lambda model: model(pixels[:1])[0], name)
        for sign in (1, -1):
            after = before + sign * h * moves
            again = run.rerun(examples=Examples(after if isinstance(data, Tensor) else {**data, name: after}))
            ends.append(_bound(again)(pixels[:1])[0])
        assert ((ends[0] - ends[1]) / (2 * h)).item() == pytest.approx(found.along({name: moves}).item(), rel=1e-7)
    run = record(nn.Linear(3, 1).double(), keyed, _Keyed(), optimizer=_sgd, epochs=1, batch_size=2)
    with pytest.raises(InputError, match="kind of this run are integers"):
        hypergradient(run, lambda model: model.weight.sum(), "kind")


def _sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


class _Scaled(nn.Module):
    """A parameter without axes, and one that is not trained although it could be."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(normal(3, 1, seed=1))
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.left_out = nn.Parameter(torch.tensor([1.3], dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(inputs @ self.weight) * self.scale * self.left_out


@pytest.mark.parametrize("left_out", ["frozen", "trainable"])
@pytest.mark.parametrize("route", ["batched", "loop"])
def test_parameters_without_axes_and_parameters_that_are_not_trained(route: Any, left_out: str):
    model, data = _Scaled(), (normal(6, 3, seed=2), normal(6, 1, seed=3))
    model.left_out.requires_grad_(left_out == "trainable")
    optimizer = torch.optim.SGD([model.scale, model.weight], lr=0.2, momentum=0.4)
    run = record(model, data, Regression("prediction"), optimizer=optimizer, epochs=2, batch_size=3, clip_norm=0.5)
    queries = (normal(2, 3, seed=4), normal(2, 1, seed=5))
    names = run.update_map.inputs_of(run.inputs(0)) - {"inputs", "labels"}
    found = hypergradient(run, Queries(queries), {*names, "initial_params"}, method=Unrolled(route=route))
    assert found["initial_params"].keys() == {"weight", "scale"}
    forward = hypergradient(run, Queries(queries), names, method=Forward())
    for name in names:
        assert distance(forward[name], found[name]) < EXACT, name
    for name, now in (("momentum", 0.4), ("learning_rate", 0.2)):
        ends = [run.rerun(hyper={name: torch.tensor([now + h], dtype=torch.float64)}) for h in (1e-5, -1e-5)]
        quotient = (ends[0].measurements(queries) - ends[1].measurements(queries)) / 2e-5
        assert distance(quotient, found[name][:, 0]) < DIFFERENCES
    state, ends = run.state(0), []
    for h in (1e-5, -1e-5):
        moved = {**state.params, "scale": state.params["scale"] + h}
        ends.append(run.rerun(initial=type(state)(moved, state.slots, state.buffers, 0)).measurements(queries))
    assert distance((ends[0] - ends[1]) / 2e-5, found["initial_params"]["scale"]) < DIFFERENCES


# ---------------------------------------------------------------------------------------------------------------------
# Truncation


@pytest.mark.parametrize(("setup", "rule"), [("everything", "nesterov"), ("meta", "adamw")])
@pytest.mark.parametrize("last", [1, 5])
def test_last_equals_autograd_with_the_first_steps_detached(setup: str, rule: str, last: int):
    run = run_of(setup, rule)
    names = names_of(run) - {"initial_params"}
    expected, _ = reference.hypergradients(SETUPS[setup], RULES[rule], run, last)
    with pytest.warns(UntrustedGradient, match=f"only the last {last} of 8 steps"):
        found = hypergradient(run, queries_of(setup), names, method=Unrolled(last=last, route="batched"), per_step=True)
    if "clip_norm" in expected:
        expected["clip_norm"] = expected["clip_norm"][..., None]
    for name in names:
        assert distance(found[name], expected[name]) < EXACT, name
    assert not found["learning_rate"][:, : 8 - last].any()
    assert found.notes["exact"] is False
    assert (found.notes["steps"], found.notes["of_steps"]) == (last, 8)


def test_last_of_all_steps_is_not_truncated():
    run, whole = run_of("clipped", "momentum"), exact("clipped", "momentum")
    for last in (8, 50):
        found = hypergradient(run, queries_of("clipped"), ("example_weights", "initial_params"), method=Unrolled(last=last))
        assert found.doubts == ()
        assert found.notes["exact"] is True
        assert distance(found["initial_params"], whole["initial_params"]) < EXACT


@pytest.mark.parametrize(("setup", "rule"), [("dropout", "adamw"), ("meta", "momentum"), ("coupled", "adam")])
def test_first_order_passes_equal_truncated_unrolling(setup: str, rule: str):
    """With dropout only if both sides of the difference draw the same masks."""
    run = run_of(setup, rule)
    names = names_of(run) - {"initial_params"}
    for last in (1, 3):
        with pytest.warns(UntrustedGradient):
            expected = hypergradient(run, queries_of(setup), names, method=Unrolled(last=last), per_step=True)
        with pytest.warns(UntrustedGradient, match="only the last"):
            found = hypergradient(run, queries_of(setup), names, method=FirstOrder(last=last), per_step=True)
        for name in names:
            assert distance(found[name], expected[name]) < 1e-6, name
        assert found.notes["exact"] is False
        assert found.cosine(expected).min() > 1 - 1e-9
