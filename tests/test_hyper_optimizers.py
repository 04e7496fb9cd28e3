"""Optimizers that learn their rates: right in their one-step derivatives, torch's own where nothing is learned, drop-in."""

import copy
import gc
import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from retrograd.errors import InputError, NonFinite
from retrograd.optim import HyperAdam, HyperSGD
from retrograd.update_rules import SGD, Adam, AdamW
from tests.tolerances import TOLERANCES

EXACT = TOLERANCES["exact_vs_autograd"]
SGDS = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.5, "maximize": True},
]
ADAMS = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"betas": (0.5, 0.7), "eps": 1e-2, "maximize": True},
]
KINDS = [*((HyperSGD, options) for options in SGDS), *((HyperAdam, options) for options in ADAMS)]
every_kind = pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda value: getattr(value, "__name__", str(value)))
both_levels = pytest.mark.parametrize("hyper", ["sgd", "adam"])


def leaves(dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draw, dtype=dtype)) for shape in [(4, 3), (3,), ()]]


def loss_of(parameters, step):
    """A bumpy loss of the parameters, another one at each step: what a mini-batch makes of it."""
    return torch.stack([((leaf - 0.3 * step).sin() + 0.1 * leaf.square()).sum() for leaf in parameters]).sum()


def train(optimizer, parameters, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(parameters, step).backward()
        optimizer.step()


def torch_twin(kind, parameters, lr, **options):
    if kind is HyperSGD:
        return torch.optim.SGD(parameters, lr=lr, **options)
    twin = torch.optim.AdamW if options.pop("decoupled_weight_decay", False) else torch.optim.Adam
    return twin(parameters, lr=lr, **options)


# Derivatives


def look_ahead(kind, options, lr, warm=3):
    """ρ, the logits of β, and L_{t+1} differentiably by them: through the update rule of this library, by autograd."""
    parameters = leaves()
    plain = torch_twin(kind, parameters, lr, **options)
    train(plain, parameters, warm)
    rule = {HyperSGD: SGD(bool(options.get("momentum")), bool(options.get("nesterov"))), HyperAdam: Adam()}[kind]
    if options.get("decoupled_weight_decay"):
        rule = AdamW()
    rule = type(rule)(**{**vars(rule), "maximize": bool(options.get("maximize"))})
    rho = torch.zeros((), dtype=torch.float64, requires_grad=True)
    betas = options.get("betas", (0.9, 0.999))
    logits = [torch.tensor(math.log(b / (1 - b)), dtype=torch.float64, requires_grad=True) for b in betas]
    gradients = torch.autograd.grad(loss_of(parameters, warm), parameters)
    moved = []
    for leaf, gradient in zip(parameters, gradients, strict=True):
        state, group = plain.state[leaf], plain.param_groups[0]
        slots = {slot: state[name].clone() for slot, name in rule.torch_slots.items() if slot in rule.slots}
        hyper = {**type(rule).hyper_from_torch(group, state), "learning_rate": lr * rho.exp()}
        if kind is HyperAdam:
            hyper |= {name: logit.sigmoid() for name, logit in zip(("beta1", "beta2"), logits, strict=True)}
        moved.append(rule.apply(leaf.detach(), slots, gradient, hyper)[0])
    loss = loss_of(moved, warm + 1) * (-1 if options.get("maximize") else 1)
    return rho, logits, loss


@every_kind
@both_levels
def test_learned_step_is_that_of_autograd_through_one_step(kind, options, hyper):
    lr, kappa = 0.05, 0.002
    rho, logits, loss = look_ahead(kind, options, lr)
    slope = torch.autograd.grad(loss, rho, retain_graph=True)[0].item()
    expected = math.log(1 - kappa * slope / lr / lr) if hyper == "sgd" else -kappa * math.copysign(1, slope)

    parameters = leaves()
    factors = {"beta_hyper_lr": kappa} if kind is HyperAdam else {}
    optimizer = kind(parameters, lr=lr, hyper=hyper, hyper_lr=0.0, **options)
    train(optimizer, parameters, 3)
    optimizer.param_groups[0].update(hyper_lr=kappa, **factors)
    train(optimizer, parameters, 2, start=3)
    found = optimizer.hyperparameters()[0]
    assert math.log(found["learning_rate"] / lr) == pytest.approx(expected, rel=EXACT)
    level = optimizer.param_groups[0]["learned"]["lr"]
    assert level["response"] == pytest.approx(expected if hyper == "adam" else 1 - math.exp(-expected), rel=EXACT)
    slopes = {"lr": slope}
    if kind is HyperAdam:
        slopes |= dict(zip(("beta1", "beta2"), (slope.item() for slope in torch.autograd.grad(loss, logits)), strict=True))
        for name, logit in zip(("beta1", "beta2"), logits, strict=True):
            change = -kappa * (slopes[name] if hyper == "sgd" else math.copysign(1, slopes[name]))
            assert optimizer.param_groups[0]["learned"][name]["value"] == pytest.approx(change, rel=EXACT)
            assert found[name] == pytest.approx(torch.sigmoid(logit + change).item(), rel=1e-14)
    if hyper == "adam":
        for name, own in slopes.items():
            assert optimizer.param_groups[0]["learned"][name]["first_moment"] == pytest.approx(0.1 * own, rel=EXACT)


@both_levels
def test_third_level_is_that_of_autograd_through_two_steps(hyper):
    """κ moves ρ, ρ moves θ: differentiate L_{t+2} by log κ with everything older held."""
    kappa, top, lr = 0.002, 1e-6 if hyper == "sgd" else 0.003, 0.05
    optimizer = HyperSGD(parameters := leaves(), lr=lr, hyper=hyper, hyper_lr=kappa, hyper_hyper_lr=top)
    train(optimizer, parameters, 2)
    held = [leaf.detach().clone() for leaf in parameters]  # θ₂, moved at α₁, which κ has made from α₀
    level = optimizer.param_groups[0]["learned"]["lr"]
    before = leaves()  # θ₀ and θ₁, to make α₁ and θ₂ once more, differentiably
    g0 = torch.autograd.grad(loss_of(before, 0), before)
    theta1 = [(leaf.detach() - lr * g).requires_grad_() for leaf, g in zip(before, g0, strict=True)]
    g1 = torch.autograd.grad(loss_of(theta1, 1), theta1)
    slope = -lr * torch.stack([(a * b).sum() for a, b in zip(g1, g0, strict=True)]).sum()
    log_kappa = torch.tensor(math.log(kappa), dtype=torch.float64, requires_grad=True)
    change = (1 - log_kappa.exp() * slope / lr**2).log() if hyper == "sgd" else -log_kappa.exp() * slope.sign()
    assert level["value"] == pytest.approx(change.item(), rel=EXACT)
    theta2 = [leaf.detach() - lr * change.exp() * g for leaf, g in zip(theta1, g1, strict=True)]
    for left, right in zip(theta2, held, strict=True):
        torch.testing.assert_close(left.detach(), right, rtol=EXACT, atol=EXACT)
    by_kappa = torch.autograd.grad(loss_of(theta2, 2), log_kappa)[0].item()
    train(optimizer, parameters, 1, start=2)
    expected = math.log(1 - top * by_kappa / kappa**2) if hyper == "sgd" else -top * math.copysign(1, by_kappa)
    assert 1e-6 < abs(expected) < 1  # the clip plays no part
    assert optimizer.param_groups[0]["learned"]["hyper_lr"]["value"] == pytest.approx(expected, rel=EXACT)
    assert optimizer.hyperparameters()[0]["hyper_learning_rate"] == pytest.approx(kappa * math.exp(expected), rel=EXACT)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_within_the_clip_steps_are_those_of_the_paper(momentum):
    """A naive twin, parameter by parameter: α ← α + κ⟨g, d⟩, then θ ← θ − αd."""
    parameters, twins = leaves(), [leaf.detach().clone() for leaf in leaves()]
    optimizer = HyperSGD(parameters, lr=0.05, momentum=momentum, hyper="sgd", hyper_lr=1e-4, hyper_clip=50.0)
    rate, velocities, last = 0.05, [torch.zeros_like(twin) for twin in twins], None
    for step in range(30):
        train(optimizer, parameters, 1, start=step)
        gradients = torch.autograd.grad(loss_of([twin.requires_grad_() for twin in twins], step), twins)
        if last is not None:
            rate += 1e-4 * sum((g * d).sum().item() for g, d in zip(gradients, last, strict=True))
        velocities = [momentum * v + g for v, g in zip(velocities, gradients, strict=True)]
        last = [v.clone() for v in velocities]
        twins = [(twin - rate * d).detach() for twin, d in zip(twins, last, strict=True)]
        assert optimizer.param_groups[0]["applied_lr"] == pytest.approx(rate, rel=1e-12)
    for leaf, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(leaf.detach(), twin, rtol=EXACT, atol=EXACT)


def test_adam_above_is_torch_adam_on_the_logarithm():
    parameters, rho = leaves(), nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = HyperSGD(parameters, lr=0.05, hyper="adam", hyper_lr=0.02)
    above = torch.optim.Adam([rho], lr=0.02, eps=0.0)
    last = None
    for step in range(20):
        gradients = torch.autograd.grad(loss_of(parameters, step), parameters)
        if last is not None:
            inner = sum((g * d).sum() for g, d in zip(gradients, last, strict=True))
            rho.grad = -optimizer.param_groups[0]["applied_lr"] * inner
            above.step()
        last = gradients
        train(optimizer, parameters, 1, start=step)
        assert optimizer.param_groups[0]["learned"].get("lr", {"value": 0.0})["value"] == pytest.approx(rho.item(), rel=1e-10)


@pytest.mark.parametrize(("slope", "expected"), [(1.0, -0.5), (-1.0, 0.5)])
def test_clip_bounds_the_logarithm_and_keeps_the_rate_positive(slope, expected):
    """Uphill without a clip, the paper's step would make the rate negative."""
    theta = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = HyperSGD([theta], lr=0.1, hyper="sgd", hyper_lr=10.0, hyper_clip=0.5)
    for gradient in (1.0, -slope):
        theta.grad = torch.full_like(theta, gradient)
        optimizer.step()
    assert optimizer.hyperparameters()[0]["learning_rate"] == pytest.approx(0.1 * math.exp(expected), rel=1e-12)
    assert optimizer.param_groups[0]["learned"]["lr"]["response"] == 0.0


def test_learned_factors_stay_finite_where_the_second_moment_is_zero():
    theta = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = HyperAdam([theta], lr=0.1, beta_hyper_lr=0.01)
    for _ in range(4):
        theta.grad = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
        optimizer.step()
    assert theta[0] == 1
    assert all(math.isfinite(value) for value in optimizer.hyperparameters()[0].values())


# Equal to torch.optim where nothing is learned


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_torch_bit_for_bit_where_nothing_is_learned(kind, options, dtype):
    mine, theirs = leaves(dtype), leaves(dtype)
    ours, twin = kind(mine, lr=0.05, hyper_lr=0.0, **options), torch_twin(kind, theirs, 0.05, **options)
    train(ours, mine, 30)
    train(twin, theirs, 30)
    for left, right in zip(mine, theirs, strict=True):
        assert torch.equal(left, right)
    assert not any(key.startswith("direction") for state in ours.state.values() for key in state)


@every_kind
def test_groups_learn_on_their_own(kind, options):
    first, *others = leaves()
    optimizer = kind([{"params": others}, {"params": [first], "lr": 0.01, "hyper_lr": 0.0}], lr=0.05, **options)
    train(optimizer, [first, *others], 10)
    alone = leaves()
    twin = torch_twin(kind, alone[:1], 0.01, **options)
    train(twin, alone[:1], 10)
    assert torch.equal(first, alone[0])
    rates = [group["learning_rate"] for group in optimizer.hyperparameters()]
    assert rates[1] == 0.01
    assert rates[0] != 0.05
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "hyper": "sgd"})
    assert len(optimizer.hyperparameters()) == 3


