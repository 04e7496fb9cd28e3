"""Hypergradients beside higher, TorchOpt, hypertorch, BOAT, Betty and hypergrad: how right they are, and what they cost.

    python benchmarks/hypergradient_peers.py --setup DIR [--clones DIR]     # environments of the peers, with pip
    python benchmarks/hypergradient_peers.py --environments DIR [--quick]

Without --environments, or where one of them is missing, a peer's rows say so. By hand, an environment is

    python -m venv DIR/PEER; DIR/PEER/bin/python -m pip install torch numpy PACKAGE     # for PACKAGE see PACKAGES below

with the torch of constraints.txt. Three peers' own requirements are set aside: BOAT and hypergrad ask for torchvision, which
they do not import, BOAT for an old numpy, Betty 0.2.1 for Python below 3.11. --clones names a folder of clones to install from,
instead of addresses.

Problem 1: an MLP 64-32-10 with tanh learns 1000 scikit-learn digits by SGD with momentum, T batches of 64 in recorded order:
a size at which starting an operation costs more than carrying it out. "wide" is the same with 2,048 hidden units and batches of
256 in float32, where arithmetic counts; its reference is autograd through the run in float64.
Asked: the derivative of the mean validation loss by every example weight and by the learning rate of every step.
Problem 2: logistic regression at its optimum (Newton, to 1e-12) for 64 log-L2 coefficients, by which the same is asked.

Each method runs in a process of its own, one thread, a peer in its own environment; .npz files carry problem and answer.

error       ‖(⟨g, d_k⟩ − D_k)_k‖ / ‖(D_k)_k‖ over three random directions d_k, D_k the central difference of training in float64
            where two neighbouring h of a sweep agree best. "all" is the relative distance of the whole vector to that of plain
            autograd through the run in float64, an oracle. Problem 2: relative distance to the solution with the dense Hessian,
            which is compared with differences too.
seconds     of the processor, best of three after a warm-up, training included (for retrograd: recording).
MB          the most memory above what the process held before the call, after a warm-up on a short run.

Betty 0.2.1, of its repository, has no row that unrolls without failing: it patches module and optimizer twice. Its
HigherIterativeProblem, where it runs (0.1.1), drops momentum. The last table has more of what peers' own code gets wrong.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

HERE = Path(__file__).parent
PACKAGES = {
    "higher": ["higher==0.2.1"],
    "torchopt": ["torchopt==0.7.3"],
    "hypertorch": ["--no-deps", "git+https://github.com/prolearner/hypertorch"],
    "boat": ["--no-deps", "boat-torch==1.1.1", "higher==0.2.1"],
    "betty": ["betty-ml==0.1.1", "higher==0.2.1"],
    "betty_git": ["--ignore-requires-python", "git+https://github.com/leopard-ai/betty", "higher==0.2.1"],
    "hypergrad": ["--no-deps", "hypergrad==0.0.1"],
}
ALSO = {"boat": ["matplotlib"]}  # what --no-deps leaves out and the peer imports
STORE_ALL = ("higher", "torchopt", "hypertorch_graph", "hypertorch_states", "boat", "betty_functorch", "betty_git_functorch")
SHORT, LONG, WIDE = 100, 1000, 40  # steps
TRAIN, VALIDATION = 1000, 500
SMALL_SIZE, WIDE_SIZE = (32, 64), (2048, 256)  # hidden units and batch
RATE, MOMENTUM = 0.1, 0.9
DIRECTIONS = 3
SWEEP = [10 ** (-1 - k / 2) for k in range(9)]
CG_TERMS, NEUMANN_TERMS = 20, 1000

TARGETS = {
    "T100_float64_retrograd_weights_error": ["<=", 1e-6],
    "T100_float64_retrograd_rates_error": ["<=", 1e-6],
    "T100_float64_seconds_over_fastest_exact_peer": ["<=", 1.0],
    "T100_float32_seconds_over_fastest_exact_peer": ["<=", 1.0],
    "T1000_seconds_over_fastest_exact_peer": ["<=", 1.0],
    "wide_seconds_over_fastest_exact_peer": ["<=", 1.0],
    "T1000_megabytes_over_leanest_store_all_peer": ["<=", 1.0],
    "implicit_retrograd_cg_error": ["<=", 1e-3],
    "implicit_retrograd_neumann_error": ["<=", 1e-3],
}
EXACT = 1e-5  # a peer is exact on problem 1 if its float64 error by weights is below


@dataclass(frozen=True)
class Row:
    """One method: its script, what it is asked, and in whose environment (retrograd's if None)."""

    name: str
    script: str
    method: str
    peer: str | None = None


@dataclass
class Found:
    """What a row gave: derivatives and costs, or why there are none."""

    values: dict[str, np.ndarray] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    failure: str = ""


UNROLLED = [
    Row("higher", "higher", "unrolled", "higher"),
    Row("torchopt", "torchopt", "unrolled", "torchopt"),
    Row("hypertorch_graph", "hypertorch", "unrolled", "hypertorch"),
    Row("hypertorch_states", "hypertorch", "states", "hypertorch"),
    Row("boat", "boat", "unrolled", "boat"),
    Row("betty_functorch", "betty", "functorch", "betty"),
    Row("betty_higher", "betty", "higher", "betty"),
    Row("betty_git_functorch", "betty", "functorch", "betty_git"),
    Row("betty_git_higher", "betty", "higher", "betty_git"),
    Row("retrograd", "retrograd", "sqrt"),
    Row("retrograd_all", "retrograd", "all"),
]
LEAN = [Row("retrograd_treeverse", "retrograd", "treeverse")]
IMPLICIT = [
    Row(f"{name}_{solver}", script, solver, peer)
    for solver in ("cg", "neumann")
    for name, script, peer in (
        ("torchopt", "torchopt", "torchopt"),
        ("hypertorch", "hypertorch", "hypertorch"),
        ("boat", "boat", "boat"),
        ("betty", "betty", "betty"),
        ("betty_git", "betty", "betty_git"),
        ("hypergrad", "hypergrad", "hypergrad"),
        ("retrograd", "retrograd", None),
    )
]
WITH_DEFECTS = ("betty", "betty_git", "torchopt", "hypergrad", "boat")
DEFECTS = [Row(peer, peer.removesuffix("_git"), "defects", peer) for peer in WITH_DEFECTS]
IN_QUICK = ("higher", "hypertorch_graph", "retrograd", "hypertorch_cg", "retrograd_cg")


def set_up(folder: Path, clones: Path | None) -> None:
    """Make one environment a peer, with the torch that retrograd's own set-up pins."""
    for peer, packages in PACKAGES.items():
        if clones is not None and (clones / peer.removesuffix("_git")).exists():
            packages = [str(clones / peer.removesuffix("_git")) if word.startswith("git+") else word for word in packages]
        print(f"{' '.join(packages)} into {folder / peer}", flush=True)
        venv.create(folder / peer, with_pip=True)
        pip = [str(folder / peer / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pinned = ["--constraint", str(HERE.parent / "constraints.txt"), "torch", "numpy", "setuptools", *ALSO.get(peer, [])]
        done = [subprocess.run([*pip, *wanted]).returncode for wanted in (pinned, packages)]
        if any(done):
            print(f"  {peer} could not be installed, see above; the benchmark will report it as not installed.")


# The problems and their answers


def digits(dtype: torch.dtype) -> dict[str, Tensor]:
    found: Any = load_digits()
    rows = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))[: TRAIN + VALIDATION]
    inputs, labels = torch.from_numpy(found.data / 16).to(dtype)[rows], torch.from_numpy(found.target).long()[rows]
    return {
        "train_inputs": inputs[:TRAIN],
        "train_labels": labels[:TRAIN],
        "validation_inputs": inputs[TRAIN:],
        "validation_labels": labels[TRAIN:],
    }


def unrolled_problem(steps: int, dtype: torch.dtype, size: tuple[int, int] = SMALL_SIZE) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden, batch = size
    full = TRAIN // batch
    epochs = [torch.randperm(TRAIN, generator=generator)[: full * batch].view(full, batch) for _ in range(-(-steps // full))]
    shapes = [(hidden, 64), (hidden,), (10, hidden), (10,)]
    bounds = [64**-0.5, 64**-0.5, hidden**-0.5, hidden**-0.5]
    drawn = [
        (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * bound
        for shape, bound in zip(shapes, bounds, strict=True)
    ]
    return digits(dtype) | {
        "order": torch.cat(epochs)[:steps],
        "rate": torch.tensor(RATE, dtype=torch.float64),
        "momentum": torch.tensor(MOMENTUM, dtype=torch.float64),
        **{f"parameter{number}": leaf.to(dtype) for number, leaf in enumerate(drawn)},
    }


def mlp(parameters: list[Tensor], inputs: Tensor) -> Tensor:
    first, bias, second, last = parameters
    return F.linear(torch.tanh(F.linear(inputs, first, bias)), second, last)


def asked_after_training(problem: dict[str, Tensor], weights: Tensor, rates: Tensor) -> Tensor:
    """Train as SGD with momentum does and return the mean validation loss, with its graph if an argument needs one."""
    parameters = [problem[f"parameter{number}"].clone().requires_grad_() for number in range(4)]
    velocity = [torch.zeros_like(leaf) for leaf in parameters]
    graph = weights.requires_grad or rates.requires_grad
    for ids, rate in zip(problem["order"], rates, strict=True):
        losses = F.cross_entropy(mlp(parameters, problem["train_inputs"][ids]), problem["train_labels"][ids], reduction="none")
        gradients = torch.autograd.grad((weights[ids] * losses).mean(), parameters, create_graph=graph)
        velocity = [MOMENTUM * old + gradient for old, gradient in zip(velocity, gradients, strict=True)]
        parameters = [leaf - rate * step for leaf, step in zip(parameters, velocity, strict=True)]
        if not graph:
            parameters = [leaf.detach().requires_grad_() for leaf in parameters]
    return F.cross_entropy(mlp(parameters, problem["validation_inputs"]), problem["validation_labels"])


def differences(function: Callable[[Tensor], float], directions: Tensor, sizes: list[float] = SWEEP) -> Tensor:
    """Return central differences of ``function(h d)``, one a direction, at the h where two neighbours of a sweep agree best."""
    found = []
    for direction in directions:
        sweep = [(function(h * direction) - function(-h * direction)) / (2 * h) for h in sizes]
        gaps = [abs(one - other) for one, other in pairwise(sweep)]
        found.append(sweep[gaps.index(min(gaps)) + 1])
    return torch.tensor(found, dtype=torch.float64)


@dataclass
class Reference:
    """Directions and differences along them for each kind of hyperparameter, and autograd's derivative."""

    directions: dict[str, Tensor]
    differences: dict[str, Tensor]
    exact: dict[str, Tensor]

    def errors(self, values: dict[str, np.ndarray]) -> dict[str, float]:
        """Return for each kind the relative error along the directions, and the relative distance to autograd's."""
        found = {}
        for kind, value in values.items():
            gradient, truth = torch.from_numpy(value).double(), self.differences[kind]
            found[kind] = ((self.directions[kind] @ gradient - truth).norm() / truth.norm()).item()
            found[f"{kind}_to_autograd"] = ((gradient - self.exact[kind]).norm() / self.exact[kind].norm()).item()
        return found


def unrolled_reference(steps: int, size: tuple[int, int] = SMALL_SIZE) -> Reference:
    problem = unrolled_problem(steps, torch.float64, size)
    generator = torch.Generator().manual_seed(2)
    one, rate = torch.ones(TRAIN, dtype=torch.float64), torch.full((steps,), RATE, dtype=torch.float64)
    directions = {
        "example_weights": torch.randn(DIRECTIONS, TRAIN, generator=generator, dtype=torch.float64),
        "learning_rate": torch.randn(DIRECTIONS, steps, generator=generator, dtype=torch.float64) * RATE,
    }
    along = {
        "example_weights": lambda change: asked_after_training(problem, one + change, rate).item(),
        "learning_rate": lambda change: asked_after_training(problem, one, rate + change).item(),
    }
    leaves = one.clone().requires_grad_(), rate.clone().requires_grad_()
    exact = torch.autograd.grad(asked_after_training(problem, *leaves), leaves)
    return Reference(
        directions,
        {kind: differences(along[kind], directions[kind]) for kind in directions},
        dict(zip(directions, exact, strict=True)),
    )


def penalised(problem: dict[str, Tensor], weight: Tensor, log_l2: Tensor) -> Tensor:
    fit = F.cross_entropy(problem["train_inputs"] @ weight.T, problem["train_labels"])
    return fit + (log_l2.exp() * weight.square().sum(0)).sum() / 2


def hessian_of_penalised(problem: dict[str, Tensor], weight: Tensor, log_l2: Tensor) -> Tensor:
    """Return (1/N) Σ_i (diag p_i − p_i p_iᵀ) ⊗ x_i x_iᵀ + diag exp(ρ), rows of W one after the other."""
    inputs = problem["train_inputs"]
    chance = (inputs @ weight.T).softmax(1)
    spread = torch.diag_embed(chance) - chance[:, :, None] * chance[:, None, :]
    blocks = torch.einsum("nab,ni->abni", spread, inputs).transpose(2, 3) @ inputs / len(inputs)
    return blocks.permute(0, 2, 1, 3).reshape(weight.numel(), -1) + torch.diag(log_l2.exp().repeat(len(weight)))


def optimum(problem: dict[str, Tensor], log_l2: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Return the optimal weight by Newton's method and the Hessian there."""
    weight, gradient = start, torch.tensor(torch.inf)
    for _ in range(50):
        gradient = torch.func.grad(penalised, argnums=1)(problem, weight, log_l2)
        hessian = hessian_of_penalised(problem, weight, log_l2)
        if gradient.norm() < 1e-12:
            return weight, hessian
        weight = weight - torch.linalg.solve(hessian, gradient.flatten()).view_as(weight)
    raise ArithmeticError(f"Newton's method stopped at a gradient of norm {gradient.norm():.1e}.")


def implicit_problem() -> tuple[dict[str, Tensor], Reference, Tensor]:
    """Return problem 2, its answer, and the Hessian."""
    problem = digits(torch.float64)
    generator = torch.Generator().manual_seed(3)
    log_l2 = np.log(0.02) + 0.3 * torch.randn(64, generator=generator, dtype=torch.float64)
    weight, hessian = optimum(problem, log_l2, torch.zeros(10, 64, dtype=torch.float64))

    def asked(weight: Tensor) -> Tensor:
        return F.cross_entropy(problem["validation_inputs"] @ weight.T, problem["validation_labels"])

    costate = torch.linalg.solve(hessian, torch.func.grad(asked)(weight).flatten()).view_as(weight)
    exact = {"log_l2": -(costate * weight * log_l2.exp()).sum(0)}
    directions = {"log_l2": torch.randn(DIRECTIONS, 64, generator=generator, dtype=torch.float64)}

    def along(change: Tensor) -> float:
        return asked(optimum(problem, log_l2 + change, weight)[0]).item()

    reference = Reference(directions, {"log_l2": differences(along, directions["log_l2"], SWEEP[2::2])}, exact)
    problem |= {
        "parameter0": weight,
        "log_l2": log_l2,
        "step": 1 / torch.linalg.eigvalsh(hessian)[-1],
        "cg_terms": torch.tensor(CG_TERMS),
        "neumann_terms": torch.tensor(NEUMANN_TERMS),
    }
    return problem, reference, hessian


# The rows


def written(problem: dict[str, Tensor], path: Path) -> Path:
    arrays: dict[str, Any] = {name: leaf.numpy() for name, leaf in problem.items()}
    np.savez(path, **arrays)
    return path


def run(row: Row, environments: Path | None, problem: Path) -> Found:
    """Run a row's script in its own process."""
    python: Path | None = Path(sys.executable)
    if row.peer is not None:
        python = None if environments is None else environments / row.peer / "bin" / "python"
    if python is None or not python.exists():
        return Found(failure="not installed")
    result = problem.with_name(f"{problem.stem}_{row.name}.npz")
    script = HERE / "peers" / f"hypergradient_{row.script}.py"
    alone = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    command = [str(python), str(script), str(problem), str(result), row.method]
    done = subprocess.run(command, env=os.environ | alone, capture_output=True, text=True, cwd=problem.parent)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return Found(failure=f"failed: {last[:80]}")
    with np.load(result) as arrays:
        values = {name: arrays[name] for name in arrays.files if name != "about"}
        about = json.loads(str(arrays["about"]))
    if not all(np.isfinite(value).all() for value in values.values()):
        return Found(about=about, failure="failed: derivatives are not finite")
    return Found(values, about)


SHORT_NAMES = {"example_weights": "weights", "learning_rate": "rates"}


def compare_unrolled(
    steps: int, dtype: torch.dtype, environments: Path | None, folder: Path, reference: Reference, rows: list[Row]
) -> dict[str, float]:
    """Print the table of problem 1 for one length and precision; returns its figures."""
    precision = str(dtype).removeprefix("torch.")
    label = f"T{steps}_{precision}" if steps == SHORT else f"T{steps}"
    size = WIDE_SIZE if steps == WIDE else SMALL_SIZE
    label = "wide" if steps == WIDE else label
    problem = written(unrolled_problem(steps, dtype, size), folder / f"{label}.npz")
    print(f"\nproblem 1, 64-{size[0]}-10, T = {steps}, {precision}: by example weights and by learning rates")
    print(f"  {'method':<22}{'error':>9}{'all':>9}{'rates':>9}{'all':>9}{'seconds':>9}{'MB':>8}")
    oracle = reference.errors({kind: value.numpy() for kind, value in reference.exact.items()})
    print(f"  {'autograd (oracle)':<22}{oracle['example_weights']:>9.0e}{'':>9}{oracle['learning_rate']:>9.0e}")
    figures = {f"T{steps}_autograd_{SHORT_NAMES[kind]}_error": oracle[kind] for kind in SHORT_NAMES}
    for row in rows:
        found = run(row, environments, problem)
        if found.failure:
            print(f"  {row.name:<22}{found.failure}", flush=True)
            continue
        errors, about = reference.errors(found.values), found.about
        cells = ""
        for kind, short in SHORT_NAMES.items():
            cells += f"{errors[kind]:>9.0e}{errors[f'{kind}_to_autograd']:>9.0e}" if kind in errors else f"{'–':>9}{'–':>9}"
            if kind in errors:
                figures[f"{label}_{row.name}_{short}_error"] = errors[kind]
                figures[f"{label}_{row.name}_{short}_to_autograd"] = errors[f"{kind}_to_autograd"]
        megabytes = about["bytes"] / 1e6
        figures |= {f"{label}_{row.name}_seconds": about["seconds"], f"{label}_{row.name}_megabytes": megabytes}
        notes = about["version"]
        if "record_seconds" in about:
            figures[f"{label}_{row.name}_record_seconds"] = about["record_seconds"]
            notes = f"of which recording {about['record_seconds']:.2f}"
        print(f"  {row.name:<22}{cells}{about['seconds']:>9.2f}{megabytes:>8.1f}   {notes}", flush=True)
    return figures


def ratios(label: str, figures: dict[str, float]) -> dict[str, float]:
    """Return our time over that of the fastest exact peer, and our memory over that of the leanest that stores all."""
    peers = [row.name for row in UNROLLED if row.peer and figures.get(f"{label}_{row.name}_weights_to_autograd", 1.0) < 1e-3]
    exact = [name for name in peers if figures.get(f"T{SHORT}_float64_{name}_weights_error", 1.0) < EXACT]
    found = {}
    if exact and f"{label}_retrograd_seconds" in figures:
        fastest = min(exact, key=lambda name: figures[f"{label}_{name}_seconds"])
        own = min(figures[f"{label}_{name}_seconds"] for name in ("retrograd", "retrograd_all"))
        ratio = own / figures[f"{label}_{fastest}_seconds"]
        found[f"{label}_seconds_over_fastest_exact_peer"] = ratio
        print(f"  our time {ratio:.2f} of that of the fastest exact peer, {fastest}")
    ours = [f"{label}_{name}_megabytes" for name in ("retrograd", "retrograd_treeverse")]
    lean = [figures[name] for name in ours if name in figures]
    store_all = [name for name in exact if name in STORE_ALL]
    if lean and store_all:
        leanest = min(store_all, key=lambda name: figures[f"{label}_{name}_megabytes"])
        ratio = max(lean) / figures[f"{label}_{leanest}_megabytes"]  # of those that do not store all
        found[f"{label}_megabytes_over_leanest_store_all_peer"] = ratio
        print(f"  our memory {ratio:.2f} of that of the leanest peer that stores all, {leanest}")
    return found


def compare_implicit(environments: Path | None, folder: Path, rows: list[Row]) -> tuple[dict[str, float], Path]:
    """Print the table of problem 2; returns its figures and the problem's file."""
    problem, reference, hessian = implicit_problem()
    path = written(problem, folder / "implicit.npz")
    condition = torch.linalg.cond(hessian).item()
    check = reference.errors({"log_l2": reference.exact["log_l2"].numpy()})["log_l2"]
    print(f"\nproblem 2: 64 log-L2, condition number {condition:.0f}; dense solution against differences {check:.0e}")
    print(f"  {'method':<22}{'error':>9}{'seconds':>9}{'MB':>8}")
    figures = {"implicit_dense_error": check, "implicit_condition": condition}
    for row in rows:
        found = run(row, environments, path)
        if found.failure:
            print(f"  {row.name:<22}{found.failure}", flush=True)
            continue
        error, about = reference.errors(found.values)["log_l2_to_autograd"], found.about
        megabytes = about["bytes"] / 1e6
        print(f"  {row.name:<22}{error:>9.0e}{about['seconds']:>9.3f}{megabytes:>8.1f}   {about['version']}", flush=True)
        of_row = {"error": error, "seconds": about["seconds"], "megabytes": megabytes}
        figures |= {f"implicit_{row.name}_{key}": value for key, value in of_row.items()}
    return figures, path


def show_defects(environments: Path | None, problem: Path) -> dict[str, float]:
    """Print what the peers' own code gives where it is known to be wrong; returns the figures."""
    print("\nknown defects, by the peers' own code")
    print(f"  {'':<62}{'found':>10}{'right':>10}")
    figures = {}
    for row in DEFECTS:
        found = run(row, environments, problem)
        print(f" {row.name}: {found.failure or found.about['version']}", flush=True)
        for what, value, right in found.about.get("rows", []):
            print(f"  {what:<62}{value:>10.3g}{right:>10.3g}")
            figures[f"defect {row.name}: {what}"] = value
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", type=Path, metavar="DIR", help="make the peers' environments in this folder, and end")
    parser.add_argument(
        "--clones", type=Path, metavar="DIR", help="with --setup: clones of hypertorch and betty, by these names"
    )
    parser.add_argument("--environments", type=Path, metavar="DIR", help="where they are; without it the peers are left out")
    parser.add_argument("--quick", action="store_true", help="few methods, T = 100 and float64 only; within a minute")
    given = parser.parse_args()
    if given.setup:
        set_up(given.setup.absolute(), given.clones and given.clones.absolute())
        return
    torch.set_num_threads(1)
    environments = given.environments.absolute() if given.environments else None
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        short = unrolled_reference(SHORT)
        for dtype in (torch.float64,) if given.quick else (torch.float64, torch.float32):
            rows = [row for row in UNROLLED if not given.quick or row.name in IN_QUICK]
            figures |= compare_unrolled(SHORT, dtype, environments, folder, short, rows)
            figures |= ratios(f"T{SHORT}_{str(dtype).removeprefix('torch.')}", figures)
        if not given.quick:
            figures |= compare_unrolled(LONG, torch.float64, environments, folder, unrolled_reference(LONG), UNROLLED + LEAN)
            figures |= ratios(f"T{LONG}", figures)
            wide = unrolled_reference(WIDE, WIDE_SIZE)
            figures |= compare_unrolled(WIDE, torch.float32, environments, folder, wide, UNROLLED)
            figures |= ratios("wide", figures)
        rows = [row for row in IMPLICIT if not given.quick or row.name in IN_QUICK]
        of_implicit, problem = compare_implicit(environments, folder, rows)
        figures |= of_implicit
        if not given.quick:
            figures |= show_defects(environments, problem)
    met = all(
        figures[name] <= bound if sign == "<=" else figures[name] >= bound
        for name, (sign, bound) in TARGETS.items()
        if name in figures
    )
    complete = given.quick or all(name in figures for name in TARGETS)
    found = {"benchmark": "hypergradient_peers", "figures": figures, "targets": TARGETS, "met": bool(met and complete)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
