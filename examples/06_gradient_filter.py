# %%
"""# A gradient that remembers, and knows how far to be trusted

Stochastic gradient descent with a constant learning rate never arrives: close to the minimum the noise of the batches pushes it
about. The usual answers are a falling learning rate or an average of the iterates. Here is another one, that measures. A
Kalman filter keeps an estimate m of the *true* gradient with its expected error P. Curvature says how the gradient changed
since the last step, the batch gradient corrects the guess, and the gain K says how much of the correction is believed.
"""

import torch
from torch import nn

from retrograd.optim import GradientFilter

torch.set_num_threads(1)

# %%
# A bowl with steep and flat directions, seen through noise: the loss of an example is ½ θᵀHθ + z·θ with its own z.

steepness = torch.logspace(-1, 1, 20)


class Bowl(nn.Module):
    """A point θ in the bowl."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(20))

    def height(self):
        """Return ½ θᵀHθ, which is what we really want to lower."""
        return (steepness * self.theta.square()).sum() / 2


def losses(model, noise):  # one loss per example, not reduced
    return model.height() + noise @ model.theta


def noise(draw):
    return 2 * torch.randn(4, 20, generator=draw)


# %%
# The same loop for both. The filter takes the batch instead of a gradient, as it needs more of it than that.

STEPS = 800
heights = {}

draw, model = torch.Generator().manual_seed(0), Bowl()
sgd, heights["SGD"] = torch.optim.SGD(model.parameters(), lr=0.05), []
for _ in range(STEPS):
    sgd.zero_grad()
    losses(model, noise(draw)).mean().backward()
    sgd.step()
    heights["SGD"].append(model.height().item())

draw, model = torch.Generator().manual_seed(0), Bowl()
optimizer, heights["filter"] = GradientFilter(model, losses, lr=0.05), []
for step in range(STEPS):
    optimizer.step(noise(draw))
    heights["filter"].append(model.height().item())
    if step in (0, 1, 9, 99, STEPS - 1):
        found = optimizer.latest
        print(
            f"step {step + 1:>5}: gain {found.gain:.4f}, squared error of m {found.uncertainty:7.3f}, of ḡ {found.noise:5.1f}"
        )

# %%
# In a bowl whose curvature is the same for every example, nothing is lost on the way: K is about 1/t, and m the average of all
# gradients so far, each carried to where we are now. So the floor goes on falling.

for name, values in heights.items():
    print(f"{name:<8} mean height over the last 200 steps: {sum(values[-200:]) / 200:.4f}")
assert sum(heights["filter"][-200:]) < sum(heights["SGD"][-200:]) / 3

# %%
# Without a learning rate the same estimates choose it: the step that most probably lowers the loss.

draw, model = torch.Generator().manual_seed(0), Bowl()
optimizer = GradientFilter(model, losses)
for _ in range(STEPS // 2):
    optimizer.step(noise(draw))
print(
    f"self-tuned: height {model.height().item():.4f} after {STEPS // 2} steps, the last with {optimizer.latest.step_size:.3f}"
)

# %%
# A step costs about ten of SGD's, so on a network this seldom pays: see docs/gradient_filter.md for what was measured.