# In the place of torch.optim


@pytest.mark.parametrize(
    ("kind", "options"), [(HyperSGD, {"momentum": 0.9}), (HyperSGD, {}), (HyperAdam, {"beta_hyper_lr": 0.01})]
)
@both_levels
def test_state_dict_continues_bit_for_bit(kind, options, hyper, tmp_path):
    def make(parameters):
        return kind(parameters, lr=0.02, hyper=hyper, hyper_lr=0.02, hyper_hyper_lr=0.01, **options)

    whole, halves = leaves(), leaves()
    train(uninterrupted := make(whole), whole, 12)
    train(first := make(halves), halves, 6)
    saved = first.state_dict()
    torch.save(saved, tmp_path / "state.pt")
    learned = copy.deepcopy([group["learned"] for group in saved["param_groups"]])
    resumed = [nn.Parameter(leaf.detach().clone()) for leaf in halves]
    train(first, halves, 2, start=6)
    assert [group["learned"] for group in saved["param_groups"]] == learned  # a saved dictionary does not learn on
    second = make(resumed)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(second, resumed, 6, start=6)
    for left, right in zip(whole, resumed, strict=True):
        assert torch.equal(left, right)
    assert second.hyperparameters() == uninterrupted.hyperparameters()


def test_copies_and_their_originals_go_their_own_ways():
    parameters = leaves()
    train(optimizer := HyperAdam(parameters, lr=0.02), parameters, 3)
    twin = copy.deepcopy(optimizer)
    before = twin.hyperparameters()
    train(optimizer, parameters, 3)
    assert twin.hyperparameters() == before != optimizer.hyperparameters()


