"""Recorder: an ordinary loop is recorded as it is, replays bit for bit, and a loop that deviates is told where."""

import contextlib
import re
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retrograd import All, Classification, Every, Examples, Recorder, Regression, Sqrt, Treeverse, Unrolled, attribute, record
from retrograd.errors import (
    ReplayMismatch,
    UnsupportedTraining,
)
from retrograd.trajectory import batch_order

ROWS, STEPS, CLIP = 32, 14, 0.3
DRAW = torch.Generator().manual_seed(0)
INPUTS = torch.randn(ROWS, 4, generator=DRAW)
LABELS = torch.randint(0, 3, (ROWS,), generator=DRAW)
TARGETS = torch.randn(ROWS, 2, generator=DRAW)
BATCHES = [torch.randint(0, ROWS, (size,), generator=DRAW) for size in (8, 7, 5, 8) * 4][:STEPS]


def network(outputs=3, batch_norm=False, dropout=0.0):
    torch.manual_seed(1)
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6) if batch_norm else nn.Identity(), nn.Tanh(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(6, outputs))


def cross_entropy(model, ids, step):
    return F.cross_entropy(model(INPUTS[ids]), LABELS[ids])


def squared_error(model, ids, step):
    return F.mse_loss(model(INPUTS[ids]), TARGETS[ids])


def two_groups(model):
    last = list(model[-1].parameters())
    first = [leaf for leaf in model.parameters() if all(leaf is not other for other in last)]
    return torch.optim.SGD([{"params": first, "lr": 0.3}, {"params": last, "momentum": 0.0, "weight_decay": 0.1}], 0.1, 0.9)


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.8, nesterov=True),
    "groups": two_groups,
    "adam": lambda model: torch.optim.Adam(model.parameters(), 0.02, weight_decay=0.01),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), 0.02, betas=(0.8, 0.9)),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), 0.01, momentum=0.5, centered=True),
}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
kinds_of_optimizer = pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop"])


def start(model=None, optimizer="sgd", task=None, **options):
    """A recorder around a classifier (or around a regression, if the task is one), in memory."""
    task = task or Classification()
    regression = isinstance(task, Regression)
    model = model or network(outputs=2 if regression else 3)
    optimizer = OPTIMIZERS[optimizer](model) if isinstance(optimizer, str) else optimizer
    return Recorder(model, (INPUTS, TARGETS if regression else LABELS), task, optimizer, **options)


class Bare(NamedTuple):
    """A model and its optimizer without a recorder."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, ids):
        return contextlib.nullcontext()


def train(recorder, *, loss=None, clip=None, scheduler=None, inside=None, between=None):
    """Train the recorder's model in an ordinary loop; returns copies of all there is before each step and after the last."""
    model, optimizer = recorder.model, recorder.optimizer
    copies = [snapshot(model, optimizer)]
    loss = loss or cross_entropy
    for step, ids in enumerate(BATCHES):
        with recorder.step(ids):
            optimizer.zero_grad()
            loss(model, ids, step).backward()
            if inside:
                inside(model, step)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        if scheduler:
            scheduler.step()
        copies.append(snapshot(model, optimizer))
        if between:
            between(model, step)
    return copies


def train_to_the_end(recorder, **options):
    train(recorder, **options)
    return recorder.finish()


def train_and_attribute(recorder, **options):
    run = train_to_the_end(recorder, **options)
    query = tuple(column[:1] for column in run.examples.data)
    return attribute(run, query, method=Unrolled(route="loop"), check_roughness=False)


def snapshot(model, optimizer):
    tensors = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    for name, leaf in model.named_parameters():
        own = optimizer.state.get(leaf, {})
        tensors |= {f"{name}/{key}": value.clone() for key, value in own.items() if torch.is_tensor(value)}
    return tensors


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


# ---------------------------------------------------------------------------------------------------------------------
# The record is true, and recording changes nothing


@every_optimizer
@pytest.mark.parametrize("checkpoints", [Treeverse(states=3), Sqrt()], ids=str)
def test_replay_has_the_bits_of_the_loop(optimizer, checkpoints):
    recorder = start(network(batch_norm=True, dropout=0.3), optimizer, clip_norm=CLIP, checkpoints=checkpoints)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(recorder.optimizer, STEPS)
    copies = train(recorder, clip=CLIP, scheduler=scheduler)
    run = recorder.finish()

    assert len(run) == STEPS
    keys = type(run.update_map.rule).torch_slots
    for step, copy in enumerate(copies):
        state = run.state(step)
        assert state.step == step
        replayed = {**state.params, **state.buffers}
        for slot, leaves in state.slots.items():
            replayed |= {f"{name}/{keys[slot]}": leaf for name, leaf in leaves.items()}
        for name, leaf in replayed.items():
            assert torch.equal(leaf, copy.get(name, torch.zeros_like(leaf))), f"{name} at step {step}"
        # Nothing that the loop moved is missing from the state.
        moved = {name for name in copy if not name.endswith("/step") and copy[name].any()}
        assert moved <= replayed.keys()
    walked = list(run.reverse())
    assert [step for step, _, _ in walked] == list(range(STEPS))[::-1]
    assert run.drift == 0.0
    assert len({record.hyper[0]["learning_rate"] for record in run.records}) == STEPS
    assert [record.example_ids.tolist() for record in run.records] == [ids.tolist() for ids in BATCHES]


