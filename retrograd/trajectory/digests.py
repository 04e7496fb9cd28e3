"""Digests of a run: what makes a torn, altered or exchanged file visible.

    d_0     = H(manifest, data root, digest of the initial state)
    d_{t+1} = H(d_t, example ids, weights, hyperparameters, seed of step t)

The chain covers what went *into* each step. What came out is covered by the digest of every stored state. H is SHA-256.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from retrograd.trajectory.examples import Examples
from retrograd.trajectory.state import StepRecord, TrainingState
from retrograd.trajectory.update_map import UpdateMap


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the raw bytes of a tensor of any type."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Digest of named tensors: names, types, shapes and contents, in the order of names."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        hasher.update(f"{name}:{tensors[name].dtype}:{tuple(tensors[name].shape)};".encode())
        hasher.update(tensor_bytes(tensors[name]))
    return hasher.hexdigest()


def state_digest(state: TrainingState) -> str:
    """Digest of everything in a state, its step included."""
    return hashlib.sha256(f"{state.step}:{tensors_digest(state.tensors())}".encode()).hexdigest()


def description(update_map: UpdateMap) -> dict[str, Any]:
    """Describe an update map so that another one can be compared with it: model, task, optimizer."""
    model, task, rule = update_map.model, update_map.task, update_map.rule
    trained = {name for group in update_map.groups for name in group}
    frozen = {name: leaf for name, leaf in model.named_parameters() if name not in trained}
    module = update_map.meta_module
    meta = (
        {
            "class": type(module).__qualname__,
            "parameters": tensors_digest(update_map.meta),
            # What is not learned is read off the module.
            "rest": tensors_digest({name: leaf for name, leaf in module.state_dict().items() if name not in update_map.meta}),
        }
        if module is not None
        else None
    )
    gradient = update_map.gradient
    game = {} if gradient.players.keys() == {""} else {"players": gradient.players, "turns": gradient.turns}
    return {
        **({} if meta is None else {"meta": meta}),
        **{name: json.loads(json.dumps(value)) for name, value in game.items()},  # as a manifest gives them back
        **({} if gradient.direction is None else {"direction": _describe(gradient.direction)}),
        "model": {
            "class": type(model).__qualname__,
            "parameters": {
                name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in model.named_parameters() if name in trained
            },
            "buffers": {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in model.named_buffers()},
            "frozen": tensors_digest(frozen),
            "evaluation_modules": list(update_map.evaluation_modules),
        },
        "task": _describe(task),
        "rule": _describe(rule),
        "groups": [list(group) for group in update_map.groups],
        "clip_norm": update_map.clip_norm,
    }


def genesis(update_map: UpdateMap, examples: Examples, initial: TrainingState) -> str:
    """Return d_0, the digest of what was there before the first step."""
    content = json.dumps(description(update_map), sort_keys=True)
    return hashlib.sha256(f"{content}|{examples.root()}|{state_digest(initial)}".encode()).hexdigest()


def link(previous: str, record: StepRecord) -> str:
    """Return d_{t+1} from d_t and the record of step t."""
    weights = b"" if record.weights is None else tensor_bytes(record.weights)
    rest = json.dumps([[dict(own) for own in record.hyper], record.seed], sort_keys=True)
    ids = tensor_bytes(record.example_ids)
    return hashlib.sha256(b"|".join([previous.encode(), ids, weights, rest.encode()])).hexdigest()


def chain(start: str, records: Sequence[StepRecord]) -> list[str]:
    """Return d_1 … d_T."""
    digests = []
    for record in records:
        digests.append(link(digests[-1] if digests else start, record))
    return digests


def _describe(thing: Any) -> dict[str, Any]:
    options = {one.name: getattr(thing, one.name) for one in fields(thing)} if is_dataclass(thing) else {}
    return {"class": type(thing).__qualname__, "options": {name: _plain(value) for name, value in options.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if is_dataclass(value) or type(value).__repr__ is object.__repr__:  # a memory address says nothing tomorrow
        return _describe(value)
    return repr(value)
