"""The empirical tangent kernel against torch.func, and attribution by linearised training against autograd through it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrograd import Classification, Queries, Regression, Unrolled, attribute, record
from retrograd.adjoint import TangentKernel
from retrograd.curvature import EmpiricalKernel, relative_change
from retrograd.curvature.tangent_kernel import rows_of
from retrograd.errors import InputError, NonFinite
from retrograd.params import flatten, unflatten
from tests.cases import CASES, RULES, normal
from tests.reference import linearised_autograd
from tests.tolerances import TOLERANCES


def close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCES["exact_vs_autograd"]) -> bool:
    return found.shape == expected.shape and bool((found - expected).norm() <= tolerance * expected.norm())


def seeded(build) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build().double()


class Shared(nn.Module):
    """One layer called twice, another whose weight is used once more without it, and a parameter of no layer."""

    def __init__(self):
        super().__init__()
        self.twice, self.also = nn.Linear(3, 3), nn.Linear(3, 3)
        self.scale, self.last = nn.Parameter(torch.ones(3)), nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.twice(torch.tanh(self.twice(inputs)))
        return self.last(torch.tanh(self.also(hidden) + hidden @ self.also.weight) * self.scale)


class Choosy(nn.Module):
    """Looks at values, so that it cannot be vectorised over rows."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.bend = nn.Linear(3, 2), nn.Linear(3, 2), nn.Parameter(torch.tensor([0.3, 0.7]))

    def forward(self, inputs: Tensor) -> Tensor:
        rows = [(self.first if float(row.sum()) > 0 else self.second)(row[None]) for row in inputs]
        return torch.tanh(torch.cat(rows) * self.bend)


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 4, bias=False), nn.LayerNorm(4), nn.Linear(4, 2)),
    "batch norm": CASES["batchnorm"].build,
    "tied": CASES["tied"].build,
    "cnn": CASES["cnn"].build,
    "attention": CASES["attention"].build,
    "shared": Shared,
    "choosy": Choosy,
}


