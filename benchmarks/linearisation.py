"""Where to linearise: scores at the recorded run, at uniform weights ½, and at half the learning rate.

    python benchmarks/linearisation.py [--quick]

For several optimizers on digits, exact unrolling at three points is compared with retraining on random halves of the data,
in the three meanings that "retraining" has:

* zero weight, same seed: the recorded batches, the removed examples weigh nothing;
* deletion, same start: own batches, half as many steps, from the same initial parameters;
* deletion, fresh seeds: the mean over runs with other initial parameters and batches.

The rule that `Counterfactual` follows, fixed before this was run: weights ½ for zero weight, learning rate × ½ for deletion.
"""

import argparse
import json
from typing import Any

import torch
from tasks import digits_data, mlp, seeded
from torch import Tensor, nn

from retrograd import Classification, Scores, attribute, linear_datamodeling_score, random_subsets, record, retrain
from retrograd.trajectory import Examples, Trajectory, batch_order

EPOCHS, BATCH = 12, 64
MEANINGS = ("zero_weight", "deletion", "deletion_fresh")
POINTS: dict[str, dict[str, Any]] = {
    "run": {"keep": 1.0},
    "weights_half": {"keep": 0.5, "removal": "zero_weight"},
    "rate_half": {"keep": 0.5, "removal": "deletion"},
}
CHOSEN = {"zero_weight": "weights_half", "deletion": "rate_half", "deletion_fresh": "rate_half"}
OPTIMIZERS: dict[str, Any] = {
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "SGD Nesterov, decay, clipping, cosine": lambda p: torch.optim.SGD(
        p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-3
    ),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=3e-4),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=1e-2),
}


def train(name: str, data: tuple[Tensor, ...], seed: int) -> Trajectory:
    model = seeded(seed, lambda: mlp(64, 64, 64, 10, activation=nn.GELU))
    order = batch_order(Examples(data), EPOCHS, BATCH, seed)
    options: dict[str, Any] = {}
    if "cosine" in name:
        angles = torch.linspace(0, torch.pi, len(order))
        options = {"clip_norm": 1.0, "learning_rates": 0.02 * (0.05 + 0.95 * (1 + angles.cos()) / 2)}
    return record(model, data, Classification(), optimizer=OPTIMIZERS[name], order=order, seed=seed, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two optimizers, fewer queries, subsets and seeds")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    subsets, seeds, asked = (20, 1, 8) if quick else (100, 5, 48)
    data, queries = digits_data(queries=asked)
    figures: dict[str, float] = {}
    targets: dict[str, list[Any]] = {}
    print("linear datamodeling score at keeping 50 %, by the point of linearisation [95 % interval]; * the point that is used")
    for name in ("SGD momentum", "AdamW") if quick else OPTIMIZERS:
        run = train(name, data, 0)
        kept = random_subsets(run, subsets, 0.5, seed=1)
        truth = {
            "zero_weight": retrain(run, queries, kept).outcomes,
            "deletion": retrain(run, queries, kept, removal="deletion").outcomes,
            "deletion_fresh": torch.stack(
                [
                    retrain(train(name, data, seed), queries, kept, removal="deletion", seed=seed).outcomes
                    for seed in range(1, seeds + 1)
                ]
            ).mean(0),
        }
        scores: dict[str, Scores] = {
            point: attribute(run, queries, check_roughness=False, **options) for point, options in POINTS.items()
        }
        print(name)
        for meaning in MEANINGS:
            cells = []
            for point in POINTS:
                found = linear_datamodeling_score(scores[point].predicted_subset(kept), truth[meaning])
                key = f"{name}_{meaning}_{point}".replace(" ", "_").replace(",", "")
                figures[key] = found.value
                cells.append(f"{point}{'*' if CHOSEN[meaning] == point else ' '} {found}")
            chosen = f"{name}_{meaning}_{CHOSEN[meaning]}".replace(" ", "_").replace(",", "")
            figures[f"{chosen}_gain"] = figures[chosen] - figures[f"{name}_{meaning}_run".replace(" ", "_").replace(",", "")]
            if meaning != "zero_weight" or "SGD" in name:  # under the adaptive rules uniform weights are next to no change
                targets[f"{chosen}_gain"] = [">=", 0.0]
            print(f"  {meaning:<16}" + "   ".join(cells), flush=True)
    met = all(figures[key] >= bound for key, (_, bound) in targets.items())
    print(json.dumps({"benchmark": "linearisation", "figures": figures, "targets": targets, "met": bool(met)}))


if __name__ == "__main__":
    main()
