"""A study in a folder: killed and resumed, shared by processes, sent to executors; always the same table."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from retrograd import Classification, Study, Trajectory, random_subsets, record, retrain
from retrograd.errors import CorruptRecord, IncompleteRecord, InputError, NotRecorded, RecordExists
from tests.cases import CASES, RULES

QUERIES = CASES["plain"].queries


def small_run(seed: int = 3) -> Trajectory:
    case, rule = CASES["plain"], RULES["momentum"]
    return record(
        case.model(),
        case.examples,
        Classification(),
        optimizer=lambda p: rule.optimizer(p, **rule.options),
        epochs=2,
        batch_size=4,
        seed=seed,
    )


def initialise(seed: int) -> nn.Module:
    return CASES["plain"].build().double()


def table(folder: Path) -> dict[str, list]:
    """All rows of a study as anyone would read them."""
    return {file.name: pq.ParquetFile(file).read().to_pylist() for file in sorted(folder.glob("part-*.parquet"))}


def test_a_folder_gives_what_memory_gives(tmp_path):
    run, kept = small_run(), random_subsets(small_run(), 7, 0.5)
    memory = retrain(run, QUERIES, kept, together=3, seeds=[5, 6], initialise=initialise)
    disk = retrain(run, QUERIES, kept, together=3, seeds=[5, 6], initialise=initialise, folder=tmp_path)
    for found in (disk, Study(tmp_path).read()):
        assert torch.equal(found.values, memory.values)
        assert found.values.dtype == torch.float64
        assert torch.equal(found.factors, kept.double())
        assert (found.seeds, found.counterfactual) == (memory.seeds, memory.counterfactual)
        assert (found.trajectory_digest, found.query_ids.tolist()) == (run.digest, [0, 1, 2, 3])
    rows = table(tmp_path)
    assert [len(part) for part in rows.values()] == [3, 3, 1, 3, 3, 1]
    row = rows["part-000004.parquet"][2]  # what is in a row says by itself what was trained
    assert (row["subset"], row["seed"], row["factors"]) == (5, 6, kept[5].double().tolist())
    assert row["query_2"] == memory.values[5, 1, 2]
    assert row["run"] == run.digest
    assert not list(tmp_path.glob("**/*.tmp"))


def test_only_missing_parts_are_made_again(tmp_path):
    run, kept = small_run(), random_subsets(small_run(), 6, 0.5)
    retrain(run, QUERIES, kept, together=2, folder=tmp_path)
    before = table(tmp_path)
    old = {file: file.stat().st_mtime_ns for file in tmp_path.glob("part-*")}
    (tmp_path / "part-000001.parquet").unlink()
    with pytest.raises(IncompleteRecord, match="1 of 3 parts are missing"):
        Study(tmp_path).read()
    retrain(run, QUERIES, kept, folder=tmp_path)  # together is the study's own
    assert table(tmp_path) == before
    assert {file.name for file in old if file.stat().st_mtime_ns != old[file]} == {"part-000001.parquet"}


def test_another_study_is_refused(tmp_path):
    run, kept = small_run(), random_subsets(small_run(), 4, 0.5)
    retrain(run, QUERIES, kept, folder=tmp_path)
    before = table(tmp_path)
    other = CASES["plain"].data(4, 999)
    for wanted, given, options in (
        ("subsets", (run, QUERIES, ~kept), {}),
        ("queries", (run, other, kept), {}),
        ("removal", (run, QUERIES, kept), {"removal": "deletion"}),
        ("run", (small_run(4), QUERIES, kept), {}),
        ("seeds", (run, QUERIES, kept), {"seeds": [1], "initialise": initialise}),
    ):
        with pytest.raises(RecordExists, match=wanted):
            retrain(*given, folder=tmp_path, **options)
    assert table(tmp_path) == before
    with pytest.raises(NotRecorded, match="holds no study"):
        Study(tmp_path / "elsewhere").read()


def test_torn_and_exchanged_parts_are_found(tmp_path):
    run, kept = small_run(), random_subsets(small_run(), 4, 0.5)
    retrain(run, QUERIES, kept, together=2, folder=tmp_path)
    first, second = tmp_path / "part-000000.parquet", tmp_path / "part-000001.parquet"
    whole = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(CorruptRecord, match="another part"):
        Study(tmp_path).read()
    for position in range(4, len(whole), 37):
        second.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            assert torch.equal(Study(tmp_path).read().factors, kept.double())
        except CorruptRecord as error:
            assert "part-000001" in str(error)  # noqa: PT017
    second.write_bytes(whole[:-5])
    with pytest.raises(CorruptRecord, match="torn"):
        Study(tmp_path).read()
    second.write_bytes(whole)
    manifest = tmp_path / "study.json"
    manifest.write_text(manifest.read_text().replace('"together": 2', '"together": 4'))
    with pytest.raises(CorruptRecord, match="altered"):
        Study(tmp_path).read()


def test_a_part_of_another_study_is_found(tmp_path):
    run, kept = small_run(), random_subsets(small_run(), 4, 0.5)
    for name, subsets in (("mine", kept), ("other", ~kept)):
        retrain(run, QUERIES, subsets, together=2, folder=tmp_path / name)
    part = tmp_path / "mine" / "part-000001.parquet"
    part.write_bytes((tmp_path / "other" / part.name).read_bytes())
    with pytest.raises(CorruptRecord, match="belongs to another study"):
        Study(tmp_path / "mine").read()
    part.unlink()
    assert torch.equal(retrain(run, QUERIES, kept, folder=tmp_path / "mine").factors, kept.double())


def test_spawned_processes_and_any_executor_give_the_same(tmp_path):
    run, kept = small_run(), random_subsets(small_run(), 6, 0.5)
    expected = retrain(run, QUERIES, kept, together=2)
    spawned = retrain(run, QUERIES, kept, together=2, workers=2, folder=tmp_path / "spawned")
    assert torch.equal(spawned.values, expected.values)
    with ThreadPoolExecutor(1) as executor:
        for folder in (None, tmp_path / "thread"):
            found = retrain(run, QUERIES, kept, together=2, executor=executor, folder=folder)
            assert torch.equal(found.values, expected.values)


def test_an_error_elsewhere_comes_back_and_frees_the_parts(tmp_path):
    run, kept = small_run(), random_subsets(small_run(), 6, 0.5)
    with FailingExecutor(1) as executor, pytest.raises(InputError, match="no such luck"):
        retrain(run, QUERIES, kept, together=2, executor=executor, folder=tmp_path)
    assert table(tmp_path) == {}
    retrain(run, QUERIES, kept, folder=tmp_path)
    assert len(table(tmp_path)) == 3


class FailingExecutor(ThreadPoolExecutor):
    """Whose work always fails."""

    def submit(self, function, /, *args, **kwargs):
        def fail():
            raise InputError("no such luck")

        return super().submit(fail)


def test_what_cannot_travel_is_refused():
    class Local(nn.Linear):
        pass

    run = record(
        Local(3, 3).double(),
        CASES["plain"].examples,
        Classification(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        epochs=1,
        batch_size=7,
    )
    with ThreadPoolExecutor(1) as executor, pytest.raises(InputError, match="top of a module"):
        retrain(run, QUERIES, torch.ones(2, 14, dtype=torch.bool), executor=executor)


# ---------------------------------------------------------------------- processes

SWEEP = """
import sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from retrograd import random_subsets, retrain
from retrograd.evaluation import study
from tests.test_study import QUERIES, small_run

