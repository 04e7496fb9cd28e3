"""Runs that are trained with a meta-module: recording, the run folder, training again, and what can be asked of them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retrograd import (
    Examples,
    GaussNewton,
    Hessian,
    Implicit,
    Meta,
    Queries,
    Recorder,
    Source,
    TracIn,
    Trajectory,
    Unrolled,
    attribute,
    hypergradient,
    open_run,
    record,
    retrain,
)
from retrograd.errors import CorruptRecord, InputError, ModelChanged, NotRecorded, ReplayMismatch, RetrogradError
from tests.cases import RULES, normal
from tests.reference import hypergradient_autograd as reference
from tests.setups import SETUPS, Commentary, Commented
from tests.test_hypergradients import distance
from tests.tolerances import TOLERANCES

META, EVERYTHING, COUPLED = SETUPS["meta"], SETUPS["everything"], SETUPS["coupled"]
MOMENTUM = RULES["momentum"]


@pytest.fixture(scope="module")
def run() -> Trajectory:
    return META.record(MOMENTUM)


def other(module: nn.Module) -> nn.Module:
    """The same module with other meta-parameters."""
    with torch.no_grad():
        for leaf in module.parameters():
            if leaf.requires_grad:
                leaf.add_(0.1)
    return module


# ---------------------------------------------------------------------------------------------------------------------
# Recording


@pytest.mark.parametrize("name", ["meta", "everything", "coupled"])
def test_a_recorded_run_is_the_run_that_happened(name: str):
    """The same loop in plain torch."""
    setup = SETUPS[name]
    found = setup.record(MOMENTUM)
    assert setup.meta is not None
    model, module = setup.case.model(), setup.meta()
    groups = [
        {"params": [model.get_parameter(own) for own in names], **options} for names, options in setup.case.groups(MOMENTUM)
    ]
    optimizer, weights = torch.optim.SGD(groups), setup.case.all_weights
    model.train()
    for number, entry in enumerate(found.records):
        batch = tuple(column[entry.example_ids] for column in setup.examples)
        for group, hyper in zip(optimizer.param_groups, entry.hyper, strict=True):
            group["lr"] = hyper["learning_rate"]
        optimizer.zero_grad()
        torch.manual_seed(entry.seed)
        task, meta, own = setup.task, Meta(module, number), weights[entry.example_ids]
        loss = task.loss(model, batch, own, meta) if name == "coupled" else (own * task.losses(model, batch, meta)).mean()
        loss.backward()
        if setup.case.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), setup.case.clip_norm)
        optimizer.step()
    for own, leaf in model.named_parameters():
        assert torch.allclose(found.final_state.params[own], leaf, rtol=1e-12, atol=1e-14)


def test_the_steps_of_a_recorder_are_checked_with_the_meta_module():
    data = META.examples

    def recorded(step_seen: int, told: bool) -> Trajectory:
        model, module = META.case.model(), Commentary()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        recorder = Recorder(model, data, Commented(), optimizer, meta=module if told else None, check_every=1)
        try:
            for number, ids in enumerate(torch.arange(12).view(3, 4)):
                with recorder.step(ids):
                    optimizer.zero_grad()
                    batch = tuple(column[ids] for column in data)
                    Commented().losses(model, batch, Meta(module, number if step_seen else 0)).mean().backward()
                    optimizer.step()
            return recorder.finish()
        finally:
            recorder.close()

    run = recorded(1, told=True)
    assert run.state(3).equals(run.checkpoints.load(3))
    with pytest.raises(ReplayMismatch, match="step 1"):
        recorded(0, told=True)
    with pytest.raises((RetrogradError, TypeError)):
        recorded(1, told=False)


class _Counting(nn.Module):
    """Writes to its buffers whenever it is called."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, momentum=0.5, dtype=torch.float64)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, inputs: Tensor, step: int) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return self.norm(inputs), torch.ones(len(inputs), dtype=inputs.dtype)


def counting(**options: Any) -> tuple[Trajectory, _Counting]:
    model, module = META.case.model(), _Counting()
    run = record(model, META.examples, Commented(), optimizer=_sgd, epochs=1, batch_size=7, meta=module, **options)
    return run, module


