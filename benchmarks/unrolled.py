"""Exact unrolling: what a query costs, in multiples of the training run itself, and how well scores predict retraining.

    python benchmarks/unrolled.py [--quick]

Cost: the processor time of `attribute` over all queries (query gradients, replay and adjoint), divided by the number of queries
and by that of an ordinary torch loop that makes the same steps, measured in turn in the same process; the median of the
ratios. glibc is told to keep freed memory, for both: where page faults are slow they would be most of what is measured.
Memory: the peak of the process less what it held before. Prediction: linear datamodeling scores against same-seed
retraining on random subsets, with 95 % intervals over subsets and queries.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
from typing import Any

import torch
from tasks import DataMissing, Setting, cnn, digits, gpt, mnist

from retrograd import All, Unrolled, attribute, linear_datamodeling_score, random_subsets, record, retrain
from retrograd.trajectory import Examples, batch_order

TARGETS = {
    "digits_cost": ["<=", 0.45],
    "mnist_cost": ["<=", 0.85],
    "cnn_cost": ["<=", 2.3],
    "gpt_cost": ["<=", 2.3],
    "digits_lds_keep99": [">=", 0.93],
    "digits_lds_keep90": [">=", 0.93],
    "digits_lds_keep50": [">=", 0.95],
    "digits_rank_share_of_lds": [">=", 0.98],
}
PEER = 8.8  # training runs a query on the digits run: the closest peer, measured before


def recorded(setting: Setting, seed: int = 0, **options: Any) -> Any:
    model = setting.make_model(seed)
    optimizer = setting.make_optimizer(model.parameters())
    order = batch_order(Examples(setting.train), setting.epochs, setting.batch_size, seed)
    return record(model, setting.train, setting.task, optimizer=optimizer, order=order, seed=seed, **options)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cost(setting: Setting, repeats: int, ranks: tuple[int, ...] = ()) -> dict[str, float]:
    """Time queries against the bare loop; returns ratios and peak memory."""
    order = batch_order(Examples(setting.train), setting.epochs, setting.batch_size, 0)
    run = recorded(setting)
    run.digest  # noqa: B018  (hashing the data is paid once and is no part of a query's cost)
    setting.bare_loop(order[:3])
    before = peak_bytes()
    ratios: dict[str, list[float]] = {}
    routes = {}
    for _ in range(repeats):
        start = time.process_time()
        setting.bare_loop(order)
        bare = time.process_time() - start
        for rank in (None, *ranks):
            start = time.process_time()
            scores = attribute(run, setting.queries, method=Unrolled(rank=rank), check_roughness=False)
            took = time.process_time() - start
            ratios.setdefault("cost" if rank is None else f"cost_rank{rank}", []).append(took / bare / len(scores.query_ids))
            routes[rank] = scores.notes.get("route")
    found = {name: statistics.median(values) for name, values in ratios.items()}
    found["peak_megabytes"] = (peak_bytes() - before) / 1e6
    found["batched_route"] = float(routes[None] == "batched")
    return found


def in_own_process(function: Any, *args: Any) -> Any:
    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "OMP_NUM_THREADS": "1"}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def cost_of(name: str, repeats: int) -> dict[str, float] | str:
    torch.set_num_threads(1)
    try:
        setting = {"digits": digits, "mnist": mnist, "cnn": cnn, "gpt": gpt}[name]()
    except DataMissing as error:
        return str(error)
    return cost(setting, repeats, ranks=(80,) if name == "digits" else ())


def agreement(subsets: int, ranks: tuple[int, ...]) -> dict[str, float]:
    """Linear datamodeling scores on digits, of all queries and of compressed ones."""
    torch.set_num_threads(1)
    setting = digits()
    run = recorded(setting, checkpoints=All())
    found: dict[str, float] = {}
    for keep in (0.99, 0.9, 0.5):
        kept = random_subsets(run, subsets, keep, seed=1)
        actual = retrain(run, setting.queries, kept).outcomes
        for rank in (None, *ranks):
            scores = attribute(
                run, setting.queries, method=Unrolled(rank=rank), keep=0.5 if keep == 0.5 else 1.0, check_roughness=False
            )
            score = linear_datamodeling_score(scores.predicted_subset(kept), actual)
            name = f"lds_keep{keep:.0%}".rstrip("%") + ("" if rank is None else f"_rank{rank}")
            found |= {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}
            if rank is not None:
                found[f"energy_lost_rank{rank}"] = scores.notes["energy_lost"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="digits only, one repeat, fewer subsets; within a minute")
    quick = parser.parse_args().quick
    figures: dict[str, float] = {}
    print(
        f"{'run':<14}{'queries':>8}{'cost/query':>12}{'route':>9}{'peak MB':>9}   (cost in training runs; closest peer {PEER})"
    )
    for name, queries in (("digits", 200),) if quick else (("digits", 200), ("mnist", 64), ("cnn", 16), ("gpt", 16)):
        found = in_own_process(cost_of, name, 1 if quick else 3)
        if isinstance(found, str):
            print(f"{name:<14} left out: {found}")
            continue
        route = "batched" if found["batched_route"] else "loop"
        print(f"{name:<14}{queries:>8}{found['cost']:>12.2f}{route:>9}{found['peak_megabytes']:>9.0f}")
        if "cost_rank80" in found:
            print(f"{'  rank 80':<14}{queries:>8}{found['cost_rank80']:>12.2f}")
        figures |= {f"{name}_{key}": value for key, value in found.items()}
    found = in_own_process(agreement, 20 if quick else 100, () if quick else (40, 80, 120))
    print("\nlinear datamodeling score on digits, same seed [95 % interval]")
    for name, value in found.items():
        if name.startswith("lds") and not name.endswith(("low", "high")):
            print(f"  {name:<20}{value:.3f} [{found[name + '_low']:.3f}, {found[name + '_high']:.3f}]")
    figures |= {f"digits_{name}": value for name, value in found.items()}
    ranks = [rank for rank in (40, 80, 120) if f"lds_keep50_rank{rank}" in found]
    shares = {
        rank: min(found[f"lds_keep{keep}_rank{rank}"] / found[f"lds_keep{keep}"] for keep in (99, 90, 50)) for rank in ranks
    }
    if shares:
        print(
            "  share of the full score that is left, worst of the three: "
            + ", ".join(f"rank {r} {s:.3f}" for r, s in shares.items())
        )
        figures["digits_rank_share_of_lds"] = max(shares.values())
        figures["digits_rank"] = float(min((r for r, s in shares.items() if s >= 0.98), default=max(shares)))
    met = all(
        (figures[name] <= bound if sign == "<=" else figures[name] >= bound)
        for name, (sign, bound) in TARGETS.items()
        if name in figures
    )
    complete = quick or all(name in figures for name in TARGETS)
    print(json.dumps({"benchmark": "unrolled", "figures": figures, "targets": TARGETS, "met": bool(met and complete)}))


if __name__ == "__main__":
    main()
