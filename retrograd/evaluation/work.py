"""The parts of a study put to work, in this process or in others.

A part is some subsets of one seed. Where a study has a folder, a part is claimed before it is made and written when it is
finished; without one its measurements stay in memory.
"""

import pickle  # noqa: TID251  # between our own processes only; never in a file, never from a stranger
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import lru_cache
from time import sleep

import numpy as np
import torch
from torch import Tensor

from retrograd.errors import InputError
from retrograd.evaluation.program import Program
from retrograd.evaluation.study import Study, part_rows

_IN_FLIGHT = 32  # parts that an executor is given ahead; another process that shares the folder finds the rest


class Work:
    """The parts of a study, made here or elsewhere; both are iterators that yield once a step, for the progress."""

    def __init__(self, program: Program, factors: Tensor, study: Study | None):
        self._program, self._factors, self._study = program, factors, study
        self._seeds = list(program.starts)
        self._parts = part_rows(len(factors), len(self._seeds), program.together)
        self._steps = [program.steps(factors[rows]) for rows, _ in self._parts]
        self._open = list(range(len(self._parts)))
        self._found: dict[int, Tensor] = {}
        self.steps = sum(self._steps)

    def here(self) -> Iterator[None]:
        """Make the parts in this process."""
        while self._open:
            for part in list(self._open):
                with self._claim(part) as mine:
                    if mine:
                        rows, seed = self._parts[part]
                        self._keep(part, (yield from self._program.train(self._factors[rows], rows, self._seeds[seed])))
                yield from self._close(part, counted=mine)
            self._wait_for_others()

    def elsewhere(self, executor: Executor) -> Iterator[None]:
        """Have the parts made by an executor; their locks are held here, where their files are written."""
        job = _packed(self._program)
        flying: dict[Future, tuple[int, ExitStack]] = {}
        try:
            while self._open:
                for part in [part for part in self._open if part not in {number for number, _ in flying.values()}]:
                    if len(flying) == _IN_FLIGHT:
                        break
                    with ExitStack() as stack:
                        if stack.enter_context(self._claim(part)):
                            rows, seed = self._parts[part]
                            given = (self._factors[rows].numpy(), rows.numpy(), self._seeds[seed])
                            flying[executor.submit(_train_there, job, *given)] = (part, stack.pop_all())
                            continue
                    yield from self._close(part, counted=False)
                for future in wait(flying, timeout=1.0, return_when=FIRST_COMPLETED).done:
                    part, stack = flying.pop(future)
                    with stack:
                        self._keep(part, torch.tensor(future.result()))
                    yield from self._close(part, counted=False)
                if not flying:
                    self._wait_for_others()
        finally:
            for future, (_, stack) in flying.items():
                future.cancel()
                stack.close()

    def gathered(self) -> Tensor:
        """Put the measurements of all parts together."""
        first = self._found[0]
        values = first.new_empty(len(self._factors), len(self._seeds), first.shape[1])
        for part, (rows, seed) in enumerate(self._parts):
            values[rows, seed] = self._found[part]
        return values

    def _claim(self, part: int) -> AbstractContextManager[bool]:
        return nullcontext(True) if self._study is None else self._study.claim(part)

    def _keep(self, part: int, values: Tensor) -> None:
        if self._study is None:
            self._found[part] = values
        else:
            rows, seed = self._parts[part]
            self._study.write(part, rows, self._seeds[seed], self._factors[rows], self._program.queries.ids, values)

    def _close(self, part: int, counted: bool) -> Iterator[None]:
        """Take a part off the list if it is finished, by whomever, and count its steps if they were not counted."""
        if part in self._found or (self._study is not None and self._study.has(part)):
            self._open.remove(part)
            yield from () if counted else (None for _ in range(self._steps[part]))

    def _wait_for_others(self) -> None:
        if self._open:
            sleep(0.2)  # other processes hold the locks of what is left; if one is killed, its parts come free


def _packed(program: Program) -> bytes:
    try:
        return pickle.dumps(program)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(
            f"the run cannot be sent to another process: {error}. Define the model, the task and the data set at the top of a "
            "module that can be imported."
        ) from error


@lru_cache(maxsize=1)
def _unpacked(job: bytes) -> Program:
    return pickle.loads(job)


def _train_there(job: bytes, factors: np.ndarray, numbers: np.ndarray, seed: int | None) -> np.ndarray:
    # Arrays, not tensors: between processes torch moves tensors to shared memory, of which containers have little. They are
    # copied, because those that come out of a store may be read-only.
    training = _unpacked(job).train(torch.tensor(factors), torch.tensor(numbers), seed)
    while True:
        try:
            next(training)
        except StopIteration as end:
            return end.value.numpy()
