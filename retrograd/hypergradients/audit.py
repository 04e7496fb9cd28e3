"""What did the variables learn, and what did the model memorise? The controls that every meta-training needs.

| arm | trains | if it is as good as the others |
|---|---|---|
| ``meta-trained`` | nothing: the model at the end of meta-training | – |
| ``retrained`` | anew with the variables that were found | the variables carry what was learned |
| ``permuted`` | anew with the same values in another order | only their distribution matters, not what belongs to what |
| ``unchanged`` | anew with the variables as they were at first | they learned nothing |
| ``outcome's data alone`` | anew on the data of the outcome, without the training data | they only passed these data on |

All on data that neither training nor outcome saw. The gap between the first two is what a warm start hid in the model's
parameters; Vicol et al. (2022) saw 97.5 % become 17 %. Each arm is trained ``repeats`` times from other starts, if ``vary``
says how they differ; intervals are two standard errors of the mean.

Reference: Vicol, Lorraine, Pedregosa, Duvenaud, Grosse (2022), "On implicit bias in overparameterized bilevel optimization".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retrograd.adjoint import Outcome
from retrograd.errors import InputError
from retrograd.hypergradients.chain import Chain
from retrograd.hypergradients.meta_training import MetaTraining, Vary, trained_with
from retrograd.trajectory import Trajectory

Permutation = Callable[[Mapping[str, Tensor], torch.Generator], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Arm:
    """What one way to train came to.

    Attributes:
        name: of the arm.
        outcomes: one for each repeat.
    """

    name: str
    outcomes: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean outcome."""
        return sum(self.outcomes) / len(self.outcomes)

    @property
    def error(self) -> float | None:
        """Two standard errors of the mean; None of a single training."""
        if len(self.outcomes) < 2:
            return None
        return 2 * torch.tensor(self.outcomes, dtype=torch.float64).std().item() / len(self.outcomes) ** 0.5


@dataclass(frozen=True)
class Audit:
    """The arms of an audit; `print` shows them.

    Attributes:
        arms: in the order of the table above.
        larger_is_better: of the outcome.
    """

    arms: tuple[Arm, ...]
    larger_is_better: bool = False

    def __getitem__(self, name: str) -> Arm:
        """Return an arm."""
        found = {arm.name: arm for arm in self.arms}
        if name not in found:
            raise InputError(f"there is no arm {name!r}. There is: {sorted(found)}.")
        return found[name]

    @property
    def learned(self) -> float:
        """How much better retraining is with the variables that were found than with those at first."""
        return self._better(self["retrained"], self["unchanged"])

    @property
    def memorised(self) -> float:
        """How much better the meta-trained model is than one that is retrained with its variables."""
        return self._better(self["meta-trained"], self["retrained"])

    def __str__(self) -> str:
        """Show the arms as a table, and say what follows."""
        width = max(len(arm.name) for arm in self.arms)
        rows = [
            f"{arm.name:<{width}}  {arm.mean:10.4f}" + ("" if arm.error is None else f"  ± {arm.error:.4f}")
            for arm in self.arms
        ]
        return "\n".join([*rows, *self._findings()])

    def _findings(self) -> list[str]:
        learned, memorised = self.learned, self.memorised
        found = [f"the variables learned {learned:+.4f} (retrained against unchanged)"]
        if memorised > max(abs(learned), 0.0) and memorised > 0:
            found.append(f"WARNING: the model memorised {memorised:+.4f} that its variables do not hold (see start='cold')")
        noise = sum(self[name].error or 0.0 for name in ("retrained", "unchanged"))
        permuted = [arm for arm in self.arms if arm.name == "permuted"]
        if permuted and learned > noise and self._better(permuted[0], self["unchanged"]) > learned / 2:
            found.append("WARNING: permuted variables do at least half as well: what belongs to what matters little")
        alone = [arm for arm in self.arms if arm.name == ALONE]
        if alone and self._better(alone[0], self["retrained"]) >= 0:
            found.append("WARNING: training on the outcome's data alone does as well: the variables only passed them on")
        return found

    def _better(self, one: Arm, other: Arm) -> float:
        return (one.mean - other.mean) * (1 if self.larger_is_better else -1)


ALONE = "outcome's data alone"


def audit(
    found: MetaTraining,
    outcome: Any,
    *,
    recipe: Trajectory | Chain | None = None,
    alone: Trajectory | Chain | None = None,
    repeats: int = 1,
    vary: Vary | None = None,
    permute: Permutation | None = None,
    larger_is_better: bool = False,
    seed: int = 0,
) -> Audit:
    """Retrain with what a meta-training found, and with controls.

    Args:
        found: what `meta_train` returned.
        outcome: what is asked, on data that neither training nor meta-training saw; its first question counts.
        recipe: the training to make anew, if not the one of meta-training: after a warm start, one of full length.
        alone: a training on the data of the meta-training's outcome alone; without it, that control is left out.
        repeats: how often each arm is trained.
        vary: what differs between repeats, as for `meta_train`: it gets 0, 1, ….
        permute: how to permute the variables; by default each along its first axis. If none has two entries there, that
            control is left out.
        larger_is_better: of the outcome (an accuracy); else smaller is (a loss).
        seed: of the permutations.

    Raises:
        InputError: repeats without ``vary`` would all be the same.
    """
    if repeats < 1 or (repeats > 1 and vary is None):
        raise InputError("repeats differ only by what vary= says; give it, as for meta_train, or repeats=1.")
    asked, again = Outcome.of(outcome), found.recipe if recipe is None else recipe
    generator = torch.Generator().manual_seed(seed)

    def ended(run: Trajectory | Chain) -> float:
        last = run.stages[-1] if isinstance(run, Chain) else run
        return asked.values(last.update_map, last.final_state).detach().flatten()[0].item()

    def trained(values: Callable[[], Mapping[str, Tensor]]) -> tuple[float, ...]:
        outcomes = []
        for number in range(repeats):
            changes = vary(number) if vary else {}
            outcomes.append(ended(trained_with(again, found.names, found.stage, values(), changes)))
        return tuple(outcomes)

    shuffle = permute or _along_first_axis
    arms = [Arm("meta-trained", (ended(found.run),)), Arm("retrained", trained(lambda: found.values))]
    if permute is not None or any(leaf.dim() and len(leaf) > 1 for leaf in found.values.values()):
        arms.append(Arm("permuted", trained(lambda: shuffle(found.values, generator))))
    arms.append(Arm("unchanged", trained(lambda: found.start)))
    if alone is not None:
        starts = [ended(alone)] if not vary else [ended(_rerun(alone, vary(number))) for number in range(repeats)]
        arms.append(Arm(ALONE, tuple(starts)))
    return Audit(tuple(arms), larger_is_better)


def _rerun(run: Trajectory | Chain, changes: Mapping[str, Any]) -> Trajectory | Chain:
    # An order of batches is one of other examples.
    own = {name: value for name, value in changes.items() if name != "order"}
    return run.rerun(**own) if isinstance(run, Trajectory) else run.rerun(own, *({} for _ in run.stages[1:]))


def _along_first_axis(values: Mapping[str, Tensor], generator: torch.Generator) -> Mapping[str, Tensor]:
    return {
        name: leaf if leaf.dim() == 0 else leaf[torch.randperm(len(leaf), generator=generator)] for name, leaf in values.items()
    }
