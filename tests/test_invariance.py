"""One battery for every method: nothing that is only bookkeeping may change a score."""

import pytest
import torch
from torch import Tensor, nn

from retrograd import (
    EKFAC,
    KFAC,
    TRAK,
    Arnoldi,
    Astra,
    Blend,
    Classification,
    ConjugateGradients,
    DataInf,
    Diagonal,
    Examples,
    Fisher,
    FixedPoint,
    GaussNewton,
    Hessian,
    Implicit,
    LoGra,
    Neumann,
    Nystrom,
    ProjectedGaussNewton,
    Source,
    TracIn,
    Unrolled,
    attribute,
    record,
)
from retrograd.adjoint import TangentKernel
from tests.cases import CASES

CASE = CASES["plain"]
METHODS = {
    "exact": Unrolled(route="batched"),
    "gauss-newton": Unrolled(route="batched", curvature="gauss_newton"),
    "truncated": Unrolled(last=3, route="batched"),
    "fixed point": FixedPoint("neumann", iterations=5),
    "source": Source(2, 2),
    "source fast": Source(1, 2, fast=True),
    "source heavy ball": Source(2, 1, momentum="heavy_ball"),
    "source lanczos": Source(2, 1, GaussNewton(lanczos_steps=80)),
    "source fisher": Source(2, 1, Fisher()),
    "ekfac": Implicit(),
    "kfac": Implicit(KFAC()),
    "diagonal": Implicit(Diagonal()),
    "training time": Implicit(EKFAC(), damping="training_time"),
    "explicit": Implicit(GaussNewton(lanczos_steps=None)),
    "explicit hessian": Implicit(Hessian(lanczos_steps=None), damping=30.0),
    "nystrom": Implicit(Nystrom(rank=40)),
    "arnoldi": Implicit(Arnoldi(steps=71, rank=5)),
    "projected": Implicit(ProjectedGaussNewton(20)),
    "cg": Implicit(GaussNewton(), ConjugateGradients(1e-13), damping="training_time"),
    "neumann": Implicit(GaussNewton(), Neumann(30), damping="training_time"),
    "lissa": Implicit(GaussNewton(), Neumann(20, batch_size=5), damping="training_time"),
    "astra": Implicit(GaussNewton(), Astra(30, batch_size=5), damping="training_time"),
    "datainf": Implicit(solver=DataInf()),
    "tangent kernel": TangentKernel(),
    "tangent kernel trace": TangentKernel("initial", outputs="trace"),
    "trak": TRAK(10),
    "logra": LoGra((2, 2)),
    "logra random": LoGra((2, 2), init="random"),
    "tracin": TracIn(3),
    "tracin cosine": TracIn(2, cosine=True),
    "tracin projected": TracIn(2, projection=7),
    "tracin last layer": TracIn(2, layers=("*4*",)),
    "blend": Blend((Unrolled(route="batched"), Source(2, 1))),
}


class Wrapped(nn.Module):
    """The same network, its layers in other modules under other names."""

    def __init__(self, inside: nn.Sequential):
        super().__init__()
        self.front, self.back4 = inside[:3], inside[3:]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.back4(self.front(inputs))


def trained(permutation: Tensor | None = None, model: nn.Module | None = None):
    """Two epochs of momentum on the ids 100 to 113, whatever rows they lie in."""
    torch.manual_seed(0)
    inputs, targets = CASE.examples
    rows = torch.arange(14) if permutation is None else permutation
    order = (100 + torch.cat([torch.randperm(14) for _ in range(2)])).split(7)
    return record(
        CASE.model() if model is None else model,
        Examples((inputs[rows], targets[rows]), 100 + rows),
        Classification(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.7),
        order=order,
    )


@pytest.fixture(scope="module")
def run():
    return trained()


def assert_same(found, expected):
    order = torch.argsort(found.example_ids)
    values, wanted = found.values[:, order], expected.values
    error = ((values - wanted).norm() / wanted.norm()).item()
    assert error <= 1e-10, f"relative error {error:.1e}"


@pytest.mark.parametrize("name", METHODS)
def test_nothing_but_the_question_matters(run, name):
    method = METHODS[name]
    expected = attribute(run, CASE.queries, method=method, check_roughness=False)
    assert expected.values.abs().max() > 0
    each = sum(leaf.numel() * leaf.element_size() for leaf in run.state(0).params.values())
    # number of batches and slices of queries
    assert_same(attribute(run, CASE.queries, method=method, memory=30 * each, query_batch=1, check_roughness=False), expected)
    # order of the examples in the data set
    shuffled = trained(torch.randperm(14, generator=torch.Generator().manual_seed(1)))
    assert_same(attribute(shuffled, CASE.queries, method=method, check_roughness=False), expected)
    # which module a layer is in
    wrapped = trained(model=Wrapped(CASE.model()))
    if name != "tracin last layer":
        assert_same(attribute(wrapped, CASE.queries, method=method, check_roughness=False), expected)
    # order of the queries
    turned = tuple(column.flip(0) for column in CASE.queries)
    flipped = attribute(run, turned, method=method, check_roughness=False)
    assert_same(type(flipped)(flipped.values.flip(0), flipped.example_ids, flipped.query_ids, ""), expected)


class Masked(nn.Module):
    """Averages over the places whose last feature is 1."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        mask = inputs[..., 3:]
        return self.last((torch.tanh(self.first(inputs[..., :3])) * mask).sum(1) / mask.sum(1))


def masked(padding: int):
    """Sequences of three places, and so many more that the model does not look at; and queries."""
    draw = torch.Generator().manual_seed(7)
    inputs, labels = torch.randn(13, 3, 4, generator=draw, dtype=torch.float64), torch.arange(13) % 3
    inputs[..., 3] = 1
    rest = torch.randn(13, padding, 4, generator=draw, dtype=torch.float64)
    rest[..., 3] = 0
    inputs = torch.cat([inputs, rest], dim=1)
    torch.manual_seed(0)
    run = record(
        Masked().double(),
        (inputs[:9], labels[:9]),
        Classification(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.7),
        order=torch.stack([torch.arange(start, start + 3) for start in (0, 3, 6, 3, 0, 6)]),
    )
    return run, (inputs[9:], labels[9:])


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("nystrom", "tracin last layer")])
def test_padding_does_not_matter(name):
    (short, asked), (long, padded) = masked(0), masked(5)
    expected = attribute(short, asked, method=METHODS[name], check_roughness=False)
    assert_same(attribute(long, padded, method=METHODS[name], check_roughness=False), expected)
