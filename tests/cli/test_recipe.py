"""The recipe runner, in this process: flags, folders, resuming, what it prints and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console

from lit_scale.callbacks import ProgressiveStacking
from lit_scale.cli import Recipe, RecipeCLI, run_recipe
from lit_scale.cli.flags import _validation_times
from lit_scale.cli.recipe import _python
from lit_scale.cli.report import comparison_table, priced_alike
from lit_scale.datamodules import TextDataModule
from lit_scale.models import BertMLM
from tests.support.equality import same

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")

DEFAULTS = {
    "trainer.max_steps": 8,
    "model.depth": 4,
    "model.width": 16,
    "model.num_heads": 2,
    "data.sequence_length": 16,
    "data.batch_size": 4,
    "data.max_val_sequences": 16,
    "progressive_stacking.stages": [(0.0, 0.25), (0.25, 0.5), (0.5, 1.0)],
}


class Model(BertMLM):
    """Does something at a training step, once."""

    act: tuple[int, Callable[[], None]] | None = None

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        kind = type(self)
        if kind.act is not None and self.trainer.global_step == kind.act[0]:
            act, kind.act = kind.act[1], None
            act()
        return super().training_step(batch, batch_idx)


@pytest.fixture
def run(tiny_corpus: Path, own_folder: Path) -> Callable[..., dict[str, Any]]:
    """Run a tiny recipe with these flags; ``at=(step, what)`` lets something happen in that training step."""

    def run(*args: str, at: Any = None, bar: bool = False, **options: Any) -> dict[str, Any]:
        Model.act = at
        flags = [f"--data.corpus={tiny_corpus}", *([] if bar else ["--trainer.enable_progress_bar=false"]), *args]
        kinds: dict[str, Any] = {"technique": ProgressiveStacking, "defaults": DEFAULTS} | options
        return run_recipe(Model, TextDataModule, args=flags, **kinds)

    return run


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def ends_with(code: int, run: Callable[..., Any], *args: str, **options: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*args, **options)
    assert caught.value.code == code


def weights(root: Path | str) -> dict[str, torch.Tensor]:
    return torch.load(Path(root) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def same_weights(one: Path | str, other: Path | str) -> bool:
    return same(weights(one), weights(other))


# -- flags ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The flags as they are read, without a run."""
    monkeypatch.chdir(tmp_path)
    recipe = Recipe("tiny", "", [], BertMLM, TextDataModule, (ProgressiveStacking,), DEFAULTS)
    return lambda *args: RecipeCLI(recipe, ["--compare", *args]).config


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("[[0,2],[0.3,4],[0.6,8]]", [(0.0, 2), (0.3, 4), (0.6, 8)]),
        ("[[0,1],[0.6,1.0]]", [(0.0, 1), (0.6, 1.0)]),
        ("[[0.0,0.5],[0.5,4]]", [(0.0, 0.5), (0.5, 4)]),
    ],
)
def test_numbers_of_blocks_stay_whole_and_fractions_stay_fractions(parse, text, stages):
    found = [tuple(stage) for stage in parse("--progressive_stacking.stages", text).progressive_stacking.stages]
    assert found == stages
    assert [type(depth) for _, depth in found] == [type(depth) for _, depth in stages]


@pytest.mark.parametrize(
    ("args", "steps"),
    [
        ([], 8),
        (["--trainer.max_steps=5"], 5),
        (["--trainer.max_epochs=2"], -1),
        (["--trainer.max_epochs=-1"], 8),
        (["--trainer.max_time=00:00:01:00"], -1),
        (["--trainer.max_epochs=2", "--trainer.max_steps=8"], 8),
        (["--config=limits.yaml"], -1),
    ],
)
def test_the_recipes_length_gives_way_to_other_limits(parse, args, steps):
    Path("limits.yaml").write_text("trainer:\n  max_epochs: 3\n")
    assert parse(*args).trainer.max_steps == steps


