"""How much of SOURCE belongs beside exact scores, found without the truth and beside what the truth would have said.

    python benchmarks/blending.py [--quick] [--tasks B A Bc] [--truth DIR]

Tasks as in `peers`: digits (B), MNIST (A), digits until they converged (Bc). Four recorded runs; random halves deleted, mean
over fresh seeds. For one run and for the mean of two and of four: the linear datamodeling score of unrolling (with the
curvature that its measured roughness chooses), of SOURCE, of equal shares, of the shares by agreement of runs
(`shares_by_agreement`), and of the best share by the truth; and the correlation that agreement foretold. One run's shares come
from its agreement with a second one. ``damped`` is Gauss-Newton unrolling alone: does it get there without a blend?
"""

import argparse
import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from tasks import DataMissing, compared
from torch import Tensor
from unrolled import in_own_process, recorded

from retrograd import (
    Counterfactual,
    Source,
    Unrolled,
    attribute,
    evaluate,
    noise_ceiling,
    random_subsets,
    retrain,
    shares_by_agreement,
)

TARGETS = {
    "B_lost_by_agreement": ["<=", 0.01],
    "A_lost_by_agreement": ["<=", 0.01],
    "Bc_lost_by_agreement": ["<=", 0.01],
}
SIZES = {
    "B": (100, 10, 200, 64),
    "A": (80, 4, 200, 48),
    "Bc": (100, 10, 200, 48),
}  # subsets, seeds, queries retrained and asked
RUNS = 4
GRID = [number / 10 for number in range(11)]
HALVES = Counterfactual(0.5, "deletion", "fresh")


def unit(values: Tensor) -> Tensor:
    centred = values.double() - values.double().mean(1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True)


def measured(task: str, quick: bool, folder: Path | None) -> dict[str, float]:
    torch.set_num_threads(1)
    setting = compared(task)
    subsets, seeds, queries, asked = (20, 2, 16, 16) if quick else SIZES[task]
    runs = [recorded(setting, seed) for seed in range(2 if quick else RUNS)]
    kept = random_subsets(runs[0], subsets, 0.5, seed=2)
    truth = retrain(
        runs[0],
        tuple(column[:queries] for column in setting.queries),
        kept,
        removal="deletion",
        seeds=list(range(100, 100 + seeds)),
        initialise=setting.make_model,
        folder=None if folder is None or quick else folder / task,
    )
    truth = replace(truth, values=truth.values[..., :asked], query_ids=truth.query_ids[:asked])
    few = tuple(column[:asked] for column in setting.queries)
    methods = {"unrolled": Unrolled(curvature="auto"), "source": Source(), "damped": Unrolled(curvature="gauss_newton")}
    points = [run.matching(HALVES) for run in runs]
    scores = {
        name: [attribute(point, few, method=method, check_roughness=False) for point in points]
        for name, method in methods.items()
    }

    def lds(values: Tensor) -> float:
        return evaluate(replace(scores["unrolled"][0], values=values.float()), truth).spearman.value

    def blend(some: tuple[int, ...], share: float, first: str = "unrolled") -> float:
        walked, source = (sum(unit(scores[name][run].values) for run in some) for name in (first, "source"))
        return lds((1 - share) * walked + share * source)

    chosen = scores["unrolled"][0].notes
    print(
        f"\ntask {task}, {asked} queries, noise ceiling {noise_ceiling(truth.values.double()).value:.3f}; unrolled by "
        f"{chosen['curvature']}, as the matched run amplifies {chosen['amplification']:.1f} times"
    )
    print("  runs  unroll  SOURCE   equal  agreement   best   | share by agreement, best | foretold  | damped")
    figures, lost, pair = dict[str, float](), 0.0, [scores["unrolled"], scores["source"]]
    for count in (1, 2) if quick else (1, 2, RUNS):
        groups = [own for own in combinations(range(len(runs)), count)][: 4 if count == 1 else 2]
        found = shares_by_agreement(pair, runs=count)
        mean = lambda share, groups=groups: sum(blend(own, share) for own in groups) / len(groups)  # noqa: E731
        sweep = {share: mean(share) for share in GRID}
        best = max(sweep, key=lambda share: sweep[share])
        agreed, damped = mean(found.shares[1]), sum(blend(own, 0.0, "damped") for own in groups) / len(groups)
        print(
            f"  {count:>4}  {sweep[0.0]:>6.3f}  {sweep[1.0]:>6.3f}  {sweep[0.5]:>6.3f}  {agreed:>9.3f}  {sweep[best]:>5.3f}   |"
            f" {found.shares[1]:>18.2f}, {best:>4.1f} | {found.expected[-1]:>8.3f}  | {damped:>6.3f}",
            flush=True,
        )
        row = {"unrolled": sweep[0.0], "source": sweep[1.0], "equal": sweep[0.5], "agreement": agreed, "best": sweep[best]}
        row |= {"share": found.shares[1], "best_share": best, "foretold": found.expected[-1], "damped": damped}
        figures |= {f"{task}_{count}_{key}": value for key, value in row.items()}
    lost = [
        figures[f"{task}_{count}_best"] - figures[f"{task}_{count}_agreement"] for count in ((1, 2) if quick else (1, 2, RUNS))
    ]
    return figures | {f"{task}_lost_by_agreement": max(lost)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="task B with two runs and few subsets and queries")
    parser.add_argument("--tasks", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--truth", type=Path, metavar="DIR", help="keep the retrainings in this folder, and go on with them")
    given = parser.parse_args()
    figures: dict[str, Any] = {}
    for task in ["B"] if given.quick else given.tasks:
        try:
            figures |= in_own_process(measured, task, given.quick, given.truth)
        except DataMissing as error:
            print(f"task {task} left out: {error}")
    met = all(figures.get(name, float("inf")) <= bound for name, (_, bound) in TARGETS.items())
    print(json.dumps({"benchmark": "blending", "figures": figures, "targets": TARGETS, "met": bool(met)}))


if __name__ == "__main__":
    main()
