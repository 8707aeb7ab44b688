"""The documentation site builds without a warning, has every page, and its links lead to pages, anchors and files."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
MARKDOWN = [*(DOCS / name for name in PAGES), *sorted(ROOT.glob("*.md"))]
REPOSITORY = re.search(r"^repo_url: (\S+)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with warnings as errors."""
    pytest.importorskip("material", reason="the extra docs is not installed")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


class _Html(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = {""}
        self.diagrams = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {str(values[name]) for name in ("id", "name") if values.get(name)}
        self.diagrams += values.get("class") == "mermaid"
        if link := values.get("href" if tag in ("a", "link") else "src"):
            self.links.add(link)


def broken_links(site: Path) -> list[str]:
    """The links between the pages of a site that lead nowhere, and those to files that the repository does not have."""
    pages = {path: _Html(path.read_text("utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            target, anchor = urldefrag(unquote(link))
            if target.startswith(REPOSITORY):
                found = in_repository(target)
            elif "://" in target or target.startswith(("data:", "mailto:")):
                continue
            else:
                aim = (path.parent / target).resolve() if target else path
                found = aim.exists() and (not anchor or anchor in pages[aim].anchors)
            if not found:
                broken.append(f"{path.relative_to(site)}: {link}")
    return broken


def in_repository(address: str) -> bool:
    """Return whether an address of the project is that of a file or folder of this clone."""
    match = re.fullmatch(rf"{re.escape(REPOSITORY)}(?:/(?:blob|tree)/main/(.*))?/?", urldefrag(address)[0])
    return match is not None and (ROOT / (match[1] or "")).exists()


def test_links_of_the_site_lead_somewhere(site: Path) -> None:
    assert broken_links(site) == []


def test_the_check_of_links_finds_broken_ones(tmp_path: Path) -> None:
    links = ("there.html#here", "there.html#nowhere", "absent.html", f"{REPOSITORY}/blob/main/absent", REPOSITORY)
    (tmp_path / "index.html").write_text("".join(f'<a href="{link}">x</a>' for link in links), "utf-8")
    (tmp_path / "there.html").write_text('<h2 id="here">x</h2>', "utf-8")
    assert len(broken_links(tmp_path)) == 3


def test_the_site_has_every_page_and_diagram(site: Path) -> None:
    made = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert {name.replace(".md", ".html") for name in PAGES} <= made
    assert {path.relative_to(DOCS).with_suffix(".html").as_posix() for path in DOCS.rglob("*.ipynb")} <= made
    sources = "".join((DOCS / name).read_text("utf-8") for name in PAGES)
    diagrams = sum(_Html(path.read_text("utf-8")).diagrams for path in site.rglob("*.html"))
    assert diagrams == sources.count("```mermaid") > 0


def test_the_index_lists_every_page_once() -> None:
    listed = re.findall(r"^- \[([\w./]+)\]\(\1\): \w", (DOCS / "index.md").read_text("utf-8"), re.MULTILINE)
    notebooks = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.ipynb")]
    assert sorted(listed) == sorted([*notebooks, *(name for name in PAGES if not name.endswith("index.md"))])


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_in_the_sources_lead_to_files(path: Path) -> None:
    text = path.read_text("utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)|^\[[^]]+\]: (\S+)$", text, re.MULTILINE):
        target = urldefrag("".join(link))[0]
        if target.startswith(REPOSITORY):
            assert in_repository(target), target
        else:
            assert "://" in target or (path.parent / target).exists(), target


@pytest.mark.parametrize("name", PAGES)
def test_lists_have_the_form_that_the_site_needs(name: str) -> None:
    """Python-Markdown begins a list only after an empty line, and nests by four spaces; GitHub accepts both."""
    text = re.sub(r"^( *)```.*?^\1```$", "", (DOCS / name).read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert not re.findall(r"^(?:[^\s|\-*\d#>].*)\n(?:[-*] |1\. ).*", text, re.MULTILINE)
    assert not re.findall(r"^ {1,3}(?:[-*]|\d+\.) .*", text, re.MULTILINE)
