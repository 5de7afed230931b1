import math
from types import SimpleNamespace

import pytest

from lit_scale.factors.steps import check_epoch, micro_batches, plan_windows
from lit_scale.progress import batches_after, steps_after


def walked(starts: list[float], sizes: list[int], max_steps: int, batches: float) -> list[tuple[int, int]]:
    """The same plan by walking through the run one optimizer step at a time."""
    windows, taken, step, stage = [(0, sizes[0])], 0, 0, 0
    while stage + 1 < len(sizes) and step < 500:
        done = max(step / max_steps if max_steps > 0 else 0.0, taken / batches)
        if done >= starts[stage + 1] and taken % sizes[stage + 1] == 0:
            stage += 1
            windows.append((step, sizes[stage]))
            continue
        taken += sizes[stage]
        step += 1
    return windows


@pytest.mark.parametrize("sizes", [[1, 2, 8], [3, 6, 12], [1, 5, 5 * 7], [2, 2 * 16, 2 * 16 * 3]])
@pytest.mark.parametrize("starts", [[0.0, 0.3, 0.6], [0.0, 0.01, 0.02], [0.0, 0.5, 0.51]])
@pytest.mark.parametrize("limits", [(97, math.inf), (-1, 640.0), (40, 200.0)])
def test_the_plan_is_what_a_walk_through_the_run_finds(
    sizes: list[int], starts: list[float], limits: tuple[int, float]
) -> None:
    windows = plan_windows(starts, sizes, max_steps=limits[0], batches=limits[1])
    assert windows == walked(starts, sizes, *limits)
    for step in range(200):  # steps and batches count the same run
        batches = batches_after(windows, step)
        each = [size for first, size in windows if first <= step][-1]
        assert batches_after(windows, step + 1) == batches + each
        assert [steps_after(windows, batches + more) for more in (0, each - 1, each)] == [step, step, step + 1]


@pytest.mark.parametrize(("batch", "use"), [(100, "64 or 128"), (63, "64"), (0, "64")])
def test_a_batch_that_does_not_divide_names_those_that_do(batch: int, use: str) -> None:
    with pytest.raises(ValueError, match=f"batch={batch} is no multiple of the 64 samples .*; use {use}$"):
        micro_batches(batch, 64)


def test_an_epoch_must_not_end_inside_a_step_that_the_run_reaches() -> None:
    def trainer(epoch: float, max_steps: int = -1) -> SimpleNamespace:
        return SimpleNamespace(num_training_batches=epoch, max_steps=max_steps)

    check_epoch(trainer(32), [(0, 1), (8, 16)])
    check_epoch(trainer(math.inf), [(0, 16)])
    check_epoch(trainer(35, max_steps=2), [(0, 16)])  # over after 32 batches
    with pytest.raises(ValueError, match=r"35 batches ends inside .* step of 16; pass Trainer\(limit_train_batches=32"):
        check_epoch(trainer(35, max_steps=3), [(0, 16)])
    with pytest.raises(ValueError, match="step takes 16 batches, but an epoch has only 9"):
        check_epoch(trainer(9), [(0, 16)])
