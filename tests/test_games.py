"""Games: recorded, replayed and differentiated as any other run."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrograd import TRAK, All, FixedPoint, Forward, TracIn, Unrolled, attribute, hypergradient, open_run, record
from retrograd.directions import Extragradient, LookAhead
from retrograd.errors import InputError, ModelChanged, ReplayMismatch
from retrograd.game import CoupledGame, FunctionGame, Game, players_of, turns_of
from retrograd.optim import ExtraGradient
from retrograd.params import flatten
from retrograd.trajectory import Recorder, StateVectors, TrainingState

COUNT = 9


class GAN:
    players: ClassVar[Any] = {"critic": "critic", "maker": ("maker.0", "maker.1", "maker.3")}

    def __init__(self, turns: Any = None):
        if turns is not None:
            self.turns = turns

    def losses(self, model: Any, batch: Any) -> Any:
        made = model["maker"](torch.randn(len(batch), 2, dtype=batch.dtype))
        real, fake = model["critic"](batch)[:, 0], model["critic"](made)[:, 0]
        return {"critic": F.softplus(-real) + F.softplus(fake), "maker": F.softplus(-fake)}

    def measurements(self, model: Any, batch: Any) -> Tensor:
        return model["critic"](batch)[:, 0]


class CoupledGAN:
    players: ClassVar[Any] = GAN.players

    def loss(self, model: Any, batch: Any, weights: Tensor) -> Any:
        made = model["maker"](torch.randn(len(batch), 2, dtype=batch.dtype))
        real, fake = model["critic"](batch)[:, 0], model["critic"](made)[:, 0]
        return {"critic": ((weights * (fake - real)).sum() / weights.sum()).exp(), "maker": -fake.mean()}

    measurements = GAN.measurements


def networks(seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    critic = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    maker = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2))
    return nn.ModuleDict({"critic": critic, "maker": maker}).double()


def points(seed: int = 1, count: int = COUNT) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_weight(example: int, weight: float) -> Tensor:
    return torch.ones(COUNT, dtype=torch.float64).index_fill(0, torch.tensor(example), weight)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.5)


def recorded(game: Any, **options: Any) -> Any:
    settings = {"optimizer": sgd, "epochs": 2, "batch_size": 3, "checkpoints": All(), **options}
    return record(networks(), points(), game, **settings)


TURNS = [None, ("critic", "maker"), ("critic", ("critic", "maker"))]
GAMES = [*(GAN(turns) for turns in TURNS), CoupledGAN()]
NAMED = ["at once", "in turns", "unequal turns", "coupled"]


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.02, eps=1e-2)


@pytest.mark.parametrize("optimizer", [sgd, adam], ids=["sgd", "adam"])
@pytest.mark.parametrize("game", GAMES, ids=NAMED)
def test_scores_equal_differences_of_retraining(game, optimizer):
    run, queries, size = recorded(game, optimizer=optimizer), points(2, 3), 1e-5
    scores = attribute(run, queries, method=Unrolled()).values
    for example in (0, 4):
        up, down = (run.rerun(weights=one_weight(example, 1 + sign * size)).measurements(queries) for sign in (1, -1))
        torch.testing.assert_close(scores[:, example], (up - down) / (2 * size), rtol=1e-5, atol=1e-8)


def dense(run: Any, step: int) -> tuple[Tensor, TrainingState, Any]:
    """∂s'/∂s of the parameters and slots by differentiating the step itself."""
    state, inputs = run.state(step), run.inputs(step)
    leaves = {**state.params, **{f"slot {name}": leaf for name, leaf in state.slots["velocity"].items()}}

    def stepped(own: dict[str, Tensor]) -> Tensor:
        params = {name: own[name] for name in state.params}
        slots = {"velocity": {name: own[f"slot {name}"] for name in state.params}}
        after = run.update_map.differentiable_step(replace(state, params=params, slots=slots), inputs)
        return flatten([*after.params.values(), *after.slots["velocity"].values()])

    run.update_map(state, inputs)  # which parameters have a gradient is found out here
    rows: Any = torch.func.jacrev(stepped)(leaves)
    return flatten(rows.values(), batched=True), state, inputs


