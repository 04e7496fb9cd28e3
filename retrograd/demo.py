"""The main job on real data: record a training run, explain what it gets wrong, and check the explanation by retraining.

Scikit-learn's digits (1,797 images of 8×8 pixels) and a small network. For every test image that the network gets wrong:
which training images made it so, exactly (`Unrolled`) and by the usual approximation (`TracIn`); and what became of it in a
hundred networks trained again on random halves of the training images, which is what the scores claim to predict. ::

    OUTPUT/index.html      the page; opens from disk, with plotly.min.js beside it
    OUTPUT/results.json    the figures
    OUTPUT/run/            the recorded run: ``retrograd show OUTPUT/run``
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retrograd import (
    Check,
    Classification,
    Counterfactual,
    Coverage,
    Examples,
    Retrained,
    Roughness,
    Scores,
    TracIn,
    Trajectory,
    Unrolled,
    attribute,
    coverage,
    evaluate,
    random_subsets,
    record,
    retrain,
    roughness,
)
from retrograd.adjoint import Adjoint
from retrograd.errors import InputError, RecordExists
from retrograd.optional import optional
from retrograd.report import MethodView, QueryView, RankedImage, write_report

TRAINING_IMAGES = 1200
FEWEST_QUERIES = 8
COUNTERFACTUAL = Counterfactual(keep=0.5, removal="zero_weight", seeds="same")
METHODS: dict[str, tuple[str, Adjoint]] = {
    "Exact adjoint": ("back through every step of training", Unrolled()),
    "TracIn": ("gradient products at six checkpoints", TracIn()),
}
_MADE_BY = "retrograd demo"
_MARK = "results.json"  # the file by which a folder is known to be ours
_ENTRIES = (_MARK, "run", "plotly.min.js", "index.html")


@dataclass(frozen=True)
class Correlation:
    """A correlation of predicted with actual outcomes, and its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class MethodResult:
    """What came of one method.

    Attributes:
        name: the method.
        correlation: Pearson's, predicted with actual margins over random halves, mean over queries.
        rank_correlation: Spearman's: the linear datamodeling score.
        seconds: what the scores took.
        check: predictions beside outcomes, with ceilings and advice.
    """

    name: str
    correlation: Correlation
    rank_correlation: Correlation
    seconds: float
    check: Check

    def figures(self) -> dict[str, Any]:
        """Return the figures as plain values for JSON; of the check without its arrays."""
        slope = self.check.slope
        return {
            "name": self.name,
            "correlation": asdict(self.correlation),
            "rank_correlation": asdict(self.rank_correlation),
            "slope": asdict(Correlation(slope.value, slope.low, slope.high)),
            "says": str(self.check),
            "ceilings": dict(self.check.ceilings),
            "advice": list(self.check.advice),
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class DemoResult:
    """The figures of the demo.

    Attributes:
        page: path of the page.
        run: path of the recorded run.
        steps: steps of training.
        parameters: scalars that were trained.
        trained: training images.
        tested: test images.
        wrong: test images that the model gets wrong.
        queries: queries; more than ``wrong`` if there were too few and the least certain ones were added.
        subsets: random halves on which the network was trained again.
        counterfactual: what the scores are meant to predict.
        roughness: of the run at which they were taken.
        methods: what came of each method.
        seconds: each part of the work, and ``total``.
    """

    page: Path
    run: Path
    steps: int
    parameters: int
    trained: int
    tested: int
    wrong: int
    queries: int
    subsets: int
    counterfactual: str
    roughness: Roughness
    methods: tuple[MethodResult, ...]
    seconds: dict[str, float]

    def figures(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        own = asdict(replace(self, methods=())) | {"page": str(self.page), "run": str(self.run)}
        return own | {"methods": [method.figures() for method in self.methods]}


@dataclass(frozen=True)
class Digits:
    """The data of the demo: ids are rows of scikit-learn's data set.

    Attributes:
        images: grey values as ink on paper, 0 (black) to 1 (white), shape ``[N, 8, 8]``.
        inputs: what the network sees, standardised, shape ``[N, 64]``.
        labels: shape ``[N]``.
        training: ids of the training images.
        test: ids of the others.
    """

    images: Tensor
    inputs: Tensor
    labels: Tensor
    training: Tensor
    test: Tensor

    def examples(self, ids: Tensor) -> Examples:
        """Return inputs and labels of these ids."""
        return Examples((self.inputs[ids], self.labels[ids]), ids)


def load_digits(seed: int) -> Digits:
    """Load and split scikit-learn's digits; they come with the package, nothing is downloaded."""
    bunch = optional("sklearn.datasets", "cli").load_digits()
    ink = torch.from_numpy(bunch.images).float() / 16
    order = torch.randperm(len(ink), generator=torch.Generator().manual_seed(seed))
    training, test = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]
    mean, deviation = ink[training].mean(), ink[training].std()
    inputs = ((ink - mean) / deviation).flatten(1)
    return Digits(1 - ink, inputs, torch.from_numpy(bunch.target).long(), training, test)


def small_network(seed: int) -> nn.Module:
    """Return an MLP 64-64-64-10 with GELU: smooth, so that derivatives of its training say something."""
    with torch.random.fork_rng(devices=[]):  # torch's layers draw their initial weights from the global state
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))