@pytest.mark.parametrize(("name", "route"), [*((name, "auto") for name in MODELS), ("mlp", "jacobian")])
def test_kernel_is_that_of_torch_func(name, route):
    model = seeded(MODELS[name]).eval()
    data = {"tied": CASES["tied"].data, "cnn": CASES["cnn"].data, "attention": CASES["attention"].data}
    own = data.get(name, CASES["plain"].data)
    left, right = own(3, 1)[0], own(2, 2)[0]
    params = {key: leaf.detach() for key, leaf in model.named_parameters()}

    def function(vector: Tensor, row: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.functional_call(model, unflatten(vector, params), (row[None],))[0]

    if name == "choosy":

        def jacobians(data: Tensor) -> Tensor:
            at = flatten(params.values())
            return torch.stack([torch.func.jacrev(partial(function, row=row))(at) for row in data])

        expected = torch.einsum("ncp,mdp->nmcd", jacobians(left), jacobians(right))
    else:
        expected = linearised_autograd.tangent_kernel(function, flatten(params.values()), left, right)
    model.train()  # the kernel is that of evaluation mode, and leaves the mode as it is
    kernel = EmpiricalKernel.of(model, route=route)
    assert close(kernel.matrix(left, right), expected)
    assert close(kernel.trace(left, right), expected.diagonal(dim1=2, dim2=3).sum(-1))
    vectors = normal(2, expected.shape[-1], seed=3)
    assert close(kernel.product(left, vectors, right), torch.einsum("nmcd,md->nc", expected, vectors))
    symmetric = kernel.matrix(left)
    assert close(symmetric, symmetric.permute(1, 0, 3, 2))
    assert close(symmetric[:, :2], kernel.matrix(left, left[:2]))
    if name in ("mlp", "cnn"):  # row by row
        assert close(EmpiricalKernel.of(model, memory=1, route=route).matrix(left), symmetric)
    assert model.training
    parts = kernel.by_layer(left, right)
    assert parts.keys() == params.keys()
    assert close(sum(parts.values()), expected)
    modules = kernel.by_layer(left, right, layers="module", trace=True)
    assert close(sum(modules.values()), expected.diagonal(dim1=2, dim2=3).sum(-1))


def test_step_sizes_weigh_the_parameters():
    model, inputs = seeded(MODELS["mlp"]), normal(4, 3, seed=1)
    parts = EmpiricalKernel.of(model).by_layer(inputs)
    numbers = {name: float(place + 1) for place, name in enumerate(parts)}
    expected = sum(numbers[name] * part for name, part in parts.items())
    assert close(EmpiricalKernel.of(model, step_sizes=numbers).matrix(inputs), expected)
    tensors = {name: torch.full_like(leaf, numbers[name]) for name, leaf in model.named_parameters()}
    kernel = EmpiricalKernel.of(model, step_sizes=tensors)
    assert close(kernel.matrix(inputs), expected)
    assert close(kernel.product(inputs, normal(4, 2, seed=2)).flatten(), kernel.gram(inputs) @ normal(4, 2, seed=2).flatten())


def test_kernel_of_a_run_is_that_of_its_state():
    run = CASES["batchnorm"].record(RULES["momentum"])
    state = run.state(3)
    kernel, batch = EmpiricalKernel.of(run, state), run.examples.batch(run.examples.ids)
    assert close(kernel.outputs(batch), run.update_map.ask(lambda model: model(batch[0]), state).detach())
    assert relative_change(kernel.matrix(batch), EmpiricalKernel.of(run).matrix(batch)) > 1e-3


def test_kernel_refuses():
    class Plain:
        def losses(self, model, batch):
            return model(batch[0])[:, 0]

        measurements = losses

    data = (normal(4, 3, seed=0), normal(4, 3, seed=1))
    run = record(
        nn.Linear(3, 1).double(), data, Plain(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), epochs=1, batch_size=4
    )
    with pytest.raises(InputError, match="Plain does not say what these are"):
        EmpiricalKernel.of(run)
    kernel = EmpiricalKernel.of(nn.Linear(3, 1).double())
    for problem, call in {
        "batches of tensors": lambda: rows_of("no tensors"),
        "'parameter' or 'module'": lambda: kernel.by_layer(data[0], layers="both"),
        "one vector for each of the 4": lambda: kernel.product(data[0], data[1][:3, :1]),
        "at least 1, got 0": lambda: EmpiricalKernel.of(nn.Linear(3, 1), memory=0),
        "route must be": lambda: EmpiricalKernel.of(nn.Linear(3, 1), route="fast"),
        "step_sizes lacks": lambda: EmpiricalKernel.of(nn.Linear(3, 1), step_sizes={"weight": 1.0}),
        "no other state": lambda: EmpiricalKernel.of(nn.ReLU()),
        "one shape": lambda: relative_change(torch.eye(2), torch.eye(3)),
    }.items():
        with pytest.raises(Exception, match=problem + "|Expected type"):  # annotations are checked in tests, and come first
            call()
    with pytest.raises(NonFinite):
        kernel.matrix(torch.full((1, 3), torch.inf, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------------
# The method


@pytest.mark.parametrize(
    ("case", "rule", "at"),
    [
        ("plain", "sgd", "initial"),
        ("plain", "dampening", "final"),
        ("plain", "nesterov", 3),
        ("clipped", "dampening", "initial"),
        ("clipped", "dampening", 3),
        ("batchnorm", "momentum", "final"),
        ("cnn", "sgd decay", "final"),
        ("attention", "sgd", "final"),
    ],
)
def test_scores_are_the_derivative_of_linearised_training(case, rule, at):
    run, queries = CASES[case].record(RULES[rule]), CASES[case].queries
    state = run.state({"initial": 0, "final": len(run)}.get(at, at))
    found = attribute(run, queries, method=TangentKernel(at))
    expected = linearised_autograd.scores(run, state, queries)
    assert close(found.values, expected, TOLERANCES["approximate_vs_own_formula"])
    assert found.notes["linearised_rule"] == ""


def test_one_output_has_its_own_kernel_for_its_trace():
    torch.manual_seed(0)
    model, data = seeded(lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))), normal(11, 4, seed=1)
    batch = (data[:8, :3], data[:8, 3:])
    asked = (data[8:, :3], data[8:, 3:])
    run = record(
        model, batch, Regression(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, weight_decay=0.1), epochs=3,
        batch_size=4, clip_norm=0.5,
    )  # fmt: skip
    full, trace = (attribute(run, asked, method=TangentKernel(outputs=kind)).values for kind in ("full", "trace"))
    assert close(trace, full)
    assert close(full, linearised_autograd.scores(run, run.final_state, asked), TOLERANCES["approximate_vs_own_formula"])


def test_trace_of_a_linear_model_is_exact():
    """A linear model's kernel is a multiple of the identity over outputs, and its training is linear: all methods agree."""
    data = CASES["plain"].data(12, 1)
    run = record(
        nn.Linear(3, 3).double(), data, Classification(), optimizer=lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.5),
        epochs=3, batch_size=5,
    )  # fmt: skip
    queries = CASES["plain"].queries
    exact = attribute(run, queries, method=Unrolled()).values
    for kind in ("full", "trace"):
        for at in ("initial", "final"):
            found = attribute(run, queries, method=TangentKernel(at, outputs=kind))
            assert close(found.values, exact)
    losses = Queries(queries, of="losses", mean=True)
    assert close(attribute(run, losses, method=TangentKernel()).values, attribute(run, losses, method=Unrolled()).values)
    mean = Queries(queries, mean=True)
    assert close(attribute(run, mean, method=TangentKernel()).values, exact.mean(0, keepdim=True))


