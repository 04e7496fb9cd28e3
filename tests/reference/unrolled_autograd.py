"""A training run in plain differentiable torch, with its own optimizers, and autograd through the whole of it.

Nothing of the package's mathematics is used: only the order of the examples and the seed of each step are taken from the
recorded run. States are flat dictionaries, ``params/NAME``, ``slots/SLOT/NAME`` and ``buffers/NAME``.

With ``gauss_newton`` the gradient of a step, Jᵀ r with r = ∂L/∂outputs, has the same value, but J counts as a constant: its
derivative is Jᵀ (∂r/∂outputs) J, the batch's Gauss-Newton matrix.
"""

from typing import Any

import torch
from torch import Tensor

from retrograd import Classification, Trajectory
from tests.cases import Case, Rule

State = dict[str, Tensor]


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers as their papers (and torch's documentation) write them; t counts from 1


def root(square: Tensor) -> Tensor:
    """√ with derivative 0 at exactly 0: there all gradients so far were 0, for any weights (a unit that is dropped out)."""
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square) ** 0.5)


def sgd(theta: Tensor, slots: State, g: Tensor, o: dict, t: int) -> tuple[Tensor, State]:
    mu = o.get("momentum", 0.0)
    g = g + o.get("weight_decay", 0.0) * theta
    if mu == 0.0:
        return theta - o["lr"] * g, {}
    b = g if t == 1 else mu * slots["velocity"] + (1 - o.get("dampening", 0.0)) * g
    return theta - o["lr"] * (g + mu * b if o.get("nesterov") else b), {"velocity": b}


def adam(theta: Tensor, slots: State, g: Tensor, o: dict, t: int, decoupled: bool = False) -> tuple[Tensor, State]:
    beta1, beta2 = o["betas"]
    decay = o.get("weight_decay", 0.0)
    if decoupled:
        theta = theta - o["lr"] * decay * theta
    else:
        g = g + decay * theta
    m = beta1 * slots["first_moment"] + (1 - beta1) * g
    v = beta2 * slots["second_moment"] + (1 - beta2) * g**2
    step = (m / (1 - beta1**t)) / (root(v / (1 - beta2**t) + o.get("eps_root", 0.0)) + o["eps"])
    return theta - o["lr"] * step, {"first_moment": m, "second_moment": v}


def adamw(theta: Tensor, slots: State, g: Tensor, o: dict, t: int) -> tuple[Tensor, State]:
    return adam(theta, slots, g, o, t, decoupled=True)


def rmsprop(theta: Tensor, slots: State, g: Tensor, o: dict, t: int) -> tuple[Tensor, State]:
    alpha, mu = o["alpha"], o.get("momentum", 0.0)
    g = g + o.get("weight_decay", 0.0) * theta
    new = {"mean_square": alpha * slots["mean_square"] + (1 - alpha) * g**2}
    variance = new["mean_square"]
    if o.get("centered"):
        new["mean_gradient"] = alpha * slots["mean_gradient"] + (1 - alpha) * g
        variance = variance - new["mean_gradient"] ** 2
    direction = g / (root(variance) + o["eps"])
    if mu:
        direction = new["velocity"] = mu * slots["velocity"] + direction
    return theta - o["lr"] * direction, new


OPTIMIZERS: dict[Any, Any] = {
    torch.optim.SGD: sgd,
    torch.optim.Adam: adam,
    torch.optim.AdamW: adamw,
    torch.optim.RMSprop: rmsprop,
}
SLOTS: dict[Any, tuple[str, ...]] = {}  # of optimizers that other modules add, as ``game_optimizers.py`` does


def slot_names(rule: Rule) -> tuple[str, ...]:
    if rule.optimizer in SLOTS:
        return SLOTS[rule.optimizer]
    momentum = ("velocity",) if rule.options.get("momentum") else ()
    if rule.optimizer is torch.optim.SGD:
        return momentum
    if rule.optimizer is torch.optim.RMSprop:
        return ("mean_square", *(("mean_gradient",) if rule.options.get("centered") else ()), *momentum)
    return ("first_moment", "second_moment")


# ---------------------------------------------------------------------------------------------------------------------
# One step, and the run


def part(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): leaf for name, leaf in state.items() if name.startswith(prefix)}


def losses(case: Case, outputs: Tensor, targets: Tensor) -> Tensor:
    if isinstance(case.task, Classification):
        rows = torch.arange(len(targets))
        return torch.log(torch.exp(outputs).sum(1)) - outputs[rows, targets]
    return ((outputs - targets) ** 2).sum(1) / outputs.shape[1]


def measurements(case: Case, outputs: Tensor, targets: Tensor) -> Tensor:
    if isinstance(case.task, Classification):  # log p - log(1 - p)
        p = (torch.exp(outputs) / torch.exp(outputs).sum(1, keepdim=True))[torch.arange(len(targets)), targets]
        return torch.log(p) - torch.log(1 - p)
    return outputs.sum(1) / outputs.shape[1]


def initial_state(case: Case, rule: Rule) -> State:
    model = case.model()
    params = {name: leaf.detach().clone() for name, leaf in model.named_parameters()}
    trained = [name for name in params if name not in case.frozen]
    state = {f"params/{name}": leaf for name, leaf in params.items()}
    state |= {f"slots/{slot}/{name}": torch.zeros_like(params[name]) for slot in slot_names(rule) for name in trained}
    return state | {f"buffers/{name}": leaf.clone() for name, leaf in model.named_buffers() if leaf.is_floating_point()}