def _sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.2, momentum=0.5)


def test_asking_leaves_the_meta_module_as_it_is(run: Trajectory):
    found, module = counting()
    before = {name: leaf.clone() for name, leaf in module.state_dict().items()}
    gradient = hypergradient(found, Queries(META.case.queries), ("meta", "example_weights"), method=Unrolled())
    assert gradient["meta"].keys() == {"norm.weight", "norm.bias"}
    found.rerun(meta={name: leaf + 0.1 for name, leaf in found.update_map.meta.items()})
    attribute(found, META.case.queries, check_roughness=False)
    assert all(torch.equal(leaf, before[name]) for name, leaf in module.state_dict().items())
    # And what becomes of the module afterwards does not change the run.
    answer = hypergradient(run, Queries(META.case.queries), "meta", method=Unrolled(route="batched"))
    own = META.record(MOMENTUM)
    assert own.update_map.meta_module is not None
    other(own.update_map.meta_module)
    again = hypergradient(own, Queries(META.case.queries), "meta", method=Unrolled(route="batched"))
    assert torch.equal(again.vector(), answer.vector())
    assert own.digest == run.digest


def test_recording_leaves_the_buffers_of_the_meta_module_as_they_are():
    found, module = counting()
    assert module.calls == 0
    assert found.genesis() == counting()[0].genesis()
    assert all(torch.equal(leaf, _Counting().state_dict()[name]) for name, leaf in module.state_dict().items())


def test_the_digest_is_that_of_the_meta_parameters(run: Trajectory):
    assert META.record(MOMENTUM).digest == run.digest
    changed = {name: leaf.clone() for name, leaf in run.update_map.meta.items()}
    changed["pace"] += 1e-9
    assert run.rerun(meta=changed).genesis() != run.genesis()
    assert run.rerun().genesis() == run.genesis()

    class Renamed(Commentary):
        pass

    model = META.case.model()
    plain = record(model, META.examples, Commented(), optimizer=_sgd, epochs=1, batch_size=7, meta=Commentary())
    named = record(META.case.model(), META.examples, Commented(), optimizer=_sgd, epochs=1, batch_size=7, meta=Renamed())
    assert plain.final_state.equals(named.final_state)
    assert plain.genesis() != named.genesis()


def test_trained_parameters_of_the_meta_module_stay_out_of_the_state(run: Trajectory):
    assert run.update_map.meta.keys() == {"shift", "pace", "gate.weight", "gate.bias"}  # what asks for gradients
    assert not run.final_state.params.keys() & run.update_map.meta.keys()


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "meta"
    META.record(MOMENTUM, folder=path)
    return path


def reopened(folder: Path, meta: nn.Module | None) -> Trajectory:
    return open_run(folder, META.case.model(), META.examples, Commented(), meta=meta)


def test_an_opened_run_has_the_recorded_meta_parameters(run: Trajectory, folder: Path):
    found = reopened(folder, other(Commentary()))
    assert all(torch.equal(leaf, run.update_map.meta[name]) for name, leaf in found.update_map.meta.items())
    assert found.digest == run.digest
    assert found.final_state.equals(run.final_state)
    method = Unrolled(route="batched")
    answers = [hypergradient(own, Queries(META.case.queries), ("meta", "labels"), method=method) for own in (found, run)]
    assert torch.equal(answers[0]["labels"], answers[1]["labels"])
    assert answers[0]["meta"].keys() == answers[1]["meta"].keys()
    assert all(torch.equal(leaf, answers[1]["meta"][name]) for name, leaf in answers[0]["meta"].items())


class _Deeper(Commentary):
    def __init__(self):
        super().__init__()
        self.more = nn.Parameter(torch.zeros(2, dtype=torch.float64))


