"""CIFAR-10, 3,072 images and a ResNet-9: does it run through, in what time and memory, and do the methods agree?

    python benchmarks/cifar.py [--quick] [--images N] [--epochs E] [--width W] [--queries Q] [--device cuda]

The published setting but for its size (batch 512, momentum .9, decay 1e-3, rate falling to 0; there 25 epochs of a network of
width 64, here 5 of width 16, which a single core can do). Each method runs in a process of its own. Time in epochs of the run's
own training, memory above what the recorded run holds.
"""

import argparse
import io
import json
import resource
import time
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from tasks import DATA, DataMissing, seeded
from torch import Tensor, nn
from unrolled import in_own_process

from retrograd import (
    Classification,
    Implicit,
    LoGra,
    Source,
    TracIn,
    Trajectory,
    attribute,
    linear_datamodeling_score,
    record,
)
from retrograd.trajectory import Examples, batch_order

METHODS = {
    "influence, EK-FAC": Implicit(),
    "influence, training time": Implicit(damping="training_time"),
    "LoGra": LoGra(),
    "TracIn, 1": TracIn(1),
    "SOURCE, fast": Source(fast=True),
}
TARGETS = {"methods_run": [">=", float(len(METHODS))], "peak_over_bound": ["<=", 1.5]}
MEMORY = 2 << 30


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.inside = nn.Sequential(block(width, width), block(width, width))

    def forward(self, images: Tensor) -> Tensor:
        return images + self.inside(images)


def block(inside: int, outside: int, pool: bool = False) -> nn.Module:
    layers = [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2)) if pool else nn.Sequential(*layers)


def resnet9(width: int) -> nn.Module:
    return nn.Sequential(
        *(block(3, width), block(width, 2 * width, pool=True), Residual(2 * width)),
        *(block(2 * width, 4 * width, pool=True), block(4 * width, 8 * width, pool=True), Residual(8 * width)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10)),
    )


def images_of(name: str, count: int) -> tuple[Tensor, Tensor]:
    file = DATA / "cifar10" / f"{name}.parquet"
    if not file.is_file():
        raise DataMissing(f"{file} is not there; set RETROGRAD_DATA to the folder of the data sets.")
    table = pq.read_table(file).slice(0, count)
    pixels = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table.column("image").to_pylist()]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    middle, spread = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    return (images - middle) / spread, torch.tensor(table.column("label").to_pylist())


def recorded(given: argparse.Namespace) -> tuple[Trajectory, float]:
    """Record the run; returns it and the processor seconds of an epoch."""
    train = tuple(leaf.to(given.device) for leaf in images_of("train", given.images))
    model = seeded(0, lambda: resnet9(given.width)).to(given.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    order = batch_order(Examples(train), given.epochs, min(512, given.images), 0)
    rates = torch.linspace(0.1, 0.001, len(order))
    began = time.process_time()
    run = record(model, train, Classification(), optimizer=optimizer, order=order, learning_rates=rates)
    return run, (time.process_time() - began) / given.epochs


def scored(given: argparse.Namespace, name: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    run, epoch = recorded(given)
    queries = tuple(leaf.to(given.device) for leaf in images_of("test", given.queries))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    scores = attribute(run, queries, method=METHODS[name], memory=MEMORY)
    took = time.process_time() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    peak = torch.cuda.max_memory_allocated() if given.device == "cuda" else grown
    right = (run.update_map.measurements(run.final_state, queries) > 0).double().mean().item()
    size = sum(leaf.numel() for leaf in run.final_state.params.values())
    return {"scores": scores.values.cpu(), "epochs": took / epoch, "seconds": took, "peak": peak, "right": right, "size": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="128 images, one epoch, width 4, 8 queries; within a minute")
    for option, value in (("images", 3072), ("epochs", 5), ("width", 16), ("queries", 50)):
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    given = parser.parse_args()
    if given.quick:
        given.images, given.epochs, given.width, given.queries = 128, 6, 4, 8
    figures, found = dict[str, float](), dict[str, Any]()
    try:
        for name in METHODS:
            found[name] = own = in_own_process(scored, given, name)
            if len(found) == 1:
                print(f"{own['size']:,} parameters, {own['right']:.0%} of the queries right")
            print(f"  {name:<26}{own['epochs']:>8.1f} epochs{own['seconds']:>9.1f} s{own['peak'] / 1e6:>9.0f} MB", flush=True)
            key = name.replace(", ", "_").replace(" ", "_").lower()
            figures |= {f"{key}_{what}": own[what] for what in ("epochs", "seconds", "peak")}
    except DataMissing as error:
        print(error)
    kept = torch.rand(200, given.images, generator=torch.Generator().manual_seed(0)) < 0.5
    predicted = {name: kept.double() @ own["scores"].double().T for name, own in found.items()}
    for name, own in predicted.items():
        row = [linear_datamodeling_score(own, other).value for other in predicted.values()]
        print(f"  {name:<26}agrees " + " ".join(f"{value:>5.2f}" for value in row))
    figures["methods_run"] = float(len(found))
    figures["peak_over_bound"] = max((own["peak"] / MEMORY for own in found.values()), default=float("inf"))
    met = all(figures[name] <= bound if sign == "<=" else figures[name] >= bound for name, (sign, bound) in TARGETS.items())
    print(json.dumps({"benchmark": "cifar", "figures": figures, "targets": TARGETS, "met": bool(met)}))


if __name__ == "__main__":
    main()
