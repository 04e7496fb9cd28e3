"""Learning one number above the parameters: a rate on its logarithm, a decay factor on its logit, by SGD or by Adam.

    "sgd"     s = log(1 − (κ/α) ∂L/∂α)                                 the step α ← α − κ ∂L/∂α, read on ρ = log α
    "adam"    s = −κ m̂ / √v̂                                            with the means of h = ∂L/∂ρ and h²
    both      ρ ← ρ + max(−c, min(s, c))

α     the rate that is learned, always positive as only its logarithm moves; h = α ∂L/∂α;
κ     the rate of this level, in units of α²/loss for "sgd", in logarithms (0.03: about 3 % a step) for "adam";
c     clip: the largest change of log α in one step;
m̂, v̂  running means of h and h² with factors 0.9 and 0.999, corrected for their start at 0.

With "sgd" the gradient is that by α, not by ρ: by ρ it has one more factor α, and a rate that starts at 1e-5 would stay there.
Where the clip does not bind, α takes the very steps of Chandra et al. (2022); where they would make α zero or negative, it
shrinks by e⁻ᶜ. Adam needs no ε here: h has no natural smallest size, and 0/0 is taken as 0.

For a level above, κ itself learned as α is: ∂ρ'/∂log κ = s for "adam" and 1 − e⁻ˢ for "sgd"; 0 where the clip binds.

A level is a dictionary of plain numbers that is replaced and never changed, so a ``state_dict`` taken before stays as it was.
"""

import math

Level = dict[str, float]
"""value (what was added to the logarithm or logit so far), response (∂ value/∂log κ of the last change), m, v and count."""

START: Level = {"value": 0.0, "response": 0.0, "first_moment": 0.0, "second_moment": 0.0, "step": 0}
FACTORS = 0.9, 0.999
RULES = ("sgd", "adam")


def learned(level: Level, gradient: float, *, rule: str, rate: float, clip: float, at: float | None = None) -> Level:
    """Return the level after one step down a gradient.

    Args:
        level: The level before.
        gradient: h, the derivative of the loss by the logarithm or logit.
        rule: ``"sgd"`` or ``"adam"``.
        rate: κ.
        clip: c.
        at: α, at which the gradient was taken; None for a logit, where "sgd" is the plain step s = −κh.

    Returns:
        The level after.

    A rate of 0.1 whose loss falls by 2 for each unit of it, κ = 0.05: to 0.1 + 0.05 · 2.

    >>> after = learned(START, -2.0 * 0.1, rule="sgd", rate=0.05, clip=1.0, at=0.1)
    >>> round(0.1 * math.exp(after["value"]), 12), round(after["response"], 12)
    (0.2, 0.5)
    >>> learned(START, -0.2, rule="adam", rate=0.03, clip=1.0, at=0.1)["value"]
    0.03
    """
    after = {**level, "step": level["step"] + 1}
    if rule == "adam":
        for name, factor, new in zip(("first_moment", "second_moment"), FACTORS, (gradient, gradient * gradient), strict=True):
            after[name] = factor * level[name] + (1 - factor) * new
        mean, square = (
            after[name] / (1 - factor ** after["step"])
            for name, factor in zip(("first_moment", "second_moment"), FACTORS, strict=True)
        )
        change = response = -rate * (mean / math.sqrt(square) if square > 0 else 0.0)
    elif at is None:
        change = response = -rate * gradient
    else:
        factor = max(1 - rate * gradient / at / at, math.exp(-clip))
        change, response = math.log(factor), 1 - 1 / factor
    if abs(change) >= clip:
        change, response = math.copysign(clip, change), 0.0
    return {**after, "value": level["value"] + change, "response": response}
