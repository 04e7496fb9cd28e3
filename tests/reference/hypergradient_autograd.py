"""Everything that went into a run as leaves of one autograd graph through the whole of it.

Only what was recorded of the steps is taken from the run: ids, seeds and hyperparameters. The optimizers are those of
``unrolled_autograd.py``, the losses the objectives of ``setups.py``. States are flat dictionaries as there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retrograd import Trajectory
from tests.cases import Rule
from tests.reference.unrolled_autograd import OPTIMIZERS, State, measurements, part, slot_names
from tests.setups import CLASSES, Setup

Leaves = dict[str, Any]
"""Name of an input → leaf, or Params of leaves: hyperparameters [step, group], ``clip_norm`` [step], the rest as it went in."""


def leaves_of(setup: Setup, run: Trajectory) -> Leaves:
    """All inputs of a run, as leaves."""
    model = setup.case.model()
    inputs, targets = setup.examples
    hyper = [record.hyper for record in run.records]
    found: Leaves = {
        name: torch.tensor([[own[name] for own in step] for step in hyper], dtype=torch.float64) for name in hyper[0][0]
    }
    found.pop("step", None)
    found |= {
        "example_weights": setup.case.all_weights.clone(),
        "inputs": inputs.clone(),
        "labels": targets.clone() if targets.is_floating_point() else F.one_hot(targets, CLASSES).double(),
        "initial_params": {name: run.state(0).params.get(name, leaf).detach() for name, leaf in model.named_parameters()},
        "initial_buffers": {
            name: run.state(0).buffers[name].clone() for name, leaf in model.named_buffers() if leaf.is_floating_point()
        },
        "meta": {name: leaf.clone() for name, leaf in run.update_map.meta.items()},
    }
    if setup.case.clip_norm is not None:
        found["clip_norm"] = torch.full((len(run),), setup.case.clip_norm, dtype=torch.float64)
    return {name: _as_leaves(value) for name, value in found.items()}


def _as_leaves(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: leaf.clone().requires_grad_() for name, leaf in value.items()}
    return value.requires_grad_()


def options_of(rule: Rule, run: Trajectory, leaves: Leaves, number: int, group: int) -> dict:
    """What torch's optimizer of this rule would call the hyperparameters of a step."""
    own = {name: leaves[name][number, group] for name in run.records[number].hyper[group] if name in leaves}
    kept = {name: value for name, value in rule.options.items() if name in ("nesterov", "centered")}
    named = {"learning_rate": "lr", "epsilon": "eps", "epsilon_root": "eps_root", "smoothing": "alpha"}
    found = {**kept, **{named.get(name, name): value for name, value in own.items()}}
    if not rule.options.get("momentum"):
        found.pop("momentum", None)
    return {**found, "betas": (own["beta1"], own["beta2"])} if "beta1" in own else found


def step(
    setup: Setup, rule: Rule, run: Trajectory, leaves: Leaves, state: State, number: int, taken: int | None = None
) -> tuple[State, Tensor]:
    """One step, differentiable in the state and in everything else; also the norm of the gradient.

    ``taken`` is the number of steps that Adam is to think it has made, if not ``number`` + 1.
    """
    case, record = setup.case, run.records[number]
    ids = record.example_ids
    trained = [name for group in run.update_map.groups for name in group]
    params = {
        name: leaf if leaf.requires_grad else leaf.clone().requires_grad_() for name, leaf in part(state, "params/").items()
    }
    draw = torch.Generator().manual_seed(record.seed)

    def predict(inputs: Tensor) -> tuple[Tensor, dict]:
        return case.formula(params, part(state, "buffers/"), inputs, draw)

    batch = (leaves["inputs"][ids], leaves["labels"][ids], leaves["example_weights"][ids])
    loss, buffers = setup.objective(predict, *batch, leaves["meta"], number)
    trained = [name for name in params if name in trained]
    grads = dict(zip(trained, torch.autograd.grad(loss, [params[name] for name in trained], create_graph=True), strict=True))
    norm = sum((grad**2).sum() for grad in grads.values()) ** 0.5
    if "clip_norm" in leaves and norm > leaves["clip_norm"][number]:
        grads = {name: grad * leaves["clip_norm"][number] / (norm + 1e-6) for name, grad in grads.items()}
    new = dict(state)
    for group, names in enumerate(run.update_map.groups):
        for name in names:
            slots = {slot: state[f"slots/{slot}/{name}"] for slot in slot_names(rule)}
            own = options_of(rule, run, leaves, number, group)
            count = number + 1 if taken is None else taken
            theta, slots = OPTIMIZERS[rule.optimizer](params[name], slots, grads[name], own, count)
            new[f"params/{name}"] = theta
            new |= {f"slots/{slot}/{name}": leaf for slot, leaf in slots.items()}
    return new | {f"buffers/{name}": leaf for name, leaf in buffers.items()}, norm.detach()


def start(rule: Rule, run: Trajectory, leaves: Leaves) -> State:
    trained = [name for group in run.update_map.groups for name in group]
    zeros = {
        f"slots/{slot}/{name}": torch.zeros_like(leaves["initial_params"][name])
        for slot in slot_names(rule)
        for name in trained
    }
    state = {f"params/{name}": leaf for name, leaf in leaves["initial_params"].items()} | zeros
    return state | {f"buffers/{name}": leaf for name, leaf in leaves["initial_buffers"].items()}


def train(setup: Setup, rule: Rule, run: Trajectory, leaves: Leaves, last: int | None = None) -> tuple[State, list[float]]:
    """Return the final state, differentiable in what the ``last`` steps (None: all) saw, and the norms of all gradients."""
    state, norms = start(rule, run, leaves), []
    for number in range(len(run)):
        if last is not None and number == len(run) - last:
            state = {name: leaf.detach() for name, leaf in state.items()}
        state, norm = step(setup, rule, run, leaves, state, number)
        norms.append(norm.item())
    return state, norms


def ask(setup: Setup, state: State, inputs: Tensor, targets: Tensor) -> Tensor:
    """The measurements of queries in evaluation mode."""
    outputs, _ = setup.case.formula(part(state, "params/"), part(state, "buffers/"), inputs, None)
    return measurements(setup.case, outputs, targets)


def gradients(asked: Tensor, leaves: Leaves) -> Leaves:
    """d asked / d leaf, an axis ``query`` in front."""

    flat = {(name, own): leaf for name, value in leaves.items() for own, leaf in _as_dict(value).items()}
    rows = [torch.autograd.grad(value, list(flat.values()), retain_graph=True, allow_unused=True) for value in asked]
    found: Leaves = {}
    for (name, own), leaf, column in zip(flat, flat.values(), zip(*rows, strict=True), strict=True):
        stacked = torch.stack([torch.zeros_like(leaf) if row is None else row for row in column])
        if isinstance(leaves[name], dict):
            found.setdefault(name, {})[own] = stacked
        else:
            found[name] = stacked
    return {name: found.get(name, {}) for name in leaves}


def _as_dict(value: Any) -> dict[str, Tensor]:
    return value if isinstance(value, dict) else {"": value}


def hypergradients(setup: Setup, rule: Rule, run: Trajectory, last: int | None = None) -> tuple[Leaves, list[float]]:
    """Derivatives of the case's queries by all inputs, and the norms of all gradients on the way."""
    leaves = leaves_of(setup, run)
    state, norms = train(setup, rule, run, leaves, last)
    return gradients(ask(setup, state, *setup.case.queries), leaves), norms