def test_other_meta_modules_are_refused(folder: Path, tmp_path: Path):
    with pytest.raises(ModelChanged, match="meta-module, Commentary: give it as meta="):
        reopened(folder, None)
    with pytest.raises(RetrogradError, match="meta"):
        reopened(folder, _Deeper())
    with pytest.raises(RetrogradError, match="meta"):
        reopened(folder, nn.Linear(3, 1).double())
    scaled = Commentary()
    scaled.scale.data.fill_(2.0)  # not learned, but of the module
    with pytest.raises(ModelChanged, match="meta"):
        reopened(folder, scaled)
    moved = Commentary()
    moved.get_buffer("offset").fill_(0.2)
    with pytest.raises(ModelChanged, match="meta"):
        reopened(folder, moved)
    plain = tmp_path / "plain"
    SETUPS["plain"].record(MOMENTUM, folder=plain)
    setup = SETUPS["plain"]
    with pytest.raises(NotRecorded, match="without a meta-module: leave out meta="):
        open_run(plain, setup.case.model(), setup.examples, setup.case.task, meta=Commentary())


def test_altered_meta_parameters_are_found(folder: Path, tmp_path: Path):
    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    altered = copy("altered")
    tensors = load_file(altered / "meta.safetensors")
    tensors["pace"] += 1e-9
    save_file(tensors, altered / "meta.safetensors")
    with pytest.raises((ModelChanged, CorruptRecord), match="meta"):
        reopened(altered, Commentary())
    torn = copy("torn")
    content = (torn / "meta.safetensors").read_bytes()
    (torn / "meta.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptRecord, match=r"meta.safetensors is torn"):
        reopened(torn, Commentary())
    missing = copy("missing")
    (missing / "meta.safetensors").unlink()
    with pytest.raises(RetrogradError):
        reopened(missing, Commentary())


def test_a_killed_recording_goes_on_with_the_same_meta_parameters_only(run: Trajectory, tmp_path: Path):
    class Killed(Exception):
        pass

    class Failing(Commented):
        """Fails in the sixth step."""

        def losses(self, model: nn.Module, batch: Any, meta: Any) -> Tensor:
            if meta.step == 6:
                raise Killed
            return super().losses(model, batch, meta)

    Failing.__qualname__ = "Commented"
    failing = META.__class__(**{**META.__dict__, "task": Failing()})
    with pytest.raises(Killed):
        failing.record(MOMENTUM, folder=tmp_path / "run")
    with pytest.raises(ModelChanged, match="meta"):
        META.__class__(**{**META.__dict__, "meta": lambda: other(Commentary())}).record(
            MOMENTUM, folder=tmp_path / "run", resume=True
        )
    found = META.record(MOMENTUM, folder=tmp_path / "run", resume=True)
    assert found.final_state.equals(run.final_state)
    assert found.digest == run.digest


# ---------------------------------------------------------------------------------------------------------------------
# Training again


def test_training_again_equals_recording_with_the_other_inputs(run: Trajectory):
    module = other(Commentary())
    recorded = META.__class__(**{**META.__dict__, "meta": lambda: module}).record(MOMENTUM)
    changed = {name: leaf.detach() for name, leaf in module.named_parameters() if leaf.requires_grad}
    again = run.rerun(meta=changed)
    assert again.final_state.equals(recorded.final_state)
    assert again.state(3).equals(recorded.state(3))  # its own replays know the new ones, too
    assert not again.final_state.equals(run.final_state)
    assert run.rerun().final_state.equals(run.final_state)
    hyper = torch.tensor([[0.1]] * 4 + [[0.3]] * 4, dtype=torch.float64)
    one, other_ = run.rerun(hyper={"learning_rate": hyper}), run.rerun(learning_rate_scale=0.5)
    assert [record.hyper[0]["learning_rate"] for record in one.records] == [0.1] * 4 + [0.3] * 4
    assert not one.final_state.equals(other_.final_state)
    halved = run.rerun(
        hyper={"learning_rate": torch.tensor([[own.hyper[0]["learning_rate"] / 2] for own in run.records]).double()}
    )
    assert torch.allclose(halved.final_state.params["4.bias"], other_.final_state.params["4.bias"], rtol=1e-6)
    inputs, labels = META.examples
    moved = run.rerun(examples=Examples((inputs + 0.1, labels)))
    assert torch.equal(moved.inputs(0).batch[0], run.inputs(0).batch[0] + 0.1)
    clipped = EVERYTHING.record(MOMENTUM)
    assert clipped.rerun(clip_norm=0.8).final_state.equals(clipped.final_state)
    assert clipped.rerun(clip_norm=1e6).update_map.clip_norm == 1e6
    assert not clipped.rerun(clip_norm=1e6).final_state.equals(clipped.final_state)
    assert clipped.update_map.clip_norm == 0.8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta": {"shift": torch.zeros(3)}}, "meta-parameters of this run are"),
        ({"hyper": {"beta1": torch.tensor([0.5])}}, r"no hyperparameter 'beta1'. Allowed: \['dampening'"),
        ({"hyper": {"momentum": torch.tensor([0.5, 0.5])}}, r"shape \(1,\)"),
        ({"hyper": {"momentum": torch.full((7, 1), 0.5)}}, r"\(8, 1\)"),
        ({"examples": Examples(normal(14, 3, seed=1), ids=range(1, 15))}, "of the same examples"),
        ({"weights": torch.ones(13)}, r"shape \(14,\)"),
    ],
)
def test_changes_that_do_not_fit_are_refused(run: Trajectory, changes: dict, message: str):
    with pytest.raises(InputError, match=message):
        run.rerun(**changes)


