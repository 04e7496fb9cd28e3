"""One step: its Jacobian products against each other, against differences and against dense Jacobians; many models at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from retrograd import Classification, Trajectory
from retrograd.errors import NonFinite, NoSecondDerivative
from retrograd.trajectory import StateVectors, StepInputs, TrainingState
from tests.cases import CASES, RULES, Case, Rule, normal
from tests.reference import unrolled_autograd as reference
from tests.tolerances import TOLERANCES

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
ROUTES = ("batched", "loop")
any_rule, any_case = st.sampled_from(sorted(RULES)), st.sampled_from(sorted(CASES))
any_seed, any_step = st.integers(min_value=0, max_value=10_000), st.sampled_from([1, 3, 6])

_RUNS: dict[tuple[str, str], Trajectory] = {}


def run_of(case: str, rule: str) -> Trajectory:
    if (case, rule) not in _RUNS:
        _RUNS[case, rule] = CASES[case].record(RULES[rule])
    return _RUNS[case, rule]


def moving(state: TrainingState) -> list[str]:
    return [name for name, leaf in state.buffers.items() if leaf.is_floating_point()]


def vectors(state: TrainingState, count: int, seed: int) -> StateVectors:
    """Random tangents or costates over parameters, slots and moving buffers."""
    draw = torch.Generator().manual_seed(seed)

    def random(leaf: Tensor) -> Tensor:
        return torch.randn(count, *leaf.shape, generator=draw, dtype=leaf.dtype)

    tree = state.map(lambda leaf: random(leaf) if leaf.is_floating_point() else leaf)
    return StateVectors(tree.params, tree.slots, {name: tree.buffers[name] for name in moving(state)})


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """Leaves by sorted names, ``[vector, P]``."""
    return torch.cat([tensors[name].flatten(1) for name in sorted(tensors)], 1)


def difference(one: TrainingState, other: TrainingState) -> float:
    """Largest difference of any tensor's values, relative to the largest of that tensor."""
    pairs = [(leaf.double(), other.tensors()[name].double()) for name, leaf in one.tensors().items()]
    return max(
        ((left - right).abs().max() / right.abs().max().clamp(min=1e-30)).nan_to_num(torch.inf).item() for left, right in pairs
    )


def weights_of(inputs: StepInputs) -> Tensor:
    return torch.ones(len(inputs.example_ids), dtype=torch.float64) if inputs.weights is None else inputs.weights


# ---------------------------------------------------------------------------------------------------------------------
# Jacobian products


@given(any_case, any_rule, any_step, any_seed)
def test_pushforward_and_pullback_are_adjoint(case: str, rule: str, step: int, seed: int):
    run = run_of(case, rule)
    state, inputs, map_ = run.state(step), run.inputs(step), run.update_map
    tangents, costates = vectors(state, 3, seed), vectors(state, 3, seed + 1)
    moves = normal(3, len(inputs.example_ids), seed=seed + 2)
    pushed = map_.pushforward(state, inputs, tangents, moves)
    for route in ROUTES:
        pulled = map_.pullback(state, inputs, costates, route)
        ahead = costates.inner(pushed)
        behind = pulled.costates.inner(tangents) + (pulled.scores * moves).sum(1)
        # Relative to the terms that are summed, not to a sum in which they may cancel.
        size = torch.stack([(costates.leaves()[name] * leaf).abs().flatten(1).sum(1) for name, leaf in pushed.leaves().items()])
        assert ((ahead - behind).abs() / size.sum(0)).max() < TOLERANCES["adjointness"]


@given(any_case, any_rule, any_seed)
def test_both_products_are_linear(case: str, rule: str, seed: int):
    run = run_of(case, rule)
    state, inputs, map_ = run.state(3), run.inputs(3), run.update_map
    pair = vectors(state, 2, seed)
    sum_ = pair.map(lambda leaf: 2.0 * leaf[:1] - 3.0 * leaf[1:])
    moves = normal(2, len(inputs.example_ids), seed=seed)

    pushed = flat(map_.pushforward(state, inputs, pair, moves).leaves())
    both = flat(map_.pushforward(state, inputs, sum_, 2.0 * moves[:1] - 3.0 * moves[1:]).leaves())
    torch.testing.assert_close(both[0], 2.0 * pushed[0] - 3.0 * pushed[1], rtol=1e-10, atol=1e-12 * pushed.abs().max().item())

    pulled, combined = map_.pullback(state, inputs, pair), map_.pullback(state, inputs, sum_)
    rows, row = flat(pulled.costates.leaves()), flat(combined.costates.leaves())[0]
    torch.testing.assert_close(row, 2.0 * rows[0] - 3.0 * rows[1], rtol=1e-10, atol=1e-12 * rows.abs().max().item())
    torch.testing.assert_close(combined.scores[0], 2.0 * pulled.scores[0] - 3.0 * pulled.scores[1], rtol=1e-10, atol=1e-12)