def run_demo(output: str | os.PathLike[str], *, epochs: int = 12, subsets: int = 100, seed: int = 0) -> DemoResult:
    """Do the main job and write its page.

    Args:
        output: folder for the page, the figures and the run. An earlier demo in it is replaced once the new one is whole.
        epochs: of training.
        subsets: random halves on which the network is trained again; an even number, as they come in complementary pairs.
        seed: of the split, the initial network and the order of the batches.

    Raises:
        InputError: ``subsets`` is odd or below 4.
        RecordExists: ``output`` holds files of these names that are no demo's.
        MissingDependency: a package of the extras ``cli`` and ``report`` is not installed.
    """
    for module in ("plotly.offline", "jinja2", "scipy.stats"):
        optional(module, "report")  # now, not after the work
    if subsets % 2 or subsets < 4:
        raise InputError(f"the random halves come in complementary pairs: subsets must be even and at least 4, got {subsets}.")
    target = Path(output)
    _refuse_foreign(target)
    began, seconds = time.perf_counter(), dict[str, float]()
    with _staging(target) as staged:
        digits = load_digits(seed)
        model = small_network(seed)
        with _timed(seconds, "recording"):
            run = record(
                model,
                digits.examples(digits.training),
                Classification("margin"),
                optimizer=lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
                epochs=epochs,
                batch_size=64,
                seed=seed,
                folder=staged / "run",
            )
        says = model(digits.inputs).argmax(1)
        margins = run.measurements((digits.inputs[digits.test], digits.labels[digits.test]))
        asked, wrong = _choose(digits, says, margins)
        queries = digits.examples(asked)
        with _timed(seconds, "roughness"):
            point = run.matching(COUNTERFACTUAL)  # once for both methods
            rough = roughness(point)
        scores: dict[str, Scores] = {}
        for name, (_, method) in METHODS.items():
            with _timed(seconds, name):
                scores[name] = attribute(point, queries, method=method, check_roughness=False)
        with _timed(seconds, "retraining"):
            kept = random_subsets(run, subsets, COUNTERFACTUAL.keep, seed + 1, complementary=True)
            retrained = retrain(run, queries, kept, removal=COUNTERFACTUAL.removal)
        with _timed(seconds, "agreement"):
            middle = point.measurements(queries.batch(asked))
            views = [_compare(name, scores[name], middle, retrained) for name in METHODS]
        views_of_queries = [_view(digits, says, run, query, next(iter(scores.values()))) for query in asked.tolist()]
        added = len(asked) - wrong
        write_report(
            staged,
            title="Which training images made it wrong?",
            lede=f"A small network learned to read handwritten digits from {len(digits.training):,} images and gets {wrong} of "
            f"{len(digits.test)} test images wrong. For each of them, the training images that helped it most and those that "
            "hurt it most"
            + (f". The {added} right ones with the lowest margins were added, to have {len(asked)}." if added else "."),
            facts=_facts(run, epochs, margins, rough, coverage(run), subsets),
            queries=views_of_queries,
            methods=views,
            actual=retrained.outcomes,
        )
        seconds["total"] = time.perf_counter() - began
        result = DemoResult(
            page=target / "index.html",
            run=target / "run",
            steps=len(run),
            parameters=coverage(run).trained,
            trained=len(digits.training),
            tested=len(digits.test),
            wrong=wrong,
            queries=len(asked),
            subsets=subsets,
            counterfactual=str(COUNTERFACTUAL),
            roughness=rough,
            methods=tuple(_result(view, seconds[view.name]) for view in views),
            seconds=seconds,
        )
        (staged / _MARK).write_text(json.dumps({"made_by": _MADE_BY} | result.figures(), indent=1), encoding="utf-8")
    return result


