"""What a record cannot hold, and runs that are not the recorded one: found and refused, with what to do."""

import sys
from typing import Any

import torch
from torch import nn

from retrograd.errors import DataChanged, ModelChanged, UnsupportedHook, UnsupportedScaler
from retrograd.trajectory import digests
from retrograd.trajectory.examples import Examples
from retrograd.trajectory.update_map import UpdateMap


def refuse_hooks(model: nn.Module, optimizer: torch.optim.Optimizer, ours: int = 0) -> None:
    """Refuse hooks that change gradients or parameters where a replay would not see them."""
    found = [f"a gradient hook on parameter {name}" for name, leaf in model.named_parameters() if leaf._backward_hooks]
    found += [
        f"a post-accumulate hook on parameter {name}"
        for name, leaf in model.named_parameters()
        if getattr(leaf, "_post_accumulate_grad_hooks", None)
    ]
    found += [
        f"a backward hook on module {name or '(the model)'}"
        for name, module in model.named_modules()
        if module._backward_hooks or module._backward_pre_hooks
    ]
    if len(optimizer._optimizer_step_pre_hooks) > ours or optimizer._optimizer_step_post_hooks:
        found.append("a step hook on the optimizer")
    if found:
        raise UnsupportedHook(
            f"the record cannot replay {', '.join(found[:3])}{' and others' if len(found) > 3 else ''}. Remove it, or write "
            "what it does into the model or the task's losses. Global-norm clipping is supported: clip_norm=."
        )


def refuse_scaler() -> None:
    """Refuse a gradient scaler: it leaves no trace on the optimizer and is visible only as a caller of its step."""
    frame = sys._getframe(1)
    for _ in range(12):
        if frame is None:
            return
        scaler = frame.f_locals.get("self")
        if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled():
            raise UnsupportedScaler(
                "a GradScaler calls optimizer.step(): it rescales gradients and skips steps, which the record does not hold. "
                "Train in float32 or bfloat16 without a scaler."
            )
        frame = frame.f_back


def check_same_run(manifest: dict[str, Any], update_map: UpdateMap, examples: Examples) -> None:
    """Compare a manifest with the model, task, optimizer and data that are to go on with it.

    Raises:
        ModelChanged: model, task or optimizer differ, with what differs.
        DataChanged: the data set differs.
    """
    if "meta" in manifest and update_map.meta_module is None:
        raise ModelChanged(f"the run was trained with a meta-module, {manifest['meta']['class']}: give it as meta=.")
    if "direction" in manifest and update_map.gradient.direction is None:
        raise ModelChanged(f"the run was trained along a direction, {manifest['direction']}: give it as direction=.")
    for key, now in digests.description(update_map).items():
        if manifest.get(key) != now:
            raise ModelChanged(f"{key} is not what was recorded: {_difference(manifest.get(key), now)}.")
    if manifest["data"]["count"] != len(examples):
        raise DataChanged(f"the record has {manifest['data']['count']} examples, the data set given has {len(examples)}.")
    if manifest["data"]["root"] != examples.root():
        raise DataChanged(
            "the contents or ids of the data set are not those that were recorded. `RUN/data.parquet` has the digest of each "
            "example. A data set that is random (augmentation) cannot be recorded; move randomness into the task's losses."
        )


def _difference(recorded: Any, now: Any) -> str:
    if isinstance(recorded, dict) and isinstance(now, dict):
        for key in sorted(set(recorded) | set(now)):
            if recorded.get(key) != now.get(key):
                return f"{key}: " + _difference(recorded.get(key), now.get(key))
    return f"recorded {recorded!r}, given {now!r}"