def step(
    case: Case,
    rule: Rule,
    state: State,
    weights: Tensor,
    ids: Tensor,
    seed: int,
    number: int,
    gauss_newton: bool = False,
) -> tuple[State, Tensor]:
    """One step of training with ``weights [N]``, differentiable in state and weights; also the norm of the gradient."""
    inputs, targets = (column[ids] for column in case.examples)
    params = {
        name: leaf if leaf.requires_grad else leaf.clone().requires_grad_() for name, leaf in part(state, "params/").items()
    }
    draw = torch.Generator().manual_seed(seed)
    outputs, buffers = case.formula(params, part(state, "buffers/"), inputs, draw)
    loss = (weights[ids] * losses(case, outputs, targets)).sum() / len(ids)
    trained = [name for name in params if name not in case.frozen]
    if gauss_newton:
        (r,) = torch.autograd.grad(loss, outputs, create_graph=True)
        constant = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
        still = {name: leaf.detach() for name, leaf in part(state, "buffers/").items()}
        again = case.formula(constant, still, inputs, torch.Generator().manual_seed(seed))[0]
        found = torch.autograd.grad(again, [constant[name] for name in trained], r, create_graph=True)
    else:
        found = torch.autograd.grad(loss, [params[name] for name in trained], create_graph=True)
    grads = dict(zip(trained, found, strict=True))
    norm = sum((grad**2).sum() for grad in grads.values()) ** 0.5
    if case.clip_norm is not None and norm > case.clip_norm:  # clip_grad_norm_ guards its quotient with 1e-6
        grads = {name: grad * case.clip_norm / (norm + 1e-6) for name, grad in grads.items()}
    new = dict(state)
    for names, options in case.groups(rule):
        for name in names:
            if name in grads:
                slots = {slot: state[f"slots/{slot}/{name}"] for slot in slot_names(rule)}
                theta, slots = OPTIMIZERS[rule.optimizer](params[name], slots, grads[name], options, number + 1)
                new[f"params/{name}"] = theta
                new |= {f"slots/{slot}/{name}": leaf for slot, leaf in slots.items()}
    new |= {f"buffers/{name}": leaf for name, leaf in buffers.items()}
    return new, norm.detach()


def train(
    case: Case, rule: Rule, run: Trajectory, weights: Tensor, last: int | None = None, gauss_newton: bool = False
) -> tuple[State, list[float]]:
    """Return the final state, differentiable in the weights of the ``last`` steps (None: of all), and all gradient norms."""
    state, norms = initial_state(case, rule), []
    for number, entry in enumerate(run.records):
        if last is not None and number == len(run) - last:
            state = {name: leaf.detach() for name, leaf in state.items()}
        state, norm = step(case, rule, state, weights, entry.example_ids, entry.seed, number, gauss_newton)
        norms.append(norm.item())
    return state, norms


def ask(case: Case, state: State, inputs: Tensor, targets: Tensor, of: str = "measurements") -> Tensor:
    outputs, _ = case.formula(part(state, "params/"), part(state, "buffers/"), inputs, None)
    return (measurements if of == "measurements" else losses)(case, outputs, targets)


def scores_and_run(
    case: Case,
    rule: Rule,
    run: Trajectory,
    last: int | None = None,
    data: tuple | None = None,
    of: str = "measurements",
    gauss_newton: bool = False,
) -> tuple[Tensor, State, list[float]]:
    """d f_q / d w_i for all queries and examples, ``[query, example]``, by autograd through the run; final state and norms."""
    weights = case.all_weights.clone().requires_grad_()
    state, norms = train(case, rule, run, weights, last, gauss_newton)
    asked = ask(case, state, *(data or case.queries), of)
    found = torch.stack([torch.autograd.grad(value, weights, retain_graph=True)[0] for value in asked])
    return found, {name: leaf.detach() for name, leaf in state.items()}, norms


def scores(*args, **options) -> Tensor:
    return scores_and_run(*args, **options)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Dense Jacobians of one step


def jacobians(case: Case, rule: Rule, run: Trajectory, number: int, state: State) -> tuple[Tensor, Tensor]:
    """A = ∂s'/∂s ``[state, state]`` and B = ∂s'/∂w ``[state, batch]`` of one step; states flattened by sorted names.

    Reverse mode, row by row (`jacrev` written out, since the step contains a gradient of its own).
    """
    entry = run.records[number]
    names = sorted(state)

    def flat_step(vector: Tensor, own_weights: Tensor) -> Tensor:
        parts = vector.split([state[name].numel() for name in names])
        leaves = {name: values.view_as(state[name]) for name, values in zip(names, parts, strict=True)}
        weights = case.all_weights.index_put((entry.example_ids,), own_weights)
        new, _ = step(case, rule, leaves, weights, entry.example_ids, entry.seed, number)
        return torch.cat([new[name].flatten() for name in names])

    vector = torch.cat([state[name].flatten() for name in names])
    return torch.autograd.functional.jacobian(flat_step, (vector, case.all_weights[entry.example_ids]))
