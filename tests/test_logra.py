"""LoGra against its formula with dense matrices, and its store of projected gradients."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from retrograd import CheckpointSeries, Classification, Examples, LoGra, Regression, TracIn, attribute, record
from retrograd.adjoint.gradient_store import GradientStore, read_tensors, write_tensors
from retrograd.errors import CorruptRecord, InputError, NonFinite, RecordExists
from retrograd.linalg import Projection
from retrograd.noise import Noise
from retrograd.trajectory import TrainingState
from retrograd.trajectory.update_map import UpdateMap
from tests.cases import CASES, RULES, images, normal, tabular
from tests.reference.dense_influence import query_gradients

CASE = CASES["plain"]
COUNT = 24


def recorded(ids: Tensor | None = None, seed: int = 0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3, bias=False)).double()
    ids = torch.arange(COUNT) if ids is None else ids
    examples = Examples(tuple(column[ids] for column in tabular(COUNT, 100)), ids)
    order = torch.arange(COUNT).repeat(4).view(-1, 6)
    return record(model, examples, Classification(), optimizer=lambda p: torch.optim.SGD(p, lr=0.2), order=order)


@pytest.fixture(scope="module")
def run():
    return recorded()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-8) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


def whole(size: int, dimension: int, seed: int) -> Tensor:
    projection = Projection(size, dimension, seed)
    return projection.up(torch.eye(projection.dimension, dtype=torch.float64))


def example_gradients(run) -> Tensor:
    """Per-example gradients with the run's buffers, one after the other."""
    rows = []
    for number in run.examples.ids:
        state = run.final_state
        params = {name: leaf.clone().requires_grad_() for name, leaf in state.params.items()}
        own = TrainingState(params, state.slots, state.buffers, state.step)
        loss = run.update_map.losses(own, run.examples.batch(number[None]))[0]
        rows.append(torch.cat([leaf.flatten() for leaf in torch.autograd.grad(loss, list(params.values()))]))
    return torch.stack(rows)


def dense(run, queries, blocks: list[Tensor], damping: float = 0.1) -> Tensor:
    """−g̃_qᵀ (F̃ + λ)⁻¹ g̃_i / N, summed over blocks, each a matrix [k, P] that projects whole gradients."""
    asked, trained = query_gradients(run, queries), example_gradients(run)
    total = torch.zeros(len(asked), len(trained), dtype=torch.float64)
    for block in blocks:
        left, right = asked @ block.T, trained @ block.T
        fisher = run.mean_weight * right.T @ right / len(right)
        shift = damping * fisher.trace() / len(fisher) * torch.eye(len(fisher), dtype=torch.float64)
        total -= left @ torch.linalg.inv(fisher + shift) @ right.T / len(right)
    return total


def layer(run, weight: str, bias: str | None, left: Tensor, right: Tensor) -> Tensor:
    """P_out ⊗ P_in of one layer on whole flat gradients: [k_out · k_in, P]."""
    params, places, start = run.final_state.params, {}, 0
    for name, leaf in params.items():
        places[name] = torch.arange(start, start + leaf.numel())
        start += leaf.numel()
    columns = places[weight].view(len(params[weight]), -1)
    if bias is not None:
        columns = torch.cat([columns, places[bias][:, None]], dim=1)
    block = torch.zeros(len(right) * len(left), start, dtype=torch.float64)
    block[:, columns.flatten()] = torch.kron(right, left)
    return block


def rest(run, names: list[str], dimension: int, seed: int = 0) -> Tensor:
    """The one random projection of everything outside layers."""
    params = run.final_state.params
    chosen = torch.cat([torch.full((leaf.numel(),), name in names) for name, leaf in params.items()])
    block = torch.zeros(min(dimension, int(chosen.sum())), len(chosen), dtype=torch.float64)
    block[:, chosen] = whole(int(chosen.sum()), dimension, seed)
    return block


