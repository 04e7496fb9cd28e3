"""The command line: what it prints, what it exits with, and that errors are messages."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import retrograd
from retrograd import cli
from retrograd.cli import console, contents
from retrograd.cli.contents import read_contents
from retrograd.errors import CorruptRecord, RetrogradError
from retrograd.trajectory import digests
from retrograd.trajectory.store import RunFolder


class Killed(Exception):
    pass


class DyingTask(retrograd.Classification):
    """Stands for kill −9: training ends without a word after so many batches."""

    left = 30

    def losses(self, model, batch):
        if model.training:
            self.__dict__["left"] = self.left - 1
            if self.left < 0:
                raise Killed
        return super().losses(model, batch)


def recorded(folder, task=None):
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(40, 3, generator=generator), torch.randint(0, 2, (40,), generator=generator)
    retrograd.record(
        nn.Linear(3, 2),
        (inputs, labels),
        task or retrograd.Classification(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9),
        learning_rates=torch.linspace(0.5, 0.1, 40).tolist(),
        epochs=5,
        batch_size=5,
        clip_norm=1.0,
        folder=folder,
    )
    return folder


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_version():
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, f"retrograd {retrograd.__version__}\n")


def test_show_says_what_was_recorded(tmp_path):
    result = call("show", recorded(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    for part in (
        "complete, 40 steps",
        "Linear, 8 parameters in 2 tensors",
        "Classification(measurement='margin'",
        "learning_rate 0.5 → 0.1, momentum 0.9",
        "global norm at 1",
        "40 examples",
        "█",
        "Checked",
    ):
        assert part in result.stdout, result.stdout


def test_show_as_json(tmp_path):
    result = call("show", recorded(tmp_path / "run"), "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert found["status"] == "complete"
    assert found["model"] == {"class": "Linear", "parameters": 8, "tensors": 2}
    assert found["data"]["count"] == found["checked"]["examples"] == 40
    assert found["checkpoints"][0] == 0
    assert found["checkpoints"][-1] == found["steps"] == 40
    assert found["checked"]["checkpoints"] == len(found["checkpoints"])
    assert found["optimizer"]["last"][0]["learning_rate"] == pytest.approx(0.1)
    assert found["loss"]["first"] > 0
    assert found["bytes"] == sum(file.stat().st_size for file in (tmp_path / "run").rglob("*") if file.is_file())


def test_show_without_a_run(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        result = call("show", folder)
        assert result.exit_code == 1
        assert "holds no run" in result.stderr
        assert result.stdout == ""
    result = call("show", tmp_path, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"] == "NotRecorded"


def test_show_a_killed_recording(tmp_path):
    with pytest.raises(Killed):
        recorded(tmp_path / "run", DyingTask())
    result = call("show", tmp_path / "run")
    assert result.exit_code == 1
    assert "incomplete" in result.stdout
    assert "resume=True" in result.stderr
    as_json = call("show", tmp_path / "run", "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["status"] == "incomplete"


def torn(file):
    file.write_bytes(file.read_bytes()[:-9])


def flipped(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1  # the end of a checkpoint is numbers
    file.write_bytes(content)


def deleted(file):
    file.unlink()


def renamed(file):
    file.rename(file.with_name("000000000007.safetensors"))


def edited(old, new):
    def change(file):
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    change.__name__ = f"{old!r}→{new!r}"
    return change


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("run.json", torn),
        ("run.json", edited('"Linear"', '"Conv2d"')),
        ("run.json", edited('"count": 40', '"count": 41')),
        ("run.json", edited('"steps": 40', '"steps": 39')),
        ("run.json", edited('"model": {', '"model": 3, "old": {')),
        ("run.json", edited('"clip_norm": 1.0', '"clip_norm": 2.0')),
        ("data.parquet", torn),
        ("data.parquet", deleted),
        ("steps.parquet/part-000000000000.parquet", torn),
        ("steps.parquet/part-000000000000.parquet", deleted),
        ("steps.parquet/part-000000000032.parquet", deleted),
        ("checkpoints/000000000000.safetensors", flipped),
        ("checkpoints/000000000008.safetensors", torn),
        ("checkpoints/000000000008.safetensors", flipped),
        ("checkpoints/000000000008.safetensors", renamed),
        ("checkpoints/000000000008.safetensors", deleted),
        ("checkpoints/000000000040.safetensors", flipped),
        ("checkpoints/000000000040.safetensors", deleted),
        ("checkpoints/000000000000.safetensors", deleted),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_show_finds_damage(tmp_path, file, damage):
    folder = recorded(tmp_path / "run")
    damage(folder / file)
    with pytest.raises(CorruptRecord):
        read_contents(folder)
    result = call("show", folder)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "as this version writes it" not in result.stderr  # each kind of damage is named, none merely stumbled upon
    assert "Traceback" not in result.output
    assert json.loads(call("show", folder, "--json").stdout)["error"] == "CorruptRecord"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_norm": 2.0}, "does not begin with"),
        ({"steps": 41}, "the run had 41"),
        ({"model": 3}, "does not begin with"),
        ({"data": []}, "as this version writes it"),
    ],
)
def test_show_finds_damage_with_a_digest_of_its_own(tmp_path, change, message):
    folder = RunFolder(recorded(tmp_path / "run"))
    folder.write_manifest(folder.manifest() | change)
    result = call("show", folder.path)
    assert result.exit_code == 1
    assert message in result.stderr


def test_digests_are_those_of_the_library(tmp_path):
    # `show` computes the first digest from run.json, the library from the live objects: they must stay the same thing.
    run = retrograd.record(
        model := nn.Linear(1, 1),
        data := (torch.ones(4, 1), torch.ones(4, 1)),
        retrograd.Regression(),
        optimizer=lambda params: torch.optim.Adam(params, betas=(0.8, 0.99)),
        epochs=2,
        batch_size=2,
        folder=tmp_path / "run",
    )
    assert read_contents(tmp_path / "run")["head"] == run.digest == digests.chain(run.genesis(), run.records)[-1]
    assert retrograd.open_run(tmp_path / "run", model, data, retrograd.Regression()).digest == run.digest


def test_errors_are_messages(monkeypatch):
    def fail(output):
        raise RetrogradError("this is what happened [and] how to help.")

    monkeypatch.setattr("retrograd.demo.run_demo", fail)
    result = call("demo")
    assert result.exit_code == 1
    assert result.stderr.strip().endswith("error: this is what happened [and] how to help.")


def test_bars_take_phases_in_any_order():
    with console.progress_bars():
        for phase, done, total in [("a", 0, 3), ("b", 0, 2), ("a", 1, 3), ("b", 2, 2), ("b", 0, 5), ("c", 4, 4), ("a", 3, 3)]:
            retrograd.progress._reporter.get()(phase, done, total)
        bars = retrograd.progress._reporter.get()
        assert [(task.description, task.completed, task.total) for task in bars._progress.tasks] == [
            ("a", 3, 3),
            ("b (2)", 0, 5),
            ("c", 4, 4),
        ]


def test_a_stranger_cannot_steer_the_terminal():
    assert contents._printable("a\x1b[2Jb\nc") == "a\N{REPLACEMENT CHARACTER}[2Jb\nc"


def test_without_typer_it_says_how_to_install():
    code = "import sys; sys.modules['typer'] = None; from retrograd.cli import app; app()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install 'retrograd[cli]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_demo_prints_the_checks(tmp_path, monkeypatch):
    from retrograd import demo

    run_demo = demo.run_demo
    monkeypatch.setattr("retrograd.demo.TRAINING_IMAGES", 1700)
    monkeypatch.setattr("retrograd.demo.run_demo", lambda output: run_demo(output, epochs=2, subsets=8))
    result = call("demo", "-o", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "demo" / "results.json").read_text())
    for method in figures["methods"]:
        assert f"{method['says']}.\n" in result.stdout
        for advice in method["advice"]:
            assert f"What to try: {advice}\n" in result.stdout
    assert result.stdout.count("No sum of one number for each example could pass r = ") == 1
