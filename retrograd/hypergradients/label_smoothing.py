"""Label smoothing as a hypergradient: would softer targets have helped, all of them or each one?

    t_i(s) = (1 − s) y_i + s / C,      d f / d s_i = ⟨d f / d t_i, 1/C − y_i⟩

y_i  label as a distribution over C classes;  s_i  share of the target of example i that is spread over all classes.

One walk back gives the derivative by all s_i; their sum is that by one s for all. Negative: smoothing would lower the outcome.
An example whose own derivative is very negative has a label that the outcome would rather not have learned.

Assumptions: a `Classification` on ``(inputs, labels)``. Cost: that of one hypergradient.

Reference: Szegedy et al. (2016), "Rethinking the inception architecture for computer vision", section 7.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from retrograd.errors import InputError
from retrograd.hypergradients.hypergradient import Method, hypergradient
from retrograd.hypergradients.variables import one_hot_labels
from retrograd.task import Classification
from retrograd.trajectory import Trajectory


def label_smoothing_gradient(run: Trajectory, outcome: Any, *, method: Method | None = None) -> Float[Tensor, "query example"]:
    """Return d outcome / d s_i: what smoothing the target of each example a little more would have done.

    Args:
        run: a recorded run of a `Classification`.
        outcome: as for `hypergradient`.
        method: as for `hypergradient`.

    Returns:
        One number a question and example, in units of the outcome per unit of s; the sum over examples is the derivative by
        one s for all.

    Raises:
        InputError: the run is no `Classification`, or smooths fully.
    """
    task = run.update_map.task
    if not isinstance(task, Classification) or task.label_smoothing >= 1:
        raise InputError(f"label smoothing is a matter of Classification with label_smoothing below 1, got {task!r}.")
    labels = run.examples.batch(run.examples.ids)[1]
    targets = labels if labels.is_floating_point() else one_hot_labels(run, labels)
    found = hypergradient(run, outcome, "labels", method=method)["labels"]
    # The task smooths what it is given: d f / d labels = (1 − s) d f / d t.
    return (found * (1 / targets.shape[1] - targets)).sum(-1) / (1 - task.label_smoothing)
