"""Where does training go? A game that turns in circles, a training that becomes chaotic, and a game with two ends."""

# %% The Dirac-GAN: a generator x against a discriminator y. Gradient descent turns about the equilibrium and never gets there.
import cmath

import torch
from sklearn.datasets import load_digits
from torch import nn

import retrograd
from retrograd import Classification, ComplexSGD, cases
from retrograd.dynamics import FunctionFlow

game = cases.dirac_gan()
steps = torch.zeros(300, 1, dtype=torch.int64)  # a game of formulas has no data: one row, looked at by nobody


def played(optimizer):
    start = {player: torch.tensor(0.4) for player in game.start}
    run = retrograd.record(game.game.profile(start), torch.zeros(1), game.game, optimizer=optimizer, order=steps)
    return torch.stack([game.flatten(run.state(step).params) for step in range(0, 301, 10)])


plain = played(lambda p: torch.optim.SGD(p, lr=0.5))
print(f"gradient descent: distance {plain[0].norm():.2f} at the start, {plain[-1].norm():.2f} after 300 steps")

# %% Measure the spectrum of the game at the equilibrium, and take the momentum that suits it.
found = retrograd.spectrum(FunctionFlow(game.operator("simultaneous", 1.0), game.dim), torch.zeros(2, dtype=torch.float64))
tuned = retrograd.tune_momentum(1 - found.values)  # a plain step is I − J
size, angle = cmath.polar(tuned.beta)
print(f"eigenvalues of J: {[f'{value:.2f}' for value in (1 - found.values).tolist()]}")
print(f"learning rate {tuned.alpha:.2f}, momentum {size:.2f} at {angle:.2f} rad: errors shrink by {tuned.rate:.2f} a step")
print(f"real momentum .9 is stable here: {retrograd.is_adversarially_stable(0.9)}")
complex_run = played(lambda p: ComplexSGD(p, lr=tuned.alpha, beta=tuned.beta))
print(f"complex momentum: distance {complex_run[-1].norm():.1e} after 300 steps")

# %% A network trained too fast: from which step on do nearby trainings part?
images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images[:300] / 16), torch.tensor(labels[:300])
for rate in (0.1, 3.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    run = retrograd.record(
        model, (images, labels), Classification(), optimizer=lambda p, r=rate: torch.optim.SGD(p, lr=r), epochs=8, batch_size=60
    )
    print(f"learning rate {rate}: {retrograd.lyapunov_exponents(run, count=2)}")

# %% A game with two ends. Climb to where nearby starts part most, leave in both directions, and see where each one ends.
mixture = cases.mixture()
flow = FunctionFlow(mixture.operator("extragradient", 5.0), mixture.dim)
starts = mixture.starts(2, seed=0, scale=0.5)
tree = retrograd.generalised_ridge_rider(flow, starts, steps=40, same=mixture.same, remedies=False, places=60)
print(tree)
for number, solution in enumerate(tree.solutions):
    print(f"solution {number}: losses {[round(loss, 2) for loss in mixture.losses(solution).tolist()]}")

# %% Pictures, where plotly is installed.
try:
    from retrograd.report import branch_tree_figure, phase_portrait, spectrum_figure

    phase_portrait(game, [plain, complex_run], extent=1.5).write_html("portrait.html")
    spectrum_figure(found.values).write_html("spectrum.html")
    branch_tree_figure(tree, shown=lambda points: points[:, :2].sigmoid()).write_html("branches.html")
    print("portrait.html, spectrum.html and branches.html are written")
except retrograd.errors.MissingDependency as missing:
    print(missing)
