"""The run folder: what is written is read again, and no torn, altered, missing or foreign file passes for the real one."""

import json
import pickle
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from retrograd import Classification, Every, Treeverse, Unrolled, attribute, open_run, record
from retrograd.errors import (
    CorruptRecord,
    DataChanged,
    IncompleteRecord,
    InputError,
    ModelChanged,
    NotRecorded,
    RecordError,
    RecordExists,
    RetrogradError,
)
from retrograd.update_rules import SGD, Adam

DRAW = torch.Generator().manual_seed(0)
INPUTS, LABELS = torch.randn(16, 3, generator=DRAW), torch.randint(0, 3, (16,), generator=DRAW)
QUERIES = INPUTS[:3] + 0.5, LABELS[:3]
STEPS = 16


class Network(nn.Sequential):
    """A frozen layer, batch norm, dropout; one name with a slash and one with a space in it."""

    def __init__(self, width=4, seed=0):
        torch.manual_seed(seed)
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        torch.nn.init.eye_(self.frozen.weight)
        torch.nn.init.zeros_(self.frozen.bias)
        self.add_module("a/b c", nn.Linear(3, width))
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(width, 3)


def train(folder, *, checkpoints=None, **options):
    model = Network()
    given = {
        "optimizer": torch.optim.Adam([leaf for leaf in model.parameters() if leaf.requires_grad], 0.02),
        "epochs": 4,
        "batch_size": 4,
        "checkpoints": checkpoints or Every(8),
        "clip_norm": 0.5,
        "weights": torch.linspace(0.5, 1.0, 16),
        "folder": folder,
        **options,
    }
    return record(model, (INPUTS, LABELS), Classification(), **given)


def reopen(folder, **options):
    given = {"model": Network(), "dataset": (INPUTS, LABELS), "task": Classification(), **options}
    return open_run(folder, **given)


