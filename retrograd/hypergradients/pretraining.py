"""Meta-learned pre-training: choose how to pre-train by what fine-tuning comes to.

    φ* = argmin_φ L_val(θ_FT),     θ_FT = fine-tuning from θ_PT,     θ_PT = pre-training on L_PT(θ, φ)

    exact        dL_val/dφ = Σ_t B_tᵀ λ_{t+1}                       costates through fine-tuning and every step of pre-training
    the paper's  dL_val/dφ ≈ −(∂²L_PT/∂φ∂θ)ᵀ p,                     (equations 3 to 6)
                 p = α Σ_{j=0}^{J} (I − αH)^j v,   v = (∂θ_FT/∂θ_PT)ᵀ ∇L_val

φ    what shapes pre-training: weights of its tasks, an augmentation, … the parameters of a meta-module;
H    Hessian of L_PT at the end of pre-training;  α learning rate of pre-training;
J    Hessian products; J → ∞ gives H⁻¹, and a truncated sum damps it as a multiple 1/(α (J+1)) of the identity would.

Both are methods of the engine for a `chain` of two recorded runs, so this file only holds what is about pre-training::

    both = chain(pretraining, finetuning)
    meta_train(both, outcome, optimizer=..., steps=30)                                                          # exact
    meta_train(both, outcome, optimizer=..., steps=300, start="warm", method=pretraining_estimator(1e-3))       # the paper's

Layers that fine-tuning leaves as they are (a linear head alone is trained) must be in its optimizer all the same, in a group
with ``lr=0``: only what an optimizer holds is part of the state that is handed over.

Assumptions. The paper's: pre-training has converged, so that its end depends on L_PT alone; p then forgets optimizer, start and
number of steps. Short or noisy pre-training has not, whatever J is (``drift`` in the notes of a `Hypergradient` says by how
much). Exact: none, but that the run is smooth enough to be differentiated (`roughness`). Weights that only scale the loss are
undone by Adam, and drift to 0 or to their bound: normalise them.

Cost of an outer step, for T steps of pre-training and K of fine-tuning: exact about 3 (T + K) training steps; the paper's those
steps that it trains on, and J + 1 Hessian products.

Reference: Raghu, Lorraine, Kornblith, McDermott, Duvenaud (2021), "Meta-learning to improve pre-training".
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from retrograd.adjoint import FixedPoint, Unrolled
from retrograd.errors import InputError


class TaskWeights(nn.Module):
    """A meta-module: one weight for each pre-training task, w_k = 2 σ(φ_k), all 1 at first.

    Args:
        count: number of tasks.
        normalised: divide by the mean, so that the weights say what matters more and not how large the loss is.

    >>> weights = TaskWeights(2)
    >>> _ = weights.logits.data.copy_(torch.tensor([0.0, 3.0]).log())        # σ = 0, 3/4
    >>> weights().tolist()
    [0.0, 2.0]
    """

    def __init__(self, count: int, *, normalised: bool = True):
        super().__init__()
        if count < 1:
            raise InputError(f"weights are for at least one task, got {count}.")
        self.normalised = normalised
        self.logits = nn.Parameter(torch.zeros(count))

    def forward(self) -> Float[Tensor, " task"]:
        """Return the weights."""
        shares = torch.sigmoid(self.logits)
        return shares / shares.mean() if self.normalised else 2 * shares


@dataclass(frozen=True)
class MultitaskLoss:
    """Pre-training on many binary tasks at once: ℓ_i = mean over tasks of w_k · cross-entropy of (example i, task k).

    Batches are ``(inputs, targets)`` with targets in [0, 1], ``[batch, task]``; the model gives one logit for each of them.
    Weights come from the meta-module, called without arguments; without one they are 1.

    >>> model, weights = nn.Linear(1, 2, bias=False), TaskWeights(2)
    >>> _ = model.weight.data.zero_()
    >>> batch = (torch.ones(3, 1), torch.ones(3, 2))
    >>> MultitaskLoss().losses(model, batch, weights)[0].item() == torch.tensor(2.0).log().item()
    True
    """

    def losses(self, model: nn.Module, batch: Any, meta: Any = None) -> Float[Tensor, " batch"]:
        """Return the weighted mean over tasks of each example's cross-entropies, in nats."""
        every = self._every(model, batch)
        return (every if meta is None else every * meta()).mean(1)

    def measurements(self, model: nn.Module, batch: Any) -> Float[Tensor, " query"]:
        """Return the mean over tasks of each query's cross-entropies, without weights."""
        return self._every(model, batch).mean(1)

    def _every(self, model: nn.Module, batch: Any) -> Float[Tensor, "batch task"]:
        inputs, targets = batch
        outputs = model(inputs)
        if outputs.shape != targets.shape:
            raise InputError(
                f"the model gave logits of shape {tuple(outputs.shape)} for targets of shape {tuple(targets.shape)}; "
                "it must give one for each task, [batch, task]."
            )
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")


