"""Update rules for games: equal to their front ends and to their papers, right in their derivatives, recorded and replayed."""

import cmath
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from retrograd import All, Recorder, Regression, Unrolled, attribute, open_run, record
from retrograd.errors import InputError, UnknownOptimizer
from retrograd.optim import AggregatedSGD, ComplexAdam, ComplexSGD, Lookahead, OptimisticAdam, OptimisticSGD
from retrograd.trajectory.digests import _describe
from retrograd.update_rules import (
    SGD,
    Adam,
    AdamW,
    AggregatedMomentum,
    ComplexMomentum,
    OptimisticGradient,
    TorchRule,
    rule_named,
    rule_of,
)
from retrograd.update_rules import ComplexAdam as ComplexAdamRule
from retrograd.update_rules import Lookahead as LookaheadRule
from retrograd.update_rules import OptimisticAdam as OptimisticAdamRule
from tests.cases import CASES, Rule, normal
from tests.reference import game_optimizers as games
from tests.reference import unrolled_autograd as reference
from tests.test_exactness import difference_quotients, distance, unrolled
from tests.test_update_rules import EXACT, assert_equal_to_twin, inputs_of, leaves
from tests.tolerances import TOLERANCES

RULES: tuple[TorchRule, ...] = (
    ComplexMomentum(),
    ComplexMomentum(maximize=True),
    AggregatedMomentum((0.0, 0.7, -0.4)),
    AggregatedMomentum((0.5,), maximize=True),
    ComplexAdamRule(),
    ComplexAdamRule("dc", maximize=True),
    OptimisticGradient(),
    OptimisticGradient(maximize=True),
    OptimisticAdamRule(),
    LookaheadRule(SGD(momentum=True)),
    LookaheadRule(AdamW()),
    LookaheadRule(OptimisticGradient(maximize=True)),
)
every_rule = pytest.mark.parametrize("rule", RULES, ids=str)
HYPER = {
    "learning_rate": 0.1,
    "learning_rate_argument": 0.3,
    "momentum": 0.8,
    "momentum_argument": 0.5,
    "weight_decay": 0.05,
    "beta1": 0.8,
    "beta1_argument": 0.4,
    "beta2": 0.9,
    "epsilon": 1e-3,
    "epsilon_root": 1e-4,
    "step": 3.0,
    "optimism": 0.7,
    "has_previous": 1.0,
    "lookahead_share": 0.6,
    "synchronise": 1.0,
    "dampening": 0.2,
}
BETA = 0.8 * cmath.exp(1j * math.pi / 8)


