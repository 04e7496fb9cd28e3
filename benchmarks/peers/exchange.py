"""What a script of this folder gets and gives back: arrays in .npz files, which numpy reads without pickle.

It runs in the environment of a peer, where there is torch, numpy and the peer, but no retrograd.

    python benchmarks/peers/SCRIPT.py FOLDER RESULT QUERIES [OPTION ...]

FOLDER holds what `benchmarks/peers.py` wrote: the data, the size of the model, and states of recorded runs. RESULT gets the
scores [query, example], with our sign: positive where more weight on the example raises the query's margin.

Lines between "# begin" and "# end" are what a user of the peer writes to get scores from a trained model; they are counted.
What stands between "# begin OPTION" and "# end" counts for that option only.
"""

import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

WARM_UP = 4  # queries of the call that is not measured
EPOCHS = 8  # of a plain loop, before and again after the call that is


@dataclass
class Given:
    """The task, the states of its runs, and what the command line asks for."""

    folder: Path
    result: Path
    options: list[str]
    train: TensorDataset
    queries: TensorDataset
    sizes: list[int]
    rate: float
    momentum: float
    batch_size: int
    steps: list[int]
    final: int

    @staticmethod
    def of_command_line() -> "Given":
        torch.set_num_threads(1)
        folder, result, queries, *options = sys.argv[1:]
        about = json.loads((Path(folder) / "about.json").read_text())
        with np.load(Path(folder) / "data.npz") as arrays:
            columns = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        return Given(
            Path(folder),
            Path(result),
            options,
            TensorDataset(columns["train_inputs"], columns["train_labels"]),
            TensorDataset(columns["query_inputs"][: int(queries)], columns["query_labels"][: int(queries)]),
            **about,
        )

    def state(self, step: int, seed: int = 0) -> dict[str, Tensor]:
        """Return the parameters of a recorded run before a step."""
        with np.load(self.folder / f"state_{seed}_{step}.npz") as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}

    def model(self, seed: int = 0) -> nn.Sequential:
        """Return the model at the end of a recorded run."""
        layers: list[nn.Module] = []
        for inside, outside in pairwise(self.sizes):
            layers += [nn.Linear(inside, outside), nn.ReLU()]
        model = nn.Sequential(*layers[:-1])
        model.load_state_dict(self.state(self.final, seed))
        return model.eval()


def peak_bytes() -> int:
    """Return the peak resident memory of this process; where Linux tells, without that of the parent it was forked from."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def epoch_seconds(given: Given) -> list[float]:
    """Return the processor seconds of some epochs of a plain loop."""
    model, (inputs, labels) = given.model().train(), given.train.tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=given.rate, momentum=given.momentum)
    seconds = []
    for _ in range(EPOCHS):
        began = time.process_time()
        for ids in torch.randperm(len(inputs)).split(given.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[ids]), labels[ids]).backward()
            optimizer.step()
        seconds.append(time.process_time() - began)
    return seconds


def measure(
    package: str, attribution: Callable[[Given, TensorDataset, Any], Tensor], prepare: Callable[[Given], Any] | None = None
) -> None:
    """Call ``attribution(given, queries, what prepare gave)``, first on a few queries to warm up, then on all; write it down.

    Processor seconds are those of the second call, without ``prepare``, between epochs of a plain loop that are timed too.
    Memory is the peak of all above that of the imports.
    """
    imported = peak_bytes()
    torch.manual_seed(0)
    given = Given.of_command_line()
    prepared = prepare(given) if prepare else None
    attribution(given, TensorDataset(*(column[:WARM_UP] for column in given.queries.tensors)), prepared)
    prepared = prepare(given) if prepare else None
    epochs = epoch_seconds(given)
    began = time.process_time()
    scores = attribution(given, given.queries, prepared)
    seconds = time.process_time() - began
    about = {
        "seconds": seconds,
        "epoch": statistics.median(epochs + epoch_seconds(given)),
        "bytes": peak_bytes() - imported,
        "version": f"{version(package)}, torch {torch.__version__}",
    }
    np.savez(given.result, scores=scores.detach().float().numpy(), about=json.dumps(about))


def empty_folder() -> tempfile.TemporaryDirectory:
    """Return a folder for a peer that works on disk."""
    return tempfile.TemporaryDirectory()