@every_case
@pytest.mark.parametrize("rule", ["dampening", "nesterov", "adamw", "adam decay", "rmsprop centered momentum"])
def test_products_equal_the_dense_jacobians(case: Case, rule: str):
    run = case.record(RULES[rule])
    step = 3
    state, inputs = run.state(step), run.inputs(step)
    plain = reference.initial_state(case, RULES[rule])
    tensors = state.tensors()
    given_state = {name: tensors.get(name, leaf) for name, leaf in plain.items()}  # frozen parameters are no part of ours
    A, B = reference.jacobians(case, RULES[rule], run, step, given_state)
    rows = torch.cat(
        [torch.full((given_state[name].numel(),), name in tensors, dtype=torch.bool) for name in sorted(given_state)]
    )
    A, B = A[rows][:, rows], B[rows]

    costates, tangents = vectors(state, 3, 1), vectors(state, 3, 2)
    moves = normal(3, len(inputs.example_ids), seed=3)
    for route in ROUTES:
        pulled = run.update_map.pullback(state, inputs, costates, route)
        torch.testing.assert_close(flat(pulled.costates.leaves()), flat(costates.leaves()) @ A, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(pulled.scores, flat(costates.leaves()) @ B, rtol=1e-9, atol=1e-11)
    pushed = run.update_map.pushforward(state, inputs, tangents, moves)
    torch.testing.assert_close(flat(pushed.leaves()), flat(tangents.leaves()) @ A.T + moves @ B.T, rtol=1e-9, atol=1e-11)


@every_case
@pytest.mark.parametrize("rule", ["dampening", "adamw", "rmsprop centered momentum"])
def test_pushforward_equals_differences_of_the_map(case: Case, rule: str):
    run = case.record(RULES[rule])
    state, inputs, h = run.state(3), run.inputs(3), 1e-5
    tangents = vectors(state, 1, 4).map(lambda leaf: 0.1 * leaf)
    for name in ("second_moment", "mean_square"):  # keep √v away from 0, where it bends
        if name in tangents.slots:
            tangents.slots[name].update({key: leaf * state.slots[name][key] for key, leaf in tangents.slots[name].items()})
    if "mean_gradient" in tangents.slots:
        tangents.slots["mean_gradient"].update({key: leaf * 0 for key, leaf in tangents.slots["mean_gradient"].items()})
    moves = normal(1, len(inputs.example_ids), seed=5)
    ends = []
    for sign in (1, -1):
        moved = {
            name: leaf + sign * h * tangents.leaves()[name][0] if name in tangents.leaves() else leaf
            for name, leaf in state.tensors().items()
        }
        weights = weights_of(inputs) + sign * h * moves[0]
        own = StepInputs(inputs.example_ids, weights, inputs.hyper, inputs.batch, inputs.seed)
        ends.append(run.update_map(TrainingState.from_tensors(moved, 3), own).tensors())
    pushed = run.update_map.pushforward(state, inputs, tangents, moves).leaves()
    quotients = {name: ((ends[0][name] - ends[1][name]) / (2 * h))[None] for name in pushed}
    error = (flat(quotients) - flat(pushed)).abs().max() / flat(pushed).abs().max()
    assert error < TOLERANCES["exact_vs_differences"]


@pytest.mark.parametrize("rule", ["nesterov", "adam", "rmsprop centered momentum"])
def test_slots_and_buffers_that_are_left_out_count_as_zero(rule: str):
    run = run_of("batchnorm", rule)
    state, inputs, map_ = run.state(3), run.inputs(3), run.update_map
    full = vectors(state, 2, 7)
    zeros = StateVectors(full.params, {s: {n: 0 * x for n, x in own.items()} for s, own in full.slots.items()}, full.buffers)
    short = StateVectors(full.params, {}, full.buffers)
    for product in (lambda v: map_.pullback(state, inputs, v).costates, lambda v: map_.pushforward(state, inputs, v)):
        expected, found = product(zeros).leaves(), product(short).leaves()
        assert found.keys() == expected.keys()
        torch.testing.assert_close(flat(found), flat(expected), rtol=1e-12, atol=1e-14)
    none = StateVectors(full.params, full.slots, {})
    pulled = map_.pullback(state, inputs, none)
    expected = map_.pullback(state, inputs, StateVectors(full.params, full.slots, {n: 0 * x for n, x in full.buffers.items()}))
    torch.testing.assert_close(pulled.scores, expected.scores, rtol=1e-12, atol=1e-14)


@every_rule
def test_pullback_leaves_its_arguments_as_they_were(rule: Rule):
    run = CASES["batchnorm"].record(rule)
    state, inputs = run.state(3), run.inputs(3)
    before, costates = state.clone(), vectors(state, 2, 1)
    copy = costates.map(Tensor.clone)
    run.update_map.pullback(state, inputs, costates)
    run.update_map.pushforward(state, inputs, costates)
    run.update_map(state, inputs)
    assert state.equals(before)
    assert torch.equal(flat(costates.leaves()), flat(copy.leaves()))


def test_costates_are_reversed_in_slices_of_any_size():
    run = run_of("clipped", "nesterov")
    state, inputs = run.state(3), run.inputs(3)
    costates = vectors(state, 150, 1)
    whole = run.update_map.pullback(state, inputs, costates)
    for route, part in (("batched", slice(60, 70)), ("loop", slice(60, 70)), ("batched", slice(149, 150))):
        piece = run.update_map.pullback(state, inputs, costates[part], route)
        torch.testing.assert_close(piece.scores, whole.scores[part], rtol=1e-12, atol=1e-14)
        found, expected = flat(piece.costates.leaves()), flat(whole.costates[part].leaves())
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


# ---------------------------------------------------------------------------------------------------------------------
# Many models at once


@every_case
@pytest.mark.parametrize("rule", ["sgd decay", "nesterov", "adamw", "rmsprop centered momentum"])
def test_many_models_at_once_equal_one_after_the_other(case: Case, rule: str):
    run = case.record(RULES[rule])
    weights = 0.5 + normal(3, 8, 4, seed=1).abs()
    one, many = [run.state(0)] * 3, run.state(0).map(lambda leaf: torch.stack([leaf] * 3))
    for step in range(8):
        inputs = run.inputs(step)
        own = weights[:, step, : len(inputs.example_ids)]
        many = run.update_map.many(many, inputs, own)
        for model in range(3):
            used = StepInputs(inputs.example_ids, own[model], inputs.hyper, inputs.batch, inputs.seed)
            one[model] = run.update_map(one[model], used)
    assert many.step == 8
    for model in range(3):
        assert difference(many.map(lambda leaf, model=model: leaf[model]), one[model]) < 1e-10
    assert difference(one[0], one[1]) > 1e-3  # the three are different models


@pytest.mark.parametrize("name", ["batchnorm", "clipped"])
def test_many_models_with_batches_of_their_own(name: str):
    run = run_of(name, "adam")
    state, inputs = run.state(2), run.inputs(2)
    batches = [run.examples.batch(torch.tensor(ids)) for ids in ([0, 1, 2, 3], [9, 8, 7, 6])]
    weights = 0.5 + normal(2, 4, seed=2).abs()
    stacked = tuple(torch.stack(columns) for columns in zip(*batches, strict=True))
    together = StepInputs(inputs.example_ids, None, inputs.hyper, stacked, inputs.seed)
    many = run.update_map.many(state.map(lambda leaf: torch.stack([leaf, leaf])), together, weights, own_batches=True)
    for model, batch in enumerate(batches):
        alone = run.update_map(state, StepInputs(inputs.example_ids, weights[model], inputs.hyper, batch, inputs.seed))
        assert difference(many.map(lambda leaf, model=model: leaf[model]), alone) < 1e-10


# ---------------------------------------------------------------------------------------------------------------------
# Models that ask for care


def test_modules_in_evaluation_mode_stay_in_it():
    """Frozen batch norm: its statistics are used and not moved, also where the derivative is taken."""

    def record(freeze: bool) -> Trajectory:
        from retrograd import record as record_

        case = CASES["batchnorm"]
        model = case.model()
        model[1].running_mean += 0.3
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.7)
        return (
            record_frozen(record_, model, case, optimizer)
            if freeze
            else record_(model, case.examples, case.task, optimizer=optimizer, epochs=1, batch_size=4)
        )

    run = record(True)
    assert run.update_map.evaluation_modules == ("1",)
    state, inputs = run.state(1), run.inputs(1)
    after = run.update_map(state, inputs)
    assert torch.equal(after.buffers["1.running_mean"], state.buffers["1.running_mean"])
    moved = record(False)
    assert not torch.equal(moved.state(2).buffers["1.running_mean"], moved.state(1).buffers["1.running_mean"])

    tangents, h = vectors(state, 1, 3), 1e-6
    tangents = StateVectors(tangents.params, tangents.slots, {})
    ends = []
    for sign in (1, -1):
        leaves = {
            name: leaf + sign * h * tangents.leaves()[name][0] if name in tangents.leaves() else leaf
            for name, leaf in state.tensors().items()
        }
        ends.append(run.update_map(TrainingState.from_tensors(leaves, 1), inputs).tensors())
    pushed = run.update_map.pushforward(state, inputs, tangents)
    quotients = {name: ((ends[0][name] - ends[1][name]) / (2 * h))[None] for name in pushed.leaves()}
    assert (flat(quotients) - flat(pushed.leaves())).abs().max() / flat(pushed.leaves()).abs().max() < 1e-6

    costates = vectors(state, 1, 4)
    costates = StateVectors(costates.params, costates.slots, {})
    pulled = run.update_map.pullback(state, inputs, costates)
    assert torch.allclose(costates.inner(pushed), pulled.costates.inner(tangents), rtol=1e-12, atol=0)