def side(size: int, dimension: int, seed: int, number: int, out: bool) -> Tensor:
    """The random projection of one side of the layer of this number."""
    return Noise(torch.arange(dimension), seed, number, int(out)).normal(size) / dimension**0.5


def test_random_projections_equal_the_formula_with_dense_matrices(run):
    found = attribute(run, CASE.queries, method=LoGra((3, 2), "random", seed=5))
    blocks = [
        layer(run, "0.weight", "0.bias", side(4, 3, 5, 0, False), side(5, 2, 5, 0, True)),
        layer(run, "2.weight", None, side(5, 3, 5, 1, False), side(3, 2, 5, 1, True)),
    ]
    assert close(found.values, dense(run, CASE.queries, blocks))
    assert found.notes["projection"] == "2 layers on 12 numbers"
    assert found.notes["parameters_covered"] == 35


def activations(run) -> list[tuple[Tensor, Tensor]]:
    """ā and d of both layers, by autograd through the model written out."""
    inputs, labels = run.examples.batch(run.examples.ids)
    params = run.final_state.params
    first = (inputs @ params["0.weight"].T + params["0.bias"]).detach().requires_grad_()
    hidden = nn.functional.gelu(first)
    outputs = hidden @ params["2.weight"].T
    losses = nn.functional.cross_entropy(outputs, labels, reduction="sum")
    first_grad, last_grad = torch.autograd.grad(losses, [first, outputs])
    return [(torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1), first_grad), (hidden.detach(), last_grad)]


def test_principal_components_equal_the_formula_with_dense_matrices(run):
    found = attribute(run, CASE.queries, method=LoGra((3, 2), "pca", damping=0.3)).values
    leading = lambda rows, rank: torch.linalg.svd(rows)[2][:rank]  # noqa: E731
    blocks = [
        layer(run, name, bias, leading(inputs, 3), leading(grads, 2))
        for (name, bias), (inputs, grads) in zip([("0.weight", "0.bias"), ("2.weight", None)], activations(run), strict=True)
    ]
    assert close(found, dense(run, CASE.queries, blocks, 0.3))


@pytest.mark.parametrize("init", ["pca", "random"])
def test_wide_projections_lose_nothing(run, init):
    """From the layers' sizes on: the influence function of the empirical Fisher matrix, a block a layer."""
    found = attribute(run, CASE.queries, method=LoGra((50, 50), init)).values
    blocks = [
        layer(run, "0.weight", "0.bias", torch.eye(4).double(), torch.eye(5).double()),
        layer(run, "2.weight", None, torch.eye(5).double(), torch.eye(3).double()),
    ]
    assert close(found, dense(run, CASE.queries, blocks))


def test_everything_outside_layers_is_one_more_block():
    case = CASES["batchnorm"]
    run = case.record(RULES["sgd"])
    found = attribute(run, case.queries, method=LoGra((2, 2), "random", seed=1))
    blocks = [
        layer(run, "0.weight", None, side(3, 2, 1, 0, False), side(5, 2, 1, 0, True)),
        layer(run, "3.weight", "3.bias", side(6, 2, 1, 1, False), side(3, 2, 1, 1, True)),
        rest(run, ["1.weight", "1.bias"], 4, 1),
    ]
    assert close(found.values, dense(run, case.queries, blocks))
    assert found.notes["projection"] == "2 layers on 8 numbers, 10 other parameters on 4"


def test_convolutions_and_positions():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.GELU(), nn.Conv2d(2, 4, 2, groups=2), nn.Flatten())
        model = nn.Sequential(*model, nn.Linear(36, 2)).double()
    run = record(
        model,
        images(12, 100),
        Regression("prediction"),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        epochs=1,
        batch_size=6,
    )
    asked = images(4, 200)
    found = attribute(run, asked, method=LoGra((100, 100), "random"))
    blocks = [
        layer(run, "0.weight", "0.bias", torch.eye(10).double(), torch.eye(2).double()),
        layer(run, "4.weight", "4.bias", torch.eye(37).double(), torch.eye(2).double()),
        rest(run, ["2.weight", "2.bias"], 1000),
    ]
    assert close(found.values, dense(run, asked, blocks))
    few = attribute(run, asked, method=LoGra((3, 2)))
    assert few.values.isfinite().all()
    assert few.notes["projection"] == "2 layers on 12 numbers, 20 other parameters on 6"


