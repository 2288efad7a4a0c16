"""Plain English text from the Wikipedia excerpt that ships inside the package gensim (text: CC BY-SA).

The text is the ruler for perplexity: the same package gives the same bytes, always. Markup is removed by a
few rules that keep running prose; what a template would have expanded to is lost.

    python -m spikingbrain.tools.clean_wiki wiki.txt
"""

from __future__ import annotations

import argparse
import bz2
import html
import importlib.metadata
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from spikingbrain.errors import MissingDependency

PACKAGE = "gensim"
INSTALL = "pip install --no-deps gensim==4.4.0"
FILE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
NAMESPACE = "{http://www.mediawiki.org/xml/export-0.10/}"

# Shorter pages are lists of links to other pages.
SHORTEST_ARTICLE = 2000

# From these headings on, an article is lists of titles and links.
APPENDICES = (
    "See also",
    "References",
    "Notes",
    "Footnotes",
    "Further reading",
    "External links",
    "Bibliography",
)

COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
DROPPED_TAGS = re.compile(
    r"<(ref|math|gallery|timeline|source|syntaxhighlight|imagemap)\b(?:[^<>]*?/>|[^<>]*>.*?</\1\s*>)",
    re.DOTALL | re.IGNORECASE,
)
TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)
MEDIA_LINK = re.compile(r"\[\[\s*(?:File|Image|Category|[a-z-]{2,12})\s*:[^\[\]]*\]\]", re.IGNORECASE)
LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)*([^\[\]|]*)\]\]")
WEB_LINK = re.compile(r"\[(?:https?|ftp):[^\s\]]*\s*([^\]]*)\]")
EMPHASIS = re.compile(r"'{2,5}")
HEADING = re.compile(r"^=+\s*(.*?)\s*=+\s*$", re.MULTILINE)
APPENDIX = re.compile(rf"^==\s*(?:{'|'.join(APPENDICES)})\s*==\s*$", re.MULTILINE | re.IGNORECASE)
LIST_MARK = re.compile(r"^[*#:;]+\s*", re.MULTILINE)
MAGIC_WORD = re.compile(r"__[A-Z]+__")
EMPTY_BRACKETS = re.compile(r" ?\([\s,;]*\)")


def locate() -> Path:
    """Returns the excerpt inside the installed package, without importing it."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise _missing("the package is not installed") from error
    for file in files:
        path = Path(str(file.locate()))
        if path.name == FILE and path.is_file():
            return path
    raise _missing(f"the package is installed, and no {FILE} is in it")


def wiki_text(path: Path | None = None) -> str:
    """Returns the articles of the excerpt as plain text, each under its title."""
    return "\n\n".join(f"{title}\n\n{text}" for title, text in articles(path or locate())) + "\n"


def articles(path: Path) -> Iterator[tuple[str, str]]:
    """Yields title and plain text of every article that is not a redirect, a portal or a stub."""
    with bz2.open(path) as file:
        for _, page in ElementTree.iterparse(file):
            if page.tag != NAMESPACE + "page":
                continue
            is_article = page.findtext(NAMESPACE + "ns") == "0" and page.find(NAMESPACE + "redirect") is None
            markup = page.findtext(f"{NAMESPACE}revision/{NAMESPACE}text")
            if is_article and markup and len(text := plain(markup)) >= SHORTEST_ARTICLE:
                yield page.findtext(NAMESPACE + "title", ""), text
            page.clear()


def plain(markup: str) -> str:
    """Returns the prose of one article: headings and list items become lines, all else of the markup goes."""
    text = COMMENT.sub("", markup)
    text = DROPPED_TAGS.sub("", text)
    text = _until_stable(TEMPLATE, "", text)
    text = _until_stable(TABLE, "", text)
    text = _links(text)
    if appendix := APPENDIX.search(text):
        text = text[: appendix.start()]
    text = WEB_LINK.sub(r"\1", text)
    text = TAG.sub("", text)
    text = EMPHASIS.sub("", text)
    text = HEADING.sub(r"\n\1\n", text)
    text = LIST_MARK.sub("", text)
    text = MAGIC_WORD.sub("", text)
    text = html.unescape(text).replace("\u00a0", " ")
    text = EMPTY_BRACKETS.sub("", text)
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _links(text: str) -> str:
    """Inner links first, because captions of images hold links."""
    while True:
        shorter = LINK.sub(r"\1", MEDIA_LINK.sub("", text))
        if shorter == text:
            return text
        text = shorter


def _until_stable(pattern: re.Pattern[str], replacement: str, text: str) -> str:
    while True:
        shorter = pattern.sub(replacement, text)
        if shorter == text:
            return text
        text = shorter


def _missing(why: str) -> MissingDependency:
    return MissingDependency(f"the Wikipedia excerpt is in the package {PACKAGE}", why=why, hint=INSTALL)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="clean_wiki", description="Write the Wikipedia excerpt as plain text."
    )
    parser.add_argument("output", type=Path, help="text file to write")
    output: Path = parser.parse_args(argv).output
    output.write_text(wiki_text(), encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
