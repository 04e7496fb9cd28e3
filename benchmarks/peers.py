"""retrograd beside captum, kronfluence, TRAK and curvlinops: how well scores predict retraining, and what they cost.

    python benchmarks/peers.py --setup DIR                                            # environments of the peers, with pip
    python benchmarks/peers.py --environments DIR [--truth DIR] [--quick] [--tasks B A Bc]

Tasks: digits (B, 12 epochs), MNIST (A, 10 epochs), digits until they converged (Bc, 100 epochs at three times the rate). What
is asked is the margin log p − log(1 − p) of each query. Truth: random halves deleted, mean over fresh seeds.

Each method runs in a process of its own, a peer in its own environment, all with the same recorded run: its data, its final
state, six checkpoints in the middles of equal stretches, and four more runs with other seeds. What they read and write are .npz
and JSON files. The peers' scores come with our sign, set by their documentation (see the scripts in `benchmarks/peers`).

LDS         linear datamodeling score with its 95 % interval.
epochs      processor time in epochs of a plain loop, one thread, both measured in that process after a warm-up on four queries.
            Training the run itself is not counted; the matched run is, and the four further trainings of whatever uses five
            models.
MB          peak memory above that of the imports.
lines       what a user writes to get scores from a trained model: lines between two marks in the script, blank ones and
            comments left out.

On task A exact and blended scores get the first 64 queries, or five runs would take half an hour each; for the others the LDS
of the same 64 is printed too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tasks import DataMissing, compared
from torch import Tensor
from unrolled import in_own_process, recorded

from retrograd import linear_datamodeling_score, random_subsets, retrain
from retrograd.attribution import Agreement
from retrograd.curvature import EKFAC
from retrograd.evaluation import noise_ceiling, one_seed_wall
from retrograd.trajectory import batch_order

HERE = Path(__file__).parent
PACKAGES = {
    "captum": "captum==0.9.0",
    "kronfluence": "kronfluence==1.0.1",
    "trak": "traker==0.3.2",
    "curvlinops": "curvlinops-for-pytorch==3.0.1",
}
MODELS = 5  # in an ensemble
CHECKPOINTS = 6
FEWER = 64  # queries

TARGETS = {
    "B_source_ekfac_matched_lds": [">=", 0.78],
    "B_influence_ekfac_matched_lds": [">=", 0.67],
    "B_blend_matched_lds": [">=", 0.84],
    "B_five_runs_best_lds": [">=", 0.91],
    "B_source_ekfac_matched_epochs": ["<=", 100.0],
    "B_influence_ekfac_at_run_epochs": ["<=", 20.0],
    "B_ekfac_fit_epochs": ["<=", 4.0],
    "A_source_ekfac_matched_lds": [">=", 0.52],
    "A_influence_ekfac_matched_lds": [">=", 0.43],
    "A_blend_matched_lds": [">=", 0.62],
    "A_five_runs_best_lds": [">=", 0.72],
    "A_source_ekfac_matched_epochs": ["<=", 300.0],
    "A_influence_ekfac_at_run_epochs": ["<=", 60.0],
    "A_ekfac_fit_epochs": ["<=", 4.0],
    "Bc_blend_gauss_newton_matched_lds": [">=", 0.57],
}


@dataclass(frozen=True)
class Row:
    """One method: its script, with which options and in whose environment (retrograd's if None)."""

    name: str
    script: str
    options: tuple[str, ...] = ()
    peer: str | None = None
    models: int = 1
    quick: bool = False


@dataclass
class Found:
    """What a row gave: scores and costs, or why there are none."""

    scores: Tensor | None = None
    about: dict[str, Any] = field(default_factory=dict)
    failure: str = ""


PEER_ROWS = [
    Row("captum_tracincp", "captum_tracincp", ("loss",), "captum", quick=True),
    Row("captum_tracincp_margin", "captum_tracincp", ("margin",), "captum"),
    Row("captum_tracincp_fast", "captum_tracincp_fast", (), "captum"),
    Row("kronfluence_ekfac", "kronfluence_scores", ("ekfac",), "kronfluence", quick=True),
    Row("kronfluence_diagonal", "kronfluence_scores", ("diagonal",), "kronfluence"),
    Row("kronfluence_identity", "kronfluence_scores", ("identity",), "kronfluence"),
    Row("trak_1_model", "trak_scores", ("1", "512", "0"), "trak"),
    Row("trak_5_models", "trak_scores", ("5", "512", "0"), "trak", models=MODELS),
    Row("trak_1_model_ridge", "trak_scores", ("1", "512", "1000"), "trak", quick=True),
    Row("trak_5_models_ridge", "trak_scores", ("5", "512", "1000"), "trak", models=MODELS),
    Row("curvlinops_ekfac", "curvlinops_influence", (), "curvlinops", quick=True),
]


def own_rows(task: str) -> list[Row]:
    """Return retrograd's methods: each at the run and at the one of matched training time, then five runs."""

    def row(name: str, method: str, point: str, models: int = 1, quick: bool = False) -> Row:
        return Row(name, "retrograd_scores", (task, method, point, str(models)), None, models, quick)

    methods = ["exact", "tracin", "influence_ekfac", "influence_time", "source_ekfac", "blend"]
    if task == "Bc":
        methods.append("blend_gauss_newton")
    in_quick = ("source_ekfac_matched",)
    given = [(f"{method}_{point}", method, point) for method in methods for point in ("at_run", "matched")]
    single = [row(name, method, point, quick=name in in_quick) for name, method, point in given]
    ensembles = ["exact", "blend", *(["blend_gauss_newton"] if task == "Bc" else [])]
    return single + [row(f"five_runs_{method}", method, "matched", MODELS) for method in ensembles]


def in_fewer(task: str, row: Row, queries: int) -> int:
    """Return how many queries a row gets."""
    sweeps = "exact" in row.name or "blend" in row.name
    return min(queries, FEWER) if task == "A" and sweeps else queries


def set_up(folder: Path) -> None:
    """Make one environment a peer, with the torch that retrograd's own set-up pins."""
    for peer, package in PACKAGES.items():
        print(f"{package} into {folder / peer}", flush=True)
        venv.create(folder / peer, with_pip=True)
        pip = [str(python_of(folder, peer)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*pip, "--constraint", str(HERE.parent / "constraints.txt"), "torch", "numpy", package])
        if done.returncode:
            print(f"  {package} could not be installed, see above; the benchmark will report it as not installed.")


def python_of(folder: Path | None, peer: str) -> Path | None:
    return None if folder is None else folder / peer / "bin" / "python"


def prepare(task: str, folder: str, runs: int) -> dict[str, float]:
    """Record the runs, write what the peers are given, and time the fit of EK-FAC in epochs of a plain loop."""
    torch.set_num_threads(1)
    setting = compared(task)
    made = [recorded(setting, seed) for seed in range(runs)]
    write_exchange(Path(folder), setting, made)
    order = batch_order(made[0].examples, min(setting.epochs, 12), setting.batch_size, 0)
    states = [made[0].final_state]
    setting.bare_loop(order[:10])
    EKFAC().fit(made[0], states)
    times = [(seconds_of(setting.bare_loop, order), seconds_of(EKFAC().fit, made[0], states)) for _ in range(5)]
    ratios = [fit * min(setting.epochs, 12) / loop for loop, fit in times]
    return {"ekfac_fit_epochs": statistics.median(ratios), "epochs": setting.epochs}


def write_exchange(folder: Path, setting: Any, made: list[Any]) -> None:
    """Write data, states and sizes for `benchmarks/peers/exchange.py`."""
    names = ("train_inputs", "train_labels", "query_inputs", "query_labels")
    arrays = zip(names, (*setting.train, *setting.queries), strict=True)
    np.savez(folder / "data.npz", **{name: column.numpy() for name, column in arrays})
    steps, final = made[0].spread(CHECKPOINTS), len(made[0])
    for seed, run in enumerate(made):
        for step in (*steps, final) if seed == 0 else (final,):
            params = run.state(step).params
            np.savez(folder / f"state_{seed}_{step}.npz", **{name: leaf.numpy() for name, leaf in params.items()})
    weights = [leaf for leaf in made[0].final_state.params.values() if leaf.dim() == 2]
    optimizer = setting.make_optimizer([torch.zeros(1, requires_grad=True)])
    about = {
        "sizes": [weights[0].shape[1], *(leaf.shape[0] for leaf in weights)],
        "rate": optimizer.param_groups[0]["lr"],
        "momentum": optimizer.param_groups[0]["momentum"],
        "batch_size": setting.batch_size,
        "steps": steps,
        "final": final,
    }
    (folder / "about.json").write_text(json.dumps(about))


def seconds_of(function: Any, *args: Any) -> float:
    began = time.process_time()
    function(*args)
    return time.process_time() - began


def truth_of(
    task: str, subsets: int, seeds: int, queries: int, folder: Path | None
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Return the halves, the mean margins after retraining on them, and the ceilings of any prediction."""
    torch.set_num_threads(1)
    setting = compared(task)
    run, asked = recorded(setting), tuple(column[:queries] for column in setting.queries)
    kept = random_subsets(run, subsets, 0.5, seed=2)
    fresh = list(range(100, 100 + seeds))
    own = None if folder is None else folder / task
    truth = retrain(run, asked, kept, removal="deletion", seeds=fresh, initialise=setting.make_model, folder=own)
    ceilings = {"noise_ceiling": noise_ceiling(truth.values).value, "one_seed_wall": one_seed_wall(truth.values).value}
    return kept.numpy(), truth.outcomes.numpy(), ceilings


def scores_of(row: Row, environments: Path | None, folder: Path, queries: int) -> Found:
    """Run a row's script in its own process."""
    python: Path | None = Path(sys.executable) if row.peer is None else python_of(environments, row.peer)
    if python is None or not python.exists():
        return Found(failure="not installed")
    result = folder / f"{row.name}.npz"
    command = [str(python), str(HERE / "peers" / f"{row.script}.py"), str(folder), str(result), str(queries), *row.options]
    alone = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    path = {} if row.peer else {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    done = subprocess.run(command, env=os.environ | alone | path, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        return Found(failure="failed: " + (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    with np.load(result) as arrays:
        scores, about = torch.from_numpy(arrays["scores"]), json.loads(str(arrays["about"]))
    return Found(scores, about) if scores.isfinite().all() else Found(about=about, failure="failed: scores are not finite")


def lines_of(row: Row) -> int:
    """Count what a user writes: the marked lines of the script, blank ones and comments left out."""
    count, counted = 0, False
    for line in (HERE / "peers" / f"{row.script}.py").read_text().splitlines():
        match line.split():
            case ["#", "begin", *options]:
                counted = not options or options[0] in row.options
            case ["#", "end"]:
                counted = False
            case [first, *_] if counted and not first.startswith("#"):
                count += 1
    return count


@dataclass
class Trial:
    """One task: what the peers are given, and the truth that scores are judged by."""

    task: str
    folder: Path
    environments: Path | None
    queries: int
    epochs: int
    kept: Tensor
    outcomes: Tensor

    def line(self, row: Row) -> tuple[str, dict[str, float]]:
        """Run a row; returns its line of the table and its figures, none where it did not run."""
        asked = in_fewer(self.task, row, self.queries)
        found = scores_of(row, self.environments, self.folder, asked)
        if found.scores is None:
            return found.failure, {}
        score = self.score(found.scores)
        epochs = found.about["seconds"] / found.about["epoch"] + (row.models - 1) * self.epochs
        megabytes, lines = found.about["bytes"] / 1e6, lines_of(row)
        figures = {"lds": score.value, "lds_low": score.low, "lds_high": score.high}
        figures |= {"epochs": epochs, "megabytes": megabytes, "lines": lines}
        line = f"{score!s:<23}{epochs:>8.0f}{megabytes:>7.0f}{lines:>7}{asked:>9}"
        if self.task == "A" and asked > FEWER:
            fewer = self.score(found.scores[:FEWER])
            figures[f"lds_first{FEWER}"] = fewer.value
            line += f"   first {FEWER}: {fewer}"
        return line + (f"   {found.about['version']}" if row.peer else ""), figures

    def score(self, scores: Tensor) -> Agreement:
        return linear_datamodeling_score(self.kept @ scores.double().T, self.outcomes[:, : len(scores)])


def compare(
    task: str, environments: Path | None, truth: Path | None, size: tuple[int, int, int], quick: bool
) -> dict[str, float]:
    """Print the table of one task; returns its figures."""
    with tempfile.TemporaryDirectory() as name:
        given = in_own_process(prepare, task, name, 1 if quick else MODELS)
        subsets, seeds, queries = size
        kept, outcomes, ceilings = in_own_process(truth_of, task, subsets, seeds, queries, truth)
        halves = torch.from_numpy(kept).double(), torch.from_numpy(outcomes).double()
        trial = Trial(task, Path(name), environments, queries, int(given.pop("epochs")), *halves)
        figures = {f"{task}_{key}": value for key, value in (given | ceilings).items()}
        print(f"\ntask {task}: {subsets} subsets × {seeds} seeds, {queries} queries")
        print(f"  {'method':<28}{'LDS':<23}{'epochs':>8}{'MB':>7}{'lines':>7}{'queries':>9}", flush=True)
        for row in [*PEER_ROWS, *own_rows(task)]:
            if row.quick or not quick:
                line, of_row = trial.line(row)
                print(f"  {row.name:<28}{line}", flush=True)
                figures |= {f"{task}_{row.name}_{key}": value for key, value in of_row.items()}
    return figures | summary(task, figures)


def summary(task: str, figures: dict[str, float]) -> dict[str, float]:
    """Print and return the best of the ensembles and the best peer, among those that ran; print the ceilings."""
    ours = [figures[key] for key in (f"{task}_five_runs_exact_lds", f"{task}_five_runs_blend_lds") if key in figures]
    peers = {row.name: figures[f"{task}_{row.name}_lds"] for row in PEER_ROWS if f"{task}_{row.name}_lds" in figures}
    found = {f"{task}_five_runs_best_lds": max(ours)} if ours else {}
    if peers:
        name = max(peers, key=lambda one: peers[one])
        print(f"  best peer: {name}, {peers[name]:.3f}")
        found[f"{task}_best_peer_lds"] = peers[name]
    fit, noise, wall = (figures[f"{task}_{key}"] for key in ("ekfac_fit_epochs", "noise_ceiling", "one_seed_wall"))
    print(f"  fit of EK-FAC {fit:.1f} epochs; noise ceiling {noise:.3f}, one-seed wall {wall:.3f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", type=Path, metavar="DIR", help="make the peers' environments in this folder, and end")
    parser.add_argument("--environments", type=Path, metavar="DIR", help="where they are; without it the peers are left out")
    parser.add_argument("--truth", type=Path, metavar="DIR", help="keep the retrainings in this folder, and go on with them")
    parser.add_argument("--tasks", nargs="+", choices=["B", "A", "Bc"], default=["B", "A", "Bc"])
    parser.add_argument("--quick", action="store_true", help="task B with few subsets, queries and methods; within a minute")
    given = parser.parse_args()
    if given.setup:
        set_up(given.setup.absolute())
        return
    environments = given.environments.absolute() if given.environments else None
    figures: dict[str, float] = {}
    for task in ["B"] if given.quick else given.tasks:
        size = (20, 2, 16) if given.quick else (80, 4, 200) if task == "A" else (100, 10, 200)
        try:
            figures |= compare(task, environments, None if given.quick else given.truth, size, given.quick)
        except DataMissing as error:
            print(f"\ntask {task} left out: {error}")
    met = all(
        figures[name] <= bound if sign == "<=" else figures[name] >= bound
        for name, (sign, bound) in TARGETS.items()
        if name in figures
    )
    complete = given.quick or all(name in figures for name in TARGETS)
    print(json.dumps({"benchmark": "peers", "figures": figures, "targets": TARGETS, "met": bool(met and complete)}))


if __name__ == "__main__":
    main()
