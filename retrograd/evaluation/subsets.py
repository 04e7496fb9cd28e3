"""Which examples stay: random subsets, and all but one."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from retrograd.errors import InputError
from retrograd.trajectory import Trajectory


def random_subsets(
    run: Trajectory, count: int, keep: float, seed: int = 0, *, complementary: bool = False
) -> Bool[Tensor, "subset example"]:
    """Draw subsets of equal size, round(keep · N), uniformly.

    Args:
        run: the run whose examples are drawn from.
        count: how many subsets.
        keep: share of the examples that stays.
        seed: seed of the draw.
        complementary: every second subset is what its predecessor leaves out; for halves, from an even number of examples.

    Returns:
        True where an example stays, in the order of ``run.examples.ids``.
    """
    if not 0 < keep <= 1:
        raise InputError(f"keep is the share of examples that stays, 0 < keep <= 1, got {keep}.")
    total = len(run.examples)
    size = round(keep * total)
    if complementary and (2 * size != total or count % 2):
        raise InputError(
            f"complementary subsets are halves of an even number of examples, in pairs; got keep={keep}, {total} examples and "
            f"{count} subsets."
        )
    generator = torch.Generator().manual_seed(seed)
    kept = torch.zeros(count, total, dtype=torch.bool)
    for index, row in enumerate(kept):
        if complementary and index % 2:
            row[:] = ~kept[index - 1]
        else:
            row[torch.randperm(total, generator=generator)[:size]] = True
    return kept


def leave_one_out(run: Trajectory, example_ids: Sequence[int] | Tensor | None = None) -> Bool[Tensor, "subset example"]:
    """Leave out one example at a time.

    Args:
        run: the run whose examples are left out.
        example_ids: which ones; all if not given.

    Returns:
        True where an example stays: a row for each example that is left out.
    """
    ids = run.examples.ids if example_ids is None else torch.as_tensor(example_ids, dtype=torch.int64)
    kept = torch.ones(len(ids), len(run.examples), dtype=torch.bool)
    kept[torch.arange(len(ids)), run.examples.rows(ids)] = False
    return kept
