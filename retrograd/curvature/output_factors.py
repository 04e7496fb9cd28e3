"""Linear layers whose outputs' gradients are outer products, and how their two sides are read off.

    ∂f_c(x)/∂W = δ_c aᵀ,     ∂f_c(x)/∂b = δ_c,     δ_c = ∂f_c(x)/∂h,  h = W a + b

a          the one vector that the layer sees of an example [in];
h          the one vector that it passes on [width];
f_c        output c of the model [out].

As in ``layers.py``, but for outputs instead of losses, and for layers that are called once on ``[row, in]`` only: with
several positions the gradient is a sum of outer products, and products of such sums cost the square of their number. Whether
δ_c aᵀ is really the whole gradient is tried out on a few rows: a weight that is also used elsewhere falls through.

Assumptions: rows do not see each other. Cost: one forward pass and one backward pass for each output. Memory: ``[row, out,
width]`` a layer.
"""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retrograd.curvature.layers import recorded_calls
from retrograd.params import Params

Outputs = Callable[[Params, Any], Tensor]
"""Maps (parameters, batch) to ``[row, out]``."""

Factors = tuple[Tensor, Tensor]
"""a ``[row, in]`` and δ ``[row, out, width]``."""


@dataclass(frozen=True)
class FactoredLayer:
    """A linear layer with the names of its trained parameters.

    Attributes:
        module: the module's name in the model.
        weight: the weight's name.
        bias: the bias's name, or None where there is none or it is frozen.
    """

    module: str
    weight: str
    bias: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its parameters."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


def find_factored_layers(
    model: nn.Module, outputs: Outputs, params: Params, batch: Any, allowed: Collection[str]
) -> tuple[FactoredLayer, ...]:
    """Return the layers for which `output_factors` gives the whole gradient of every row of ``batch``.

    Args:
        model: the module that ``outputs`` calls.
        outputs: the outputs.
        params: all trained parameters.
        batch: a few rows.
        allowed: names of the parameters that may be covered.
    """
    candidates = tuple(layer for layer in _candidates(model, params) if set(layer.names) <= set(allowed))
    if not candidates:
        return ()
    own = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    calls, found = _calls(model, candidates, outputs, own, batch)
    rows = len(found)
    possible = [
        layer
        for layer in candidates
        if len(calls[layer.module]) == 1 and all(part.dim() == 2 and len(part) == rows for part in calls[layer.module][0])
    ]
    if not possible or not found.requires_grad:
        return ()
    # A sum of outputs with unequal weights: one that no symmetry of theirs cancels.
    mixed = (found * torch.arange(1, found.numel() + 1, device=found.device).to(found).sqrt().view(found.shape)).sum()
    ends = [calls[layer.module][0][1] for layer in possible]
    weights = [own[name] for layer in possible for name in layer.names]
    grads = torch.autograd.grad(mixed, [*ends, *weights], materialize_grads=True)
    true, fine = iter(grads[len(ends) :]), []
    for layer, delta in zip(possible, grads, strict=False):
        mine = (delta.T @ calls[layer.module][0][0], delta.sum(0))
        eps = torch.finfo(delta.dtype).eps ** 0.5
        pairs = [(part, next(true)) for part in mine[: len(layer.names)]]
        if all(bool((part - whole).norm() <= eps * whole.norm()) for part, whole in pairs):
            fine.append(layer)
    return tuple(fine)


def output_factors(
    model: nn.Module, layers: tuple[FactoredLayer, ...], outputs: Outputs, params: Params, batch: Any
) -> dict[str, Factors]:
    """Return a and δ of every layer, by its weight's name."""
    if not layers:
        return {}
    calls, found = _calls(model, layers, outputs, params, batch)
    ends = [calls[layer.module][0][1] for layer in layers]
    each = [
        torch.autograd.grad(found[:, column].sum(), ends, retain_graph=True, materialize_grads=True)
        for column in range(found.shape[1])
    ]
    return {
        layer.weight: (calls[layer.module][0][0], torch.stack([row[number] for row in each], dim=1))
        for number, layer in enumerate(layers)
    }


def _calls(
    model: nn.Module, layers: tuple[FactoredLayer, ...], outputs: Outputs, params: Params, batch: Any
) -> tuple[dict[str, list[tuple[Tensor, Tensor]]], Tensor]:
    """Note input and output of every call of the layers, and return them with the outputs."""
    with recorded_calls(model, [layer.module for layer in layers]) as calls, torch.enable_grad():
        return calls, outputs(params, batch)


def _candidates(model: nn.Module, params: Params) -> tuple[FactoredLayer, ...]:
    """All linear layers with a trained weight of their own."""
    own = [leaf for module in model.modules() for leaf in module.parameters(recurse=False)]
    users = Counter(id(leaf) for leaf in own)
    names = {id(leaf): name for name, leaf in model.named_parameters() if name in params and users[id(leaf)] == 1}
    layers = []
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            leaves = dict(module.named_parameters(recurse=False))  # a parametrised weight is not among them
            weight, bias = (names.get(id(leaves.get(part))) for part in ("weight", "bias"))
            if weight is not None and set(leaves) <= {"weight", "bias"}:
                layers.append(FactoredLayer(module_name, weight, bias))
    return tuple(layers)