@pytest.mark.parametrize("name", ["tied", "attention", "groups", "dropout"])
def test_every_trained_parameter_is_covered(name):
    case = CASES[name]
    run = case.record(RULES["momentum"])
    found = attribute(run, case.queries, method=LoGra((3, 3)))
    assert found.values.isfinite().all()
    assert (found.values.abs().sum(0) > 0).all()
    trained = sum(leaf.numel() for leaf in run.final_state.params.values())
    assert found.notes["parameters_covered"] == trained


def test_results_do_not_depend_on_memory_or_slices(run):
    for method in (LoGra((3, 2)), LoGra((3, 2), "random")):
        size = sum(leaf.numel() * leaf.element_size() for leaf in run.final_state.params.values())
        expected = attribute(run, CASE.queries, method=method).values
        for memory in (1, 30 * size, 100 * size):
            assert close(attribute(run, CASE.queries, method=method, query_batch=3, memory=memory).values, expected, 1e-10)


def test_results_do_not_depend_on_the_order_of_examples(run):
    shuffled = recorded(torch.randperm(COUNT, generator=torch.Generator().manual_seed(1)))
    for method in (LoGra((3, 2)), LoGra((3, 2), "random")):
        found = attribute(shuffled, CASE.queries, method=method).values[:, shuffled.examples.ids.argsort()]
        assert close(found, attribute(run, CASE.queries, method=method).values, 1e-10)


def test_checkpoints_from_elsewhere_are_enough(run):
    states = {16: run.final_state.params}
    series = CheckpointSeries(run.update_map.model, run.examples, Classification(), states, learning_rate=0.2)
    expected = attribute(run, CASE.queries, method=LoGra((3, 2))).values
    assert close(attribute(series, CASE.queries, method=LoGra((3, 2))).values, expected)


def test_examples_that_no_step_saw_have_no_score():
    order = torch.arange(12).repeat(4).view(-1, 6)
    model = nn.Linear(3, 3).double()
    run = record(model, tabular(COUNT, 100), Classification(), optimizer=lambda p: torch.optim.SGD(p, lr=0.2), order=order)
    found = attribute(run, CASE.queries, method=LoGra((3, 2))).values
    assert (found[:, :12] != 0).all()
    assert (found[:, 12:] == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# The store


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr("retrograd.adjoint.gradient_store._PART_EXAMPLES", 5)


def counted(run, monkeypatch) -> list[int]:
    """The number of rows of every batch that the model's losses are asked for."""
    seen, losses = [], UpdateMap.losses
    monkeypatch.setattr(
        UpdateMap, "losses", lambda self, state, batch: seen.append(len(batch[0])) or losses(self, state, batch)
    )
    return seen


@pytest.mark.parametrize("init", ["pca", "random"])
def test_a_second_call_does_not_look_at_the_training_data(init, small_parts, tmp_path, monkeypatch):
    case = CASES["batchnorm"]  # has parameters outside layers
    run = case.record(RULES["sgd"])
    calls: list[int] = []
    run.update_map.model.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = attribute(run, case.queries, method=LoGra((3, 2), init)).values
    method = LoGra((3, 2), init, folder=tmp_path)
    calls.clear()
    first = attribute(run, case.queries, method=method).values
    made, _ = len(calls), calls.clear()
    assert torch.equal(first, expected)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "fisher.safetensors",
        "gradients.json",
        *(f"part-{number:06d}.safetensors" for number in range(3)),
        "projections.safetensors",
    ]
    seen = counted(run, monkeypatch)
    second = attribute(run, case.queries, method=method, memory=100_000).values
    assert torch.equal(second, first)
    assert seen == []
    assert len(calls) == 1 < made  # the queries' own gradients, vectorised
    others = case.data(3, 300)
    found = attribute(run, others, method=LoGra((3, 2), init, 0.5, folder=str(tmp_path))).values
    assert seen == []
    monkeypatch.undo()
    assert close(found, attribute(run, others, method=LoGra((3, 2), init, 0.5)).values, 1e-12)


