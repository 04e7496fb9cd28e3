"""Scores: their arithmetic, their file format, and averages of them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from retrograd import Counterfactual, Scores
from retrograd.errors import CorruptRecord, InputError, UnknownExample


def scores(**changes):
    draw = torch.Generator().manual_seed(0)
    given = {
        "values": torch.randn(2, 5, generator=draw),
        "example_ids": torch.tensor([10, 3, 12, -4, 2**40]),
        "query_ids": torch.tensor([7, 0]),
        "method": "Unrolled()",
        "unit": "nats per unit of example weight",
        "trajectory_digest": "ab12",
        "counterfactual": Counterfactual(0.5, "deletion", "fresh"),
        "notes": {"exact": True, "energy_lost": 0.25, "coverage": "100 % of «θ»"},
    }
    return Scores(**{**given, **changes})


def assert_same(left, right):
    for name in ("values", "example_ids", "query_ids"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
        assert getattr(left, name).dtype == getattr(right, name).dtype, name
    for name in ("method", "unit", "trajectory_digest", "counterfactual", "notes"):
        assert getattr(left, name) == getattr(right, name), name


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_round_trip(tmp_path, dtype):
    whole = scores(values=scores().values.to(dtype))
    whole.to_parquet(tmp_path / "scores.parquet")
    found = Scores.from_parquet(tmp_path / "scores.parquet")
    # Parquet has no bfloat16; float32 holds each of its values.
    assert_same(found, scores(values=whole.values.float()) if dtype == torch.bfloat16 else whole)
    assert [file.name for file in tmp_path.iterdir()] == ["scores.parquet"]


def test_the_table_is_one_row_an_example(tmp_path):
    scores().to_parquet(tmp_path / "scores.parquet")
    table = pq.read_table(tmp_path / "scores.parquet")
    assert table.column_names == ["example_id", "query_7", "query_0"]
    assert table.column("example_id").to_pylist() == scores().example_ids.tolist()
    assert table.column("query_0").to_pylist() == scores().of(0).tolist()


def test_writing_replaces_the_file_as_a_whole(tmp_path, monkeypatch):
    file = tmp_path / "scores.parquet"
    scores().to_parquet(file)

    def torn(table, target, **options):
        target.write_bytes(b"PAR1 and no more")
        raise OSError("the disk is full")

    monkeypatch.setattr(pq, "write_table", torn)
    with pytest.raises(OSError, match="disk is full"):
        scores(method="another").to_parquet(file)
    assert_same(Scores.from_parquet(file), scores())


def test_torn_or_altered_files_are_found(tmp_path):
    file = tmp_path / "scores.parquet"
    scores().to_parquet(file)
    whole = file.read_bytes()
    for length in (0, 4, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(CorruptRecord, match=r"scores\.parquet is not a whole table"):
            Scores.from_parquet(file)


def test_no_flipped_bit_changes_the_scores_unseen(tmp_path):
    file = tmp_path / "scores.parquet"
    scores().to_parquet(file)
    whole, wrong = file.read_bytes(), []
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        try:
            found = Scores.from_parquet(file)
            assert_same(found, scores())
        except CorruptRecord:
            continue
        except Exception as error:  # something else than our own error, or other contents
            wrong.append(f"byte {place} in {whole[max(0, place - 12) : place + 12]!r}: {type(error).__name__}: {error}"[:150])
    assert wrong == []


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        {"retrograd": "{"},
        {"retrograd": "[]"},
        {
            "retrograd": json.dumps(
                {"method": "x", "unit": "", "trajectory_digest": "", "counterfactual": [7, "", ""], "notes": {}}
            )
        },
    ],
    ids=["none", "empty", "torn", "list", "counterfactual"],
)
def test_other_tables_are_no_scores(tmp_path, metadata):
    table = pa.table({"example_id": [1, 2], "query_0": [0.5, 1.0]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "table.parquet")
    with pytest.raises(CorruptRecord, match=r"table\.parquet"):
        Scores.from_parquet(tmp_path / "table.parquet")


def test_columns_of_another_type_are_no_scores(tmp_path):
    scores().to_parquet(tmp_path / "scores.parquet")
    metadata = pq.read_schema(tmp_path / "scores.parquet").metadata
    table = pa.table({"example_id": [1, 2], "query_0": ["x", "y"]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "table.parquet")
    with pytest.raises(CorruptRecord, match=r"table\.parquet"):
        Scores.from_parquet(tmp_path / "table.parquet")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Scores.from_parquet(tmp_path / "nowhere.parquet")


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


def test_top_and_of():
    values = torch.tensor([[3.0, -1.0, 2.0, 5.0, -4.0], [0.0, 1.0, 2.0, 3.0, 4.0]])
    found = scores(values=values)
    assert [(one.example_id, one.score) for one in found.top(7, 2)] == [(-4, 5.0), (10, 3.0)]
    assert [(one.example_id, one.score) for one in found.top(7, 2, lowering=True)] == [(2**40, -4.0), (3, -1.0)]
    assert len(found.top(0, 100)) == 5
    assert torch.equal(found.of(0), values[1])
    with pytest.raises(UnknownExample, match=r"no query 1\. Query ids: \[7, 0\]"):
        found.top(1)


def test_predicted_change():
    values = torch.tensor([[3.0, -1.0, 2.0, 5.0, -4.0], [0.0, 1.0, 2.0, 3.0, 4.0]])
    found = scores(values=values, counterfactual=Counterfactual(0.5, "zero_weight"))
    assert found.predicted_change([10, 2**40]).tolist() == [1.0, -4.0]
    assert found.predicted_change(torch.tensor([2**40, 10])).tolist() == [1.0, -4.0]
    assert found.predicted_change([]).tolist() == [0.0, 0.0]
    kept = torch.tensor([[False, True, True, True, False], [True] * 5])
    assert found.predicted_subset(kept).tolist() == [[1.0, -4.0], [0.0, 0.0]]
    # Where a random half is deleted, what stays counts twice at the run of matched training time.
    deleted = scores(values=values, counterfactual=Counterfactual(0.5, "deletion"))
    assert deleted.predicted_change([10, 2**40]).tolist() == [2.0, -8.0]
    assert deleted.predicted_subset(kept).tolist() == [[2.0, -8.0], [0.0, 0.0]]
    with pytest.raises(InputError, match="only once"):
        found.predicted_change([10, 3, 10])
    with pytest.raises(UnknownExample, match=r"\[11\]"):
        found.predicted_change([10, 11])


def test_mean():
    parts = [scores(values=torch.full((2, 5), number), trajectory_digest=f"run {number:g}") for number in (1.0, 2.0, 6.0)]
    mean = Scores.mean(parts)
    assert mean.values.tolist() == [[3.0] * 5] * 2
    assert mean.trajectory_digest == "run 1,run 2,run 6"
    assert mean.notes["runs"] == 3
    assert mean.counterfactual == parts[0].counterfactual


@pytest.mark.parametrize(
    "changes",
    [
        {"example_ids": torch.tensor([3, 10, 12, -4, 2**40])},
        {"query_ids": torch.tensor([0, 7])},
        {"unit": "none"},
        {"counterfactual": Counterfactual(0.5, "deletion", "same")},
        {"values": torch.zeros(2, 4), "example_ids": torch.tensor([10, 3, 12, -4])},
    ],
    ids=["examples", "queries", "unit", "counterfactual", "count"],
)
def test_scores_that_mean_other_things_are_not_averaged(changes):
    with pytest.raises(InputError, match=r"ids must agree|unit and counterfactual must agree"):
        Scores.mean([scores(), scores(**changes)])


def test_there_must_be_something_to_average():
    with pytest.raises(InputError, match="nothing to average"):
        Scores.mean([])
