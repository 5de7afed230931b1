import doctest
import importlib
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch import Trainer

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    path.relative_to(ROOT)
    for folder, pattern in {"lit_scale": "**/*.py", "callbacks": "*.py", "datamodules": "*.py"}.items()
    for path in (ROOT / folder).glob(pattern)
    if not {"callbacks", "datamodules"} & set(path.relative_to(ROOT).parts[1:])  # links to the top-level folders
)


def module_name(path):
    parts = [part for part in path.with_suffix("").parts if part != "__init__"]
    return ".".join(parts if parts[0] == "lit_scale" else ["lit_scale", *parts])


@pytest.mark.filterwarnings("ignore")  # what an example may warn of is the affair of its part's own tests
@pytest.mark.parametrize("name", [module_name(path) for path in FILES])
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"pytorch-lightning_version": lightning.__version__, "state_dict": {}}, tmp_path / "last.ckpt")
    taken_for_granted = {"Trainer": Trainer, "folder": tmp_path}
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs=taken_for_granted, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
    if name.startswith(("lit_scale.nn.", "lit_scale.models.")):
        assert result.attempted, f"{name} has no example"
