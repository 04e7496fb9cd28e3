"""Hypergradients through several stages of training: against one autograd graph through all, and training all of them again."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retrograd import Chain, FixedPoint, Forward, Outcome, Queries, Trajectory, Unrolled, chain, hypergradient
from retrograd.errors import InputError, UntrustedGradient
from retrograd.trajectory import TrainingState
from tests.cases import RULES, WEIGHTS, Case, Rule, linear, normal, tabular
from tests.reference import hypergradient_autograd as reference
from tests.setups import Commentary, Commented, Setup, commented, normalised
from tests.test_hypergradients import distance
from tests.tolerances import TOLERANCES

EXACT, DIFFERENCES = TOLERANCES["exact_vs_autograd"], TOLERANCES["exact_vs_differences"]


def _network(share: float, head: int) -> Any:
    """An encoder, 0 to 2, with statistics that move by ``share`` at each step; the head has a name of its own."""

    def build() -> nn.Module:
        layers = [("0", nn.Linear(3, 4)), ("1", nn.Tanh()), ("2", nn.BatchNorm1d(4, momentum=share))]
        model = nn.Sequential()
        for name, layer in [*layers, (f"{head}", nn.Linear(4, 3))]:
            model.add_module(name, layer)
        return model

    return build


def _formula(share: float, head: int) -> Any:
    def formula(params, buffers, inputs, draw):
        hidden = torch.tanh(linear(params, "0", inputs))
        hidden, buffers = normalised(hidden, params, buffers, "2", draw is not None, share)
        return linear(params, f"{head}", hidden), buffers

    return formula


ENCODER = ("0.weight", "0.bias", "2.weight", "2.bias")
STATISTICS = ("2.running_mean", "2.running_var")
FIRST = Setup(
    Case(_network(0.3, 3), _formula(0.3, 3), weights=WEIGHTS, clip_norm=0.9),
    commented,
    Commented(),
    Commentary,
    soft_labels=True,
    epochs=1,
)
SECOND = Setup(Case(_network(0.3, 4), _formula(0.3, 4), lambda count, seed: tabular(count, seed + 50), seed=1), epochs=1)
KEPT = replace(SECOND, case=replace(SECOND.case, build=_network(0.0, 4), formula=_formula(0.0, 4)))  # statistics stay
THIRD = Setup(
    Case(_network(0.3, 5), _formula(0.3, 5), lambda count, seed: tabular(count, seed + 70), seed=2), epochs=1, batch=7
)
MOMENTUM, ADAM, SGD = RULES["nesterov"], RULES["adam"], RULES["sgd decay"]
Stage = tuple[Setup, Rule]


def tensors(state: TrainingState) -> dict[str, Tensor]:
    return {**state.params, **state.buffers}


def encoder(run: Trajectory) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in tensors(run.final_state).items() if name in ENCODER + STATISTICS}


def recorded(*stages: Stage, still: tuple[str, ...] = (), **options: Any) -> Chain:
    """Each stage takes the encoder of the one before; what is ``still`` is not trained in the last."""
    runs: list[Trajectory] = []
    for number, (setup, rule) in enumerate(stages):
        start = encoder(runs[-1]) if runs else None
        runs.append(setup.record(rule, start=start, still=still if number + 1 == len(stages) else ()))
    return chain(*runs, **options)


def one_graph(stages: tuple[Stage, ...], joined: Chain, handovers: Any = None) -> list[Any]:
    """Derivatives by the inputs of every stage, by autograd through all of them together."""
    leaves = [reference.leaves_of(setup, run) for (setup, _), run in zip(stages, joined.stages, strict=True)]
    state: dict[str, Tensor] = {}
    for number, ((setup, rule), run) in enumerate(zip(stages, joined.stages, strict=True)):
        own = dict(leaves[number])
        if number:
            before = {name.split("/", 1)[1]: leaf for name, leaf in state.items() if not name.startswith("slots/")}
            if handovers is None:
                given = {name: before[name] for name in ENCODER + STATISTICS}
            else:
                given = handovers[number - 1](before)
            for kind in ("initial_params", "initial_buffers"):
                # What is handed over, beside a leaf of its own: the derivative by where the stage began.
                own[kind] = {
                    name: given[name] + leaf - leaf.detach() if name in given else leaf for name, leaf in own[kind].items()
                }
        state, _ = reference.train(setup, rule, run, own)
    asked = reference.ask(stages[-1][0], state, *stages[-1][0].case.queries)
    return [reference.gradients(asked, own) for own in leaves]


def compare(joined: Chain, stages: tuple[Stage, ...], expected: list[Any], **options: Any) -> None:
    names = {"example_weights", "learning_rate", "weight_decay", "inputs", "initial_params", "meta", "clip_norm", "beta2"}
    known = set().union(*(run.update_map.inputs_of(run.inputs(0)) for run in joined.stages))
    names &= known | {"example_weights", "initial_params"}
    found = hypergradient(joined, Queries(stages[-1][0].case.queries), names, per_step=True, **options)
    assert len(found) == len(stages)
    for number, (own, run) in enumerate(zip(found, joined.stages, strict=True)):
        here = names & (run.update_map.inputs_of(run.inputs(0)) | {"example_weights", "initial_params"})
        assert own.values.keys() == here
        for name in here:
            wanted = expected[number][name][..., None] if name == "clip_norm" else expected[number][name]
            if isinstance(wanted, dict):
                wanted = {key: wanted[key] for key in own[name]}
            assert distance(own[name], wanted) < EXACT, (number, name)
        torch.testing.assert_close(
            own.outcome, joined.stages[-1].measurements(stages[-1][0].case.queries), rtol=1e-9, atol=1e-12
        )


# ---------------------------------------------------------------------------------------------------------------------
# The truth


TWO: tuple[Stage, ...] = ((FIRST, MOMENTUM), (SECOND, ADAM))
THREE: tuple[Stage, ...] = ((FIRST, ADAM), (SECOND, MOMENTUM), (THIRD, SGD))
LAST_KEEPS: tuple[Stage, ...] = ((FIRST, MOMENTUM), (KEPT, ADAM))


@pytest.mark.parametrize("stages", [TWO, THREE, LAST_KEEPS], ids=["two", "three", "kept statistics"])
def test_stages_equal_one_graph_through_all_of_them(stages: tuple[Stage, ...]):
    joined = recorded(*stages)
    assert joined.taken(1).keys() == {*ENCODER, *STATISTICS}
    if stages is LAST_KEEPS:
        last = joined.stages[1]
        assert all(torch.equal(last.final_state.buffers[name], last.state(0).buffers[name]) for name in STATISTICS)
    expected = one_graph(stages, joined)
    assert all(own["example_weights"].any() for own in expected)
    compare(joined, stages, expected)
    if stages is TWO:
        compare(joined, stages, expected, method=[Unrolled(route="batched"), Unrolled(route="loop")])


def test_an_encoder_that_the_second_stage_does_not_train():
    """It is in the state with a learning rate of 0; of parameters that are no part of the state nothing would be known."""
    joined = recorded(*TWO, still=ENCODER)
    last = joined.stages[1]
    assert all(torch.equal(last.final_state.params[name], last.state(0).params[name]) for name in ENCODER)
    compare(joined, TWO, one_graph(TWO, joined))


def test_frozen_parameters_of_a_later_stage_are_refused():
    first = FIRST.record(MOMENTUM)
    frozen = replace(SECOND, case=replace(SECOND.case, frozen=("0.weight",)))
    second = frozen.record(ADAM, start=encoder(first))
    with pytest.raises(InputError, match=r"does not train \['0.weight'\].*learning rate of 0"):
        chain(first, second)


def _by_name(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in ENCODER + STATISTICS}


def _mixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Shrink the encoder, and make a head of the old one's."""
    return {
        "0.weight": 0.8 * tensors["0.weight"],
        "2.running_mean": tensors["2.running_mean"] + tensors["0.bias"],
        "4.weight": tensors["3.weight"].tanh() * tensors["2.weight"],
    }


