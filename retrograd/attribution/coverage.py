"""What a derivative through this run covers, told before compute is spent."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from retrograd.adjoint import Adjoint, Blend, FirstOrder, FixedPoint, Unrolled
from retrograd.curvature import EKFAC, KFAC
from retrograd.curvature.layers import find_layers
from retrograd.trajectory import Run
from retrograd.trajectory.trajectory import to_device


@dataclass(frozen=True)
class Coverage:
    """What is differentiated, and what a reader of the scores must know.

    Attributes:
        trained: scalars in trained parameters; exact methods differentiate by all of them.
        frozen: scalars in parameters that were not trained.
        tied: groups of names that share one tensor, each counted once.
        dtype: precision of the parameters.
        random: modules that draw random numbers, replayed from the recorded step seeds.
        coupled: modules through which the examples of a batch see each other (a weight of zero is not the same as absence).
        kinks: modules with no derivative somewhere (ReLU, max-pooling).
        notes: anything else.
    """

    trained: int
    frozen: int
    tied: tuple[tuple[str, ...], ...]
    dtype: str
    random: tuple[str, ...]
    coupled: tuple[str, ...]
    kinks: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def share(self) -> float:
        """Share of the model's scalars that is covered; the frozen rest had no gradient."""
        return self.trained / max(self.trained + self.frozen, 1)

    def __str__(self) -> str:
        """Describe it in a few lines."""
        lines = [f"covers {self.trained:,} of {self.trained + self.frozen:,} parameters ({self.share:.0%}) in {self.dtype}"]
        lines += [f"tied: {' = '.join(names)}" for names in self.tied]
        for label, names in (("random", self.random), ("couples examples", self.coupled), ("has kinks", self.kinks)):
            if names:
                lines.append(f"{label}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}")
        return "\n".join([*lines, *self.notes])


def coverage(run: Run, method: Adjoint | None = None) -> Coverage:
    """Say what a derivative through ``run`` covers, and what a method approximates of it.

    Args:
        run: the recorded run.
        method: a method of attribution; exact unrolling if not given.
    """
    model = run.update_map.model
    trained = {name for group in run.update_map.groups for name in group}
    named = dict(model.named_parameters())
    owners: dict[int, list[str]] = {}
    for name, leaf in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(leaf), []).append(name)
    dtypes = sorted({str(named[name].dtype).removeprefix("torch.") for name in trained})
    notes = []
    if dtypes != ["float64"] and dtypes != ["float32"]:
        notes.append("reduced precision: products of Jacobians lose digits with every step; prefer float32")
    if run.update_map.clip_norm is not None:
        notes.append(f"gradient clipping at norm {run.update_map.clip_norm:g} is part of the derivative")
    if torch.backends.cuda.matmul.allow_tf32:
        notes.append("TF32 is on: replays are not bit for bit")
    random, coupled = _modules(model, (nn.modules.dropout._DropoutNd, nn.RReLU)), _modules(model, (_BatchNorm,))
    parts = list(method.methods) if isinstance(method, Blend) else [method or Unrolled()]
    if (random or coupled) and not all(isinstance(part, Unrolled | FixedPoint | FirstOrder) for part in parts):
        notes.append(
            "approximate methods take losses in evaluation mode: without dropout, and with batch norm's running averages"
        )
    kronecker = next((part for part in parts if isinstance(getattr(part, "curvature", None), EKFAC | KFAC)), None)
    if kronecker is not None:
        notes.append(_kronecker(run, {name: named[name].numel() for name in trained}))
    return Coverage(
        trained=sum(named[name].numel() for name in trained),
        frozen=sum(leaf.numel() for name, leaf in named.items() if name not in trained),
        tied=tuple(tuple(names) for names in owners.values() if len(names) > 1),
        dtype=", ".join(dtypes),
        random=random,
        coupled=coupled,
        kinks=_modules(model, (nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)),
        notes=tuple(notes),
    )


def _modules(model: nn.Module, kinds: tuple[type, ...]) -> tuple[str, ...]:
    return tuple(name or type(module).__name__ for name, module in model.named_modules() if isinstance(module, kinds))


def _kronecker(run: Run, sizes: dict[str, int]) -> str:
    """Say which parameters have Kronecker factors and which have the diagonal alone; looks at three examples."""
    state, probes = run.state(0), run.examples.ids[:3]
    batch = to_device(run.examples.batch(probes), next(iter(state.params.values())).device)
    layers = find_layers(run.update_map, state, batch, len(probes))
    covered = {name for layer in layers for name in (layer.weight, layer.bias) if name is not None}
    rest = [name for name in sizes if name not in covered]
    share = sum(sizes[name] for name in covered) / max(sum(sizes.values()), 1)
    text = f"curvature: Kronecker factors for {len(layers)} layers with {share:.0%} of the parameters"
    return text + (f", the exact diagonal for {', '.join(sorted(rest)[:5])}{' …' if len(rest) > 5 else ''}" if rest else "")
