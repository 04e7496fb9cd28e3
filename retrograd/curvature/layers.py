"""Layers whose per-example gradient is a sum of outer products, and how its two sides are read off.

    ∂ℓ_n/∂W = Σ_t d_nt ā_ntᵀ        W = [weight | bias],  ā = (a, 1),  d = ∂ℓ_n/∂(W ā)

a_nt       input of a linear layer at position t of example n; for a convolution, the patch under the kernel;
d_nt       gradient of the example's loss by the layer's output at that position.

Covered: `torch.nn.Linear` with any axes between batch and features, and `torch.nn.Conv2d` with groups=1, with trained
weights that belong to one module only. A module called several times contributes a position for every call. Whether the
sum is really the whole gradient is tried out on a few examples: weights that are also used elsewhere, inputs whose first
axis is not the batch, and modules that do something else with their weights fall through, and so do layers that are never
called (`torch.nn.MultiheadAttention` calls none of its own). What falls through gets the exact diagonal (see `factors`).

Cost: the activations and output gradients of one batch are held.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrograd.errors import InputError
from retrograd.trajectory import TrainingState, UpdateMap

Rows = tuple[Tensor, Tensor]  # ā [batch, position, in] and d [batch, position, out]


@dataclass(frozen=True)
class Layer:
    """A module with the names of its trained parameters.

    Attributes:
        module: the module's name in the model.
        weight: the weight's name among the trained parameters.
        bias: the bias's name, or None where there is none or it is frozen.
    """

    module: str
    weight: str
    bias: str | None

    def rows(self, module: nn.Module, inputs: Tensor, cotangent: Tensor) -> Rows:
        """Return ā and d of one call."""
        if isinstance(module, nn.Conv2d):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            padded = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
            left = F.unfold(padded, _pair(module.kernel_size), _pair(module.dilation), 0, _pair(module.stride)).mT
            right = cotangent.flatten(2).mT
        else:
            left = inputs.reshape(len(inputs), -1, inputs.shape[-1])
            right = cotangent.reshape(len(cotangent), -1, cotangent.shape[-1])
        return (left if self.bias is None else F.pad(left, (0, 1), value=1.0)), right


def find_layers(update_map: UpdateMap, state: TrainingState, batch: Any, size: int) -> tuple[Layer, ...]:
    """Return the layers of which `capture` gives the whole gradient of each of the ``size`` examples of ``batch``."""
    candidates = _candidates(update_map)
    params = {name: leaf.detach().requires_grad_() for name, leaf in state.params.items()}
    state = TrainingState(params, state.slots, state.buffers, state.step)
    with recorded_calls(update_map.model, [layer.module for layer in candidates]) as calls:
        losses = update_map.losses(state, batch)
    fine = []
    for layer in candidates:
        seen = calls[layer.module]
        if not seen or any(part.dim() < 2 or len(part) != size for call in seen for part in call):
            continue
        names = [layer.weight, *([] if layer.bias is None else [layer.bias])]
        wanted = [params[name] for name in names]
        outputs = [output for _, output in seen]
        module = update_map.model.get_submodule(layer.module)
        alike = True
        for row in range(size):
            true = torch.autograd.grad(losses[row], [*wanted, *outputs], retain_graph=True, materialize_grads=True)
            lefts, rights = _joined(layer, module, [call[0] for call in seen], true[len(wanted) :])
            mine = torch.einsum("to,ti->oi", rights[row], lefts[row])
            whole = torch.cat([true[0].flatten(1), *(leaf[:, None] for leaf in true[1 : len(wanted)])], dim=1)
            allowed = torch.finfo(whole.dtype).eps ** 0.5 * whole.norm()
            alike = alike and bool((mine - whole).norm() <= allowed)
        if alike:
            fine.append(layer)
    return tuple(fine)


def capture(update_map: UpdateMap, layers: tuple[Layer, ...], state: TrainingState, batch: Any, size: int) -> dict[str, Rows]:
    """Return ā and d of every layer, by its weight's name; one forward and one backward pass in evaluation mode."""
    if not layers:
        return {}
    # Torch's fused transformer layers call no modules, but are taken only where nothing asks for gradients.
    params = {name: leaf.detach().requires_grad_() for name, leaf in state.params.items()}
    with recorded_calls(update_map.model, [layer.module for layer in layers]) as calls:
        losses = update_map.losses(TrainingState(params, state.slots, state.buffers, state.step), batch)
    if losses.shape != (size,):
        raise InputError(
            f"{type(update_map.task).__name__}.losses gave shape {tuple(losses.shape)} for {size} examples. It must give one "
            f"loss per example, shape ({size},)."
        )
    outputs = [output for layer in layers for _, output in calls[layer.module]]
    found = iter(torch.autograd.grad(losses.sum(), outputs, materialize_grads=True) if outputs else ())
    rows = {}
    for layer in layers:
        inputs = [call[0] for call in calls[layer.module]]
        if any(len(part) != size for part in inputs):
            raise InputError(f"{layer.module} got {[len(part) for part in inputs]} rows for {size} examples; it needs as many.")
        if inputs:
            module = update_map.model.get_submodule(layer.module)
            rows[layer.weight] = _joined(layer, module, inputs, [next(found) for _ in inputs])
    return rows


def _candidates(update_map: UpdateMap) -> tuple[Layer, ...]:
    """All linear layers and ungrouped convolutions with a trained weight of their own."""
    model = update_map.model
    own = [leaf for module in model.modules() for leaf in module.parameters(recurse=False)]
    users = Counter(id(leaf) for leaf in own)
    names = {id(leaf): name for name, leaf in model.named_parameters() if name in update_map.names and users[id(leaf)] == 1}
    layers = []
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            leaves = dict(module.named_parameters(recurse=False))  # a parametrised weight is not among them
            weight, bias = (names.get(id(leaves.get(part))) for part in ("weight", "bias"))
            if weight is not None and set(leaves) <= {"weight", "bias"}:
                layers.append(Layer(module_name, weight, bias))
    return tuple(layers)


@contextmanager
def recorded_calls(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Rows]]]:
    """Within this context, note input and output of every call of the named modules; no hook is left behind."""
    calls: dict[str, list[Rows]] = {name: [] for name in names}
    handles = []

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_()
            calls[name].append(((args[0] if args else kwargs["input"]).detach(), output))
            return output.clone()  # an activation that works in place would overwrite the one that is kept

        return hook

    try:
        for name in calls:
            handles.append(model.get_submodule(name).register_forward_hook(hook_of(name), with_kwargs=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _joined(layer: Layer, module: nn.Module, inputs: list[Tensor], cotangents: Any) -> Rows:
    """Put the positions of several calls in a row."""
    parts = [layer.rows(module, a.detach(), d) for a, d in zip(inputs, cotangents, strict=True)]
    return parts[0] if len(parts) == 1 else (torch.cat([a for a, _ in parts], 1), torch.cat([d for _, d in parts], 1))


def _pair(value: Any) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)
