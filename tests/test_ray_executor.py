"""Work on a Ray cluster of two nodes, both on this machine, looks like work on any other executor."""

import concurrent.futures
import os
import signal
import sys
import tempfile
import threading
import time

import pytest
import torch

from retrograd import random_subsets, retrain
from retrograd.distributed import RayExecutor
from retrograd.errors import InputError
from tests.test_study import QUERIES, initialise, small_run

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'retrograd[ray]'")


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with one processor each. The driver is not connected."""
    from ray.cluster_utils import Cluster

    tests = sys.modules[__name__]
    handler = signal.getsignal(signal.SIGTERM)  # Ray sets its own
    node = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
    # A folder of its own, so that no other Ray is found or finds this one. Its path is short: those of sockets have to be.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_AUTH_MODE", "disabled")  # otherwise Ray may write a token to the home folder
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster = Cluster()
        try:
            cluster.add_node(**node)
            cluster.add_node(**node)
            ray.cloudpickle.register_pickle_by_value(tests)  # the workers cannot import it
            yield cluster
            ray.cloudpickle.unregister_pickle_by_value(tests)
        finally:
            ray.shutdown()
            cluster.shutdown()
            signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def connected(cluster):
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")


@pytest.fixture
def executor(connected):
    with RayExecutor() as executor:
        yield executor


def square(number):
    return number * number


def rest(seconds):
    time.sleep(seconds)
    return ray.get_runtime_context().get_node_id(), os.getpid()


def refuse(name):
    raise InputError(f"no {name}")


def length(data, *others, **named):
    return len(data), others, named


def leave_a_mark(path, seconds):
    path.touch()
    for _ in range(100):  # Ray interrupts between Python's instructions, not within one
        time.sleep(seconds / 100)
    path.with_name(path.name + ".end").touch()


def double(tensor):
    return tensor * 2


def test_equals_a_local_map(executor):
    assert list(executor.map(square, range(20))) == [square(number) for number in range(20)]


def test_all_nodes_work(executor):
    places = [future.result() for future in [executor.submit(rest, 0.2) for _ in range(8)]]
    nodes, processes = map(set, zip(*places, strict=True))
    assert len(nodes) == 2
    assert os.getpid() not in processes


def test_an_error_is_the_original_one(executor):
    future = executor.submit(refuse, "such thing")
    with pytest.raises(InputError, match=r"^no such thing$") as caught:
        future.result()
    assert type(caught.value) is InputError
    assert type(future.exception()) is InputError
    assert "in refuse" in str(caught.value.__cause__)  # the traceback of the worker


def test_a_large_argument_is_stored_once(executor, monkeypatch):
    stored, put = [], ray.put
    monkeypatch.setattr(ray, "put", lambda value: stored.append(value) or put(value))
    job, other = bytes(2_000_000), torch.zeros(100_000)
    futures = [executor.submit(length, job, number, function=other) for number in range(5)]
    assert [future.result()[:2] for future in futures] == [(2_000_000, (number,)) for number in range(5)]
    assert sorted(map(id, stored)) == sorted([id(job), id(other)])
    assert executor.submit(length, bytes(10)).result() == (10, (), {})
    assert len(stored) == 2


def test_a_tensor_comes_back_and_its_changes_are_seen(executor):
    tensor = torch.randn(50_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        result = executor.submit(double, tensor).result()
        assert torch.equal(result, tensor * 2)
        tensor.add_(1)
    result.add_(1)  # it is ours, not the object store's


def test_the_store_is_not_filled(executor):
    for number in range(15):  # 150 MB through a store of 80 MB
        assert executor.submit(length, bytes([number]) * 10_000_000).result()[0] == 10_000_000
    assert len(executor._shared) == 8


def test_as_completed_and_wait(executor):
    futures = {executor.submit(square, number): number for number in range(6)}
    assert all(isinstance(future, concurrent.futures.Future) for future in futures)
    assert all(future.result() == futures[future] ** 2 for future in concurrent.futures.as_completed(futures, timeout=20))
    assert concurrent.futures.wait(futures, timeout=20).not_done == set()


def test_cancelled_work_is_not_begun(executor, tmp_path):
    running = [executor.submit(rest, 1) for _ in range(2)]
    queued = executor.submit(leave_a_mark, tmp_path / "mark", 0)
    assert queued.cancel()
    assert queued.cancelled()
    assert not concurrent.futures.wait([queued], timeout=20).not_done
    assert all(future.result() for future in running)
    assert executor.submit(square, 3).result() == 9  # whatever was queued had its turn
    assert not (tmp_path / "mark").exists()
    assert not running[0].cancel()


@pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) is not signal.default_int_handler,
    reason="interrupts are ignored, as in a shell's background jobs, and Ray's workers inherit that",
)
def test_work_that_has_begun_is_interrupted(executor, tmp_path):
    future = executor.submit(leave_a_mark, tmp_path / "mark", 60)
    while not (tmp_path / "mark").exists():
        time.sleep(0.01)
    assert future.cancel()
    concurrent.futures.wait([future])
    assert not (tmp_path / "mark.end").exists()


def test_shutdown_waits_and_then_refuses(connected):
    executor = RayExecutor()
    futures = [executor.submit(rest, 0.3) for _ in range(3)]
    executor.shutdown()
    assert all(future.done() for future in futures)
    with pytest.raises(RuntimeError, match="shut down"):
        executor.submit(square, 1)
    executor.shutdown()
    assert ray.is_initialized()  # it was not the executor's


def test_shutdown_can_cancel_and_need_not_wait(connected, tmp_path):
    executor = RayExecutor()
    marks = [tmp_path / str(number) for number in range(8)]
    futures = [executor.submit(leave_a_mark, mark, 3) for mark in marks]
    executor.shutdown(wait=False, cancel_futures=True)
    assert all(future.cancelled() for future in futures)
    executor.shutdown()
    assert sum(mark.exists() for mark in marks) <= 2  # two processors: no more than these two can have begun
    assert not executor._unfinished


def test_a_callback_may_submit(executor):
    later, begun = [], threading.Event()

    def submit(_):
        later.append(executor.submit(length, bytes(1_000_000)))
        begun.set()

    executor.submit(square, 1).add_done_callback(submit)
    assert begun.wait(20)
    assert later[0].result()[0] == 1_000_000


def test_it_lets_go_of_the_ray_that_it_initialised(cluster, monkeypatch):  # last: the connection of `connected` ends here
    ray.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    with RayExecutor() as executor:
        assert executor.submit(square, 2).result() == 4
        assert ray.is_initialized()
    assert not ray.is_initialized()


def test_a_study_on_the_cluster_equals_a_local_one(executor, tmp_path):
    run = small_run()
    kept = random_subsets(run, 8, 0.5)
    options = {"seeds": [5, 6], "initialise": initialise, "together": 2}
    expected = retrain(run, QUERIES, kept, **options)
    for folder in (None, tmp_path):
        found = retrain(run, QUERIES, kept, executor=executor, folder=folder, **options)
        assert torch.equal(found.values, expected.values)
