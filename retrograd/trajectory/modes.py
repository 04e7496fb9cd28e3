"""The settings in which a model runs: modes of its modules, and where its random numbers come from."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def step_seed(seed: int, number: int) -> int:
    """Return the seed of one step's random numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded(seed: int, params: Mapping[str, Tensor]) -> Iterator[None]:
    """Draw this step's random numbers from ``seed`` and give the global generators back as they were."""
    device = next(iter(params.values())).device
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    before = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


@contextmanager
def training_mode(model: nn.Module, evaluation_modules: Sequence[str]) -> Iterator[None]:
    """Put all modules but the named ones into training mode, and back as they were."""
    with _keeping_modes(model):
        model.train()
        for name in evaluation_modules:
            model.get_submodule(name).training = False
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put all modules into evaluation mode, and back as they were."""
    with _keeping_modes(model):
        model.eval()
        yield


@contextmanager
def _keeping_modes(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
