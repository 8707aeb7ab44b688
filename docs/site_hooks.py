"""Hooks of the documentation site: links to files of the repository, and notebooks as pages."""

from __future__ import annotations

import json
import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"\]\((\.\./[^)#\s]*)((?:#[^)\s]*)?)\)")
LOG = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every notebook."""
    for file in [each for each in files if each.src_uri.endswith(".ipynb")]:
        notebook = json.loads(file.content_string)
        name = str(Path(file.src_uri).with_suffix(".md"))
        files.append(File.generated(config, name, content=notebook_as_markdown(notebook)))
    return files


def notebook_as_markdown(notebook: dict) -> str:
    """Return the cells of a notebook as Markdown, without outputs."""
    texts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).rstrip()
        texts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
    return "\n\n".join(texts) + "\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links to files outside of docs/ by their addresses in the repository, and those to notebooks by pages."""
    markdown = markdown.replace(".ipynb)", ".md)")
    return LINK.sub(lambda match: absolute_link(match, page.file.src_uri, config), markdown)


def absolute_link(match: re.Match[str], page: str, config: MkDocsConfig) -> str:
    """Return a link with the address of its target, unless the target is in docs/."""
    root = Path(config.config_file_path).parent
    target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), match[1]))
    if target.startswith("docs/"):
        return match[0]
    if not (root / target).exists():
        LOG.warning("docs/%s links to %s, which does not exist", page, target)
    kind = "tree" if (root / target).is_dir() else "blob"
    return f"]({config.repo_url}/{kind}/main/{target}{match[2]})"
