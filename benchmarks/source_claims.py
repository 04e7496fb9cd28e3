"""What SOURCE is published to do better than influence functions: models that have not converged, and several stages.

    python benchmarks/source_claims.py [--quick] [--only concrete noisy stages]

* concrete: UCI Concrete, the published recipe (MLP 128-128-128, SGD momentum .9, rate .03, decay 1e-5, batch 32, 20 epochs;
  896 to train on, 103 asked for their absolute error; 100 random halves; here 20 seeds each, published 100).
* noisy: digits with 30 % random labels, 3 epochs at rate .01, margins of clean test digits.
* stages: digits upright for 8 epochs, then others rotated by 45 degrees for 8; halves of the upright ones are taken away, and
  upright test digits are asked, as the end of training finds them.

Linear datamodeling scores with 95 % intervals over subsets and queries, means over fresh seeds, at the run itself as published
and at the run of matched training time; then the differences between SOURCE and influence functions with theirs.
"""

import argparse
import json
from dataclasses import replace

import torch
from scipy.ndimage import rotate
from tasks import DATA, DataMissing, Setting, digits, mlp, seeded, sgd
from unrolled import in_own_process, recorded

from retrograd import (
    Blend,
    Comparison,
    Counterfactual,
    Fisher,
    Implicit,
    Regression,
    Retrained,
    Source,
    TracIn,
    Unrolled,
    compare,
    random_subsets,
    record,
    retrain,
)
from retrograd.trajectory import Examples, batch_order

TARGETS = {
    "concrete_source_minus_influence_low": [">=", 0.0],
    "noisy_source_minus_influence_low": [">=", 0.0],
    "stages_source_minus_influence_low": [">=", 0.0],
}
METHODS = {
    "source": Source(),
    "influence": Implicit(),
    "influence, training time": Implicit(damping="training_time"),
    "tracin": TracIn(),
    "exact": Unrolled(),
    "blend": Blend(),
}


def told(name: str, point: str, found: Comparison) -> dict[str, float]:
    print(f"\n{name}, {point}\n{found}")
    figures = {}
    for method, own in found.checks.items():
        figures[f"{name}_{method.replace(', ', '_').replace(' ', '_')}_{point}"] = own.spearman.value
    for other in ("influence", "influence, training time"):
        gap = found.difference("source", other)
        print(f"SOURCE − {other}: {gap}")
        if other == "influence" and point == "at_run":
            figures |= {f"{name}_source_minus_influence": gap.value, f"{name}_source_minus_influence_low": gap.low}
    for kind, value in next(iter(found.checks.values())).ceilings.items():
        figures[f"{name}_ceiling_{kind.replace(' ', '_')}"] = value
    return figures


def halves(name: str, setting: Setting, subsets: int, seeds: int, queries: int, methods: dict) -> dict[str, float]:
    run = recorded(setting)
    asked = tuple(column[:queries] for column in setting.queries)
    kept = random_subsets(run, subsets, 0.5, seed=2)
    fresh = list(range(100, 100 + seeds))
    truth = retrain(run, asked, kept, removal="deletion", seeds=fresh, initialise=setting.make_model)
    figures = {}
    for point, keep in (("at_run", 1.0), ("matched", 0.5)):
        found = compare(run, asked, methods, retrained=truth, keep=keep, check_roughness=False)
        figures |= told(name, point, found)
    return figures


def concrete(quick: bool) -> dict[str, float]:
    torch.set_num_threads(1)
    file = DATA / "concrete" / "concrete.csv"
    found = sorted((DATA / "concrete").glob("*.csv"))
    if not found:
        raise DataMissing(f"{file} is not there; set RETROGRAD_DATA to the folder of the data sets.")
    rows = torch.tensor([[float(cell) for cell in line.split(",")] for line in found[0].read_text().splitlines()[1:]])
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    train, test = rows[103 : 103 + 896], rows[:103]
    middle, spread = train.mean(0), train.std(0)
    train, test = (train - middle) / spread, (test - middle) / spread
    model = lambda seed: seeded(seed, lambda: mlp(8, 128, 128, 128, 1))  # noqa: E731
    optimizer = sgd(0.03, momentum=0.9, weight_decay=1e-5)
    pairs = [(part[:, :8], part[:, 8:]) for part in (train, test)]
    setting = Setting("concrete", pairs[0], pairs[1], Regression(), model, optimizer, 20, 32)
    methods = {name: METHODS[name] for name in list(METHODS)[: 4 if quick else None]}
    return halves("concrete", setting, *((16, 2, 12) if quick else (100, 20, 103)), methods)