written = study.Study.write
def slowly(self, part, *rest):
    time.sleep(float(sys.argv[2]))
    written(self, part, *rest)
    with open(Path(sys.argv[1]).with_suffix(".log"), "a") as log:
        log.write(f"{part}\\n")
study.Study.write = slowly
run = small_run()
retrain(run, QUERIES, random_subsets(run, 24, 0.5), together=2, folder=sys.argv[1])
"""


def sweep(folder: Path, pause: float) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SWEEP, str(folder), str(pause)], cwd=Path(__file__).parents[1], start_new_session=True
    )


def wait_for_parts(folder: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while len(list(folder.glob("part-*.parquet"))) < count:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)


def test_two_processes_share_a_folder_and_a_killed_one_loses_nothing(tmp_path):
    run = small_run()
    expected = retrain(run, QUERIES, random_subsets(run, 24, 0.5), together=2)
    folder = tmp_path / "shared"
    victim = sweep(folder, 0.05)
    wait_for_parts(folder, 2, victim)
    others = [sweep(folder, 0.05) for _ in range(2)]
    time.sleep(0.3)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert [other.wait(timeout=120) for other in others] == [0, 0]
    assert torch.equal(Study(folder).read().values, expected.values)
    made = folder.with_suffix(".log").read_text().split()
    assert len(made) == len(set(made))  # none was written twice
    assert len(made) in (11, 12)  # the victim may have been killed between writing a part and noting it


@pytest.mark.slow
@pytest.mark.parametrize("parts", [0, 1, 3, 5, 8, 11])
def test_kill_and_resume(tmp_path, parts):
    run = small_run()
    expected = retrain(run, QUERIES, random_subsets(run, 24, 0.5), together=2)
    folder = tmp_path / "study"
    victim = sweep(folder, 0.02)
    wait_for_parts(folder, parts, victim)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    found = retrain(run, QUERIES, random_subsets(run, 24, 0.5), together=2, folder=folder)
    assert torch.equal(found.values, expected.values)


def test_spawned_processes_that_die_are_told(tmp_path):
    run, kept = small_run(), random_subsets(small_run(), 4, 0.5)
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, context, os._exit, (1,)) as executor,
        pytest.raises(BrokenProcessPool),
    ):
        retrain(run, QUERIES, kept, together=2, executor=executor, folder=tmp_path)
    assert torch.equal(retrain(run, QUERIES, kept, folder=tmp_path).values, retrain(run, QUERIES, kept, together=2).values)
