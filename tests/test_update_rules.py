"""Update rules: equal to torch.optim, right in their derivatives, honest about what they do not know."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrograd.errors import InputError, UnknownOptimizer
from retrograd.update_rules import SGD, Adam, AdamW, RMSprop, TorchRule, UpdateRule, rule_of
from tests.tolerances import TOLERANCES

RULES = (SGD(), SGD(momentum=True), SGD(momentum=True, nesterov=True), Adam(), AdamW(), RMSprop(), RMSprop(True, True))
HYPER = {
    "learning_rate": 0.1,
    "momentum": 0.8,
    "dampening": 0.3,
    "weight_decay": 0.05,
    "beta1": 0.8,
    "beta2": 0.9,
    "epsilon": 1e-3,
    "epsilon_root": 1e-4,
    "step": 3.0,
    "smoothing": 0.9,
}
every_rule = pytest.mark.parametrize("rule", RULES, ids=str)


def hyper_of(rule):
    """All hyperparameters that there are, but no momentum for a rule without a velocity."""
    return {**HYPER, "momentum": 0.8 if "velocity" in rule.slots else 0.0}


def inputs_of(rule, shape=(3, 2), seed=0):
    """A parameter, positive slots (a mean square above the squared mean) and a gradient, in float64."""
    draw = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    slots = {name: normal() for name in rule.slots}
    for name in slots.keys() & {"second_moment", "mean_square"}:
        slots[name] = slots[name].square() + 20.0
    return normal(), slots, normal()


# ---------------------------------------------------------------------------------------------------------------------
# Equality with torch.optim


def grid(kind, **options):
    return [(kind, dict(zip(options, values, strict=True))) for values in itertools.product(*options.values())]


TWINS = [
    *grid(torch.optim.SGD, momentum=[0, 0.9], dampening=[0, 0.3], weight_decay=[0, 0.1], maximize=[False, True]),
    *grid(torch.optim.SGD, momentum=[0.9], nesterov=[True], weight_decay=[0, 0.1], maximize=[False, True]),
    *grid(torch.optim.Adam, betas=[(0.9, 0.999), (0.5, 0.7)], weight_decay=[0, 0.1], maximize=[False, True]),
    *grid(torch.optim.AdamW, eps=[1e-8, 1e-2], weight_decay=[0, 0.1], maximize=[False, True]),
    *grid(
        torch.optim.RMSprop, momentum=[0, 0.9], centered=[False, True], weight_decay=[0, 0.1], maximize=[False, True]
    ),
]  # fmt: skip


def assert_equal_to_twin(optimizer, steps=100, momentum=None, **tolerance):
    """Train an optimizer on random gradients and step its rule along; compare parameters and slots at each step.

    Gradients do not depend on parameters, so that differences in rounding add up but do not grow.
    """
    rule = rule_of(optimizer)
    draw = torch.Generator().manual_seed(1)
    where = [(group, leaf) for group in optimizer.param_groups for leaf in group["params"]]
    twins = [(leaf.detach().clone(), {name: torch.zeros_like(leaf) for name in rule.slots}) for _, leaf in where]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 + group["params"][0].ndim) / (1 + 0.1 * step)
            if momentum:
                group["momentum"] = momentum(step)
        for index, (group, leaf) in enumerate(where):
            leaf.grad = torch.randn(leaf.shape, generator=draw, dtype=leaf.dtype)
            hyper = rule.hyper_from_torch(group, optimizer.state[leaf])
            assert all(type(value) is float for value in hyper.values())
            twins[index] = rule.apply(*twins[index], leaf.grad, hyper)
        optimizer.step()
        for (_, leaf), (parameter, slots) in zip(where, twins, strict=True):
            assert parameter.dtype == leaf.dtype
            assert set(slots) == set(rule.slots)
            torch.testing.assert_close(parameter, leaf.detach(), **tolerance)
            for name, slot in slots.items():
                state = optimizer.state[leaf].get(rule.torch_slots[name])
                torch.testing.assert_close(slot, torch.zeros_like(leaf) if state is None else state, **tolerance)


EXACT = {"rtol": 0, "atol": 0}


def leaves(dtype=torch.float64):
    draw = torch.Generator().manual_seed(2)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw, dtype=dtype)) for shape in [(7, 5), (3,), ()]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "options"), TWINS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_equals_torch_bit_for_bit(kind, options, dtype):
    first, *others = leaves(dtype)
    assert_equal_to_twin(kind([{"params": others}, {"params": [first], "weight_decay": 0.01}], **options), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"dampening": 0.5}),
        (torch.optim.SGD, {"nesterov": True}),
        (torch.optim.RMSprop, {}),
        (torch.optim.RMSprop, {"centered": True}),
    ],
)
def test_group_without_momentum_next_to_one_with_it(kind, options, dtype):
    first, *others = leaves(dtype)
    groups = [{"params": others}, {"params": [first], "momentum": 0.0, "nesterov": False}]
    assert_equal_to_twin(kind(groups, momentum=0.9, **options), **EXACT)


def test_momentum_switched_off_and_on():
    """In steps with momentum 0 torch leaves the velocity as it is, or has none yet."""
    optimizer = torch.optim.SGD(leaves(), momentum=0.9, dampening=0.2)
    assert_equal_to_twin(optimizer, steps=12, momentum=lambda step: 0.9 if step in (2, 3, 7, 8) else 0.0, **EXACT)


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        *itertools.product([torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW], ["foreach", "fused"]),
        (torch.optim.RMSprop, "foreach"),
    ],
)
def test_equals_the_other_implementations_of_torch_up_to_rounding(kind, variant):
    assert_equal_to_twin(kind(leaves(), weight_decay=0.1, **{variant: True}), rtol=1e-12, atol=1e-13)


def test_learning_rate_may_be_a_tensor_in_torch():
    optimizer = torch.optim.AdamW(leaves(), lr=torch.tensor([0.5]))
    assert rule_of(optimizer).hyper_from_torch(optimizer.param_groups[0], {})["learning_rate"] == 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives


@every_rule
@pytest.mark.parametrize("maximize", [False, True])
def test_jacobian_equals_central_differences(rule, maximize):
    rule = type(rule)(**{**vars(rule), "maximize": maximize})
    hyper = hyper_of(rule)
    parameter, slots, gradient = inputs_of(rule)

    def step(parameter, gradient, *values):
        parameter, slots = rule.apply(parameter, dict(zip(rule.slots, values, strict=True)), gradient, hyper)
        return parameter, *(slots[name] for name in rule.slots)

    inputs = tuple(leaf.requires_grad_() for leaf in (parameter, gradient, *slots.values()))
    assert torch.autograd.gradcheck(step, inputs, eps=1e-6, atol=1e-8, rtol=1e-6, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(step, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


@every_rule
def test_hyperparameters_can_be_tensors_to_differentiate_by(rule):
    hyper = hyper_of(rule)
    parameter, slots, gradient = inputs_of(rule)
    names = [name for name in hyper if name != "momentum" or "velocity" in rule.slots]

    def step(*values):
        stepped, new = rule.apply(parameter, slots, gradient, {**hyper, **dict(zip(names, values, strict=True))})
        return stepped, *new.values(), stepped + 0 * rule.step_size(new, hyper)

    plain = step(*(hyper[name] for name in names))
    tensors = tuple(torch.tensor(hyper[name], dtype=torch.float64, requires_grad=True) for name in names)
    for left, right in zip(plain, step(*tensors), strict=True):
        torch.testing.assert_close(left, right.detach(), rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(step, tensors, eps=1e-6, atol=1e-8, rtol=1e-6)


def test_tensor_hyperparameters_do_not_promote_float32():
    rule, hyper = AdamW(), {name: torch.tensor(value, dtype=torch.float64) for name, value in HYPER.items()}
    parameter, slots, gradient = inputs_of(rule)
    stepped, new = rule.apply(parameter.float(), {name: slot.float() for name, slot in slots.items()}, gradient.float(), hyper)
    assert {stepped.dtype, *(slot.dtype for slot in new.values())} == {torch.float32}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_derivative_by_weight_decay_does_not_vanish_at_zero(weight_decay):
    parameter, slots, gradient = inputs_of(SGD())
    decay = torch.tensor(weight_decay, dtype=torch.float64, requires_grad=True)
    SGD().apply(parameter, slots, gradient, {"learning_rate": 0.1, "weight_decay": decay})[0].sum().backward()
    torch.testing.assert_close(decay.grad, -0.1 * parameter.sum())


@pytest.mark.parametrize("rule", [Adam(), AdamW(), RMSprop(), RMSprop(centered=True), RMSprop(momentum=True)], ids=str)
def test_a_coordinate_whose_gradient_was_always_zero_has_finite_derivatives(rule):
    """Closed form at v = 0: ∂θ'/∂g = −η k/ε, with k = (1 − β₁)/c₁ for Adam and 1 for RMSprop."""
    hyper = {**hyper_of(rule), "weight_decay": 0.0, "epsilon_root": 0.0}
    zeros = {name: torch.zeros(2, dtype=torch.float64, requires_grad=True) for name in rule.slots}
    gradient = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    parameter, slots = rule.apply(torch.ones(2, dtype=torch.float64), zeros, gradient, hyper)
    assert parameter[0] == 1.0
    got = torch.autograd.grad(parameter.sum(), (gradient, *zeros.values()), retain_graph=True)
    assert all(derivative.isfinite().all() for derivative in got)
    factor = 0.2 / (1 - 0.8**3) if "first_moment" in rule.slots else 1.0
    assert got[0][0].item() == pytest.approx(-0.1 * factor / 1e-3, rel=1e-12)
    twice = torch.autograd.grad(rule.step_size(slots, hyper).sum(), gradient)[0]
    assert twice[0] == 0
    assert twice.isfinite().all()


