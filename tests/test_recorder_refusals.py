"""What a record cannot express is refused by name, and so is training that blows up."""

import pytest
import torch
from torch import nn

from retrograd import Classification, Regression, record
from retrograd.errors import (
    InputError,
    NonFinite,
    ReplayMismatch,
    UnknownExample,
    UnknownOptimizer,
    UnsupportedHook,
    UnsupportedScaler,
    UnsupportedTraining,
)
from tests.test_recorder import (
    BATCHES,
    INPUTS,
    LABELS,
    OPTIMIZERS,
    ROWS,
    STEPS,
    TARGETS,
    Bare,
    cross_entropy,
    network,
    squared_error,
    start,
    train,
    train_to_the_end,
)

# ---------------------------------------------------------------------------------------------------------------------
# What cannot be recorded is refused by name


def within_step(recorder, *actions, example_ids=BATCHES[0]):
    with recorder.step(example_ids):
        for action in actions:
            action()


def finish_with(recorder, example_ids):
    within_step(recorder, recorder.optimizer.step, example_ids=example_ids)
    recorder.finish()


def nothing(*_):
    return None


HOOKS = {
    "a gradient hook on parameter 0.weight": lambda model, optimizer: model[0].weight.register_hook(nothing),
    "a post-accumulate hook on parameter 0.bias": lambda model, optimizer: model[0].bias.register_post_accumulate_grad_hook(
        nothing
    ),
    "a backward hook on module 4": lambda model, optimizer: model[4].register_full_backward_hook(nothing),
    "a backward hook on module 2": lambda model, optimizer: model[2].register_full_backward_pre_hook(nothing),
    "a step hook on the optimizer": lambda model, optimizer: optimizer.register_step_post_hook(nothing),
    "a step hook": lambda model, optimizer: optimizer.register_step_pre_hook(nothing),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_are_refused(name):
    model = network()
    optimizer = OPTIMIZERS["sgd"](model)
    HOOKS[name](model, optimizer)
    with pytest.raises(UnsupportedHook, match=name):
        start(model, optimizer)


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_that_come_after_the_recorder_are_refused(name):
    recorder = start()
    HOOKS[name](recorder.model, recorder.optimizer)
    with pytest.raises(UnsupportedHook, match=name):
        train(recorder)


def test_gradient_scaler_is_refused():
    recorder = start()
    scaler = torch.amp.GradScaler("cpu")
    backward = scaler.scale(cross_entropy(recorder.model, BATCHES[0], 0)).backward
    with pytest.raises(UnsupportedScaler, match="GradScaler"):
        within_step(recorder, backward, lambda: scaler.step(recorder.optimizer))


class OwnSGD(torch.optim.SGD):
    """A subclass may do anything."""


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, OwnSGD])
def test_unknown_optimizers_are_refused(kind):
    model = network()
    with pytest.raises(UnknownOptimizer, match=kind.__name__):
        start(model, kind(model.parameters(), lr=0.1))


def test_optimizer_must_train_parameters_of_the_model():
    model = network()
    foreign = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(2))], 0.1)
    with pytest.raises(InputError, match="1 tensors that are not parameters of the model"):
        start(model, foreign)
    with pytest.raises(InputError, match="trains nothing"):
        start(model.requires_grad_(False))


def test_no_update_or_two_of_them_in_a_step():
    recorder = start()
    update = recorder.optimizer.step
    with pytest.raises(UnsupportedTraining, match="step 0 made no update"):
        within_step(recorder)
    with pytest.raises(UnsupportedTraining, match=r"step 0 calls optimizer.step\(\) twice"):
        within_step(recorder, update, update)


@pytest.mark.parametrize(("ids", "unknown"), [([0, ROWS], ROWS), ([-1, 2], -1)])
def test_unknown_example_ids(ids, unknown):
    recorder = start()
    with pytest.raises(UnknownExample, match=rf"\[{unknown}\]"):
        within_step(recorder, recorder.optimizer.step, example_ids=ids)
    recorder = start()
    train(recorder)
    # Ids of a step that is not replayed at once may be looked up later, but before the run is handed over.
    with pytest.raises(UnknownExample, match=rf"\[{unknown}\]"):
        finish_with(recorder, ids)
    model = network()
    with pytest.raises(UnknownExample, match=rf"\[{unknown}\]"):
        record(model, (INPUTS, LABELS), Classification(), optimizer=OPTIMIZERS["sgd"](model), order=torch.tensor([ids]))


