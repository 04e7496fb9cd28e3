"""Meta-learned pre-training: task weights, the contrastive loss, and the paper's estimator against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrograd import Classification, Queries, chain, hypergradient, record
from retrograd.errors import InputError, UntrustedGradient
from retrograd.hypergradients import ContrastiveLoss, MultitaskLoss, TaskWeights, pretraining_estimator


class Net(nn.Module):
    def __init__(self, outputs: int):
        super().__init__()
        self.encoder, self.head = nn.Linear(3, 2), nn.Linear(2, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.encoder(inputs)))


RATE = 0.3


@pytest.fixture(scope="module")
def stages():
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 3, generator=draw, dtype=torch.float64)
    targets = torch.randint(0, 2, (8, 4), generator=draw).double()
    torch.manual_seed(0)
    weights = TaskWeights(4).double()
    weights.logits.data.copy_(torch.tensor([0.3, -0.5, 0.1, 0.8]))
    model, tuned = Net(4).double(), Net(3).double()
    pretraining = record(
        model,
        (inputs, targets),
        MultitaskLoss(),
        optimizer=lambda p: torch.optim.SGD(p, lr=RATE),
        epochs=3,
        batch_size=8,
        meta=weights,
    )
    tuned.encoder.load_state_dict(model.encoder.state_dict())
    finetuning = record(
        tuned,
        (inputs, torch.arange(8) % 3),
        Classification(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        epochs=2,
        batch_size=8,
    )
    asked = Queries((torch.randn(5, 3, generator=draw, dtype=torch.float64), torch.arange(5) % 3), of="losses", mean=True)
    return chain(pretraining, finetuning), asked


def test_weights_are_what_they_say():
    plain, normalised = TaskWeights(3, normalised=False), TaskWeights(3)
    assert plain().tolist() == normalised().tolist() == [1.0, 1.0, 1.0]
    for module in (plain, normalised):
        module.logits.data.copy_(torch.tensor([-1.0, 0.0, 2.0]))
    torch.testing.assert_close(plain(), 2 * torch.tensor([-1.0, 0.0, 2.0]).sigmoid())
    torch.testing.assert_close(normalised(), plain() / plain().mean())
    with pytest.raises(InputError, match="at least one task"):
        TaskWeights(0)


def test_multitask_loss_is_the_weighted_mean():
    model, inputs, targets = Net(2), torch.randn(4, 3), torch.rand(4, 2)
    weights = TaskWeights(2)
    weights.logits.data.copy_(torch.tensor([0.0, 1.0]))
    every = F.binary_cross_entropy_with_logits(model(inputs), targets, reduction="none")
    torch.testing.assert_close(MultitaskLoss().losses(model, (inputs, targets), weights), (every * weights()).mean(1))
    torch.testing.assert_close(MultitaskLoss().measurements(model, (inputs, targets)), every.mean(1))
    with pytest.raises(InputError, match="one for each task"):
        MultitaskLoss().losses(model, (inputs, torch.rand(4, 3)))


def test_contrastive_loss_is_nt_xent():
    draw = torch.Generator().manual_seed(1)
    inputs, weights = torch.randn(3, 4, generator=draw), torch.tensor([1.0, 0.5, 2.0])
    views = iter([inputs + 0.1, inputs - 0.2])
    found = ContrastiveLoss(0.3).loss(nn.Identity(), inputs, weights, lambda _: next(views))
    both = F.normalize(torch.cat([inputs + 0.1, inputs - 0.2]), dim=1)
    terms = []
    for place in range(6):
        cosines = both @ both[place] / 0.3
        others = torch.cat([cosines[:place], cosines[place + 1 :]])
        terms.append(others.logsumexp(0) - cosines[(place + 3) % 6])
    pairs = torch.stack([(terms[row] + terms[row + 3]) / 2 for row in range(3)])
    torch.testing.assert_close(found, (weights * pairs).mean())
    with pytest.raises(InputError, match="positive"):
        ContrastiveLoss(0.0)


def test_exact_gradient_by_task_weights_is_a_central_difference(stages):
    both, asked = stages
    found = hypergradient(both, asked, "meta")[0]
    at, direction = both.stages[0].update_map.meta, {"logits": torch.tensor([1.0, -0.5, 0.2, 0.7], dtype=torch.float64)}

    def value(size: float) -> float:
        moved = both.rerun({"meta": {"logits": at["logits"] + size * direction["logits"]}}, {})
        return asked.values(moved.stages[1].update_map, moved.final_state).item()

    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    assert found.along({"meta": direction}).item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("products", [0, 1, 5])
def test_the_papers_estimator_is_its_formula(stages, products):
    """−∂²L/∂φ∂θ · α Σ_j (I − αH)^j v with dense derivatives, v from all steps of fine-tuning by autograd."""
    both, asked = stages
    pretraining, finetuning = both.stages
    with pytest.warns(UntrustedGradient):
        found = hypergradient(both, asked, "meta", method=pretraining_estimator(RATE, products, finetuning_steps=2))[0]
    ended, logits = pretraining.final_state, pretraining.update_map.meta["logits"]
    inputs, targets = pretraining.examples.batch(pretraining.examples.ids)
    names = list(ended.params)

    def split(flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([ended.params[name].numel() for name in names])
        return {name: part.view_as(ended.params[name]) for name, part in zip(names, parts, strict=True)}

    def loss(flat: Tensor, logits: Tensor) -> Tensor:
        own = split(flat)
        hidden = torch.tanh(F.linear(inputs, own["encoder.weight"], own["encoder.bias"]))
        outputs = F.linear(hidden, own["head.weight"], own["head.bias"])
        shares = torch.sigmoid(logits)
        return (F.binary_cross_entropy_with_logits(outputs, targets, reduction="none") * shares / shares.mean()).mean()

    flat = torch.cat([ended.params[name].flatten() for name in names])
    hessian = torch.autograd.functional.hessian(lambda point: loss(point, logits), flat)
    tuned = hypergradient(finetuning, asked, "initial_params")["initial_params"]
    handed = {name: tuned[name][0] if "encoder" in name else torch.zeros_like(leaf) for name, leaf in ended.params.items()}
    costate = torch.cat([handed[name].flatten() for name in names])
    total, term = torch.zeros_like(costate), RATE * costate
    for _ in range(products + 1):
        total, term = total + term, term - RATE * hessian @ term
    mixed = torch.autograd.functional.jacobian(
        lambda logits: torch.autograd.functional.jacobian(lambda point: loss(point, logits), flat, create_graph=True), logits
    )
    torch.testing.assert_close(found["meta"]["logits"][0], -total @ mixed)


def test_estimator_refuses_nonsense():
    with pytest.raises(InputError, match="products must be at least 0"):
        pretraining_estimator(RATE, -1)
