"""What MkDocs does to the pages of this repository: file names of code, READMEs of packages."""

from __future__ import annotations

import re
import sys
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import receipts, workspace

FILE = re.compile(r"^<!-- file: (?P<name>[^\n]+?) -->\n+(?P<fence> *```\w+)$", re.MULTILINE)
LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<path>[^)#:\s]+)(?P<anchor>#[^)]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add a section with a page per package, before the last one.

    Raises:
        ReceiptError: the pages state a figure without a receipt, so there is no site.
    """
    receipts.check()
    assert config.nav is not None
    packages = [{name: page_of(name)} for name in workspace.load()]
    config.nav.insert(len(config.nav) - 1, {"Packages": packages})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add READMEs and benchmarks of packages, and their pictures, as pages of the site."""
    for distribution in workspace.load().values():
        pages = {distribution.folder / "README.md": page_of(distribution.name)}
        benchmarks = distribution.folder / "BENCHMARKS.md"
        if benchmarks.is_file():
            pages[benchmarks] = page_of(f"{distribution.name}-benchmarks")
        for source, target in pages.items():
            text = linked(source.read_text("utf-8"), source, target)
            page = File.generated(config, target, content=text)
            if source == benchmarks:
                page.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(page)
        for picture in distribution.folder.glob("*.svg"):
            path = f"packages/{picture.name}"
            files.append(File.generated(config, path, content=picture.read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Show above a block of code to which file it goes; GitHub has no such title."""
    return FILE.sub(lambda found: f'{found["fence"]} title="{found["name"]}"', markdown)


def page_of(name: str) -> str:
    """Where the site has the page of a package."""
    return f"packages/{name}.md"


def linked(text: str, source: Path, target: str) -> str:
    """The text of a file of the repository with links that hold on the site.

    Args:
        text: Markdown.
        source: where the repository has it.
        target: where the site has it. What the site lacks is named and not linked.
    """

    def link(found: re.Match[str]) -> str:
        text, anchor = found["text"], found["anchor"] or ""
        place = normpath(str(PurePosixPath(source.parent.as_posix()) / found["path"]))
        known = _on_site(Path(place))
        if known is None:
            return text.strip("![]")
        return f"{text}({relpath(known, PurePosixPath(target).parent.as_posix())}{anchor})"

    return LINK.sub(link, text)


def _on_site(path: Path) -> str | None:
    """The page or picture of the site that a file or folder of the repository is."""
    docs = workspace.ROOT / "docs"
    if path.is_relative_to(docs):
        return path.relative_to(docs).as_posix()
    for distribution in workspace.load().values():
        if path in (distribution.folder, distribution.folder / "README.md"):
            return page_of(distribution.name)
        if path == distribution.folder / "BENCHMARKS.md":
            return page_of(f"{distribution.name}-benchmarks")
        if path.parent == distribution.folder and path.suffix == ".svg":
            return f"packages/{path.name}"
    return None
