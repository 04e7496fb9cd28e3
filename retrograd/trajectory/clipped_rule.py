"""The optimizer's half of a step: clipping and update rule, and their Jacobian products.

    g'       = c(g) = min(1, c / (‖g‖ + 1e-6)) · g
    (θ', o') = U(θ, o, g', h)

U is elementwise, so its Jacobian is a few numbers a coordinate; clipping mixes coordinates, by one direction:

    ∂g'/∂g = s (I − g gᵀ / (‖g‖ (‖g‖ + 1e-6))),     ∂g'/∂c = g / (‖g‖ + 1e-6),      s = c / (‖g‖ + 1e-6) < 1

and I, 0 where it is not active. ∂g'/∂g is symmetric: the same product serves tangents and costates.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from retrograd.errors import InputError
from retrograd.params import Params, Slots, batched_inner, flatten, unflatten
from retrograd.trajectory.rule_jacobian import Jacobian, combine, elementwise_jacobian, share
from retrograd.trajectory.state import StateVectors, TrainingState
from retrograd.update_rules import Hyper, UpdateRule

_JOINED = 1 << 16  # scalars: up to so many, starting torch's operations costs more than they do
_CLIP_GUARD = 1e-6  # torch.nn.utils.clip_grad_norm_ divides by the norm plus this


class ClippedRule:
    """U after c, for all parameters.

    Args:
        rule: U.
        groups: names of the parameters of each optimizer group.
        clip_norm: c, or None.
    """

    def __init__(self, rule: UpdateRule, groups: Sequence[Sequence[str]], clip_norm: float | None):
        self.rule, self.clip_norm, self.count = rule, clip_norm, len(groups)
        self.group_of = {name: index for index, group in enumerate(groups) for name in group}

    def apply(self, params: Params, slots: Slots, grads: Params, hyper: tuple[Hyper, ...]) -> tuple[Params, Slots]:
        """Apply U to clipped gradients. A parameter without gradient stays as it is, as in torch."""
        new_params, new_slots = dict(params), {slot: dict(leaves) for slot, leaves in slots.items()}
        for name, grad in grads.items():
            own = {slot: slots[slot][name] for slot in self.rule.slots}
            new_params[name], changed = self.rule.apply(params[name], own, grad, hyper[self.group_of[name]])
            for slot, leaf in changed.items():
                new_slots[slot][name] = leaf
        return new_params, new_slots

    def with_all_slots(self, vectors: StateVectors) -> StateVectors:
        """Fill slots that are left out of tangents or costates with zeros."""
        missing = [slot for slot in self.rule.slots if slot not in vectors.slots]
        zeros = {slot: {name: torch.zeros_like(leaf) for name, leaf in vectors.params.items()} for slot in missing}
        return replace(vectors, slots={**vectors.slots, **zeros}) if missing else vectors

    def clip(self, grads: Params) -> Params:
        """Apply c."""
        if self.clip_norm is None or not grads:
            return grads
        scale = torch.clamp(self.clip_norm / (_global_norm(grads) + _CLIP_GUARD), max=1.0)
        return {name: leaf * scale for name, leaf in grads.items()}

    def clips(self, grads: Params) -> bool:
        """Whether clipping is active at these gradients."""
        return self.clip_norm is not None and bool(grads) and bool(self.clip_norm < _global_norm(grads) + _CLIP_GUARD)

    def at(
        self, state: TrainingState, grads: Params, hyper: tuple[Hyper, ...], wrt: frozenset[str] = frozenset()
    ) -> "LinearisedRule":
        """Take the Jacobians at s_t and the batch gradient g; those by the hyperparameters that ``wrt`` names, too."""
        return LinearisedRule(self, state, {name: leaf.detach() for name, leaf in grads.items()}, hyper, wrt)


class LinearisedRule:
    """The Jacobians of U and c at one step, taken at the clipped gradient.

    Attributes:
        jacobians: of U, for each parameter that has a gradient.
        clips: whether clipping is active.
    """

    def __init__(self, parent: ClippedRule, state: TrainingState, grads: Params, hyper: tuple[Hyper, ...], wrt: frozenset[str]):
        self._parent, self._grads, self.clips = parent, grads, parent.clips(grads)
        self._by_clip_norm = "clip_norm" in wrt
        self.jacobians: dict[str, Jacobian] = {}
        clipped = parent.clip(grads)
        for names in _together(clipped, parent.group_of):
            numbers = hyper[parent.group_of[names[0]]]
            if "momentum" in wrt and numbers.get("momentum") == 0:
                raise InputError(
                    f"the group of {names[0]} has momentum 0, for which torch keeps no velocity, so the derivative by it is "
                    "not known. Train that group with momentum above 0, however small."
                )
            slots = {slot: state.slots[slot] for slot in parent.rule.slots}
            joined = [_join(own, names) for own in (state.params, clipped, *slots.values())]
            own = dict(zip(slots, joined[2:], strict=True))
            found = elementwise_jacobian(parent.rule, joined[0], own, joined[1], numbers, wrt & numbers.keys())
            self.jacobians |= _split(found, {name: grads[name] for name in names})
        self._numbers = {name: wrt & hyper[parent.group_of[name]].keys() for name in self.jacobians}

    def pull(self, costates: StateVectors) -> tuple[StateVectors, Params, dict[str, Tensor]]:
        """Pull back: (λ_θ', λ_o') → (a_θ, λ_o), γ, and the cotangents of hyperparameters, ``[query, group]``."""
        params, slots, gamma = {}, {slot: {} for slot in costates.slots}, {}
        by_hyper: dict[str, Tensor] = {}
        for name, leaf in costates.params.items():
            outgoing = {"parameter": leaf, **{slot: leaves[name] for slot, leaves in costates.slots.items()}}
            if name not in self.jacobians:
                pulled = outgoing
            else:
                pulled, jacobian = {}, self.jacobians[name]
                terms = {
                    source: [(jacobian[target][source], vector) for target, vector in outgoing.items()]
                    for source in (*outgoing, "gradient")
                }
                gamma[name] = combine(terms["gradient"], leaf)
                for source in outgoing:
                    ratio = None if source == "parameter" else share(terms[source], terms["gradient"])
                    pulled[source] = combine(terms[source], leaf) if ratio is None else gamma[name] * ratio
                    if any(pulled[source] is vector for other, vector in outgoing.items() if other != source):
                        pulled[source] = pulled[source].clone()  # in place, the other leaf may be overwritten first
                for number in self._numbers[name]:
                    total = by_hyper.setdefault(number, leaf.new_zeros(len(leaf), self._parent.count))
                    moved = combine([(jacobian[target][number], vector) for target, vector in outgoing.items()], leaf)
                    total[:, self._parent.group_of[name]] += moved.reshape(len(moved), -1).sum(1)
            params[name] = pulled["parameter"]
            for slot in costates.slots:
                slots[slot][name] = pulled[slot]
        if self._by_clip_norm:
            some = next(iter(costates.params.values()))
            along = batched_inner(gamma, self._clip_direction()) if self.clips else some.new_zeros(len(some))
            by_hyper["clip_norm"] = along[:, None]
        return StateVectors(params, slots, {}), self._through_clipping(gamma), by_hyper

    def push(self, tangents: StateVectors, grad_tangents: Params, hyper_tangents: dict[str, Tensor]) -> tuple[Params, Slots]:
        """Push tangents of parameters, slots, gradients and hyperparameters forward to those of (θ', o')."""
        moved = self._through_clipping({name: grad_tangents[name] for name in self._grads})
        if "clip_norm" in hyper_tangents and self.clips:
            for name, direction in self._clip_direction().items():
                moved[name] = moved[name] + _outer(hyper_tangents["clip_norm"][:, 0], direction)
        params, slots = dict(tangents.params), {slot: dict(leaves) for slot, leaves in tangents.slots.items()}
        for name, jacobian in self.jacobians.items():
            incoming = {"parameter": tangents.params[name], "gradient": moved[name]}
            incoming |= {slot: leaves[name] for slot, leaves in tangents.slots.items()}
            for number in self._numbers[name]:
                speed = hyper_tangents[number][:, self._parent.group_of[name]]
                incoming[number] = _outer(speed, torch.ones_like(moved[name][0]))
            pushed = {}
            for target, row in jacobian.items():
                pushed[target] = combine([(row[source], vector) for source, vector in incoming.items()], tangents.params[name])
            params[name] = pushed["parameter"]
            for slot in slots:
                slots[slot][name] = pushed[slot]
        return params, slots

    def _through_clipping(self, vectors: Params) -> Params:
        """Multiply by ∂g'/∂g."""
        if not self.clips:
            return vectors
        assert self._parent.clip_norm is not None
        norm = _global_norm(self._grads)
        scale = self._parent.clip_norm / (norm + _CLIP_GUARD)
        along = batched_inner(vectors, self._grads) * (scale / (norm * (norm + _CLIP_GUARD)))
        return {name: scale * leaf - _outer(along, self._grads[name]) for name, leaf in vectors.items()}

    def _clip_direction(self) -> Params:
        """∂g'/∂c."""
        norm = _global_norm(self._grads) + _CLIP_GUARD
        return {name: leaf / norm for name, leaf in self._grads.items()}