# ---------------------------------------------------------------------- what is asked, and what came of it


def _choose(digits: Digits, says: Tensor, margins: Tensor) -> tuple[Tensor, int]:
    """Return the ids of the queries, lowest margin first, and how many of them are wrong."""
    order = digits.test[margins.argsort()]
    is_wrong = says[order] != digits.labels[order]
    wrong = int(is_wrong.sum())
    return torch.cat([order[is_wrong], order[~is_wrong][: max(FEWEST_QUERIES - wrong, 0)]]), wrong


def _compare(name: str, scores: Scores, middle: Tensor, retrained: Retrained) -> MethodView:
    """Predict the margins after each retraining, to first order in the weights w around the run where all are ``keep``.

    f(w) ≈ f(keep) + Σ_i (w_i − keep) s_i  =  f(keep) + (1 − keep) Σ_i s_i − Σ_{i removed} s_i
    """
    all_back = (1 - scores.counterfactual.keep) * scores.values.sum(dim=1)
    predicted = middle + all_back + scores.predicted_subset(retrained.factors)
    return MethodView(name, METHODS[name][0], predicted, evaluate(scores, retrained))


def _result(view: MethodView, seconds: float) -> MethodResult:
    plain = [Correlation(one.value, one.low, one.high) for one in (view.check.pearson, view.check.spearman)]
    return MethodResult(view.name, plain[0], plain[1], seconds, view.check)


# ---------------------------------------------------------------------- what the page shows


def _view(digits: Digits, says: Tensor, run: Trajectory, query: int, scores: Scores, count: int = 8) -> QueryView:
    def ranked(lowering: bool) -> list[RankedImage]:
        return [
            RankedImage(one.example_id, digits.images[one.example_id], str(digits.labels[one.example_id].item()), one.score)
            for one in scores.top(query, count, lowering=lowering)
            if one.score and (one.score < 0) == lowering
        ]

    margin = run.measurements((digits.inputs[[query]], digits.labels[[query]]))[0]
    return QueryView(
        query,
        digits.images[query],
        str(digits.labels[query].item()),
        str(says[query].item()),
        margin.item(),
        ranked(lowering=False),
        ranked(lowering=True),
        f"The true label gets a probability of {margin.sigmoid():.1%}.",
    )


def _facts(run: Trajectory, epochs: int, margins: Tensor, rough: Roughness, covered: Coverage, subsets: int) -> dict[str, str]:
    return {
        "What was trained": f"MLP 64-64-64-10 with GELU, {covered.trained:,} parameters. SGD with momentum 0.9, learning rate "
        f"0.01, batches of 64, {epochs} epochs: {len(run)} steps.",
        "What is asked": "The margin of the true label: log p − log(1 − p) in nats, below zero where the model gives the true "
        "label less than half.",
        "Counterfactual": "A random half of the training images weighs nothing; start and batches stay as they were. Scores "
        "are derivatives at the run in which every image weighs ½, the middle of all random halves.",
        "Ground truth": f"{subsets} networks trained again on random halves, from the same start and on the same batches. "
        "The halves come in complementary pairs, which show how far outcomes are sums over images at all.",
        "Roughness": _sentence(str(rough)),
        "Coverage": _sentence(str(covered)),
    }


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."  # str.capitalize would make all other letters small


# ---------------------------------------------------------------------- the output folder


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - start


def _refuse_foreign(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise RecordExists(f"{target} is a file; the demo needs a folder. Give another one with --output.")
    found = [name for name in _ENTRIES if (target / name).exists()]
    if not found:
        return
    try:
        ours = json.loads((target / _MARK).read_text(encoding="utf-8"))["made_by"] == _MADE_BY
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise RecordExists(
            f"{target} holds {', '.join(found)}, which no demo made and a new one would replace. Give another folder with "
            "--output."
        )


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Give a folder to work in; its entries take their places in ``target`` when all is done, and only then."""
    staged, replaced = target / ".demo-new", target / ".demo-old"
    target.mkdir(parents=True, exist_ok=True)
    for leftover in (staged, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
        leftover.mkdir()
    try:
        yield staged
        for name in _ENTRIES:  # the mark goes first: whatever happens in between, the folder is known as ours
            if name != _MARK and (target / name).exists():
                os.replace(target / name, replaced / name)
            os.replace(staged / name, target / name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
