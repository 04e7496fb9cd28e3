"""Do the roughness figures foretell whether an exact derivative predicts retraining?

    python benchmarks/roughness.py [--quick]

Two grids of trainings on digits, from smooth to rough: activations, learning rates, lengths, optimizers. For each the two
figures of `roughness`, and the linear datamodeling score of exact unrolling at the run itself against same-seed retraining
that keeps 90 % (weight zero). The thresholds in `retrograd.trajectory.roughness` were read off the first grid; the share of
right verdicts (rough, or a score of at least 0.5) is counted on the second, with another seed and other settings.
"""

import argparse
import json
from typing import Any

import torch
from tasks import digits_data, mlp, seeded
from torch import nn

from retrograd import Classification, attribute, linear_datamodeling_score, random_subsets, record, retrain, roughness
from retrograd.trajectory.roughness import AMPLIFICATION_LIMIT, SMOOTH_ENOUGH

GOOD = 0.5  # a score from which on predictions are of use
TARGETS = {"right_verdicts_held_out": [">=", 0.85]}


Setting = tuple[str, type[nn.Module], Any, int]
FIRST = (((0.01, 12), (0.03, 30), (0.1, 30)), ((1e-3, 12), (3e-3, 12), (1e-2, 12), (3e-2, 12)))
HELD_OUT = (((0.02, 20), (0.05, 20), (0.07, 30)), ((2e-3, 20), (5e-3, 8), (7e-3, 20), (2e-2, 12)))


def settings(sgd_rates: Any, adamw_rates: Any) -> list[Setting]:
    def sgd(rate: float) -> Any:
        return lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=0.9)

    def adamw(rate: float) -> Any:
        return lambda parameters: torch.optim.AdamW(parameters, lr=rate)

    grid = [(f"SGD {rate:g}, {epochs} epochs", sgd(rate), epochs) for rate, epochs in sgd_rates]
    grid += [(f"AdamW {rate:g}, {epochs} epochs", adamw(rate), epochs) for rate, epochs in adamw_rates]
    return [(f"{kind.__name__}, {name}", kind, made, epochs) for name, made, epochs in grid for kind in (nn.GELU, nn.ReLU)]


def measure(setting: Setting, seed: int, subsets: int) -> dict[str, Any]:
    name, kind, optimizer, epochs = setting
    train, queries = digits_data(queries=48)
    model = seeded(seed, lambda: mlp(64, 64, 64, 10, activation=kind))
    run = record(model, train, Classification(), optimizer=optimizer, epochs=epochs, batch_size=64, seed=seed)
    found = roughness(run, seed=seed)
    kept = random_subsets(run, subsets, 0.9, seed=seed + 1)
    actual = retrain(run, queries, kept).outcomes
    scores = attribute(run, queries, check_roughness=False)
    score = linear_datamodeling_score(scores.predicted_subset(kept), actual)
    verdict = "rough" if found.rough else "smooth"
    print(f"{name:<30}{found.metasmoothness:>15.3f}{found.amplification:>15.3g}{score!s:>24}  {verdict}", flush=True)
    right = found.rough == (score.value < GOOD)
    return {"metasmoothness": found.metasmoothness, "amplification": found.amplification, "lds": score.value, "right": right}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four trainings instead of twenty-eight")
    parser.add_argument("--subsets", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'training':<30}{'metasmoothness':>15}{'amplification':>15}{'LDS at 90 %':>24}  verdict")
    figures: dict[str, Any] = {"smooth_enough": SMOOTH_ENOUGH, "amplification_limit": AMPLIFICATION_LIMIT}
    for seed, (label, rates) in enumerate((("first", FIRST), ("held_out", HELD_OUT))):
        chosen = settings(*rates)
        chosen = chosen[:1] + chosen[-1:] if arguments.quick else chosen
        rows = [measure(setting, seed, 20 if arguments.quick else arguments.subsets) for setting in chosen]
        figures[f"right_verdicts_{label}"] = sum(row["right"] for row in rows) / len(rows)
        for setting, row in zip(chosen, rows, strict=True):
            key = setting[0].replace(" ", "_").replace(",", "")
            figures |= {f"{key}_{part}": row[part] for part in ("metasmoothness", "amplification", "lds")}
    met = figures["right_verdicts_held_out"] >= TARGETS["right_verdicts_held_out"][1]
    print(json.dumps({"benchmark": "roughness", "figures": figures, "targets": TARGETS, "met": bool(met)}))


if __name__ == "__main__":
    main()