def test_hand_overs_by_mapping_and_by_function():
    first, (setup, rule) = FIRST.record(MOMENTUM), TWO[1]
    names = {name: name for name in ENCODER + STATISTICS}
    second = setup.record(rule, start=encoder(first))
    by_mapping = chain(first, second, copy=[names])
    expected = one_graph(TWO, by_mapping)
    compare(by_mapping, TWO, expected)
    compare(chain(first, second, copy=[_by_name]), TWO, expected)

    some = {"0.weight": "0.weight", "2.running_var": "2.running_var"}
    compare(chain(first, second, copy=[some]), TWO, one_graph(TWO, by_mapping, [lambda t: {name: t[name] for name in some}]))

    mixed = setup.record(rule, start=_mixed(tensors(first.final_state)))
    joined = chain(first, mixed, copy=[_mixed])
    compare(joined, TWO, one_graph(TWO, joined, [_mixed]))


def test_statistics_under_another_name_that_the_last_stage_keeps():
    """What the first stage moved, the outcome of the second depends on, whatever it is called there."""

    def renamed() -> nn.Module:
        model = nn.Sequential()
        for name, layer in (
            ("a", nn.Linear(3, 4)),
            ("b", nn.Tanh()),
            ("c", nn.BatchNorm1d(4, momentum=0.0)),
            ("d", nn.Linear(4, 3)),
        ):
            model.add_module(name, layer)
        return model

    def formula(params, buffers, inputs, draw):
        hidden, buffers = normalised(torch.tanh(linear(params, "a", inputs)), params, buffers, "c", draw is not None, 0.0)
        return linear(params, "d", hidden), buffers

    setup = replace(SECOND, case=replace(SECOND.case, build=renamed, formula=formula))
    names = {"c.running_mean": "2.running_mean", "c.running_var": "2.running_var", "a.weight": "0.weight"}
    first = FIRST.record(MOMENTUM)
    second = setup.record(ADAM, start={to: tensors(first.final_state)[source] for to, source in names.items()})
    stages: tuple[Stage, ...] = ((FIRST, MOMENTUM), (setup, ADAM))
    joined = chain(first, second, copy=[names])
    compare(joined, stages, one_graph(stages, joined, [lambda t: {to: t[source] for to, source in names.items()}]))