def double(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Front ends


FRONT_ENDS: dict[str, Any] = {
    "complex": lambda groups, **o: ComplexSGD(groups, lr=0.1, beta=BETA, weight_decay=0.1, **o),
    "complex rate": lambda groups, **o: ComplexSGD(groups, lr=0.1 * cmath.exp(0.5j), beta=-0.3, **o),
    "complex maximize": lambda groups, **o: ComplexSGD(groups, lr=0.1, maximize=True, weight_decay=0.1, **o),
    "aggregated": lambda groups, **o: AggregatedSGD(groups, lr=0.1, dampings=(0.0, 0.9, -0.5), weight_decay=0.1, **o),
    "complex adam": lambda groups, **o: ComplexAdam(groups, lr=0.1, weight_decay=0.1, **o),
    "complex adam dc": lambda groups, **o: ComplexAdam(groups, betas=(0.7j, 0.9), normalise="dc", maximize=True, **o),
    "optimistic": lambda groups, **o: OptimisticSGD(groups, lr=0.1, weight_decay=0.1, **o),
    "optimistic partly": lambda groups, **o: OptimisticSGD(groups, lr=0.1, optimism=0.3, maximize=True, **o),
    "optimistic adam": lambda groups, **o: OptimisticAdam(groups, lr=0.1, weight_decay=0.1, **o),
}
WRAPPED: dict[str, Any] = {
    "lookahead sgd": lambda groups: Lookahead(torch.optim.SGD(groups, momentum=0.9, foreach=False), k=3),
    "lookahead adam": lambda groups: Lookahead(torch.optim.Adam(groups, foreach=False), k=4, alpha=0.8),
    "lookahead optimistic": lambda groups: Lookahead(OptimisticSGD(groups), k=2, alpha=0.3),
}


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FRONT_ENDS)
def test_rule_equals_its_front_end_bit_for_bit(name: str, dtype: torch.dtype, foreach: bool):
    first, *others = leaves(dtype)
    optimizer = FRONT_ENDS[name]([{"params": others}, {"params": [first], "weight_decay": 0.01}], foreach=foreach)
    assert_equal_to_twin(optimizer, steps=20, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", WRAPPED)
def test_lookahead_rule_equals_its_front_end_bit_for_bit(name: str, dtype: torch.dtype):
    first, *others = leaves(dtype)
    groups = [{"params": others}, {"params": [first], "weight_decay": 0.01, "lookahead_steps": 7}]
    assert_equal_to_twin(WRAPPED[name](groups), steps=20, **EXACT)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_real_complex_and_single_aggregated_momentum_are_those_of_torch_bit_for_bit(dtype, momentum, maximize):
    ours, aggregated, theirs = leaves(dtype), leaves(dtype), leaves(dtype)
    options = {"lr": 0.05, "weight_decay": 0.1, "maximize": maximize}
    optimizers = [
        ComplexSGD(ours, beta=momentum, **options),
        AggregatedSGD(aggregated, dampings=(momentum,), **options),
        torch.optim.SGD(theirs, momentum=momentum, **options),
    ]
    draw = torch.Generator().manual_seed(1)
    for step in range(20):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
        for same in zip(ours, aggregated, theirs, strict=True):
            gradient = torch.randn(same[0].shape, generator=draw, dtype=dtype)
            for leaf in same:
                leaf.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for left, middle, right in zip(ours, aggregated, theirs, strict=True):
        assert torch.equal(left, right)
        assert torch.equal(middle, right)
    assert all(not optimizers[0].state[leaf]["velocity_imaginary"].any() for leaf in ours)


# ---------------------------------------------------------------------------------------------------------------------
# Closed forms


def test_jacobian_of_a_step_in_a_game_is_the_block_matrix_and_its_eigenvalues_solve_the_cubic():
    """Reference 1.1: R, and (x − 1)(x² − 2 Re β x + |β|²) + λ x (Re α x − Re(α β̄)) = 0 for each eigenvalue λ of J."""
    draw = torch.Generator().manual_seed(0)
    game = torch.randn(3, 3, generator=draw, dtype=torch.float64)
    alpha, beta = 0.3 * cmath.exp(0.4j), 0.7 * cmath.exp(0.9j)
    hyper = {"learning_rate": 0.3, "learning_rate_argument": 0.4, "momentum": 0.7, "momentum_argument": 0.9}

    def step(state: torch.Tensor) -> torch.Tensor:
        real, imaginary, w = state.split(3)
        slots = {"velocity_real": real, "velocity_imaginary": imaginary}
        w, slots = ComplexMomentum().apply(w, slots, game @ w, hyper)
        return torch.cat([slots["velocity_real"], slots["velocity_imaginary"], w])

    found = torch.func.jacrev(step)(torch.randn(9, generator=draw, dtype=torch.float64))
    one, product = torch.eye(3, dtype=torch.float64), alpha * beta
    rows = [
        [beta.real * one, -beta.imag * one, -game],
        [beta.imag * one, beta.real * one, 0 * one],
        [product.real * one, -product.imag * one, one - alpha.real * game],
    ]
    torch.testing.assert_close(found, torch.cat([torch.cat(row, 1) for row in rows]), rtol=1e-14, atol=1e-14)

    expected = torch.linalg.eigvals(game)
    for x in torch.linalg.eigvals(found):
        cubic = (x - 1) * (x**2 - 2 * beta.real * x + abs(beta) ** 2)
        residuals = cubic + expected * x * (alpha.real * x - (alpha * beta.conjugate()).real)
        assert residuals.abs().min() < 1e-12


def test_conjugate_dampings_are_complex_momentum_in_the_real_form():
    """v₁ of β and v₂ = v̄₁ of β̄: their mean is Re μ, and with B = [[Re β, −Im β], [Im β, Re β]] it is m₁ of
    m' = B m − (g, 0).
    """
    turn = torch.tensor([[BETA.real, -BETA.imag], [BETA.imag, BETA.real]], dtype=torch.float64)
    hyper = {"learning_rate": 0.1, "momentum": abs(BETA), "momentum_argument": cmath.phase(BETA)}
    theta, slots = double(1.0), {name: double(0.0) for name in ComplexMomentum().slots}
    real, pair, aggregated, buffers = 1.0, [0j, 0j], 1.0, torch.zeros(2, dtype=torch.float64)
    for step in range(30):
        gradient = math.sin(step)
        theta, slots = ComplexMomentum().apply(theta, slots, double(gradient), hyper)
        pair = [BETA * pair[0] - gradient, BETA.conjugate() * pair[1] - gradient]
        aggregated += 0.1 * (sum(pair) / 2).real
        buffers = turn @ buffers - double(gradient) * torch.tensor([1.0, 0.0], dtype=torch.float64)
        real += 0.1 * buffers[0].item()
        assert theta.item() == pytest.approx(aggregated, rel=1e-12) == pytest.approx(real, rel=1e-12)


def test_normalised_complex_adam_takes_adams_step_for_a_constant_gradient():
    theta, slots = double(0.0), {name: double(0.0) for name in ComplexAdamRule().slots}
    hyper = {"learning_rate": 0.1, "beta1": 0.8, "beta1_argument": 0.4, "beta2": 0.99, "epsilon": 0.0}
    for step in range(1, 200):
        before = theta
        theta, slots = ComplexAdamRule("dc").apply(theta, slots, double(3.0), {**hyper, "step": float(step)})
    assert (theta - before).item() == pytest.approx(-0.1, rel=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives and step sizes


@every_rule
def test_jacobian_equals_central_differences(rule: TorchRule):
    parameter, slots, gradient = inputs_of(rule, shape=(2,))

    def step(parameter, gradient, *values):
        parameter, new = rule.apply(parameter, dict(zip(rule.slots, values, strict=True)), gradient, HYPER)
        # A synchronisation leaves no drift: a constant, which `gradcheck` is not to be asked about.
        return parameter, *(new[name] for name in rule.slots if name != "drift")

    inputs = tuple(leaf.requires_grad_() for leaf in (parameter, gradient, *slots.values()))
    assert torch.autograd.gradcheck(step, inputs, eps=1e-6, atol=1e-8, rtol=1e-6, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(step, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


@every_rule
def test_hyperparameters_can_be_tensors_to_differentiate_by(rule: TorchRule):
    parameter, slots, gradient = inputs_of(rule, shape=(2,))

    def step(*values):
        hyper = dict(zip(HYPER, values, strict=True))
        stepped, new = rule.apply(parameter, slots, gradient, hyper)
        return stepped, *new.values(), stepped + 0 * rule.step_size(new, hyper)

    tensors = tuple(double(value).requires_grad_() for value in HYPER.values())
    for left, right in zip(step(*HYPER.values()), step(*tensors), strict=True):
        torch.testing.assert_close(left, right.detach(), rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(step, tensors, eps=1e-6, atol=1e-8, rtol=1e-6)


@every_rule
def test_apply_is_pure_and_maps_over_a_batch(rule: TorchRule):
    batch = [inputs_of(rule, seed=seed) for seed in range(3)]
    parameter, gradient = (torch.stack([item[index] for item in batch]) for index in (0, 2))
    slots = {name: torch.stack([item[1][name] for item in batch]) for name in rule.slots}
    before = [leaf.clone() for leaf in (parameter, gradient, *slots.values())]
    whole = rule.apply(parameter, slots, gradient, HYPER)
    assert tuple(whole[1]) == rule.slots
    torch.testing.assert_close(
        torch.func.vmap(lambda *own: rule.apply(*own, HYPER))(parameter, slots, gradient), whole, **EXACT
    )
    assert all(torch.equal(a, b) for a, b in zip(before, (parameter, gradient, *slots.values()), strict=True))
    stepped, new = rule.apply(parameter.float(), {name: leaf.float() for name, leaf in slots.items()}, gradient.float(), HYPER)
    assert {stepped.dtype, *(leaf.dtype for leaf in new.values())} == {torch.float32}
    assert all(leaf.data_ptr() != gradient.data_ptr() for leaf in (whole[0], *whole[1].values()))


@every_rule
def test_step_size_is_the_long_run_response(rule: TorchRule):
    """A pulse on a second moment that is large beside it, put back after each step; a synchronisation every 7 steps."""
    square, pulse = torch.tensor([0.3, 2.0], dtype=torch.float64), 1e-6
    parameter, slots = torch.zeros(2, dtype=torch.float64), {name: torch.zeros(2, dtype=torch.float64) for name in rule.slots}
    hyper = {**HYPER, "weight_decay": 0.0, "dampening": 0.0, "step": 1e4}
    for k in range(350):
        slots |= {"second_moment": square / 0.9} if "second_moment" in slots else {}
        gradient = torch.full((2,), pulse if k == 0 else 0.0, dtype=torch.float64)
        parameter, slots = rule.apply(parameter, slots, gradient, {**hyper, "synchronise": float(k % 7 == 6)})
    expected = rule.step_size({**slots, "second_moment": square}, hyper)
    torch.testing.assert_close(-parameter / pulse, torch.zeros_like(parameter) + expected, rtol=1e-8, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Which rule it is


@every_rule
def test_rules_are_values_that_a_run_folder_can_name(rule: TorchRule):
    assert isinstance(rule, TorchRule)
    assert hash(rule) == hash(type(rule)(**vars(rule)))
    assert set(rule.slots) <= set(rule.torch_slots)
    written = json.loads(json.dumps(_describe(rule)))
    assert written == _describe(rule)
    assert rule_named(written["class"], written["options"]) == rule


def test_rule_of_asks_the_optimizer():
    weights = leaves()
    assert rule_of(ComplexSGD(weights, maximize=True)) == ComplexMomentum(maximize=True)
    assert rule_of(AggregatedSGD(weights, dampings=[0.0, 0.5])) == AggregatedMomentum((0.0, 0.5))
    assert rule_of(ComplexAdam(weights, normalise="dc")) == ComplexAdamRule("dc")
    assert rule_of(OptimisticSGD(weights)) == OptimisticGradient()
    assert rule_of(OptimisticAdam(weights)) == OptimisticAdamRule()
    assert rule_of(Lookahead(torch.optim.Adam(weights))) == LookaheadRule(Adam())


class Louder(ComplexSGD):
    """A subclass may do anything."""


class Own(Louder):
    def update_rule(self) -> ComplexMomentum:
        return ComplexMomentum()


def test_a_subclass_has_to_say_its_rule_itself():
    with pytest.raises(UnknownOptimizer, match=r"Louder.*subclass of ComplexSGD.*update_rule\(\)"):
        rule_of(Louder(leaves()))
    assert rule_of(Own(leaves())) == ComplexMomentum()


def test_groups_with_different_rules_are_refused():
    first, *others = leaves()
    optimizer = AggregatedSGD([{"params": others}, {"params": [first], "dampings": (0.1,)}])
    with pytest.raises(UnknownOptimizer, match=r"different update rules.*two optimizers"):
        rule_of(optimizer)
    with pytest.raises(UnknownOptimizer, match="LBFGS"):
        rule_of(Lookahead(torch.optim.LBFGS([first])))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AggregatedMomentum(()), "one or more"),
        (lambda: AggregatedMomentum((0.5, 1.0)), "between -1 and 1"),
        (lambda: ComplexAdamRule("ac"), "normalise"),
        (lambda: LookaheadRule(LookaheadRule(SGD())), "drift"),
    ],
)
def test_rules_refuse_what_they_cannot_be(make: Any, words: str):
    with pytest.raises(InputError, match=words):
        make()


# ---------------------------------------------------------------------------------------------------------------------
# Recorded runs


_ADAM = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-2}
RUNS = {
    "complex": Rule(ComplexSGD, {"lr": 0.2, "beta": BETA, "weight_decay": 0.05}),
    "complex rate": Rule(ComplexSGD, {"lr": 0.2 * cmath.exp(0.4j), "beta": 0.5 * cmath.exp(1.2j)}),
    "aggregated": Rule(AggregatedSGD, {"lr": 0.2, "dampings": (0.0, 0.7, -0.3)}),
    "complex adam": Rule(ComplexAdam, {**_ADAM, "betas": (BETA, 0.9), "weight_decay": 0.05}),
    "complex adam dc": Rule(ComplexAdam, {**_ADAM, "betas": (BETA, 0.9), "normalise": "dc"}),
    "optimistic": Rule(OptimisticSGD, {"lr": 0.2, "weight_decay": 0.05}),
    "optimistic adam": Rule(OptimisticAdam, {**_ADAM, "optimism": 0.6}),
    "lookahead sgd": Rule(games.lookahead_sgd, {"lr": 0.2, "momentum": 0.7}),
    "lookahead adam": Rule(games.lookahead_adam, _ADAM),
}


PAIRS = [*((name, "groups") for name in RUNS), ("complex", "clipped"), ("lookahead sgd", "clipped")]


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_scores_equal_autograd_through_the_run_and_differences_of_retraining(name: str, case: str):
    rule, own = RUNS[name], CASES[case]
    run = own.record(rule)
    expected, state, _ = reference.scores_and_run(own, rule, run)
    final = run.final_state.tensors()
    for leaf in state.keys() & final.keys():
        if leaf.removeprefix("params/") not in own.frozen:
            torch.testing.assert_close(final[leaf], state[leaf], rtol=1e-9, atol=1e-12)
    assert {leaf for leaf in final if leaf.startswith("slots/")} == {leaf for leaf in state if leaf.startswith("slots/")}
    scores = unrolled(run, own)
    assert distance(scores, expected) < TOLERANCES["exact_vs_autograd"]
    error = float("inf")
    for h in (1e-4, 1e-5):
        quotients = difference_quotients(run, own, [6], h)
        error = min(error, ((quotients - scores[:, [6]]).abs().max() / scores.abs().max()).item())
        if error < TOLERANCES["exact_vs_differences"]:
            break
    assert error < TOLERANCES["exact_vs_differences"]


DATA = normal(12, 3, seed=3).float(), normal(12, 2, seed=4).float()


def module() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def loop(recorder: Recorder, optimizer: Any, scheduler: Any = None, stop: int = 9) -> None:
    """Somebody's training loop, with a schedule."""
    for step in range(recorder.steps_done, stop):
        ids = torch.arange(4) + 4 * (step % 3)
        with recorder.step(ids):
            optimizer.zero_grad()
            Regression().losses(recorder.model, (DATA[0][ids], DATA[1][ids])).mean().backward()
            optimizer.step()
        if scheduler is not None:
            scheduler.step()


@pytest.mark.parametrize("name", [*FRONT_ENDS, *WRAPPED])
def test_a_recorded_loop_replays_bit_for_bit_also_from_its_folder(name: str, tmp_path: Path):
    model = module()
    first, *others = model.parameters()
    optimizer = {**FRONT_ENDS, **WRAPPED}[name]([{"params": others}, {"params": [first], "weight_decay": 0.02}])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    recorder = Recorder(model, DATA, Regression(), optimizer, folder=tmp_path / "run", check_every=1)
    loop(recorder, optimizer, scheduler)
    run = recorder.finish()
    assert run.drift == 0.0
    again = open_run(tmp_path / "run", module(), DATA, Regression())
    assert again.update_map.rule == rule_of(optimizer)
    for parameter, leaf in again.state(9).params.items():
        assert torch.equal(leaf, model.get_parameter(parameter).detach())
    assert [entry.hyper for entry in again.records] == [entry.hyper for entry in run.records]
    assert len({entry.hyper[0]["learning_rate"] for entry in again.records}) == 9


@pytest.mark.parametrize("name", ["complex adam", "optimistic", "lookahead sgd", "lookahead adam"])
def test_a_killed_recording_goes_on_with_the_same_bits(name: str, tmp_path: Path):
    """Five steps, and then the other four: lookahead's are 3 and 4 to a synchronisation."""
    ends = []
    for stops in ([9], [5, 9]):
        folder = tmp_path / str(len(stops))
        for stop in stops:
            model = module()
            optimizer = {**FRONT_ENDS, **WRAPPED}[name](model.parameters())
            recorder = Recorder(model, DATA, Regression(), optimizer, folder=folder, checkpoints=All(), resume=True)
            loop(recorder, optimizer, stop=stop)
            if stop == 9:
                recorder.finish()
            else:
                recorder.close()
        ends.append(list(model.parameters()))
    assert all(torch.equal(left, right) for left, right in zip(*ends, strict=True))


def test_record_takes_a_front_end_and_attribution_its_run():
    run = record(module(), DATA, Regression(), optimizer=lambda p: ComplexSGD(p, lr=0.1), epochs=2, batch_size=4)
    scores = attribute(run, DATA, method=Unrolled(), check_roughness=False)
    assert torch.isfinite(scores.values).all()
    assert run.update_map.rule == ComplexMomentum()