@pytest.mark.parametrize("direction", [None, Extragradient(), LookAhead(0.1)], ids=str)
@pytest.mark.parametrize("game", GAMES, ids=NAMED)
def test_products_are_those_of_the_explicit_jacobian(game, direction):
    run = recorded(game, direction=direction)
    for step in (1, 2):
        matrix, state, inputs = dense(run, step)
        after = run.update_map(state, inputs)
        assert run.update_map.differentiable_step(state, inputs).difference(after, state) < 1e-12
        draw = torch.Generator().manual_seed(step)

        def vectors(draw: torch.Generator = draw, state: TrainingState = state) -> StateVectors:
            params, slots = (
                {n: torch.randn(2, *leaf.shape, generator=draw, dtype=leaf.dtype) for n, leaf in state.params.items()}
                for _ in range(2)
            )
            return StateVectors(params, {"velocity": slots}, {})

        def flat(one: StateVectors) -> Tensor:
            return flatten([*one.params.values(), *one.slots["velocity"].values()], batched=True)

        tangents, costates = vectors(), vectors()
        pushed = run.update_map.pushforward(state, inputs, tangents)
        torch.testing.assert_close(flat(pushed), flat(tangents) @ matrix.T, rtol=0, atol=1e-10)
        pulled = run.update_map.pullback(state, inputs, costates).costates
        torch.testing.assert_close(flat(pulled), flat(costates) @ matrix, rtol=0, atol=1e-10)