def _together(grads: Params, group_of: dict[str, int]) -> list[list[str]]:
    """Cut the names of each group into parts that are linearised in one go: many small parameters cost one large one's time."""
    parts: list[list[str]] = []
    sizes: list[int] = []
    for name, leaf in grads.items():
        here = parts and group_of[parts[-1][0]] == group_of[name] and sizes[-1] + leaf.numel() <= _JOINED
        if here:
            parts[-1].append(name)
            sizes[-1] += leaf.numel()
        else:
            parts.append([name])
            sizes.append(leaf.numel())
    return parts


def _join(leaves: Params, names: list[str]) -> Tensor:
    return leaves[names[0]] if len(names) == 1 else flatten(leaves[name] for name in names)


def _split(jacobian: Jacobian, like: Params) -> dict[str, Jacobian]:
    """Undo `_join` for every coefficient that is not one number for all."""
    if len(like) == 1:
        return dict.fromkeys(like, jacobian)
    found: dict[str, Jacobian] = {name: {target: {} for target in jacobian} for name in like}
    for target, row in jacobian.items():
        for source, coefficient in row.items():
            parts = unflatten(coefficient, like) if isinstance(coefficient, Tensor) else dict.fromkeys(like, coefficient)
            for name, part in parts.items():
                found[name][target][source] = part
    return found


def _outer(lengths: Tensor, direction: Tensor) -> Tensor:
    return lengths.view(-1, *[1] * direction.dim()) * direction


def _global_norm(grads: Params) -> Tensor:
    # The same operations as torch.nn.utils.clip_grad_norm_, so that a replay has the same bits.
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(leaf) for leaf in grads.values()]))
