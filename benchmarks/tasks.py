"""The training runs that benchmarks share: data, model, optimizer and queries of each.

Real data is looked for in the folder that the environment variable RETROGRAD_DATA names, else in `../shared/data` beside
the checkout. The digits come with scikit-learn.
"""

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrograd import Classification

DATA = Path(os.environ.get("RETROGRAD_DATA", Path(__file__).parents[2] / "shared" / "data"))


class DataMissing(Exception):
    """A data set that the benchmark reads is not there."""


@dataclass
class Setting:
    """One training run to measure.

    ``make_model(seed)`` gives a fresh model, ``make_optimizer(parameters)`` its optimizer.
    """

    name: str
    train: tuple[Tensor, ...]
    queries: tuple[Tensor, ...]
    task: Any
    make_model: Callable[[int], nn.Module]
    make_optimizer: Callable[[Any], torch.optim.Optimizer]
    epochs: int
    batch_size: int

    def bare_loop(self, order: list[Tensor], seed: int = 0) -> nn.Module:
        """Train as anyone would, recording nothing."""
        model = self.make_model(seed)
        optimizer = self.make_optimizer(model.parameters())
        for ids in order:
            batch = tuple(column[ids] for column in self.train)
            optimizer.zero_grad()
            self.task.losses(model, batch).mean().backward()
            optimizer.step()
        return model


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    layers: list[nn.Module] = []
    for inside, outside in pairwise(sizes):
        layers += [nn.Linear(inside, outside), activation()]
    return nn.Sequential(*layers[:-1])


def sgd(rate: float, **options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, **options)


def digits_data(
    train: int = 1200, queries: int = 200, flat: bool = True
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images / 16, dtype=torch.float32)
    images = images.flatten(1) if flat else images[:, None]
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    first, second = order[:train], order[train : train + queries]
    return (images[first], labels[first]), (images[second], labels[second])


def digits(epochs: int = 12, rate: float = 0.01, activation: type[nn.Module] = nn.ReLU) -> Setting:
    train, queries = digits_data()
    model = lambda seed: seeded(seed, lambda: mlp(64, 64, 64, 10, activation=activation))  # noqa: E731
    return Setting("digits MLP", train, queries, Classification(), model, sgd(rate, momentum=0.9), epochs, 64)


def mnist(epochs: int = 10, train: int = 5000, queries: int = 64) -> Setting:
    import pyarrow.parquet as pq
    from matplotlib.image import imread

    file = DATA / "mnist" / "test.parquet"
    if not file.is_file():
        raise DataMissing(f"{file} is not there; set RETROGRAD_DATA to the folder of the data sets.")
    table = pq.read_table(file).slice(0, train + queries)
    pixels = [imread(io.BytesIO(row["bytes"]), format="png") for row in table.column("image").to_pylist()]
    images = torch.stack([torch.as_tensor(image.copy(), dtype=torch.float32).reshape(28, 28) for image in pixels]).flatten(1)
    labels = torch.tensor(table.column("label").to_pylist())
    model = lambda seed: seeded(seed, lambda: mlp(784, 128, 64, 10))  # noqa: E731
    return Setting(
        "MNIST MLP",
        (images[:train], labels[:train]),
        (images[train:], labels[train:]),
        Classification(),
        model,
        sgd(0.01, momentum=0.9),
        epochs,
        64,
    )


def small_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.GELU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 10)),
    )


def cnn(epochs: int = 2) -> Setting:
    train, queries = digits_data(queries=16, flat=False)
    model = lambda seed: seeded(seed, small_cnn)  # noqa: E731
    return Setting("digits CNN", train, queries, Classification(), model, sgd(0.01, momentum=0.9), epochs, 64)


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = (
            part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.mix(self.norm1(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TinyGPT(nn.Module):
    def __init__(self, vocabulary: int = 128, length: int = 64, width: int = 64, heads: int = 4, layers: int = 2):
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class NextToken:
    """Mean cross-entropy of the next token, one number a sequence."""

    def losses(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        (tokens,) = batch
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)

    measurements = losses


def gpt(steps: int = 48, queries: int = 16) -> Setting:
    file = DATA / "shakespeare" / "input.txt"
    if not file.is_file():
        raise DataMissing(f"{file} is not there; set RETROGRAD_DATA to the folder of the data sets.")
    text = torch.tensor(list(file.read_bytes()[: 65 * (32 * steps + queries)]), dtype=torch.int64).clamp(max=127)
    rows = text.view(-1, 65)
    make = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)  # noqa: E731
    model = lambda seed: seeded(seed, TinyGPT)  # noqa: E731
    return Setting("GPT, 2 layers", (rows[: 32 * steps],), (rows[32 * steps :],), NextToken(), model, make, 1, 32)


def compared(name: str) -> Setting:
    """Return a task on which methods of attribution are compared: digits B, MNIST A, or B trained until it converged, Bc."""
    return {"B": digits, "A": lambda: mnist(queries=200), "Bc": lambda: digits(epochs=100, rate=0.03)}[name]()
