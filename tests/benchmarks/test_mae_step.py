import json

import component_tables
import mae_step
import pytest

SMALL = {
    "batch": 4,
    "model": {"image_size": 16, "patch_size": 4, "depth": 2, "width": 16, "num_heads": 2}
    | {"decoder_depth": 1, "decoder_width": 8, "decoder_heads": 2},
}


def test_the_record_holds_both_ratios_and_the_card_shows_them(tmp_path, monkeypatch):
    monkeypatch.setitem(mae_step.PRESETS, "cpu", {"small": SMALL})
    path = tmp_path / "mae_step.cpu.json"
    returned = mae_step.main(["--repeats=3", "--seconds=0.001", f"--output={path}"])
    stored = json.loads(path.read_text())
    assert stored == returned
    size = stored["sizes"]["small"]
    assert {len(times) for times in size["seconds"].values()} == {3}
    medians = {name: sorted(times)[1] for name, times in size["seconds"].items()}
    for part, one in size["ratios"].items():
        pairs = zip(size["seconds"][f"{part}, visible"], size["seconds"][f"{part}, all"], strict=True)
        assert one["estimate"] == pytest.approx(sorted(own / other for own, other in pairs)[1])
        assert medians[f"{part}, visible"] > 0
    whole = size["ratios"]["end to end"]["estimate"]
    assert f"| {1 / whole:.1f} times |" in component_tables.mae_step_lines(stored)


def test_bad_arguments_are_refused():
    with pytest.raises(SystemExit):
        mae_step.main(["--repeats=0"])
