import json

import pytest

from lit_scale.cost import write_json


def test_write_json_leaves_the_old_file_if_it_fails(tmp_path):
    write_json(tmp_path / "a" / "result.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a" / "result.json", {"x": 2, "y": object()})
    assert json.loads((tmp_path / "a" / "result.json").read_text()) == {"x": 1}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["result.json"]
