"""Blend: the mean of two methods whose errors have little to do with each other.

    s_q = Σ_m v_m · s_q^(m) · (σ_q / σ_q^(m)),        Σ_m v_m = 1

s_q^(m)    the scores of query q by method m;
σ_q^(m)    their standard deviation over the training examples: over random subsets of one size, the spread of what a method
           predicts for q is this number times a constant, so dividing by it gives all methods one voice;
σ_q        the same of the first method, whose unit the blend keeps.

Why it helps: an exact adjoint knows this run and its seed, `Source` knows the expected run. What the first gets wrong about
other seeds and the second about this run's details are nearly independent, and a mean halves the variance of independent
errors. It does not help where one method's errors contain the other's, as among approximations of one kind.

Cost: that of both methods. Memory: both tables of scores.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from retrograd.adjoint.adjoint import Adjoint
from retrograd.adjoint.contraction import Engine
from retrograd.adjoint.parts import ScorePart
from retrograd.adjoint.queries import Queries
from retrograd.adjoint.source import Source
from retrograd.adjoint.unrolled import Unrolled
from retrograd.errors import InputError
from retrograd.trajectory import Run


@dataclass(frozen=True)
class Blend:
    """The mean of several methods, each brought to the spread of the first.

    Args:
        methods: which; exact unrolling and SOURCE if not given.
        shares: how much of each; equal ones if not given.
    """

    methods: Sequence[Adjoint] = field(default_factory=lambda: (Unrolled(), Source()))
    shares: Sequence[float] | None = None

    unit: ClassVar[str] = "measurement per unit of example weight"
    citation: ClassVar[str] = """@misc{retrograd,
  title = {retrograd: Differentiate Through Training}, author = {{The retrograd developers}}, year = {2026}
}"""

    def __post_init__(self):
        if len(self.methods) < 2:
            raise InputError(f"a blend needs at least two methods, got {len(self.methods)}.")
        if self.shares is not None and (len(self.shares) != len(self.methods) or abs(sum(self.shares) - 1) > 1e-9):
            raise InputError(f"shares need one number for each of {len(self.methods)} methods, with sum 1; got {self.shares}.")

    def parts(self, run: Run, queries: Queries, engine: Engine, /) -> Iterator[ScorePart]:
        """Yield all scores at once: their spread is known only when all are there."""
        if engine.tokens:
            raise InputError("a blend gives no scores by token; ask its methods one by one (Source, Implicit, TracIn).")
        shares = self.shares or [1 / len(self.methods)] * len(self.methods)
        total, scale = None, None
        for number, (method, share) in enumerate(zip(self.methods, shares, strict=True)):
            values = torch.zeros(len(queries), len(run.examples), dtype=torch.float64)
            for part in method.parts(run, queries, engine.under(f"method{number}")):
                values.index_add_(1, run.examples.rows(part.example_ids), part.values.double().cpu())
            spread = _spread(values)
            scale = spread if scale is None else scale
            scaled = share * values * (scale / spread.clamp(min=torch.finfo(torch.float64).tiny))
            total = scaled if total is None else total + scaled
        assert total is not None
        dtype = next(iter(run.update_map.model.parameters())).dtype
        yield ScorePart(run.examples.ids, total.to(dtype))


def needs_smoothness(method: Adjoint) -> bool:
    """Whether a method takes exact derivatives of the steps, of which a rough run makes nothing."""
    if isinstance(method, Blend):
        return any(needs_smoothness(own) for own in method.methods)
    return isinstance(method, Unrolled) and method.curvature == "hessian"


def _spread(values: Tensor) -> Tensor:
    return values.std(dim=1, correction=0, keepdim=True)
