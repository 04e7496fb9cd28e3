"""Optimizers for games as drop-ins: saved and copied, scheduled, closed over, wrapped, and honest about what they refuse."""

import cmath
import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import nn

from retrograd import Recorder, Regression
from retrograd.directions import Extragradient
from retrograd.errors import InputError, ReplayMismatch
from retrograd.optim import AggregatedSGD, ComplexAdam, ComplexSGD, ExtraGradient, Lookahead, OptimisticAdam, OptimisticSGD
from retrograd.update_rules import SGD, Adam, rule_of
from retrograd.update_rules import Lookahead as LookaheadRule

BETA = 0.8 * cmath.exp(1j * math.pi / 8)
KINDS: dict[str, Any] = {
    "complex": lambda p, **o: ComplexSGD(p, lr=0.05, beta=BETA, **o),
    "complex rate": lambda p, **o: ComplexSGD(p, lr=0.05 * cmath.exp(0.5j), beta=-0.3, **o),
    "aggregated": lambda p, **o: AggregatedSGD(p, lr=0.05, **o),
    "complex adam": lambda p, **o: ComplexAdam(p, lr=0.01, normalise="dc", **o),
    "optimistic": lambda p, **o: OptimisticSGD(p, lr=0.05, **o),
    "optimistic adam": lambda p, **o: OptimisticAdam(p, lr=0.01, optimism=0.5, **o),
}
WRAPPED: dict[str, Any] = {
    "lookahead": lambda p: Lookahead(torch.optim.Adam(p, lr=0.01), k=3),
    "lookahead plain": lambda p: Lookahead(torch.optim.SGD(p, lr=0.05), k=4),
    "extragradient": lambda p: ExtraGradient(torch.optim.Adam(p, lr=0.01), rate=0.03),
    "lookahead extragradient": lambda p: Lookahead(ExtraGradient(torch.optim.SGD(p, lr=0.05, momentum=0.5)), k=2),
    "extragradient lookahead": lambda p: ExtraGradient(Lookahead(OptimisticSGD(p, lr=0.05), k=2)),
}
every_kind = pytest.mark.parametrize("name", KINDS)
every_optimizer = pytest.mark.parametrize("name", [*KINDS, *WRAPPED])


def leaves(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw, dtype=dtype)) for shape in [(4, 3), (3,), ()]]


def closure_of(optimizer: Any, parameters: list[nn.Parameter], step: int) -> Any:
    """A bumpy and noisy loss, another one at each step; in every third step the second parameter has no gradient."""

    def closure():
        optimizer.zero_grad()
        used = [leaf for index, leaf in enumerate(parameters) if index != 1 or step % 3]
        loss = torch.stack(
            [((leaf - 0.3 * step + 0.1 * torch.randn(())).sin() + 0.1 * leaf.square()).sum() for leaf in used]
        ).sum()
        loss.backward()
        return loss

    return closure


def train(optimizer: Any, parameters: list[nn.Parameter], steps: range, scheduler: Any = None) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        losses.append(optimizer.step(closure_of(optimizer, parameters, step)).item())
        if scheduler is not None:
            scheduler.step()
    return losses


