"""The contraction engine: memory, low-rank queries, tokens, part files and resumption never change a score."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retrograd import Blend, Classification, Implicit, Queries, Source, TracIn, Unrolled, attribute, record
from retrograd.adjoint import Engine
from retrograd.errors import CorruptRecord, InputError, RecordExists
from retrograd.trajectory import UpdateMap
from tests.cases import CASES, RULES

CASE = CASES["plain"]
METHODS = [TracIn(3), TracIn(2, cosine=True), Implicit(), Source(2, 2)]


@pytest.fixture(scope="module")
def run():
    return CASE.record(RULES["momentum"])


def size(run):
    return sum(leaf.numel() * leaf.element_size() for leaf in run.state(0).params.values())


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_memory_decides_batches_and_not_results(run, method, monkeypatch):
    wide = attribute(run, CASE.queries, method=method)
    tight = attribute(run, CASE.queries, method=method, memory=14 * size(run))
    assert torch.allclose(wide.values, tight.values, atol=1e-12)
    assert wide.notes["query_batch"] == 4
    assert tight.notes["query_batch"] == 1
    assert wide.notes["peak_memory"] > 0
    batches = []
    losses = UpdateMap.losses
    monkeypatch.setattr(
        UpdateMap, "losses", lambda self, state, batch: batches.append(len(batch[0])) or losses(self, state, batch)
    )
    attribute(run, CASE.queries, method=TracIn(1), memory=26 * size(run), query_batch=4)
    assert len(batches) == 3  # room for 26 vectors, 16 of them for the queries: five gradients and their copies


def test_too_little_memory_is_said(run):
    with pytest.raises(InputError, match="not even one example's gradient"):
        attribute(run, CASE.queries, method=TracIn(1), memory=5 * size(run), query_batch=4)
    with pytest.raises(InputError, match="number of bytes"):
        attribute(run, CASE.queries, method=TracIn(1), memory=0)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_low_rank_queries(run, method):
    whole = attribute(run, CASE.queries, method=method).values
    full = attribute(run, CASE.queries, method=method, rank=4)
    assert torch.allclose(full.values, whole, atol=1e-10)
    assert full.notes["energy_lost"] == pytest.approx(0, abs=1e-12)
    few = attribute(run, CASE.queries, method=method, rank=1)
    assert 0 < few.notes["energy_lost"] < 1
    assert torch.linalg.matrix_rank(few.values, rtol=1e-8) <= (3 if isinstance(method, TracIn) else 4)
    with pytest.raises(InputError, match="rank"):
        attribute(run, CASE.queries, method=method, rank=0)


def test_curvature_is_fitted_once_for_all_slices(run, monkeypatch):
    from retrograd.curvature import EKFAC

    fitted, fit = [], EKFAC.fit
    monkeypatch.setattr(EKFAC, "fit", lambda self, *args, **options: fitted.append(1) or fit(self, *args, **options))
    attribute(run, CASE.queries, method=Source(2, 2), query_batch=1)
    assert len(fitted) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(5, 4), nn.Linear(8, 4), nn.Linear(4, 5)

    def forward(self, tokens):
        x = self.embedding(tokens)
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        return self.head(torch.tanh(self.mix(torch.cat([x, before], dim=-1))))


class NextToken:
    def token_losses(self, model, batch):
        losses = F.cross_entropy(model(batch[0][:, :-1]).mT, batch[0][:, 1:], reduction="none")
        return losses / losses.shape[1]

    def losses(self, model, batch):
        return self.token_losses(model, batch).sum(1)

    measurements = losses


class Mistaken(NextToken):
    def losses(self, model, batch):
        return 2 * self.token_losses(model, batch).sum(1)


def language(task):
    torch.manual_seed(0)
    tokens = torch.randint(0, 5, (12, 7))
    return record(
        Language().double(), (tokens[:9],), task, optimizer=lambda p: torch.optim.SGD(p, lr=0.3), epochs=2, batch_size=3
    ), (tokens[9:],)


@pytest.mark.parametrize("rank", [None, 3])
def test_scores_by_token_add_up_and_are_derivatives(rank):
    run, queries = language(NextToken())
    method = TracIn(2)
    whole = attribute(run, queries, method=method)
    split = attribute(run, queries, method=method, tokens=True, memory=40 * size(run), rank=rank)
    assert split.tokens.shape == (3, 9, 6)
    assert torch.allclose(split.values, whole.values, atol=1e-12)
    assert torch.allclose(split.tokens.sum(2), whole.values, atol=1e-12)
    # By hand: ⟨η ∇f, ∇ of one token's loss⟩ at each checkpoint
    expected = torch.zeros(3, 9, 6, dtype=torch.float64)
    for step, exposure in zip(run.spread(2), run.exposure(run.spread(2)), strict=True):
        state = run.state(step)
        gradients = Queries(queries).gradients(run, state).params
        for example in range(9):
            params = {name: leaf.clone().requires_grad_() for name, leaf in state.params.items()}
            batch = run.examples.batch(torch.tensor([example]))
            losses = torch.func.functional_call(TokenLosses(run), params, (batch,))[0]
            for position in range(6):
                own = torch.autograd.grad(losses[position], list(params.values()), retain_graph=True)
                for grad, leaf in zip(own, gradients.values(), strict=True):
                    expected[:, example, position] -= exposure[example] * (leaf * grad).flatten(1).sum(1)
    assert torch.allclose(split.tokens, expected, atol=1e-12)


class TokenLosses(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.embedding, self.mix, self.head = run.update_map.model.children()

    def forward(self, batch):
        return NextToken().token_losses(lambda tokens: Language.forward(self, tokens), batch)


def test_tokens_that_cannot_be(run, tmp_path):
    with pytest.raises(InputError, match="no token_losses"):
        attribute(run, CASE.queries, method=TracIn(1), tokens=True)
    own, queries = language(NextToken())
    with pytest.raises(InputError, match="gives no scores by token"):
        attribute(own, queries, method=Unrolled(), tokens=True, check_roughness=False)
    with pytest.raises(InputError, match="a blend gives no scores by token"):
        attribute(own, queries, method=Blend(), tokens=True, check_roughness=False)
    with pytest.raises(InputError, match="not kept in part files"):
        attribute(own, queries, method=TracIn(1), tokens=True, folder=tmp_path)
    wrong, queries = language(Mistaken())
    with pytest.raises(InputError, match="sum over positions equal to losses"):
        attribute(wrong, queries, method=TracIn(1), tokens=True)


# ---------------------------------------------------------------------------------------------------------------------
# Part files


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, parts):
    """Let so many parts be written, then fail."""
    import retrograd.adjoint.contraction as contraction

    written, write = [], contraction.write_part

    def once_more(file, part):
        if len(written) == parts:
            raise Interrupted
        write(file, part)
        written.append(file)

    monkeypatch.setattr(contraction, "write_part", once_more)
    return written


@pytest.mark.parametrize("parts", [0, 1, 4])
def test_a_killed_call_goes_on(run, tmp_path, monkeypatch, parts):
    method, options = Source(2, 1), {"query_batch": 2, "memory": 16 * size(run)}
    whole = attribute(run, CASE.queries, method=method, **options).values
    with monkeypatch.context() as patch:
        interrupt_after(patch, parts)
        with pytest.raises(Interrupted):
            attribute(run, CASE.queries, method=method, folder=tmp_path, **options)
    assert not list(tmp_path.glob("*.tmp"))
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("part-*")}
    assert len(before) == parts
    found = attribute(run, CASE.queries, method=method, folder=tmp_path, **options).values
    assert torch.equal(found, whole)
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in before.items())
    monkeypatch.setattr(Source, "_probes", None)  # all is there: nothing is asked of the method
    assert torch.equal(attribute(run, CASE.queries, method=method, folder=tmp_path, **options).values, whole)


@pytest.mark.parametrize("method", [Unrolled(), TracIn(2)], ids=repr)
def test_finished_slices_of_every_method_are_kept(run, tmp_path, method):
    whole = attribute(run, CASE.queries, method=method, query_batch=3, check_roughness=False, folder=tmp_path)
    assert {"part-0000.parquet", "part-0001.parquet", "scores.json"} <= {file.name for file in tmp_path.iterdir()}
    (tmp_path / "part-0001.parquet").unlink()
    again = attribute(run, CASE.queries, method=method, query_batch=3, check_roughness=False, folder=tmp_path)
    assert torch.equal(again.values, whole.values)
    read = attribute(run, CASE.queries, method=method, query_batch=3, check_roughness=False, folder=tmp_path)
    of_this_call = {"seconds", "peak_memory", "replay_drift", "route"}
    assert read.notes.keys() == whole.notes.keys()
    assert all(read.notes[key] == whole.notes[key] for key in whole.notes.keys() - of_this_call)


def test_several_runs_have_a_folder_each(run, tmp_path):
    other = CASE.record(RULES["sgd"])
    found = attribute([run, other], CASE.queries, method=TracIn(1), folder=tmp_path)
    assert torch.equal(found.values, attribute([run, other], CASE.queries, method=TracIn(1)).values)
    assert (tmp_path / "run-1" / "scores.json").is_file()


def test_another_call_or_an_altered_part_is_refused(run, tmp_path):
    attribute(run, CASE.queries, method=TracIn(2), folder=tmp_path)
    for other in ({"method": TracIn(3)}, {"method": TracIn(2), "rank": 2}, {"method": TracIn(2), "keep": 0.5}):
        with pytest.raises(RecordExists, match="another attribution"):
            attribute(run, CASE.queries, folder=tmp_path, **other)
    with pytest.raises(RecordExists, match="queries"):
        attribute(run, tuple(column[:2] for column in CASE.queries), method=TracIn(2), folder=tmp_path)
    part = tmp_path / "part-0000.parquet"
    content = bytearray(part.read_bytes())
    content[len(content) // 3] ^= 1
    part.write_bytes(content)
    with pytest.raises(CorruptRecord, match=r"part-0000\.parquet"):
        attribute(run, CASE.queries, method=TracIn(2), folder=tmp_path)


PEAK = """
import torch, resource
from torch import nn
from retrograd import Blend, Classification, TracIn, attribute, record
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(500, 500), nn.ReLU(), nn.Linear(500, 10))
data = (torch.randn(2000, 500), torch.randint(0, 10, (2000,)))
run = record(model, data, Classification(), optimizer=lambda p: torch.optim.SGD(p, lr=.01), epochs=1, batch_size=200)
asked = tuple(column[:40] for column in data)
attribute(run, tuple(column[:1] for column in data), method=TracIn(1), memory=20 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = attribute(run, asked, method=TracIn(1), memory=MEMORY)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, found.notes["peak_memory"] - before * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
@pytest.mark.parametrize("memory", [100 << 20, 400 << 20])
def test_peak_memory_keeps_within_the_bound(memory):
    """Gradients of all examples would be 2,000 MB."""
    code = PEAK.replace("MEMORY", str(memory))
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    grown, told = map(int, printed.split())
    assert grown < 1.2 * memory
    assert told == grown


def test_bounds_of_the_engine(run):
    assert Engine(memory=1).query_batch(run) == 1
    assert isinstance(run.update_map.task, Classification)
