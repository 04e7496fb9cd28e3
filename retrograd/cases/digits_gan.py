"""A GAN on 8×8 digits, small enough to differentiate through its training: which real images shaped a generated one?

    L_D = Σ_i w_i (softplus(−D(x_i)) + γ/2 ‖∇_x D(x_i)‖²) / Σ_i w_i  +  Σ_i softplus(D(G(z_i))) / B        discriminator
    L_G = Σ_i softplus(−D(G(z_i))) / B                                                                    generator
    f(z, c) = log p_c(G(z)) − log(1 − p_c(G(z)))                                                          what is asked

Symbols: x_i the B real images of a batch, 64 pixels in [0, 1] · w_i their weights · z_i ~ N(0, I) as much noise, drawn anew in
each step · D(x) the logit of "real" · G(z) a generated image · γ weight of the penalty R₁ (Mescheder et al. 2018) · p_c a
fixed classifier's probability of class c.

**What is asked.** A query needs a number that depends on the generator. The distance of G(z) to the image that the trained
generator makes of z will not do: it is at its minimum, so its derivative is 0 and nothing would have an influence. A
direction in the space of pixels would do, but nobody has a question about one. How clearly an image is a 7 is a question: so a
classifier, trained once on images that the GAN never sees, is a constant of the game, and its margin is what is asked. The
margin, not p: where p saturates, so does its derivative.

**An image's weight** multiplies what the discriminator sees of it and nothing else, and the other images share its place: with
a weight of 0 the mean is over them, as it is on average after deletion. Noise belongs to no image. (A game with ``losses``, one
an example, would take the example's noise out with it, and shrink the step.) The generator never sees a real image: all that
they do to it goes through the discriminator's parameters.

Assumes smoothness: GELU and a penalty, without which discriminators become steep and training rough (docs/games.md). Runs of
Adam want a large ``eps`` (1e-2, say): pixels that are always black have v ≈ 0, and a gradient that is divided by almost nothing
is amplified.

Cost: a step is one forward pass of both networks, one of D's gradient by the image if γ > 0, and the mover's reverse pass.

References: Goodfellow et al. (2014), "Generative adversarial networks"; Mescheder, Geiger & Nowozin (2018), "Which training
methods for GANs do actually converge?", for R₁; Heusel et al. (2017), "GANs trained by a two time-scale update rule converge
to a local Nash equilibrium", for the Fréchet distance.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from retrograd.errors import InputError
from retrograd.optional import optional

PIXELS, CLASSES = 64, 10
FEATURES = 16  # of the classifier's penultimate layer
TURNS = ("discriminator", "generator")


class DigitsGAN:
    """The game of a discriminator and a generator, submodules of one model with these names.

    Args:
        classifier: gives logits of the classes; its parameters are constants.
        latent: numbers in z.
        penalty: γ.
        turns: who moves in which step (see `retrograd.game`); None, and both move at once.

    Raises:
        InputError: the penalty is negative, or there is no noise.
    """

    players: ClassVar[dict[str, str]] = {player: player for player in TURNS}

    def __init__(self, classifier: nn.Module, latent: int = 8, penalty: float = 0.0, turns: Any = TURNS):
        if latent < 1 or not penalty >= 0:
            raise InputError(f"latent must be at least 1 and penalty at least 0, got {latent} and {penalty}.")
        self.classifier, self.latent, self.penalty = classifier.requires_grad_(False).eval(), latent, penalty
        if turns is not None:
            self.turns = turns

    def loss(
        self, model: Any, batch: Float[Tensor, "batch pixel"], weights: Float[Tensor, " batch"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Return each player's loss; the step's noise is drawn first, with as many rows as there are images."""
        discriminator = model["discriminator"]
        made = model["generator"](torch.randn(len(batch), self.latent, dtype=batch.dtype, device=batch.device))
        real, fake = discriminator(batch)[:, 0], discriminator(made)[:, 0]
        seen = F.softplus(-real)
        if self.penalty:
            # torch.func.grad works inside other transforms of torch.func and in autograd's graphs; autograd.grad only in these.
            slopes = torch.func.grad(lambda images: discriminator(images).sum())(batch)
            seen = seen + self.penalty / 2 * slopes.square().sum(1)
        weights = weights.to(seen)
        reals = (weights * seen).sum() / weights.sum()
        return {"discriminator": reals + F.softplus(fake).mean(), "generator": F.softplus(-fake).mean()}

    def measurements(
        self, model: Any, batch: tuple[Float[Tensor, "query latent"], Int[Tensor, " query"]]
    ) -> Float[Tensor, " query"]:
        """Return f of each (z, c)."""
        noise, classes = batch
        return margin(self.classifier(model["generator"](noise)), classes)


