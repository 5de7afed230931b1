"""Pages of the documentation site that nobody has to list: a hook of mkdocs, named in ``mkdocs.yml``.

- README, CONTRIBUTING and CHANGELOG, which stay in the root of the repository, are pages of the site.
- Every ``docs/*.md`` is in the navigation, titled by its first heading; it is a technique's card unless in ``_GUIDES``.
- Every package below ``lit_scale`` has an API page, made from the docstrings of its modules.
- Links that leave ``docs/`` lead to a page of the site: a module to its API, another source file to a listing of it;
  images are copied. What does not exist is left to mkdocs, whose strict build refuses it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lit_scale"

#: Pages whose source is in the root of the repository.
_FROM_ROOT = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
#: Pages in ``docs/`` that are not the card of a technique; each has a tab of its own, where it exists.
_GUIDES = ("design", "evidence")
#: Files that are shown as a listing, by what stands behind the dot; others, such as images, are copied.
_LISTED = {"": "text", ".py": "python", ".sh": "bash", ".toml": "toml", ".txt": "text", ".yml": "yaml"}
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^][]*)\]\((?P<target>[^)\s:]+)\)")
_COMMENT = re.compile(r"^<!--.*?-->$", flags=re.MULTILINE)


# -- what is there ----------------------------------------------------------------------------------------------------


def modules() -> dict[str, list[str]]:
    """The public modules of each package, by the package's name."""
    found = {}
    for folder, _, names in os.walk(ROOT / PACKAGE, followlinks=True):
        if "__init__.py" in names:
            package = ".".join(Path(folder).relative_to(ROOT).parts)
            stems = sorted(name[:-3] for name in names if name.endswith(".py") and not name.startswith("_"))
            found[package] = [f"{package}.{stem}" for stem in stems]
    return dict(sorted(found.items()))


def title(page: Path) -> str:
    """The first heading of a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return next((line[2:].strip() for line in lines if line.startswith("# ")), page.stem)


def navigation() -> list[dict[str, Any]]:
    """All pages, in order."""
    pages = {page.stem: page for page in sorted((ROOT / "docs").glob("*.md"))}
    cards = sorted((title(page), page.name) for stem, page in pages.items() if stem not in _GUIDES)
    return [
        {"Home": "index.md"},
        {"Techniques": [{name: page} for name, page in cards]},
        *({title(pages[stem]): pages[stem].name} for stem in _GUIDES if stem in pages),
        {"Contributing": "contributing.md"},
        {"Changelog": "changelog.md"},
        {"API": [{package: _api_page(package)} for package in modules()]},
    ]


def _api_page(package: str) -> str:
    return f"api/{package}.md"


def _api_text(package: str, members: list[str]) -> str:
    """Markdown of a package's page: what the package says of itself, then module by module."""
    own = f"# {package}\n\n::: {package}\n    options:\n      show_root_heading: false\n"
    own += "      show_root_toc_entry: false\n      members: false\n"
    return "\n".join([own, *(f"::: {module}\n" for module in members)])


# -- links ------------------------------------------------------------------------------------------------------------


def _source(page: str) -> str:
    """Where in the repository a page of the site is written."""
    return _FROM_ROOT.get(page, f"docs/{page}")


def _destination(path: str) -> str | None:
    """The page or file of the site, with an anchor if it needs one, that shows a file of the repository."""
    file = Path(path)
    for page, source in _FROM_ROOT.items():
        if path == source:
            return page
    parts = [part for part in file.with_suffix("").parts if part != "__init__"]
    package = ".".join(parts if parts[0] == PACKAGE else [PACKAGE, *parts])
    if package in modules():  # its folder, or its __init__.py
        return _api_page(package)
    owner = package.rpartition(".")[0]
    if file.suffix == ".py" and package in modules().get(owner, ()):
        return f"{_api_page(owner)}#{package}"
    if not (ROOT / path).is_file():
        return None  # a folder
    if parts[0] == "docs":
        return "/".join(file.parts[1:])
    return f"source/{path}.md" if file.suffix in _LISTED else f"source/{path}"


def _targets(page: str) -> list[str]:
    """Files of the repository that a page links to."""
    text = (ROOT / _source(page)).read_text(encoding="utf-8")
    paths = [_resolve(page, match["target"])[0] for match in _LINK.finditer(text)]
    return [path for path in paths if path and (ROOT / path).is_file()]


def _resolve(page: str, target: str) -> tuple[str, str]:
    """Path in the repository and anchor of a link's target."""
    path, hash_, anchor = target.partition("#")
    return (normpath(join(dirname(_source(page)), path)) if path else ""), hash_ + anchor


def relink(page: str, text: str) -> str:
    """The Markdown of a page with its links as the site needs them."""

    def replace(match: re.Match[str]) -> str:
        path, anchor = _resolve(page, match["target"])
        if not path or path.startswith("..") or not (ROOT / path).exists():
            return match[0]
        to = _destination(path)
        if to is None:
            return match["text"]
        return f"{match['image']}[{match['text']}]({relpath(to, dirname(page) or '.')}{anchor})"

    return _LINK.sub(replace, text)


# -- hooks of mkdocs --------------------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lay out the navigation, unless the configuration has one."""
    config.nav = config.nav or navigation()
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from the root, those of the API, and whatever is linked to outside of ``docs/``."""
    for page, source in _FROM_ROOT.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for package, members in modules().items():
        files.append(File.generated(config, _api_page(package), content=_api_text(package, members)))
    pages = [*_FROM_ROOT, *(page.name for page in (ROOT / "docs").glob("*.md"))]
    for path in sorted({target for page in pages for target in _targets(page)}):
        to = _destination(path)
        if to is None or not to.startswith("source/"):
            continue
        if to.endswith(".md"):
            code = (ROOT / path).read_text(encoding="utf-8").rstrip()
            listing = f"# {path}\n\n~~~~~~ {_LISTED[Path(path).suffix]}\n{code}\n~~~~~~\n"
            files.append(File.generated(config, to, content=listing))
        else:
            files.append(File.generated(config, to, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Mend links, and drop the comments around generated tables, beside which a table is none to mkdocs."""
    uri = page.file.src_uri
    if uri.startswith(("api/", "source/")):
        return markdown
    return _COMMENT.sub("", relink(uri, markdown))