@pytest.mark.parametrize(("case", "rule"), [("groups", "sgd"), ("plain", "adam"), ("plain", "rmsprop momentum")])
def test_other_rules_are_preconditioned_descent(case, rule):
    """K has the step sizes at θ_c in it; against Unrolled on the linear model of the features √s J."""
    run = CASES[case].record(RULES[rule])
    state, queries = run.final_state, CASES[case].queries
    linear = linearised_autograd.LinearModel(run, state)
    batch = run.examples.batch(run.examples.ids)
    start = flatten(run.state(0).params.values())
    sizes = {name: leaf * 0 + run.step_size(state, name) for name, leaf in state.params.items()}
    scale = flatten(sizes.values()).sqrt()
    jacobian = lambda own: torch.func.jacrev(lambda v: linear(v, own))(start) * scale  # noqa: E731
    features, asked = torch.cat([jacobian(batch), jacobian(queries)]), torch.cat([linear(start, batch), linear(start, queries)])

    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.move = nn.Parameter(torch.zeros(len(start), dtype=torch.float64))

        def forward(self, rows: Tensor) -> Tensor:
            return asked[rows] + features[rows] @ self.move

    rows = torch.arange(len(batch[0]))
    again = record(
        Features(), (rows, batch[1]), Classification(), optimizer=lambda p: torch.optim.SGD(p, lr=RULES[rule].options["lr"]),
        order=[record.example_ids for record in run.records], weights=CASES[case].weights,
    )  # fmt: skip
    expected = attribute(again, (torch.arange(len(rows), len(asked)), queries[1]), method=Unrolled())
    found = attribute(run, queries, method=TangentKernel())
    assert close(found.values, expected.values, TOLERANCES["approximate_vs_own_formula"])
    assert "left out" in found.notes["linearised_rule"]