@dataclass(frozen=True)
class ContrastiveLoss:
    """Contrastive pre-training (SimCLR, NT-Xent) on two views of each example that the meta-module makes.

        ℓ_a = −log exp(s_ab/τ) / Σ_{c≠a} exp(s_ac/τ),     loss = Σ_i w_i (ℓ_i' + ℓ_i'') / 2B

    a and b are the two views of an example, c every view in the batch, s the cosine of their embeddings. Batches are inputs,
    or tuples that begin with them; ``meta(inputs)`` draws a view, from torch's random numbers, which a run records. Without a
    meta-module it is left to the model (its dropout) to make the two views differ.

    Args:
        temperature: τ.

    Reference: Chen, Kornblith, Norouzi, Hinton (2020), "A simple framework for contrastive learning of visual
    representations".

    >>> identity = nn.Identity()                                     # two examples at right angles, views all alike
    >>> loss = ContrastiveLoss(temperature=1.0).loss(identity, torch.eye(2), torch.ones(2), identity)
    >>> bool(torch.isclose(loss, (1 + 2 * torch.tensor(-1.0).exp()).log()))
    True
    """

    temperature: float = 0.5

    def __post_init__(self):
        if not self.temperature > 0:
            raise InputError(f"temperature must be positive, got {self.temperature}.")

    def loss(self, model: nn.Module, batch: Any, weights: Float[Tensor, " batch"], meta: Any = None) -> Float[Tensor, ""]:
        """Return the weighted mean of the examples' losses, in nats."""
        inputs = _inputs(batch)
        first, second = (inputs if meta is None else meta(inputs) for _ in range(2))
        found = self._each(model(first), model(second))
        return (weights.to(found) * found).sum() / len(found)

    def measurements(self, model: nn.Module, batch: Any) -> Float[Tensor, " query"]:
        """Return the loss of each query's embedding as it is, taken twice: how well it is told from the others."""
        embedded = model(_inputs(batch))
        return self._each(embedded, embedded)

    def _each(self, first: Tensor, second: Tensor) -> Float[Tensor, " batch"]:
        count = len(first)
        views = F.normalize(torch.cat([first, second]), dim=1)
        itself = torch.eye(2 * count, dtype=torch.bool, device=views.device)
        cosines = (views @ views.T / self.temperature).masked_fill(itself, -torch.inf)
        partners = torch.arange(2 * count, device=views.device).roll(count)
        return F.cross_entropy(cosines, partners, reduction="none").view(2, count).mean(0)


def pretraining_estimator(learning_rate: float, products: int = 1, finetuning_steps: int = 1) -> tuple[FixedPoint, Unrolled]:
    """Return the paper's estimator as methods of the two stages: a truncated Neumann series, then the last steps unrolled.

    Made for warm starts, where a stage is the few steps between two outer steps (the paper: 10, and 1 of fine-tuning's
    differentiated through; only its head is trained then). H is that of the last batch of pre-training, and α the same number
    for every coordinate, whatever the optimizer, as in the authors' code.

    Args:
        learning_rate: α, that of pre-training.
        products: J, Hessian products.
        finetuning_steps: how many of the last steps of fine-tuning are differentiated through.

    >>> pretraining_estimator(1e-3)[0].iterations, pretraining_estimator(1e-3)[1].last
    (2, 1)
    """
    if products < 0 or not learning_rate > 0:
        raise InputError(f"products must be at least 0 and the learning rate above 0, got {products} and {learning_rate}.")
    return (
        FixedPoint(solver="neumann", iterations=products + 1, step=learning_rate, preconditioned=False, window=1),
        Unrolled(last=finetuning_steps),
    )


def _inputs(batch: Any) -> Tensor:
    return batch if isinstance(batch, Tensor) else batch[0]