@every_optimizer
def test_recording_does_not_change_the_training(optimizer):
    model, twin = network(batch_norm=True), network(batch_norm=True)
    recorded = train(start(model, optimizer, clip_norm=CLIP, check_every=2), clip=CLIP)
    assert_same(recorded[-1], train(Bare(twin, OPTIMIZERS[optimizer](twin)), clip=CLIP)[-1])


def test_random_numbers_outside_of_steps_are_those_of_an_unrecorded_process():
    recorder = start(network(dropout=0.5))
    torch.manual_seed(7)
    plain = torch.rand(STEPS).tolist()
    torch.manual_seed(7)
    drawn = []
    train(recorder, between=lambda model, step: drawn.append(torch.rand(1).item()))
    assert drawn == plain


def test_dropout_is_drawn_anew_at_each_step_and_by_the_seed():
    ends = []
    for seed in (5, 5, 6):
        recorder = start(network(dropout=0.5), seed=seed)
        ends.append(train(recorder)[-1])
        assert len({record.seed for record in recorder.finish().records}) == STEPS
    assert_same(ends[0], ends[1])
    assert not torch.equal(ends[0]["0.weight"], ends[2]["0.weight"])


def test_record_equals_an_ordinary_loop():
    weights = torch.linspace(0.5, 1.5, ROWS)
    rates = torch.linspace(0.2, 0.01, 8)
    bare, own = network(batch_norm=True), network(batch_norm=True)
    optimizer = torch.optim.SGD(bare.parameters(), 1.0, momentum=0.9)
    for step, ids in enumerate(batch_order(Examples((INPUTS, LABELS)), epochs=2, batch_size=9, seed=3)):
        optimizer.param_groups[0]["lr"] = float(rates[step])
        optimizer.zero_grad()
        losses = F.cross_entropy(bare(INPUTS[ids]), LABELS[ids], reduction="none")
        ((weights[ids] * losses).sum() / len(ids)).backward()
        nn.utils.clip_grad_norm_(bare.parameters(), CLIP)
        optimizer.step()
    given = {"epochs": 2, "batch_size": 9, "seed": 3, "learning_rates": rates, "clip_norm": CLIP, "weights": weights}
    optimizer = torch.optim.SGD(own.parameters(), 1.0, momentum=0.9)
    run = record(own, (INPUTS, LABELS), Classification(), optimizer=optimizer, **given)
    assert_same(own.state_dict(), bare.state_dict())
    assert_same({**run.final_state.params, **run.final_state.buffers}, dict(bare.state_dict()))
    assert [len(record.example_ids) for record in run.records] == [9, 9, 9, 5] * 2
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_weights_told_to_the_step_are_replayed():
    recorder = start(optimizer="adam", check_every=1, checkpoints=Treeverse(states=1))
    for ids in BATCHES[:6]:
        with recorder.step(ids, ids / 16.0):
            recorder.optimizer.zero_grad()
            losses = F.cross_entropy(recorder.model(INPUTS[ids]), LABELS[ids], reduction="none")
            (ids / 16.0 * losses).sum().div(len(ids)).backward()
            recorder.optimizer.step()
    run = recorder.finish()
    assert len(list(run.reverse())) == 6
    assert run.drift == 0.0


def test_loss_of_a_step_may_be_given_as_the_tensor_itself():
    recorder = start()
    with recorder.step(BATCHES[0]) as step:
        step.loss = cross_entropy(recorder.model, BATCHES[0], 0)
        step.loss.backward()
        recorder.optimizer.step()
    assert recorder.finish().records[0].loss == step.loss.item()


@kinds_of_optimizer
def test_frozen_first_layer_is_replayed(optimizer):
    """`model.parameters()` with a frozen part is what fine-tuning hands to the optimizer."""
    model = network()
    model[0].requires_grad_(False)
    recorder = start(model, optimizer, check_every=1)
    copies = train(recorder)
    run = recorder.finish()
    assert torch.equal(run.final_state.params["4.weight"], copies[-1]["4.weight"])
    assert "0.weight" not in run.final_state.params
    assert run.drift == 0.0


class Idle(nn.Sequential):
    """The first parameter is never used."""

    def __init__(self):
        super().__init__()
        self.idle, self.used = nn.Linear(2, 2), network()

    def forward(self, inputs):
        return self.used(inputs)


@kinds_of_optimizer
def test_parameter_that_the_loss_never_uses_is_replayed(optimizer):
    run = train_to_the_end(start(Idle(), optimizer, check_every=1))
    assert len(list(run.reverse())) == STEPS
    assert run.drift == 0.0