def test_a_killed_call_goes_on_at_the_next_part(run, small_parts, tmp_path, monkeypatch):
    method = LoGra((3, 2), folder=tmp_path)
    expected = attribute(run, CASE.queries, method=LoGra((3, 2))).values
    write, written = write_tensors, []

    def dying(file, tensors, about):
        if len(written) == 3:  # the projections and two parts
            raise KeyboardInterrupt
        written.append(file.name)
        write(file, tensors, about)

    monkeypatch.setattr("retrograd.adjoint.gradient_store.write_tensors", dying)
    monkeypatch.setattr("retrograd.adjoint.logra.write_tensors", dying)
    with pytest.raises(KeyboardInterrupt):
        attribute(run, CASE.queries, method=method)
    monkeypatch.undo()
    monkeypatch.setattr("retrograd.adjoint.gradient_store._PART_EXAMPLES", 5)
    assert written == ["projections.safetensors", "part-000000.safetensors", "part-000001.safetensors"]
    stamps = {name: (tmp_path / name).stat().st_mtime_ns for name in written}
    (tmp_path / "part-000002.safetensors.tmp").write_bytes(b"torn")  # what kill −9 leaves
    seen = counted(run, monkeypatch)
    assert torch.equal(attribute(run, CASE.queries, method=method).values, expected)
    assert seen == [5, 5, 4]
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in written} == stamps


@pytest.mark.parametrize("name", ["part-000001", "fisher", "projections"])
@pytest.mark.parametrize("kind", ["torn", "altered", "other"])
def test_a_broken_file_is_named_and_made_anew_when_taken_out(run, small_parts, tmp_path, name, kind):
    method = LoGra((3, 2), folder=tmp_path)
    expected = attribute(run, CASE.queries, method=method).values
    file = tmp_path / f"{name}.safetensors"
    content = bytearray(file.read_bytes())
    if kind == "torn":
        file.write_bytes(content[:-8])
    elif kind == "altered":
        content[-3] ^= 1
        file.write_bytes(content)
    else:
        tensors, _ = read_tensors(tmp_path / "part-000000.safetensors")
        from safetensors.torch import save_file

        save_file(tensors, file)
    with pytest.raises(CorruptRecord, match=f"{name}.safetensors is torn or altered.*Take it out"):
        attribute(run, CASE.queries, method=method)
    file.unlink()
    assert torch.equal(attribute(run, CASE.queries, method=method).values, expected)


def test_a_part_of_other_examples_is_found(run, small_parts, tmp_path):
    attribute(run, CASE.queries, method=LoGra((3, 2), folder=tmp_path))
    shutil.copy(tmp_path / "part-000000.safetensors", tmp_path / "part-000001.safetensors")
    with pytest.raises(CorruptRecord, match=r"part-000001.safetensors holds other examples"):
        attribute(run, CASE.queries, method=LoGra((3, 2), folder=tmp_path))