def assert_same(left: list[nn.Parameter], right: list[nn.Parameter]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# All of them


def make(name: str, parameters: Any) -> Any:
    return {**KINDS, **WRAPPED}[name](parameters)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "maximize": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_kind
def test_foreach_and_loop_have_the_same_bits(name: str, dtype: torch.dtype, options: dict):
    together, alone = leaves(dtype), leaves(dtype)
    first, second = KINDS[name](together, **options), KINDS[name](alone, foreach=False, **options)
    assert train(first, together, range(12)) == train(second, alone, range(12))
    assert_same(together, alone)
    for left, right in zip(together, alone, strict=True):
        assert first.state[left].keys() == second.state[right].keys()
        assert all(torch.equal(first.state[left][key], second.state[right][key]) for key in first.state[left])


@every_kind
def test_half_precision_stays_what_it_is(name: str):
    parameters = leaves(torch.bfloat16)
    for foreach in (True, False):
        optimizer = KINDS[name](parameters, foreach=foreach)
        train(optimizer, parameters, range(3))
        slots = [value for leaf in parameters for key, value in optimizer.state[leaf].items() if key != "step"]
        assert {leaf.dtype for leaf in [*parameters, *slots]} == {torch.bfloat16}
        assert all(leaf.isfinite().all() for leaf in parameters)


@every_optimizer
def test_saved_without_trust_and_loaded_it_goes_on_with_the_same_bits(name: str):
    parameters, others = leaves(), leaves()
    optimizer, loaded = make(name, parameters), make(name, others)
    train(optimizer, parameters, range(5))
    optimizer.param_groups[0]["lr"] *= 0.7
    file = io.BytesIO()
    torch.save({"leaves": [leaf.detach() for leaf in parameters], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for group in saved["optimizer"]["param_groups"]:
        assert not any(isinstance(value, complex) for value in group.values())
    loaded.load_state_dict(saved["optimizer"])
    with torch.no_grad():
        for leaf, old in zip(others, saved["leaves"], strict=True):
            leaf.copy_(old)
    assert train(optimizer, parameters, range(5, 11)) == train(loaded, others, range(5, 11))
    assert_same(parameters, others)


@every_optimizer
def test_a_deep_copy_goes_on_by_itself(name: str):
    parameters = leaves()
    optimizer = make(name, parameters)
    train(optimizer, parameters, range(4))
    twin, twins = copy.deepcopy((optimizer, parameters))
    train(optimizer, parameters, range(4, 8))
    assert not torch.equal(parameters[0], twins[0])
    train(twin, twins, range(4, 8))
    assert_same(parameters, twins)


@every_optimizer
def test_schedulers_set_the_rate(name: str):
    parameters, twins = leaves(), leaves()
    optimizer, by_hand = make(name, parameters), make(name, twins)
    start = optimizer.param_groups[0]["lr"]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    train(optimizer, parameters, range(6), scheduler)
    for step in range(6):
        by_hand.param_groups[0]["lr"] = start * 0.8**step
        train(by_hand, twins, range(step, step + 1))
    for left, right in zip(parameters, twins, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_one_cycle_moves_the_modulus_and_leaves_the_argument():
    optimizer = ComplexSGD(leaves(), lr=0.1, beta=BETA)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10, base_momentum=0.5, max_momentum=0.9)
    optimizer.step()
    scheduler.step()
    assert 0.5 < optimizer.param_groups[0]["momentum"] < 0.9
    assert optimizer.param_groups[0]["momentum_argument"] == pytest.approx(math.pi / 8)


@every_kind
def test_step_takes_a_closure_or_the_gradients_that_are_there(name: str):
    parameters, twins = leaves(), leaves()
    optimizer, other = KINDS[name](parameters), KINDS[name](twins)
    train(optimizer, parameters, range(3))
    for step in range(3):
        torch.manual_seed(step)
        closure_of(other, twins, step)()
        assert other.step() is None
    assert_same(parameters, twins)


# ---------------------------------------------------------------------------------------------------------------------
# Options


def test_groups_hold_plain_numbers_and_may_have_complex_options_of_their_own():
    first, second, third = leaves()
    groups: Any = [
        {"params": [first]},
        {"params": [second], "beta": 0.5j, "lr": 0.2j},
        {"params": [third], "beta": -0.4, "lr": 0.3},
    ]
    own = ComplexSGD(groups, lr=0.1j, beta=BETA).param_groups
    numbers = [[group[name] for name in ("lr", "lr_argument", "momentum", "momentum_argument")] for group in own]
    quarter = math.pi / 2
    table = [[0.1, quarter, 0.8, math.pi / 8], [0.2, quarter, 0.5, quarter], [0.3, 0.0, -0.4, 0.0]]
    for found, expected in zip(numbers, table, strict=True):
        assert found == pytest.approx(expected)
    own = ComplexAdam([{"params": [first]}, {"params": [second], "betas": (0.5j, 0.9)}], betas=(-0.3, 0.99)).param_groups
    assert [(group["betas"], group["beta1_argument"]) for group in own] == [((-0.3, 0.99), 0.0), ((0.5, 0.9), quarter)]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: ComplexSGD(p, lr=-0.1), "lr must be a finite number, 0 or more, got -0.1"),
        (lambda p: ComplexSGD(p, lr=float("nan")), "lr must be"),
        (lambda p: ComplexSGD(p, beta=1.0), "beta must have a modulus below 1.*got 1.0"),
        (lambda p: ComplexSGD(p, beta=1j), "modulus 1.0 and argument 1.57"),
        (lambda p: ComplexSGD(p, weight_decay=-1.0), "weight_decay"),
        (lambda p: ComplexSGD([{"params": p, "beta": 2.0}]), "beta must have"),
        (lambda p: AggregatedSGD(p, dampings=()), "one or more"),
        (lambda p: AggregatedSGD([{"params": p, "dampings": (0.5, 0.5j)}]), "ComplexSGD"),
        (lambda p: ComplexAdam(p, betas=(2j, 0.9)), r"betas\[0\] must have a modulus below 1"),
        (lambda p: ComplexAdam(p, betas=(0.5j, 1.0)), "betas must be two numbers"),
        (lambda p: ComplexAdam(p, eps=-1.0), "eps"),
        (lambda p: ComplexAdam(p, normalise="ac"), "normalise must be one of.*got 'ac'"),
        (lambda p: OptimisticSGD(p, optimism=-1.0), "optimism"),
        (lambda p: OptimisticAdam(p, betas=(0.9, -0.1)), "betas"),
        (lambda p: ComplexSGD([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]), "view_as_real"),
        (lambda p: ExtraGradient(torch.optim.SGD(p), rate=0.0), "rate must be positive"),
        (lambda p: ExtraGradient(torch.optim.LBFGS(p)), "LBFGS"),
        (lambda p: ExtraGradient(Lookahead(ExtraGradient(torch.optim.SGD(p)))), "another ExtraGradient"),
        (lambda p: Lookahead(torch.optim.SGD(p), k=0), "1 or more; got 0"),
        (lambda p: Lookahead(torch.optim.SGD(p), alpha=0.0), "alpha is the share"),
        (lambda p: Lookahead(torch.optim.SGD(p)).add_param_group({"params": [], "lookahead_steps": 0}), "k counts"),
        (lambda p: Lookahead(Lookahead(torch.optim.SGD(p))), "another Lookahead"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(make: Any, words: str):
    with pytest.raises(InputError, match=words):
        make(leaves())


def test_wrappers_say_what_they_go_around():
    # The import hook of the tests would refuse the type first.
    with pytest.raises(Exception, match=r"Lookahead|optimizer"):
        Lookahead([nn.Parameter(torch.zeros(1))])  # type: ignore[arg-type]


def test_a_loaded_group_is_checked():
    optimizer = ComplexSGD(leaves())
    saved = optimizer.state_dict()
    saved["param_groups"][0]["momentum"] = 1.5
    with pytest.raises(InputError, match="modulus below 1"):
        optimizer.load_state_dict(saved)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match=r"OptimisticSGD.*sparse=False"):
        OptimisticSGD(embedding.parameters()).step()


# ---------------------------------------------------------------------------------------------------------------------
# Extragradient


def test_extragradient_is_two_gradients_at_the_same_sample():
    parameters = leaves()
    optimizer = ExtraGradient(torch.optim.SGD(parameters, lr=0.05, momentum=0.9))
    twins = leaves()
    plain = torch.optim.SGD(twins, lr=0.05, momentum=0.9)
    for step in range(6):
        torch.manual_seed(step)
        loss = optimizer.step(closure_of(optimizer, parameters, step))
        drawn = torch.randn(())

        torch.manual_seed(step)
        expected = closure_of(plain, twins, step)()
        assert loss.item() == expected.item()
        assert torch.equal(drawn, torch.randn(())), "one evaluation's random numbers are used up, not two's"
        held = [leaf.detach().clone() for leaf in twins]
        with torch.no_grad():
            for leaf in twins:
                if leaf.grad is not None:
                    leaf -= 0.05 * leaf.grad
        torch.manual_seed(step)
        closure_of(plain, twins, step)()
        with torch.no_grad():
            for leaf, old in zip(twins, held, strict=True):
                leaf.copy_(old)
        plain.step()
        for left, right in zip(parameters, twins, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rate", "expected"), [(None, [0.1, 0.2]), (0.5, [0.5, 0.5])])
def test_extrapolation_rate_is_that_of_the_group_or_its_own(rate: float | None, expected: list[float]):
    """On ½x² from 1: w̃ = 1 − r, and then 1 − η(1 − r); a maximised −½x² is the same."""
    first, second = (nn.Parameter(torch.ones((), dtype=torch.float64)) for _ in range(2))
    groups: Any = [{"params": [first]}, {"params": [second], "lr": 0.2, "maximize": True}]
    optimizer = ExtraGradient(torch.optim.SGD(groups, lr=0.1), rate)

    def closure():
        optimizer.zero_grad()
        (first.square() / 2 - second.square() / 2).backward()

    optimizer.step(closure)
    assert first.item() == pytest.approx(1 - 0.1 * (1 - expected[0]))
    assert second.item() == pytest.approx(1 - 0.2 * (1 - expected[1]))


def test_a_parameter_without_gradient_does_not_move():
    first, second = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
    optimizer = ExtraGradient(torch.optim.Adam([first, second], lr=0.1, weight_decay=0.5))
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append(second.item())
        first.square().backward()

    optimizer.step(closure)
    assert seen == [1.0, 1.0]
    assert second.item() == 1.0
    assert first.item() < 1.0
    assert second not in optimizer.state


def test_extragradient_without_a_closure_or_with_one_that_fails_leaves_the_parameters():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = ExtraGradient(torch.optim.SGD([parameter], lr=0.1))
    parameter.grad = torch.ones(2)
    with pytest.raises(InputError, match=r"step\(closure\)"):
        optimizer.step()
    calls = []

    def closure():
        calls.append(parameter.detach().clone())
        parameter.grad = torch.ones(2)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    assert torch.equal(parameter.detach(), torch.ones(2))
    torch.testing.assert_close(calls[1], torch.full((2,), 0.9))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", WRAPPED)
def test_hooks_fire_once_a_step_with_the_state_from_before_it(name: str):
    parameters = leaves()
    optimizer = WRAPPED[name](parameters)
    seen = []

    def before(inner, args, kwargs):
        seen.append(("before", [leaf.detach().clone() for leaf in parameters], len(inner.state)))
        assert inner.state is optimizer.state
        assert inner.param_groups is optimizer.param_groups

    handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(lambda *_: seen.append(("after",)))]
    start = [leaf.detach().clone() for leaf in parameters]
    train(optimizer, parameters, range(1, 2))
    assert [entry[0] for entry in seen] == ["before", "after"]
    assert all(torch.equal(a, b) for a, b in zip(seen[0][1], start, strict=True))
    assert seen[0][2] == 0
    for handle in handles:
        handle.remove()
    train(optimizer, parameters, range(2, 3))
    assert len(seen) == 2


def test_wrapping_optimizers_are_seen_through():
    parameters = leaves()
    inner = torch.optim.Adam(parameters)
    extra, ahead = ExtraGradient(inner, rate=0.2), Lookahead(inner)
    assert isinstance(extra, torch.optim.Optimizer)
    assert extra.optimizer is ahead.optimizer is inner
    assert extra.rate == 0.2
    assert rule_of(extra) == Adam()
    assert rule_of(Lookahead(ExtraGradient(torch.optim.SGD(parameters)))) == LookaheadRule(SGD())
    extra.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 0.3})
    assert inner.param_groups[1]["lr"] == extra.param_groups[1]["lr"] == 0.3
    assert "lr: 0.3" in repr(extra)


