"""The recipe that trains a second model first: where that one comes from, what it costs, and how both are resumed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.equality import assert_same
from tests.support.processes import run_file

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("own_folder")]

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "vit_rho_loss.py"
FLAGS = [
    "--trainer.max_steps=6",
    "--trainer.enable_progress_bar=false",
    "--model.width=32",
    "--data.batch_size=4",
    "--data.max_val_images=16",
    "--rho_loss.share=0.25",
]
ROOT = Path("runs", "vit_rho_loss")
LAST = Path("checkpoints", "last.ckpt")


def run(*flags: str) -> int:
    return run_file(RECIPE, *FLAGS, *flags)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / LAST, weights_only=True)["state_dict"]


def losses(folder: Path) -> dict[str, float]:
    return record(folder)["metrics"]


def test_the_second_model_comes_first_and_is_charged() -> None:
    assert run("--compare") == 0
    first, technique, baseline = (record(ROOT / arm) for arm in ("first", "rho_loss", "baseline"))
    assert first["baseline"]
    assert first["parameters"] < technique["parameters"] == baseline["parameters"]
    charge = technique["charges"]["irreducible losses"]
    assert (charge["count"], charge["flops"]) == (1, first["flops"])
    made = sum(s["count"] * s["flops_each"] for s in technique["step_kinds"] if s["phase"] == "train")
    assert technique["flops"] == made + first["flops"]
    seconds = sum(s["count"] * s["seconds_each"] for s in technique["step_kinds"] if s["phase"] == "train")
    assert technique["reference_seconds"] == pytest.approx(seconds + charge["seconds"])
    assert technique["wall_seconds"] > first["wall_seconds"]
    point = technique["curve"][0]  # the clocks begin behind the first run
    assert point["flops"] > first["flops"]
    assert point["reference_seconds"] > charge["seconds"]
    configs = [yaml.safe_load((ROOT / arm / "config.yaml").read_text()) for arm in ("first", "rho_loss", "baseline")]
    assert [config["data"]["part"] for config in configs] == [[0.8, 1.0], [0.0, 0.8], [0.0, 0.8]]
    compared = json.loads((ROOT / "comparison.json").read_text())
    assert compared.keys() == {"baseline", "rho_loss"}
    # both sides at the price of one plain step, which the technique's run has timed in turn with its own
    (plain,) = [s for s in technique["step_kinds"] if s["phase"] == "train" and s["plain"]]
    assert compared["baseline"]["reference_seconds"] == pytest.approx(6 * plain["seconds_each"])


def test_a_model_that_is_given_is_not_made_again_and_a_run_resumes_exactly(capsys) -> None:
    saved = (
        '--trainer.callbacks=[{"class_path":"lightning.pytorch.callbacks.ModelCheckpoint","init_args":'
        '{"dirpath":"kept","filename":"{step}","every_n_train_steps":2,"save_top_k":-1}}]'
    )
    assert run(saved) == 0
    given = ROOT / "first" / LAST
    assert run(f"--rho_loss.irreducible={given}", "--trainer.default_root_dir=given") == 0
    assert not Path("given", "first").exists()
    assert_same(weights(ROOT), weights(Path("given")))
    # from elsewhere: the second model is made again, and is the same
    assert run("--trainer.default_root_dir=rest", "--ckpt_path=kept/step=2.ckpt") == 0
    assert_same(weights(ROOT), weights(Path("rest")))
    assert record(Path("rest"))["charges"]["irreducible losses"]["count"] == 1
    # where it was: it is taken as it is
    before = given.stat().st_mtime_ns
    assert run("--ckpt_path=kept/step=4.ckpt") == 0
    assert given.stat().st_mtime_ns == before
    assert_same(weights(ROOT), weights(Path("rest")))
    assert run("--trainer.default_root_dir=plain", "--baseline") == 0
    assert not Path("plain", "first").exists()
    capsys.readouterr()
    assert run("--rho_loss.irreducible=no.ckpt") == 1
    assert "irreducible='no.ckpt' is no checkpoint of a ViTClassifier" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("compare", [False, True])
def test_the_first_run_resumes_and_the_others_follow(compare: bool) -> None:
    """Stopped at its second step, and started with the command that it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECIPE.parents[1])}
    flags = ["--compare"] if compare else []
    stop = f"import runpy,sys,os,signal;sys.argv={[str(RECIPE), *FLAGS, *flags, '--trainer.default_root_dir=cut']!r}\n"
    stop += """
from lightning.pytorch import Trainer
from lit_scale.guards import PreemptionGuard
own = PreemptionGuard.on_train_batch_end
def stop(self, trainer, *args, **kwargs):
    if trainer.global_step == 2 and trainer.default_root_dir.endswith("first"):
        os.kill(os.getpid(), signal.SIGTERM)
    own(self, trainer, *args, **kwargs)
PreemptionGuard.on_train_batch_end = stop
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", stop], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    saved = done.stdout.split("--ckpt_path ")[1].split()[0]
    assert Path(saved).parent == Path("cut", "first", "checkpoints")
    assert torch.load(saved, weights_only=True)["global_step"] == 3
    assert run(*flags, "--trainer.default_root_dir=cut", f"--ckpt_path={saved}") == 0
    assert run(*flags) == 0
    for arm in ("first", "rho_loss", "baseline") if compare else ("first", "."):
        assert_same(weights(Path("cut", arm)), weights(ROOT / arm), arm)
        assert losses(Path("cut", arm)) == losses(ROOT / arm), arm