@every_kind
def test_goes_on_from_a_state_that_torch_has_saved(kind, options):
    mine, theirs = leaves(), leaves()
    twin = torch_twin(kind, theirs, 0.05, **options)
    train(twin, theirs, 5)
    for left, right in zip(mine, theirs, strict=True):
        left.data.copy_(right.data)
    optimizer = kind(mine, lr=0.3, **options)
    optimizer.load_state_dict(copy.deepcopy(twin.state_dict()))  # torch shares the tensors
    train(optimizer, mine, 1, start=5)
    train(twin, theirs, 1, start=5)
    for left, right in zip(mine, theirs, strict=True):
        assert torch.equal(left, right)
    train(optimizer, mine, 1, start=6)
    assert optimizer.hyperparameters()[0]["learning_rate"] != 0.05


def test_a_state_of_amsgrad_is_refused():
    parameters = leaves()
    train(twin := torch.optim.Adam(parameters, amsgrad=True), parameters, 1)
    with pytest.raises(InputError, match=r"amsgrad=True.*new optimizer"):
        HyperAdam(parameters).load_state_dict(twin.state_dict())


SCHEDULERS = {
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
    "warm-up from 0": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 5, 1.0)),
    "step": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5),
    "one cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("kind", [HyperSGD, HyperAdam])