def test_help_and_print_config_show_the_recipes_defaults(run, capsys):
    ends_with(0, run, "--help")
    shown = capsys.readouterr().out
    assert "The recipe runner, in this process" in shown  # what the recipe's file says of itself
    about = shown.partition("--trainer.max_steps MAX_STEPS")[2].partition("--trainer.min_steps")[0]
    assert about.split()[-2:] == ["default:", "8)"]
    assert re.search(r"--progressive_stacking.growth \{stack,interleave\}", shown)
    assert "--optimizer " not in shown  # those of LightningCLI, which the model would ignore
    ends_with(0, run, "--print_config", "--model.width=32")
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["trainer"]["max_steps"], config["model"]["width"]) == (8, 32)
    ends_with(0, run, "--print_config", "--trainer.max_epochs=2")
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_steps"] == -1


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_steps": 600}, (60, None)),
        ({"max_steps": 97}, (9, None)),
        ({"max_steps": 3}, (1, None)),
        ({"max_steps": 100, "accumulate_grad_batches": 4}, (40, None)),
        ({"max_epochs": 1}, (0.1, 1)),
        ({"max_epochs": 4}, (0.4, 1)),
        ({"max_epochs": 10}, (1.0, 1)),
        ({"max_epochs": 25}, (1.0, 2)),
        ({"max_time": "00:01:00:00"}, ("00:00:06:00", 1)),
        ({"max_time": {"seconds": 3}}, ("00:00:00:01", 1)),
        ({}, (1.0, 1)),
    ],
)
def test_a_run_is_validated_about_ten_times(limits, expected):
    from types import SimpleNamespace

    defaults = {"max_steps": -1, "max_epochs": None, "max_time": None, "accumulate_grad_batches": 1}
    found = _validation_times(SimpleNamespace(**(defaults | limits)))
    assert found == expected
    assert [type(value) for value in found] == [type(value) for value in expected]


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "code", "message"),
    [
        (
            "--trainer.max_stepss=3",
            2,
            "unrecognized arguments: --trainer.max_stepss=3; did you mean --trainer.max_steps?",
        ),
        ("--what", 2, "unrecognized arguments: --what; --help lists all flags"),
        ("nonsense", 2, "unrecognized arguments: nonsense"),
        ("--model.depth=abc", 2, "--model.depth: expected int. Got value: abc"),
        ("--progressive_stacking.growth=up", 2, "--progressive_stacking.growth: expected one of 'stack', 'interleave'"),
        ("--progressive_stacking.stages=abc", 2, "--progressive_stacking.stages: expected Sequence. Got value: abc"),
        ("--seed_everything=true", 2, "--seed_everything: expected int"),
        ("--config=no.yaml", 2, "--config: File does not exist"),
        ("--model.num_heads=3", 1, "width=16 is not a multiple of num_heads=3"),
        ("--progressive_stacking.stages=[[0.5,1],[0.3,4]]", 1, "starts must ascend from 0.0"),
        ("--progressive_stacking.stages=[[0,1],[1.5,4]]", 1, "stay below 1.0"),
        ("--progressive_stacking.stages=[[0,4],[0.5,8]]", 1, "depth 8 is more than the 4 blocks"),
        ("--progressive_stacking.stages=[[0,0.3],[0.5,1.0]]", 1, "0.3 of 4 blocks is 1.2, not a whole number"),
        ("--trainer.accumulate_grad_batches=0", 1, "accumulate_grad_batches=0 must be at least 1"),
        ("--trainer.accelerator=tpu", 1, "error: Requirement 'torch_xla"),
        ("--trainer.default_root_dir=s3://bucket/run", 1, "give a local folder"),
        ("--trainer.max_steps=0", 1, "the run made no step"),
        ("--ckpt_path=no.ckpt", 1, "ckpt_path='no.ckpt' does not exist"),
        ("--data.corpus=[/no/such/text]", 1, "matches no file"),
    ],
)
def test_errors_are_one_line(run, capsys, flag, code, message):
    ends_with(code, run, flag)
    printed = capsys.readouterr()
    assert re.fullmatch(r"error: [^\n]+\n", printed.err), printed.err
    assert message in printed.err
    assert "Traceback" not in printed.out + printed.err


def test_errors_of_our_own_name_their_kind_and_show_their_place_on_request(run, capsys, monkeypatch):
    def broken() -> None:
        raise KeyError("[bold]a bug[/]")  # what looks like markup stays

    ends_with(1, run, at=(1, broken))
    assert capsys.readouterr().err == "error: KeyError: '[bold]a bug[/]' (LIT_SCALE_TRACEBACK=1 shows where)\n"
    monkeypatch.setenv("LIT_SCALE_TRACEBACK", "1")
    with pytest.raises(KeyError, match="a bug"):
        run(at=(1, broken))
    with pytest.raises(ArgumentError, match="unrecognized"):
        run("--what")


def test_an_interrupt_before_training_is_130(run, capsys, monkeypatch):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TextDataModule, "prepare_data", interrupted)
    ends_with(130, run)
    assert capsys.readouterr().err == "error: interrupted; nothing was saved since the last checkpoint\n"


