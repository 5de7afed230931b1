import shlex
from pathlib import Path
from typing import Any

import pytest

from lit_scale.cli.folder import LastCheckpoint, is_inside, resume_command, set_aside
from tests.support.data import loader
from tests.support.networks import build
from tests.support.training import quiet_trainer


@pytest.mark.parametrize(
    "command",
    [
        "recipe.py --a=1",
        "recipe.py --ckpt_path old.ckpt --a=1",
        "recipe.py --a=1 --ckpt_path=old.ckpt",
        "recipe.py --ckpt_path one --ckpt_path=two --a=1 --ckpt_path three",
    ],
)
def test_the_command_to_resume_names_one_checkpoint(command: str) -> None:
    assert resume_command(shlex.split(command)) == "recipe.py --a=1 --ckpt_path {path}"


def test_what_a_shell_would_take_apart_is_quoted() -> None:
    command = ["recipe.py", "--data.source=a b", "--stages=[[0, 1]]"]
    assert shlex.split(resume_command(command))[:3] == command


def test_a_path_is_inside_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    assert is_inside("runs/a/x.ckpt", Path("runs"))
    assert is_inside(tmp_path / "link" / "x.ckpt", Path("runs"))
    assert not is_inside("runs/../x.ckpt", Path("runs"))
    assert not is_inside("runs-2/x.ckpt", Path("runs"))
    assert not is_inside("runs", Path("runs"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("window", "saved"), [(1, [2, 4, 6, 6]), (3, [6, 6])])
def test_the_last_checkpoint_is_saved_after_validations_that_no_step_is_open_at_and_at_the_end(
    window: int, saved: list[int], tmp_path: Path
) -> None:
    """Of six batches, with a validation after each second one."""
    options = {"max_steps": 6 // window, "val_check_interval": 2, "accumulate_grad_batches": window}
    trainer: Any = quiet_trainer(tmp_path, callbacks=[LastCheckpoint(tmp_path)], **options)
    save, batches = trainer.save_checkpoint, []

    def noted(*args: Any, **kwargs: Any) -> None:
        batches.append(trainer.fit_loop.total_batch_idx + 1)
        save(*args, **kwargs)

    trainer.save_checkpoint = noted
    trainer.fit(build("plain_torch"), loader("plain_torch"), loader("plain_torch", size=4))
    assert batches == saved
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["last.ckpt"]


def test_set_aside_needs_a_run(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "checkpoints").mkdir()
    assert set_aside(tmp_path, ("config.yaml", "checkpoints")) is None
    (tmp_path / "earlier-9").mkdir()
    (tmp_path / "earlier-than-that").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_text("")
    assert set_aside(tmp_path, ("config.yaml", "checkpoints")) == tmp_path / "earlier-10"
    assert sorted(path.name for path in (tmp_path / "earlier-10").iterdir()) == ["checkpoints", "config.yaml"]
