"""A recording that is interrupted anywhere goes on where it was and ends with the bits of one that never was.

Three ways to interrupt it. The fast ones are exact: an exception at a given step, and a death at a given operation on the
file system (every rename and every deletion that a recording makes, in turn). The slow one is real: SIGKILL at random moments.
After each of them this holds:

* the folder is not yet a run, or an unfinished one that says so (`IncompleteRecord`), or finished; it is never corrupt;
* what is lost is at most what came after the last two states that the schedule keeps: one state may wait for the disk;
* the resumed recording gives the same parameters bit for bit, and the same folder: every file has the same bytes.
"""

import contextlib
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from retrograd import All, Classification, Every, Recorder, Sqrt, Treeverse, open_run, record, reporting
from retrograd.errors import IncompleteRecord, NotRecorded
from retrograd.trajectory.store import RunFolder

STEPS = 14
POOLS: list[ThreadPoolExecutor] = []
DRAW = torch.Generator().manual_seed(0)
INPUTS, LABELS = torch.randn(24, 4, generator=DRAW), torch.randint(0, 3, (24,), generator=DRAW)
SCHEDULES = {"all": All(), "every": Every(4), "sqrt": Sqrt(), "treeverse": Treeverse(states=3)}


def two_groups(params):
    """Only the first group has a velocity."""
    first, *others = params
    groups = [{"params": [first]}, {"params": others, "momentum": 0.0}]
    return torch.optim.SGD(groups, 0.1, momentum=0.9, dampening=0.2)


OPTIMIZERS = {
    "groups": two_groups,
    "momentum": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9, dampening=0.2, weight_decay=0.01),
    "adam": lambda params: torch.optim.Adam(params, 0.02),
    "adamw": lambda params: torch.optim.AdamW(params, 0.02),
    "rmsprop": lambda params: torch.optim.RMSprop(params, 0.01, momentum=0.5, centered=True),
}


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))


def train(folder, optimizer="adam", schedule="sqrt", steps=STEPS, resume=False):
    """Record with everything on that a resumed run has to get right; returns the run and the final state of the model."""
    model = network()
    order = torch.randint(0, 24, (steps, 6), generator=torch.Generator().manual_seed(2))
    run = record(
        model,
        (INPUTS, LABELS),
        Classification(),
        optimizer=OPTIMIZERS[optimizer],
        order=order,
        learning_rates=torch.linspace(0.05, 0.01, steps),
        clip_norm=0.5,
        weights=torch.linspace(0.5, 1.5, 24),
        checkpoints=SCHEDULES[schedule],
        folder=folder,
        resume=resume,
    )
    return run, model.state_dict()


def files_of(folder):
    return {file.relative_to(folder).as_posix(): content(file) for file in Path(folder).rglob("*") if file.is_file()}


def content(file):
    """All bytes of a file, of a safetensors file with its header parsed: its writer shuffles the metadata."""
    whole = file.read_bytes()
    if file.suffix != ".safetensors":
        return whole
    begin = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:begin]), whole[begin:]


def assert_same_folder(folder, expected):
    found = files_of(folder)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def status(folder):
    """Open the folder as a user would; anything but these three answers is an error."""
    try:
        run = open_run(folder, network(), (INPUTS, LABELS), Classification())
    except NotRecorded:
        return "none"
    except IncompleteRecord:
        return "incomplete"
    assert run.final_state.step == len(run)
    return "complete"


@pytest.fixture(autouse=True)
def pools(monkeypatch):
    """The thread pools of all recorders, also of those that were abandoned."""
    submit = ThreadPoolExecutor.submit

    def noted(pool, *given, **options):
        POOLS.append(pool)
        return submit(pool, *given, **options)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", noted)
    yield
    writers_finish()


def writers_finish():
    """Wait until the writers of abandoned recorders have written what was handed to them."""
    while POOLS:
        POOLS.pop().shutdown(wait=True)


class Interrupt(KeyboardInterrupt):
    """Our own interruption."""


@contextlib.contextmanager
def interrupted_after(step):
    def reporter(phase, done, total):
        if done == step:
            raise Interrupt

    with pytest.raises(Interrupt), reporting(reporter):
        yield
    writers_finish()