@pytest.mark.parametrize("stages", [TWO, THREE], ids=["two", "three"])
def test_stages_equal_differences_of_training_all_of_them_again(stages: tuple[Stage, ...]):
    joined = recorded(*stages)
    queries = stages[-1][0].case.queries
    found = hypergradient(joined, Queries(queries), ("example_weights", "learning_rate", "meta", "initial_params"))
    unchanged: list[dict] = [{} for _ in stages]
    state = joined.stages[0].state(0)
    moves = {name: normal(*leaf.shape, seed=7) for name, leaf in state.params.items()}
    weights = normal(14, seed=8)
    meta = {name: normal(*leaf.shape, seed=9) for name, leaf in joined.stages[0].update_map.meta.items()}

    def moved(number: int, name: str, h: float) -> dict:
        run = joined.stages[number]
        if name == "example_weights":
            return {"weights": 1 + h * weights / stages[number][0].case.all_weights}
        if name == "learning_rate":
            return {"hyper": {name: torch.tensor([run.records[0].hyper[0][name] + h], dtype=torch.float64)}}
        if name == "meta":
            return {"meta": {key: leaf + h * meta[key] for key, leaf in run.update_map.meta.items()}}
        params = {key: leaf + h * moves[key] for key, leaf in state.params.items()}
        return {"initial": TrainingState(params, state.slots, state.buffers, 0)}

    asked = [(0, "meta"), (0, "initial_params")]
    asked += [(number, name) for number in range(len(stages)) for name in ("example_weights", "learning_rate")]
    for number, name in asked:
        direction = {
            "example_weights": weights,
            "learning_rate": torch.ones(1, dtype=torch.float64),
            "meta": meta,
            "initial_params": moves,
        }[name]
        along, error = found[number].along({name: direction}), float("inf")
        for h in (1e-4, 1e-5, 1e-3):
            ends = []
            for sign in (1, -1):
                changes = [*unchanged]
                changes[number] = moved(number, name, sign * h)
                ends.append(joined.rerun(*changes).stages[-1].measurements(queries))
            error = min(error, (((ends[0] - ends[1]) / (2 * h) - along).abs().max() / along.abs().max()).item())
            if error < DIFFERENCES:
                break
        assert error < DIFFERENCES, (number, name)


