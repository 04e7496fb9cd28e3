"""Kernels that replace torch's while a step is differentiated: same values, same derivatives, right second derivatives."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradgradcheck

from retrograd.trajectory.kernels import twice_differentiable
from tests.cases import normal


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [normal(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def inside(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function as it is computed while a step is differentiated."""

    def call(*args: Tensor) -> Tensor:
        with twice_differentiable():
            return function(*args)

    return call


def check(function: Callable[..., Tensor], inputs: list[Tensor], second: bool = True) -> None:
    """Values and first derivatives equal torch's; second ones equal differences, and are the same in batches as in a loop."""
    expected, found = function(*inputs), inside(function)(*inputs)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    cotangent = normal(*expected.shape, seed=9)
    for one, other in zip(
        torch.autograd.grad(found, inputs, cotangent, create_graph=True),
        torch.autograd.grad(expected, inputs, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    if second:
        assert gradgradcheck(inside(function), tuple(inputs))
        first = torch.autograd.grad(inside(function)(*inputs).square().sum(), inputs, create_graph=True)
        vectors = [normal(3, *leaf.shape, seed=seed) for seed, leaf in enumerate(first, 20)]
        options = {"retain_graph": True}
        batched = torch.autograd.grad(first, inputs, vectors, is_grads_batched=True, **options)
        for row in range(3):
            alone = torch.autograd.grad(first, inputs, [leaf[row] for leaf in vectors], **options)
            for one, other in zip(batched, alone, strict=True):
                torch.testing.assert_close(one[row], other, rtol=1e-11, atol=1e-11)


# ---------------------------------------------------------------------------------------------------------------------
# Convolution


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_convolutions_equal_those_of_torch(dimensions: int):
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dimensions]
    for stride, padding, dilation, groups, bias in itertools.product((1, 2), (0, 1), (1, 2), (1, 2), (False, True)):
        x, weight, b = leaves((2, 2, *[5] * dimensions), (4, 2 // groups, *[2] * dimensions), (4,))
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        if bias:
            check(lambda x, w, b, o=options: convolve(x, w, b, **o), [x, weight, b], second=False)
        else:
            check(lambda x, w, o=options: convolve(x, w, **o), [x, weight], second=False)


@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), [(1, 0, 1, 1), (2, 1, 1, 1), (1, 1, 2, 2), (2, 0, 1, 2)])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_convolutions_have_a_second_derivative(dimensions: int, stride: int, padding: int, dilation: int, groups: int):
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dimensions]
    inputs = leaves((1, 2, *[3] * dimensions), (2, 2 // groups, *[2] * dimensions), (2,))
    check(lambda x, w, b: convolve(x, w, b, stride, padding, dilation, groups), inputs)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: F.conv2d(x, w, padding=(1, 0), stride=(1, 2)),
        lambda x, w: F.conv2d(x, w[..., :1, :1], padding="same"),
        lambda x, w: F.conv2d(x[0], w),  # without a batch axis
        lambda x, w: F.conv2d(x, w.detach()),
        lambda x, w: F.conv2d(x.detach(), w),
        lambda x, w: torch.conv2d(input=x, weight=w, bias=None, padding=1),
    ],
)
def test_convolutions_called_in_other_ways(function: Callable):
    x, weight = leaves((1, 2, 3, 3), (2, 2, 2, 2))
    expected, found = function(x, weight), inside(function)(x, weight)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    cotangent = normal(*expected.shape, seed=9)
    ends = [torch.autograd.grad(output, (x, weight), cotangent, allow_unused=True) for output in (found, expected)]
    for one, other in zip(*ends, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    if all(leaf is not None for leaf in ends[0]):
        assert gradgradcheck(inside(function), (x, weight))


# ---------------------------------------------------------------------------------------------------------------------
# Normalisation


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4), (2, 3, 2, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_equals_that_of_torch(shape: tuple, affine: bool, training: bool):
    def norm(x: Tensor, *own: Tensor) -> Tensor:
        mean, variance = normal(3, seed=5), normal(3, seed=6).exp()
        return F.batch_norm(x, mean, variance, *own, training=training, momentum=0.3, eps=1e-3)

    check(norm, leaves(shape, *[(3,), (3,)] * affine))


@pytest.mark.parametrize("kind", ["batch", "instance"])
def test_running_statistics_move_as_in_torch_and_have_derivatives(kind: str):
    def norm(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        if kind == "batch":
            return F.batch_norm(x, mean, variance, training=True, momentum=0.3)
        return F.instance_norm(x, mean, variance, use_input_stats=True, momentum=0.3)

    x, mean, variance = normal(2, 3, 4, seed=0), normal(3, seed=1), normal(3, seed=2).exp()
    expected = [mean.clone(), variance.clone()]
    norm(x, *expected)

    def statistics(x: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
        moved = (mean.clone(), variance.clone())
        inside(norm)(x, *moved)
        return moved

    for one, other in zip(statistics(x, mean, variance), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    inputs = tuple(leaf.requires_grad_() for leaf in (x, mean, variance))
    assert torch.autograd.gradcheck(statistics, inputs)


def test_statistics_that_are_used_have_derivatives():
    def norm(x: Tensor, mean: Tensor, log_variance: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.batch_norm(x, mean, log_variance.exp(), weight, bias, training=False)

    inputs = leaves((2, 3, 2), (3,), (3,), (3,), (3,))
    assert torch.autograd.gradcheck(inside(norm), tuple(inputs))
    assert gradgradcheck(inside(norm), tuple(inputs))


@pytest.mark.parametrize(
    ("norm", "shapes"),
    [
        (lambda x, w, b: F.layer_norm(x, (4,), w, b), [(3, 4), (4,), (4,)]),
        (lambda x, w: F.layer_norm(x, [2, 3], w, eps=1e-2), [(2, 2, 3), (2, 3)]),
        (lambda x: F.layer_norm(x, x.shape[1:]), [(2, 5)]),
        (lambda x, w, b: F.group_norm(x, 2, w, b), [(2, 4, 3), (4,), (4,)]),
        (lambda x, w: F.rms_norm(x, (4,), w), [(3, 4), (4,)]),
        (lambda x, w, b: F.instance_norm(x, weight=w, bias=b), [(2, 2, 4), (2,), (2,)]),
    ],
    ids=["layer", "layer of two axes", "layer without weights", "group", "rms", "instance"],
)
def test_other_normalisations(norm: Callable, shapes: list):
    check(norm, leaves(*shapes))


def test_weight_norm_has_a_right_second_derivative():
    """That of torch 2.13 is wrong: gradgradcheck of torch._weight_norm fails."""
    v, log_g = leaves((3, 2), (3, 1))
    check(lambda v, g: torch._weight_norm(v, g.exp(), 0), [v, log_g])
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)).double()
    names = [name for name, _ in layer.named_parameters()]
    own = [leaf.detach().clone().requires_grad_() for leaf in layer.parameters()]
    x = normal(2, 2, seed=3)
    check(lambda *own: torch.func.functional_call(layer, dict(zip(names, own, strict=True)), (x,)), own)


# ---------------------------------------------------------------------------------------------------------------------
# Cross-entropy


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("ignore_index", [-100, 1])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_equals_that_of_torch(reduction: str, ignore_index: int, label_smoothing: float, weighted: bool):
    options = {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if weighted:
        options["weight"] = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    for shape, target in (((4, 3), [0, 1, 2, 1]), ((2, 3, 2), [[0, 1], [2, 2]]), ((3,), 2)):
        labels = torch.tensor(target)
        check(lambda x, y=labels: F.cross_entropy(x, y, **options), leaves(shape), second=shape == (4, 3))


def test_cross_entropy_of_ignored_labels_and_of_probabilities():
    x = leaves((3, 4))
    ignored = torch.tensor([-100, 2, -100])
    check(lambda x: F.cross_entropy(x, ignored, reduction="none"), x)
    shares = normal(3, 4, seed=4).softmax(1)
    check(lambda x: F.cross_entropy(x, shares, reduction="none", label_smoothing=0.1), x)


# ---------------------------------------------------------------------------------------------------------------------
# Attention and softmax

_MASK = torch.tensor([[True, False, True], [True, True, False], [False, True, True]])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": _MASK},
        {"attn_mask": _MASK.double().log()},
        {"attn_mask": torch.tensor([[0.3, -1.0, 0.0]]).double()},
    ],
    ids=["plain", "causal", "scale", "mask", "mask of -inf", "bias"],
)
def test_attention_equals_that_of_torch(options: dict):
    check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), leaves(*[(2, 2, 3, 2)] * 3))


