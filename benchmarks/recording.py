"""What recording costs: an ordinary training loop with and without `Recorder`, in turn, in the same process.

    python benchmarks/recording.py [--quick]

The loop is that of digits (MLP 64-64-64-10, SGD momentum, batch 64), in memory and on disk, with √T checkpoints and the
recorder's own checks. Digesting the data set (once for a data set) is not counted, writing the run is. Median of ratios.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from tasks import Setting, digits

from retrograd import Examples, Recorder
from retrograd.trajectory import batch_order

TARGETS = {"overhead_memory": ["<=", 1.15]}


def recorded_loop(setting: Setting, examples: Examples, order: list[torch.Tensor], folder: Path | None) -> None:
    model = setting.make_model(0)
    optimizer = setting.make_optimizer(model.parameters())
    recorder = Recorder(model, examples, setting.task, optimizer, folder=folder)
    for ids in order:
        batch = tuple(column[ids] for column in setting.train)
        with recorder.step(ids):
            optimizer.zero_grad()
            setting.task.losses(model, batch).mean().backward()
            optimizer.step()
    recorder.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="five repeats instead of twenty")
    repeats = 5 if parser.parse_args().quick else 20
    torch.set_num_threads(1)
    setting = digits()
    examples = Examples(setting.train)
    examples.root()
    order = batch_order(examples, setting.epochs, setting.batch_size, 0)
    ratios: dict[str, list[float]] = {"memory": [], "disk": []}
    bare: list[float] = []
    recorded_loop(setting, examples, order, None)
    for _ in range(repeats):
        for place in ratios:
            start = time.perf_counter()
            setting.bare_loop(order)
            bare.append(time.perf_counter() - start)
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                recorded_loop(setting, examples, order, Path(folder) / "run" if place == "disk" else None)
                ratios[place].append((time.perf_counter() - start) / bare[-1])
    print(f"{len(order)} steps of {statistics.median(bare) / len(order) * 1e3:.2f} ms")
    figures = {}
    for place, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"recorded in {place:<7} {middle:.3f} of the bare loop [quartiles {low:.3f}, {high:.3f}]")
        figures[f"overhead_{place}"] = middle
    met = figures["overhead_memory"] <= TARGETS["overhead_memory"][1]
    print(json.dumps({"benchmark": "recording", "figures": figures, "targets": TARGETS, "met": bool(met)}))


if __name__ == "__main__":
    main()
