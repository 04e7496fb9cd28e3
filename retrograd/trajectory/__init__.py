"""Training runs as sequences of update maps: states, inputs, the map and its Jacobian products, recording and replay."""

from retrograd.trajectory.checkpoint_series import CheckpointSeries
from retrograd.trajectory.checkpoints import MemoryCheckpoints
from retrograd.trajectory.counterfactual import Counterfactual
from retrograd.trajectory.examples import Examples
from retrograd.trajectory.record import batch_order, open_run, record
from retrograd.trajectory.recorder import Recorder
from retrograd.trajectory.roughness import Roughness, roughness
from retrograd.trajectory.schedule import All, Every, Schedule, Sqrt, Treeverse
from retrograd.trajectory.starts import fresh_model, fresh_start
from retrograd.trajectory.state import StateVectors, StepInputs, StepRecord, TrainingState
from retrograd.trajectory.step_graph import Route, StepCurvature
from retrograd.trajectory.step_inputs import InputVectors
from retrograd.trajectory.trajectory import Run, Trajectory
from retrograd.trajectory.update_map import Pullback, UpdateMap

__all__ = [
    "All",
    "CheckpointSeries",
    "Counterfactual",
    "Every",
    "Examples",
    "InputVectors",
    "MemoryCheckpoints",
    "Pullback",
    "Recorder",
    "Roughness",
    "Route",
    "Run",
    "Schedule",
    "Sqrt",
    "StateVectors",
    "StepCurvature",
    "StepInputs",
    "StepRecord",
    "TrainingState",
    "Trajectory",
    "Treeverse",
    "UpdateMap",
    "batch_order",
    "fresh_model",
    "fresh_start",
    "open_run",
    "record",
    "roughness",
]
