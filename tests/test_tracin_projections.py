"""TracIn on projections and on some layers only, and the projection itself."""

import pytest
import torch
from torch import nn

from retrograd import TracIn, attribute, record
from retrograd.errors import InputError
from retrograd.linalg import Projection
from tests.cases import CASES, RULES, normal
from tests.reference.dense_influence import example_gradients, query_gradients

CASE = CASES["plain"]


@pytest.fixture(scope="module")
def run():
    return CASE.record(RULES["momentum"])


def matrix(size: int, dimension: int, seed: int = 0) -> torch.Tensor:
    """G, whole."""
    projection = Projection(size, dimension, seed)
    return projection.up(torch.eye(projection.dimension, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------------
# The projection


def test_a_projection_is_one_matrix_whatever_its_blocks():
    vectors = torch.randn(3, 700, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for dimension in (5, 300):  # one and two steps of the counter for a column
        whole = Projection(700, dimension, seed=2)
        down = whole.down(vectors)
        assert torch.allclose(down, vectors @ matrix(700, dimension, 2).T, rtol=1e-12, atol=1e-12)
        assert torch.allclose(whole.up(down), down @ matrix(700, dimension, 2), rtol=1e-12, atol=1e-12)
        for block in (1, 64, 333):
            cut = Projection(700, dimension, seed=2, block=block, memory=0)
            assert torch.allclose(cut.down(vectors), down, rtol=1e-12, atol=1e-12)
            assert torch.allclose(cut.up(down), whole.up(down), rtol=1e-12, atol=1e-12)
    assert (matrix(700, 5).abs() * 5**0.5 - 1).abs().max() < 1e-15
    assert not torch.equal(matrix(700, 5, 0), matrix(700, 5, 1))


def test_a_projection_is_unbiased():
    left, right = torch.randn(2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    products = []
    for seed in range(2000):
        both = Projection(40, 8, seed).down(torch.stack([left, right]))
        products.append(both[0] @ both[1])
    found, exact = torch.stack(products), left @ right
    variance = (left @ left * (right @ right) + exact**2 - 2 * (left**2 * right**2).sum()) / 8
    assert abs(found.mean() - exact) < 4 * (variance / 2000).sqrt()
    assert abs(found.var() / variance - 1) < 0.2


def test_columns_do_not_depend_on_how_many_there_are():
    assert torch.equal(matrix(50, 7)[:, :30], matrix(30, 7))


def test_from_the_number_of_parameters_on_nothing_is_projected():
    vectors = torch.randn(2, 9)
    for dimension in (9, 20):
        assert torch.equal(Projection(9, dimension).up(Projection(9, dimension).down(vectors)), vectors)
    for wrong in ({"size": 0, "dimension": 1}, {"size": 3, "dimension": 0}, {"size": 3, "dimension": 1, "seed": -1}):
        with pytest.raises(InputError, match="at least 1"):
            Projection(**wrong)


# ---------------------------------------------------------------------------------------------------------------------
# TracIn


def test_projected_tracin_equals_its_formula_with_a_dense_matrix(run):
    found = attribute(run, CASE.queries, method=TracIn([8], projection=6, seed=3)).values
    queries, gradients = query_gradients(run, CASE.queries), example_gradients(run, run.final_state)
    projection = matrix(queries.shape[1], 6, 3)
    exposure = run.exposure([8])[0] * run.step_size(run.final_state, "0.weight")
    expected = -(queries @ projection.T) @ (gradients @ projection.T).T * exposure
    assert (found - expected).norm() <= 1e-8 * expected.norm()
    whole = attribute(run, CASE.queries, method=TracIn([8])).values
    assert not torch.allclose(found, whole, rtol=0.01)
    wide = attribute(run, CASE.queries, method=TracIn([8], projection=queries.shape[1])).values
    assert torch.equal(wide, whole)


def test_projected_tracin_does_not_depend_on_memory_or_slices(run):
    method = TracIn(3, projection=6, layers=["0", "4.bias"])
    whole = attribute(run, CASE.queries, method=method).values
    size = sum(leaf.numel() for leaf in run.final_state.params.values()) * 8
    parts = attribute(run, CASE.queries, method=method, query_batch=1, memory=8 * size).values
    assert torch.allclose(whole, parts, rtol=1e-10, atol=1e-14)
    low = attribute(run, CASE.queries, method=method, rank=4).values
    assert torch.allclose(whole, low, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("cosine", [False, True])
def test_layers_are_those_parts_of_the_gradients(run, cosine):
    names = list(run.final_state.params)
    found = attribute(run, CASE.queries, method=TracIn([8], cosine=cosine, layers=["2", "4.w*"]))
    wanted = ("2.weight", "2.bias", "4.weight")
    chosen = torch.cat([torch.full((leaf.numel(),), name in wanted) for name, leaf in run.final_state.params.items()])
    queries = query_gradients(run, CASE.queries)[:, chosen]
    gradients = example_gradients(run, run.final_state)[:, chosen]
    if cosine:
        expected = -(queries / queries.norm(dim=1, keepdim=True)) @ (gradients / gradients.norm(dim=1, keepdim=True)).T
    else:
        expected = -queries @ gradients.T * run.exposure([8])[0] * run.step_size(run.final_state, names[0])
    assert (found.values - expected).norm() <= 1e-8 * expected.norm()
    assert found.notes["parameters_covered"] == int(chosen.sum())
    assert "2.weight, 2.bias, 4.weight" in found.notes["coverage"]


def test_all_layers_add_up(run):
    whole = attribute(run, CASE.queries, method=TracIn(2)).values
    parts = sum(attribute(run, CASE.queries, method=TracIn(2, layers=[layer])).values for layer in ("0", "2", "4"))
    assert torch.allclose(whole, parts, rtol=1e-10, atol=1e-14)
    for every in (["*"], ["0", "2", "4"], ["*.weight", "*.bias"]):
        assert torch.allclose(attribute(run, CASE.queries, method=TracIn(2, layers=every)).values, whole, atol=1e-14)


def test_either_name_of_a_tied_weight_will_do():
    case = CASES["tied"]
    run = case.record(RULES["sgd"])
    first = attribute(run, case.queries, method=TracIn(2, layers=["decoder"]))
    second = attribute(run, case.queries, method=TracIn(2, layers=["embedding.weight"]))
    assert torch.equal(first.values, second.values)
    assert first.notes["parameters_covered"] == 20
    assert not torch.equal(first.values, attribute(run, case.queries, method=TracIn(2)).values)


class Sequences:
    """Squared errors of a sequence of outputs."""

    def token_losses(self, model, batch):
        return (model(batch[0]) - batch[1]).square().sum(2)

    def losses(self, model, batch):
        return self.token_losses(model, batch).sum(1)

    measurements = losses


def test_tokens_of_some_layers():
    data = (normal(6, 4, 3, seed=1), normal(6, 4, 2, seed=2))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    run = record(model, data, Sequences(), optimizer=lambda p: torch.optim.SGD(p, lr=0.01), epochs=1, batch_size=3)
    for method in (TracIn(2, layers=["2"]), TracIn(2, layers=["2"], projection=4)):
        whole = attribute(run, data, method=method).values
        found = attribute(run, data, method=method, tokens=True)
        assert torch.allclose(found.values, whole, rtol=1e-10, atol=1e-14)
        assert torch.allclose(found.tokens.sum(2), whole, rtol=1e-10, atol=1e-14)


def test_parts_of_a_projection_on_disk_are_of_one_call(run, tmp_path):
    method = TracIn(2, projection=5, layers=["4"])
    first = attribute(run, CASE.queries, method=method, folder=tmp_path).values
    again = attribute(run, CASE.queries, method=method, folder=tmp_path).values
    assert torch.equal(first, again)


def test_what_tracin_refuses(run):
    with pytest.raises(InputError, match=r"layers='head' matches no trained parameter. There are: 0, 0.bias, 0.weight, 2"):
        attribute(run, CASE.queries, method=TracIn(2, layers=["0", "head"]))
    frozen = CASES["groups"].record(RULES["sgd"])
    with pytest.raises(InputError, match=r"layers='0.weight' matches no trained parameter. There are: 0, 0.bias, 2"):
        attribute(frozen, CASE.queries, method=TracIn(2, layers=["0.weight"]))
    with pytest.raises(InputError, match="at least 1"):
        TracIn(2, projection=0)
    for wrong in ([], "head"):
        with pytest.raises(InputError, match="list of names"):
            TracIn(2, layers=wrong)