def test_meta_parameters_of_another_shape_are_refused(run: Trajectory):
    wrong = {**run.update_map.meta, "shift": torch.zeros(4, dtype=torch.float64)}
    with pytest.raises(InputError, match="meta-parameters of this run are"):
        run.rerun(meta=wrong)
    with pytest.raises(InputError, match="meta-parameters of this run are"):
        SETUPS["plain"].record(MOMENTUM).rerun(meta=run.update_map.meta)


@pytest.mark.parametrize("together", [1, 3])
def test_retraining_equals_training_again(run: Trajectory, together: int):
    factors = torch.ones(3, 14, dtype=torch.float64)
    factors[1, 3], factors[2, ::2] = 0.0, 0.5
    found = retrain(run, META.case.queries, factors, together=together)
    for row, own in enumerate(factors):
        expected = run.rerun(weights=own).measurements(META.case.queries)
        assert distance(found.values[row, 0], expected) < 1e-9


# ---------------------------------------------------------------------------------------------------------------------
# Attribution


@pytest.mark.parametrize("name", ["meta", "everything", "coupled"])
def test_scores_of_a_meta_run_equal_autograd_through_it(name: str):
    setup = SETUPS[name]
    run = setup.record(MOMENTUM)
    expected, _ = reference.hypergradients(setup, MOMENTUM, run)
    found = attribute(run, setup.case.queries, method=Unrolled(route="batched"), check_roughness=False)
    assert distance(found.values, expected["example_weights"]) < TOLERANCES["exact_vs_autograd"]


def test_gauss_newton_of_a_meta_run_is_refused(run: Trajectory):
    with pytest.raises(InputError, match="knows no meta-modules"):
        attribute(run, META.case.queries, method=Unrolled(curvature="gauss_newton"), check_roughness=False)


def test_tracin_of_a_meta_run_is_its_formula(run: Trajectory):
    """−Σ over visits of η/B ⟨∇f, ∇ℓ_i⟩ at one checkpoint, the losses as they were commented there."""
    found = attribute(run, META.case.queries, method=TracIn(checkpoints=[4]), check_roughness=False).values
    state = {name: leaf.clone().requires_grad_() for name, leaf in run.state(4).params.items()}
    leaves = reference.leaves_of(META, run)
    inputs, labels, phi = leaves["inputs"].detach(), leaves["labels"].detach(), leaves["meta"]

    def row(value: Tensor) -> Tensor:
        return torch.cat([leaf.flatten() for leaf in torch.autograd.grad(value, list(state.values()), retain_graph=True)])

    asked = reference.ask(META, {f"params/{name}": leaf for name, leaf in state.items()}, *META.case.queries)
    per_example = []
    for example in range(14):
        rows = slice(example, example + 1)
        loss, _ = META.objective(
            lambda own: META.case.formula(state, {}, own, None), inputs[rows], labels[rows], torch.ones(1).double(), phi, 4
        )
        per_example.append(row(loss))
    rate = torch.zeros(14, dtype=torch.float64)
    for entry in run.records:
        rate[entry.example_ids] += entry.hyper[0]["learning_rate"] / (1 - 0.7) / len(entry.example_ids)
    expected = -torch.stack([row(value) for value in asked]) @ torch.stack(per_example).T * rate
    assert distance(found, expected) < TOLERANCES["approximate_vs_own_formula"]


