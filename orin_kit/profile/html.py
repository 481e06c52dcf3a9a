"""`report.html`: one page with nothing outside it, for a screen, light or dark, and for paper."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from orin_kit.profile.plots import plots
from orin_kit.profile.report import COLUMNS, Report, cells, figures, size

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def render_html(report: Report) -> str:
    """The page. Every text is escaped but the plots, whose own text matplotlib escapes."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["size"] = size
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        report=report,
        missed=[verdict for verdict in report.verdicts if not verdict.passed],
        figures=figures,
        columns=list(COLUMNS),
        rows=[(point, cells(point)) for point in report.points],
        judged={(verdict.batch_size, verdict.prompt_length) for verdict in report.verdicts},
        plots={name: Markup(svg) for name, svg in plots(report).items()},
    )
