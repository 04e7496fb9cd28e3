"""DataInf: the inverse of a mean taken for the mean of inverses, in closed form (Kwon et al. 2024).

    ((1/N) Σ_i (w g_i g_iᵀ + l))⁻¹ ≈ (1/N) Σ_i (w g_i g_iᵀ + l)⁻¹

    x_q = (1 / (N l)) Σ_i (v_q − w g_i ⟨g_i, v_q⟩ / (l + w ‖g_i‖²))                       for every layer by itself

g_i        gradient of example i with its true label, of the parameters of one layer (of a module's own: weight and bias);
v_q        the query's gradient;
l          δ + ``damping`` × w × mean_i ‖g_i‖² / d, d the layer's number of parameters. The paper's l is that for
           ``damping=0.1``: mean_i ‖g_i‖² / d is the mean eigenvalue of the layer's second moment of gradients, so it is what
           damping means everywhere here. With ``damping="training_time"`` it is δ + 1 / Σ η.

The curvature is this second moment with true labels (the "empirical Fisher"), so what ``curvature`` is given is not looked at.

Assumptions: order of inverse and mean does not matter, with an error that grows as d² (Kwon et al., theorem 1): meant for
adapters of low rank, and coarse elsewhere. Cost: two passes of gradients over the examples, and [query, P] × [P, example].
Sums run over *all* examples, batch by batch: taking each batch's own inverse or own l would give something else.

References: Kwon, Wu, Wu, Zou (2024), "DataInf: efficiently estimating data influence in LoRA-tuned LLMs and diffusion models",
equation 5.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from retrograd.adjoint.preconditioner import times
from retrograd.adjoint.solvers.solver import System
from retrograd.curvature.operator import check_names
from retrograd.curvature.pseudo_gradients import device_of, per_example_gradients
from retrograd.errors import InputError
from retrograd.params import Params, flatten, unflatten
from retrograd.progress import track
from retrograd.trajectory.trajectory import to_device


@dataclass(frozen=True)
class DataInf:
    """The mean of every example's own damped inverse, layer by layer.

    Args:
        batch_size: examples taken together; the result does not depend on it.
    """

    batch_size: int = 256

    citation: ClassVar[str] = """@inproceedings{kwon2024datainf,
  title = {{DataInf}: Efficiently Estimating Data Influence in {LoRA}-tuned {LLMs} and Diffusion Models},
  author = {Kwon, Yongchan and Wu, Eric and Wu, Kevin and Zou, James},
  booktitle = {International Conference on Learning Representations}, year = {2024}
}"""

    def __post_init__(self):
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {self.batch_size}.")

    def solve(self, system: System, right: Params, /) -> Params:
        """Return DataInf's x of all right-hand sides; 0 in layers where no example has a gradient."""
        like, weight = {name: system.state.params[name] for name in system.run.update_map.names}, system.run.mean_weight
        check_names(right, tuple(like))
        layers = defaultdict(list)
        for name in like:
            layers[name.rpartition(".")[0]].append(name)
        count, squares = len(system.run.examples), dict.fromkeys(layers, 0.0)
        for grads in self._gradients(system, "DataInf: damping"):
            for layer, names in layers.items():
                squares[layer] += sum(grads[name].double().square().sum().item() for name in names)
        sizes = {layer: sum(like[name].numel() for name in names) for layer, names in layers.items()}
        shifts = {layer: system.shift(squares[layer] / count / sizes[layer]) for layer in layers if squares[layer]}
        vectors = {layer: flatten((right[name] for name in layers[layer]), batched=True) for layer in shifts}
        removed = {layer: torch.zeros_like(rows) for layer, rows in vectors.items()}
        for grads in self._gradients(system, "DataInf: inverses"):
            for layer, shift in shifts.items():
                rows = flatten((grads[name] for name in layers[layer]), batched=True)
                shares = weight / (shift + weight * rows.square().sum(1))
                removed[layer] += (vectors[layer] @ rows.T * shares) @ rows
        found = {name: torch.zeros_like(leaf) for name, leaf in right.items()}
        for layer, shift in shifts.items():
            solved = (vectors[layer] - removed[layer] / count) / shift
            found |= unflatten(solved, {name: like[name] for name in layers[layer]})
        system.engine.notes.add(
            added_to_eigenvalues=min(shifts.values(), default=0.0), added_at_most=max(shifts.values(), default=0.0)
        )
        return found

    def _gradients(self, system: System, phase: str) -> Iterator[dict[str, Tensor]]:
        """Gradients of all examples with their own labels, slice by slice."""
        run, state = system.run, system.state
        for ids in track(run.examples.ids.split(self.batch_size), phase):
            batch = to_device(run.examples.batch(ids), device_of(state))
            for grads in per_example_gradients(run.update_map, state, batch, len(ids), run.update_map.names):
                yield times(grads, system.scale)