@pytest.mark.parametrize("rate", [None, 0.2])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_recorded_loop_replays_bit_for_bit_with_the_direction_of_the_same_name(ahead: bool, rate: float | None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 2))
    inputs, targets = torch.randn(12, 3), torch.randn(12, 2)

    def train_recorded(direction: Any) -> Any:
        optimizer: Any = ExtraGradient(torch.optim.Adam(model.parameters(), lr=0.05), rate)
        optimizer = Lookahead(optimizer, k=2) if ahead else optimizer
        recorder = Recorder(model, (inputs, targets), Regression(), optimizer, check_every=1, direction=direction)
        for step in range(5):
            ids = torch.arange(4) + 4 * (step % 3)

            def closure():
                optimizer.zero_grad()
                Regression().losses(model, (inputs[ids], targets[ids])).mean().backward()  # noqa: B023

            with recorder.step(ids):
                optimizer.step(closure)
        return recorder.finish()

    for given in (Extragradient(rate), None):  # the optimizer says so itself
        run = train_recorded(given)
        assert run.drift == 0.0
        assert run.update_map.gradient.direction == Extragradient(rate)
    with pytest.raises(ReplayMismatch, match="step 0"):
        train_recorded(Extragradient(0.01))


# ---------------------------------------------------------------------------------------------------------------------
# Lookahead