def test_attention_with_shared_heads_and_other_lengths():
    inputs = leaves((1, 4, 2, 2), (1, 2, 3, 2), (1, 2, 3, 2))
    check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), inputs)
    inputs = leaves((1, 2, 2, 2), (1, 2, 3, 2), (1, 2, 3, 4))
    check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), inputs)


def test_attention_draws_the_same_dropout():
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(1)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)

    check(attend, leaves(*[(2, 2, 3, 2)] * 3))


def test_attention_of_a_place_that_sees_nothing():
    blind = torch.tensor([[True, False, True], [False, False, False], [False, True, True]])
    check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=blind), leaves(*[(1, 3, 2)] * 3), second=False)


@pytest.mark.parametrize(
    "softmax",
    [
        lambda x: torch.softmax(x, 1),
        lambda x: x.softmax(dim=0),
        lambda x: F.softmax(x, dim=-1),
        nn.Softmax(dim=1),
        lambda x: torch.softmax(x, -1, torch.float64),
        lambda x: F.softmax(x, -1, dtype=torch.float64),
        lambda x: F.log_softmax(x, -1),
    ],
)
def test_softmax_equals_that_of_torch(softmax: Callable):
    check(softmax, leaves((2, 3, 2)))


@pytest.mark.parametrize(
    "softmax", [lambda x: torch.softmax(x, -1, torch.float64), lambda x: x.softmax(-1, torch.float64)], ids=["torch", "method"]
)
def test_softmax_in_another_dtype(softmax: Callable):
    x = normal(2, 3, seed=0).float().requires_grad_()
    assert inside(softmax)(x).dtype == torch.float64