@dataclass(frozen=True)
class DigitsCase:
    """The game with its images.

    Attributes:
        game: the game.
        images: what the GAN is trained on.
        labels: their classes, which training does not see.
        held_out: images that neither the GAN nor the classifier has seen.
        held_out_labels: their classes.
        hidden: width of both networks.
    """

    game: DigitsGAN
    images: Float[Tensor, "example pixel"]
    labels: Int[Tensor, " example"]
    held_out: Float[Tensor, "other pixel"]
    held_out_labels: Int[Tensor, " other"]
    hidden: int

    def networks(self, seed: int) -> nn.ModuleDict:
        """Return new networks, to be trained.

        The generator's weights are normal with variance 2 / inputs (He et al. 2015). With torch's own, which are less than half
        as large, it begins by making the same image of every z, and when it parts them later it amplifies every difference.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            discriminator = _network(PIXELS, self.hidden, self.hidden, 1)
            generator = nn.Sequential(_network(self.game.latent, self.hidden, self.hidden, PIXELS), nn.Sigmoid())
            for layer in generator.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        return nn.ModuleDict({"discriminator": discriminator, "generator": generator}).to(self.images.dtype)

    def queries(self, model: Any, count: int, seed: int = 0) -> tuple[Float[Tensor, "query latent"], Int[Tensor, " query"]]:
        """Return questions about generated images: noise, and the class that each of its images most probably has.

        Args:
            model: the trained networks.
            count: how many.
            seed: of the noise.
        """
        noise = self.noise(count, seed)
        with torch.no_grad():
            return noise, self.game.classifier(model["generator"](noise)).argmax(1)

    def noise(self, count: int, seed: int) -> Float[Tensor, "query latent"]:
        """Return noise for so many images."""
        draw = torch.Generator().manual_seed(seed)
        return torch.randn(count, self.game.latent, generator=draw, dtype=torch.float64).to(self.images.dtype)

    def features(self, images: Float[Tensor, "image pixel"]) -> Float[Tensor, "image feature"]:
        """Return the classifier's penultimate layer."""
        classifier: Any = self.game.classifier
        with torch.no_grad():
            return classifier[:-1](images)

    def distance(self, images: Float[Tensor, "image pixel"]) -> float:
        """Return the Fréchet distance of images from those held out, in the classifier's features."""
        return frechet_distance(self.features(images), self.features(self.held_out))


def digits_gan(
    count: int = 500,
    *,
    latent: int = 8,
    hidden: int = 32,
    penalty: float = 0.1,
    turns: Any = TURNS,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> DigitsCase:
    """Return a GAN on scikit-learn's digits.

    Half of the images that the GAN leaves train the classifier, the others are held out.

    Args:
        count: images to train the GAN on, of 1,797.
        latent: numbers in z.
        hidden: width of the two hidden layers of either network.
        penalty: γ.
        turns: who moves in which step; None, and both move at once.
        dtype: of images, networks and classifier.
        seed: of the division of the images, and of the classifier.

    Raises:
        InputError: too few images are left, or too few asked for.
        MissingDependency: scikit-learn is not installed.

    >>> case = digits_gan(count=300)
    >>> case.game.turns, tuple(case.images.shape), tuple(case.held_out.shape)
    (('discriminator', 'generator'), (300, 64), (749, 64))
    """
    found = optional("sklearn.datasets", "cli").load_digits()
    images, labels = torch.as_tensor(found.data / 16), torch.as_tensor(found.target)
    if not 1 <= count <= len(images) - 400:
        raise InputError(f"count must be from 1 to {len(images) - 400}, so that others are left, got {count}.")
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    own, known, held = rows.split([count, (len(images) - count) // 2, len(images) - count - (len(images) - count) // 2])
    classifier = digits_classifier(images[known], labels[known], seed).to(dtype)
    game = DigitsGAN(classifier, latent, penalty, turns)
    return DigitsCase(game, images[own].to(dtype), labels[own], images[held].to(dtype), labels[held], hidden)


def digits_classifier(
    images: Float[Tensor, "example pixel"], labels: Int[Tensor, " example"], seed: int = 0, steps: int = 200
) -> nn.Sequential:
    """Return a small classifier: 64-32-16-10, trained on all images at once by Adam.

    Args:
        images: in [0, 1].
        labels: their classes.
        seed: of its first parameters.
        steps: of training.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(PIXELS, 32), nn.GELU(), nn.Linear(32, FEATURES), nn.Tanh(), nn.Linear(FEATURES, CLASSES)
        )
    model = model.to(images.dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


def margin(logits: Float[Tensor, "query label"], classes: Int[Tensor, " query"]) -> Float[Tensor, " query"]:
    """Return log p − log(1 − p) of the given classes: a class's logit less the log-sum-exp of all others.

    >>> margin(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([1]))              # 1 − log(1 + e)
    tensor([-0.3133])
    """
    own = F.one_hot(classes, logits.shape[1]).bool()
    others = torch.where(own, -torch.inf, logits).logsumexp(1)
    return logits.gather(1, classes[:, None])[:, 0] - others


def frechet_distance(first: Float[Tensor, "image feature"], second: Float[Tensor, "other feature"]) -> float:
    """Return the Fréchet distance of two normal distributions, fitted to two sets of features.

    ‖m₁ − m₂‖² + tr(C₁ + C₂ − 2 (C₁ C₂)^{1/2}), with means m and covariances C; the trace of the root is the sum of the singular
    values of C₁^{1/2} C₂^{1/2}.

    >>> points = torch.tensor([[-1.0], [1.0]])
    >>> round(frechet_distance(points, 2 * points + 3), 6)                      # 3² + (√8 − √2)²
    11.0
    """
    first, second = first.double(), second.double()
    roots = []
    for features in (first, second):
        values, vectors = torch.linalg.eigh(features.T.cov().reshape(features.shape[1], features.shape[1]))
        roots.append(vectors * values.clamp(min=0).sqrt() @ vectors.T)
    apart = (first.mean(0) - second.mean(0)).square().sum()
    spread = sum(root.square().sum() for root in roots) - 2 * torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    return float(apart + spread)


def _network(inside: int, middle: int, second: int, outside: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inside, middle), nn.GELU(), nn.Linear(middle, second), nn.GELU(), nn.Linear(second, outside))
