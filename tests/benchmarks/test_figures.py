"""Pictures are drawn of complete, incomplete and missing results, and their labels do not overlap."""

from itertools import pairwise
from pathlib import Path

import figures
import numpy as np
import pytest
import tables
from made_results import ENTRY, TASK, store_plain, store_technique
from matplotlib.text import Annotation


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tables, figures):
        monkeypatch.setattr(module, "KNOWN", {TASK.name: TASK})


def test_labels_move_as_little_as_is_needed_and_keep_their_order() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        places = list(rng.random(rng.integers(1, 9)))
        moved = figures.apart(places, 0.1)
        order = sorted(range(len(places)), key=lambda index: places[index])
        assert all(moved[b] - moved[a] >= 0.1 - 1e-6 for a, b in pairwise(order))
        if all(places[b] - places[a] >= 0.1 for a, b in pairwise(order)):
            assert moved == pytest.approx(places, abs=1e-8)
        assert np.mean(moved) == pytest.approx(np.mean(places), abs=1e-8)


def test_pictures_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    assert figures.draw(tmp_path) == []
    plain = store_plain(tmp_path)
    assert figures.draw(tmp_path) == [tmp_path / "made_up.png"]
    store_technique(tmp_path, plain, 1.85)
    assert figures.draw(tmp_path) == [tmp_path / "made_up.png", tmp_path / "overview.png"]
    assert all(path.stat().st_size > 10_000 for path in tmp_path.glob("*.png"))
    again = (tmp_path / "made_up.png").read_bytes()
    figures.draw(tmp_path)
    assert (tmp_path / "made_up.png").read_bytes() == again  # nothing changes that has not changed


def test_a_technique_beyond_the_plain_runs_and_one_of_few_seeds_are_drawn(tmp_path: Path) -> None:
    plain = store_plain(tmp_path)
    store_technique(tmp_path, plain, 1.5, own_steps=5_000.0, seeds=(1,))
    assert len(figures.draw(tmp_path)) == 2
    for entry in list(plain.runs):
        if entry["seed"] == 2:  # no point has all seeds: there is no best plain network
            plain.runs.remove(entry)
    plain.save()
    store_technique(tmp_path, plain, 1.85, entry=ENTRY)
    assert len(figures.draw(tmp_path)) == 2


def test_names_of_sizes_do_not_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[figures.Figure] = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: shown.append(figure))
    plain = store_plain(tmp_path)
    for entry in plain.runs:  # both curves end close together
        if entry["size"] == "2x8":
            entry["test"]["loss"] -= 0.049
    figures.plot_task(TASK, plain, [], tmp_path / "none.png")
    (figure,) = shown
    figure.canvas.draw()
    labels = [one for one in figure.axes[0].texts if isinstance(one, Annotation)]
    assert sorted(label.get_text() for label in labels) == ["1x8", "2x8"]
    one, other = (label.get_window_extent() for label in labels)
    assert not one.overlaps(other)