def noisy(quick: bool) -> dict[str, float]:
    torch.set_num_threads(1)
    setting = digits(epochs=3)
    images, labels = setting.train
    draw = torch.Generator().manual_seed(1)
    wrong = torch.rand(len(labels), generator=draw) < 0.3
    labels = torch.where(wrong, torch.randint(0, 10, labels.shape, generator=draw), labels)
    setting.train = (images, labels)
    return halves("noisy", setting, *((20, 2, 16) if quick else (100, 10, 200)), METHODS)


def stages(quick: bool) -> dict[str, float]:
    """Truth: runs with fresh seeds, each with weights 0 on half of its upright examples, averaged."""
    torch.set_num_threads(1)
    subsets, seeds, queries = (20, 2, 16) if quick else (100, 10, 200)
    setting = digits()
    images, labels = setting.train
    turned = torch.tensor(rotate(images.view(-1, 8, 8).numpy(), 45, axes=(1, 2), reshape=False, order=1)).flatten(1)
    count = 600
    data = (torch.cat([images[:count], turned[count:]]), labels)
    first, second = Examples((images[:count],)), Examples((images[count:],), torch.arange(count, 1200))
    asked = tuple(column[:queries] for column in setting.queries)

    def run_of(seed: int):
        order = batch_order(first, 8, 64, seed) + batch_order(second, 8, 64, seed + 1000)
        model = setting.make_model(seed)
        return record(model, data, setting.task, optimizer=setting.make_optimizer(model.parameters()), order=order, seed=seed)

    boundary = len(batch_order(first, 8, 64, 0))
    run = run_of(0)
    kept = torch.ones(subsets, 1200, dtype=torch.bool)
    draw = torch.Generator().manual_seed(2)
    for row in kept:
        row[torch.randperm(count, generator=draw)[: count // 2]] = False
    own = [retrain(run_of(seed), asked, kept) for seed in range(100, 100 + seeds)]
    truth = Retrained(
        torch.cat([part.values for part in own], dim=1),
        kept,
        tuple(range(100, 100 + seeds)),
        run.examples.ids,
        own[0].query_ids,
        Counterfactual(0.5, "zero_weight", "fresh"),
    )
    methods = METHODS | {"source": Source(segments=(2, 2), stages=(boundary,)), "source, one stage": Source(segments=4)}
    methods |= {"source, full Fisher": Source(segments=(2, 2), stages=(boundary,), curvature=Fisher())}
    methods |= {"blend": Blend((Unrolled(), methods["source"]))}
    figures = told("stages", "at_run", compare(run, asked, methods, retrained=truth, keep=1.0, check_roughness=False))
    weights = torch.ones(1200, dtype=torch.float64)
    weights[:count] = 0.5
    matched = run.rerun(weights=weights)
    truth = replace(truth, counterfactual=Counterfactual())
    return figures | told("stages", "matched", compare(matched, asked, methods, retrained=truth, check_roughness=False))


PARTS = {"concrete": concrete, "noisy": noisy, "stages": stages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer subsets, seeds and queries; within a minute")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    given = parser.parse_args()
    figures: dict[str, float] = {}
    for name in given.only:
        try:
            figures |= in_own_process(PARTS[name], given.quick)
        except DataMissing as error:
            print(f"{name}: {error}")
    met = all(figures.get(name, float("-inf")) >= bound for name, (_, bound) in TARGETS.items())
    print(json.dumps({"benchmark": "source_claims", "figures": figures, "targets": TARGETS, "met": bool(met)}))


if __name__ == "__main__":
    main()