def test_schedulers_multiply_what_is_learned(make, kind):
    options: dict[str, Any] = {"momentum": 0.9} if kind is HyperSGD else {}
    parameters, others = leaves(), leaves()
    optimizer, plain = kind(parameters, lr=0.02, **options), torch_twin(kind, others, 0.02, **options)
    schedule, twin = make(optimizer), make(plain)
    for step in range(15):
        train(optimizer, parameters, 1, start=step)
        train(plain, others, 1, start=step)
        schedule.step()
        twin.step()
        group = optimizer.param_groups[0]
        assert group["lr"] == plain.param_groups[0]["lr"]
        factor = math.exp(group["learned"]["lr"]["value"]) if "lr" in group["learned"] else 1.0
        assert optimizer.hyperparameters()[0]["learning_rate"] == pytest.approx(group["lr"] * factor, rel=1e-15)
    assert factor != 1.0


def test_freezing_keeps_the_factor_and_thawing_starts_afresh():
    parameters = leaves()
    train(optimizer := HyperSGD(parameters, lr=0.02), parameters, 5)
    learned = optimizer.hyperparameters()
    optimizer.param_groups[0]["hyper_lr"] = 0.0
    train(optimizer, parameters, 5)
    assert optimizer.hyperparameters()[0]["learning_rate"] == learned[0]["learning_rate"]
    optimizer.param_groups[0]["hyper_lr"] = 0.03
    train(optimizer, parameters, 1)  # there is no direction yet that this gradient could judge
    assert optimizer.hyperparameters() == learned
    train(optimizer, parameters, 1)
    assert optimizer.hyperparameters() != learned