@every_rule
def test_works_under_vmap_jvp_and_grad(rule):
    hyper = hyper_of(rule)
    batch = [inputs_of(rule, seed=seed) for seed in range(3)]
    batch[0][2].zero_()
    parameter, gradient = (torch.stack([item[index] for item in batch]) for index in (0, 2))
    slots = {name: torch.stack([item[1][name] for item in batch]) for name in rule.slots}

    def step(parameter, slots, gradient):
        return rule.apply(parameter, slots, gradient, hyper)

    mapped = torch.func.vmap(step)(parameter, slots, gradient)
    torch.testing.assert_close(mapped, step(parameter, slots, gradient), **EXACT)

    # Adjointness: ⟨λ, A δ⟩ = ⟨Aᵀ λ, δ⟩ for a batch of vectors.
    primal = batch[1]
    _, pullback = torch.func.vjp(step, *primal)
    pulled = torch.func.vmap(pullback)((parameter, slots))
    _, pushed = torch.func.jvp(step, primal, primal)

    def inner(left, right):
        pairs = zip(torch.utils._pytree.tree_leaves(left), torch.utils._pytree.tree_leaves(right), strict=True)
        return sum((a * b).flatten(1).sum(1) for a, b in pairs)

    pushed, tangent = torch.utils._pytree.tree_map(lambda leaf: leaf.expand(3, *leaf.shape), (pushed, primal))
    tolerance = TOLERANCES["adjointness"]
    torch.testing.assert_close(inner((parameter, slots), pushed), inner(pulled, tangent), rtol=tolerance, atol=tolerance)