def test_a_closure_is_recorded_like_any_other_step():
    recorder = start(check_every=1)

    def closure():
        recorder.optimizer.zero_grad()
        loss = cross_entropy(recorder.model, ids, 0)
        loss.backward()
        return loss

    for ids in BATCHES[:4]:
        with recorder.step(ids):
            recorder.optimizer.step(closure)
    run = recorder.finish()
    assert run.drift == 0.0
    assert torch.equal(run.final_state.params["4.bias"], recorder.model[4].bias)


def test_submodule_in_evaluation_mode_stays_so_in_the_replay():
    model = network(batch_norm=True, dropout=0.5)
    model[1].eval()
    before = model[1].running_mean.clone()
    run = train_to_the_end(start(model, check_every=1, checkpoints=Treeverse(states=1)))
    assert len(list(run.reverse())) == STEPS
    assert run.drift == 0.0
    assert torch.equal(model[1].running_mean, before)


# ---------------------------------------------------------------------------------------------------------------------
# A loop that does something else is found


def clipping(model):
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)


def noise(model):
    for leaf in model.parameters():
        leaf.grad += 0.1 * torch.randn_like(leaf)


def clamping(model):
    with torch.no_grad():
        model[-1].bias.clamp_(-0.01, 0.01)


def extra_term(model):
    model[-1].weight.grad += 0.05 * model[-1].weight.detach()


def weighted(model, ids, step):
    return (torch.linspace(0, 2, len(ids)) * F.cross_entropy(model(INPUTS[ids]), LABELS[ids], reduction="none")).mean()


def summed(model, ids, step):
    return F.cross_entropy(model(INPUTS[ids]), LABELS[ids], reduction="sum")


def penalised(model, ids, step):
    return cross_entropy(model, ids, step) + 0.1 * sum(leaf.square().sum() for leaf in model.parameters())


def smoothed(model, ids, step):
    return F.cross_entropy(model(INPUTS[ids]), LABELS[ids], label_smoothing=0.1)


@kinds_of_optimizer
@pytest.mark.parametrize("loss", [weighted, summed, penalised, smoothed])
def test_another_loss_is_found_at_once(optimizer, loss):
    # Parameters of Adam's first step see the sign of the gradient only; its moments are compared, too.
    with pytest.raises(ReplayMismatch, match=r"^step 0 does not replay.*differ by"):
        train(start(optimizer=optimizer), loss=loss)


@pytest.mark.parametrize("deviation", [clipping, noise, clamping, extra_term])
@pytest.mark.parametrize("begin", [0, 1, 4])
def test_another_step_is_found_where_it_begins(deviation, begin):
    with pytest.raises(ReplayMismatch, match=rf"^step {begin} does not replay"):
        train(start(), inside=lambda model, step: step >= begin and deviation(model))


@pytest.mark.parametrize("deviation", [clipping, noise, extra_term])
@pytest.mark.parametrize("begin", [5, 9])
@pytest.mark.parametrize("task", [Regression(), Classification()], ids=["regression", "classification"])
@pytest.mark.parametrize("checkpoints", [Treeverse(states=4), Every(8), All()], ids=["treeverse", "every", "all"])
def test_deviation_after_the_checked_steps_is_found_by_replay(deviation, begin, task, checkpoints):
    """Cross-entropy is the hard case: the gradients of the last bias add up to zero, whatever their scale."""
    recorder = start(optimizer="nesterov", task=task, checkpoints=checkpoints)
    loss = squared_error if isinstance(task, Regression) else cross_entropy
    with pytest.raises(ReplayMismatch, match=r"step \d+ ") as caught:
        train_and_attribute(recorder, loss=loss, inside=lambda model, step: step >= begin and deviation(model))
    named = int(re.search(r"step (\d+) ", str(caught.value))[1])
    # Walking back from the end meets the last stretch between two stored states first; with one stretch it is exact, and
    # what happens to one parameter may show in the others one step later.
    assert begin <= named < STEPS
    assert named <= begin + 1 or not isinstance(checkpoints, Treeverse)


def multiply(model):
    with torch.no_grad():
        model[0].weight.mul_(0.9)


def multiply_data(model):
    model[0].weight.data.mul_(0.9)


def assign_data(model):
    model[0].weight.data = model[0].weight.data * 0.9


@pytest.mark.parametrize("change", [multiply, multiply_data, assign_data])
def test_parameters_changed_between_steps_are_found(change):
    recorder = start(task=Regression(), checkpoints=Treeverse(states=4))
    with pytest.raises((UnsupportedTraining, ReplayMismatch), match=r"step [56] "):
        train_and_attribute(recorder, loss=squared_error, between=lambda model, step: step == 5 and change(model))


def test_evaluating_in_training_mode_is_found():
    recorder = start(network(batch_norm=True))
    with pytest.raises(UnsupportedTraining, match=r"between step 2 and step 3.*eval\(\)"):
        train(recorder, between=lambda model, step: model(INPUTS) if step == 2 else None)


def test_evaluating_in_evaluation_mode_is_no_deviation():
    def evaluate(model, step):
        model.eval()
        with torch.no_grad():
            model(INPUTS)
        model.train()

    run = train_to_the_end(start(network(batch_norm=True, dropout=0.5), check_every=1), between=evaluate)
    assert run.drift == 0.0
