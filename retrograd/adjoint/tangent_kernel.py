"""Attribution by linearised training: the adjoint of gradient descent on the outputs (Jacot et al. 2018).

The network is replaced by its linearisation at one state θ_c of the run, and this is trained as the run was: on the same
batches, at the same rates, from the same start. In the coordinates a of θ_t = θ_0 + Jᵀ a_t, J the Jacobian of all training
outputs, that is

    z_t = f(θ_c) + J (θ_0 − θ_c) + K a_t          outputs of the training examples,    K = J Jᵀ  the tangent kernel
    r_t = w_i/B ∂ℓ_i/∂z_i  for i in batch t, 0 elsewhere        (clipped by ‖g‖² = rᵀ K r, if the run was)
    (a_{t+1}, v_{t+1}) = U(a_t, v_t, r_t)         SGD's own rule, momentum, decay and all: it is linear in θ, v and g

and its exact derivative runs backward in the same coordinates, from α_T = K(X, x_q) ∂m_q/∂z(x_q):

    (α_{t+1}, ν_{t+1}) ↦ (ᾱ, ν_t, γ)  by U;     d m_q/d w_i += ⟨γ_i, ∂ℓ_i/∂z_i⟩ / B;     α_t = ᾱ + K (w_i/B ∂²ℓ_i/∂z_i² γ_i)

a, v       coordinates of parameters and velocity, [example, out];
z          outputs; ℓ_i the example's loss and m_q the query's measurement, as functions of them, at the *linearised* outputs;
α, ν, γ    costates of a and v, cotangent of r: one each for every query;
w_i, B     weight of example i, and number of examples in the batch.

Any loss serves: for squared loss and whole batches this is the derivative of the closed form of
`retrograd.dynamics.LinearisedTraining`. It is what the exact adjoint becomes where features stand still, and needs no replay:
one kernel for all queries, then products of it.

Assumptions: outputs move by the kernel of θ_c all along. In wide networks that holds from the start; in others the kernel
after training (``linearised_at="final"``, the default) knows features that the first one does not, and neither knows how
an example shaped them. Examples see no others, losses are those of evaluation mode. Rules other than SGD, and groups with rates
of their own, are plain descent with the step sizes that they have at θ_c (as in `TracIn`), without weight decay; the notes
say so. Where it fails: rates above 2/(largest eigenvalue) that the network survived by moving to flatter places blow up here.

Cost: C backward passes over the data and N² C² products of features for K (C outputs), then B N C² a query and step. Memory:
N² C² numbers, N² with ``outputs="trace"``, which puts the mean over outputs, tr K(x, x')/C times the identity, for K.

References: Jacot, Gabriel, Hongler (2018), "Neural tangent kernel", section 5; Lee et al. (2019), "Wide neural networks of any
depth evolve as linear models under gradient descent", section 2.2.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from retrograd.adjoint.contraction import Engine
from retrograd.adjoint.parts import ScorePart
from retrograd.adjoint.queries import Queries
from retrograd.curvature.pseudo_gradients import device_of
from retrograd.curvature.tangent_kernel import EmpiricalKernel
from retrograd.errors import InputError, NonFinite
from retrograd.params import map_params
from retrograd.task import check_split, weighted_mean
from retrograd.trajectory import Run, StateVectors, StepInputs, TrainingState, Trajectory
from retrograd.trajectory.clipped_rule import ClippedRule
from retrograd.trajectory.kernels import twice_differentiable
from retrograd.trajectory.trajectory import to_device
from retrograd.update_rules import SGD, Hyper

_GUARD = 1e-6  # torch.nn.utils.clip_grad_norm_ divides by the norm plus this


@dataclass(frozen=True)
class TangentKernel:
    """Scores under linearised training, with the tangent kernel of one state of the run.

    Args:
        linearised_at: the state of the kernel: ``"final"``, ``"initial"``, or the number of a step.
        outputs: ``"full"`` couples all outputs of all examples; ``"trace"`` takes the kernel's mean over outputs for each of
            them, alone: C² times less memory.
        largest: how many rows the kernel may have, examples times outputs (examples for ``"trace"``); it takes the
            square of that in memory.
    """

    linearised_at: Literal["final", "initial"] | int = "final"
    outputs: Literal["full", "trace"] = "full"
    largest: int = 16_384

    unit: ClassVar[str] = "measurement per unit of example weight"
    citation: ClassVar[str] = """@inproceedings{jacot2018ntk,
  title = {Neural Tangent Kernel: Convergence and Generalization in Neural Networks},
  author = {Jacot, Arthur and Gabriel, Franck and Hongler, Cl{\\'e}ment},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2018}
}"""

    def __post_init__(self):
        if not isinstance(self.linearised_at, int) and self.linearised_at not in ("final", "initial"):
            raise InputError(f"linearised_at must be 'final', 'initial' or a step, got {self.linearised_at!r}.")
        if self.outputs not in ("full", "trace"):
            raise InputError(f"outputs must be 'full' or 'trace', got {self.outputs!r}.")
        if self.largest < 1:
            raise InputError(f"largest is a number of rows of the kernel, at least 1, got {self.largest}.")

    def parts(self, run: Run, queries: Queries, engine: Engine, /) -> Iterator[ScorePart]:
        """Yield the scores of each step's batch, from the last step to the first."""
        if engine.rank is not None:
            raise InputError("TangentKernel carries queries by their outputs, not by vectors of parameters; leave out rank.")
        if not isinstance(run, Trajectory):
            raise InputError(
                "TangentKernel trains the linearised model on the batches of the run, which "
                f"a {type(run).__name__} does not know. Give a recorded run, or use TracIn, Implicit or Source."
            )
        linear = engine.once(("tangent kernel", repr(self)), lambda: _LinearRun(self, run, engine.memory))
        left_out = "" if linear.exact_rule else "momentum summed up, weight decay left out: the rule is not one SGD for all"
        engine.notes.add(
            exact=False, linearised_at=linear.state.step, kernel_rows=linear.rows, kernel=self.outputs, linearised_rule=left_out
        )
        yield from linear.reverse(linear.costates(queries))


class _LinearRun:
    """A run of the linearised model: its kernel, and the outputs of each step's batch."""

    def __init__(self, method: TangentKernel, run: Trajectory, memory: int):
        update_map = run.update_map
        if update_map.meta_module is not None:
            raise InputError(
                "TangentKernel knows no meta-modules: the losses of the linearised model are functions of its outputs."
            )
        at = {"final": len(run), "initial": 0}.get(str(method.linearised_at), method.linearised_at)
        assert isinstance(at, int)
        self.run, self.state, self._trace = run, run.state(at), method.outputs == "trace"
        self.exact_rule = isinstance(update_map.rule, SGD) and all(_one_rule(record.hyper) for record in run.records)
        sizes = None
        if not self.exact_rule:
            if update_map.clip_norm is not None:
                raise InputError(
                    f"TangentKernel follows gradient clipping for one group of SGD only; this run is of "
                    f"{type(update_map.rule).__name__} with {len(update_map.groups)} groups. Use Unrolled() or Source()."
                )
            sizes = {name: run.step_size(self.state, name) for name in self.state.params}
        self.kernel = EmpiricalKernel.of(run, self.state, step_sizes=sizes, memory=max(memory // 4, 1))
        self.task: Any = update_map.task
        self.batch = to_device(run.examples.batch(run.examples.ids), device_of(self.state))
        first = self._raw(to_device(run.examples.batch(run.examples.ids[:1]), device_of(self.state)))
        self.axes, self.size = tuple(first.shape[1:]), first[0].numel()
        self.rows = len(run.examples) * (1 if self._trace else self.size)
        if self.rows > method.largest:
            width = first.element_size() * self.rows**2 / 2**30
            raise InputError(
                f"the tangent kernel of {len(run.examples)} examples with {self.size} outputs each has {self.rows} rows, which "
                f"take {width:.1f} GiB; allowed are {method.largest}. Give TangentKernel(largest=…) if you have the memory, "
                "TangentKernel(outputs='trace') for fewer rows, fewer examples, or use Source() or TracIn()."
            )
        self.initial = run.state(0).params
        self.decays = self.exact_rule and any(record.hyper[0].get("weight_decay", 0.0) != 0 for record in run.records)
        self._check()
        self.matrix = self._kernel(None)
        self.start, self.origin = self._start(self.batch)
        self.rule = ClippedRule(update_map.rule if self.exact_rule else SGD(), (("dual", "origin"),), None)
        self._forward()

    # ------------------------------------------------------------------ the linear model

    def _raw(self, batch: Any) -> Tensor:
        return self.run.update_map.ask(lambda model: self.task.outputs(model, batch), self.state).detach()

    def _check(self) -> None:
        losses = self.run.update_map.losses(self.state, self.batch)
        check_split(self.task, losses, self.task.losses_of(self._raw(self.batch), self.batch))

    def _kernel(self, inputs: Any) -> Tensor:
        """K of the training examples, or of queries against them: ``[n · out, N · out]``, or ``[n, N]`` for the trace."""
        given = (self.batch, None) if inputs is None else (inputs, self.batch)
        return self.kernel.trace(*given) / self.size if self._trace else self.kernel.gram(*given)

    def _start(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Outputs at θ_0, and J θ_0 where weights decay, ``[row, out]``."""
        away = map_params(torch.sub, self.initial, self.state.params)
        start = self.kernel.outputs(batch)
        if any(bool(leaf.any()) for leaf in away.values()):
            start = start + self.kernel.along(batch, away)
        return start, self.kernel.along(batch, self.initial) if self.decays else None

    def _moved(self, matrix: Tensor, dual: Tensor) -> Tensor:
        """K a, ``[row, out]``, with the rows of ``matrix``."""
        return matrix @ dual if self._trace else (matrix @ dual.flatten()).view(-1, self.size)

    def _at(self, start: Tensor, origin: Tensor | None, matrix: Tensor, dual: Tensor, share: Tensor) -> Tensor:
        found = start + self._moved(matrix, dual)
        return found if origin is None else found + (share - 1) * origin

    def _rows(self, rows: Tensor) -> Tensor:
        """Rows of K that belong to some examples."""
        if self._trace:
            return self.matrix[rows]
        return self.matrix.view(len(self.run.examples), self.size, -1)[rows].flatten(0, 1)

    # ------------------------------------------------------------------ forward

    def _forward(self) -> None:
        shape = (len(self.run.examples), self.size)
        zeros = self.start.new_zeros(shape)
        params = {"dual": zeros, "origin": self.start.new_ones(1)}
        slots = {slot: map_params(torch.zeros_like, params) for slot in self.rule.rule.slots}
        self.visited: list[Tensor] = []
        for step in range(len(self.run)):
            inputs = self.run.inputs(step)
            rows = self.run.examples.rows(inputs.example_ids).to(zeros.device)
            matrix = self._rows(rows)
            origin = None if self.origin is None else self.origin[rows]
            outputs = self._at(self.start[rows], origin, matrix, params["dual"], params["origin"])
            self.visited.append(outputs)
            gradients, _ = self._derivatives(outputs, inputs, second=False)
            grad = self._clip(zeros.index_add(0, rows, gradients * self._shares(inputs)), rows, gradients, inputs)
            grads = {"dual": grad, "origin": torch.zeros_like(params["origin"])}
            params, slots = self.rule.apply(params, slots, grads, self._hyper(inputs))
            if not bool(torch.isfinite(params["dual"]).all()):
                raise NonFinite(
                    f"linearised training is no longer finite at step {step}: the learning rate is more than the kernel of "
                    f"step {self.state.step} bears. Take that of another state (linearised_at=), or another method."
                )
        self.final, self.share = params["dual"], params["origin"]

    def _derivatives(self, outputs: Tensor, inputs: StepInputs, second: bool) -> tuple[Tensor, Tensor | None]:
        """∂ℓ_i/∂z_i ``[batch, out]`` and ∂²ℓ_i/∂z_i² ``[batch, out, out]``."""
        point = outputs.detach().requires_grad_()
        with torch.enable_grad(), twice_differentiable():
            losses = self.task.losses_of(point.view(-1, *self.axes), inputs.batch)
            total = weighted_mean(losses, None, len(outputs), f"{type(self.task).__name__}.losses_of") * len(outputs)
            (first,) = torch.autograd.grad(total, point, create_graph=second)
            if not second:
                return first, None
            if not first.requires_grad:
                return first.detach(), None
            each = [
                torch.autograd.grad(first[:, column].sum(), point, retain_graph=True, materialize_grads=True)[0]
                for column in range(self.size)
            ]
        return first.detach(), torch.stack(each, dim=1)

    def _shares(self, inputs: StepInputs) -> Tensor:
        """w_i / B, ``[batch, 1]``."""
        size = len(inputs.example_ids)
        ones = self.start.new_ones(size)
        return ((ones if inputs.weights is None else inputs.weights.to(ones)) / size)[:, None]

    def _hyper(self, inputs: StepInputs) -> tuple[Hyper, ...]:
        if self.exact_rule:
            return inputs.hyper[:1]
        return ({"learning_rate": inputs.hyper[0]["learning_rate"], "weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0},)

    def _norm(self, gradients: Tensor, rows: Tensor, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """‖g‖ of the parameters' gradient, and K r at all examples."""
        weighted = gradients * self._shares(inputs)
        matrix = self._rows(rows)
        moved = matrix.T @ weighted if self._trace else (matrix.T @ weighted.flatten()).view(-1, self.size)
        return (moved[rows] * weighted).sum().clamp(min=0).sqrt(), moved

    def _clip(self, grad: Tensor, rows: Tensor, gradients: Tensor, inputs: StepInputs) -> Tensor:
        bound = self.run.update_map.clip_norm
        if bound is None:
            return grad
        norm, _ = self._norm(gradients, rows, inputs)
        return grad * (bound / (norm + _GUARD)).clamp(max=1.0)

    # ------------------------------------------------------------------ backward

    def costates(self, queries: Queries) -> Tensor:
        """Return α_T, ``[query, example, out]``."""
        batch = to_device(queries.examples.batch(queries.examples.ids), device_of(self.state))
        matrix = self._kernel(batch)
        start, origin = self._start(batch)
        point = self._at(start, origin, matrix, self.final, self.share).requires_grad_()
        measured = self._measured(queries, batch)
        with torch.enable_grad():
            values = measured(point.view(-1, *self.axes))
            (weights,) = torch.autograd.grad(values.sum(), point, materialize_grads=True)
        if not bool(torch.isfinite(weights).all()):
            raise NonFinite("the derivative of a measurement by the linearised outputs is not finite.")
        if self._trace:
            found = weights[:, None, :] * matrix[:, :, None]
        else:
            found = torch.einsum("qo,qod->qd", weights, matrix.view(len(weights), self.size, -1))
            found = found.view(len(weights), -1, self.size)
        # The costate of the coordinate along θ_0 has no part in the scores: no loss moves it.
        return found.mean(0, keepdim=True) if queries.mean else found

    def _measured(self, queries: Queries, batch: Any) -> Callable[[Tensor], Tensor]:
        """Return what is asked as a function of the outputs."""
        task, name = self.task, type(self.task).__name__
        if queries.of == "losses":
            return lambda outputs: task.losses_of(outputs, batch)

        def measured(outputs: Tensor) -> Tensor:
            return task.measurements(_Given(outputs), batch)

        whole, problem = queries.values(self.run.update_map, self.state).detach(), None
        if queries.mean:
            whole = self.run.update_map.measurements(self.state, batch).detach()
        try:
            split = measured(self._raw(batch)).detach()
            if split.shape != whole.shape or not torch.allclose(split, whole, rtol=1e-4, atol=1e-6):
                problem = f"they gave {split.flatten()[:3].tolist()} in place of {whole[:3].tolist()}"
        except (AttributeError, TypeError) as error:
            problem = str(error)
        if problem is not None:
            raise InputError(
                f"TangentKernel needs {name}.measurements to be a function of the outputs, model(...), alone; with the outputs "
                f"given in place of the model, {problem}. Let measurements call the model once, on the inputs that `outputs` "
                "takes, or ask for losses: Queries(data, of='losses')."
            )
        return measured

    def reverse(self, costates: Tensor) -> Iterator[ScorePart]:
        """Carry costates back through all steps."""
        zeros = {"dual": costates.new_zeros(1, 1), "origin": costates.new_zeros(1)}  # the rule is linear: any point does
        slots = self.rule.rule.slots
        still = costates.new_zeros(len(costates), 1)
        carried = StateVectors(
            {"dual": costates, "origin": still},
            {slot: {"dual": torch.zeros_like(costates), "origin": still} for slot in slots},
            {},
        )
        for step in reversed(range(len(self.run))):
            inputs = self.run.inputs(step)
            rows = self.run.examples.rows(inputs.example_ids).to(costates.device)
            state = TrainingState(zeros, dict.fromkeys(slots, zeros), {}, step)
            carried, gamma, _ = self.rule.at(state, zeros, self._hyper(inputs)).pull(carried)
            first, second = self._derivatives(self.visited[step], inputs, second=True)
            inside = self._unclip(gamma["dual"], first, rows, inputs)[:, rows]
            yield ScorePart(inputs.example_ids, (inside * first).sum(2) / len(rows))
            if second is None:
                continue
            bent = torch.einsum("bcd,qbd->qbc", second * self._shares(inputs)[..., None], inside)
            matrix = self._rows(rows)
            if self._trace:
                moved = torch.einsum("bn,qbc->qnc", matrix, bent)
            else:
                moved = (bent.flatten(1) @ matrix).view(costates.shape)
            carried.params["dual"] = carried.params["dual"] + moved

    def _unclip(self, gamma: Tensor, gradients: Tensor, rows: Tensor, inputs: StepInputs) -> Tensor:
        """Pull γ back through r' = min(1, c / (‖g‖ + ε)) r, whose norm depends on r by K r / ‖g‖."""
        bound = self.run.update_map.clip_norm
        if bound is None:
            return gamma
        norm, moved = self._norm(gradients, rows, inputs)
        if norm + _GUARD <= bound:
            return gamma
        along = (gamma[:, rows] * (gradients * self._shares(inputs))).sum((1, 2)) / (norm * (norm + _GUARD))
        return bound / (norm + _GUARD) * (gamma - along[:, None, None] * moved)


class _Given(nn.Module):
    """Stands for a model whose outputs are known."""

    def __init__(self, outputs: Tensor):
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.outputs


def _one_rule(hyper: tuple[Hyper, ...]) -> bool:
    """Whether all groups have the same numbers."""
    return all(dict(own) == dict(hyper[0]) for own in hyper)
