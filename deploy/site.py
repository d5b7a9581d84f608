"""Hooks of mkdocs: pages may link to files of the repository, which the site then carries along below `source/`.

On a page of docs/, `../bench/results/plan.json` is such a file; a reader of the repository follows the same link.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "source/"

_LINK = re.compile(r"(?<=]\()(?!\w+:|#|/)([^)#\s]+)(#[^)\s]*)?(?=\))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Pages that the navigation does not know yet are shown at its end rather than nowhere."""
    known = set(re.findall(r"[\w/-]+\.md", str(config.nav)))
    new = [path for path in _pages(Path(config.docs_dir)) if path not in known]
    if new and config.nav is not None:
        config.nav.append({"More": new})
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Take in every file of the repository that a page links to, and those that these link to."""
    waiting = [(file.src_uri, Path(config.docs_dir) / file.src_uri) for file in files.documentation_pages()]
    while waiting:
        uri, path = waiting.pop()
        for link in _LINK.finditer(path.read_text(encoding="utf-8")):
            target = _in_repository(uri, link[1])
            if target is None or files.get_file_from_path(SOURCE + target) is not None:
                continue
            if (ROOT / target).is_file():
                files.append(
                    File.generated(
                        config,
                        SOURCE + target,
                        abs_src_path=str(ROOT / target),
                        inclusion=InclusionLevel.NOT_IN_NAV,
                    )
                )
                if target.endswith(".md"):
                    waiting.append((SOURCE + target, ROOT / target))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """Point links to files of the repository to where the site has them."""
    here = page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        target = _in_repository(here, link[1])
        if target is None and not here.startswith(SOURCE):
            return link[0]
        to = _docs_page(here, link[1]) if target is None else SOURCE + target
        return posixpath.relpath(to, posixpath.dirname(here)) + (link[2] or "")

    return _LINK.sub(moved, markdown)


def _path(uri: str, link: str) -> str:
    """What a link on a page means, as a path below the root of the repository."""
    here = uri.removeprefix(SOURCE) if uri.startswith(SOURCE) else f"docs/{uri}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(here), link))


def _in_repository(uri: str, link: str) -> str | None:
    """The file outside docs/ that a link means; None for what mkdocs finds by itself."""
    path = _path(uri, link)
    return None if path.startswith("docs/") else path


def _docs_page(uri: str, link: str) -> str:
    return _path(uri, link).removeprefix("docs/")


def _pages(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.md"))