def test_retraining_of_many_equals_one_by_one():
    run = recorded(GAN(("critic", "maker")))
    weights = torch.rand(3, COUNT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states = run.state(0).map(lambda leaf: leaf.expand(3, *leaf.shape).clone())
    for step in range(4):
        inputs = run.inputs(step)
        states = run.update_map.many(states, inputs, weights[:, run.examples.rows(inputs.example_ids)])
    for row in range(3):
        alone = run.rerun(weights=weights[row]).state(4)
        for name, leaf in alone.params.items():
            torch.testing.assert_close(states.params[name][row], leaf, rtol=0, atol=1e-12)


@pytest.mark.parametrize("game", GAMES, ids=NAMED)
def test_hypergradients_of_a_game(game):
    run, query, size = recorded(game), points(2, 1), 1e-5

    def outcome(model: Any) -> Tensor:
        return model["critic"](query).sum()

    found = hypergradient(run, outcome, {"learning_rate", "initial_params"})
    forward = hypergradient(run, outcome, {"learning_rate"}, method=Forward())
    rates = [torch.full((2,), 0.1 + sign * size, dtype=torch.float64) for sign in (1, -1)]
    up, down = (run.rerun(hyper={"learning_rate": rate}).measurements(query) for rate in rates)
    expected = ((up - down) / (2 * size)).item()
    assert found["learning_rate"].sum().item() == pytest.approx(expected, rel=1e-6)
    assert forward["learning_rate"].sum().item() == pytest.approx(expected, rel=1e-6)
    start, name = run.state(0), "maker.0.weight"
    sides = []
    for sign in (1, -1):
        moved = {**start.params, name: start.params[name] + sign * size}
        sides.append(run.rerun(initial=replace(start, params=moved)).measurements(query))
    slope = ((sides[0] - sides[1]) / (2 * size)).item()
    assert found["initial_params"][name].sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_looking_ahead_at_the_learning_rate_has_no_derivative_by_it():
    run = recorded(GAN(), direction=Extragradient())
    with pytest.raises(InputError, match="rate of its own"):
        hypergradient(run, lambda model: model["critic"](points()).sum(), "learning_rate")
    own = recorded(GAN(), direction=Extragradient(0.1))
    found = hypergradient(own, lambda model: model["critic"](points()).sum(), "learning_rate")
    assert found["learning_rate"].isfinite().all()


def ordinary_loop(model: nn.ModuleDict, game: GAN, makers_turn: int = 1) -> Any:
    """A GAN script: two Adams, and a discriminator that sees made points cut off from their maker."""
    critics = torch.optim.Adam(model["critic"].parameters(), lr=0.02, betas=(0.5, 0.9), eps=1e-2)
    makers = torch.optim.Adam(model["maker"].parameters(), lr=0.01, betas=(0.0, 0.9), eps=1e-2)
    data = points()
    recorder = Recorder(model, data, game, [critics, makers], checkpoints=All())
    for number in range(8):
        ids = torch.arange(3) + number % 3
        with recorder.step(ids):
            made = model["maker"](torch.randn(3, 2, dtype=torch.float64))
            real, fake = model["critic"](data[ids]), model["critic"](made.detach() if number % 2 != makers_turn else made)
            if number % 2 == makers_turn:
                makers.zero_grad()
                F.softplus(-fake).mean().backward()  # leaves gradients in the critic, too
                makers.step()
            else:
                critics.zero_grad()
                (F.softplus(-real) + F.softplus(fake)).mean().backward()
                critics.step()
    return recorder.finish()


def test_an_ordinary_loop_with_two_optimizers():
    run = ordinary_loop(networks(), GAN(("critic", "maker")))
    assert run.state(8).equals(run.checkpoints.load(8))
    assert run.drift == 0.0
    queries, size = points(2, 2), 1e-5
    scores = attribute(run, queries, method=Unrolled()).values[:, 1]
    up, down = (run.rerun(weights=one_weight(1, 1 + sign * size)).measurements(queries) for sign in (1, -1))
    torch.testing.assert_close(scores, (up - down) / (2 * size), rtol=1e-4, atol=1e-7)


def test_turns_that_are_not_those_of_the_loop_are_found():
    with pytest.raises(ReplayMismatch):
        ordinary_loop(networks(), GAN(("critic", "maker")), makers_turn=0)


def test_a_group_of_two_players_in_turn_is_refused():
    model = networks()
    with pytest.raises(InputError, match="group of its own"):
        Recorder(model, points(), GAN(("critic", "maker")), torch.optim.Adam(model.parameters()))


def test_a_direction_goes_downhill_only():
    with pytest.raises(InputError, match="downhill"):
        recorded(GAN(), optimizer=lambda params: torch.optim.SGD(params, lr=0.1, maximize=True), direction=Extragradient())


def test_an_extragradient_optimizer_says_its_direction_itself():
    model, data = networks(), points()
    optimizer = ExtraGradient(torch.optim.SGD(model.parameters(), lr=0.1), rate=0.05)
    recorder = Recorder(model, data, GAN(), optimizer)
    ids = torch.arange(4)
    for _ in range(3):
        with recorder.step(ids):

            def closure() -> None:
                losses = GAN().losses(model, data[ids])
                for player, own in losses.items():
                    leaves = list(model[player].parameters())
                    found = torch.autograd.grad(own.mean(), leaves, retain_graph=True)
                    for leaf, grad in zip(leaves, found, strict=True):
                        leaf.grad = grad

            optimizer.step(closure)
    run = recorder.finish()
    assert run.update_map.gradient.direction == Extragradient(0.05)
    assert run.drift < 1e-9
    with pytest.raises(InputError, match="direction="):
        recorded(GAN(), optimizer=lambda params: ExtraGradient(sgd(params)))


def test_optimizers_of_two_kinds_are_refused():
    model = networks()
    both = [torch.optim.Adam(model["critic"].parameters()), torch.optim.SGD(model["maker"].parameters(), lr=0.1)]
    with pytest.raises(InputError, match="of one kind"):
        Recorder(model, points(), GAN(), both)


def test_a_parameter_of_two_optimizers_is_refused():
    model = networks()
    both = [torch.optim.SGD(model["critic"].parameters(), lr=0.1), torch.optim.SGD(model.parameters(), lr=0.1)]
    with pytest.raises(InputError, match="by two optimizers"):
        Recorder(model, points(), GAN(), both)


def test_run_folder_knows_players_turns_and_direction(tmp_path):
    game = GAN(("critic", "maker"))
    run = recorded(game, folder=tmp_path / "run", direction=Extragradient(0.1))
    again = open_run(tmp_path / "run", networks(3), points(), game, direction=Extragradient(0.1))
    assert again.digest == run.digest
    assert torch.equal(again.measurements(points()), run.measurements(points()))
    with pytest.raises(ModelChanged, match="turns"):
        open_run(tmp_path / "run", networks(3), points(), GAN(("maker", "critic")), direction=Extragradient(0.1))
    with pytest.raises(ModelChanged, match="direction="):
        open_run(tmp_path / "run", networks(3), points(), game)
    with pytest.raises(ModelChanged, match="direction"):
        open_run(tmp_path / "run", networks(3), points(), game, direction=Extragradient(0.2))


def test_resumed_recording_of_a_game_has_the_same_bits(tmp_path):
    whole = recorded(GAN(("critic", "maker")), optimizer=adam)
    recorded(
        GAN(("critic", "maker")), optimizer=adam, folder=tmp_path / "run", epochs=None, batch_size=None, order=orders(whole)[:7]
    )
    rest = recorded(
        GAN(("critic", "maker")),
        optimizer=adam,
        folder=tmp_path / "run",
        resume=True,
        epochs=None,
        batch_size=None,
        order=orders(whole),
    )
    assert rest.final_state.equals(whole.final_state)


def orders(run: Any) -> list[Tensor]:
    return [one.example_ids for one in run.records]


def test_a_batch_serves_every_turn():
    run = recorded(GAN(("critic", "maker")))
    ids = orders(run)
    assert len(ids) == 12
    assert all(torch.equal(ids[step], ids[step + 1]) for step in range(0, 12, 2))
    before, after = run.state(0), run.state(1)
    moved = {name for name in before.params if not torch.equal(before.params[name], after.params[name])}
    assert moved == {name for name in before.params if name.startswith("critic")}


def test_methods_that_need_one_loss_say_so():
    run = recorded(GAN())
    with pytest.raises(InputError, match="Unrolled"):
        attribute(run, points(), method=TracIn())
    with pytest.raises(InputError, match="Unrolled"):
        attribute(run, points(), method=TRAK())
    with pytest.raises(InputError, match="Gauss-Newton"):
        attribute(run, points(), method=Unrolled(curvature="gauss_newton"))
    with pytest.raises(InputError, match="symmetric"):
        hypergradient(run, lambda model: model["critic"](points()).sum(), "example_weights", method=FixedPoint())


def test_meta_modules_reach_the_players():
    class Weighted(GAN):
        def losses(self, model: Any, batch: Any, meta: Any = None) -> Any:
            return {player: meta.module.scale * own for player, own in super().losses(model, batch).items()}

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    run, query, size = recorded(Weighted(), meta=Scale()), points(2, 1), 1e-5
    found = hypergradient(run, lambda model: model["critic"](query).sum(), {"meta"})["meta"]["scale"].item()
    up, down = (
        run.rerun(meta={"scale": torch.tensor(1.5 + sign * size, dtype=torch.float64)}).measurements(query) for sign in (1, -1)
    )
    assert found == pytest.approx(((up - down) / (2 * size)).item(), rel=1e-6)


class Case:
    measurements = GAN.measurements
    losses = GAN.losses

    def __init__(self, players: Any, turns: Any = None):
        self.players = players
        if turns is not None:
            self.turns = turns


@pytest.mark.parametrize(
    ("players", "says"),
    [
        ({"critic": "critic"}, "belongs to none"),
        ({"critic": "critic", "maker": "maker", "both": "maker.0"}, "exactly one player"),
        ({"critic": "critic", "maker": "maker", "nobody": "other"}, "trains nothing"),
    ],
)
def test_players_must_share_the_parameters(players, says):
    with pytest.raises(InputError, match=says):
        players_of(Case(players), [name for name, _ in networks().named_parameters()])


@pytest.mark.parametrize("turns", [("critic", "painter"), (), ("critic", ())], ids=str)
def test_turns_must_name_players(turns):
    with pytest.raises(InputError, match="turns must name players"):
        turns_of(Case(GAN.players, turns))


def test_a_loss_for_each_player():
    class Half(GAN):
        def losses(self, model: Any, batch: Any) -> Any:
            return {"critic": super().losses(model, batch)["critic"]}

    with pytest.raises(InputError, match="each of its players"):
        recorded(Half())


def test_protocols():
    assert isinstance(GAN(), Game)
    assert isinstance(CoupledGAN(), CoupledGame)
    assert not isinstance(GAN(), CoupledGame)


def test_bilinear_game_turns_in_circles_of_the_known_radius():
    """Simultaneous steps multiply the distance by √(1 + η²); extragradient by √((1 − η²)² + η²)."""
    game = FunctionGame({"x": lambda w: w["x"] * w["y"], "y": lambda w: -w["x"] * w["y"]})
    start = {"x": torch.tensor(1.0, dtype=torch.float64), "y": torch.tensor(0.0, dtype=torch.float64)}
    order, rate = torch.zeros(5, 1, dtype=torch.int64), 0.3
    for direction, factor in ((None, (1 + rate**2) ** 0.5), (Extragradient(), ((1 - rate**2) ** 2 + rate**2) ** 0.5)):
        run = record(
            game.profile(start),
            torch.zeros(1),
            game,
            optimizer=lambda params: torch.optim.SGD(params, lr=rate),
            order=order,
            direction=direction,
        )
        end = run.final_state.params
        assert (end["x"] ** 2 + end["y"] ** 2).sqrt().item() == pytest.approx(factor**5, rel=1e-12)
    with pytest.raises(InputError, match="each player"):
        game.profile({"x": torch.tensor(1.0)})