def test_lookahead_goes_back_to_its_slow_weights():
    parameters, twins = leaves(), leaves()
    optimizer, plain = Lookahead(torch.optim.Adam(parameters, lr=0.02), k=3, alpha=0.3), torch.optim.Adam(twins, lr=0.02)
    slow = [leaf.detach().clone() for leaf in twins]
    steps = [0] * len(twins)
    for step in range(10):
        train(optimizer, parameters, range(step, step + 1))
        train(plain, twins, range(step, step + 1))
        with torch.no_grad():
            for index, leaf in enumerate(twins):
                if leaf.grad is None:
                    continue
                steps[index] += 1
                if steps[index] % 3 == 0:
                    leaf.copy_(slow[index] + 0.3 * (leaf - slow[index]))
                    slow[index] = leaf.detach().clone()
        for leaf, twin, old in zip(parameters, twins, slow, strict=True):
            torch.testing.assert_close(leaf, twin, rtol=1e-12, atol=1e-12)
            if leaf in optimizer.state:
                torch.testing.assert_close(leaf.detach() - optimizer.state[leaf]["drift"], old, rtol=1e-12, atol=1e-12)


def test_lookahead_that_keeps_all_is_the_wrapped_optimizer():
    parameters, twins = leaves(), leaves()
    train(Lookahead(torch.optim.SGD(parameters, lr=0.1, momentum=0.9), k=2, alpha=1.0), parameters, range(7))
    train(torch.optim.SGD(twins, lr=0.1, momentum=0.9), twins, range(7))
    assert_same(parameters, twins)