def test_a_store_of_another_run_or_projection_is_refused(run, tmp_path):
    attribute(run, CASE.queries, method=LoGra((3, 2), folder=tmp_path))
    for other in (LoGra((2, 2)), LoGra((3, 2), "random"), LoGra((3, 2), seed=1)):
        with pytest.raises(RecordExists, match=r"gradients of another run or projection: it differs in \w+=.* asked for "):
            attribute(run, CASE.queries, method=replace(other, folder=tmp_path))
    with pytest.raises(RecordExists, match="another run or projection: it differs in run="):
        attribute(recorded(seed=1), CASE.queries, method=LoGra((3, 2), folder=tmp_path))
    with pytest.raises(RecordExists, match="another run or projection: it differs in run="):
        attribute(run, CASE.queries, method=LoGra((3, 2), folder=tmp_path), keep=0.5, removal="zero_weight")
    (tmp_path / "gradients.json").write_text("{}")
    with pytest.raises(CorruptRecord, match=r"gradients\.json"):
        attribute(run, CASE.queries, method=LoGra((3, 2), folder=tmp_path))


def test_the_store_holds_no_more_than_its_room():
    made: list[int] = []

    def make(ids: Tensor) -> Tensor:
        made.append(len(ids))
        return normal(len(ids), 4, seed=int(ids[0]))

    ids = torch.arange(3000)
    store = GradientStore(ids, 4, torch.float64, make, at_once=600, room=2 * 1024 * 4 * 8)
    first = torch.cat([rows for _, rows in store])
    assert made == [600, 424, 600, 424, 600, 352]
    assert torch.equal(torch.cat([rows for _, rows in store]), first)
    assert made == [600, 424, 600, 424, 600, 352, 600, 352]  # the last part had no room


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_what_logra_refuses(run, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="leave out rank"):
        attribute(run, CASE.queries, method=LoGra(), rank=2)
    for wrong, message in (({"dimension": (0, 3)}, "at least 1"), ({"damping": 0.0}, "above 0")):
        with pytest.raises(InputError, match=message):
            LoGra(**wrong)
    assert repr(LoGra(folder=tmp_path)) == "LoGra(dimension=(16, 16), init='pca', damping=0.1, seed=0)"
    nothing = lambda size: (normal(size, 1, 4, seed=0), torch.full((size, 1, 5), torch.nan).double())  # noqa: E731
    monkeypatch.setattr(
        "retrograd.adjoint.logra.capture", lambda _, layers, state, batch, size: {layers[0].weight: nothing(size)}
    )
    with pytest.raises(NonFinite, match="gradient of example 0 is not finite"):
        attribute(run, CASE.queries, method=LoGra((3, 2), "random"))


class Shifted(nn.Module):
    """All outputs share a bias, of which a softmax takes no notice: its gradient is 0 but for rounding."""

    def __init__(self):
        super().__init__()
        self.layer, self.shift = nn.Linear(3, 3), nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) + self.shift


def test_a_block_that_is_only_rounding_has_no_scores():
    torch.manual_seed(0)
    model = Shifted().double()
    order = torch.arange(COUNT).view(-1, 6)
    run = record(model, tabular(COUNT, 100), Classification(), optimizer=lambda p: torch.optim.SGD(p, lr=0.2), order=order)
    found = attribute(run, CASE.queries, method=LoGra((10, 10))).values
    eye = torch.eye(4, dtype=torch.float64)
    assert close(found, dense(run, CASE.queries, [layer(run, "layer.weight", "layer.bias", eye, eye[:3, :3])]))


def test_it_ranks_like_gradients_when_damping_is_all(run):
    """With λ ≫ F̃ each layer's block is λ⁻¹: gradient products with a weight for each layer."""
    found = attribute(run, CASE.queries, method=LoGra((50, 50), damping=1e8)).values
    trained = example_gradients(run)
    weights = [1e8 * trained[:, part].square().mean(0).mean() for part in (slice(0, 20), slice(20, 35))]
    each = [attribute(run, CASE.queries, method=TracIn([16], layers=[name])).values for name in ("0", "2")]
    expected = sum(values / weight for values, weight in zip(each, weights, strict=True)) / COUNT
    assert close(found, expected / (4 * 0.2 / 6), 1e-6)
