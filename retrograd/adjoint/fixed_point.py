"""Implicit differentiation of the update map at its fixed point: what training would converge to, and how that moves.

A run that has settled at s* = Φ(s*, u) follows a small change of u by ds* = (I − A)⁻¹ B du, A = ∂Φ/∂s, B = ∂Φ/∂u. So

    d f / d u = Bᵀ λ*,      λ* = (I − Aᵀ)⁻¹ ∇f(s*)

The state is all of it: parameters θ, optimizer slots o, buffers b. As update rules are elementwise, slots are eliminated
coordinate by coordinate; with J the Jacobian of U, ∂g/∂θ = H,

    do = (I − J_oo)⁻¹ (J_oθ dθ + J_og dg),        (H + D/S) dθ = −∂g/∂u du − …
    S  = −J_θg − J_θo (I − J_oo)⁻¹ J_og           the long-run step of a gradient: η/(1−μ) for momentum
    D  = 1 − J_θθ − J_θo (I − J_oo)⁻¹ J_oθ        what decay takes off: ηλ for AdamW, S λ for decay inside of the gradient

    (H + D/S + shift) μ = ∇_θ f (+ what moves through the buffers),      λ*_θ = μ / S,   λ*_o = (I − J_oo)⁻ᵀ J_θoᵀ λ*_θ

The matrix is symmetric, whatever the optimizer, and its fixed point is the optimizer's own: that of AdamW is not where the
gradient vanishes but where P g + λθ = 0. λ* is then contracted with the inputs of a step as every other costate is. Running
averages in buffers, b' = (1 − m) b + m v(θ), are eliminated likewise. Φ is the mean of the last ``window`` recorded steps (one
pass over the data), all taken at the final state, with their weights, random numbers and meta-parameters; Adam's count of
steps is taken to be infinite. Of an adaptive optimizer and several steps the mean of J and that of H are taken by themselves.

| solver | gives | cost |
|---|---|---|
| ``conjugate_gradients`` | the solution; needs a positive definite matrix | ``iterations`` Hessian products |
| ``neumann`` | Σ_{j<iterations} (I − αS(H + D/S))^j αS: as many steps of unrolled training; α = ``step`` | the same |
| ``nystrom`` | the inverse of a rank-``rank`` approximation + shift, which must be above 0 | ``rank`` products, r P memory |
| ``identity`` | S: one step of unrolled training (T1 − T2) | none |

A truncated Neumann series, of K terms, damps as shift = 1/(α S K) would: which of several solutions an outer loop reaches
depends on it.

Assumptions: the run has settled. Whether it has is noted as ``drift``: how far the run would move at its present pace in as
many steps as it had, as a share of how far it came; far from 0, no solver helps, and `Unrolled` is right. Inputs that do not
move a fixed point (learning rates, momentum, the start) are refused. Notes also have the residual ‖q − Aμ‖/‖q‖ of the solver.

References: Bengio (2000), "Gradient-based optimization of hyperparameters"; Lorraine, Vicol, Duvenaud (2020), "Optimizing
millions of hyperparameters by implicit differentiation" (Neumann); Rajeswaran et al. (2019), "Meta-learning with implicit
gradients" (CG); Vicol et al. (2022), "On implicit bias in overparameterized bilevel optimization"; Hataya, Yamada (2023),
"Nyström method for accurate and scalable implicit differentiation". The elimination of the optimizer's state is ours.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from retrograd.adjoint.contraction import Engine
from retrograd.adjoint.parts import Notes, ScorePart
from retrograd.adjoint.queries import Queries
from retrograd.adjoint.unrolled import refuse_non_finite
from retrograd.errors import InputError, NotRecorded, SolverFailed
from retrograd.linalg import Solution, conjugate_gradients, neumann, nystrom
from retrograd.params import Params, flatten, unflatten
from retrograd.trajectory import Pullback, Run, StateVectors, StepInputs, Trajectory
from retrograd.trajectory.rule_jacobian import Jacobian

_FORGOTTEN = 1e9  # steps after which Adam's bias corrections are 1
_IN_THE_LOSS = "example_weights, weight_decay, meta, inputs, labels"


@dataclass(frozen=True)
class FixedPoint:
    """Implicit differentiation at the end of the run.

    Args:
        solver: see the table above.
        iterations: of conjugate gradients at most, or terms of the Neumann series.
        tolerance: relative residual at which conjugate gradients stop.
        shift: added to the curvature, in its units (loss per squared unit of the parameters).
        step: α, factor on the optimizer's own long-run step in the Neumann series, or that step itself.
        preconditioned: whether the Neumann series takes S for each coordinate, or one number for all: Σ_j (I − α(H + D/S))^j α.
            The solution is the same; a truncated series is not. S of an Adam that still follows single gradients may be
            negative, and then the series with S diverges.
        rank: of the Nyström approximation.
        window: how many last steps Φ is the mean of; as many as went through the data once, if not given.
        seed: of the Nyström approximation's random directions.
    """

    solver: Literal["conjugate_gradients", "neumann", "nystrom", "identity"] = "conjugate_gradients"
    iterations: int = 100
    tolerance: float = 1e-8
    shift: float = 0.0
    step: float = 1.0
    preconditioned: bool = True
    rank: int = 50
    window: int | None = None
    seed: int = 0

    unit: ClassVar[str] = "measurement per unit of example weight"
    citation: ClassVar[str] = """@inproceedings{lorraine2020optimizing,
  title = {Optimizing Millions of Hyperparameters by Implicit Differentiation},
  author = {Lorraine, Jonathan and Vicol, Paul and Duvenaud, David},
  booktitle = {International Conference on Artificial Intelligence and Statistics}, year = {2020}
}"""

    def __post_init__(self):
        if self.solver not in ("conjugate_gradients", "neumann", "nystrom", "identity"):
            raise InputError(f"solver must be 'conjugate_gradients', 'neumann', 'nystrom' or 'identity', got {self.solver!r}.")
        if self.iterations < 1 or self.rank < 1 or not self.step > 0 or self.shift < 0 or not self.tolerance > 0:
            raise InputError("iterations, rank, step and tolerance must be positive, and shift not negative.")
        if self.solver == "nystrom" and not self.shift > 0:
            raise InputError("a low-rank matrix has no inverse by itself: give the Nyström solver a shift above 0.")
        if self.window is not None and self.window < 1:
            raise InputError(f"window is a number of steps, at least 1, got {self.window}.")

    def parts(self, run: Run, queries: Queries, engine: Engine, /) -> Iterator[ScorePart]:
        """Yield the scores of each batch of the window."""
        engine.notes.add(exact=False)
        for inputs, _, pullback in self.sweep(run, queries.gradients(run, run.final_state), engine.notes):
            yield ScorePart(inputs.example_ids, pullback.scores)

    def sweep(
        self, run: Run, cotangents: StateVectors, notes: Notes, wrt: frozenset[str] = frozenset()
    ) -> Iterator[tuple[StepInputs, int, Pullback]]:
        """Solve for λ*, and yield u_t, t and its contraction with each step of the window.

        Args:
            run: the recorded run.
            cotangents: ∇f at its final state.
            notes: gets residual, iterations and drift.
            wrt: inputs to differentiate by, other than the example weights.

        Raises:
            NotRecorded: the steps of the run are not recorded.
            InputError: ``wrt`` names an input that does not move a fixed point.
            SolverFailed: the fixed point is none (no decay of slots, curvature not positive definite).
        """
        if not isinstance(run, Trajectory) or not len(run):
            raise NotRecorded("implicit differentiation of the update map needs recorded steps; see `record`.")
        if not run.update_map.gradient.plain:
            raise InputError(
                "what is solved at a fixed point needs a symmetric Jacobian of the gradient; games and directions have none. "
                "Use Unrolled()."
            )
        hyper = {name for own in run.records[-1].hyper for name in own} - {"weight_decay"} | {"clip_norm"}
        if wrt & hyper:
            raise InputError(
                f"{sorted(wrt & hyper)} do not move the fixed point that training settles at; what does: {_IN_THE_LOSS}. "
                "Use Unrolled() to differentiate the run that happened."
            )
        system = _System(run, self._steps(run))
        notes.add(solver=self.solver, drift=system.drift)
        costates = self._solve(system, cotangents, notes)
        for inputs in system.inputs:
            own = costates.map(lambda leaf: leaf / len(system.inputs))
            pullback = run.update_map.pullback(system.state, inputs, own, wrt=wrt)
            refuse_non_finite(pullback, inputs.step)
            yield inputs, inputs.step, pullback

    def _steps(self, run: Trajectory) -> range:
        if self.window is not None:
            return range(max(0, len(run) - self.window), len(run))
        first, seen = len(run), 0
        while first > 0 and seen < len(run.examples):
            first -= 1
            seen += len(run.records[first].example_ids)
        return range(first, len(run))

    def _solve(self, system: "_System", cotangents: StateVectors, notes: Notes) -> StateVectors:
        through, buffers = system.through_buffers(cotangents)
        right = system.flat(through)
        steps = system.steps

        def multiply(rows: Tensor) -> Tensor:
            return system.multiply(rows) + self.shift * rows

        if self.solver == "conjugate_gradients":
            _check_positive(steps)
            solution = conjugate_gradients(multiply, right, tolerance=self.tolerance, iterations=self.iterations)
        elif self.solver == "nystrom":
            _check_positive(steps)
            generator = torch.Generator().manual_seed(self.seed)
            rank = min(self.rank, right.shape[1])
            options = {"generator": generator, "dtype": right.dtype, "device": right.device}
            values, vectors = nystrom(system.multiply, right.shape[1], rank, **options)
            found = (right - (right @ vectors) * (values / (values + self.shift)) @ vectors.T) / self.shift
            solution = _judged(multiply, right, found, rank)
        elif self.solver == "neumann":
            solution = neumann(
                multiply,
                right,
                step=self.step,
                iterations=self.iterations,
                preconditioner=(lambda rows: rows * steps) if self.preconditioned else None,
            )
        else:
            solution = _judged(multiply, right, right * steps, 0)
        notes.add(
            solver_residual=max(notes.entries.get("solver_residual", 0.0), solution.residuals.max().item()),
            solver_iterations=solution.iterations,
        )
        return system.costates(solution.values, cotangents, buffers)


def _judged(multiply: Callable[[Tensor], Tensor], right: Tensor, values: Tensor, iterations: int) -> Solution:
    norms = torch.linalg.vector_norm(right, dim=1)
    residuals = torch.linalg.vector_norm(right - multiply(values), dim=1) / norms.clamp(min=torch.finfo(right.dtype).tiny)
    return Solution(values, residuals, iterations, residuals < 1)


def _check_positive(steps: Tensor) -> None:
    if not (steps > 0).all():
        raise SolverFailed(
            "the long-run step of a gradient is not positive in every coordinate, so the optimizer has not settled (Adam's "
            "second moment still follows single gradients). Train longer, take a longer window, or use Unrolled()."
        )


class _System:
    """H + D/S of the mean of some steps, at the final state."""

    def __init__(self, run: Trajectory, numbers: range):
        self._map, self.state = run.update_map, run.final_state
        self.inputs = [_settled(run.inputs(number)) for number in numbers]
        total: dict[str, Jacobian] = {}
        written, graph = set(), None
        for inputs in self.inputs:
            graph = self._map.graph(self.state, inputs)
            rule = self._map.linearised_rule(self.state, graph.grads, inputs)
            if rule.clips:
                raise InputError(
                    "clipping is still active at the end of the run, so it has not settled; use Unrolled(), or train longer."
                )
            for name, jacobian in rule.jacobians.items():
                total[name] = _plus(total.get(name), jacobian, 1 / len(self.inputs))
            written |= graph.written
        assert graph is not None
        # One graph is kept and reversed again and again; of several, each is built anew: memory stays that of one step.
        self._kept = graph if len(self.inputs) == 1 else None
        self._written = frozenset(written)
        self._names = [name for name in self._map.names if name in graph.grads]
        self._like = {name: self.state.params[name] for name in self._names}
        self._eliminated = {name: eliminate_slots(total[name], self._like[name], self._map.rule.slots) for name in self._names}
        self.steps = flatten([self._eliminated[name][1] for name in self._names])
        self._decay = flatten([self._eliminated[name][0] for name in self._names]) / self.steps
        self.drift = self._drift(run)

    def flat(self, params: Params) -> Tensor:
        return flatten([params[name] for name in self._names], batched=True)

    def multiply(self, rows: Tensor) -> Tensor:
        return self._products(unflatten(rows, self._like), {})[0] + self._decay * rows

    def through_buffers(self, cotangents: StateVectors) -> tuple[Params, Params]:
        """Return ∇_θ f with what f owes to θ through running averages in the buffers, and λ*_b of these."""
        written = {name: leaf for name, leaf in cotangents.buffers.items() if name in self._written and leaf.any()}
        if not written:
            return cotangents.params, {}
        zeros = {name: torch.zeros_like(cotangents.params[name]) for name in self._names}
        _, kept = self._products(zeros, written)
        settled = {}
        for name, leaf in written.items():
            share = (kept[name] * leaf).sum() / leaf.square().sum()
            if not (share < 1 and torch.allclose(kept[name], share * leaf, rtol=1e-4, atol=1e-6 * leaf.abs().max().item())):
                raise SolverFailed(f"buffer {name} is no running average, so it has no fixed point of its own; use Unrolled().")
            settled[name] = leaf / (1 - share)
        moved, _ = self._products(zeros, settled)
        found = unflatten(moved, self._like)
        return {name: leaf + found[name] if name in found else leaf for name, leaf in cotangents.params.items()}, settled

    def costates(self, solved: Tensor, cotangents: StateVectors, buffers: Params) -> StateVectors:
        """Return λ* for the solutions μ, with λ*_b: what is fed to a model moves its running averages directly, too."""
        moved = unflatten(solved / self.steps, self._like)
        params = {name: moved.get(name, torch.zeros_like(leaf)) for name, leaf in cotangents.params.items()}
        slots = {
            slot: {
                name: params[name] * self._eliminated[name][2][slot] if name in moved else torch.zeros_like(params[name])
                for name in params
            }
            for slot in self._map.rule.slots
        }
        return StateVectors(params, slots, buffers)

    def _products(self, gamma: Params, buffers: Params) -> tuple[Tensor, Params]:
        """Mean over the steps of H γ + (∂b'/∂θ)ᵀ λ_b, and of (∂b'/∂b)ᵀ λ_b."""
        total, kept = None, {name: torch.zeros_like(leaf) for name, leaf in buffers.items()}
        count = len(next(iter(gamma.values())))
        for inputs in self.inputs:
            graph = self._kept or self._map.graph(self.state, inputs)
            found, _ = graph.reverse(gamma, buffers, "loop" if count == 1 else "batched", retain_graph=True)
            own = flatten([_or_zeros(found[name], gamma[name]) for name in self._names], batched=True) / len(self.inputs)
            total = own if total is None else total + own
            for name, leaf in buffers.items():
                kept[name] += _or_zeros(found[f"buffers/{name}"], leaf) / len(self.inputs)
        assert total is not None
        return total, kept

    def _drift(self, run: Trajectory) -> float:
        """How far the run would move at its present pace, over how far it came (at least a thousandth of its size)."""
        now, start = flatten(self.state.params.values()), flatten(run.state(0).params.values())
        moved = sum((flatten(self._map(self.state, inputs).params.values()) - now) / len(self.inputs) for inputs in self.inputs)
        came = torch.maximum((now - start).norm(), 1e-3 * now.norm())  # a run may begin where it ends
        return (len(run) * torch.as_tensor(moved).norm() / came.clamp(min=torch.finfo(now.dtype).tiny)).item()


def eliminate_slots(jacobian: Jacobian, like: Tensor, slots: tuple[str, ...]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return D, S, and λ*_o per unit of λ*_θ, each shaped like the parameter, of an elementwise rule at its fixed point.

    Raises:
        SolverFailed: a slot never forgets (Adagrad's sum of squares), so that there is no fixed point.
    """

    def entry(target: str, source: str) -> Tensor:
        found = jacobian[target][source]
        return found if isinstance(found, Tensor) else torch.full_like(like, found)

    decay, step = 1 - entry("parameter", "parameter"), -entry("parameter", "gradient")
    if not slots:
        return decay, step, {}
    kept = torch.stack([torch.stack([entry(target, source) for source in slots], -1) for target in slots], -2)
    matrix = torch.eye(len(slots), dtype=like.dtype, device=like.device) - kept
    into = torch.stack([torch.stack([entry(slot, "parameter"), entry(slot, "gradient")], -1) for slot in slots], -2)
    out = torch.stack([entry("parameter", slot) for slot in slots], -1)
    solved, singular = torch.linalg.solve_ex(matrix, into)
    if singular.any() or not torch.isfinite(solved).all():
        raise SolverFailed("a slot of this optimizer never forgets, so training has no fixed point; use Unrolled().")
    through = (out[..., None] * solved).sum(-2)
    owed = torch.linalg.solve(matrix.mT, out)
    return decay - through[..., 0], step - through[..., 1], {slot: owed[..., row] for row, slot in enumerate(slots)}


def _plus(total: Jacobian | None, jacobian: Jacobian, share: float) -> Jacobian:
    if total is None:
        return {target: {source: share * value for source, value in row.items()} for target, row in jacobian.items()}
    return {
        target: {source: total[target][source] + share * value for source, value in row.items()}
        for target, row in jacobian.items()
    }


def _settled(inputs: StepInputs) -> StepInputs:
    return replace(inputs, hyper=tuple({**own, "step": _FORGOTTEN} if "step" in own else dict(own) for own in inputs.hyper))


def _or_zeros(leaf: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if leaf is None else leaf
