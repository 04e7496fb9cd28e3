"""Distillation against plain formulas, the student's trajectory, and the ridge theorem in closed form."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrograd import Classification, Examples, Regression, Trajectory, record, retrain
from retrograd.errors import InputError
from retrograd.selection import Distillation, suggested_weight, with_teacher
from retrograd.selection.distillation import asking_for_losses, inputs_and_labels, outputs
from tests.cases import CASES, labels, normal, tabular


def trained(name: str = "plain", task: Classification | Regression | None = None, data=None, **options) -> Trajectory:
    """Record a case with other ids than rows."""
    case = CASES[name]
    examples = Examples(case.examples if data is None else data, ids=torch.arange(14) * 2 + 100)
    chosen = {"epochs": 3, "batch_size": 4, "seed": 3, "weights": case.weights, "clip_norm": case.clip_norm, **options}
    return record(case.model(), examples, task or case.task, optimizer=adam, **chosen)


def adam(parameters) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.02, eps=1e-3)


def batch(count: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    return normal(count, 3, seed=1), labels(count, 3, seed=2), 3 * normal(count, 3, seed=3)


# ---------------------------------------------------------------------- the loss


@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 1.0), (0.7, 4.0), (1.0, 2.0)])
def test_loss_against_plain_arithmetic(weight, temperature):
    model, (inputs, own, teacher) = CASES["plain"].model(), batch()
    found = Distillation(weight, temperature).losses(model, (inputs, own, teacher))
    logits = model(inputs)
    for row, value in enumerate(found):
        student = [math.exp(logit) for logit in logits[row].tolist()]
        cross_entropy = -math.log(student[int(own[row])] / sum(student))
        soft = [math.exp(logit / temperature) for logit in logits[row].tolist()]
        theirs = [math.exp(logit / temperature) for logit in teacher[row].tolist()]
        divergence = sum(
            p / sum(theirs) * math.log(p / sum(theirs) / (q / sum(soft))) for p, q in zip(theirs, soft, strict=True)
        )
        assert value.item() == pytest.approx((1 - weight) * cross_entropy + weight * temperature**2 * divergence, rel=1e-10)
    towards = F.softmax(teacher / temperature, -1)
    divergences = F.kl_div(F.log_softmax(logits / temperature, -1), towards, reduction="none").sum(-1)
    expected = (1 - weight) * F.cross_entropy(logits, own, reduction="none") + weight * temperature**2 * divergences
    assert torch.allclose(found, expected, rtol=1e-12, atol=0)


def test_without_teacher_it_is_classification_and_with_itself_as_teacher_it_rests():
    model, (inputs, own, teacher) = CASES["plain"].model(), batch()
    base = Classification("loss", label_smoothing=0.2)
    task = Distillation(0.0, base=base)
    assert torch.equal(task.losses(model, (inputs, own, teacher)), base.losses(model, (inputs, own)))
    for data in ((inputs, own), (inputs, own, teacher)):
        assert torch.equal(task.measurements(model, data), base.measurements(model, (inputs, own)))
    resting = Distillation(1.0).losses(model, (inputs, own, model(inputs).detach()))
    assert resting.abs().max() < 1e-12
    gradients = torch.autograd.grad(resting.sum(), list(model.parameters()))
    assert max(gradient.abs().max() for gradient in gradients) < 1e-12


def test_no_gradient_to_the_teacher_and_one_forward_pass():
    calls = []
    model, (inputs, own, teacher) = CASES["dropout"].model(), batch()
    model.register_forward_hook(lambda *_: calls.append(1))
    Distillation(0.5).losses(model, (inputs, own, teacher.requires_grad_())).sum().backward()
    assert teacher.grad is None
    assert len(calls) == 1
    assert all(leaf.grad is not None for leaf in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"), [({"weight": 1.1}, "<= 1, got"), ({"weight": 0.5, "temperature": 0.0}, "above 0")]
)
def test_refused_options(options, message):
    with pytest.raises(InputError, match=message):
        Distillation(**options)


def test_examples_without_logits_are_refused():
    inputs, own, _ = batch()
    with pytest.raises(InputError, match="with_teacher"):
        Distillation(0.5).losses(CASES["plain"].model(), (inputs, own))


# ---------------------------------------------------------------------- the student's training


@pytest.mark.parametrize("name", ["plain", "clipped", "batchnorm", "dropout"])
def test_student_without_distillation_is_the_run(name):
    run = trained(name)
    student = with_teacher(run, weight=0.0)
    assert student.final_state.equals(run.final_state)
    assert torch.equal(student.examples.ids, run.examples.ids)
    assert student.parents == (run,)
    assert student.digest != run.digest
    assert student.genesis() != with_teacher(run, weight=0.5).genesis()
    assert student.checkpoints.steps() == [0]
    queries = CASES[name].queries
    assert torch.equal(student.measurements(queries), run.measurements(queries))


def test_student_equals_a_plain_loop():
    run, teacher = trained(), trained(seed=5, epochs=6)
    assert not torch.equal(outputs(run, run.final_state, batch()[0]), outputs(teacher, teacher.final_state, batch()[0]))
    student = with_teacher(run, teacher, weight=0.6, temperature=3.0)
    assert student.parents == (teacher,)
    model, (inputs, own) = CASES["plain"].model(), CASES["plain"].examples
    teaching = CASES["plain"].model()
    teaching.load_state_dict(teacher.final_state.params)
    logits = teaching(inputs).detach()
    optimizer = adam(model.parameters())
    for each in run.records:
        rows = run.examples.rows(each.example_ids)
        optimizer.zero_grad()
        made = model(inputs[rows])
        towards = F.softmax(logits[rows] / 3, -1)
        taught = F.kl_div(F.log_softmax(made / 3, -1), towards, reduction="batchmean")
        (0.4 * F.cross_entropy(made, own[rows]) + 0.6 * 9 * taught).backward()
        optimizer.step()
    for name, leaf in model.named_parameters():
        assert torch.allclose(student.final_state.params[name], leaf, rtol=1e-10, atol=1e-12)


def test_teacher_speaks_in_evaluation_mode_and_the_model_stays_as_it_was():
    run = trained("dropout")
    model = run.update_map.model
    model.train()
    model[2].eval()
    modes = [module.training for module in model.modules()]
    found = with_teacher(run, weight=0.5).examples.batch(run.examples.ids)[2]
    assert [module.training for module in model.modules()] == modes
    expected = CASES["dropout"].model()
    expected.load_state_dict(run.final_state.params)
    assert torch.allclose(found, expected.eval()(CASES["dropout"].examples[0]), rtol=1e-12)


def test_student_is_retrained_on_subsets():
    run = trained()
    kept = torch.ones(2, 14, dtype=torch.bool)
    kept[1, ::2] = False
    options = {"removal": "deletion", "hold": "steps"}
    queries = CASES["plain"].queries
    plain = retrain(run, queries, kept, **options, together=2).values
    none = retrain(with_teacher(run, weight=0.0), queries, kept, **options, together=2).values
    half = [retrain(with_teacher(run, weight=0.5), queries, kept, **options, together=many).values for many in (1, 2)]
    assert torch.allclose(none, plain, rtol=1e-10)
    assert torch.allclose(*half, rtol=1e-9)
    assert (half[0] - plain).abs().max() > 1e-3
    losses = retrain(asking_for_losses(with_teacher(run, weight=0.5)), queries, kept, **options, together=2).values
    asked = Classification("loss")
    same = with_teacher(trained(task=asked), weight=0.5)
    assert torch.allclose(losses, retrain(same, queries, kept, **options, together=2).values, rtol=1e-9)


def test_what_cannot_be_distilled_is_refused():
    regression = record(
        nn.Linear(3, 1).double(),
        (normal(4, 3, seed=0), normal(4, 1, seed=1)),
        Regression(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        epochs=1,
        batch_size=4,
    )
    with pytest.raises(InputError, match="needs a run of Classification, got Regression"):
        with_teacher(regression, weight=0.5)
    inputs, own = tabular(14, 100)

    class Named(Classification):
        def losses(self, model, batch):
            return super().losses(model, (batch["inputs"], batch["labels"]))

    named = trained(task=Named(), data={"inputs": inputs, "labels": own})
    with pytest.raises(InputError, match=r"needs training data that are \(inputs, labels\).*a dict"):
        with_teacher(named, weight=0.5)
    run = trained()
    rows = trained(data=[(inputs[row], own[row]) for row in range(14)])  # a data set without columns is read row by row
    assert all(torch.equal(*columns) for columns in zip(inputs_and_labels(rows), inputs_and_labels(run), strict=True))
    wide = record(nn.Linear(3, 4).double(), (inputs, own), Classification(), optimizer=torch.optim.SGD, epochs=1, batch_size=7)
    with pytest.raises(InputError, match=r"outputs of shape \(4,\) and the student of shape \(3,\)"):
        with_teacher(run, wide, weight=0.5)


def test_suggested_weight_falls_with_the_share_that_is_kept():
    shares = [0.01, 0.03, 0.1, 0.25, 0.5, 0.75, 1.0]
    found = [suggested_weight(share) for share in shares]
    assert all(0 <= weight <= 1 for weight in found)
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]
    for wrong in (0.0, 1.5):
        with pytest.raises(InputError, match="0 < keep <= 1"):
            suggested_weight(wrong)


# ---------------------------------------------------------------------- the theorem


def ridge_errors(teacher: int, weight: float, *, dimension: int = 20, total: int = 80, noise: float = 1.0) -> float:
    """Error of a ridge student on the first quarter of the data with a teacher of the first ``teacher`` examples.

    Parameters and noise are normal, and the penalty is the best there is for that. Linear in the labels, the error is exact in
    the mean over both; the inputs are drawn 50 times.
    """
    generator, eye, error = torch.Generator().manual_seed(0), torch.eye(dimension, dtype=torch.float64), 0.0
    for _ in range(50):
        x = torch.randn(dimension, total, generator=generator, dtype=torch.float64)

        def solved(count: int, x: Tensor = x) -> Tensor:  # [parameter, label]
            kept = x[:, :count]
            found = torch.zeros(dimension, total, dtype=torch.float64)
            found[:, :count] = torch.linalg.inv(kept @ kept.T + noise**2 * eye) @ kept
            return found

        quarter = solved(total // 4)
        student = quarter @ (weight * x.T @ solved(teacher) + (1 - weight) * torch.eye(total, dtype=torch.float64))
        error += float(((student @ x.T - eye).square().sum() + noise**2 * student.square().sum()) / dimension / 50)
    return error


def test_ridge_student_gains_with_the_data_of_its_teacher():
    alone = ridge_errors(20, 0.0)
    assert alone == pytest.approx(ridge_errors(80, 0.0), rel=1e-12)  # without distillation nobody asks the teacher
    same, half, everything = (ridge_errors(count, 1.0) for count in (20, 40, 80))
    assert same > alone * 1.02  # the best penalty, used twice, is too much
    assert half < alone * 0.9
    assert everything < half * 0.9
    errors = [ridge_errors(count, 0.7) for count in (20, 30, 40, 60, 80)]
    assert errors == sorted(errors, reverse=True)
