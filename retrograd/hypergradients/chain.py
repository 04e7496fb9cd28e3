"""Several stages of training in a row: pre-training, fine-tuning, ….

    s^{k+1}_0 = M_k(θ^k_T, b^k_T)          the hand-over: what the next stage takes from the one before

M_k is one more map with a pullback, λ^k_T = (∂M_k)ᵀ λ^{k+1}_0. So the derivative of an outcome of the last stage by anything
that went into the first is that of one long run, and each stage may be differentiated in its own way: implicitly through
pre-training and unrolled through fine-tuning, as in "Meta-learning to improve pre-training", or exactly through both. What the
next stage does not take (a new head, optimizer slots) has no costate.

Reference: Raghu et al. (2021), "Meta-learning to improve pre-training", equation 3.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from retrograd.errors import InputError
from retrograd.params import Params
from retrograd.trajectory import StateVectors, TrainingState, Trajectory

Handover = Callable[[Params], Params]
"""Maps the parameters and buffers of a finished stage to those of the next one that it determines, differentiably."""


class Chain:
    """Stages of training and what is handed over between them; made by `chain`.

    Attributes:
        stages: the recorded runs, in the order in which they were made.
        handovers: one fewer.
    """

    def __init__(self, stages: Sequence[Trajectory], handovers: Sequence[Handover]):
        self.stages, self.handovers = tuple(stages), tuple(handovers)

    def __len__(self) -> int:
        """Return the number of stages."""
        return len(self.stages)

    @property
    def final_state(self) -> TrainingState:
        """The state at the end of the last stage."""
        return self.stages[-1].final_state

    def taken(self, stage: int) -> Params:
        """Return what ``stage`` takes from the one before it."""
        return self.handovers[stage - 1](_tensors(self.stages[stage - 1].final_state))

    def pull_handover(self, stage: int, costates: StateVectors) -> StateVectors:
        """Pull costates of the beginning of ``stage`` back to the end of the stage before it."""
        before = self.stages[stage - 1].final_state
        leaves = {name: leaf.detach().requires_grad_(leaf.is_floating_point()) for name, leaf in _tensors(before).items()}
        with torch.enable_grad():
            taken = self.handovers[stage - 1](leaves)
        incoming = {**costates.params, **costates.buffers}
        used = {name: leaf for name, leaf in taken.items() if name in incoming and leaf.requires_grad}
        sources = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        found = torch.autograd.grad(
            list(used.values()),
            list(sources.values()),
            [incoming[name] for name in used],
            allow_unused=True,
            is_grads_batched=True,
        )
        count = len(costates)
        rows = {  # copied, as a sum gives both of its terms the same memory, and sweeps work in place
            name: leaf.new_zeros(count, *leaf.shape) if own is None else own.clone()
            for (name, leaf), own in zip(sources.items(), found, strict=True)
        }
        slots = {slot: {name: torch.zeros_like(rows[name]) for name in own} for slot, own in before.slots.items()}
        return StateVectors(
            {name: rows[name] for name in before.params}, slots, {name: rows[name] for name in before.buffers if name in rows}
        )

    def rerun(self, *changes: Mapping[str, Any]) -> "Chain":
        """Train all stages again.

        Args:
            changes: for each stage, keywords of `Trajectory.rerun`; an empty dict changes nothing.
        """
        if len(changes) != len(self):
            raise InputError(f"there are {len(self)} stages, and changes for {len(changes)} of them; {{}} changes nothing.")
        stages: list[Trajectory] = []
        for number, (run, own) in enumerate(zip(self.stages, changes, strict=True)):
            options = dict(own)
            if stages:
                taken = self.handovers[number - 1](_tensors(stages[-1].final_state))
                options["initial"] = _with(options.get("initial") or run.state(0), taken)
            stages.append(run.rerun(**options))
        return Chain(stages, self.handovers)


def chain(*runs: Trajectory, copy: Sequence[Mapping[str, str] | Handover | None] | None = None) -> Chain:
    """Join recorded runs, each of which started from what the one before it had learned.

    Args:
        runs: the stages, at least two.
        copy: for each hand-over, which of the next stage's parameters and buffers are copies of which of the stage before
            (``{"encoder.weight": "encoder.weight"}``), or a function that maps one stage's tensors to those of the next. By
            default all that have the same name and shape, and began with the very values that the stage before ended with.

    Raises:
        InputError: a stage did not begin with what is said to be handed over, or nothing is.
    """
    if len(runs) < 2:
        raise InputError(f"a chain joins at least two runs, got {len(runs)}.")
    copy = [None] * (len(runs) - 1) if copy is None else copy
    if len(copy) != len(runs) - 1:
        raise InputError(f"{len(runs)} runs have {len(runs) - 1} hand-overs, and copy has {len(copy)} entries.")
    handovers = []
    for number, (before, after, given) in enumerate(zip(runs, runs[1:], copy, strict=False)):
        ended, began = _tensors(before.final_state), _tensors(after.state(0))
        if given is None:
            given = {
                name: name
                for name, leaf in began.items()
                if name in ended and leaf.is_floating_point() and torch.equal(leaf, ended[name])
            }
            frozen = [
                name
                for name, leaf in after.update_map.model.named_parameters()
                if name not in began and name in ended and torch.equal(leaf, ended[name])
            ]
            if frozen:
                raise InputError(
                    f"run {number + 1} does not train {frozen[:3]}, which it has from run {number}, so replays take them as "
                    "constants. Give them to its optimizer, in a group with a learning rate of 0."
                )
            if not given:
                raise InputError(
                    f"run {number + 1} began with none of the parameters that run {number} ended with. Copy them before it is "
                    "recorded, or say with copy= what was handed over."
                )
        handover = given if callable(given) else _copying(given)
        for name, leaf in handover(ended).items():
            if name not in began:
                raise InputError(f"run {number + 1} has no parameter or buffer {name!r}.")
            if leaf.shape != began[name].shape or not torch.allclose(leaf, began[name]):
                raise InputError(f"run {number + 1} did not begin with what run {number} hands over as {name!r}.")
        handovers.append(handover)
    return Chain(runs, handovers)


def _copying(names: Mapping[str, str]) -> Handover:
    def handover(tensors: Params) -> Params:
        unknown = sorted(set(names.values()) - tensors.keys())
        if unknown:
            raise InputError(f"the stage before has no parameter or buffer {unknown[:3]}.")
        return {name: tensors[source] for name, source in names.items()}

    return handover


def _tensors(state: TrainingState) -> dict[str, Tensor]:
    return {**state.params, **state.buffers}


def _with(state: TrainingState, taken: Params) -> TrainingState:
    own = {name: leaf.detach() for name, leaf in taken.items()}
    return replace(
        state,
        params={name: own.get(name, leaf) for name, leaf in state.params.items()},
        buffers={name: own.get(name, leaf) for name, leaf in state.buffers.items()},
    )
