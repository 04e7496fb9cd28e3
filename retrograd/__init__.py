"""retrograd: differentiate through training.

Record a training run once, then ask it which training data made the model do what it does::

    run = retrograd.record(model, dataset, Classification(), optimizer=..., epochs=12, batch_size=64)
    scores = retrograd.attribute(run, queries)
    scores.top(query=0, k=5)

The verbs: `record`, `open_run`, `attribute`, `self_influence`, `check`, `retrain`, `evaluate`, `find_mislabelled`, `prune`,
`reweight`, `roughness`, `coverage`, `citation`.
"""

from retrograd.adjoint import Blend, Implicit, Queries, Source, TracIn, Unrolled
from retrograd.attribution import Agreement, Check, Coverage, Ranked, Scores, attribute, coverage, self_influence
from retrograd.citations import citation
from retrograd.curvature import EKFAC, KFAC, Fisher
from retrograd.evaluation import (
    Brittleness,
    Detection,
    Retrained,
    Study,
    TailPatch,
    additive_ceiling,
    brittleness,
    calibration,
    check,
    evaluate,
    leave_one_out,
    linear_datamodeling_score,
    mislabelled_detection,
    noise_ceiling,
    one_seed_wall,
    random_subsets,
    retrain,
    tail_patch,
)
from retrograd.progress import reporting
from retrograd.selection import (
    Distillation,
    Effect,
    Selection,
    find_mislabelled,
    prune,
    reweight,
    suggested_weight,
    with_teacher,
)
from retrograd.task import Classification, Regression, Task
from retrograd.trajectory import (
    All,
    CheckpointSeries,
    Counterfactual,
    Every,
    Examples,
    Recorder,
    Roughness,
    Sqrt,
    Trajectory,
    Treeverse,
    UpdateMap,
    open_run,
    record,
    roughness,
)

__version__ = "0.1.0"

__all__ = [
    "EKFAC",
    "KFAC",
    "Agreement",
    "All",
    "Blend",
    "Brittleness",
    "Check",
    "CheckpointSeries",
    "Classification",
    "Counterfactual",
    "Coverage",
    "Detection",
    "Distillation",
    "Effect",
    "Every",
    "Examples",
    "Fisher",
    "Implicit",
    "Queries",
    "Ranked",
    "Recorder",
    "Regression",
    "Retrained",
    "Roughness",
    "Scores",
    "Selection",
    "Source",
    "Sqrt",
    "Study",
    "TailPatch",
    "Task",
    "TracIn",
    "Trajectory",
    "Treeverse",
    "Unrolled",
    "UpdateMap",
    "additive_ceiling",
    "attribute",
    "brittleness",
    "calibration",
    "check",
    "citation",
    "coverage",
    "evaluate",
    "find_mislabelled",
    "leave_one_out",
    "linear_datamodeling_score",
    "mislabelled_detection",
    "noise_ceiling",
    "one_seed_wall",
    "open_run",
    "prune",
    "random_subsets",
    "record",
    "reporting",
    "retrain",
    "reweight",
    "roughness",
    "self_influence",
    "suggested_weight",
    "tail_patch",
    "with_teacher",
]
