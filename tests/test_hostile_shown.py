"""What comes from files of others is shown on pages, cards and terminals, and no more."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import MARKUP
from pages import Page

from secateur.errors import SourceError, one_line
from secateur.outputs.card import fenced, model_card, plain
from secateur.pruning import PruneResult, prune
from secateur.recipe import make_recipe
from secateur.report.pruning import pruning_page

#: Text that somebody means to be more than text.
markup = st.one_of(st.text(max_size=30), st.sampled_from(MARKUP))


@pytest.fixture(scope="module")
def made(
    model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> PruneResult:
    recipe = make_recipe(
        remove="10%", method="magnitude-sp", calibration={"samples": 2, "length": 16}
    )
    out = tmp_path_factory.mktemp("made") / "out"
    return prune(model_folder("llama-gqa-tied"), out, recipe, verify=False)


def test_a_message_cannot_steer_the_terminal() -> None:
    line, code = one_line(SourceError("a\x1b[31m\nb\ud800\u202e" + "x" * 10_000))
    assert code == 2
    assert line.startswith("a\\x1b[31m b\\ud800\\u202exxx")
    assert line.endswith("xxx ...")
    assert line.isprintable()
    assert len(line) < 4000


def test_a_name_in_the_card_is_only_shown() -> None:
    assert plain("a_b-1.5") == "a_b-1.5"
    assert plain("<script>x</script>\n# y [z](w) `c`") == (
        "&lt;script&gt;x&lt;/script&gt; # y \\[z\\](w) \\`c\\`"
    )


class Tags(HTMLParser):
    """The elements of a page, without what stands in them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))


shown = settings(max_examples=40, deadline=None, database=None, derandomize=True)


def test_the_page_escapes_what_it_shows(made: PruneResult) -> None:
    assert made.facts is not None
    facts = made.facts
    record = json.loads((made.out / "secateur.json").read_text())

    def page(text: str) -> str:
        forged = json.loads(json.dumps(record))
        forged["recipe"]["method"] = forged["calibration"]["origin"] = text
        forged["source"]["fingerprint"] = forged["versions"]["secateur"] = text
        return pruning_page(
            forged,
            replace(facts, source=f"x/{text}", out=text, seconds={text: 1.0}, protocol=text),
        )

    wanted = {*Tags(page("text")).found, *Tags(page("a long text " * 9)).found}

    @shown
    @given(markup)
    def every(text: str) -> None:
        made_of_it = page(text)
        assert "script" not in Page(made_of_it).texts  # well formed, and no handlers
        assert {*Tags(made_of_it).found} <= wanted

    every()


def test_the_card_escapes_what_it_shows(made: PruneResult) -> None:
    record = json.loads((made.out / "secateur.json").read_text())

    def card(text: str) -> str:
        forged = json.loads(json.dumps(record))
        forged["recipe"]["method"] = text
        return model_card(made.plan, forged, source=f"org/a{text}", stock=False)

    def outline(text: str) -> list[str]:
        """Keys of the header, and titles, tables and fences of the rest."""
        _, head, body = re.split(r"^---$", text, maxsplit=2, flags=re.M)
        body = re.sub(r"^(```+)yaml$.*?^\1$", "FENCE", body, flags=re.M | re.S)
        assert "<" not in body
        lines = body.split("\n")
        kinds = [line.split()[0] for line in lines if re.match(r"#|\||```|FENCE|---|===|<", line)]
        return [*yaml.safe_load(head), *kinds]

    wanted = outline(card("text"))

    @shown
    @given(markup)
    def every(text: str) -> None:
        assert outline(card(text)) == wanted

    every()


@shown
@given(st.dictionaries(markup, markup, max_size=3))
def test_a_fence_is_not_ended_from_inside(values: dict[str, str]) -> None:
    first, *inner, last = fenced(values).split("\n")
    assert first == f"{last}yaml"
    assert not any(line.strip().startswith(last) for line in inner)
    assert yaml.safe_load("\n".join(inner)) == values