class Augmented(torch.utils.data.Dataset):
    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        return INPUTS[row] + 0.1 * torch.randn(4), LABELS[row]


def test_random_data_set_is_refused(tmp_path):
    model = network()
    given = {"optimizer": OPTIMIZERS["sgd"](model), "order": BATCHES}
    with pytest.raises(InputError, match="move random augmentation"):
        record(model, Augmented(), Classification(), folder=tmp_path / "run", **given)
    with pytest.raises((InputError, ReplayMismatch), match="move random augmentation"):
        record(model, Augmented(), Classification(), **given)


class MeanLoss(Classification):
    def losses(self, model, batch):
        return super().losses(model, batch).mean()


class ColumnOfLosses(Classification):
    def losses(self, model, batch):
        return super().losses(model, batch)[:, None]


@pytest.mark.parametrize("task", [MeanLoss(), ColumnOfLosses()])
def test_losses_of_another_shape(task):
    model = network()
    with pytest.raises(InputError, match=r"must give one loss per example, shape \(8,\)"):
        record(model, (INPUTS, LABELS), task, optimizer=OPTIMIZERS["sgd"](model), order=BATCHES)
    with pytest.raises(InputError, match=r"must give one loss per example, shape \(8,\)"):
        train(start(task=task))


# ---------------------------------------------------------------------------------------------------------------------
# Training that blows up


def linear_regression(learning_rate):
    model = network(outputs=2)[0::4]  # without Tanh nothing keeps it in bounds
    return model, torch.optim.SGD(model.parameters(), learning_rate)


def first_non_finite(learning_rate):
    """The first step of the bare loop after which a parameter is not finite, and the first whose loss is not."""
    losses = []
    bare = Bare(*linear_regression(learning_rate))
    copies = train(bare, loss=lambda *given: losses.append(squared_error(*given)) or losses[-1])
    by_loss = next(step for step, loss in enumerate(losses) if not loss.isfinite())
    by_parameters = next(
        step for step, copy in enumerate(copies[1:]) if any(not leaf.isfinite().all() for leaf in copy.values())
    )
    return by_parameters, by_loss


@pytest.mark.parametrize("learning_rate", [1e2, 1e4, 1e10, 1e20])
def test_divergence_is_reported_with_its_step(learning_rate):
    by_parameters, by_loss = first_non_finite(learning_rate)
    model, optimizer = linear_regression(learning_rate)
    with pytest.raises(NonFinite, match=rf"the loss of step {by_loss} is (inf|nan)"):
        record(model, (INPUTS, TARGETS), Regression(), optimizer=optimizer, order=BATCHES)
    model, optimizer = linear_regression(learning_rate)
    # What is not finite in one parameter may reach the others a step later.
    with pytest.raises(NonFinite, match=rf"non-finite at step ({by_parameters}|{by_parameters + 1}) "):
        train_to_the_end(start(model, optimizer, Regression()), loss=squared_error)


@pytest.mark.parametrize("step", [4, 5, STEPS - 1])
def test_gradient_that_is_not_finite_is_reported(step):
    def spoil(model, now):
        if now == step:
            model[0].weight.grad[0, 0] = torch.inf

    # One infinite weight of a saturated unit takes some steps to reach the parameter that is watched.
    with pytest.raises(NonFinite, match=rf"non-finite.*step ({'|'.join(str(step + later) for later in range(4))})\b"):
        train_to_the_end(start(), inside=spoil)


def test_after_an_error_the_same_optimizer_can_be_recorded_again():
    model, optimizer = linear_regression(1e10)
    beginning = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    with pytest.raises(NonFinite):
        record(model, (INPUTS, TARGETS), Regression(), optimizer=optimizer, order=BATCHES, keep=0.5, removal="deletion")
    assert optimizer.param_groups[0]["lr"] == 1e10
    model.load_state_dict(beginning)
    optimizer.param_groups[0]["lr"] = 0.01
    assert len(record(model, (INPUTS, TARGETS), Regression(), optimizer=optimizer, order=BATCHES)) == STEPS
