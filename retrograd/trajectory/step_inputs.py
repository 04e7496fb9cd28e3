"""What went into a step and can be differentiated by: names, leaves of a graph, and vectors shaped like inputs.

| name | what it is | one vector |
|---|---|---|
| ``example_weights`` | w_i of the batch | ``[query, batch]``, see `Pullback.scores` |
| ``learning_rate``, ``momentum``, ``weight_decay``, ``beta1``, … | a hyperparameter of a group | ``[query, group]`` |
| ``clip_norm`` | the norm that gradients are clipped to | ``[query, 1]`` |
| ``meta`` | parameters of the meta-module | Params, each ``[query, …]`` |
| ``inputs``, ``labels``, or a key of a batch that is a dict | tensors of the batch | ``[query, batch, …]`` |

Integer labels of a classification are taken as the distributions that they stand for, one-hot rows ``[batch, class]``: the
derivative says what a little less certainty in a label, or a little of another class, would do.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retrograd.errors import InputError
from retrograd.params import Params
from retrograd.trajectory.state import StepInputs

POSITIONS = ("inputs", "labels")
"""Names of the first and the second tensor of a batch that is a pair."""

Rebuild = Callable[[Mapping[str, Tensor]], StepInputs]


@dataclass(frozen=True)
class InputVectors:
    """A batch of vectors shaped like inputs of a step: tangents, or the cotangents ``⟨λ, ∂Φ/∂u⟩`` of a pullback.

    Attributes:
        hyper: of hyperparameters and ``clip_norm``, ``[query, group]``.
        meta: of the meta-parameters, a leading axis ``query`` on every leaf.
        batch: of the batch's tensors, ``[query, batch, …]``.
    """

    hyper: dict[str, Tensor] = field(default_factory=dict)
    meta: Params = field(default_factory=dict)
    batch: dict[str, Tensor] = field(default_factory=dict)

    def leaves(self) -> dict[str, Tensor]:
        """All leaves but the hyperparameters', under flat names: those of meta-parameters begin with ``meta/``."""
        return {**{f"meta/{name}": leaf for name, leaf in self.meta.items()}, **self.batch}

    @staticmethod
    def of(hyper: dict[str, Tensor], leaves: dict[str, Tensor]) -> "InputVectors":
        """Make such vectors of hyperparameters' and of what `leaves` calls by flat names."""
        meta = {name.removeprefix("meta/"): leaf for name, leaf in leaves.items() if name.startswith("meta/")}
        return InputVectors(hyper, meta, {name: leaf for name, leaf in leaves.items() if not name.startswith("meta/")})

    @staticmethod
    def cat(parts: "list[InputVectors]") -> "InputVectors":
        """Concatenate along the leading axis."""

        def joined(dicts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {name: torch.cat([own[name] for own in dicts]) for name in dicts[0]}

        return InputVectors(
            joined([part.hyper for part in parts]),
            joined([part.meta for part in parts]),
            joined([part.batch for part in parts]),
        )


def batch_names(batch: Any) -> tuple[str, ...]:
    """Return the names of a batch's tensors: ``inputs`` and ``labels`` by position, or the keys of a dict."""
    if isinstance(batch, Mapping):
        return tuple(batch)
    return POSITIONS[: len(batch)] if isinstance(batch, tuple | list) else POSITIONS[:1]


def input_leaves(
    inputs: StepInputs, wrt: frozenset[str], meta: Params, logits: Callable[[], Tensor | None]
) -> tuple[dict[str, Tensor], Rebuild]:
    """Return those inputs of the step's loss that ``wrt`` names, detached, and how to put others in their place.

    Args:
        inputs: u_t.
        wrt: names; hyperparameters and weights among them are not looked at.
        meta: the meta-parameters of the step.
        logits: gives the model's outputs for the batch, or None if the task does not say; asked only if labels are integers.

    Returns:
        Leaves by flat name, and a function that maps such leaves to the inputs of the step.

    Raises:
        InputError: a named tensor of the batch holds integers that stand for no classes.
    """
    leaves = {f"meta/{name}": leaf.detach() for name, leaf in meta.items()} if "meta" in wrt else {}
    batch = inputs.batch
    for name, tensor in _parts(batch).items():
        if name in wrt:
            leaves[name] = _continuous(name, tensor, logits).detach()

    def rebuild(leaves: Mapping[str, Tensor]) -> StepInputs:
        own = {name.removeprefix("meta/"): leaf for name, leaf in leaves.items() if name.startswith("meta/")}
        parts = {name: leaves.get(name, tensor) for name, tensor in _parts(batch).items()}
        if isinstance(batch, Tensor):
            changed = parts["inputs"]
        elif isinstance(batch, Mapping):
            changed = {**batch, **parts}
        else:
            changed = type(batch)([*parts.values(), *batch[len(parts) :]])
        return replace(inputs, meta=own or inputs.meta, batch=changed)

    return leaves, rebuild


def _parts(batch: Any) -> dict[str, Any]:
    names = batch_names(batch)
    if isinstance(batch, Tensor):
        return {names[0]: batch}
    return {name: batch[name] if isinstance(batch, Mapping) else batch[row] for row, name in enumerate(names)}


def _continuous(name: str, tensor: Tensor, logits: Callable[[], Tensor | None]) -> Tensor:
    if tensor.is_floating_point():
        return tensor
    found = logits() if name == "labels" and tensor.dim() == 1 else None
    if found is None or found.dim() != 2:
        raise InputError(
            f"{name} of this run are integers, which have no derivative. Integer labels can be taken as distributions where "
            "the task says that its outputs are logits [batch, class] (`retrograd.task.SplitTask`); for anything else, "
            "differentiate by an embedding of it."
        )
    return F.one_hot(tensor, found.shape[1]).to(found.dtype)
