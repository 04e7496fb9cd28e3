"""Retraining many models at once, against training them one after the other in an ordinary loop.

    python benchmarks/retraining.py [--quick]

For each training run: the processor time of an ordinary torch loop for one model, and that of `retrain` for one of many, the
choice of how many together and its pilot included; their ratio is how many times faster it is. "Zero weight" makes the steps
of the recorded run; "deletion" of random halves makes half as many, and is compared with a loop over half as many. One
thread, both in one process, in turn, the median of the ratios; glibc is told to keep freed memory.
"""

import argparse
import json
import statistics
import time

import torch
from tasks import DataMissing, cnn, digits, gpt, mnist
from unrolled import in_own_process, recorded

from retrograd import Examples, random_subsets, retrain
from retrograd.evaluation.course import Protocol
from retrograd.trajectory import batch_order

TARGETS = {
    "digits_zero_weight_speed": [">=", 3.0],
    "digits_deletion_speed": [">=", 3.0],
    "digits_1000_halves_seconds": ["<=", 15.0],
    "mnist_zero_weight_speed": [">=", 1.0],
    "cnn_zero_weight_speed": [">=", 1.0],
    "gpt_zero_weight_speed": [">=", 1.0],
}
SETTINGS = {"digits": (digits, 256), "mnist": (lambda: mnist(epochs=2), 64), "cnn": (cnn, 64), "gpt": (gpt, 32)}


def speed(name: str, models: int, repeats: int) -> dict[str, float] | str:
    torch.set_num_threads(1)
    try:
        setting = SETTINGS[name][0]()
    except DataMissing as error:
        return str(error)
    run = recorded(setting)
    run.digest  # noqa: B018  (hashing the data is paid once)
    order = batch_order(Examples(setting.train), setting.epochs, setting.batch_size, 0)
    kept = random_subsets(run, models, 0.5, seed=1)
    length = {"zero_weight": len(run), "deletion": Protocol(run, "deletion", "epochs", 0).length(int(kept[0].sum()))}
    setting.bare_loop(order[:3])
    found: dict[str, float] = {}
    for removal, steps in length.items():
        ratios, each = [], []
        for _ in range(repeats):
            start = time.process_time()
            setting.bare_loop(order[:steps])
            bare = time.process_time() - start
            start = time.process_time()
            retrain(run, setting.queries, kept, removal=removal)
            each.append((time.process_time() - start) / models)
            ratios.append(bare / each[-1])
        found |= {f"{removal}_speed": statistics.median(ratios), f"{removal}_seconds_each": statistics.median(each)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="digits only, one repeat, fewer models; within a minute")
    quick = parser.parse_args().quick
    figures: dict[str, float] = {}
    print(f"{'run':<10}{'models':>8}{'zero weight':>14}{'deletion':>12}   (times as fast as one after the other)")
    for name, (_, models) in list(SETTINGS.items())[: 1 if quick else None]:
        models = 64 if quick else models
        found = in_own_process(speed, name, models, 1 if quick else 3)
        if isinstance(found, str):
            print(f"{name:<10} left out: {found}")
            continue
        print(f"{name:<10}{models:>8}{found['zero_weight_speed']:>14.2f}{found['deletion_speed']:>12.2f}")
        figures |= {f"{name}_{key}": value for key, value in found.items()}
    figures["digits_1000_halves_seconds"] = 1000 * figures["digits_deletion_seconds_each"]
    print(
        f"1,000 models on random halves of digits: {figures['digits_1000_halves_seconds']:.1f} CPU-s by deletion, "
        f"{1000 * figures['digits_zero_weight_seconds_each']:.1f} by zero weight"
    )
    met = all(
        (figures[name] <= bound if sign == "<=" else figures[name] >= bound)
        for name, (sign, bound) in TARGETS.items()
        if name in figures
    )
    complete = quick or all(name in figures for name in TARGETS)
    print(json.dumps({"benchmark": "retraining", "figures": figures, "targets": TARGETS, "met": bool(met and complete)}))


if __name__ == "__main__":
    main()
