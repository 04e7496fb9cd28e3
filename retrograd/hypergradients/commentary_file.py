"""A commentary as something to keep: beside the data it is about, and for any model that is trained on them later.

    FILE.safetensors    φ, under the names of the module's parameters, and as plain values:
                        kind      which task applies it, with its options
                        data      digest of all examples' ids and contents, `Examples.root`
                        digest    of φ; runs trained with it have the same in their description
                        module    class and parts, names and shapes of parameters, digest of what was not learned
                        provenance    digests of the runs that were trained again and again, outcomes, validation
                        verification  the arms of an `audit`, or nothing: then it is not known whether it is good for anything

The file holds data, never code: the module is given again when it is opened, and compared. It has a digest of all of itself.

Cost: none to speak of, but for the digest of the data: one pass.

Source: Raghu et al. (2021), "Teaching with commentaries", section 1: commentaries "stored with a dataset". The form is ours.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from retrograd.errors import CorruptRecord, DataChanged, InputError, ModelChanged
from retrograd.files import read_tensors, write_tensors
from retrograd.hypergradients.audit import Audit
from retrograd.hypergradients.chain import Chain
from retrograd.hypergradients.commentary import Blended, Masked, Weighted
from retrograd.hypergradients.meta_training import MetaTraining
from retrograd.params import Params
from retrograd.trajectory import Examples
from retrograd.trajectory.digests import tensors_digest

FORMAT = 1
KINDS: dict[str, type] = {kind.__name__: kind for kind in (Weighted, Blended, Masked)}
_KEYS = {"format", "kind", "options", "data", "digest_of_parameters", "module", "provenance", "verification"}


@dataclass(frozen=True)
class Commentary:
    """A learned commentary, to be saved with its data and used for other models.

    ::

        Commentary.of(found, audit(found, test)).save("digits-weights.safetensors")
        ...
        commentary = Commentary.open("digits-weights.safetensors", ExampleWeights(500), data)
        run = record(other_model, data, commentary.task(Classification()), meta=commentary.module, ...)

    Attributes:
        module: the meta-module, with what was learned.
        kind: name of the task that applies it: ``"Weighted"``, ``"Blended"`` or ``"Masked"``.
        options: of that task.
        data: digest of the data it was learned on.
        provenance: what it was learned from, and with what outcome.
        verification: what an audit found, or None.
    """

    module: nn.Module
    kind: str
    options: Mapping[str, Any]
    data: str
    provenance: Mapping[str, Any]
    verification: Mapping[str, Any] | None = None

    citation: ClassVar[str] = """@inproceedings{raghu2021teaching,
  title = {Teaching with Commentaries},
  author = {Raghu, Aniruddh and Raghu, Maithra and Kornblith, Simon and Duvenaud, David and Hinton, Geoffrey},
  booktitle = {International Conference on Learning Representations}, year = {2021}
}"""

    @staticmethod
    def of(found: MetaTraining, audit: Audit | None = None, **notes: str | int | float | bool) -> "Commentary":
        """Take what a meta-training of ``meta`` found.

        Args:
            found: what `meta_train` returned, of a run of `Weighted`, `Blended` or `Masked`.
            audit: what retraining with it came to.
            notes: plain values that are kept with the provenance, for example how it was learned.

        Raises:
            InputError: no commentary was learned.
        """
        stages = found.recipe.stages if isinstance(found.recipe, Chain) else (found.recipe,)
        run = stages[found.stage]
        task: Any = run.update_map.task
        module = run.update_map.meta_module
        kind = type(task).__name__
        if found.names != ("meta",) or module is None or type(task) is not KINDS.get(kind):
            raise InputError(
                f"a commentary is learned by meta_train(run, ..., 'meta') of a run whose task is one of {sorted(KINDS)}; got "
                f"{list(found.names)} of {kind}."
            )
        options = {one.name: getattr(task, one.name) for one in fields(task) if one.name != "task"}
        history = found.history
        provenance = {
            **notes,
            "runs": [own.digest for own in stages],
            "outer_steps": len(history),
            "outcome": [history[0].outcome, history[-1].outcome],
            "validation": [one.validation for one in history] if history[0].validation is not None else None,
            "best": found.best,
        }
        told = _told(audit) if audit is not None else None
        return Commentary(_loaded(module, found.meta), kind, options, run.examples.root(), provenance, told)

    @property
    def digest(self) -> str:
        """Digest of what was learned; the description of a run that is trained with it has the same."""
        return tensors_digest(_learned(self.module))

    def task(self, task: Any, **options: Any) -> Any:
        """Return ``task`` with this commentary on its training data.

        Args:
            task: what is trained, for example ``Classification()``.
            options: other options of the commentary's task than those it was learned with, for example ``steps=200``.
        """
        return KINDS[self.kind](task, **{**self.options, **options})

    def verified(self, audit: Audit) -> "Commentary":
        """Return the same with the record of an audit."""
        return replace(self, verification=_told(audit))

    def save(self, file: str | PathLike[str]) -> None:
        """Write it as one safetensors file, whole or not at all."""
        about = {
            "format": FORMAT,
            "kind": self.kind,
            "options": dict(self.options),
            "data": self.data,
            "digest_of_parameters": self.digest,
            "module": _description(self.module),
            "provenance": dict(self.provenance),
            "verification": None if self.verification is None else dict(self.verification),
        }
        write_tensors(Path(file), _learned(self.module), about)

    @staticmethod
    def open(file: str | PathLike[str], module: nn.Module, data: Any) -> "Commentary":
        """Read what `save` wrote.

        Args:
            file: the file.
            module: a module of the same structure as the one that was learned; its parameters may have any values. A copy of it
                gets those of the file.
            data: the data that it is about. None for other data of the same kind, with which it was never tried.

        Raises:
            CorruptRecord: the file is torn or altered, or no commentary.
            ModelChanged: the module is another one.
            DataChanged: it was learned on other data.
        """
        tensors, about = read_tensors(Path(file))
        if not about.keys() >= _KEYS or about["format"] != FORMAT or about["kind"] not in KINDS:
            raise CorruptRecord(f"{file} is no commentary of format {FORMAT}, which this version of retrograd reads.")
        kept, given = about["module"], _description(module)
        differ = sorted(name for name in {*kept, *given} if kept.get(name) != given.get(name))
        if differ:
            raise ModelChanged(
                f"{file} holds a commentary by {_short(kept, differ)}; got {_short(given, differ)}. Give one that is built "
                "in the same way."
            )
        if data is not None and (root := Examples.of(data).root()) != about["data"]:
            raise DataChanged(
                f"{file} is about data with the digest {about['data'][:12]}…; these have {root[:12]}…. Give the same examples "
                "in the same order with the same ids (and column of rows, if it has weights by example)."
            )
        return Commentary(
            _loaded(module, tensors), about["kind"], about["options"], about["data"], about["provenance"], about["verification"]
        )

    def __str__(self) -> str:
        """Say what it is, where it comes from, and what is known of it."""
        first, last = self.provenance["outcome"]
        lines = [
            f"commentary {self.digest[:12]} ({self.kind}, {type(self.module).__name__}) on data {self.data[:12]}",
            f"learned in {self.provenance['outer_steps']} outer steps: outcome {first:.4f} -> {last:.4f}",
        ]
        if self.verification is None:
            return "\n".join([*lines, "not verified: no audit says whether retraining with it helps"])
        arms = self.verification["arms"]
        return "\n".join([*lines, *(f"  {name:<22}{sum(own) / len(own):.4f}" for name, own in arms.items())])


def _learned(module: nn.Module) -> Params:
    return {name: leaf.detach() for name, leaf in module.named_parameters() if leaf.requires_grad}


def _loaded(module: nn.Module, params: Params) -> nn.Module:
    own = deepcopy(module)
    with torch.no_grad():
        for name, leaf in _learned(own).items():
            leaf.copy_(params[name])
    return own


def _description(module: nn.Module) -> dict[str, Any]:
    learned = _learned(module)
    return {
        "parts": [[name, type(part).__qualname__] for name, part in module.named_modules()],
        "parameters": {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in learned.items()},
        "rest": tensors_digest({name: leaf for name, leaf in module.state_dict().items() if name not in learned}),
    }


def _short(described: Mapping[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name} {str(described.get(name))[:160]}" for name in names)


def _told(audit: Audit) -> dict[str, Any]:
    arms = {arm["name"]: list(arm["outcomes"]) for arm in asdict(audit)["arms"]}
    return {"arms": arms, "larger_is_better": audit.larger_is_better, "learned": audit.learned, "memorised": audit.memorised}