# -- what a run prints ------------------------------------------------------------------------------------------------


def test_a_run_prints_its_report_and_nothing_else(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    records = run("--trainer.max_steps=12")
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[0] == "test_recipe (progressive_stacking): 18,098 parameters, cpu, into runs/test_recipe"
    record = records["progressive_stacking"]
    table = [line.split() for line in lines if re.match(r"\s+(\d|all|blocks)", line)]
    assert table[0] == ["blocks", "from", "step", "steps", "tokens", "FLOPs", "ref.", "s", "val", "loss"]
    assert [row[:3] for row in table[1:4]] == [["1", "0", "3"], ["2", "3", "3"], ["4", "6", "6"]]
    assert table[4][:2] == ["all", "12"]
    assert table[4][-1] == f"{record['metrics']['val/loss']:.3f}"
    assert max(map(len, lines[1:-2])) <= 80  # the first and last name the folder
    assert re.search(r"against 12 steps of the full model: -\d+% FLOPs, [-+]\d+% reference seconds", printed.out)
    assert re.search(r"validation loss [\d.]+ nats, \d+% above the unigram entropy, [\d.]+", printed.out)
    assert lines[-1] == "written: runs/test_recipe/result.json, runs/test_recipe/result.png"
    assert all(Path("runs/test_recipe", name).exists() for name in ("result.json", "result.png", "config.yaml"))


@pytest.mark.parametrize("terminal", [True, False])
def test_news_pass_and_noise_does_not(terminal, run, capsys, monkeypatch):
    def news() -> None:
        rank_zero_info("an unusual message")
        rank_zero_warn("an unusual warning")
        rank_zero_info("GPU available: some")

    monkeypatch.setattr(Console, "is_terminal", terminal)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run("--trainer.max_steps=2", at=(1, news), bar=True)
    shown = [str(warning.message) for warning in caught]
    assert "an unusual warning" in shown
    assert not [text for text in shown if "LeafSpec" in text or "LightningCLI" in text]
    out = capsys.readouterr().out
    assert ("Epoch 0 " in out) == terminal
    assert "/-2" not in out
    assert (re.search(r"^step 2 of 2: val/loss [\d.]+, ", out, re.M) is None) == terminal


# -- runs of any length -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 23])
def test_a_short_run_ends_with_a_validation_and_a_checkpoint(run, steps):
    record = run(f"--trainer.max_steps={steps}")["progressive_stacking"]
    points = [point["step"] for point in record["curve"]]
    assert points[-1] == record["steps"] == steps
    assert points == sorted(set(points))
    assert len(points) == min(steps, 12)
    assert record["curve"][-1]["flops"] == record["flops"]
    checkpoint = torch.load("runs/test_recipe/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == steps
    assert json.loads(Path("runs/test_recipe/result.json").read_text()) == record


def test_a_run_by_epochs(run):
    record = run("--trainer.max_epochs=2", "--data.batch_size=256")["progressive_stacking"]
    assert record["steps"] % 2 == 0
    assert record["curve"][-1]["step"] == record["steps"]
    assert [stage["progressive_stacking/blocks"] for stage in record["stages"]] == [1, 2, 4]
    assert len(record["curve"]) >= 5


def test_a_run_by_time(run):
    record = run("--trainer.max_time=00:00:00:03")["progressive_stacking"]
    assert 2 < record["wall_seconds"] < 60
    assert record["curve"][-1]["step"] == record["steps"]
    assert yaml.safe_load(Path("runs/test_recipe/config.yaml").read_text())["trainer"]["max_steps"] == -1


def test_lightnings_own_flags_still_work(run):
    record = run(
        *("--trainer.logger=true", "--trainer.log_every_n_steps=1"),
        *("--trainer.enable_checkpointing=false", "--trainer.limit_val_batches=0"),
        '--trainer.callbacks=[{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}]',
    )["progressive_stacking"]  # fmt: skip
    assert record["metrics"] == {}
    assert not Path("runs/test_recipe/checkpoints").exists()
    assert list(Path("runs/test_recipe/lightning_logs").rglob("metrics.csv"))


# -- folders ----------------------------------------------------------------------------------------------------------


def test_the_config_of_a_run_runs_it_again(run, tmp_path):
    stages = "--progressive_stacking.stages=[[0,1],[0.5,1.0]]"
    run(
        "--model.width=32",
        stages,
        "--trainer.default_root_dir=first",
        "--trainer.max_epochs=1",
        "--data.batch_size=256",
    )
    run("--config=first/config.yaml", "--trainer.default_root_dir=second")
    one, other = (yaml.safe_load(Path(name, "config.yaml").read_text()) for name in ("first", "second"))
    assert one.pop("trainer") | {"default_root_dir": ""} == other.pop("trainer") | {"default_root_dir": ""}
    assert one == other
    assert one["progressive_stacking"]["stages"] == [[0.0, 1], [0.5, 1.0]]
    assert same_weights("first", "second")


def test_a_second_run_moves_the_first_aside(run, capsys):
    run("--trainer.max_steps=2")
    Path("runs/test_recipe/notes.txt").write_text("mine")
    run("--trainer.max_steps=3")
    assert "runs/test_recipe held another run; it is now in runs/test_recipe/earlier-1\n" in capsys.readouterr().out
    steps = {
        folder: json.loads(Path(folder, "result.json").read_text())["steps"]
        for folder in ("runs/test_recipe", "runs/test_recipe/earlier-1")
    }
    assert list(steps.values()) == [3, 2]
    assert weights("runs/test_recipe/earlier-1")
    assert Path("runs/test_recipe/notes.txt").read_text() == "mine"
    ends_with(1, run, "--progressive_stacking.stages=[[0,8]]")
    ends_with(2, run, "--what")
    assert not Path("runs/test_recipe/earlier-2").exists(), "a run that never starts moves nothing"
    run("--trainer.max_steps=3", "--ckpt_path=runs/test_recipe/earlier-1/checkpoints/last.ckpt")
    assert json.loads(Path("runs/test_recipe/earlier-2/result.json").read_text())["steps"] == 3


def test_the_name_is_that_of_the_file_unless_there_is_none(run, tmp_path):
    run("--trainer.max_steps=1", "--model.depth=4", name="mine")
    assert json.loads(Path("runs/mine/result.json").read_text())["recipe"] == "mine"
    space = {"run": run, "__name__": "__main__"}
    exec("from lit_scale.cli import run_recipe", space)
    code = "run_recipe(M, D, technique=T, defaults=F, args=A)"
    flags = [f"--data.corpus={tmp_path}/corpus", "--trainer.max_steps=1", "--trainer.enable_progress_bar=false"]
    exec(code, space | {"M": BertMLM, "D": TextDataModule, "T": ProgressiveStacking, "F": DEFAULTS, "A": flags})
    assert Path("runs/progressive_stacking/result.json").exists()


# -- resuming ---------------------------------------------------------------------------------------------------------


def printed_command(text: str) -> list[str]:
    import shlex

    said = re.search(r"resume with: (.*)", text)
    assert said is not None
    return shlex.split(said[1])


def test_a_preempted_run_resumes_to_the_same_end_in_its_folder(run, capsys):
    run("--trainer.default_root_dir=whole")
    ends_with(143, run, "--trainer.default_root_dir=parts", at=(5, terminate))
    command = printed_command(capsys.readouterr().out)
    assert command[1:3] == [__file__, command[2]]
    run("--trainer.default_root_dir=parts", command[-2], command[-1])
    assert same_weights("whole", "parts")
    assert not list(Path("parts").glob("earlier-*"))
    whole, parts = (json.loads(Path(name, "result.json").read_text()) for name in ("whole", "parts"))
    for name in ("steps", "samples", "tokens", "flops", "metrics"):
        assert whole[name] == parts[name]
    assert yaml.safe_load(Path("parts/config.yaml").read_text())["ckpt_path"] is None


def test_a_finished_run_resumed_stays_as_it_is(run):
    run("--trainer.max_steps=7")
    before = json.loads(Path("runs/test_recipe/result.json").read_text())
    record = run("--trainer.max_steps=7", "--ckpt_path=runs/test_recipe/checkpoints/last.ckpt")["progressive_stacking"]
    assert (record["steps"], record["flops"], record["metrics"]) == (7, before["flops"], before["metrics"])


@pytest.mark.parametrize("arm", ["baseline", "progressive_stacking"])
def test_an_interrupted_comparison_goes_on_in_either_arm(run, capsys, arm):
    first = {"at": (5, terminate)}
    if arm == "progressive_stacking":  # let the baseline pass, then interrupt
        first = {"at": (0, lambda: setattr(Model, "act", (0, lambda: setattr(Model, "act", (5, terminate)))))}
    run("--compare", "--trainer.default_root_dir=whole")
    ends_with(143, run, "--compare", "--trainer.default_root_dir=parts", **first)
    command = printed_command(capsys.readouterr().out)
    assert command[-1].startswith(f"parts/{arm}/checkpoints/")
    records = run("--compare", "--trainer.default_root_dir=parts", *command[-2:])
    assert list(records) == ["baseline", "progressive_stacking"]
    for name in records:
        assert same_weights(f"whole/{name}", f"parts/{name}")
        assert not list(Path("parts", name).glob("earlier-*"))
    assert json.loads(Path("parts/comparison.json").read_text()).keys() == records.keys()


def test_what_would_mix_two_runs_is_refused_at_resume(run, capsys):
    run("--trainer.default_root_dir=stacked", "--trainer.max_steps=2")
    run("--trainer.default_root_dir=plain", "--trainer.max_steps=2", "--baseline")
    stacked, plain = (f"--ckpt_path={name}/checkpoints/last.ckpt" for name in ("stacked", "plain"))
    capsys.readouterr()
    for args, message in (
        ([stacked, "--baseline"], "was trained with ProgressiveStacking: leave out --baseline"),
        ([plain], "was trained without ProgressiveStacking: add --baseline"),
        ([stacked, "--model.depth=8"], "other hyperparameters: depth (was 4, is 8)"),
        ([stacked, "--model.lr=0.5"], "lr (was 0.001, is 0.5)"),
        ([stacked, "--progressive_stacking.growth=interleave"], "growth='interleave') differs from the checkpoint's"),
        ([stacked, "--data.batch_size=8"], "batch"),
        ([stacked, "--seed_everything=9"], "seed"),
        (
            [stacked, "--compare"],
            "--compare resumes from checkpoints below runs/test_recipe/{baseline,progressive_stacking}",
        ),
    ):
        ends_with(1, run, *args)
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_comparison_prices_equal_steps_alike(run):
    records = run("--compare")
    stored = json.loads(Path("runs/test_recipe/baseline/result.json").read_text())
    price = {s["update"]: s["seconds_each"] for s in records["progressive_stacking"]["step_kinds"] if s["plain"]}[True]
    assert records["baseline"]["reference_seconds"] == pytest.approx(8 * price)
    assert stored["reference_seconds"] == pytest.approx(8 * stored["step_kinds"][0]["seconds_each"], rel=0.5)
    assert records["baseline"]["curve"][-1]["reference_seconds"] == pytest.approx(8 * price)
    assert records["baseline"]["flops"] == stored["flops"]
    slow = json.loads(json.dumps(stored))
    for shape in slow["step_kinds"]:
        shape["seconds_each"] *= 100
    for part in (slow, *slow["curve"], *slow["stages"]):
        part["reference_seconds"] *= 100
    again = priced_alike(slow, records["progressive_stacking"])
    assert again["reference_seconds"] == pytest.approx(records["baseline"]["reference_seconds"])
    assert comparison_table(records).row_count == 9


# -- as a process -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_recipe_as_a_module(tmp_path, tiny_corpus):
    code = (
        "from lit_scale.callbacks import ProgressiveStacking as T\nfrom lit_scale.cli import run_recipe\n"
        "from lit_scale.datamodules import TextDataModule as D\nfrom lit_scale.models import BertMLM as M\n"
        f"run_recipe(M, D, technique=T, defaults={DEFAULTS!r})\n"
    )
    flags = ["--trainer.max_steps=1", f"--data.corpus={tiny_corpus}", f"--data.cache_dir={tmp_path / 'cache'}"]
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "mine.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "inner.mine", *flags]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "runs" / "mine" / "result.json").read_text())
    assert record["recipe"] == "mine"
    assert f"{tmp_path}/inner/mine.py --trainer.max_steps=1" in record["command"]


def test_the_command_to_resume_names_the_interpreter_that_has_the_packages(tmp_path, monkeypatch):
    """An environment's python is a link to the one it was made from, which may come first in PATH."""
    for folder in ("base", "env"):
        (tmp_path / folder).mkdir()
    (tmp_path / "base" / "python").symlink_to(sys.executable)
    (tmp_path / "env" / "python").symlink_to(tmp_path / "base" / "python")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env" / "python"))
    for first, named in (("base", sys.executable), ("env", "python")):
        monkeypatch.setenv("PATH", os.pathsep.join(str(tmp_path / folder) for folder in (first, "base")))
        assert _python() == named
