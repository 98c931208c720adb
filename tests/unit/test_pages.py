"""All pages are of one look: one head and one set of colours, in base.html, and text that can be read on them."""

from __future__ import annotations

import re
from importlib import resources

import jinja2
import pytest

from quietvit_eval.pages import fill_page

FOLDER = resources.files("quietvit_eval").joinpath("templates")
TEMPLATES = {f.name: f.read_text(encoding="utf-8") for f in FOLDER.iterdir() if f.name.endswith(".html")}
PAGES = sorted(set(TEMPLATES) - {"base.html", "parts.html"})
BASE = TEMPLATES["base.html"]


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.1)."""
    digits = colour.removeprefix("#")
    digits = "".join(2 * d for d in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#fff") == pytest.approx(4.48, abs=0.005)  # the known grey that just fails


@pytest.mark.parametrize("name", PAGES)
def test_a_page_takes_its_head_and_colours_from_the_base(name: str) -> None:
    text = TEMPLATES[name]
    assert text.startswith('{% extends "base.html" %}\n')
    assert re.findall(r"</?(?:html|head|body|style|meta|title)\b", text) == []
    assert re.findall(r"--(?:ink|soft|line|paper|pale):", text) == []
    shared = {line for line in BASE.splitlines() if "{" in line and not line.startswith(("@media", "{%"))}
    assert shared & set(text.splitlines()) == set()


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_styles_use_no_variable_that_is_not_there(name: str) -> None:
    set_inline = {"--columns"}
    defined = set(re.findall(r"(--[\w-]+):", BASE + TEMPLATES[name])) | set_inline
    needed = set(re.findall(r"var\((--[\w-]+)\)", TEMPLATES[name]))
    assert needed <= defined


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(scheme: str) -> None:
    light, dark = (dict(re.findall(r"--(\w+): (#\w+)", line)) for line in re.findall(r":root \{(.*?)\}", BASE))
    assert set(light) == set(dark)
    colours = light if scheme == "light" else dark
    assert (luminance(colours["paper"]) > 0.5) == (scheme == "light")
    for text in ("ink", "soft"):
        for behind in ("paper", "pale"):
            assert contrast(colours[text], colours[behind]) >= 4.5, (text, behind)


def test_contents_that_are_missing_are_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="is undefined"):
        fill_page("study")


def test_the_parts_escape_text_but_not_charts() -> None:
    environment = jinja2.Environment(loader=jinja2.DictLoader(TEMPLATES), autoescape=True)
    parts = environment.get_template("parts.html").module
    facts = str(parts.facts_table([("<i>", "<b>")]))  # type: ignore[attr-defined]
    assert "&lt;i&gt;" in facts
    assert "<b>" not in facts
    figure = str(parts.chart_figure("<svg></svg>", "<i>", "<u>"))  # type: ignore[attr-defined]
    assert "<figure><svg></svg>" in figure
    assert "<b>&lt;i&gt;</b>&lt;u&gt;" in figure
    assert "<b>" not in parts.chart_figure("<svg></svg>", "", "text")  # type: ignore[attr-defined]