# ---------------------------------------------------------------------------------------------------------------------
# Activations


@pytest.mark.parametrize(
    "activation",
    [
        *(nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Tanh(), nn.Sigmoid(), nn.Softplus(), nn.Softplus(2.0, 3.0)),
        *(nn.ELU(), nn.ELU(0.5), nn.CELU(), nn.SELU(), nn.ReLU(), nn.LeakyReLU(0.2), nn.Hardswish(), nn.ReLU6(), nn.GLU()),
        *(torch.tanh, torch.sigmoid, torch.relu, Tensor.tanh, Tensor.sigmoid, F.gelu, F.softplus, F.silu),
    ],
    ids=lambda activation: getattr(activation, "__name__", str(activation)),
)
def test_activations_equal_those_of_torch(activation: Callable):
    check(lambda x: activation(x), leaves((3, 4)))


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.ELU(inplace=True)], ids=str)
def test_activations_in_place(activation: nn.Module):
    check(lambda x: activation(x * 1.0), leaves((3, 4)))


def test_activations_at_zero_have_their_second_derivative():
    zero = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for activation, curvature in ((F.gelu, 2 / (2 * torch.pi) ** 0.5), (torch.sigmoid, 0.0), (F.softplus, 0.25), (F.silu, 0.5)):
        (first,) = torch.autograd.grad(inside(activation)(zero).sum(), zero, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), zero, allow_unused=True)
        second = torch.zeros_like(zero) if second is None else second
        torch.testing.assert_close(second, torch.full_like(zero, curvature), rtol=1e-12, atol=1e-15)
