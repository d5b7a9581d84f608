"""The site: it builds without a warning, no link of it is broken, and it asks no other machine for anything."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

from tests.docs.blocks import ROOT

LOADS = {"script": "src", "img": "src", "source": "src", "iframe": "src", "link": "href"}


class Html(HTMLParser):
    """Ids and links of a page, and what a browser loads with it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value}
        if "id" in found:
            self.ids.add(found["id"])
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in LOADS and LOADS[tag] in found and found.get("rel") != "canonical":
            self.loaded.append(found[LOADS[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Html]:
    return {str(path.relative_to(site)): Html(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def test_every_page_of_the_documentation_is_there(pages: dict[str, Html]) -> None:
    wanted = {str(path.relative_to(ROOT / "docs").with_suffix(".html")) for path in (ROOT / "docs").rglob("*.md")}
    assert wanted <= pages.keys()


def test_no_link_is_broken(site: Path, pages: dict[str, Html]) -> None:
    broken = []
    for name, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or name == "404.html":
                continue
            target = (site / name).parent.joinpath(unquote(parts.path)).resolve() if parts.path else site / name
            if not target.exists():
                broken.append(f"{name}: {link}")
                continue
            shown = pages.get(str(target.relative_to(site.resolve()))) if parts.path else page
            if parts.fragment and shown is not None and parts.fragment not in shown.ids | {"__tabbed_1"}:
                broken.append(f"{name}: {link}")
    assert broken == []


def test_nothing_is_loaded_from_elsewhere(pages: dict[str, Html]) -> None:
    assert all(page.loaded for page in pages.values())
    for name, page in pages.items():
        for loaded in page.loaded:
            assert not urlsplit(loaded).netloc, f"{name} loads {loaded}"


def test_a_broken_link_stops_the_build(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    for text in ("[there](nowhere.md)", "[there](#nowhere)", "[there](../nowhere.json)"):
        (docs / "index.md").write_text(f"# Page\n\n{text}\n", encoding="utf-8")
        config = load_config(
            str(ROOT / "mkdocs.yml"), docs_dir=str(docs), site_dir=str(tmp_path / "site"), nav=[{"Home": "index.md"}]
        )
        with pytest.raises(Abort):
            build(config)
