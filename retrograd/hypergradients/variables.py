"""What a meta-optimisation changes: variables, and the training that they make.

| name | variable | becomes |
|---|---|---|
| ``meta`` | the meta-parameters | themselves |
| ``learning_rate``, ``weight_decay``, ``clip_norm``, … | log h of each group, so that h stays positive | exp |
| ``example_weights`` | w_i, one an example: a factor on its recorded weight | itself |
| ``inputs``, ``labels`` | the data themselves; integer labels as one-hot rows | themselves |
| ``initial_params`` | parameters before the first step | themselves |
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retrograd.errors import InputError
from retrograd.hypergradients.result import Hypergradient
from retrograd.params import Params
from retrograd.task import SplitTask
from retrograd.trajectory import Examples, Trajectory

_DATA = ("inputs", "labels")


class Variables:
    """The variables of a training, flat by name: ``meta/<name>``, ``learning_rate``, ``initial_params/<name>``, ….

    Args:
        run: the training whose inputs they are.
        names: which inputs.

    Raises:
        InputError: the run has no such input, or it can't be changed this way.
    """

    def __init__(self, run: Trajectory, names: tuple[str, ...]):
        self._run, self.names = run, names
        known = run.update_map.inputs_of(run.inputs(0)) | {"example_weights", "initial_params"}
        unknown = sorted(set(names) - known)
        if unknown or not names:
            raise InputError(f"{unknown} did not go into this training. What did: {sorted(known)}.")
        batch = run.inputs(0).batch
        if isinstance(batch, Mapping) and {*batch} & {*names}:
            raise InputError("data in dicts can't be learned; let the meta-module hold them as parameters.")

    def start(self) -> dict[str, Tensor]:
        """Return their values in the recorded run."""
        run, found = self._run, {}
        some = next(iter(run.state(0).params.values()))
        for name in self.names:
            if name == "meta":
                found |= {f"meta/{own}": leaf.clone() for own, leaf in run.update_map.meta.items()}
            elif name == "initial_params":
                found |= {f"initial_params/{own}": leaf.clone() for own, leaf in run.state(0).params.items()}
            elif name == "example_weights":
                found[name] = some.new_ones(len(run.examples))
            elif name in _DATA:
                found[name] = self._data(name)
            elif name == "clip_norm":
                found[name] = some.new_tensor([run.update_map.clip_norm]).log()
            else:
                found[name] = some.new_tensor([self._number(name, group) for group in range(len(run.update_map.groups))]).log()
        return found

    def changes(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the keywords of `Trajectory.rerun` that train with these values."""
        run, options, hyper = self._run, {}, {}
        for name in self.names:
            if name == "meta":
                options["meta"] = _under(values, "meta/")
            elif name == "initial_params":
                options["initial"] = replace(run.state(0), params=_under(values, "initial_params/"))
            elif name == "example_weights":
                options["weights"] = values[name].detach()
            elif name == "clip_norm":
                options["clip_norm"] = values[name].detach().exp().item()
            elif name not in _DATA:
                hyper[name] = values[name].detach().exp().double()
        if hyper:
            options["hyper"] = hyper
        data = {name: values[name].detach() for name in self.names if name in _DATA}
        if data:
            options |= data_changes(run, data)
        return options

    def gradient(self, found: Hypergradient, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the derivative of the first question by the variables."""
        gradient: dict[str, Tensor] = {}
        for name in self.names:
            own = found[name]
            if isinstance(own, dict):
                gradient |= {f"{name}/{key}": leaf[0] for key, leaf in own.items()}
            elif name == "example_weights":
                gradient[name] = own[0] * recorded_weights(self._run).to(own)
            elif name in _DATA:
                gradient[name] = own[0]
            else:
                gradient[name] = own[0] * values[name].detach().exp()
        return gradient

    def _number(self, name: str, group: int) -> float:
        value = float(self._run.records[0].hyper[group].get(name, 0.0))
        if not value > 0:
            raise InputError(
                f"{name} is learned on a logarithmic scale, and starts at {value}; record with a small positive one."
            )
        if any(record.hyper[group][name] != value for record in self._run.records):
            raise InputError(
                f"{name} of this run changes from step to step, and one number would be learned in its place; record with a "
                "constant one."
            )
        return value

    def _data(self, name: str) -> Tensor:
        data = self._run.examples.batch(self._run.examples.ids)
        tensor = (data if isinstance(data, Tensor) else data[_DATA.index(name)]).clone()
        if tensor.is_floating_point():
            return tensor
        if name == "inputs":
            raise InputError("inputs of this run are integers and can't be learned.")
        return one_hot_labels(self._run, tensor)


def recorded_weights(run: Trajectory) -> Tensor:
    """Return the weight that each example was recorded with, ``[example]``; 1 where it was in no batch.

    Raises:
        InputError: an example had several weights.
    """
    weights = torch.ones(len(run.examples), dtype=torch.float64)
    for record in run.records:
        if record.weights is not None:
            weights[run.examples.rows(record.example_ids)] = record.weights.double()
    for record in run.records:
        own = weights[run.examples.rows(record.example_ids)]
        if not torch.equal(own, own.new_ones(len(own)) if record.weights is None else record.weights.double()):
            raise InputError("an example of this run has another weight in another step; one number can't stand for both.")
    return weights


def one_hot_labels(run: Trajectory, labels: Tensor) -> Tensor:
    """Return integer labels as rows of the distribution that they stand for, as many classes as the model has outputs."""
    task, state = run.update_map.task, run.state(0)
    if not isinstance(task, SplitTask):
        raise InputError(
            f"integer labels become distributions where the task says that its outputs are logits [batch, class]; "
            f"{type(task).__name__} does not (see `retrograd.task.SplitTask`)."
        )
    outputs = run.update_map.ask(lambda model: task.outputs(model, run.examples.batch(run.examples.ids[:1])), state)
    return F.one_hot(labels, outputs.shape[1]).to(outputs.dtype)


def data_changes(run: Trajectory, data: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the keywords of `Trajectory.rerun` that train on other inputs or labels of the same examples."""
    own = run.examples.batch(run.examples.ids)
    if isinstance(own, Mapping):
        return {"examples": Examples({**own, **data}, run.examples.ids)}
    if isinstance(own, Tensor):
        return {"examples": Examples(data["inputs"], run.examples.ids)}
    parts = [data.get(name, part) for name, part in zip(_DATA, own, strict=False)]
    return {"examples": Examples((*parts, *own[len(parts) :]), run.examples.ids)}


def _under(values: Mapping[str, Tensor], prefix: str) -> Params:
    return {name.removeprefix(prefix): leaf.detach().clone() for name, leaf in values.items() if name.startswith(prefix)}
