"""retrograd itself, measured like its peers; the options are task, method, "at_run" or "matched", and the number of runs.

The runs are recorded here, before the clock starts, and checked to be the ones whose states the peers got. The matched run is
trained on the clock.
"""

from typing import Any

import torch
from exchange import Given, measure
from tasks import compared
from torch import Tensor
from torch.utils.data import TensorDataset
from unrolled import recorded

# begin
from retrograd import TracIn, Unrolled, attribute  # isort: skip
from retrograd.adjoint import Blend, Implicit, Source  # isort: skip

# end

METHODS = {
    "exact": Unrolled,
    "tracin": TracIn,
    "influence_ekfac": Implicit,
    "influence_time": lambda: Implicit(damping="training_time"),
    "source_ekfac": Source,
    "blend": Blend,
    "blend_gauss_newton": lambda: Blend((Unrolled(curvature="gauss_newton"), Source())),
}


def runs(given: Given) -> list[Any]:
    task, _, _, count = given.options
    setting = compared(task)
    found = [recorded(setting, seed) for seed in range(int(count))]
    for seed, run in enumerate(found):
        run.digest  # noqa: B018  (hashing the data is paid once)
        state = given.state(given.final, seed)
        assert all(torch.equal(leaf, state[name]) for name, leaf in run.final_state.params.items()), "another run"
    return found


def attribution(given: Given, queries: TensorDataset, recorded_runs: Any) -> Tensor:
    _, name, point, _ = given.options
    run = recorded_runs if len(recorded_runs) > 1 else recorded_runs[0]
    method, keep = METHODS[name](), {"matched": 0.5, "at_run": 1.0}[point]
    # begin
    scores = attribute(
        run,
        queries.tensors,
        method=method,
        keep=keep,
        removal="deletion",
        seeds="fresh",
        check_roughness=len(recorded_runs) > 1,  # by which a blend of several runs chooses its shares
    )
    return scores.values
    # end


if __name__ == "__main__":
    measure("retrograd", attribution, runs)
