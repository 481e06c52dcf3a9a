"""The HTML page: nothing outside it, nothing unescaped, and what it must say."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from orin_kit.profile.html import render_html
from orin_kit.profile.report import Report
from orin_kit.profile.targets import Targets

PLACES = [(1, 32), (1, 128), (4, 32), (4, 128)]
VOID = {"meta", "link", "br", "img", "hr", "input"}
EVIL = "<script>alert('x')</script>\"&$\\alpha$"


class Page(HTMLParser):
    """Tags, ids, attributes and visible text; complains of tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    @property
    def ids(self) -> list[str | None]:
        return [value for name, value in self.attributes if name == "id"]


def test_the_page_needs_nothing_outside_it(make_report: Callable[..., Report]) -> None:
    html = render_html(make_report(PLACES))
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", html)
    page = Page(html)
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action")]
    assert all(value and value.startswith("#") for value in links)
    assert page.tags["svg"] == 3


def test_ids_are_unique_and_references_resolve(make_report: Callable[..., Report]) -> None:
    page = Page(render_html(make_report(PLACES)))
    assert len(page.ids) == len(set(page.ids)) > 0
    used = [str(value) for name, value in page.attributes if value and (name.endswith("href") or "url(#" in value)]
    targets = {found for value in used for found in re.findall(r"#([\w-]+)", value) if "href" not in found}
    assert targets <= set(page.ids)


def test_text_of_artifacts_is_escaped(make_report: Callable[..., Report]) -> None:
    report = make_report(PLACES, Targets(name=EVIL), name=EVIL, directory=f"/tmp/{EVIL}", backend=EVIL)
    html = render_html(report)
    assert "<script" not in html
    assert Page(html).text.count(EVIL) >= 4


def test_verdicts_machine_and_every_point_are_said(make_report: Callable[..., Report]) -> None:
    report = make_report(PLACES, Targets(tpot_p95_ms=0.5))
    text = Page(render_html(report)).text
    assert "1 of 3 targets missed" in text
    assert re.search(r"MISSED\s+\d+\.\d+ ms\s+TPOT p95, limit 0.5 ms", text)
    assert report.machine.note in text
    assert "1 warm-up and 6 counted answers of 5 tokens" in text
    for point in report.points:
        assert f"{point.ttft_ms.median:.1f}" in text


def test_all_met_none_judged_and_one_point(make_report: Callable[..., Report]) -> None:
    assert "all 3 targets met" in Page(render_html(make_report([(1, 128)]))).text
    nothing = Targets(ttft_p95_ms=None, tpot_p95_ms=None, memory_gb=None)
    assert "no target judged" in Page(render_html(make_report([(1, 128)], nothing))).text


@pytest.mark.parametrize("jetson", [None, "R36 (release), REVISION: 4.0"])
def test_figures_are_called_an_orins_only_on_one(make_report: Callable[..., Report], jetson: str | None) -> None:
    report = make_report([(1, 128)])
    report.machine.jetson = jetson
    assert ("not of an Orin" in Page(render_html(report)).text) is (jetson is None)
