"""What recording costs: an ordinary training loop with and without `Recorder`, in turn, in the same process.

    python benchmarks/recording.py [--quick]

The loop is that of digits (MLP 64-64-64-10, SGD momentum, batch 64) for 12 and for 120 epochs, in memory and on disk, with √T
checkpoints and the recorder's own checks, which weigh less the longer a run is. Digesting the data set (once for a data set) is
not counted, writing the run is. Median of the ratios of processor time (that of the writing thread included).
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

TARGETS = {"overhead_memory_228_steps": ["<=", 1.15], "overhead_memory_2280_steps": ["<=", 1.15]}


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
    figures = {}
    print("processor time of the recorded loop over that of the bare loop [quartiles]")
    for epochs, rounds in ((12, repeats), (120, max(repeats // 4, 3))):
        setting = digits(epochs=epochs)
        examples = Examples(setting.train)
        examples.root()
        order = batch_order(examples, setting.epochs, setting.batch_size, 0)
        recorded_loop(setting, examples, order[:200], None)
        ratios: dict[str, list[float]] = {"memory": [], "disk": []}
        for _ in range(rounds):
            for place in ratios:
                start = time.process_time()
                setting.bare_loop(order)
                bare = time.process_time() - start
                with tempfile.TemporaryDirectory() as folder:
                    start = time.process_time()
                    recorded_loop(setting, examples, order, Path(folder) / "run" if place == "disk" else None)
                    ratios[place].append((time.process_time() - start) / bare)
        for place, values in ratios.items():
            low, middle, high = statistics.quantiles(values, n=4)
            print(
                f"{len(order):>5} steps of {bare / len(order) * 1e3:.2f} ms, in {place:<7} {middle:.3f} [{low:.3f}, {high:.3f}]"
            )
            figures[f"overhead_{place}_{len(order)}_steps"] = middle
    met = all(figures[name] <= bound for name, (_, bound) in TARGETS.items())
    print(json.dumps({"benchmark": "recording", "figures": figures, "targets": TARGETS, "met": bool(met)}))


if __name__ == "__main__":
    main()