# ---------------------------------------------------------------------------------------------------------------------
# Fast: at every step, at every operation on files


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [("adam", "sqrt"), ("momentum", "every"), ("adamw", "all"), ("rmsprop", "treeverse"), ("groups", "every")],
)
def test_interrupted_at_any_step(tmp_path, optimizer, schedule):
    run, final = train(tmp_path / "whole", optimizer, schedule)
    whole = files_of(tmp_path / "whole")
    for step in (0, 1, 3, 4, 7, 9, 13, 14):
        folder = tmp_path / str(step)
        with interrupted_after(step):
            train(folder, optimizer, schedule)
        assert status(folder) == "incomplete"
        resumed, again = train(folder, optimizer, schedule, resume=True)
        assert_same_bits(again, final)
        assert_same_folder(folder, whole)
        assert resumed.digest == run.digest
        assert status(folder) == "complete"


def test_interrupted_again_and_again(tmp_path):
    _, final = train(tmp_path / "whole", "adam", "every")
    for step in (1, 2, 1, 3, 3, 2):  # counted from where it goes on
        with interrupted_after(step):
            train(tmp_path / "run", "adam", "every", resume=True)
    _, again = train(tmp_path / "run", "adam", "every", resume=True)
    assert_same_bits(again, final)
    assert_same_folder(tmp_path / "whole", files_of(tmp_path / "run"))


@pytest.mark.parametrize("name", ["run.json.tmp", "checkpoints/.tmpA1b2C3", "checkpoints/000000000004.safetensors.tmp"])
def test_temporary_files_of_a_killed_process_are_swept(tmp_path, name):
    """safetensors writes under a name of its own, .tmp and six letters, before it renames."""
    train(tmp_path / "whole", "adam", "every")
    with interrupted_after(5):
        train(tmp_path / "run", "adam", "every")
    (tmp_path / "run" / name).write_bytes(b"torn")
    train(tmp_path / "run", "adam", "every", resume=True)
    assert_same_folder(tmp_path / "run", files_of(tmp_path / "whole"))


def test_resume_without_a_run_begins_and_of_a_whole_run_changes_nothing(tmp_path):
    _, final = train(tmp_path / "run", resume=True)
    whole = files_of(tmp_path / "run")
    _, again = train(tmp_path / "run", resume=True)
    assert_same_bits(again, final)
    assert_same_folder(tmp_path / "run", whole)


@pytest.mark.parametrize("interruption", range(STEPS))
def test_recorder_around_a_loop_goes_on_inside_of_the_loop(tmp_path, interruption):
    """Interrupted between backward and update; the loop's own scheduler is stepped over what is done."""

    def loop(folder, fail=None):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        recorder = Recorder(model, (INPUTS, LABELS), Classification(), optimizer, folder=folder, resume=True, clip_norm=0.5)
        for step in range(STEPS):
            if step >= recorder.steps_done:
                with recorder.step(range(step, step + 6)) as handle:
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(model(INPUTS[step : step + 6]), LABELS[step : step + 6])
                    loss.backward()
                    handle.loss = loss.item()
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                    if step == fail:
                        raise Interrupt
                    optimizer.step()
            else:
                optimizer._opt_called = True  # or else the scheduler warns that it comes before the first update
            scheduler.step()
        recorder.finish()
        return model.state_dict()

    final = loop(tmp_path / "whole")
    with pytest.raises(Interrupt):
        loop(tmp_path / "run", interruption)
    writers_finish()
    assert_same_bits(loop(tmp_path / "run"), final)
    assert_same_folder(tmp_path / "run", files_of(tmp_path / "whole"))


class Death:
    """Lets the first ``operations`` renames and deletions of the process happen and none after: all later ones fail."""

    def __init__(self, monkeypatch, operations):
        self.left = operations
        for owner, name in ((os, "replace"), (Path, "unlink")):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, operation):
        def counted(*given, **options):
            if self.left == 0:
                raise Interrupt
            self.left -= 1
            return operation(*given, **options)

        return counted


@pytest.mark.parametrize(("schedule", "steps"), [("all", 5), ("every", 9), ("sqrt", 14), ("sqrt", 16), ("treeverse", 5)])
def test_death_at_any_operation_on_files(tmp_path, schedule, steps):
    """Dead between two operations: temporary files stay behind, nothing is tidied up. 16 is a state that Sqrt keeps anyway."""
    _, final = train(tmp_path / "whole", "adam", schedule, steps)
    whole, seen = files_of(tmp_path / "whole"), set()
    for operations in range(1000):
        folder = tmp_path / str(operations)
        with pytest.MonkeyPatch.context() as patched:
            death = Death(patched, operations)
            try:
                train(folder, "adam", schedule, steps)
            except Interrupt:
                pass
            else:
                break
            finally:
                writers_finish()
            assert death.left == 0
        seen.add(status(folder))
        _, again = train(folder, "adam", schedule, steps, resume=True)
        assert_same_bits(again, final)
        assert_same_folder(folder, whole)
    assert operations > 4
    assert {"none", "incomplete"} <= seen <= {"none", "incomplete", "complete"}


