"""The empirical tangent kernel: how a gradient step on one input moves the outputs at another (Jacot et al. 2018).

    K(x, x')_{cd} = Σ_p s_p ∂f_c(x)/∂θ_p ∂f_d(x')/∂θ_p            [out, out] for every pair of inputs

f          the model's outputs, with whatever axes they have after the batch flattened to one axis ``out``; unit of the output;
θ_p        one trained parameter;
s_p        1, or how far an optimizer moves θ_p per unit of its gradient (`EmpiricalKernel.of` with ``step_sizes``).

A step of gradient descent θ ← θ − η s ∘ g with g = Σ_x' J(x')ᵀ r(x') moves f(x) by −η Σ_x' K(x, x') r(x'), up to η² terms:
the kernel is the Gauss-Newton matrix seen from the outputs, JJᵀ for JᵀJ, with the same eigenvalues but 0.

Two routes, one sum over parameters each:

* a `torch.nn.Linear` layer that sees one vector a and passes on one vector h an example has ∂f_c/∂W = δ_c aᵀ, δ_c = ∂f_c/∂h, so
  its part is ⟨a, a'⟩ ⟨δ_c, δ'_d⟩ (and ⟨δ_c, δ'_d⟩ for the bias). No Jacobian is formed: out backward passes over a whole
  batch, and n m (in + C² out) products in place of n m C² in out;
* every other parameter by its Jacobian, rows taken together by `torch.func.vmap` of `jacrev`, or one after the other where
  the model cannot be vectorised. Whether the first route gives the whole gradient of a layer is tried out on a few rows.

Products K v need neither: one pullback over the examples and one pushforward.

Assumptions: examples do not see each other; outputs are those of evaluation mode, without dropout, with batch norm's running
averages. Where it fails: the kernel is that of one state. It says how the outputs move as long as it stays as it is, in wide
networks for long, in others for a few steps (see ``docs/tangent_kernel.md``). Cost: as above, and the Jacobians of a chunk once
for each chunk of the other side. Memory: the result, n m C² numbers (n m for a trace), and ``memory`` for chunks of features.

References: Jacot, Gabriel, Hongler (2018), "Neural tangent kernel: convergence and generalization in neural networks"; Novak,
Sohl-Dickstein, Schoenholz (2022), "Fast finite width neural tangent kernel" (the two routes are their sections 3.1 and 3.3).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from retrograd.curvature.output_factors import FactoredLayer, find_factored_layers, output_factors
from retrograd.errors import InputError, NonFinite
from retrograd.params import Params, map_params
from retrograd.task import BoundModel, SplitTask
from retrograd.trajectory import Run, TrainingState
from retrograd.trajectory.kernels import twice_differentiable
from retrograd.trajectory.modes import evaluation_mode
from retrograd.trajectory.state import map_batch

_PER_ROW = (RuntimeError, ValueError)  # what torch.func.vmap raises where it cannot
_PROBES = 3  # rows on which the first route is tried out


@dataclass(frozen=True)
class _Features:
    """What a chunk of rows brings to the kernel: (a, δ) of linear layers, Jacobians of everything else."""

    factors: dict[str, tuple[Tensor, Tensor]]  # by weight: [row, in], [row, out, width]
    jacobians: Params  # by parameter: [row, out, ...]


class EmpiricalKernel:
    """The tangent kernel of a model at one state.

    Batches are tensors with a leading axis of rows, in any nest of tuples, lists and dicts. With ``others=None`` the second
    side is the first.

    Args:
        outputs: maps (model, batch) to the outputs ``[row, ...]``, as `SplitTask.outputs`.
        model: the module.
        params: θ, by name; the kernel sums over all of them.
        buffers: the module's buffers.
        step_sizes: s_p, a number or a tensor for each parameter; 1 if not given.
        memory: bytes that features of a chunk of rows may take on both sides together.
        route: ``"jacobian"`` forms the Jacobian of every parameter; ``"auto"`` only where it has to.

    For f(x) = w x the kernel is x x':

    >>> model = nn.Linear(1, 1, bias=False)
    >>> kernel = EmpiricalKernel.of(model)
    >>> kernel.trace(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])).flatten().tolist()
    [3.0, 6.0]
    """

    def __init__(
        self,
        outputs: Callable[[nn.Module, Any], Tensor],
        model: nn.Module,
        params: Params,
        buffers: Params,
        *,
        step_sizes: Mapping[str, Tensor | float] | None = None,
        memory: int = 1 << 30,
        route: Literal["auto", "jacobian"] = "auto",
    ):
        if memory < 1:
            raise InputError(f"memory is a number of bytes, at least 1, got {memory}.")
        if route not in ("auto", "jacobian"):
            raise InputError(f"route must be 'auto' or 'jacobian', got {route!r}.")
        self._function, self.model, self._bound = outputs, model, BoundModel(model)
        self.params = map_params(lambda leaf: leaf.detach(), params)
        self.buffers = map_params(lambda leaf: leaf.detach(), buffers)
        self.step_sizes: dict[str, Tensor | float] = dict.fromkeys(params, 1.0) if step_sizes is None else dict(step_sizes)
        if missing := sorted(params.keys() - self.step_sizes.keys()):
            raise InputError(f"step_sizes lacks {', '.join(missing)}; give one number or tensor for each trained parameter.")
        self.memory, self.route = memory, route
        self._layers: tuple[FactoredLayer, ...] | None = None

    @staticmethod
    def of(
        source: Run | nn.Module,
        state: TrainingState | None = None,
        *,
        step_sizes: Mapping[str, Tensor | float] | None = None,
        memory: int = 1 << 30,
        route: Literal["auto", "jacobian"] = "auto",
    ) -> "EmpiricalKernel":
        """Return the kernel of a run at one of its states, or of a plain model as it is.

        Args:
            source: a run, whose batches its task's ``outputs`` understands; or a module, called as ``model(batch)``; copied.
            state: of the run; its final state if not given.
            step_sizes: s_p by parameter, 1 if not given.
            memory: bytes for chunks of features.
            route: see the class.

        Raises:
            InputError: the run's task does not say what the model's outputs are, or a module has no trained parameters.
        """
        if isinstance(source, nn.Module):
            params = {name: leaf.detach().clone() for name, leaf in source.named_parameters() if leaf.requires_grad}
            if not params or state is not None:
                raise InputError("a plain module needs parameters that require gradients, and has no other state than its own.")
            buffers = {name: leaf.clone() for name, leaf in source.named_buffers()}
            return EmpiricalKernel(_called, source, params, buffers, step_sizes=step_sizes, memory=memory, route=route)
        task = source.update_map.task
        if not isinstance(task, SplitTask):
            raise InputError(
                f"a tangent kernel is one of the model's outputs, and {type(task).__name__} does not say what these are. "
                "Implement `outputs(model, batch)`, of shape [batch, ...], and `losses_of(outputs, batch)`: see "
                "retrograd.task.SplitTask."
            )
        at = source.final_state if state is None else state
        return EmpiricalKernel(
            task.outputs,
            source.update_map.model,
            at.params,
            at.buffers,
            step_sizes=step_sizes,
            memory=memory,
            route=route,
        )

    # ------------------------------------------------------------------ what is asked of it

    def outputs(self, inputs: Any) -> Float[Tensor, "row out"]:
        """Return f(x) of every row, all axes after the first flattened; no gradients."""
        with torch.no_grad():
            return self._outputs(self.params, inputs)

    def gram(self, inputs: Any, others: Any = None) -> Float[Tensor, "left right"]:
        """Return the kernel as a matrix [n · out, m · out], row by row of the data; a row's outputs lie side by side."""
        return self._whole(inputs, others, "gram")

    def matrix(self, inputs: Any, others: Any = None) -> Float[Tensor, "row other out out"]:
        """Return K for every pair of rows."""
        return self._pairs(self.gram(inputs, others), inputs, others)

    def trace(self, inputs: Any, others: Any = None) -> Float[Tensor, "row other"]:
        """Return the sum over outputs of K(x, x')_cc, without forming the rest."""
        return self._whole(inputs, others, "trace")

    def by_layer(
        self, inputs: Any, others: Any = None, *, layers: Literal["parameter", "module"] = "parameter", trace: bool = False
    ) -> dict[str, Tensor]:
        """Return each parameter's part of the kernel, or each module's; they sum to `matrix` (or to `trace`).

        Args:
            inputs: rows.
            others: rows of the second side.
            layers: one entry for each ``"parameter"``, or one for each ``"module"`` that has some of its own.
            trace: traces over outputs, ``[row, other]``, in place of ``[row, other, out, out]``.

        Returns:
            Parts by the name of the parameter or module.
        """
        if layers not in ("parameter", "module"):
            raise InputError(f"layers must be 'parameter' or 'module', got {layers!r}.")
        names = {name: name if layers == "parameter" else name.rpartition(".")[0] for name in self.params}
        parts = self._parts(inputs, others, "trace" if trace else "gram", names)
        return parts if trace else {name: self._pairs(part, inputs, others) for name, part in parts.items()}

    def product(self, inputs: Any, vectors: Float[Tensor, "other out"], others: Any = None) -> Float[Tensor, "row out"]:
        """Return Σ_x' K(x, x') v(x') for every row x, without forming K: one pullback and one pushforward.

        Args:
            inputs: rows x.
            vectors: v, one vector for each row of the second side.
            others: rows x' of the second side.

        Raises:
            InputError: there is not one vector for each of the other rows.
        """
        others = inputs if others is None else others
        if len(vectors) != rows_of(others):
            raise InputError(f"product needs one vector for each of the {rows_of(others)} rows, got {len(vectors)}.")
        with twice_differentiable(own_functions=False):
            total = {name: torch.zeros_like(leaf) for name, leaf in self.params.items()}
            for batch, rows in _chunks(others, self._together(others)):

                def outputs(point: Params, batch: Any = batch) -> Tensor:
                    return self._outputs(point, batch)

                values, pull = torch.func.vjp(outputs, self.params)[:2]
                for name, leaf in pull(vectors[rows].to(values))[0].items():
                    total[name] += leaf
        return self.along(inputs, {name: leaf * self.step_sizes[name] for name, leaf in total.items()})

    def along(self, inputs: Any, direction: Params) -> Float[Tensor, "row out"]:
        """Return Σ_p ∂f(x)/∂θ_p v_p: how fast the outputs move if the parameters move along v; step sizes play no part.

        Args:
            inputs: rows.
            direction: v, shaped like the parameters.
        """
        size, found = self._together(inputs), []
        with twice_differentiable(own_functions=False):
            for batch, _ in _chunks(inputs, size):

                def outputs(point: Params, batch: Any = batch) -> Tensor:
                    return self._outputs(point, batch)

                found.append(torch.func.jvp(outputs, (self.params,), (direction,))[1])
        return torch.cat(found)

    # ------------------------------------------------------------------ inside

    def _outputs(self, params: Params, batch: Any) -> Tensor:
        with evaluation_mode(self.model):
            found = self._bound(
                self._function, {**params, **{name: leaf.clone() for name, leaf in self.buffers.items()}}, batch
            )
        if found.dim() < 1 or len(found) != rows_of(batch):
            raise InputError(
                f"the outputs of {rows_of(batch)} rows have shape {tuple(found.shape)}; the first axis must be the rows'."
            )
        return found.reshape(len(found), -1)

    def _together(self, batch: Any) -> int:
        """How many rows to pass through the model at once: guessed, as activations are not known."""
        return max(1, self.memory // 64 // max(1, sum(leaf[:1].numel() for leaf in _leaves(batch))))

    def _pairs(self, gram: Tensor, inputs: Any, others: Any) -> Tensor:
        left, right = rows_of(inputs), rows_of(inputs if others is None else others)
        return gram.view(left, gram.shape[0] // left, right, gram.shape[1] // right).transpose(1, 2)

    def _whole(self, inputs: Any, others: Any, kind: str) -> Tensor:
        return self._parts(inputs, others, kind, dict.fromkeys(self.params, ""))[""]

    def _parts(self, inputs: Any, others: Any, kind: str, names: dict[str, str]) -> dict[str, Tensor]:
        """Parts of the kernel, chunk against chunk; ``names`` says which part each parameter belongs to."""
        first = map_batch(lambda leaf: leaf[:1], inputs)
        each = self._prepare(inputs)
        wide = 1 if kind == "trace" else self.outputs(first).shape[1]
        same = others is None
        others = inputs if same else others
        some = next(iter(self.params.values()))
        shape = (rows_of(inputs) * wide, rows_of(others) * wide)
        found = {part: some.new_zeros(shape) for part in dict.fromkeys(names.values())}
        size = max(1, self.memory // 4 // (each * some.element_size()))
        for left_batch, left in _chunks(inputs, size):
            ours = self._features(left_batch)
            for right_batch, right in _chunks(others, size):
                if same and right.start < left.start:
                    continue
                theirs = ours if same and right == left else self._features(right_batch)
                rows, columns = (slice(own.start * wide, own.stop * wide) for own in (left, right))
                blocks = {part: whole[rows, columns] for part, whole in found.items()}
                self._add(blocks, ours, theirs, kind, names)
                if same and right != left:
                    for part, block in blocks.items():
                        found[part][columns, rows] = block.T
        if not all(bool(torch.isfinite(part).all()) for part in found.values()):
            raise NonFinite(
                "the tangent kernel is not finite: the model's outputs have NaN or infinite gradients at this state."
            )
        return found

    def _add(self, found: dict[str, Tensor], ours: _Features, theirs: _Features, kind: str, names: dict[str, str]) -> None:
        product = _traces if kind == "trace" else _grams
        for layer in self._layers or ():
            (inside, outside), (inside_other, outside_other) = ours.factors[layer.weight], theirs.factors[layer.weight]
            by_output, by_input = product(outside, outside_other), inside @ inside_other.T
            if layer.bias is not None:
                size = float(self.step_sizes[layer.bias])
                found[names[layer.bias]].add_(by_output, alpha=size)
            shaped = found[names[layer.weight]]
            if kind == "trace":
                shaped.addcmul_(by_output, by_input, value=float(self.step_sizes[layer.weight]))
                continue
            rows, others = by_input.shape
            grid = (rows, len(by_output) // rows, others, by_output.shape[1] // others)
            by_output = by_output.view(grid) * (by_input * float(self.step_sizes[layer.weight]))[:, None, :, None]
            shaped.add_(by_output.view(shaped.shape))
        for name, jacobian in ours.jacobians.items():
            size = self.step_sizes[name]
            other = theirs.jacobians[name]
            found[names[name]].add_(product(jacobian * size, other))

    def _features(self, batch: Any) -> _Features:
        layers = self._layers or ()
        covered = {name for layer in layers for name in (layer.weight, layer.bias)}
        rest = {name: leaf for name, leaf in self.params.items() if name not in covered}
        factors = output_factors(self.model, layers, self._outputs, self.params, batch)
        return _Features(factors, self._jacobians(rest, batch) if rest else {})

    def _jacobians(self, point: Params, batch: Any) -> Params:
        """Return ∂f/∂θ of some parameters, ``[row, out, …]``."""
        fixed = {name: leaf for name, leaf in self.params.items() if name not in point}

        def one(point: Params, row: Any) -> Tensor:
            return self._outputs({**fixed, **point}, map_batch(lambda leaf: leaf[None], row))[0]

        with twice_differentiable(own_functions=False):  # fused attention has no batched form
            try:
                return torch.func.vmap(torch.func.jacrev(one), in_dims=(None, 0))(point, batch)
            except _PER_ROW:
                rows = []
                for part, _ in _chunks(batch, 1):
                    own = {name: leaf.clone().requires_grad_() for name, leaf in point.items()}
                    values = self._outputs({**fixed, **own}, part)[0]
                    each = [
                        torch.autograd.grad(value, list(own.values()), retain_graph=True, materialize_grads=True)
                        for value in values
                    ]
                    rows.append([torch.stack(leaves) for leaves in zip(*each, strict=True)])
                return {name: torch.stack(leaves) for name, leaves in zip(point, zip(*rows, strict=True), strict=True)}

    def _prepare(self, batch: Any) -> int:
        """Find the layers of the first route, once, and return how many numbers a row's features are."""
        probes = map_batch(lambda leaf: leaf[:_PROBES], batch)
        outs = self.outputs(probes).shape[1]
        if self._layers is None:
            whole = {name for name, size in self.step_sizes.items() if isinstance(size, Tensor) and size.numel() > 1}
            candidates = set(self.params) - whole if self.route == "auto" else set()
            self._layers = find_factored_layers(self.model, self._outputs, self.params, probes, candidates)
        covered = {name for layer in self._layers for name in (layer.weight, layer.bias)}
        factored = sum(self.params[layer.weight].shape[1] + outs * len(self.params[layer.weight]) for layer in self._layers)
        return factored + outs * sum(leaf.numel() for name, leaf in self.params.items() if name not in covered)


def rows_of(batch: Any) -> int:
    """Return the number of rows of a batch of tensors.

    Raises:
        InputError: it holds no tensor.
    """
    leaves = _leaves(batch)
    if not leaves:
        raise InputError(f"a tangent kernel needs batches of tensors with a leading axis of rows, got {type(batch).__name__}.")
    return len(leaves[0])


def _leaves(batch: Any) -> list[Tensor]:
    leaves: list[Tensor] = []

    def note(leaf: Tensor) -> Tensor:
        leaves.append(leaf)
        return leaf

    map_batch(note, batch)
    return leaves


def _chunks(batch: Any, size: int) -> Iterator[tuple[Any, slice]]:
    total = rows_of(batch)
    for start in range(0, total, size):
        rows = slice(start, min(start + size, total))
        yield map_batch(lambda leaf, rows=rows: leaf[rows], batch), rows


def _called(model: nn.Module, batch: Any) -> Tensor:
    return model(batch)


def _grams(left: Tensor, right: Tensor) -> Tensor:
    """[n, C, …] against [m, C, …]: [n C, m C]."""
    return left.flatten(0, 1).flatten(1) @ right.flatten(0, 1).flatten(1).T if left.dim() > 2 else _scalars(left, right)


def _scalars(left: Tensor, right: Tensor) -> Tensor:
    return left.reshape(-1, 1) @ right.reshape(1, -1)


def _traces(left: Tensor, right: Tensor) -> Tensor:
    """[n, C, …] against [m, C, …]: the sum over C of the products, [n, m]."""
    return left.flatten(1) @ right.flatten(1).T


def relative_change(before: Tensor, after: Tensor) -> float:
    """Return ‖K' − K‖ / ‖K‖ of two kernels, in the Frobenius norm: 0 where training was linear.

    >>> relative_change(torch.eye(2), 1.5 * torch.eye(2))
    0.5
    """
    if before.shape != after.shape or not math.isfinite(float(before.norm())) or float(before.norm()) == 0:
        raise InputError(
            f"two finite kernels of one shape are compared, the first of them not 0; got {tuple(before.shape)} and "
            f"{tuple(after.shape)}, the first of norm {float(before.norm())}."
        )
    return float((after - before).norm() / before.norm())
