"""Several methods on one record: how far they agree, what they cost, and how right they are where retrainings tell.

    agreement_mk = mean over queries of the rank correlation over examples of methods m and k

Agreement needs no truth, and two methods that agree may be wrong together; accuracy is the linear datamodeling score.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from retrograd.adjoint import Adjoint
from retrograd.attribution import Agreement, Check, Scores, attribute
from retrograd.errors import InputError
from retrograd.evaluation.agreement import correlations, ranked, score_difference
from retrograd.evaluation.retrained import Retrained
from retrograd.evaluation.self_check import evaluate
from retrograd.trajectory import Run, Trajectory

_TIMED_STEPS = 20


@dataclass(frozen=True)
class Comparison:
    """Methods side by side.

    Attributes:
        scores: by name.
        agreement: rank correlation over examples of each pair, mean over queries, in the order of ``scores``.
        epochs: processor time of each method in epochs of the run's own training; in seconds where no step is recorded.
        checks: predicted against actual of each method, if retrainings were given.
    """

    scores: Mapping[str, Scores]
    agreement: Float[Tensor, "method method"]
    epochs: Mapping[str, float]
    checks: Mapping[str, Check]

    def difference(self, name: str, other: str) -> Agreement:
        """By how much the accuracy of ``name`` exceeds that of ``other``, with the interval of the difference.

        Raises:
            InputError: there are no retrainings to tell, or no such method.
        """
        missing = [own for own in (name, other) if own not in self.checks]
        if missing:
            raise InputError(f"there is no accuracy of {missing}. Known: {list(self.checks)}; give retrained= to compare.")
        mine, its = self.checks[name], self.checks[other]
        return score_difference(mine.predicted, its.predicted, mine.actual)

    def __str__(self) -> str:
        """Draw a table: a row a method."""
        names = list(self.scores)
        width = max(map(len, [*names, "method"]))
        title = f"{'method':<{width}}  {'epochs':>7}" + (f"  {'LDS':<21}  {'slope':<22}" if self.checks else "")
        lines = [title + "  agrees with " + " ".join(f"{number + 1:>5}" for number in range(len(names)))]
        for number, name in enumerate(names):
            line = f"{name:<{width}}  {self.epochs[name]:>7.1f}"
            if self.checks:
                line += f"  {self.checks[name].spearman!s:<21}  {self.checks[name].slope!s:<22}"
            lines.append(
                line + f"  {number + 1:>11} " + " ".join(f"{value:>5.2f}" for value in self.agreement[number].tolist())
            )
        ceilings = next(iter(self.checks.values())).ceilings if self.checks else {}
        if ceilings:
            lines.append("No prediction can pass: " + ", ".join(f"{kind} {value:.3f}" for kind, value in ceilings.items()))
        return "\n".join(lines)


def compare(
    run: Run | Sequence[Run],
    queries: Any,
    methods: Mapping[str, Adjoint] | Sequence[Adjoint],
    *,
    retrained: Retrained | None = None,
    **options: Any,
) -> Comparison:
    """Attribute the same queries by several methods.

    Args:
        run: the recorded run, or several.
        queries: what is asked.
        methods: which, by name, or a list of them.
        retrained: outcomes of retraining (`retrain`), for the accuracy. Their counterfactual is asked of all methods, unless
            ``options`` say otherwise.
        options: passed on to `attribute`, the same for all methods.

    Returns:
        Scores, agreement, cost and accuracy; ``print`` shows a table.

    Raises:
        InputError: there is no method, or two have the same name.

    >>> from torch import nn
    >>> from retrograd.adjoint import TracIn, Unrolled
    >>> from retrograd.task import Regression
    >>> from retrograd.trajectory import record
    >>> draw = torch.Generator().manual_seed(0)
    >>> data = (torch.randn(6, 2, generator=draw), torch.randn(6, 1, generator=draw))
    >>> run = record(nn.Linear(2, 1), data, Regression("prediction"), optimizer=lambda p: torch.optim.SGD(p, lr=0.01),
    ...              epochs=1, batch_size=6)
    >>> found = compare(run, data, [Unrolled(), TracIn(1)], check_roughness=False)      # one step: nothing is undone
    >>> [round(value, 3) for value in found.agreement[0].tolist()]
    [1.0, 1.0]
    """
    named = dict(methods) if isinstance(methods, Mapping) else {repr(method): method for method in methods}
    if not named or len(named) != len(methods):
        raise InputError(f"compare needs methods with different names, got {[repr(method) for method in methods]}.")
    if retrained is not None:
        asked = retrained.counterfactual
        options = {"keep": asked.keep, "removal": asked.removal, "seeds": asked.seeds} | options
    scores, seconds = {}, {}
    for name, method in named.items():
        began = time.process_time()
        scores[name] = attribute(run, queries, method=method, **options)
        seconds[name] = time.process_time() - began
    ranks = torch.stack([ranked(own.values.T.double()) for own in scores.values()])  # [method, example, query]
    agreement = torch.stack([torch.stack([correlations(one, other)[0].mean() for other in ranks]) for one in ranks])
    unit = _epoch(run[0] if isinstance(run, Sequence) else run)
    checks = {} if retrained is None else {name: evaluate(own, retrained) for name, own in scores.items()}
    return Comparison(scores, agreement, {name: own / unit for name, own in seconds.items()}, checks)


def _epoch(run: Run) -> float:
    """Processor seconds of one epoch of the run's own steps; 1 where no step is recorded."""
    if not isinstance(run, Trajectory) or not len(run):
        return 1.0
    state, steps = run.state(0), min(_TIMED_STEPS, len(run))
    run.update_map(state, run.inputs(0))
    began = time.process_time()
    seen = 0
    for step in range(steps):
        inputs = run.inputs(step)
        state = run.update_map(state, inputs)
        seen += len(inputs.example_ids)
    return max(time.process_time() - began, 1e-9) * len(run.examples) / seen
