"""Plans as an HTML chart: one bar for each, memory by role, with the limit if there is one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from inlay.core.errors import ConfigError, OutputError
from inlay.plan.planner import Plan
from inlay.plan.setting import ROLES
from inlay.sizes import told_bytes

COLOURS = ("#4c5b8f", "#7aa6c2", "#e0a458", "#c8553d", "#6a994e", "#a480b4", "#b8b8b8")
GIB = 2**30


def write_chart(
    plans: Sequence[Plan], path: Path, *, title: str, limit: float | None = None, overhead: float = 0.0
) -> None:
    """Write a self-contained HTML page.

    Args:
        limit: limit in bytes, drawn as a line.
        overhead: bytes that the process itself takes, the first part of every bar.

    Raises:
        ConfigError: plotly is not installed.
        OutputError: the file cannot be written.
    """
    check_chart(path)
    import plotly.graph_objects as go

    names = [f"{plan.method} · {told_setting(plan)}" for plan in plans]
    bars = [("process", "#dddddd", [overhead] * len(plans))] if overhead else []
    bars += [(r, c, [getattr(p.memory, r) for p in plans]) for r, c in zip(ROLES, COLOURS, strict=True)]
    figure = go.Figure(
        [
            go.Bar(
                name=role, y=names, x=[v / GIB for v in values], orientation="h", marker_color=colour,
                customdata=[told_bytes(v) for v in values], hovertemplate=role + ": %{customdata}<extra>%{y}</extra>",
            )
            for role, colour, values in bars
        ]
    )  # fmt: skip
    figure.update_layout(
        barmode="stack",
        title=title,
        xaxis_title="GiB at the worst moment of a step",
        yaxis={"autorange": "reversed"},
        template="plotly_white",
        height=180 + 28 * len(plans),
    )
    if limit is not None:
        figure.add_vline(x=limit / GIB, line_dash="dash", annotation_text=told_bytes(limit))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.write_html(path, include_plotlyjs=True, full_html=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror})") from error


def check_chart(path: Path) -> None:
    """Raise before anything is computed if no chart could be written to `path`."""
    from importlib.util import find_spec

    if find_spec("plotly") is None:
        raise ConfigError("--plot needs plotly, which is not installed: pip install plotly")
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--plot {path}: the chart is an HTML page; give a name such as plan.html")


def told_setting(plan: Plan) -> str:
    """``nf4, checkpointing, 4 × 1,024``."""
    setting = plan.setting
    words = [
        setting.weights,
        *(["checkpointing"] if setting.checkpointing else []),
        f"{setting.batch:,} × {setting.length:,}",
    ]
    return ", ".join(words)