def test_closure_is_called_once_with_gradients_on():
    parameters, calls = leaves(), []
    optimizer = HyperAdam(parameters)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(parameters, len(calls))
        loss.backward()
        calls.append(loss.item())
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == calls[0]
    assert len(calls) == 1


def test_parameters_without_a_gradient_stay_and_have_no_say():
    """A parameter left out of one step has no direction of that step, whatever its gradient is in the next."""
    used, unused = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = HyperSGD([used, unused], lr=0.1, momentum=0.9, hyper="sgd", hyper_lr=0.01)
    with_gradients = [(used, unused), (used,), (used, unused)]
    for present in with_gradients:
        used.grad = unused.grad = None
        for leaf in present:
            leaf.grad = torch.ones_like(leaf)
        before = optimizer.hyperparameters()[0]["learning_rate"]
        optimizer.step()
    velocity = 1 + 0.9  # of `used` after two steps; `unused` had one gradient, but did not move in the second
    after = optimizer.hyperparameters()[0]["learning_rate"]
    assert after - before == pytest.approx(0.01 * 2 * velocity, rel=1e-10)
    used.grad = unused.grad = None
    optimizer.step()
    assert optimizer.hyperparameters()[0]["learning_rate"] == after


@pytest.mark.parametrize("kind", [HyperSGD, HyperAdam])
def test_keeps_no_graph_and_grows_no_memory(kind):
    parameters = leaves()
    optimizer = kind(parameters, lr=0.02)
    identities = [id(leaf) for leaf in parameters]
    addresses = [leaf.data_ptr() for leaf in parameters]

    def tensors():
        gc.collect()
        return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())

    train(optimizer, parameters, 3)
    before = tensors()
    train(optimizer, parameters, 20)
    assert tensors() == before
    assert [id(leaf) for leaf in parameters] == identities
    assert [leaf.data_ptr() for leaf in parameters] == addresses
    kept = itertools.chain(*(state.values() for state in optimizer.state.values()), (leaf.grad for leaf in parameters))
    assert not any(getattr(value, "requires_grad", False) for value in kept)
    assert all(type(value) in (float, int) for value in optimizer.param_groups[0]["learned"]["lr"].values())


def test_the_gradient_may_be_zeroed_in_place_between_steps():
    """The direction of plain SGD is the gradient, which belongs to the loop: it is copied."""
    one, other = leaves(), leaves()
    first, second = HyperSGD(one, lr=0.02), HyperSGD(other, lr=0.02)
    for step in range(4):
        first.zero_grad(set_to_none=False)
        loss_of(one, step).backward()
        first.step()
        train(second, other, 1, start=step)
    assert first.hyperparameters() == second.hyperparameters()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_in_single(dtype):
    theta = nn.Parameter(torch.zeros(1000, dtype=dtype))
    optimizer = HyperSGD([theta], lr=1e-3, hyper="sgd", hyper_lr=1e-9)
    for _ in range(2):
        theta.grad = torch.full_like(theta, 16.0)
        optimizer.step()
    assert optimizer.hyperparameters()[0]["learning_rate"] == pytest.approx(1e-3 + 1e-9 * 256_000, rel=1e-10)


# Refusals