def test_a_state_of_the_wrapped_optimizer_can_be_loaded():
    parameters = leaves()
    plain = torch.optim.Adam(parameters, lr=0.02)
    train(plain, parameters, range(4))
    optimizer = Lookahead(torch.optim.Adam(parameters), k=5, alpha=0.4)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["lookahead_steps"] == 5
    assert optimizer.param_groups[0]["lr"] == 0.02
    before = parameters[0].detach().clone()
    train(optimizer, parameters, range(4, 5))  # Adam's fifth step, and so the fifth of a cycle
    twin = copy.deepcopy(parameters)
    assert not torch.equal(before, twin[0])
    assert not optimizer.state[parameters[0]]["drift"].any()


# ---------------------------------------------------------------------------------------------------------------------
# A game


def contraction(make: Any, steps: int = 100) -> float:
    """The factor a step by which the distance from the equilibrium of x y changes, once transients are over."""
    point = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = make([point])

    def closure():
        optimizer.zero_grad()
        point.grad = torch.stack([point[1], -point[0]]).detach()

    distances = []
    for _ in range(3 * steps):
        optimizer.step(closure)
        distances.append(point.detach().norm().item())
    return (max(distances[-30:]) / max(distances[-30 - steps : -steps])) ** (1 / steps)


def spectral_radius(alpha: complex, beta: complex) -> float:
    """Of the matrix of reference 1.1, for the game x y."""
    game, one, product = (
        torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64),
        torch.eye(2, dtype=torch.float64),
        alpha * beta,
    )
    rows = [
        [beta.real * one, -beta.imag * one, -game],
        [beta.imag * one, beta.real * one, 0 * one],
        [product.real * one, -product.imag * one, one - alpha.real * game],
    ]
    return torch.linalg.eigvals(torch.cat([torch.cat(row, 1) for row in rows])).abs().max().item()


def test_rates_on_a_bilinear_game_are_those_of_theory():
    """Table of reference 1.3; the optimistic one has a double root there, so that it comes near its rate only slowly."""
    half, better = math.sqrt(0.5), math.sqrt(0.75)
    assert contraction(lambda p: torch.optim.SGD(p, lr=0.5)) == pytest.approx(math.sqrt(1.25), abs=0.003)
    assert contraction(lambda p: ExtraGradient(torch.optim.SGD(p, lr=half))) == pytest.approx(better, abs=0.003)
    assert contraction(lambda p: OptimisticSGD(p, lr=0.5)) == pytest.approx(half, abs=0.01)
    complexes = [(0.559 + 0j, 0.668 * cmath.exp(0.375j * math.pi)), (3.03 * cmath.exp(1.276j), 0.157 * cmath.exp(1.166j))]
    for (alpha, beta), published in zip([*complexes, (0.1 + 0j, BETA)], [0.8882, 0.7250, None], strict=True):
        expected = spectral_radius(alpha, beta)
        found = contraction(lambda p: ComplexSGD(p, lr=alpha, beta=beta))  # noqa: B023
        assert found == pytest.approx(expected, abs=0.003)
        assert expected < 1
        assert published is None or expected == pytest.approx(published, abs=0.02)  # three digits of its parameters are known
    assert contraction(lambda p: ComplexSGD(p, lr=0.1, beta=0.8)) > 1
    assert contraction(lambda p: Lookahead(torch.optim.SGD(p, lr=0.3), k=5)) < 1