def record_frozen(record, model: nn.Module, case: Case, optimizer: torch.optim.Optimizer) -> Trajectory:
    """`record` puts the whole model in training mode; a `Recorder` takes modes as they are."""
    from retrograd import Recorder

    model.train()
    model[1].eval()
    recorder = Recorder(model, case.examples, case.task, optimizer)
    for ids in torch.arange(12).view(3, 4):
        with recorder.step(ids):
            optimizer.zero_grad()
            case.task.losses(model, recorder_batch(case, ids)).mean().backward()
            optimizer.step()
    return recorder.finish()


def recorder_batch(case: Case, ids: Tensor) -> tuple[Tensor, Tensor]:
    inputs, targets = case.examples
    return inputs[ids], targets[ids]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs):
        ctx.save_for_backward(inputs)
        return inputs.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, output_bar):
        return output_bar * ctx.saved_tensors[0].cos()


class _OnceModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(_Once.apply(self.first(inputs)))


class _Distances(nn.Module):
    """`torch.cdist` has a first derivative and no second."""

    def __init__(self):
        super().__init__()
        self.first, self.places = nn.Linear(3, 4), nn.Parameter(torch.randn(3, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cdist(self.first(inputs), self.places)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("build", [_OnceModel, _Distances])
def test_a_kernel_without_second_derivative_is_named(build: type, route: str):
    run = Case(build, CASES["plain"].formula).record(RULES["sgd"])
    state, inputs = run.state(3), run.inputs(3)
    with pytest.raises(NoSecondDerivative, match="second derivative"):
        run.update_map.pullback(state, inputs, vectors(state, 2, 1), route)


def test_a_loss_that_is_not_finite_is_refused():
    run = run_of("plain", "sgd")
    state, inputs = run.state(3), run.inputs(3)
    broken = TrainingState({**state.params, "4.bias": state.params["4.bias"] * torch.inf}, state.slots, state.buffers, 3)
    with pytest.raises(NonFinite, match="loss of step 3"):
        run.update_map.pullback(broken, inputs, vectors(state, 2, 1))


class _Unseen(nn.Module):
    """Keeps a running mean of its features where autograd can't see it, and uses it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 3)
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * hidden.mean(0))
        return self.last(hidden - self.mean)


def _instance_norm() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 8), nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten(), nn.Linear(8, 3)
    )


@pytest.mark.parametrize("build", [_Unseen, _instance_norm])
def test_a_buffer_that_moves_out_of_sight_of_autograd_is_not_passed_over_in_silence(build):
    """Either the pullback is right (its scores are those of differences), or it says that it can't be."""
    run = Case(build, CASES["plain"].formula, task=Classification()).record(RULES["sgd"])
    state, inputs, h = run.state(3), run.inputs(3), 1e-6
    costates = vectors(state, 1, 1)
    moves = [torch.eye(4, dtype=torch.float64)[0] * sign * h for sign in (1, -1)]
    start = vectors(state, 1, 2)
    ends = []
    for move in moves:
        leaves = {
            name: leaf + move.sum() * start.leaves()[name][0] if name in start.leaves() else leaf
            for name, leaf in state.tensors().items()
        }
        after = run.update_map(TrainingState.from_tensors(leaves, 3), inputs).tensors()
        ends.append(sum((after[name] * costates.leaves()[name][0]).sum() for name in costates.leaves()))
    expected = ((ends[0] - ends[1]) / (2 * h)).item()
    try:
        pulled = run.update_map.pullback(state, inputs, costates)
    except NoSecondDerivative:
        return
    assert pulled.costates.inner(start).item() == pytest.approx(expected, rel=1e-6)
