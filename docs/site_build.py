"""What the build of the site adds to mkdocs: pages that lie above docs/, and Markdown for docstrings."""

from __future__ import annotations

import html
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.plugins.site_build")

ROOT = Path(__file__).parents[1]
ABOVE = ("CHANGELOG.md", "CONTRIBUTING.md")  # pages of the repository that the site has, too
PUBLIC = set(re.findall(r'^    "(\w+)",$', (ROOT / "lightning_prune/__init__.py").read_text(), re.MULTILINE))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie above docs/, with their links to docs/ as seen from there."""
    for name in ABOVE:
        text = (ROOT / name).read_text().replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Return a page with the names alone of files that the repository has and the site has not."""
    return re.sub(r"\[([^\]]*)\]\((?:\.\./)+(?:recipes|tests)/[^)]*\)", r"\1", markdown)


def on_page_content(content: str, /, page: Page, files: Files, **kwargs: Any) -> str:
    """Return a page whose formulas browsers draw by themselves, and a notebook's with links to pages."""
    content = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', as_mathml, content)
    if not page.file.src_uri.endswith(".ipynb"):
        return content
    return re.sub(
        r'href="([^":#]+\.(?:md|ipynb))([^"]*)"', lambda link: as_url(link, page.file, files), content
    )


def as_mathml(formula: re.Match[str]) -> str:
    """Return a formula in TeX as MathML."""
    result: str = convert(html.unescape(formula[1]))
    return result


def as_url(link: re.Match[str], source: File, files: Files) -> str:
    """Return the link of a notebook to a source, as one to its page."""
    target = files.get_file_from_path(posixpath.normpath(posixpath.join(source.src_uri, "..", link[1])))
    if target is None:
        log.warning("%s contains a link to %s, which is no page", source.src_uri, link[1])
        return link[0]
    return f'href="{target.url_relative_to(source)}{link[2]}"'


class Roles(griffe.Extension):
    """Turns roles and doctests in docstrings into Markdown, and names of the package and papers into links."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """Return a docstring with links for its roles and papers, and a block of code for each doctest."""
    text = re.sub(r":math:`([^`]*)`", r"\\(\1\\)", text)
    text = re.sub(r"\barXiv\s+(\d{4}\.\d{5})\b", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    text = re.sub(r":(?:class|func|meth|attr):`([^`]*)`", lambda found: linked(found[1]), text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    return re.sub(r"^( *)>>> .*?(?=\n\n|\Z)", r"\1```pycon\n\g<0>\n\1```", text, flags=re.DOTALL | re.MULTILINE)


def linked(name: str) -> str:
    """Return a name as code, as a link if it is public."""
    return f"[`{name}`][lightning_prune.{name}]" if name in PUBLIC else f"`{name}`"
