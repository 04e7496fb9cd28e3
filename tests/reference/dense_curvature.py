"""Curvature by brute force: per-example gradients and Kronecker products as dense float64 matrices, slow and plain."""

import copy

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from retrograd import Regression
from retrograd.curvature.pseudo_gradients import PseudoBatches
from retrograd.params import flatten, unflatten
from tests.cases import gelu, linear

SEED = 4


def dense(operator, params, function=lambda s: s):
    """f(G), written out: f(G) applied to every unit vector."""
    size = sum(leaf.numel() for leaf in params.values())
    columns = operator.apply(lambda values, _: function(values), unflatten(torch.eye(size, dtype=torch.float64), params))
    return matrix_of(columns, params)


def matrix_of(vectors, params):
    return torch.cat([vectors[name].reshape(len(vectors[name]), -1) for name in params], 1)


def sampled(run, state, draw=0, ids=None):
    """The examples one at a time, with their targets drawn."""
    ids = run.examples.ids if ids is None else ids
    source = PseudoBatches(run.update_map, run.examples, ids, 256, 1, SEED, [state])
    return [source.batch(state, one, draw) for one in ids.split(1)]


def gradient_rows(run, state, draws=1):
    """∇ℓ of each example with drawn targets, [example × draw, P], by plain autograd, one after the other."""
    rows = []
    for draw in range(draws):
        for batch in sampled(run, state, draw):
            params = {name: leaf.detach().requires_grad_() for name, leaf in state.params.items()}
            loss = run.update_map.losses(type(state)(params, state.slots, state.buffers, state.step), batch).sum()
            grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
            rows.append(flatten(grads))
    return torch.stack(rows)


def dense_gauss_newton(run, state):
    """Σ JᵀHJ / N, with J and H by torch.func."""
    task, module = run.update_map.task, copy.deepcopy(run.update_map.model).eval()
    total = torch.zeros(())
    for row in run.examples.ids.split(1):
        inputs, targets = run.examples.batch(row)

        def outputs(params, inputs=inputs):
            return torch.func.functional_call(module, {**params, **state.buffers}, (inputs,))[0]

        def loss(out, targets=targets):
            if isinstance(task, Regression):
                return (out - targets[0]).square().mean()
            return F.cross_entropy(out[None], targets, label_smoothing=task.label_smoothing)

        with sdpa_kernel(SDPBackend.MATH):
            jacobian = matrix_of(torch.func.jacrev(outputs)(state.params), state.params)
        total = total + jacobian.T @ torch.func.hessian(loss)(outputs(state.params)) @ jacobian / len(run.examples)
    return total


def trace_plain(p, b, x):
    z0 = linear(p, "0", x)
    z2 = linear(p, "2", gelu(z0))
    z4 = linear(p, "4", torch.tanh(z2))
    return z4, [("0", x, z0), ("2", gelu(z0), z2), ("4", torch.tanh(z2), z4)]


def trace_dropout(p, b, x):
    z0 = linear(p, "0", x)
    z3 = linear(p, "3", torch.tanh(z0))
    z6 = linear(p, "6", gelu(z3))
    return z6, [("0", x, z0), ("3", torch.tanh(z0), z3), ("6", gelu(z3), z6)]


def trace_batchnorm(p, b, x):
    z0 = x @ p["0.weight"].T
    hidden = gelu((z0 - b["1.running_mean"]) / torch.sqrt(b["1.running_var"] + 1e-5) * p["1.weight"] + p["1.bias"])
    z3 = linear(p, "3", hidden)
    return z3, [("0", x, z0), ("3", hidden, z3)]


def trace_tied(p, b, tokens):
    matrix = p["embedding.weight"]
    mean = (matrix[tokens[:, 0]] + matrix[tokens[:, 1]]) / 2
    z = linear(p, "hidden", mean)
    return torch.tanh(z) @ matrix.T, [("hidden", mean, z)]


def trace_cnn(p, b, images):
    padded = F.pad(images, (1, 1, 1, 1))
    patches = torch.stack([padded[0, :, i : i + 3, j : j + 3].flatten() for i in range(4) for j in range(4)])
    z0 = patches @ p["0.weight"].flatten(1).T + p["0.bias"]
    hidden = gelu(z0).view(4, 4, 2).permute(2, 0, 1)[None]
    hidden = torch.tanh(F.conv2d(F.avg_pool2d(hidden, 2), p["3.weight"], p["3.bias"], groups=2)).flatten(1)
    z6 = linear(p, "6", hidden)
    return z6, [("0", patches, z0), ("6", hidden, z6)]


def trace_attention(p, b, x):
    z = x[0] @ p["qkv.weight"].T
    query, key, value = z.view(3, 3, 2, 2).permute(1, 2, 0, 3)
    products = torch.exp(query @ key.mT / 2**0.5) * torch.ones(3, 3, dtype=x.dtype).tril()
    mixed = (products / products.sum(-1, keepdim=True) @ value).transpose(0, 1).flatten(1)
    hidden = torch.tanh(mixed).mean(0)[None]
    out = linear(p, "out", hidden)
    return out, [("qkv", x[0], z), ("out", hidden, out)]


TRACES = {name.removeprefix("trace_"): function for name, function in list(globals().items()) if name.startswith("trace_")}


def sides(name, run, state, batch):
    """For one example: ā [position, in + 1] and d [position, out] of every covered layer, from the formula."""
    params = {key: leaf.detach().requires_grad_() for key, leaf in state.params.items()}
    out, traced = TRACES[name](params, state.buffers, batch[0])
    loss = (out - batch[1]).square().mean() if isinstance(run.update_map.task, Regression) else F.cross_entropy(out, batch[1])
    found = torch.autograd.grad(loss, [z for _, _, z in traced])
    return {
        layer: (torch.cat([a, torch.ones(len(a), 1)], 1) if f"{layer}.bias" in params else a, d)
        for (layer, a, _), d in zip(traced, found, strict=True)
    }


def reference(name, run, states, corrected, samples=1):
    """The dense matrix of K-FAC or EK-FAC from explicit Kronecker products; the exact diagonal where there is no layer."""
    params = states[0].params
    places = unflatten(torch.arange(sum(leaf.numel() for leaf in params.values())), params)
    rows = torch.cat([gradient_rows(run, state, samples) for state in states])
    matrix = rows.square().mean(0).diag()
    seen = [
        [sides(name, run, state, batch) for draw in range(samples) for batch in sampled(run, state, draw)] for state in states
    ]
    for layer in seen[0][0]:
        own = [[example[layer] for example in examples] for examples in seen]
        inputs = torch.stack([second(part, 0) for part in own]).mean(0)
        outputs = torch.stack([second(part, 1) * len(torch.cat([d for _, d in part])) / len(part) for part in own]).mean(0)
        block = torch.kron(outputs, inputs)
        if corrected:
            basis = torch.kron(torch.linalg.eigh(outputs)[1], torch.linalg.eigh(inputs)[1])
            whole = torch.stack([(d.T @ a).flatten() for part in own for a, d in part])
            block = basis @ (whole @ basis).square().mean(0).diag() @ basis.T
        index = places[f"{layer}.weight"].flatten(1)
        if f"{layer}.bias" in params:
            index = torch.cat([index, places[f"{layer}.bias"][:, None]], 1)
        index = index.flatten()
        matrix[index[:, None], index] = block
    return matrix


def second(part, side):
    rows = torch.cat([both[side] for both in part]).detach()
    return rows.T @ rows / len(rows)