@pytest.mark.parametrize("kind", [HyperSGD, HyperAdam])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_hypergradients_are_raised_and_change_nothing(kind, bad):
    parameters = leaves()
    optimizer = kind([("weight", parameters[0]), ("bias", parameters[1]), ("scale", parameters[2])], lr=0.02)
    train(optimizer, parameters, 3)
    held, learned = [leaf.detach().clone() for leaf in parameters], optimizer.hyperparameters()
    assert parameters[1].grad is not None
    parameters[1].grad[2] = bad
    with pytest.raises(NonFinite, match=r"group 0 is .* after 2 finite ones: the gradient of parameter bias, shape \(3,\)"):
        optimizer.step()
    assert optimizer.hyperparameters() == learned
    for leaf, before in zip(parameters, held, strict=True):
        assert torch.equal(leaf, before)


def test_overflow_and_a_bad_last_direction_are_told_apart():
    theta = nn.Parameter(torch.zeros(2))
    optimizer = HyperSGD([theta], lr=1e-3)
    theta.grad = torch.full_like(theta, 1e30)
    optimizer.step()
    with pytest.raises(NonFinite, match="inner product overflows, though gradients are finite"):
        optimizer.step()
    optimizer = HyperSGD([theta], lr=1e-3)
    theta.grad = torch.full_like(theta, math.inf)
    optimizer.step()
    theta.grad = torch.ones_like(theta)
    with pytest.raises(NonFinite, match="the last direction of parameter number 0"):
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: HyperSGD(p, lr=-0.1), ["lr must be", "-0.1"]),
        (lambda p: HyperSGD(p, hyper="lion"), ["'sgd' or 'adam'", "'lion'"]),
        (lambda p: HyperSGD(p, hyper_lr=math.inf), ["hyper_lr", "finite", "inf"]),
        (lambda p: HyperSGD(p, hyper_clip=0.0), ["hyper_clip", "above 0"]),
        (lambda p: HyperSGD(p, momentum=-0.5), ["momentum", "-0.5"]),
        (lambda p: HyperSGD(p, nesterov=True), ["nesterov needs momentum"]),
        (lambda p: HyperSGD([{"params": p, "hyper_hyper_lr": -1.0}]), ["hyper_hyper_lr", "-1.0"]),
        (lambda p: HyperAdam(p, betas=(0.9, 1.0)), ["betas", "below 1", "(0.9, 1.0)"]),
        (lambda p: HyperAdam(p, betas=(0.0, 0.9), beta_hyper_lr=0.1), ["betas must be above 0"]),
        (lambda p: HyperAdam(p, eps=-1.0), ["eps", "-1.0"]),
        (lambda p: HyperAdam(p, beta_hyper_lr=math.nan), ["beta_hyper_lr", "nan"]),
        (lambda p: HyperSGD([nn.Parameter(torch.zeros(2, dtype=torch.complex64))]), ["complex", "view_as_real"]),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(make, words):
    with pytest.raises(InputError) as caught:
        make(leaves())
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("kind", [HyperSGD, HyperAdam])
def test_sparse_gradients_are_refused(kind):
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match=rf"sparse; {kind.__name__} takes dense ones.*sparse=False"):
        kind(table.parameters()).step()


@both_levels
def test_training_starts_from_a_rate_wrong_by_powers_of_ten(hyper):
    def final_loss(make):
        draw = torch.Generator().manual_seed(0)
        inputs = torch.randn(64, 8, generator=draw)
        targets = inputs @ torch.randn(8, 1, generator=draw)
        model = nn.Linear(8, 1)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        optimizer = make(model.parameters())
        for _ in range(200):
            optimizer.zero_grad()
            (loss := nn.functional.mse_loss(model(inputs), targets)).backward()
            optimizer.step()
        return loss.item() / targets.square().mean().item()

    assert final_loss(lambda p: torch.optim.SGD(p, lr=1e-5)) > 0.9
    assert final_loss(lambda p: HyperSGD(p, lr=1e-5, hyper=hyper, hyper_lr=0.1)) < 0.05
