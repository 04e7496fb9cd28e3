"""LoGra: influence functions of gradients that are projected on both sides of every layer (Choe et al. 2024).

    g̃_i = vec(Σ_t (P_out d_it)(P_in ā_it)ᵀ) = vec(P_out ∇_W ℓ_i P_inᵀ)        no gradient of the size of W is ever made
    score[q, i] = −⟨(w F̃ + λ)⁻¹ g̃_q, g̃_i⟩ / N        summed over the layers, g̃_q that of the measurement

ā, d       input and output gradient of a linear layer or convolution at position t (see `retrograd.curvature.layers`);
P_in       [k_in, in + 1], P_out [k_out, out]. ``init="pca"``: the leading eigenvectors of Σ ā āᵀ and Σ d dᵀ over the training
           examples, K-FAC's factors with their own labels. ``"random"``: normal numbers, E[PᵀP] = I. From k = in + 1, or
           k = out, on they are rotations or the identity, and nothing is lost;
F̃          Σ_i g̃_i g̃_iᵀ / N of a layer, dense, [k_in k_out]². Of the training gradients as they are, as in the paper: the
           empirical Fisher matrix, so that one pass gives both it and what is scored;
w, λ       mean recorded weight, and ``damping`` × w × the mean eigenvalue of a layer's F̃ (0.1, as Grosse et al. 2023).

All parameters outside such layers (embeddings, norms, …) are one block more: their whole gradient, projected by one random
matrix on k_in · k_out numbers. So every trained parameter is covered, where the paper leaves them out.

With a ``folder`` the g̃_i are kept there: the first call makes them, part by part, and later calls with other queries only
read, without a pass of the model over the training data. A killed call goes on at the next part.

Assumptions: those of `Implicit`; no curvature between layers; what lies outside the projections does not matter. Weight decay
is not added, damping stands for it. The paper's division by √ of self-influence (RelatIF) has another unit and is left out.
Cost: a pass over the training data (two with ``"pca"``), then k_in · k_out · layers multiplications a query and example.
Memory: [k_in k_out]² a layer, and the g̃_i as far as ``memory`` goes; beyond, without a folder, they are made twice.

Reference: Choe et al. (2024), "What is your data worth to GPT? LLM-scale data valuation with influence functions".
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from retrograd.adjoint.contraction import Engine
from retrograd.adjoint.gradient_store import GradientStore, begin, read_tensors, write_tensors
from retrograd.adjoint.parts import ScorePart
from retrograd.adjoint.queries import Queries
from retrograd.curvature.layers import Layer, Rows, capture, find_layers
from retrograd.curvature.pseudo_gradients import device_of, per_example_gradients
from retrograd.errors import InputError
from retrograd.linalg import Projection
from retrograd.noise import Noise
from retrograd.params import Params, count, flatten
from retrograd.progress import track
from retrograd.trajectory import Run
from retrograd.trajectory.trajectory import to_device

_LARGEST_BATCH = 256


@dataclass(frozen=True)
class LoGra:
    """Influence functions of gradients projected on both sides of each layer.

    Args:
        dimension: k_in and k_out.
        init: the projections, of principal components (``"pca"``) or ``"random"``.
        damping: times the mean eigenvalue of a layer is added to all its eigenvalues.
        folder: where the projected gradients of the training data are kept for later calls; of one run and projection each.
        seed: of what is random.
    """

    dimension: tuple[int, int] = (16, 16)
    init: Literal["pca", "random"] = "pca"
    damping: float = 0.1
    folder: str | os.PathLike[str] | None = field(default=None, repr=False)
    seed: int = 0

    unit: ClassVar[str] = "measurement per unit of example weight"
    citation: ClassVar[str] = """@article{choe2024what,
  title = {What is Your Data Worth to {GPT}? {LLM}-Scale Data Valuation with Influence Functions},
  author = {Choe, Sang Keun and others}, journal = {arXiv preprint arXiv:2405.13954}, year = {2024}
}"""

    def __post_init__(self):
        if min(self.dimension) < 1:
            raise InputError(f"dimension is (k_in, k_out), each at least 1, got {self.dimension}.")
        if self.init not in ("pca", "random"):
            raise InputError(f"init must be 'pca' or 'random', got {self.init!r}.")
        if not self.damping > 0:
            raise InputError(f"damping must be above 0, or directions that no example has would count; got {self.damping}.")

    def parts(self, run: Run, queries: Queries, engine: Engine, /) -> Iterator[ScorePart]:
        """Yield the scores of one part of the training examples after the other."""
        if engine.rank is not None:
            raise InputError("LoGra carries projected queries, of its own dimension; leave out rank.")
        made = engine.once(("logra", repr(self), str(self.folder)), lambda: _Projected.of(self, run, engine))
        engine.notes.add(exact=False, damping=self.damping, projection=made.sides.described())
        costates = self._costates(made, queries.gradients(run, run.final_state).params, run.mean_weight)
        trained_on = (run.exposure([len(run)])[0] > 0).double()
        exposure = trained_on / trained_on.sum()
        for ids, rows in made.rows:
            rows = rows.to(costates)
            yield ScorePart(ids, -exposure[run.examples.rows(ids)].to(rows) * (costates @ rows.T))

    def _costates(self, made: "_Projected", gradients: Params, weight: float) -> Tensor:
        rows, solved = made.sides.whole(gradients), []
        # A block that is 0 but for rounding has no scores: its inverse would make much of nothing.
        least = max(matrix.trace() for matrix in made.fisher) * (10 * torch.finfo(rows.dtype).eps) ** 2
        for own, matrix in zip(rows.split(made.sides.widths, dim=1), made.fisher, strict=True):
            values, vectors = torch.linalg.eigh(matrix)
            shifted = weight * (values.clamp(min=0) + self.damping * values.mean())
            inverse = 1 / shifted if matrix.trace() > least else torch.zeros_like(shifted)
            solved.append((own.double() @ vectors * inverse @ vectors.T).to(own))
        return torch.cat(solved, dim=1)


@dataclass(frozen=True)
class _Sides:
    """Both projections of every layer, and the one of everything else."""

    layers: tuple[Layer, ...]
    inputs: tuple[Tensor, ...]  # P_in of each layer, [k_in, in + 1]
    outputs: tuple[Tensor, ...]  # P_out
    rest: tuple[str, ...]
    projection: Projection | None

    @property
    def widths(self) -> list[int]:
        """Numbers that each block has in a row."""
        each = [len(left) * len(right) for left, right in zip(self.inputs, self.outputs, strict=True)]
        return each if self.projection is None else [*each, self.projection.dimension]

    def described(self) -> str:
        """Say what is projected on how many numbers."""
        rest = "" if self.projection is None else f", {self.projection.size:,} other parameters on {self.projection.dimension}"
        return f"{len(self.layers)} layers on {sum(self.widths[: len(self.layers)])} numbers{rest}"

    def captured(self, seen: dict[str, Rows], rest: Tensor | None, size: int) -> Tensor:
        """Project what `capture` saw, and the whole gradients ``rest`` of everything else."""
        parts = []
        for layer, left, right in zip(self.layers, self.inputs, self.outputs, strict=True):
            if layer.weight not in seen:  # not called in this batch
                parts.append(left.new_zeros(size, len(left) * len(right)))
                continue
            inputs, cotangents = seen[layer.weight]
            parts.append(((cotangents @ right.T).mT @ (inputs @ left.T)).flatten(1))
        return torch.cat(parts if rest is None else [*parts, rest], dim=1)

    def whole(self, gradients: Params) -> Tensor:
        """Project gradients that have the parameters' shapes."""
        parts = []
        for layer, left, right in zip(self.layers, self.inputs, self.outputs, strict=True):
            matrices = gradients[layer.weight].flatten(2)
            if layer.bias is not None:
                matrices = torch.cat([matrices, gradients[layer.bias][..., None]], dim=2)
            parts.append((right @ matrices @ left.T).flatten(1))
        if self.projection is not None:
            parts.append(self.projection.down(flatten((gradients[name] for name in self.rest), batched=True)))
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class _Projected:
    """The training data, projected.

    Attributes:
        sides: the projections.
        rows: g̃ of every example.
        fisher: F̃ of every block, float64.
    """

    sides: _Sides
    rows: GradientStore
    fisher: list[Tensor]

    @staticmethod
    def of(method: LoGra, run: Run, engine: Engine) -> "_Projected":
        """Make it, or find it in the method's folder."""
        folder = None
        if method.folder is not None:
            plan = {"run": run.digest, "dimension": list(method.dimension), "init": method.init, "seed": method.seed}
            folder = begin(Path(method.folder), plan)
        state = run.final_state
        each = 2 * count(state.params) * next(iter(state.params.values())).element_size()
        at_once = max(1, min(engine.memory // 4 // each, _LARGEST_BATCH))
        saved, about = _kept(folder, "projections", lambda: _fitted(method, run, at_once))
        layers = tuple(Layer(*names) for names in about["layers"])
        like = next(iter(state.params.values()))
        size = sum(state.params[name].numel() for name in about["rest"])
        sides = _Sides(
            layers,
            tuple(saved[f"in.{layer.weight}"].to(like) for layer in layers),
            tuple(saved[f"out.{layer.weight}"].to(like) for layer in layers),
            tuple(about["rest"]),
            Projection(size, method.dimension[0] * method.dimension[1], method.seed) if size else None,
        )

        def make(ids: Tensor) -> Tensor:
            batch, rest = to_device(run.examples.batch(ids), like.device), None
            seen = capture(run.update_map, layers, state, batch, len(ids))
            if sides.projection is not None:
                slices = per_example_gradients(run.update_map, state, batch, len(ids), sides.rest)
                rest = torch.cat([sides.projection.down(flatten(own.values(), batched=True)) for own in slices])
            return sides.captured(seen, rest, len(ids))

        rows = GradientStore(
            run.examples.ids,
            sum(sides.widths),
            like.dtype,
            make,
            at_once=at_once,
            room=engine.memory // 4,
            folder=folder,
        )
        fisher, _ = _kept(folder, "fisher", lambda: (_moments(rows, sides.widths, like.device), {}))
        return _Projected(sides, rows, [fisher[f"{block:06d}"].to(like.device) for block in range(len(sides.widths))])


def _kept(folder: Path | None, name: str, make: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what the folder has under this name, or make it and keep it there."""
    file = None if folder is None else folder / f"{name}.safetensors"
    if file is not None and file.is_file():
        return read_tensors(file)
    tensors, about = make()
    if file is not None:
        write_tensors(file, tensors, about)
    return tensors, about


def _moments(rows: GradientStore, widths: list[int], device: torch.device) -> dict[str, Tensor]:
    """F̃ of every block."""
    sums, total = [torch.zeros(width, width, dtype=torch.float64, device=device) for width in widths], 0
    for ids, part in rows:
        total += len(ids)
        for own, block in zip(sums, part.split(widths, dim=1), strict=True):
            block = block.to(own)
            own += block.T @ block
    return {f"{number:06d}": own / total for number, own in enumerate(sums)}


def _fitted(method: LoGra, run: Run, at_once: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The projections of every layer, and the names of layers and of what is left."""
    state, update_map, ids = run.final_state, run.update_map, run.examples.ids
    device = device_of(state)
    probes = ids[:3]
    layers = find_layers(update_map, state, to_device(run.examples.batch(probes), device), len(probes))
    covered = {name for layer in layers for name in (layer.weight, layer.bias)}
    about = {
        "layers": [[layer.module, layer.weight, layer.bias] for layer in layers],
        "rest": [name for name in state.params if name not in covered],
    }
    tensors: dict[str, Tensor] = {}
    if method.init == "random":
        for number, layer in enumerate(layers):
            weight = state.params[layer.weight].flatten(1)
            sizes = (weight.shape[1] + (layer.bias is not None), weight.shape[0])
            for side, (size, wanted) in enumerate(zip(sizes, method.dimension, strict=True)):
                # Not signs: on a side of a few numbers two rows of signs are easily equal, or all that a softmax cancels.
                drawn = Noise(torch.arange(wanted), method.seed, number, side).normal(size) / wanted**0.5
                name = f"{('in', 'out')[side]}.{layer.weight}"
                tensors[name] = drawn if wanted < size else torch.eye(size, dtype=torch.float64)
        return tensors, about
    moments: dict[str, Tensor] = {}
    for own in track(ids.split(at_once), "training data: principal components"):
        batch = to_device(run.examples.batch(own), device)
        for weight, (inputs, cotangents) in capture(update_map, layers, state, batch, len(own)).items():
            if inputs.shape[1] > 1:  # positions that the loss does not see are padding
                inputs = inputs * (cotangents != 0).any(dim=2, keepdim=True)
            for side, leaf in (("in", inputs), ("out", cotangents)):
                flat = leaf.flatten(0, 1).double()
                name = f"{side}.{weight}"
                moments[name] = moments.get(name, torch.zeros((), dtype=torch.float64, device=device)) + flat.T @ flat
    for name, moment in moments.items():
        wanted = method.dimension[name.startswith("out.")]
        tensors[name] = torch.linalg.eigh(moment)[1].flip(1)[:, :wanted].T
    return tensors, about