def test_resume_waits_for_no_one_else_to_write(tmp_path, monkeypatch):
    """In a notebook the interrupted cell's writer may still be at work when the cell is run again."""
    _, final = train(tmp_path / "whole", "adam", "every")
    save = RunFolder.save
    with monkeypatch.context() as slow:
        slow.setattr(RunFolder, "save", lambda self, state: (time.sleep(0.3 if state.step else 0), save(self, state)))
        with pytest.raises(Interrupt), reporting(lambda phase, done, total: interrupt_if(done == 9)):
            train(tmp_path / "run", "adam", "every")
    _, again = train(tmp_path / "run", "adam", "every", resume=True)
    writers_finish()
    assert_same_bits(again, final)
    assert_same_folder(tmp_path / "run", files_of(tmp_path / "whole"))


def interrupt_if(now):
    if now:
        raise Interrupt


# ---------------------------------------------------------------------------------------------------------------------
# Slow: kill −9

MANY_STEPS, PAUSE = 48, 0.004


def serve():
    """Fork one recording for each line of standard input, and kill it if the line says when.

    torch is imported and warm before the first fork, so that a recording starts within milliseconds.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        for optimizer in OPTIMIZERS:
            train(Path(scratch) / optimizer, optimizer, steps=2)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        progress = mmap.mmap(-1, 8)  # shared with the child
        begin = time.monotonic()
        child = os.fork()
        if child == 0:
            record_slowly(progress, **job["recording"])
        if job["kill_after"] is not None:
            time.sleep(job["kill_after"])
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answer = {"code": code, "done": int.from_bytes(progress[:], "little"), "seconds": time.monotonic() - begin}
        print(json.dumps(answer), flush=True)


def record_slowly(progress, **recording):
    def reporter(phase, done, total):
        progress[:] = (MANY_STEPS - total + done).to_bytes(8, "little")
        time.sleep(PAUSE)

    code = 1
    try:
        with reporting(reporter):
            train(steps=MANY_STEPS, **recording)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@pytest.fixture(scope="module")
def recording_of():
    """Ask the forking server for a recording."""
    command = [sys.executable, "-c", "from tests.test_crash import serve; serve()"]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline() == "ready\n"

        def ask(kill_after=None, **recording):
            server.stdin.write(json.dumps({"recording": recording, "kill_after": kill_after}) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        yield ask
        server.stdin.close()
        server.wait(timeout=10)


def kept_steps(schedule, done):
    """The states that a recording of ``done`` steps stored or was storing."""
    kept = [0]
    for step in range(1, done + 1):
        interval = SCHEDULES[schedule].interval(step)
        if interval and step % interval == 0:
            kept.append(step)
    return kept


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [("adam", "sqrt"), ("momentum", "every"), ("adamw", "all"), ("rmsprop", "treeverse"), ("momentum", "sqrt")],
)
def test_killed_at_random_moments(tmp_path, recording_of, optimizer, schedule):
    """At least 15 kills for each configuration, 75 in all; a run is killed up to four times before it may end."""
    given = {"optimizer": optimizer, "schedule": schedule}
    reference = recording_of(folder=str(tmp_path / "whole"), **given)
    assert reference["code"] == 0
    whole, draw = files_of(tmp_path / "whole"), random.Random(f"{optimizer} {schedule}")
    kills, unfinished, statuses = 0, 0, set()
    for number in range(40):
        folder = tmp_path / str(number)
        for again in range(1 + number % 4):
            moment = draw.uniform(0, reference["seconds"])
            killed = recording_of(kill_after=moment, folder=str(folder), resume=again > 0 or number % 2 == 0, **given)
            assert killed["code"] in (0, -signal.SIGKILL)
            kills += killed["code"] != 0
            found = status(folder)
            statuses.add(found)
            assert found != "complete" or killed["done"] == MANY_STEPS
            if found == "complete":
                break
            if found == "incomplete":
                unfinished += 1
                stored, kept = RunFolder(folder).steps(), kept_steps(schedule, killed["done"])
                assert stored[-1] >= kept[-2 if len(kept) > 1 else -1]
                # A schedule forgets states only when a later one is on the disk.
                assert stored[0] == 0
            else:
                assert killed["done"] == 0
        assert recording_of(folder=str(folder), resume=True, **given)["code"] == 0
        assert_same_folder(folder, whole)
        if kills >= 15:
            break
    assert kills >= 15
    assert unfinished >= 10
    assert status(folder) == "complete"