def test_wide_networks_are_scored_as_exactly_unrolled():
    torch.manual_seed(0)
    width, generator = 1024, torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1, bias=False)).double()
    nn.init.normal_(model[2].weight, std=width**-0.5)
    inputs = torch.randn(24, 3, generator=generator, dtype=torch.float64)
    targets = torch.sin(2 * inputs[:, :1]) + 0.3 * torch.randn(24, 1, generator=generator, dtype=torch.float64)
    run = record(
        model,
        (inputs[:16], targets[:16]),
        Regression("prediction"),
        optimizer=lambda p: torch.optim.SGD(p, lr=4e-4, momentum=0.5),
        epochs=10,
        batch_size=8,
    )
    asked = (inputs[16:], targets[16:])
    exact = attribute(run, asked, method=Unrolled(), check_roughness=False).values
    for at in ("initial", "final"):
        found = attribute(run, asked, method=TangentKernel(at)).values
        correlation = torch.corrcoef(torch.stack([found.flatten(), exact.flatten()]))[0, 1]
        assert correlation > 0.999, f"{at}: {correlation:.5f}"
        assert (found - exact).norm() <= 0.05 * exact.norm()


def test_method_refuses_what_it_cannot_do():
    run, queries = CASES["plain"].record(RULES["sgd"]), CASES["plain"].queries
    with pytest.raises(InputError, match=r"42 rows.*allowed are 41.*trace"):
        attribute(run, queries, method=TangentKernel(largest=41))
    attribute(run, queries, method=TangentKernel(outputs="trace", largest=14))
    with pytest.raises(InputError, match="leave out rank"):
        attribute(run, queries, method=TangentKernel(), rank=2)
    with pytest.raises(InputError, match="scores by token"):
        attribute(run, queries, method=TangentKernel(), tokens=True)
    with pytest.raises(InputError, match="clipping for one group of SGD only"):
        attribute(CASES["clipped"].record(RULES["adam"]), queries, method=TangentKernel())
    for wrong in ({"linearised_at": "middle"}, {"outputs": "some"}, {"largest": 0}):
        with pytest.raises(Exception, match=r"at least 1|Expected type"):
            TangentKernel(**wrong)


class Inside(Classification):
    """Asks for what the outputs do not say."""

    def measurements(self, model: nn.Module, batch) -> Tensor:
        return model[0].weight.sum() + 0 * batch[0][:, 0]


class Doubled(Classification):
    def measurements(self, model: nn.Module, batch) -> Tensor:
        return model(2 * batch[0])[:, 0]


@pytest.mark.parametrize("task", [Inside(), Doubled()])
def test_measurements_must_be_of_the_outputs(task):
    run = record(
        CASES["plain"].model(), CASES["plain"].examples, task, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), epochs=1,
        batch_size=7,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"function of the outputs.*of='losses'"):
        attribute(run, CASES["plain"].queries, method=TangentKernel())


def test_divergence_is_named():
    """Outputs that saturate keep a run finite that its linearisation cannot follow."""
    model = seeded(lambda: nn.Sequential(nn.Linear(1, 1), nn.Tanh()))
    data = (torch.ones(2, 1, dtype=torch.float64), 0.5 * torch.ones(2, 1, dtype=torch.float64))
    run = record(model, data, Regression(), optimizer=lambda p: torch.optim.SGD(p, lr=60.0), epochs=250, batch_size=2)
    with pytest.raises(NonFinite, match="more than the kernel of step 0 bears"):
        attribute(run, data, method=TangentKernel("initial"))


def test_a_loss_that_is_linear_in_the_outputs():
    class Linear(Regression):
        def losses_of(self, outputs: Tensor, batch) -> Tensor:
            return F.threshold(outputs, -torch.inf, 0.0)[:, 0] * batch[1][:, 0]

    model = nn.Linear(3, 1).double()
    data = (normal(6, 3, seed=1), normal(6, 1, seed=2))
    run = record(model, data, Linear("prediction"), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), epochs=2, batch_size=3)
    assert close(attribute(run, data, method=TangentKernel()).values, attribute(run, data, method=Unrolled()).values)
