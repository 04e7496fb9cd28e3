"""Curvature-aware gradient filtering: a Kalman filter in front of gradient descent (MEKA).

The true gradient ∇f(θ_t) is a hidden state. Curvature says how it moved, a batch gradient is a noisy look at it:

    m⁻ = m + h_t              P⁻ = P + q_t              predict, with the last step δ = θ_t − θ_{t−1}          (eq. 6)
    K  = P⁻ / (P⁻ + σ²)                                  the gain                                              (eq. 7)
    m  ← (1 − K) m⁻ + K ḡ_t   P ← (1 − K)² P⁻ + K² σ²    correct, which makes P = (1 − K) P⁻                    (eq. 8)
    θ_{t+1} = θ_t − α m

m, P     estimate of ∇f [loss/θ] and its expected squared error E‖m − ∇f‖² [loss²/θ²]; at the first step m = ḡ, P = σ²
h_t, q_t mean over the batch of the examples' Hessian-vector products H_i(θ_t) δ, and the expected squared error of that mean
ḡ_t, σ²  batch gradient, and its expected squared error; both errors are estimated as Σ_i ‖x_i − x̄‖² / (B (B − 1)),
         over examples i, or in the same way over the means of a few equal parts of the batch
α        learning rate, fixed or self-tuned

**One gain for all.** The exact gain is a matrix, and a diagonal one would follow the variance of each coordinate; the paper
takes Σ = σ²I and P = pI. The formulas above need no such shape. For uncorrelated errors e⁻ of m⁻ and v of ḡ, whatever their
covariances, a scalar gain has E‖(1 − K) e⁻ + K v‖² = (1 − K)² tr P⁻ + K² tr Σ, least at K = tr P⁻ / (tr P⁻ + tr Σ), where it
is (1 − K) tr P⁻. So with P and σ² read as *traces*, K is the best scalar gain and P stays exact. If variances were known, a
gain for each coordinate would be better still. From one batch they are estimated with a relative error of √(2/B) or more,
and together with ḡ: a feature absent from the batch has gradient 0 and variance 0, so that K = 1 forgets it. A trace averages
over all coordinates. On digits and noisy quadratics the shared gain was the better one by measurement, as in the paper.

**Self-tuned α** (eqs. 10–13). The loss is filtered likewise. u and s, estimate and variance of f(θ_t), are moved by a step
by m_{t−1}·δ + ½ δ·h_t (exact on quadratics) with variance p ‖δ‖² + ¼ Var(δ·h_t), then corrected by the mean loss of the batch
with its variance. A step −α m changes the loss by a normal variable, and α makes an improvement the most probable:

    mean −a α + ½ b α²,   variance 2 s + p a α² + ¼ c α⁴,      a = ‖m‖², b = m·Bm, c = Var b, p = P / (number of parameters)

The probability is greatest where 2s (b α − a) + ½ p a b α³ + ¼ a c α⁴ = 0. That has exactly one positive root if b or c is
positive (one change of sign), below a / b, the minimum of the quadratic, if b is. The paper solves by Newton's method and
smooths α and σ² over 1000 steps; neither that nor its third-order term for negative curvature is done here.

Assumes that the examples of a batch are independent draws with losses of their own, and that δ is short: the change of ∇f
beyond Hδ is in no variance. ``change="difference"`` takes for h_t the mean of ∇ℓ_i(θ_t) − ∇ℓ_i(θ_{t−1}), exact for every loss,
in the place of the Hessian; m is then the estimate of STORM (Cutkosky & Orabona 2019), with K for its weight. h_t and ḡ_t are
of one batch, and their correlation is neglected, as in the paper. Where gradients are noiseless, K = 1 and this is gradient
descent. Conditioning is not helped: α is one number.

Cost: gradients and Hessian-vector products of each part, some ten plain steps on small models on a CPU, and much more if every
example is a part, since writing B gradients takes longer than computing their mean; ``"difference"`` is the cheaper of the two.
`benchmarks/gradient_filter.py` measures it. Memory: θ_{t−1}, m, and twice [parts, P].

References: Chen, Choi, Balles, Duvenaud & Hennig (2020), "Self-tuning stochastic optimization with curvature-aware gradient
filtering", PMLR 137, arXiv:2011.04803; Cutkosky & Orabona (2019), "Momentum-based variance reduction in non-convex SGD".
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad_and_value, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from retrograd.errors import InputError, NonFinite, SolverFailed, UnsupportedTraining
from retrograd.params import Params, count, inner, map_params
from retrograd.task import BoundModel

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_FILTER = "filter"  # the key of `Optimizer.state` under which what belongs to no single parameter is kept


@dataclass(frozen=True)
class FilterStep:
    """What the filter found at one step.

    Attributes:
        loss: mean loss of the batch before the step.
        gain: K, the share of the batch gradient in what corrects the prediction; 1 is plain gradient descent.
        noise: σ², expected squared error of the batch gradient [loss²/θ²].
        uncertainty: P, expected squared error of the filtered gradient [loss²/θ²].
        step_size: α of the self-tuned groups, before their factor lr; None where all learning rates are fixed.
    """

    loss: float
    gain: float
    noise: float
    uncertainty: float
    step_size: float | None


class GradientFilter(torch.optim.Optimizer):
    """Gradient descent along the filtered gradient, by the equations above.

    Used like any optimizer, except that ``step`` takes the batch (it needs the gradient of every example), so that there is
    no ``backward`` and no ``zero_grad``::

        optimizer = GradientFilter(model, Classification(), lr=0.1)
        for inputs, labels in loader:
            loss = optimizer.step((inputs, labels))

    Schedulers act on ``lr`` as usual. A decay of the weights belongs into the losses, where it adds no noise.

    Args:
        model: what is trained. Batch normalisation in training mode is refused, as it couples the examples.
        losses: a task such as `Classification`, or a function of (model, batch) that gives one loss per example, not reduced,
            shape ``[batch]``. It sees one part of a batch at a time, under `torch.func.vmap`.
        lr: learning rate α [θ²/loss]; None for the self-tuned one, and then a group's lr is a factor on it, from 1.
        params: parameters to train, or groups of them with an own ``lr`` or ``self_tuned``; by default all that require
            gradients.
        change: how the change of the gradient is found: ``"hessian"``, as in the paper, or ``"difference"``, which costs less.
        parts: variances are estimated from the means of so many equal parts of a batch (of the next larger number that divides
            it): the same m from less memory and time, for noisier variances. None: from each example, as in the paper.

    Raises:
        InputError: an argument is not what is allowed, or a parameter is not of this model.

    Losses ½(θ − x)² with noise in x: after t steps m is θ less the mean of all x so far, whatever the steps were.

    >>> model = nn.ParameterDict({"theta": nn.Parameter(torch.tensor(5.0))})
    >>> optimizer = GradientFilter(model, lambda model, x: (model["theta"] - x).square() / 2, lr=0.5)
    >>> for x in ([0.0, 2.0], [4.0, 6.0]):                      # equal variances, so K = 1/2 at the second step
    ...     loss = optimizer.step(torch.tensor(x))
    >>> optimizer.latest.gain, optimizer.filtered_gradient()["theta"].item()        # θ was 3, the mean of all x is 3
    (0.5, 0.0)
    """

    citation: ClassVar[str] = """@inproceedings{chen2020self,
  title = {Self-Tuning Stochastic Optimization with Curvature-Aware Gradient Filtering},
  author = {Chen, Ricky T. Q. and Choi, Dami and Balles, Lukas and Duvenaud, David and Hennig, Philipp},
  booktitle = {``I Can't Believe It's Not Better!'' at NeurIPS Workshops}, series = {PMLR}, volume = {137}, year = {2020}
}"""

    def __init__(
        self,
        model: nn.Module,
        losses: Any,
        lr: float | None = None,
        *,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | None = None,
        change: str = "hessian",
        parts: int | None = 8,
    ):
        function = getattr(losses, "losses", losses)
        if not callable(function):
            raise InputError(
                "losses must be a task with per-example losses, such as Classification(), or a function of (model, batch) that "
                f"gives one loss per example; got {losses!r}."
            )
        if change not in ("hessian", "difference"):
            raise InputError(f'change must be "hessian" or "difference", got {change!r}.')
        if parts is not None and parts < 2:
            raise InputError(f"parts must be at least 2, as variances need two means; got {parts}.")
        self.model, self.losses, self.change, self.parts = model, function, change, parts
        self._latest: FilterStep | None = None
        self._names: dict[Tensor, str] = {leaf: name for name, leaf in model.named_parameters()}
        self._bound = BoundModel(model)
        chosen = [leaf for leaf in model.parameters() if leaf.requires_grad] if params is None else params
        super().__init__(chosen, {"lr": 1.0 if lr is None else lr, "self_tuned": lr is None})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model; the filter then begins anew at the next step.

        Args:
            param_group: ``params``, and optionally ``lr`` and ``self_tuned``.

        Raises:
            InputError: a parameter is not of the model, or its learning rate is negative or not finite.
        """
        super().add_param_group(param_group)
        group, wrong = self.param_groups[-1], None
        if not (0 <= group["lr"] < float("inf")):
            wrong = f"lr must be at least 0 and finite, got {group['lr']}. Use lr=None for the self-tuned step."
        for leaf in group["params"]:
            if leaf not in self._names:
                wrong = f"a parameter of shape {tuple(leaf.shape)} is not in the model that GradientFilter was given."
        if wrong:
            self.param_groups.pop()
            raise InputError(wrong)

    @property
    def latest(self) -> FilterStep:
        """What the filter found at the last step.

        Raises:
            InputError: there was no step yet.
        """
        if self._latest is None:
            raise InputError("nothing has been filtered before the first step.")
        return self._latest

    def filtered_gradient(self) -> Params:
        """Return m of the last step, by the names of the parameters.

        Raises:
            InputError: there was no step yet.
        """
        if not self.state:
            raise InputError("there is no filtered gradient before the first step.")
        seen = [leaf for leaf in self._leaves() if leaf in self.state]  # a group may have been added since
        return {self._names[leaf]: self.state[leaf]["mean"].clone() for leaf in seen}

    @torch.no_grad()
    def step(self, batch: Any) -> Float[Tensor, ""]:  # type: ignore[override]
        """Make a step.

        Args:
            batch: tensors with a leading axis ``batch``, of two examples at least, in any nest of tuples, lists and dicts.

        Returns:
            The mean loss of the batch before the step.

        Raises:
            InputError: the batch has fewer than two examples, or ``losses`` does not give one loss for each.
            NonFinite: a loss, or the gradient of a named parameter; nothing has changed then.
            SolverFailed: no self-tuned step, since the loss is straight along the filtered gradient; nothing has changed.
            UnsupportedTraining: batch normalisation is in training mode.
        """
        self._refuse_batch_norm()
        leaves = self._leaves()
        params = {self._names[leaf]: leaf.detach() for leaf in leaves}
        states: Any = self.state  # by parameter, and what belongs to none under a name of its own
        known = states.get(_FILTER) if all("mean" in states.get(leaf, ()) for leaf in leaves) else None
        last = {name: states[leaf] for name, leaf in zip(params, leaves, strict=True)} if known else None
        batch, parts = self._cut(batch)

        delta = None if last is None else {name: params[name] - last[name]["previous"] for name in params}
        values, rows, changes = self._rows(params, delta, batch)
        gradient, noise = _mean_and_error(rows)
        loss, loss_error = values.mean(), float(values.var() / parts)
        if delta is None or changes is None or last is None or known is None:
            mean, uncertainty, gain = gradient, noise, 1.0
        else:
            change, error = _mean_and_error(changes)
            predicted = known["uncertainty"] + error
            gain = _gain(predicted, noise)
            # Not m⁻ + K(ḡ − m⁻): this way K = 1 gives ḡ to the last bit.
            mean = map_params(lambda m, h, g: (1 - gain) * (m + h) + gain * g, _part(last, "mean"), change, gradient)
            uncertainty = (1 - gain) ** 2 * predicted + gain**2 * noise
        self._check_finite(values, gradient, mean)

        state: dict[str, float] = {"uncertainty": uncertainty}
        alpha = None
        if any(group["self_tuned"] for group in self.param_groups):
            level, spread = float(loss), loss_error
            if known is not None and "loss" in known and delta is not None and changes is not None and last is not None:
                moved, moved_error = _loss_change(_part(last, "mean"), known["uncertainty"], delta, changes)
                predicted = known["loss_error"] + moved_error
                share = _gain(predicted, loss_error)
                level = (1 - share) * (known["loss"] + moved) + share * level
                spread = (1 - share) ** 2 * predicted + share**2 * loss_error
            state |= {"loss": level, "loss_error": spread}
            alpha = self._self_tuned(params, mean, batch, uncertainty, spread)

        states[_FILTER] = state
        for group in self.param_groups:
            length = group["lr"] * (alpha if group["self_tuned"] and alpha is not None else 1.0)
            for leaf in group["params"]:
                own = mean[self._names[leaf]]
                states[leaf] = {"mean": own, "previous": leaf.detach().clone()}
                leaf.sub_(length * own)
        self._latest = FilterStep(float(loss), gain, noise, uncertainty, alpha)
        return loss

    # ------------------------------------------------------------------ what a batch tells

    def _rows(self, params: Params, delta: Params | None, batch: Any) -> tuple[Tensor, Params, Params | None]:
        """Return loss, gradient, and change of the gradient since θ − δ, each with a leading axis ``parts``."""

        def loss(params: Params, part: Any) -> Tensor:
            return self._losses(params, part).mean()

        def gradient(params: Params, part: Any) -> tuple[Params, Tensor]:
            return grad_and_value(loss)(params, part)

        def with_product(part: Any) -> tuple[tuple[Params, Tensor], tuple[Params, Tensor]]:
            return jvp(lambda params: gradient(params, part), (params,), (delta,))  # type: ignore[return-value]

        try:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has neither a batched form nor second derivatives
                if delta is None:
                    rows, values = vmap(gradient, in_dims=(None, 0), randomness="different")(params, batch)
                    return values, rows, None
                if self.change == "difference":
                    # The same random numbers at both points: a mask of dropout belongs to the example.
                    devices = {leaf.device.index for leaf in params.values() if leaf.device.type == "cuda"}
                    before = map_params(lambda leaf, step: leaf - step, params, delta)
                    with torch.random.fork_rng(devices=devices):
                        old, _ = vmap(gradient, in_dims=(None, 0), randomness="different")(before, batch)
                    rows, values = vmap(gradient, in_dims=(None, 0), randomness="different")(params, batch)
                    changes = map_params(torch.sub, rows, old)
                else:
                    (rows, values), (changes, _) = vmap(with_product, randomness="different")(batch)
                return values, rows, changes
        except InputError:
            raise
        except (RuntimeError, ValueError) as error:
            error.add_note(
                "GradientFilter calls `losses` on each part of a batch under torch.func.vmap, grad and jvp, so it must be made "
                "of operations that these can transform: no .item(), no branching on values, no writing to buffers."
            )
            raise

    def _losses(self, params: Params, part: Any) -> Tensor:
        size = _size(part)
        losses = self._bound(self.losses, dict(params), part)
        if losses.shape != (size,):
            raise InputError(
                f"losses gave shape {tuple(losses.shape)} for {size} examples. It must give one loss per example, shape "
                f"({size},): use reduction='none' and average over everything but the batch axis."
            )
        return losses

    def _self_tuned(self, params: Params, mean: Params, batch: Any, uncertainty: float, loss_error: float) -> float:
        """Return the α that makes an improvement of the loss the most probable."""
        tuned = {self._names[leaf] for group in self.param_groups if group["self_tuned"] for leaf in group["params"]}
        direction = {name: leaf if name in tuned else torch.zeros_like(leaf) for name, leaf in mean.items()}

        def losses(params: Params) -> Tensor:
            return self._losses(params, _map(lambda leaf: leaf.flatten(0, 1), batch))

        def slopes(params: Params) -> Tensor:
            return jvp(losses, (params,), (direction,))[1]

        with sdpa_kernel(SDPBackend.MATH):
            curvatures = jvp(slopes, (params,), (direction,))[1]
        parts = curvatures.unflatten(0, _leaf(batch).shape[:2]).mean(1)
        return most_probable_improvement(
            slope=float(inner(direction, direction)),
            curvature=float(parts.mean()),
            slope_error=uncertainty / count(mean),
            curvature_error=float(parts.var() / len(parts)),
            loss_error=loss_error,
        )

    # ------------------------------------------------------------------ bookkeeping

    def _leaves(self) -> list[Tensor]:
        return [leaf for group in self.param_groups for leaf in group["params"]]

    def _cut(self, batch: Any) -> tuple[Any, int]:
        """Return the batch with axes ``part`` and ``batch within the part`` in place of ``batch``, and the number of parts."""
        size = _size(batch)
        if size < 2:
            raise InputError(
                f"a batch of {size} example(s) says nothing about the noise of its gradient; GradientFilter needs two. "
                "If it is the last one of a loader, use drop_last=True."
            )
        wanted = min(self.parts or size, size)
        parts = next(number for number in range(wanted, size + 1) if size % number == 0)
        return _map(lambda leaf: leaf.unflatten(0, (parts, size // parts)), batch), parts

    def _refuse_batch_norm(self) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, _BATCH_NORMS) and module.training:
                raise UnsupportedTraining(
                    f"module {name!r} is batch normalisation in training mode, and no example has a gradient of its own. "
                    f"Use group or layer normalisation, or freeze it: model.get_submodule({name!r}).eval()."
                )

    @staticmethod
    def _check_finite(values: Tensor, gradient: Params, mean: Params) -> None:
        names = list(gradient)
        finite = [values.isfinite().all(), *(params[name].isfinite().all() for name in names for params in (gradient, mean))]
        flags = torch.stack(finite).tolist()  # one wait for the device
        if all(flags):
            return
        if not flags[0]:
            raise NonFinite(
                f"the losses of the batch are not finite: {values[~values.isfinite()][0].item()}. Nothing was changed."
            )
        name = names[flags[1:].index(False) // 2]
        what = "gradient" if not gradient[name].isfinite().all() else "predicted change of the gradient"
        raise NonFinite(f"the {what} of parameter {name!r} is not finite. Nothing was changed; lower lr, or look at the batch.")


def most_probable_improvement(
    slope: float, curvature: float, slope_error: float, curvature_error: float, loss_error: float
) -> float:
    """Return the α > 0 for which a step −α m most probably lowers the loss: the root in the module's docstring.

    Args:
        slope: a = ‖m‖².
        curvature: b = m·Bm, of any sign.
        slope_error: p, the variance of m in one direction.
        curvature_error: c, the variance of b.
        loss_error: s, the variance of f(θ).

    Returns:
        α; 0 where a is 0, and a / b where nothing is uncertain.

    Raises:
        SolverFailed: neither b nor c is positive, so that longer steps seem ever better.

    >>> most_probable_improvement(slope=2.0, curvature=4.0, slope_error=0.0, curvature_error=0.0, loss_error=1.0)
    0.5
    >>> round(most_probable_improvement(1.0, 1.0, 2.0, 0.0, 0.5), 6)      # α − 1 + α³ = 0
    0.682328
    """
    if slope == 0:
        return 0.0
    if not (curvature > 0 or curvature_error > 0):
        raise SolverFailed(
            "the loss has no positive curvature along the filtered gradient, on any example, so no step is the best. Give lr."
        )
    if slope_error == 0 and curvature_error == 0:
        return slope / curvature

    def excess(alpha: float) -> float:
        straight = 2 * loss_error * (curvature * alpha - slope)
        return straight + slope_error * slope * curvature * alpha**3 / 2 + slope * curvature_error * alpha**4 / 4

    low, high = 0.0, slope / curvature if curvature > 0 else 1.0
    while excess(high) < 0 and high < 1e150:
        high *= 2
    for _ in range(200):  # bisection, to the last bit
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return high if excess(high) <= 0 else low


def _gain(predicted: float, observed: float) -> float:
    """Return P⁻ / (P⁻ + σ²); what is observed without noise is believed, also where the prediction seems certain."""
    return 1.0 if observed == 0 else predicted / (predicted + observed)


def _mean_and_error(rows: Params) -> tuple[Params, float]:
    """Return the mean over the leading axis, and its expected squared error summed over all coordinates."""
    mean = {name: leaf.mean(0) for name, leaf in rows.items()}
    norms = torch.stack([torch.linalg.vector_norm(leaf - mean[name]) for name, leaf in rows.items()])
    size = len(next(iter(rows.values())))
    return mean, float(norms.square().sum()) / (size * (size - 1))


def _loss_change(mean: Params, uncertainty: float, delta: Params, changes: Params) -> tuple[float, float]:
    """Return by how much the step δ changed the loss, m·δ + ½ δ·h, and the variance of that."""
    bent = sum((leaf.flatten(1) @ delta[name].flatten() for name, leaf in changes.items()), start=torch.zeros(()))
    along = float(inner(mean, delta) + bent.mean() / 2)
    return along, float(uncertainty / count(delta) * inner(delta, delta) + bent.var() / len(bent) / 4)


def _part(states: dict[str, dict[str, Tensor]], key: str) -> Params:
    return {name: state[key] for name, state in states.items()}


def _map(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, tuple | list):
        return type(batch)(_map(function, part) for part in batch)
    if isinstance(batch, dict):
        return {name: _map(function, part) for name, part in batch.items()}
    raise InputError(f"a batch holds tensors with a leading axis, in tuples, lists and dicts; got a {type(batch).__name__}.")


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(lambda leaf: found.append(leaf) or leaf, batch)
    return found


def _leaf(batch: Any) -> Tensor:
    return _tensors(batch)[0]


def _size(batch: Any) -> int:
    sizes = {leaf.shape[0] if leaf.dim() else None for leaf in _tensors(batch)}
    if len(sizes) != 1 or None in sizes:
        raise InputError(f"the tensors of a batch need a leading axis of the same length, got {sorted(map(str, sizes))}.")
    return int(next(iter(sizes)) or 0)
