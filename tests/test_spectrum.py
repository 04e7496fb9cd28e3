"""Spectra: Krylov spaces against dense eigenvalues, and steps of training against explicit Jacobians."""

import pytest
import torch

from retrograd.dynamics import FunctionFlow, StepFlow, jacobian, spectrum
from retrograd.errors import InputError
from tests.cases import CASES, RULES, normal


def linear(matrix):
    return FunctionFlow(lambda state: matrix @ state, len(matrix)), torch.zeros(len(matrix), dtype=torch.float64)


def turning(size):
    """A matrix with some eigenvalues outside of a disc of others."""
    matrix = normal(size, size, seed=0) / size**0.5
    matrix[0, 0] += 3
    matrix[1, 2] += 4
    matrix[2, 1] -= 4
    return matrix


@pytest.mark.parametrize("which", ["LM", "LR"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_krylov_spaces_find_the_edge(which, symmetric):
    matrix = turning(200)
    matrix = (matrix + matrix.T) / 2 if symmetric else matrix
    flow, state = linear(matrix)
    expected = torch.linalg.eigvals(matrix)
    key = expected.abs() if which == "LM" else expected.real
    expected = expected[key.argsort(descending=True)[:4]]
    for dense in (True, False):
        found = spectrum(flow, state, 4, which, symmetric=symmetric, dense=dense, vectors=True)
        torch.testing.assert_close(found.values.real, expected.real, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.values.imag.abs(), expected.imag.abs(), rtol=0, atol=1e-6)
        residuals = (found.vectors @ matrix.T.to(found.vectors) - found.values[:, None] * found.vectors).norm(dim=1)
        torch.testing.assert_close(found.residuals, residuals, rtol=1e-3, atol=1e-13)
        assert residuals.max() < 1e-6
        assert found.dense == dense


def test_a_step_of_training():
    flow = StepFlow.of(CASES["plain"].record(RULES["momentum"]))
    found = spectrum(flow, step=3)
    expected = torch.linalg.eigvals(torch.func.jacrev(lambda own: flow(3, own))(flow.state(3)))
    assert len(found.values) == flow.dim
    assert found.radius == pytest.approx(expected.abs().max().item(), abs=1e-10)
    torch.testing.assert_close(found.values.sum(), expected.sum(), rtol=0, atol=1e-10)
    few = spectrum(flow, None, 3, "LR", step=3, dense=False)
    torch.testing.assert_close(few.values.real, expected.real.sort(descending=True).values[:3], rtol=0, atol=1e-6)
    torch.testing.assert_close(jacobian(flow, 3, flow.state(3)).trace(), expected.sum().real, rtol=0, atol=1e-10)


def test_an_exhausted_space_ends():
    flow, state = linear(torch.diag(torch.tensor([3.0, 2.0, 2.0, 2.0, 0.0, 0.0], dtype=torch.float64)))
    found = spectrum(flow, state, 3, dense=False)
    torch.testing.assert_close(found.values.real, torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-10)


def test_refusals():
    flow, state = linear(turning(30))
    with pytest.raises(InputError, match="need the matrix"):
        spectrum(flow, state, which="all", dense=False)
    with pytest.raises(InputError, match="between 1 and 30"):
        spectrum(flow, state, 31)
    with pytest.raises(InputError, match="krylov must be at least"):
        spectrum(flow, state, 5, dense=False, krylov=6)
