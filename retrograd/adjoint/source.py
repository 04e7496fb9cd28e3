"""SOURCE: training in a few segments, each of which is an influence function with a damping of its own (Bae et al. 2024).

The run is cut into L segments of K_l steps. Within a segment Hessian and gradients are taken to be stationary; then its exact
product of steps and the sum of what its steps put in are functions of the averaged curvature alone. With a step
θ ← θ − η P g (P the optimizer's preconditioner) and c_l = Σ η over the segment:

    S_l = P^½ exp(−c_l H̃_l) P^−½                                  what becomes of the state over the segment
    r_l(i) = P^½ (1 − exp(−c_l H̃_l)) H̃_l⁻¹ P^½ ḡ_l(i) / N_l       what example i puts in

    d f / d w_i ≈ − ∇f(θ_T)ᵀ Σ_l S_L S_{L−1} … S_{l+1} r_l(i)                                          equations 13 to 15

H̃_l        P^½ H_l P^½ with H_l the Gauss-Newton matrix, averaged over the segment's checkpoints, in the form that ``curvature``
           gives it, plus weight decay;
P          one number for SGD, with momentum μ summed up, 1/(1 − μ); a number a coordinate for Adam, 1/(√v̂ + ε), averaged over
           the segment's checkpoints;
ḡ_l(i)     ∇ℓ_i, averaged over the segment's checkpoints, 0 where i is not in the data of the segment's stage;
N_l        number of examples in the data of the segment's stage.

From the query's side it is a walk back: p_l = P^½ F(H̃_l) P^½ q, scores −⟨p_l, ḡ_l(i)⟩ / N_l, then q ← P^−½ exp(−c_l H̃_l) P^½ q.
F(σ) = (1 − e^{−cσ})/σ is c where there is no curvature and 1/σ where there is much: as 1/(σ + 1/c), an influence function
whose damping says how long the segment trained.

``momentum="heavy_ball"`` takes the closed form of heavy-ball steps in place of the exponential, for segments of few steps:
with M = [[1 − ησ, −ημ], [σ, μ]] acting on (displacement, velocity), exp(−cσ) becomes the first entry of M^K, and F what a
constant force has moved after K steps.

Assumptions: order and seed average out (it answers for the expected run), and each example of a stage is visited as often as
any other. Exact unrolling knows this run's seed, SOURCE does not: their errors are nearly independent (see `Blend`). Adam's
coupled weight decay is taken with the mean of P. Cost: for each of C checkpoints a share of a curvature fit and a pass over
the data for all queries; with ``fast=True`` one of both a segment. Memory: factors of one segment and [query, P].

Reference: Bae, Lin, Lorraine, Grosse (2024), "Training data attribution via approximate unrolled differentiation"; momentum:
appendix D.2. The symmetric form for preconditioners and the closed heavy-ball form are ours: the paper takes the diagonal of
P H in the exponential.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from retrograd.adjoint.contraction import Engine
from retrograd.adjoint.flows import Exponential, Flow, HeavyBall
from retrograd.adjoint.parts import Probe, ScorePart
from retrograd.adjoint.preconditioner import mean_square, preconditioner, times
from retrograd.adjoint.queries import Queries
from retrograd.curvature import EKFAC, Curvature
from retrograd.errors import InputError, UnsupportedTraining
from retrograd.params import Params, map_params
from retrograd.trajectory import Run, TrainingState, Trajectory
from retrograd.update_rules import SGD


@dataclass(frozen=True)
class Source:
    """SOURCE over segments of the run.

    Args:
        segments: L, how many segments of equal length; or one number for each stage.
        checkpoints_per_segment: states of each segment that curvature and gradients are averaged over.
        curvature: how the Gauss-Newton matrix is approximated.
        stages: the steps at which training went over to other data; no segment reaches across.
        fast: average the parameters of a segment's checkpoints, and take curvature and gradients there once.
        momentum: how SGD's momentum is summed up, ``"terminal_velocity"`` or ``"heavy_ball"``.
        seed: of the labels that are sampled for the curvature.
    """

    segments: int | Sequence[int] = 3
    checkpoints_per_segment: int = 2
    curvature: Curvature = field(default_factory=EKFAC)
    stages: Sequence[int] = ()
    fast: bool = False
    momentum: Literal["terminal_velocity", "heavy_ball"] = "terminal_velocity"
    seed: int = 0

    unit: ClassVar[str] = "measurement per unit of example weight"
    citation: ClassVar[str] = """@inproceedings{bae2024training,
  title = {Training Data Attribution via Approximate Unrolled Differentiation},
  author = {Bae, Juhan and Lin, Wu and Lorraine, Jonathan and Grosse, Roger},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2024}
}"""

    def __post_init__(self):
        counts = self._counts()
        if min(counts) < 1 or self.checkpoints_per_segment < 1:
            raise InputError(
                f"segments and checkpoints_per_segment must be at least 1, got {self.segments} and "
                f"{self.checkpoints_per_segment}."
            )
        if len(counts) != len(self.stages) + 1:
            raise InputError(
                f"segments={self.segments} has {len(counts)} numbers for {len(self.stages) + 1} stages. Give one number for "
                "each stage (there is one more than boundaries), or one for all."
            )
        if self.momentum not in ("terminal_velocity", "heavy_ball"):
            raise InputError(f"momentum must be 'terminal_velocity' or 'heavy_ball', got {self.momentum!r}.")

    def parts(self, run: Run, queries: Queries, engine: Engine, /) -> Iterator[ScorePart]:
        """Yield the scores of one batch of training examples after the other, the last segment first."""
        segments = self._segments(run)
        steps = ", ".join(str(step) for segment in segments for step in segment.steps)
        engine.notes.add(checkpoints=steps, exact=False)
        yield from engine.contract(run, self._probes(run, queries, segments, engine), len(segments))

    def _probes(self, run: Run, queries: Queries, segments: "list[Segment]", engine: Engine) -> Iterator[Probe]:
        costates = queries.gradients(run, run.final_state).params
        for number in reversed(range(len(segments))):
            segment = segments[number]
            states = [run.state(step) for step in segment.steps]
            at = [_mean_state(states)] if self.fast else states
            size, scale = preconditioner(run, states)
            fit = lambda at=at, own=segment, scale=scale: self.curvature.fit(  # noqa: E731
                run, at, seed=self.seed, ids=own.ids, scale=scale
            )
            operator = engine.once(("source", repr(self), number), fit)
            flow, decay = self._flow(run, segment, size), run.weight_decay * mean_square(scale) + run.shrinkage
            inside = times(costates, scale)
            put_in = operator.apply(lambda found, _: flow.put_in(run.mean_weight * found + decay), inside)  # noqa: B023
            kept = operator.apply(lambda found, _: flow.kept(run.mean_weight * found + decay), inside)  # noqa: B023
            yield Probe(tuple(at), times(put_in, scale), segment.share(run))
            costates = kept if scale is None else map_params(torch.div, kept, scale)

    def _flow(self, run: Run, segment: "Segment", size: float) -> Flow:
        if self.momentum == "terminal_velocity":
            return Exponential(segment.duration * size)
        rule = run.update_map.rule
        if not isinstance(run, Trajectory) or not isinstance(rule, SGD) or len(run.update_map.groups) != 1:
            raise UnsupportedTraining("momentum='heavy_ball' needs a recorded run of SGD with one parameter group.")
        hyper = run.records[segment.steps[0]].hyper[0]
        if rule.nesterov or hyper.get("dampening"):
            raise UnsupportedTraining("momentum='heavy_ball' is for plain momentum: no Nesterov, no dampening.")
        return HeavyBall(segment.length, segment.duration / segment.length, float(hyper.get("momentum", 0.0)))

    def _counts(self) -> list[int]:
        whole = isinstance(self.segments, int)
        return [self.segments] * (len(self.stages) + 1) if whole else list(self.segments)  # type: ignore[list-item, arg-type]

    def _segments(self, run: Run) -> "list[Segment]":
        """Cut every stage into segments of equal length, with checkpoints in the middles of equal stretches of each."""
        each = self.checkpoints_per_segment
        edges = [0, *self.stages, len(run)]
        if any(left >= right for left, right in pairwise(edges)):
            raise InputError(f"stages are steps inside the run, 0 < … < {len(run)}, ascending; got {list(self.stages)}.")
        if self.stages and not isinstance(run, Trajectory):
            raise InputError("stages need a recorded run: of checkpoints alone it is not known which data each stage had.")
        steps, stops, stage_of = [], [], []
        for stage, (count, left, right) in enumerate(zip(self._counts(), edges[:-1], edges[1:], strict=True)):
            stretches, length = count * each, right - left
            own = [left + (2 * index + 1) * length // (2 * stretches) for index in range(stretches)]
            if not self.stages and length >= stretches:
                own = run.spread(stretches)
            if len(set(own)) < stretches or length < stretches:
                raise InputError(
                    f"the run's {length} steps {left} to {right} have no {stretches} checkpoints; ask for fewer segments or "
                    "checkpoints."
                )
            steps += own
            stops += [left + (index + 1) * length // stretches for index in range(stretches)]
            stage_of += [stage] * count
        exposure = run.exposure(steps, stops if isinstance(run, Trajectory) else None)
        found = []
        for segment, stage in enumerate(stage_of):
            own = slice(segment * each, (segment + 1) * each)
            first, last = stage_of.index(stage) * each, (len(stage_of) - stage_of[::-1].index(stage)) * each
            ids = run.examples.ids[exposure[first:last].sum(0) > 0]
            found.append(Segment(steps[own], stops[own][-1] - ([0, *stops][own.start]), exposure[own].sum().item(), ids))
        return found


@dataclass(frozen=True)
class Segment:
    """A stretch of the run.

    Attributes:
        steps: its checkpoints.
        length: K, its number of steps.
        duration: Σ η.
        ids: the examples of its stage's data.
    """

    steps: list[int]
    length: int
    duration: float
    ids: Tensor

    def share(self, run: Run) -> Tensor:
        """1 / N_l for the examples of the stage, 0 for others."""
        share = torch.zeros(len(run.examples), dtype=torch.float64)
        share[run.examples.rows(self.ids)] = 1 / len(self.ids)
        return share


def _mean_state(states: Sequence[TrainingState]) -> TrainingState:
    """The mean of parameters and floating-point buffers; everything else as in the last state."""

    def mean(of: list[Params]) -> Params:
        last = of[-1]
        floating = {name for name, leaf in last.items() if leaf.is_floating_point()}
        return {
            name: torch.stack([own[name] for own in of]).mean(0) if name in floating else leaf for name, leaf in last.items()
        }

    return replace(
        states[-1], params=mean([state.params for state in states]), buffers=mean([state.buffers for state in states])
    )