def test_influence_functions_of_a_meta_run_take_its_losses_or_name_what_the_task_lacks(run: Trajectory):
    """Curvatures that draw from the model or ask for its outputs need methods that this task does not have."""
    for method, lacks in (
        (Implicit(), "sampled"),
        (Source(segments=1), "sampled"),
        (Implicit(curvature=GaussNewton()), "losses_of"),
    ):
        with pytest.raises(InputError, match=rf"Commented .*{lacks}"):
            attribute(run, META.case.queries, method=method, check_roughness=False)
    damped = Implicit(curvature=Hessian(), damping=20.0)
    first = attribute(run, META.case.queries, method=damped, check_roughness=False).values
    module = Commentary()
    module.gate.weight.data.zero_()
    module.gate.bias.data.fill_(-40.0)  # no loss counts
    module.pace.data.zero_()
    silent = {name: leaf.detach() for name, leaf in module.named_parameters() if leaf.requires_grad}
    assert first.abs().max() > 1e-3
    with pytest.raises(RetrogradError):
        attribute(run.rerun(meta=silent), META.case.queries, method=damped, check_roughness=False)


def test_losses_of_a_meta_run_can_be_asked(run: Trajectory):
    inputs, labels = META.examples
    asked = Queries((inputs[:3], labels[:3]), of="losses")
    found = hypergradient(run, asked, ("meta", "example_weights"))
    leaves = reference.leaves_of(META, run)
    state, _ = reference.train(META, MOMENTUM, run, leaves)
    params = reference.part(state, "params/")
    values = []
    for row in range(3):
        own, phi = slice(row, row + 1), {name: leaf.detach() for name, leaf in leaves["meta"].items()}
        predict = lambda moved: META.case.formula(params, {}, moved, None)  # noqa: E731
        values.append(META.objective(predict, inputs[own], labels[own], torch.ones(1).double(), phi, 8)[0])
    expected = reference.gradients(torch.stack(values), leaves)
    torch.testing.assert_close(found.outcome, torch.stack(values).detach(), rtol=1e-10, atol=1e-12)
    assert distance(found["example_weights"], expected["example_weights"]) < TOLERANCES["exact_vs_autograd"]
    # What training was commented with, not what it is asked about with: the direct term is not a derivative of training.
    assert distance(found["meta"], expected["meta"]) < TOLERANCES["exact_vs_autograd"]
    coupled = COUPLED.record(MOMENTUM)
    with pytest.raises(InputError, match="couples the examples"):
        hypergradient(coupled, Queries(COUPLED.examples, of="losses"), "meta")


def test_a_rerun_says_from_which_step_the_meta_module_counts():
    class Counted:
        def losses(self, model: Any, batch: Any, meta: Any) -> Tensor:
            seen.append(meta.step)
            return model(batch)[:, 0].square() * meta(batch)[:, 0].square()

        def measurements(self, model: Any, batch: Any) -> Tensor:
            return model(batch)[:, 0]

    seen: list[int] = []
    data = torch.randn(4, 2, dtype=torch.float64)
    linear = nn.Linear(2, 1).double()
    run = record(
        nn.Linear(2, 1).double(),
        data,
        Counted(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.01),
        epochs=2,
        batch_size=4,
        meta=linear,
    )
    seen.clear()
    again = run.rerun(begins_at=10)
    assert seen == [10, 11]
    assert [again.inputs(step).step for step in range(2)] == [10, 11]