def contents(run):
    """All that a run is, with some of its states bit for bit (but for the sign of zeros, see `SGD`)."""
    records = [
        (
            step.example_ids.tolist(),
            step.weights.tolist(),
            [dict(own) for own in step.hyper],
            step.seed,
            step.loss,
            step.witness,
        )
        for step in run.records
    ]
    states = {
        step: {name: (leaf.dtype, leaf.shape, leaf.tolist()) for name, leaf in run.state(step).tensors().items()}
        for step in {*range(0, len(run), 8), len(run)}
    }
    around = run.update_map
    options = (run.tolerance, run.counterfactual, around.groups, around.clip_norm, around.rule, around.evaluation_modules)
    return records, states, options


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A recorded run and what it is."""
    folder = tmp_path_factory.mktemp("original") / "run"
    train(folder)
    return folder, contents(reopen(folder))


@pytest.fixture
def folder(original, tmp_path):
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(original[0], tmp_path / "run"))


def files_of(folder):
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


FILES = [
    *(f"checkpoints/{step:012d}.safetensors" for step in (0, 8, 16)),
    "data.parquet",
    "run.json",
    *(f"steps.parquet/part-{step:012d}.parquet" for step in (0, 8)),
]
every_file = pytest.mark.parametrize("name", FILES)


# ---------------------------------------------------------------------------------------------------------------------
# Round trip


@pytest.mark.parametrize("checkpoints", [Every(8), Every(5), Treeverse(states=3)], ids=str)
def test_an_opened_run_is_the_run_that_was_recorded(tmp_path, checkpoints):
    live = train(tmp_path / "run", checkpoints=checkpoints)
    memory = train(None, checkpoints=checkpoints)
    # Trained parameters of the model that is given may have any values.
    opened = reopen(tmp_path / "run", model=Network(seed=5))
    assert contents(opened) == contents(live)
    assert [contents(opened)[0], contents(opened)[2]] == [contents(memory)[0], contents(memory)[2]]
    assert opened.digest == live.digest == memory.digest
    for step in range(STEPS + 1):
        assert opened.state(step).equals(memory.state(step))
    scores = [attribute(run, QUERIES, method=Unrolled(route="loop"), check_roughness=False) for run in (live, memory, opened)]
    for other in scores[1:]:
        assert torch.equal(other.values, scores[0].values)
        assert other.trajectory_digest == scores[0].trajectory_digest
    assert scores[0].values.abs().max() > 0


def test_layout_and_tables(original):
    folder, (records, _, _) = original
    assert files_of(folder) == FILES
    table = pq.read_table(folder / "steps.parquet")
    assert table.column_names == [
        "step",
        "example_ids",
        "weights",
        "hyper",
        "seed",
        "loss",
        "witness",
        "digest",
        "state_digest",
    ]
    rows = table.to_pylist()
    assert [row["step"] for row in rows] == list(range(STEPS))
    columns = "example_ids", "weights", "hyper", "seed", "loss", "witness"
    assert [tuple(row[name] for name in columns) for row in rows] == records
    assert [row["step"] + 1 for row in rows if row["state_digest"]] == [8, 16]
    data = pq.read_table(folder / "data.parquet").to_pylist()
    assert [row["id"] for row in data] == list(range(16))
    assert all(len(row["digest"]) == 32 for row in data)
    manifest = json.loads((folder / "run.json").read_text())
    assert (manifest["status"], manifest["steps"], manifest["head"]) == ("complete", STEPS, rows[-1]["digest"])


def test_nothing_is_pickled(original, monkeypatch):
    def forbidden(*given, **options):
        raise AssertionError("a pickle was read")

    folder, known = original
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    assert contents(reopen(folder)) == known
    assert {file.suffix for file in folder.rglob("*") if file.is_file()} == {".json", ".parquet", ".safetensors"}
    for file in folder.rglob("*"):
        assert file.is_dir() or not file.read_bytes().startswith((b"\x80", b"PK"))


def test_nothing_is_written_outside_of_the_folder(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    train(tmp_path / "deep" / "down" / "run")
    contents(reopen(tmp_path / "deep" / "down" / "run"))
    assert files_of(tmp_path) == [f"deep/down/run/{name}" for name in FILES]


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def verdict(folder, known):
    """Open the run and load all its states: the error of our tree, or None if everything is as it was."""
    try:
        found = contents(reopen(folder))
    except RetrogradError as error:
        return error
    assert found == known, "the damage went unnoticed, and the run has other contents"
    return None


def judge(folder, known, name, what):
    """Describe what is wrong with the answer to a damage, if anything is."""
    try:
        error = verdict(folder, known)
    except Exception as other:  # an error from outside of our tree, or other contents
        return f"{what}: {type(other).__name__}: {str(other)[:80]}"
    truthful = (CorruptRecord, ModelChanged, DataChanged, IncompleteRecord) if name == "run.json" else CorruptRecord
    if error is not None and not isinstance(error, truthful):
        return f"{what}: {type(error).__name__}: {str(error)[:80]}"
    if isinstance(error, CorruptRecord) and Path(name).name not in str(error):
        return f"{what}: does not name {name}: {str(error)[:80]}"
    return None


@every_file
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_truncated_file_is_named(original, folder, name, share):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(share * (len(whole) - 1))])
    error = verdict(folder, original[1])
    assert isinstance(error, CorruptRecord), error
    assert Path(name).name in str(error)


def flipped(original, folder, name, places):
    whole = (folder / name).read_bytes()
    answers = []
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 7
        (folder / name).write_bytes(damaged)
        near = whole[max(0, place - 12) : place + 12]
        answers.append(judge(folder, original[1], name, f"bit {place % 7} of byte {place} in {near!r}"))
    return [answer for answer in answers if answer]


@every_file
def test_flipped_bits_are_found_or_change_nothing(original, folder, name):
    size = (folder / name).stat().st_size
    assert flipped(original, folder, name, range(0, size, size // 110)) == []


@pytest.mark.slow
@every_file
def test_more_flipped_bits_are_found_or_change_nothing(original, folder, name):
    assert flipped(original, folder, name, range(0, (folder / name).stat().st_size, 3)) == []


def test_altered_table_of_examples_is_found(original, folder):
    """Opening may leave the table unread only if nothing in it is ever used; the promise is that it is read."""
    table = pq.read_table(folder / "data.parquet")
    pq.write_table(table.take(list(range(15, -1, -1))), folder / "data.parquet")
    assert isinstance(verdict(folder, original[1]), RecordError)


@every_file
def test_deleted_file(original, folder, name):
    (folder / name).unlink()
    error = verdict(folder, original[1])
    if name.startswith("checkpoints") and not name.endswith(f"{0:012d}.safetensors"):
        assert error is None or isinstance(error, CorruptRecord | NotRecorded)  # it can be replayed from an earlier one
    else:
        assert isinstance(error, NotRecorded if name == "run.json" else CorruptRecord | NotRecorded), error
    assert error is None or name.split("/")[0] in str(error)


def test_lost_end_of_a_run_is_found(original, folder):
    (folder / FILES[2]).unlink()
    (folder / FILES[-1]).unlink()
    assert isinstance(verdict(folder, original[1]), CorruptRecord)


def test_exchanged_states_are_found(original, folder):
    one, other = folder / FILES[1], folder / FILES[2]
    swapped = one.read_bytes(), other.read_bytes()
    one.write_bytes(swapped[1])
    other.write_bytes(swapped[0])
    error = verdict(folder, original[1])
    assert isinstance(error, CorruptRecord)
    assert one.name in str(error)


def test_planted_state_is_not_used(original, folder):
    shutil.copy(folder / FILES[2], folder / "checkpoints" / f"{4:012d}.safetensors")
    run = train(None)
    try:
        state = reopen(folder).state(4)
    except CorruptRecord:
        return
    assert state.equals(run.state(4))


def test_steps_of_another_run_are_found(original, folder, tmp_path):
    train(tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other" / FILES[-1], folder / FILES[-1])
    error = verdict(folder, original[1])
    assert isinstance(error, CorruptRecord)
    assert Path(FILES[-1]).name in str(error)


# ---------------------------------------------------------------------------------------------------------------------
# The manifest


def keys_of(value, path=()):
    for key, inner in value.items() if isinstance(value, dict) else ():
        if path != ("model", "parameters") and path != ("model", "buffers"):
            yield (*path, key)
            yield from keys_of(inner, (*path, key))


def damaged_manifests(folder, change):
    whole = (folder / "run.json").read_text()
    for path in keys_of(json.loads(whole)):
        manifest = json.loads(whole)
        place = manifest
        for key in path[:-1]:
            place = place[key]
        yield from change(folder / "run.json", manifest, place, path)


def test_every_key_of_the_manifest_is_needed(original, folder):
    def without(file, manifest, place, path):
        del place[path[-1]]
        file.write_text(json.dumps(manifest))
        yield judge(folder, original[1], "run.json", "without " + "/".join(path))

    assert [answer for answer in damaged_manifests(folder, without) if answer] == []


def test_values_of_other_types_in_the_manifest_are_found(original, folder):
    def exchanged(file, manifest, place, path):
        for value in (None, -7, "x", [], [[1]], {}, {"x": 1}, float("nan")):
            if value != place[path[-1]]:
                file.write_text(
                    json.dumps(manifest | {path[0]: value}) if len(path) == 1 else replaced(manifest, place, path, value)
                )
                yield judge(folder, original[1], "run.json", f"{'/'.join(path)} = {value!r}")

    def replaced(manifest, place, path, value):
        before, place[path[-1]] = place[path[-1]], value
        text = json.dumps(manifest)
        place[path[-1]] = before
        return text

    assert [answer for answer in damaged_manifests(folder, exchanged) if answer] == []


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "17", '{"format": 1}', "[" * 100_000, b"\xff\xfe\x00", b"\x00" * 100],
    ids=["empty", "torn", "list", "null", "number", "bare", "deep", "not UTF-8", "zeros"],
)
def test_manifest_that_is_none(folder, text):
    (folder / "run.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CorruptRecord, match=r"run\.json"):
        reopen(folder)


@pytest.mark.parametrize("number", [0, 2, "1", None])
def test_manifest_of_another_format(folder, number):
    manifest = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(manifest | {"format": number}))
    with pytest.raises(CorruptRecord, match=rf"run\.json has format {number!r}.*reads format 1"):
        reopen(folder)


def test_oversized_manifest_is_not_read(folder, monkeypatch):
    with (folder / "run.json").open("r+b") as file:
        file.truncate((1 << 26) + 1)  # sparse: no bytes are written
    monkeypatch.setattr(json, "loads", lambda text: pytest.fail("it was read"))
    with pytest.raises(CorruptRecord, match=r"run\.json has 67108865 bytes"):
        reopen(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Not a run, not this run


def test_no_run_in_the_folder(tmp_path):
    with pytest.raises(NotRecorded, match="holds no run"):
        reopen(tmp_path / "nowhere")
    with pytest.raises(NotRecorded, match="holds no run"):
        reopen(tmp_path)


def test_a_run_is_not_overwritten(original, folder):
    with pytest.raises(RecordExists, match="resume=True"):
        train(folder)
    assert verdict(folder, original[1]) is None


def test_a_refused_continuation_leaves_a_complete_run_complete(original, folder):
    with pytest.raises(InputError, match="another batch"):
        train(folder, resume=True, batch_size=2)
    assert verdict(folder, original[1]) is None
    train(folder, resume=True)
    assert verdict(folder, original[1]) is None


def test_remains_without_a_manifest_do_not_mix_with_a_new_run(folder):
    (folder / "run.json").unlink()
    run = train(folder, epochs=1, checkpoints=Every(2))
    assert contents(reopen(folder)) == contents(run)
    assert len(reopen(folder)) == 4


class Failing(Classification):
    """Fails at its tenth call."""

    def losses(self, model, batch):
        Failing.calls += 1
        if Failing.calls == 10:
            raise KeyboardInterrupt
        return super().losses(model, batch)


def test_interrupted_recording_cannot_be_opened(tmp_path):
    Failing.calls, model = 0, Network()
    optimizer = torch.optim.SGD([leaf for leaf in model.parameters() if leaf.requires_grad], 0.1)
    given = {"optimizer": optimizer, "epochs": 4, "batch_size": 4, "checkpoints": Every(2), "folder": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        record(model, (INPUTS, LABELS), Failing(), **given)
    with pytest.raises(IncompleteRecord, match="resume=True"):
        reopen(tmp_path / "run", task=Failing())


def changed(column, row=3):
    column = column.clone()
    column[row] = column[row] + 1e-3 if column.is_floating_point() else (column[row] + 1) % 3
    return column


DATA = {
    "value": (changed(INPUTS), LABELS),
    "label": (INPUTS, changed(LABELS)),
    "order": (INPUTS.flip(0), LABELS.flip(0)),
    "fewer": (INPUTS[:15], LABELS[:15]),
    "more": (torch.cat([INPUTS, INPUTS[:1]]), torch.cat([LABELS, LABELS[:1]])),
    "type": (INPUTS.double(), LABELS),
    "shape": (INPUTS[:, None], LABELS),
}


@pytest.mark.parametrize("name", DATA)
def test_changed_data(original, name):
    with pytest.raises(DataChanged, match=r"examples|contents or ids"):
        reopen(original[0], dataset=DATA[name])


def frozen_moved():
    model = Network()
    model.frozen.bias.data[0] = 1e-6
    return model


def renamed():
    model = Network()
    model.tail = model.last
    del model.last
    return model


class Other(Network):
    """Another class of the same structure."""


CHANGES = {
    "layer size": ({"model": Network(width=5)}, r"model .*\[4.*given \[\[5"),
    "frozen": ({"model": frozen_moved()}, "model .*frozen"),
    "name": ({"model": renamed()}, r"no parameters named \['last.bias', 'last.weight'\]"),
    "class": ({"model": Other()}, "model: class: recorded 'Network', given 'Other'|class.*Network.*Other"),
    "type": ({"model": Network().double()}, "float32.*float64"),
    "task": ({"task": Classification(label_smoothing=0.1)}, r"task.*label_smoothing: recorded 0\.0, given 0\.1"),
    "rule": ({"rule": SGD()}, "rule.*recorded 'Adam', given 'SGD'"),
    "option": ({"rule": Adam(maximize=True)}, "rule.*maximize: recorded False, given True"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_model_task_or_rule(original, name):
    options, message = CHANGES[name]
    with pytest.raises(ModelChanged, match=message):
        reopen(original[0], **options)
