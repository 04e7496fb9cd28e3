# %%
"""# Which real images shaped a generated one?

A generator never sees its training images: they teach the discriminator, and that teaches the generator. Through all of
training one can still follow what each of them did. Here a small GAN on 8×8 digits is trained by an ordinary loop with two
optimizers, recorded, and asked why it draws a digit so clearly.
"""

import torch
import torch.nn.functional as F

from retrograd import Recorder, Unrolled, attribute, roughness
from retrograd.cases import digits_gan

torch.set_num_threads(1)
case = digits_gan(count=500, penalty=1.0)
game, images, model = case.game, case.images, case.networks(seed=0)

# %%
# The loop is anyone's: a step of the discriminator, a step of the generator. All that recording asks for is a `with` around
# each step, and that the steps keep to the order of the game's turns. The large ``eps`` keeps training smooth (docs/games.md).

critics = torch.optim.Adam(model["discriminator"].parameters(), lr=0.01, betas=(0.5, 0.99), eps=1e-2)
makers = torch.optim.Adam(model["generator"].parameters(), lr=0.01, betas=(0.5, 0.99), eps=1e-2)
recorder = Recorder(model, images, game, [critics, makers])
order = torch.Generator().manual_seed(0)

for _ in range(60):
    for ids in torch.randperm(len(images), generator=order).split(250):
        with recorder.step(ids):
            critics.zero_grad()
            fakes = model["generator"](torch.randn(len(ids), game.latent)).detach()
            reals = images[ids].requires_grad_()
            logits = model["discriminator"](reals)
            (slopes,) = torch.autograd.grad(logits.sum(), reals, create_graph=True)
            loss = F.softplus(-logits).mean() + F.softplus(model["discriminator"](fakes)).mean()
            (loss + game.penalty / 2 * slopes.square().sum(1).mean()).backward()
            critics.step()
        with recorder.step(ids):
            makers.zero_grad()
            fakes = model["generator"](torch.randn(len(ids), game.latent))
            F.softplus(-model["discriminator"](fakes)).mean().backward()
            makers.step()

run = recorder.finish()
print(f"{len(run)} steps; {roughness(run)}")

# %%
# Eight generated digits. What is asked of each is a number: how clearly a fixed classifier sees its class.

noise, classes = case.queries(model, 8, seed=2)
margins = game.measurements(model, (noise, classes)).detach()
query = int(margins.argmax())
for row in model["generator"](noise[query]).detach().reshape(8, 8):
    print("".join(" .:-=+*#%@"[int(9.99 * value)] * 2 for value in row))
print(f"a generated {int(classes[query])}, margin {margins[query]:.2f}")

# %%
# Scores of all 500 images for all eight, exactly, back through every step of both players.

scores = attribute(run, (noise, classes), method=Unrolled(), check_roughness=False)
for lowering in (False, True):
    ranked = [int(case.labels[one.example_id]) for one in scores.top(query, 10, lowering=lowering)]
    print(f"{'lowered' if lowering else 'raised'} most by images of {ranked}")

# %%
# Is it true? Train again without the twenty that raised it most, and without twenty others.

strongest = [one.example_id for one in scores.top(query, 20)]
others = torch.randperm(500, generator=order)[:20].tolist()
for name, removed in (("the strongest twenty", strongest), ("any twenty", others)):
    weights = torch.ones(500).index_fill(0, torch.tensor(removed), 0.0)
    change = run.rerun(weights=weights).measurements((noise, classes))[query] - margins[query]
    print(f"without {name}: predicted {scores.predicted_change(removed)[query]:+.2f}, in fact {change:+.2f}")
