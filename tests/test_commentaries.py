"""Commentaries: exact derivatives through training with each kind, partners that replay, and the file beside the data."""

import pytest
import torch
from torch import nn

from retrograd import Classification, FixedPoint, Queries, audit, hypergradient, meta_train, record, verify
from retrograd.errors import CorruptRecord, DataChanged, InputError, ModelChanged
from retrograd.hypergradients import (
    Blended,
    BlendingMatrix,
    Commentary,
    ExampleWeights,
    Masked,
    MaskedModel,
    MaskNetwork,
    Weighted,
    WeightNetwork,
)
from tests.tolerances import TOLERANCES

TASK = Classification("loss")
CLASSES, STEPS = 3, 6


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dataset(count=12, seed=0, rows=False):
    images = drawn(count, 3, 4, seed=seed)
    labels = torch.arange(count) % CLASSES
    return (images, labels, torch.arange(count)) if rows else (images, labels)


def student(width=5, seed=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.Tanh(), nn.Linear(width, CLASSES)).double()


def network(inside, outside):
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Sequential(nn.Flatten(), nn.Linear(inside, 4), nn.Tanh(), nn.Linear(4, outside)).double()


def moved(module):
    """Away from the symmetric starting point."""
    with torch.no_grad():
        for number, leaf in enumerate(module.parameters()):
            leaf += 0.3 * drawn(*leaf.shape, seed=number)
    return module


def trained(kind, optimizer=None, steps=STEPS):
    model, data = student(), dataset(rows=kind == "table")
    if kind == "table":
        task, meta = Weighted(TASK), moved(ExampleWeights(12).double())
    elif kind == "curriculum":
        task, meta = Weighted(TASK, steps=4), moved(WeightNetwork(network(12 + CLASSES + 1, 1), CLASSES))
    elif kind == "blending":
        task, meta = Blended(TASK), moved(BlendingMatrix(CLASSES).double())
    else:
        task, meta = Masked(TASK), MaskNetwork(network(12, 2), (3, 4), 1.0)
        model = MaskedModel(model, meta)
    order = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(step))[:8] for step in range(steps)])
    optimizer = optimizer or (lambda params: torch.optim.Adam(params, lr=0.05, eps=1e-4))
    return record(model, data, task, optimizer=optimizer, order=order, meta=meta, seed=5)


