"""Scores of exact unrolling against autograd through the whole run and against retraining; TracIn against its own formula."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from retrograd import All, Every, Examples, Queries, Sqrt, TracIn, Treeverse, Unrolled, attribute, record, self_influence
from retrograd.errors import InputError
from retrograd.trajectory import Trajectory
from tests.cases import CASES, EXAMPLES, RULES, Case, Rule, images
from tests.reference import unrolled_autograd as reference
from tests.tolerances import TOLERANCES

ROUTES = ("batched", "loop")
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
some_rules = pytest.mark.parametrize("rule", [RULES["nesterov"], RULES["adamw"]], ids=["nesterov", "adamw"])


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest score; NaN counts as infinitely far."""
    assert found.shape == expected.shape
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    return difference if difference == difference else float("inf")


def unrolled(run: Trajectory, case: Case, route: str = "batched", **options) -> Tensor:
    """Scores by `attribute`, for the queries of the case."""
    shared = {name: options.pop(name) for name in ("query_batch",) if name in options}
    method = Unrolled(route=route, **options)
    return attribute(run, case.queries, method=method, check_roughness=False, **shared).values


def difference_quotients(run: Trajectory, case: Case, rows: list[int], h: float) -> Tensor:
    """Central differences of retraining with one example's weight moved by ± h, ``[query, row]``."""
    quotients = []
    for row in rows:
        ends = []
        for sign in (1, -1):
            factor = torch.ones(EXAMPLES, dtype=torch.float64)
            factor[row] += sign * h / case.all_weights[row]  # rerun takes factors on the recorded weights
            ends.append(run.rerun(weights=factor).measurements(case.queries))
        quotients.append((ends[0] - ends[1]) / (2 * h))
    return torch.stack(quotients, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Exact unrolling


# Every rule with each of what the features of a step can be; other architectures with one rule of each kind.
FEATURES = ("plain", "clipped", "batchnorm", "dropout", "tied")
KINDS = ("dampening", "adam decay", "adamw", "rmsprop centered momentum")
PAIRS = [(rule, case) for case in CASES for rule in (RULES if case in FEATURES else KINDS)]


@pytest.mark.parametrize(("rule", "case"), [(RULES[rule], CASES[case]) for rule, case in PAIRS], ids=map("-".join, PAIRS))
def test_scores_equal_autograd_through_the_run_and_differences_of_retraining(rule: Rule, case: Case):
    run = case.record(rule)
    assert len(run) == 8
    assert {len(entry.example_ids) for entry in run.records} == {4, 2}  # the last batch of an epoch is partial

    expected, state, norms = reference.scores_and_run(case, rule, run)
    final = run.final_state.tensors()
    for name, leaf in state.items():
        if name.removeprefix("params/") not in case.frozen:
            torch.testing.assert_close(final[name], leaf, rtol=1e-9, atol=1e-12)
    if case.clip_norm is not None:  # clipping is at work in some steps, and not in all
        assert min(norms) < case.clip_norm < max(norms)

    scores = unrolled(run, case)
    assert distance(scores, expected) < TOLERANCES["exact_vs_autograd"]
    if rule in [RULES[kind] for kind in KINDS]:
        assert distance(unrolled(run, case, "loop"), expected) < TOLERANCES["exact_vs_autograd"]

    rows, error = [0, 6], float("inf")
    for h in (1e-4, 1e-5, 1e-3):  # the first one is nearly always the best
        quotients = difference_quotients(run, case, rows, h)
        error = min(error, ((quotients - scores[:, rows]).abs().max() / scores.abs().max()).item())
        if error < TOLERANCES["exact_vs_differences"]:
            break
    assert error < TOLERANCES["exact_vs_differences"]


@pytest.mark.parametrize("last", [1, 5, 50])
@pytest.mark.parametrize("name", ["clipped", "batchnorm"])
@some_rules
def test_last_equals_autograd_with_the_first_steps_detached(rule: Rule, name: str, last: int):
    case = CASES[name]
    run = case.record(rule)
    expected = reference.scores(case, rule, run, last=min(last, len(run)))
    assert distance(unrolled(run, case, last=last), expected) < TOLERANCES["exact_vs_autograd"]


def test_truncation_changes_the_scores():
    run = CASES["plain"].record(RULES["momentum"])
    assert distance(unrolled(run, CASES["plain"], last=4), unrolled(run, CASES["plain"])) > 0.01


@pytest.mark.parametrize(("name", "rule"), [("clipped", RULES["adamw"]), ("batchnorm", RULES["nesterov"])])
def test_scores_do_not_depend_on_the_checkpoint_schedule(name: str, rule: Rule):
    case = CASES[name]
    run = case.record(rule, All())
    expected, truncated = unrolled(run, case), unrolled(run, case, last=5)
    for schedule in (Every(3), Every(100), Sqrt(), Treeverse(states=1), Treeverse(states=3), Treeverse(memory=1)):
        run = case.record(rule, schedule)
        assert run.schedule == schedule
        assert torch.equal(unrolled(run, case), expected)
    assert torch.equal(unrolled(run, case, last=5), truncated)


@pytest.mark.parametrize("query_batch", [1, 3, 9])
def test_scores_do_not_depend_on_the_query_slicing(query_batch: int):
    case = CASES["batchnorm"]
    run = case.record(RULES["adam"])
    for route in ROUTES:
        assert distance(unrolled(run, case, route, query_batch=query_batch), unrolled(run, case)) < 1e-12


@pytest.mark.parametrize("name", ["groups", "batchnorm"])
@some_rules
def test_scores_do_not_depend_on_the_order_of_parameters_and_groups(rule: Rule, name: str):
    case = CASES[name]
    runs = [case.record(rule, reverse_parameters=turned) for turned in (False, True)]
    assert runs[0].update_map.groups != runs[1].update_map.groups
    assert distance(unrolled(runs[1], case), unrolled(runs[0], case)) < 1e-12


def test_the_automatic_route_is_one_of_the_two_and_noted():
    case = CASES["plain"]
    run = case.record(RULES["sgd"])
    scores = attribute(run, case.queries, method=Unrolled(), check_roughness=False)
    assert scores.notes["route"] in ROUTES
    assert scores.notes["exact"] is True
    assert distance(scores.values, unrolled(run, case)) < TOLERANCES["exact_vs_autograd"]


def test_scores_carry_the_ids_of_examples_and_queries():
    case = CASES["clipped"]
    run = case.record(RULES["sgd"])
    scores = attribute(run, Examples(case.queries, ids=[9, 7, 5, 3]), check_roughness=False)
    assert scores.query_ids.tolist() == [9, 7, 5, 3]
    assert torch.equal(scores.example_ids, run.examples.ids)
    assert distance(scores.values, unrolled(run, case)) < TOLERANCES["exact_vs_autograd"]


def test_adding_to_all_weights_together_is_the_sum_of_the_scores():
    case = CASES["clipped"]
    run, h = case.record(RULES["momentum"]), 1e-5
    ends = [run.rerun(weights=1 + sign * h / case.all_weights).measurements(case.queries) for sign in (1, -1)]
    quotient = (ends[0] - ends[1]) / (2 * h)
    assert distance(unrolled(run, case).sum(1), quotient) < TOLERANCES["exact_vs_differences"]


# ---------------------------------------------------------------------------------------------------------------------
# Query compression


def gradient_energies(run: Trajectory, case: Case, queries: tuple) -> Tensor:
    """Squared singular values of the queries' gradients by parameters, dense and one by one; largest first."""
    state = {name: leaf.clone().requires_grad_() for name, leaf in run.final_state.tensors().items()}
    names = [name for name in state if name.startswith("params/")]
    values = reference.ask(case, state, *queries)
    rows = [torch.autograd.grad(value, [state[name] for name in names], retain_graph=True) for value in values]
    return torch.linalg.svdvals(torch.stack([torch.cat([leaf.flatten() for leaf in row]) for row in rows])).square()


def test_compression_at_full_rank_is_exact():
    case = CASES["clipped"]
    run = case.record(RULES["adam"])
    inputs, targets = case.queries
    # Twice the same queries: eight gradients of rank four.
    doubled = (torch.cat([inputs, inputs]), torch.cat([targets, targets]))
    full = attribute(run, doubled, check_roughness=False)
    for rank in (4, 5, 7):
        scores = attribute(run, doubled, method=Unrolled(rank=rank), check_roughness=False)
        assert distance(scores.values, full.values) < TOLERANCES["exact_vs_autograd"]
        assert abs(scores.notes["energy_lost"]) < 1e-12
    assert distance(full.values[:4], reference.scores(case, RULES["adam"], run)) < TOLERANCES["exact_vs_autograd"]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_compression_reports_the_energy_that_it_lost(rank: int):
    case = CASES["clipped"]
    run = case.record(RULES["nesterov"])
    energies = gradient_energies(run, case, case.queries)
    scores = attribute(run, case.queries, method=Unrolled(rank=rank), check_roughness=False)
    assert scores.notes["energy_lost"] == pytest.approx(1 - (energies[:rank].sum() / energies.sum()).item(), abs=1e-12)
    assert scores.notes["rank"] == rank
    assert scores.notes["exact"] is False
    # What is kept are the strongest directions: the scores of U Uᵀ G, with U from the dense decomposition.
    exact = unrolled(run, case)
    left = torch.linalg.svd(gradient_matrix(run, case), full_matrices=False).U[:, :rank]
    assert distance(scores.values, left @ left.T @ exact) < TOLERANCES["exact_vs_autograd"]


def gradient_matrix(run: Trajectory, case: Case) -> Tensor:
    gradients = Queries(case.queries).gradients(run, run.final_state)
    return torch.cat([leaf.flatten(1) for leaf in gradients.params.values()], 1)


# ---------------------------------------------------------------------------------------------------------------------
# Self-influence


@pytest.mark.parametrize("name", ["clipped", "batchnorm", "dropout"])
@some_rules
def test_self_influence_is_the_diagonal_for_the_losses(rule: Rule, name: str):
    case = CASES[name]
    run = case.record(rule)
    whole = attribute(run, Queries(case.examples, of="losses"), check_roughness=False).values
    expected = reference.scores(case, rule, run, data=case.examples, of="losses")
    assert distance(whole, expected) < TOLERANCES["exact_vs_autograd"]
    assert distance(self_influence(run), expected.diagonal()) < TOLERANCES["exact_vs_autograd"]
    some = self_influence(run, example_ids=[5, 1, 9], query_batch=2)
    assert distance(some, expected.diagonal()[[5, 1, 9]]) < TOLERANCES["exact_vs_autograd"]


# ---------------------------------------------------------------------------------------------------------------------
# TracIn


def dense_tracin(run: Trajectory, case: Case, rule: Rule, steps: list[int], cosine: bool = False) -> Tensor:
    """The formula of adjoint/tracin.py, one query, checkpoint, step and example at a time."""
    names = [name for name in run.state(0).params]
    total = torch.zeros(len(case.queries[0]), EXAMPLES, dtype=torch.float64)
    groups = {name: options for own, options in case.groups(rule) for name in own}
    first_rate = case.groups(rule)[0][1]["lr"]
    for step in steps:
        state = {
            name: leaf.clone().requires_grad_() for name, leaf in run.state(step).tensors().items() if leaf.is_floating_point()
        }

        def gradient(value, state=state):
            found = torch.autograd.grad(value, [state[f"params/{name}"] for name in names], retain_graph=True)
            return dict(zip(names, found, strict=True))

        asked = [gradient(value) for value in reference.ask(case, state, *case.queries)]
        trained = [gradient(value) for value in reference.ask(case, state, *case.examples, of="losses")]
        slots = reference.part({name: leaf.detach() for name, leaf in run.state(max(step, 1)).tensors().items()}, "slots/")
        scale = {name: step_size(rule, slots, name, groups[name], max(step, 1)) / first_rate for name in names}
        for query, f in enumerate(asked):
            for example, loss in enumerate(trained):
                product = sum((f[name] * loss[name] * (1.0 if cosine else scale[name])).sum() for name in names)
                if cosine:
                    norms = [sum((leaf**2).sum() for leaf in vector.values()) ** 0.5 for vector in (f, loss)]
                    total[query, example] -= product / (norms[0] * norms[1])
                    continue
                for number, entry in enumerate(run.records):
                    nearest = min(steps, key=lambda other: (abs(number - other), -other))  # of two as near, the later one
                    if nearest == step and example in entry.example_ids:
                        total[query, example] -= first_rate * product / len(entry.example_ids)
    return total


def step_size(rule: Rule, slots: dict, name: str, options: dict, taken: int) -> Tensor | float:
    """How far one unit of gradient moves the parameter in the long run, the preconditioner frozen."""
    mu = options.get("momentum", 0.0)
    if rule.optimizer is torch.optim.SGD:
        damped = 1 - options.get("dampening", 0.0)
        return options["lr"] * (1 + mu * damped / (1 - mu) if options.get("nesterov") else damped / (1 - mu) if mu else 1.0)
    if rule.optimizer is torch.optim.RMSprop:
        variance = slots[f"mean_square/{name}"]
        if options.get("centered"):
            variance = variance - slots[f"mean_gradient/{name}"] ** 2
        return options["lr"] / (1 - mu) / (variance.sqrt() + options["eps"])
    return options["lr"] / ((slots[f"second_moment/{name}"] / (1 - options["betas"][1] ** taken)).sqrt() + options["eps"])


@every_rule
def test_tracin_equals_its_formula(rule: Rule):
    case = CASES["batchnorm"] if rule.optimizer is torch.optim.SGD else CASES["clipped"]
    run = case.record(rule)
    if options := rule.options.get("dampening"):
        assert run.records[1].hyper[0]["dampening"] == options
    for checkpoints, steps in ((3, [1, 4, 6]), ([2, 5], [2, 5]), (1, [4])):
        assert TracIn(checkpoints=checkpoints).steps(run) == steps
        scores = attribute(run, case.queries, method=TracIn(checkpoints=checkpoints), check_roughness=False).values
        assert distance(scores, dense_tracin(run, case, rule, steps)) < TOLERANCES["approximate_vs_own_formula"]


@some_rules
def test_tracin_equals_its_formula_with_two_groups(rule: Rule):
    case = replace(CASES["groups"], frozen=())
    run = case.record(rule)
    scores = attribute(run, case.queries, method=TracIn(checkpoints=[3, 6]), check_roughness=False).values
    assert distance(scores, dense_tracin(run, case, rule, [3, 6])) < TOLERANCES["approximate_vs_own_formula"]


@pytest.mark.parametrize("name", ["clipped", "batchnorm", "cnn"])
def test_tracin_cosine_equals_its_formula(name: str):
    case, rule = CASES[name], RULES["momentum"]
    run = case.record(rule)
    method = TracIn(checkpoints=2, cosine=True)
    scores = attribute(run, case.queries, method=method, check_roughness=False).values
    assert distance(scores, dense_tracin(run, case, rule, method.steps(run), True)) < TOLERANCES["approximate_vs_own_formula"]
    assert scores.abs().max() <= 2 + 1e-9


@pytest.mark.parametrize("name", ["dropout", "tied", "cnn", "attention"])
def test_tracin_does_not_depend_on_its_batch_size(name: str):
    case = CASES[name]
    run = case.record(RULES["adam"])
    each = sum(leaf.numel() * leaf.element_size() for leaf in run.state(0).params.values())
    results = [
        attribute(run, case.queries, method=TracIn(checkpoints=2), query_batch=2, memory=(8 + 2 * size) * each).values
        for size in (256, 1, 5)
    ]
    for result in results[1:]:
        assert distance(result, results[0]) < TOLERANCES["approximate_vs_own_formula"]
    expected = dense_tracin(run, case, RULES["adam"], TracIn(checkpoints=2).steps(run))
    assert distance(results[0], expected) < TOLERANCES["approximate_vs_own_formula"]


def test_tracin_at_the_only_step_of_a_run_is_exact_as_the_step_gets_small():
    """With one step nothing is amplified or undone; the states before and after it come together with the learning rate."""
    errors = []
    for rate in (1e-1, 1e-2, 1e-3):
        case = CASES["plain"]
        model = case.model()
        run = record(
            model, case.examples, case.task, optimizer=torch.optim.SGD(model.parameters(), lr=rate), order=[torch.arange(4)]
        )
        exact = attribute(run, case.queries, check_roughness=False).values
        tracin = attribute(run, case.queries, method=TracIn(checkpoints=[1]), check_roughness=False).values
        assert (tracin[:, 4:] == 0).all()
        assert (exact[:, 4:] == 0).all()
        errors.append(distance(tracin, exact))
    assert errors[0] < 0.2
    assert errors[1] < errors[0] / 8
    assert errors[2] < errors[1] / 8


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be asked


def test_impossible_requests_are_refused():
    case = CASES["cnn"]
    run = case.record(RULES["sgd"])
    for options in ({"last": 0}, {"rank": 0}):
        with pytest.raises(InputError):
            Unrolled(**options)
    with pytest.raises(InputError, match="no queries"):
        attribute(run, images(0, 0), check_roughness=False)
    with pytest.raises(InputError, match="query_batch"):
        attribute(run, case.queries, query_batch=0, check_roughness=False)
    for checkpoints in (0, 9):
        with pytest.raises(InputError, match="between 1 and the number of steps"):
            attribute(run, case.queries, method=TracIn(checkpoints=checkpoints), check_roughness=False)