def test_training_again_with_nothing_changed_gives_the_same_bits():
    joined = recorded(*THREE)
    again = joined.rerun({}, {}, {})
    assert again.final_state.equals(joined.final_state)
    assert len(again) == 3
    same = hypergradient(again, Queries(THIRD.case.queries), "example_weights", method=Unrolled(route="batched"))
    before = hypergradient(joined, Queries(THIRD.case.queries), "example_weights", method=Unrolled(route="batched"))
    assert all(torch.equal(one["example_weights"], other["example_weights"]) for one, other in zip(same, before, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Methods


def test_a_first_stage_at_a_fixed_point():
    """Implicit through pre-training and unrolled through fine-tuning, where pre-training has converged."""
    plain = Case(lambda: nn.Sequential(nn.Linear(3, 3)), lambda p, b, x, draw: (linear(p, "0", x), b), weights=WEIGHTS)
    first = Setup(plain, epochs=70, batch=14).record(Rule(torch.optim.SGD, {"lr": 0.7, "momentum": 0.4, "weight_decay": 0.3}))
    again = replace(plain, data=lambda count, seed: tabular(count, seed + 50))
    second = Setup(again, epochs=1).record(RULES["sgd"], start=tensors(first.final_state))
    joined, names = chain(first, second), ("example_weights", "weight_decay")
    exact = hypergradient(joined, Queries(again.queries), names)
    implicit = hypergradient(joined, Queries(again.queries), names, method=[FixedPoint(tolerance=1e-12), Unrolled()])
    for name in names:
        assert distance(implicit[0][name], exact[0][name]) < 1e-6
        assert distance(implicit[1][name], exact[1][name]) < 1e-12
    assert (implicit[0].notes["exact"], implicit[1].notes["exact"]) == (False, True)
    assert "FixedPoint" in implicit[0].method
    assert "Unrolled" in implicit[1].method


def test_a_truncated_last_stage_is_doubted_and_a_function_is_an_outcome():
    joined = recorded(*TWO)

    def asked(model: Any) -> Tensor:
        return model(SECOND.case.queries[0]).square().mean()

    exact = hypergradient(joined, asked, "example_weights")
    assert exact[0]["example_weights"].shape == (1, 14)
    assert torch.equal(
        hypergradient(joined, Outcome(asked), "example_weights")[0]["example_weights"], exact[0]["example_weights"]
    )
    with pytest.warns(UntrustedGradient, match="only the last 2 of 4 steps"):
        found = hypergradient(joined, asked, "example_weights", method=[Unrolled(), Unrolled(last=2)])
    assert found[1].doubts
    assert distance(found[0]["example_weights"], exact[0]["example_weights"]) > 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# What can't be joined or asked


def test_what_cannot_be_joined_is_refused():
    first = FIRST.record(MOMENTUM)
    second = SECOND.record(ADAM, start=encoder(first))
    strange = SECOND.record(ADAM)
    with pytest.raises(InputError, match="at least two runs, got 1"):
        chain(first)
    with pytest.raises(InputError, match="2 runs have 1 hand-overs, and copy has 2 entries"):
        chain(first, second, copy=[None, None])
    unlike = SECOND.record(ADAM, start={name: leaf + 0.1 for name, leaf in tensors(strange.state(0)).items()})
    with pytest.raises(InputError, match="began with none of the parameters"):
        chain(first, unlike)
    for copy, message in (
        ({"0.weight": "7.weight"}, r"no parameter or buffer \['7.weight'\]"),
        ({"7.weight": "0.weight"}, "has no parameter or buffer '7.weight'"),
        ({"4.weight": "3.weight"}, "did not begin with what run 0 hands over as '4.weight'"),
        ({"4.weight": "0.weight"}, "did not begin with what run 0 hands over as '4.weight'"),
    ):
        with pytest.raises(InputError, match=message):
            chain(first, second, copy=[copy])
    with pytest.raises(InputError, match="did not begin with"):
        chain(first, strange, copy=[{"0.weight": "0.weight"}])


@pytest.mark.parametrize(
    ("wrt", "method", "message"),
    [
        ("meta_rate", None, "did not go into|went into no stage"),
        ((), None, "names no input"),
        ("example_weights", [Unrolled()], "2 stages need one method for all of them or one for each, got 1"),
        ("example_weights", FixedPoint(), "no derivative by the state that stage 1 began with"),
        ("learning_rate", Forward(), "Unrolled"),
        ("learning_rate", [Forward(), Unrolled()], "one stage only"),
        ("momentum", [Unrolled(), FixedPoint()], "stage 1 began with"),
    ],
)
def test_what_cannot_be_asked_is_refused(wrt: Any, method: Any, message: str):
    with pytest.raises(InputError, match=message):
        hypergradient(recorded(*TWO), Queries(SECOND.case.queries), wrt, method=method)


def test_inputs_are_those_of_each_stage():
    found = hypergradient(recorded(*TWO), Queries(SECOND.case.queries), ("momentum", "beta1", "clip_norm"))
    assert [set(own.values) for own in found] == [{"momentum", "clip_norm"}, {"beta1"}]
    with pytest.raises(InputError, match="3 stages, and changes for 1"):
        recorded(*THREE).rerun({})