KINDS = ("table", "curriculum", "blending", "masks")
VALIDATION = Queries(dataset(6, seed=9), mean=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_derivative_is_that_of_retraining(kind):
    run = trained(kind)
    found = hypergradient(run, VALIDATION, "meta")
    verdict = verify(run, VALIDATION, found, sizes=(1e-3, 1e-4, 1e-5), seed=1)
    assert verdict.error < TOLERANCES["exact_vs_differences"], str(verdict)
    assert verdict.predicted.abs().min() > 1e-6


@pytest.mark.parametrize("name", ["network.1.weight", "network.3.bias"])
def test_a_mask_is_differentiated_through_training_and_through_the_model_that_carries_it(name):
    run = trained("masks")
    found = hypergradient(run, VALIDATION, "meta")["meta"][name][0]
    meta, place, size = run.update_map.meta, tuple([0] * found.dim()), 1e-5
    sides = []
    for sign in (1, -1):
        leaf = meta[name].clone()
        leaf[place] += sign * size
        other = run.rerun(meta={**meta, name: leaf})
        sides.append(VALIDATION.values(other.update_map, other.final_state).item())
        carried = other.final_state.buffers["mask_" + name.replace(".", "_")]
        assert torch.equal(carried, leaf)
    assert found[place].item() == pytest.approx((sides[0] - sides[1]) / (2 * size), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_live_training_and_its_replay_are_the_same_bit_for_bit(kind):
    run = trained(kind)
    again = run.rerun()
    assert again.final_state.equals(run.final_state)
    assert run.drift == 0.0
    live = run.update_map.model.state_dict()
    assert all(torch.equal(live[name], leaf) for name, leaf in run.final_state.tensors().items() if name in live)
    assert not any(leaf.requires_grad for leaf in live.values())


def test_partners_are_drawn_anew_in_each_step_and_again_with_another_seed():
    seen = []

    class Watching(BlendingMatrix):
        def forward(self, labels, partners):
            seen.append((labels.tolist(), partners.tolist()))
            return super().forward(labels, partners)

    data = dataset()
    order = torch.arange(12).expand(3, 12)
    optimizer = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    run = record(student(), data, Blended(TASK), optimizer=optimizer, order=order, meta=Watching(CLASSES).double(), seed=2)
    live = list(dict.fromkeys(map(str, seen)))  # a recording replays some steps at once, to compare
    assert len(live) == 3
    seen.clear()
    run.rerun()
    first = list(seen)
    assert list(map(str, first)) == live
    seen.clear()
    run.rerun(seed=3)
    assert [labels for labels, _ in seen] == [labels for labels, _ in first]
    assert [partners for _, partners in seen] != [partners for _, partners in first]


def test_a_blend_is_what_the_equation_says():
    run = trained("blending")
    inputs = run.inputs(0)
    images, labels = inputs.batch
    shares = 1 - torch.sigmoid(run.update_map.meta["matrix"]) / 2
    torch.manual_seed(inputs.seed)
    partners = torch.randperm(len(labels))
    share = torch.stack([shares[int(a), int(b)] for a, b in zip(labels, labels[partners], strict=True)])
    mixed = share[:, None, None] * images + (1 - share)[:, None, None] * images[partners]
    model = student()
    logs = model(mixed).log_softmax(1)
    every = torch.arange(len(labels))
    expected = -(share * logs[every, labels] + (1 - share) * logs[every, labels[partners]])
    assert torch.isclose(torch.tensor(run.records[0].loss, dtype=torch.float64), expected.mean())


def test_weights_follow_the_share_of_training_that_is_done():
    seen = []

    class Watching(nn.Module):
        def forward(self, batch, progress):
            seen.append(progress)
            return torch.ones(len(batch[0]), dtype=torch.float64)

    order = torch.arange(12).expand(4, 12)
    optimizer = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    record(student(), dataset(), Weighted(TASK, steps=2), optimizer=optimizer, order=order, meta=Watching())
    assert list(dict.fromkeys(seen)) == [0.0, 0.5, 1.0]


def test_the_centre_of_a_mask_stays_inside_the_image():
    masks = MaskNetwork(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (3, 4), 0.5)
    images = 1e3 * drawn(5, 2, 3, 4).float()[:, :1]
    centres = masks.centres(images)
    assert (centres >= 0).all()
    assert (centres <= torch.tensor([2.0, 3.0])).all()
    found = masks(images)
    assert found.shape == (5, 1, 3, 4)
    peaks = found.flatten(1).argmax(1)
    torch.testing.assert_close(torch.stack([peaks // 4, peaks % 4], 1).float(), centres, atol=0.51, rtol=0)


def learned(kind="table", **options):
    return meta_train(trained(kind), VALIDATION, "meta", optimizer=lambda z: torch.optim.Adam(z, lr=0.1), steps=2, **options)


def fresh(kind="table"):
    return ExampleWeights(12).double() if kind == "table" else BlendingMatrix(CLASSES).double()


def test_round_trip_and_reuse_on_another_model_in_one_line(tmp_path):
    found = learned(validation=Queries(dataset(6, seed=4), mean=True))
    held_out = Queries(dataset(6, seed=8), mean=True)
    file, data = tmp_path / "weights.safetensors", dataset(rows=True)
    commentary = Commentary.of(found, audit(found, held_out), algorithm=1)
    commentary.save(file)
    opened = Commentary.open(file, fresh(), data)
    assert torch.equal(opened.module.get_parameter("logits"), found.meta["logits"])
    assert opened.digest == commentary.digest
    assert opened.provenance == commentary.provenance
    assert opened.provenance["runs"] == [trained("table").digest]
    assert opened.provenance["algorithm"] == 1
    assert opened.verification is not None
    assert set(opened.verification["arms"]) == {"meta-trained", "retrained", "permuted", "unchanged"}
    assert "2 outer steps" in str(opened)
    assert "permuted" in str(opened)

    optimizer = lambda params: torch.optim.SGD(params, lr=0.2)  # noqa: E731
    model = student(width=9)
    run = record(model, data, opened.task(TASK), optimizer=optimizer, epochs=2, batch_size=4, meta=opened.module)
    assert torch.isfinite(run.measurements(dataset(6, seed=8))).all()
    # What it was trained with can be read off the run.
    from retrograd.trajectory.digests import description

    assert description(run.update_map)["meta"]["parameters"] == opened.digest


def test_options_are_kept_and_can_be_changed(tmp_path):
    file = tmp_path / "curriculum.safetensors"
    Commentary.of(learned("curriculum")).save(file)
    opened = Commentary.open(file, WeightNetwork(network(12 + CLASSES + 1, 1), CLASSES), dataset())
    assert opened.task(TASK) == Weighted(TASK, steps=4)
    assert opened.task(TASK, steps=9) == Weighted(TASK, steps=9)
    assert "not verified" in str(opened)


def test_another_module_is_refused(tmp_path):
    file = tmp_path / "weights.safetensors"
    Commentary.of(learned()).save(file)
    data = dataset(rows=True)
    with pytest.raises(ModelChanged, match="parameters"):
        Commentary.open(file, ExampleWeights(11).double(), data)
    with pytest.raises(ModelChanged, match="float32"):
        Commentary.open(file, ExampleWeights(12), data)
    with pytest.raises(ModelChanged, match="parts"):
        Commentary.open(file, fresh("blending"), data)


def test_what_is_not_learned_counts_as_part_of_the_module(tmp_path):
    file = tmp_path / "masks.safetensors"
    Commentary.of(learned("masks")).save(file)
    Commentary.open(file, MaskNetwork(network(12, 2), (3, 4), 1.0), dataset())
    with pytest.raises(ModelChanged, match="rest"):
        Commentary.open(file, MaskNetwork(network(12, 2), (3, 4), 2.0), dataset())


def test_other_data_are_refused(tmp_path):
    file = tmp_path / "weights.safetensors"
    Commentary.of(learned()).save(file)
    images, *rest = dataset(rows=True)
    with pytest.raises(DataChanged, match="same order"):
        Commentary.open(file, fresh(), (images.flip(0), *rest))
    with pytest.raises(DataChanged, match="column of rows"):
        Commentary.open(file, fresh(), (images, rest[0]))
    assert Commentary.open(file, fresh(), None).kind == "Weighted"


def test_an_altered_file_is_found(tmp_path):
    file, data = tmp_path / "weights.safetensors", dataset(rows=True)
    Commentary.of(learned()).save(file)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptRecord, match="altered"):
        Commentary.open(file, fresh(), data)
    file.write_bytes(content[:-8])
    with pytest.raises(CorruptRecord, match="cannot be read"):
        Commentary.open(file, fresh(), data)


def test_a_file_of_something_else_is_refused(tmp_path):
    learned(folder=tmp_path)
    with pytest.raises(CorruptRecord, match="no commentary"):
        Commentary.open(tmp_path / "meta-training.safetensors", fresh(), dataset(rows=True))


def test_what_is_no_commentary_is_refused():
    weights = meta_train(
        trained("table"), VALIDATION, "example_weights", optimizer=lambda z: torch.optim.SGD(z, lr=0.1), steps=1
    )
    with pytest.raises(InputError, match="example_weights"):
        Commentary.of(weights)


def test_wrong_use_is_explained():
    with pytest.raises(InputError, match=r"arange\(N\)"):
        ExampleWeights(3)((torch.zeros(3, 2), torch.arange(3)), 0.0)

    class Opaque:
        def losses(self, model, batch):
            return model(batch[0])[:, 0]

        measurements = losses

    with pytest.raises(InputError, match="SplitTask"):
        Blended(Opaque())
    order = torch.arange(12)[None]
    optimizer = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    masks = MaskNetwork(network(12, 2), (3, 4), 1.0)
    with pytest.raises(InputError, match="MaskedModel"):
        record(student(), dataset(), Masked(TASK), optimizer=optimizer, order=order, meta=masks)


@pytest.mark.filterwarnings("ignore::retrograd.errors.UntrustedGradient")
def test_the_second_algorithm_tells_wrong_labels_from_right_ones():
    images, truth, *_ = dataset(24)
    images = images + 3 * torch.eye(12, dtype=torch.float64)[truth].view(24, 3, 4)
    labels = torch.cat([(truth[:4] + 1) % CLASSES, truth[4:12]])
    data, order = (images[:12], labels, torch.arange(12)), torch.arange(12)[None]
    optimizer = lambda params: torch.optim.SGD(params, lr=0.3)  # noqa: E731
    run = record(student(), data, Weighted(TASK), optimizer=optimizer, order=order, meta=ExampleWeights(12).double())
    method = FixedPoint(solver="neumann", iterations=2)
    outer = lambda variables: torch.optim.Adam(variables, lr=0.1)  # noqa: E731
    validation = Queries((images[12:], truth[12:]), mean=True)
    found = meta_train(run, validation, "meta", optimizer=outer, steps=15, start="warm", method=method)
    weights = found.meta["logits"].sigmoid()
    assert weights[:4].mean() < 0.4 < 0.6 < weights[4:].mean()
