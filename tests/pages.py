"""Reading an HTML page as strictly as the tests need it."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

#: Elements that end where they begin.
VOID = {"meta", "br", "link", "img", "hr", "input"}
#: Attributes that could make a browser fetch something.
FETCHING = {"href", "src", "xlink:href", "action", "srcset", "data", "poster", "background"}


@dataclass
class Page(HTMLParser):
    """Tables by id as rows of cells, texts by element, and everything that would be fetched."""

    source: str
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._open: list[str] = []
        self._table: list[list[str]] | None = None
        self.feed(self.source)
        self.close()
        assert self._open == [], f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs), f"an attribute twice in {self.get_starttag_text()}"
        self.fetched += [f"{k}={v}" for k, v in attrs if k in FETCHING]
        assert not any(name.startswith("on") for name in given), "no scripts"
        if given.get("id"):
            self.ids.append(str(given["id"]))
        if tag == "table":
            self._table = self.tables.setdefault(given.get("id") or "", [])
        if tag == "tr" and self._table is not None:
            self._table.append([])
        if tag in ("td", "th") and self._table is not None:
            self._table[-1].append("")
        if tag not in VOID:
            self._open.append(tag)
        self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag, f"</{tag}> closes another"
        if tag == "table":
            self._table = None

    def handle_data(self, data: str) -> None:
        if not self._open:
            return
        for tag in dict.fromkeys(self._open):
            self.texts[tag][-1] += data
        if self._table and self._table[-1] and self._open[-1] in ("td", "th"):
            self._table[-1][-1] += data


def check_alone(source: str) -> Page:
    """The page stands alone: well formed, nothing fetched, both colour schemes."""
    page = Page(source)
    assert source.startswith("<!DOCTYPE html>")
    assert page.fetched == []
    assert "script" not in page.texts
    for fetching in ("http:", "https:", "//", "@import", "url("):
        assert fetching not in source.replace("http://www.w3.org", ""), fetching
    assert "prefers-color-scheme: dark" in source
    assert 'name="viewport"' in source
    assert len(set(page.ids)) == len(page.ids)
    return page
