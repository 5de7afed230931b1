"""Recipes take the flags of the tasks of a GPU's size. That is all that is known of them: they have never been run."""

from dataclasses import replace

import clock
import pytest
import tasks_gpu
from entries import ENTRIES, Entry
from prices import recipe_of
from tasks import TASKS, Task

from lit_scale.cli import RecipeCLI


def config_of(recipe: str, flags: list[str]) -> dict:
    return RecipeCLI(recipe_of(recipe), [*flags, "--compare"]).config.as_dict()


def on_cpu(flags: tuple[str, ...]) -> list[str]:
    """The same flags for a machine without a GPU, since a Trainer is made of them."""
    return [flag.replace("accelerator=gpu", "accelerator=cpu") for flag in flags]


@pytest.mark.parametrize("task", tasks_gpu.TASKS.values(), ids=list(tasks_gpu.TASKS))
def test_a_recipe_takes_the_flags_of_every_network(task: Task) -> None:
    for size, network in task.sizes.items():
        config = config_of(task.recipe, [*on_cpu(task.machine), *task.flags, *network])
        depth, _, width = size.removesuffix("+decoder").partition("x")
        assert (config["model"]["depth"], config["model"]["width"]) == (int(depth), int(width))
        assert config["model"]["width"] == 64 * config["model"]["num_heads"]
        assert config["trainer"]["precision"] == "bf16-mixed"
    assert "--trainer.accelerator=gpu" in task.machine
    assert task.jobs == 1
    assert {task.unit, task.trained[0]} <= task.sizes.keys()
    assert task.headline in task.budgets


@pytest.mark.parametrize("entry", tasks_gpu.ENTRIES.values(), ids=list(tasks_gpu.ENTRIES))
def test_every_technique_has_its_task_and_a_control_on_its_ladder(entry: Entry) -> None:
    task, cpu = tasks_gpu.TASKS[entry.task], TASKS[entry.task.removesuffix("_gpu")]
    network = next(iter(task.sizes.values()))
    for flags in (entry.flags, *entry.variants.values()):
        config_of(entry.recipe, [*on_cpu(task.machine), *task.flags, *network, *flags])
    sizes = entry.control.size.items()
    assert all({size, other} <= task.sizes.keys() and size != other for size, other in sizes)
    of_cpu = next(one for one in ENTRIES.values() if one.name == entry.name.replace("_gpu", ""))
    assert bool(entry.control.size) == bool(of_cpu.control.size)
    assert entry.control.batch_size * cpu.batch_size == of_cpu.control.batch_size * task.batch_size
    assert replace(entry, task=of_cpu.task, control=of_cpu.control) == of_cpu


def test_a_control_of_half_the_depth_is_one_on_the_other_ladder_too() -> None:
    stacking = tasks_gpu.ENTRIES["progressive_stacking.text_mlm_deep_gpu"]
    assert stacking.control.size == {"12x512": "6x512", "24x512": "12x512"}


def test_the_clock_lists_them_only_when_asked(capsys: pytest.CaptureFixture, monkeypatch, tmp_path) -> None:
    for flags, expected in ((["--gpu"], True), ([], False)):
        monkeypatch.setattr("sys.argv", ["clock.py", "list", f"--out={tmp_path}", *flags])
        clock.main()
        assert ("text_mlm_gpu: 0 plain runs" in capsys.readouterr().out) is expected
