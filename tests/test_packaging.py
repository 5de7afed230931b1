"""What a user gets: the same package from a wheel, an sdist and an editable install, and nothing besides it."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("callbacks", "datamodules")  # top-level folders that import as lit_scale.<name>


def _pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _requirements(*extras: str) -> list[Requirement]:
    project = _pyproject()["project"]
    lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in lines]


def _environment(**variables: str) -> dict[str, str]:
    """The environment without what would let a child import from here or take itself for a part of our make."""
    ours = ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    return {name: value for name, value in os.environ.items() if name not in ours} | variables


def _run(*command: object, cwd: Path, path: Path | None = None) -> str:
    """Run a command, with at most ``path`` to import from besides ``cwd``, and return what it printed."""
    env = _environment() if path is None else _environment(PYTHONPATH=str(path))
    result = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def _python(code: str, cwd: Path, path: Path | None = None) -> str:
    return _run(sys.executable, "-c", code, cwd=cwd, path=path).strip()


def _library_files() -> list[Path]:
    return sorted(path for folder in ("lit_scale", *MAPPED) for path in (ROOT / folder).rglob("*.py"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built, since building writes beside the sources."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("lit_scale", *MAPPED):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def _build(source: Path, folder: Path, *options: str) -> Path:
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, *options, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(source, tmp_path_factory.mktemp("wheel"), "--wheel")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a plain install fills."""
    target = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(target)
    return target


@pytest.fixture(scope="module")
def editable(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that an editable install fills."""
    target = tmp_path_factory.mktemp("editable")
    code = f"from setuptools import build_meta; build_meta.build_editable({str(target)!r})"
    _python(code, cwd=source)
    (wheel,) = target.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def test_packages_are_the_tree() -> None:
    tree = set()
    for folder, _, files in os.walk(ROOT / "lit_scale", followlinks=True):
        if any(name.endswith(".py") for name in files):
            assert "__init__.py" in files, f"{folder} has modules and no __init__.py"
            tree.add(".".join(Path(folder).relative_to(ROOT).parts))
    listed = _pyproject()["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(tree), "[tool.setuptools] packages in pyproject.toml must name every package"


@pytest.mark.parametrize("name", MAPPED)
def test_link_holds(name: str) -> None:
    link = ROOT / "lit_scale" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.samefile(ROOT / name)
    assert _pyproject()["tool"]["setuptools"]["package-dir"][f"lit_scale.{name}"] == name


def test_wheel_holds_every_module_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    modules = [path.relative_to(ROOT).as_posix() for path in _library_files() if "__pycache__" not in path.parts]
    expected = {f"lit_scale/{name}" if name.startswith(MAPPED) else name for name in modules}
    assert sorted(name for name in names if name.endswith(".py")) == sorted(expected)
    assert "lit_scale/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lit_scale"}


def test_sdist_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    """``build`` without an option makes an sdist and then the wheel from nothing but it."""
    again = _build(source, tmp_path)

    def contents(path: Path) -> dict[str, bytes]:
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    assert contents(again) == contents(wheel)


@pytest.mark.slow
def test_wheel_imports_from_anywhere(installed: Path, tmp_path: Path) -> None:
    code = "import lit_scale.callbacks, lit_scale.datamodules as d; print(lit_scale.callbacks.__file__, d.__file__)"
    found = _python(code, cwd=tmp_path, path=installed).split()
    assert found == [str(installed / "lit_scale" / name / "__init__.py") for name in MAPPED]


def test_version_is_the_declared_one(installed: Path, tmp_path: Path) -> None:
    version = _python("import lit_scale; print(lit_scale.__version__)", cwd=tmp_path, path=installed)
    assert version == _pyproject()["project"]["version"]


@pytest.mark.parametrize("kind", ["installed", "editable"])
@pytest.mark.parametrize("name", MAPPED)
def test_the_plain_name_stays_the_users(kind: str, name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """No install takes the names ``callbacks`` and ``datamodules``, and a user's own package of that name is found."""
    target = request.getfixturevalue(kind)
    spec = (
        f"import site; site.addsitedir({str(target)!r})\n"  # reads the .pth file of an editable install
        "from importlib.util import find_spec\n"
        "print(find_spec('lit_scale.{0}') is not None, getattr(find_spec('{0}'), 'origin', None))"
    ).format(name)
    assert _python(spec, cwd=tmp_path) == "True None"
    own = tmp_path / name / "__init__.py"
    own.parent.mkdir()
    own.touch()
    assert _python(spec, cwd=tmp_path) == f"True {own}"


def test_import_is_light() -> None:
    heavy = ("torch", "lightning", "timm", "matplotlib", "numpy")
    code = f"import sys, lit_scale; print([name for name in {heavy} if name in sys.modules])"
    assert _python(code, cwd=ROOT) == "[]"


def test_library_imports_what_it_declares() -> None:
    """A module-level import needs a runtime dependency; what only some users have is imported where it is used."""
    declared = {canonicalize_name(requirement.name) for requirement in _requirements()}
    providers = packages_distributions()
    undeclared = set()
    for path in _library_files():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"lit_scale"}:
                if not declared & {canonicalize_name(provider) for provider in providers.get(name, ())}:
                    undeclared.add(f"{path.relative_to(ROOT)}: {name}")
    assert not undeclared, "add to the dependencies in pyproject.toml"


def test_constraints_pin_every_requirement() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {}
    for line in lines:
        match = re.fullmatch(r"([a-z0-9-]+)==([0-9][0-9a-z.]*)", line)
        assert match, f"constraints.txt: {line!r} is not name==version"
        pins[match[1]] = match[2]
    assert list(pins) == sorted(pins)
    for requirement in _requirements("test", "lint"):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), str(requirement)


def test_files_name_no_machine() -> None:
    """No package registry and no folder of somebody's machine stands in a file that is committed."""
    pattern = re.compile(
        r"pypi\.(org|python)|pythonhosted\.|download\.pytorch\."
        r"|--(extra-)?index-url|--find-links|file:///"
        r"|(?<![\w.$}~-])/(home|root|Users|work|mnt|opt)/\w"
    )
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout")
    listing = _run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    found = []
    for name in filter(None, listing.split("\0")):
        path = ROOT / name
        if not path.is_file() or path.is_symlink() or path == Path(__file__):
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{name}: {match[0]}" for match in pattern.finditer(text)]
    assert not found


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
class TestMakefile:
    def test_help_lists_every_target(self) -> None:
        listed = re.findall(r"^  make ([a-z-]+) +\S", _run("make", cwd=ROOT), flags=re.M)
        (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
        assert listed == phony.split()

    def test_no_python_is_one_clear_line(self, tmp_path: Path) -> None:
        command = ["make", "--no-print-directory", "setup", "PYTHON=no-such-python", f"VENV={tmp_path / 'venv'}"]
        result = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
        assert result.returncode != 0
        assert result.stderr.startswith("lit_scale needs Python 3.11 or newer, and 'no-such-python' is not")
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "venv").exists()

    def test_a_finished_setup_is_not_repeated(self, tmp_path: Path) -> None:
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, tmp_path)
        (tmp_path / "venv").mkdir()
        (tmp_path / "venv" / ".setup-done").touch()
        command = ("make", "--no-print-directory", "--dry-run", "setup", "VENV=venv")
        assert "pip install" not in _run(*command, cwd=tmp_path)
        os.utime(tmp_path / "constraints.txt", (2**33, 2**33))
        assert "pip install" in _run(*command, cwd=tmp_path)