@every_rule
def test_apply_is_pure_and_keeps_shape_and_dtype(rule):
    for dtype, shape in itertools.product([torch.float32, torch.float64], [(), (4,), (2, 3, 1), (0,)]):
        parameter, slots, gradient = (leaf for leaf in inputs_of(rule, shape))
        parameter, gradient = parameter.to(dtype), gradient.to(dtype)
        slots = {name: slot.to(dtype) for name, slot in slots.items()}
        before = [leaf.clone() for leaf in (parameter, gradient, *slots.values())]
        stepped, new = rule.apply(parameter, slots, gradient, hyper_of(rule))
        assert tuple(new) == rule.slots
        assert new is not slots
        assert all(leaf.shape == shape and leaf.dtype == dtype for leaf in (stepped, *new.values()))
        assert all(torch.equal(a, b) for a, b in zip(before, (parameter, gradient, *slots.values()), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Step size


def response(rule, hyper, steps, size=1.0):
    """Return how far a pulse of gradient moves a parameter from 0 in the end, without decay."""
    parameter, slots = torch.zeros(1, dtype=torch.float64), {name: torch.zeros(1, dtype=torch.float64) for name in rule.slots}
    for step in range(steps):
        gradient = torch.full((1,), size if step == 0 else 0.0, dtype=torch.float64)
        parameter, slots = rule.apply(parameter, slots, gradient, {**hyper, "weight_decay": 0.0})
    return -parameter.item() / size


@given(
    momentum=st.floats(0.01, 0.9),
    dampening=st.floats(0.0, 0.9),
    nesterov=st.booleans(),
    maximize=st.booleans(),
    learning_rate=st.floats(1e-3, 1.0),
)
@settings(max_examples=25, deadline=None)
def test_sgd_step_size_is_the_long_run_response(momentum, dampening, nesterov, maximize, learning_rate):
    rule = SGD(momentum=True, nesterov=nesterov, maximize=maximize)
    hyper = {"learning_rate": learning_rate, "momentum": momentum, "dampening": dampening}
    assert rule.step_size({}, hyper) == pytest.approx(response(rule, hyper, steps=400), rel=1e-12)
    assert (rule.step_size({}, hyper) < 0) == maximize


def test_sgd_step_size_without_momentum_is_the_learning_rate():
    for rule in (SGD(), SGD(momentum=True), SGD(momentum=True, nesterov=True)):
        assert rule.step_size({}, {"learning_rate": 0.1, "momentum": 0.0, "dampening": 0.7}) == 0.1


@pytest.mark.parametrize("rule", [Adam(), AdamW(), Adam(maximize=True), AdamW(maximize=True)], ids=str)
@pytest.mark.parametrize(("step", "epsilon_root"), [(5.0, 0.0), (500.0, 1e-2)])
def test_adam_step_size_is_the_long_run_response(rule, step, epsilon_root):
    """The preconditioner is frozen by β₂ = 1 in effect: a tiny pulse on a large v, put back after each step.

    At a finite t the response is Σₖ (1 − β₁) β₁ᵏ / c₁(t + k) · s(t + k). It is compared with that sum, and with s itself where
    c₁ and c₂ have come close to 1.
    """
    hyper = {**HYPER, "beta2": 0.99, "weight_decay": 0.0, "epsilon_root": epsilon_root}
    square = torch.tensor([0.3, 2.0], dtype=torch.float64)
    parameter, first, expected = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), 0.0
    pulse = torch.full((2,), 1e-9, dtype=torch.float64)
    for k in range(200):
        now = {**hyper, "step": step + k}
        before = {"first_moment": first, "second_moment": square / 0.99}
        parameter, slots = rule.apply(parameter, before, pulse if k == 0 else 0 * pulse, now)
        torch.testing.assert_close(slots["second_moment"], square, rtol=1e-15, atol=1e-15)
        first = slots["first_moment"]
        expected = expected + 0.2 * 0.8**k / (1 - 0.8 ** (step + k)) * rule.step_size({"second_moment": square}, now)
    torch.testing.assert_close(-parameter / pulse, expected, rtol=1e-10, atol=0)
    closed_form = 0.1 / ((square / (1 - 0.99**step) + epsilon_root).sqrt() + 1e-3) * (-1 if rule.maximize else 1)
    torch.testing.assert_close(rule.step_size(slots, {**hyper, "step": step}), closed_form, rtol=1e-14, atol=0)
    if step == 500:
        torch.testing.assert_close(expected, closed_form, rtol=1e-2, atol=0)


@pytest.mark.parametrize("rule", [RMSprop(), RMSprop(momentum=True), RMSprop(True, True), RMSprop(maximize=True)], ids=str)
def test_rmsprop_step_size_is_the_long_run_response(rule):
    """With smoothing 1 the mean square is frozen."""
    hyper = {**hyper_of(rule), "smoothing": 1.0, "weight_decay": 0.0}
    parameter, slots = torch.zeros(2, dtype=torch.float64), inputs_of(rule, shape=(2,))[1]
    slots |= {"velocity": torch.zeros(2, dtype=torch.float64)} if rule.momentum else {}
    expected = rule.step_size(slots, hyper)
    for k in range(200):
        parameter, slots = rule.apply(parameter, slots, torch.full((2,), float(k == 0), dtype=torch.float64), hyper)
    torch.testing.assert_close(-parameter, expected, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# What is supported


@every_rule
def test_rules_are_values_that_follow_the_protocols(rule):
    assert isinstance(rule, UpdateRule)
    assert isinstance(rule, TorchRule)
    assert rule == type(rule)(**vars(rule))
    assert hash(rule) == hash(type(rule)(**vars(rule)))
    assert set(rule.slots) <= set(rule.torch_slots)


def test_rule_of_finds_the_exact_class():
    weights = leaves()
    assert rule_of(torch.optim.SGD(weights)) == SGD()
    assert rule_of(torch.optim.Adam(weights, maximize=True)) == Adam(maximize=True)
    assert rule_of(torch.optim.AdamW(weights)) == AdamW()
    assert rule_of(torch.optim.RMSprop(weights, momentum=0.9, centered=True)) == RMSprop(momentum=True, centered=True)


class Louder(torch.optim.AdamW):
    """A subclass may do anything."""


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: torch.optim.LBFGS(p), ["torch.optim.lbfgs.LBFGS", "torch.optim.RMSprop", "rule="]),
        (lambda p: Louder(p), ["Louder", "subclass of AdamW", "rule="]),
        (lambda p: torch.optim.Adam(p, amsgrad=True), ["torch.optim.adam.Adam", "amsgrad=True", "rule="]),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), ["torch.optim.adamw.AdamW", "amsgrad=True"]),
        (lambda p: torch.optim.Adam(p, decoupled_weight_decay=True), ["decoupled_weight_decay=True", "torch.optim.AdamW"]),
        (lambda p: torch.optim.SGD(p, differentiable=True), ["torch.optim.sgd.SGD", "differentiable=True"]),
        (lambda p: torch.optim.RMSprop(p, differentiable=True), ["differentiable=True"]),
        (
            lambda p: torch.optim.SGD([{"params": p[:1]}, {"params": p[1:], "maximize": True}]),
            ["maximize=[False, True]", "two optimizers"],
        ),
        (
            lambda p: torch.optim.SGD([{"params": p[:1]}, {"params": p[1:], "nesterov": True}], momentum=0.9),
            ["nesterov=[False, True]"],
        ),
        (
            lambda p: torch.optim.RMSprop([{"params": p[:1]}, {"params": p[1:], "centered": True}]),
            ["centered=[False, True]"],
        ),
        (lambda p: torch.optim.Adam([torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))]), ["complex"]),
    ],
)  # fmt: skip
def test_unknown_optimizers_are_refused_by_name(make, words):
    with pytest.raises(UnknownOptimizer) as caught:
        rule_of(make(leaves()))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("rule", [SGD(), RMSprop(centered=True)])
def test_momentum_without_a_velocity_is_refused(rule):
    parameter, slots, gradient = inputs_of(rule)
    for use in (lambda: rule.apply(parameter, slots, gradient, HYPER), lambda: rule.step_size(slots, HYPER)):
        with pytest.raises(InputError, match=r"momentum 0\.8.*has no velocity.*momentum=True"):
            use()
    with pytest.raises(InputError, match="look ahead"):
        SGD(nesterov=True)
