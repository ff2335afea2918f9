"""Reports and sets as HTML, for notebooks: escaped, without scripts, on light and dark pages."""

import itertools
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.core import Tracer

from optax_constraints._constraint import Constraint, own_classes, parts_of
from optax_constraints._gauge import Histogram
from optax_constraints._numbers import is_schedule
from optax_constraints._numerics import is_array, is_readable
from optax_constraints.sets._common import MatrixSet, UnitSet

if TYPE_CHECKING:
    from optax_constraints._report import Row

_FLAT = 20
"""A module of up to so many leaves is one table; a larger one is taken apart."""
_ALL_OPEN = 40
"""Modules are open in a report of up to so many leaves."""

# Text has the colour of the page, lines and fills are seen on any: so there are no themes here.
_STYLE = """<style>
.oc-report{container-type:inline-size;font:13px/1.45 system-ui,sans-serif;text-align:left}
.oc-report p{margin:.3em 0}
.oc-report .soft{opacity:.66}
.oc-report .bad{color:#e5484d;font-weight:600}
.oc-report details{margin:.25em 0;border-left:2px solid rgba(128,128,128,.3);padding-left:.7em}
.oc-report summary{cursor:pointer;padding:.15em 0}
.oc-report details.free{border:0;padding-left:0}
.oc-report ul{margin:.2em 0 .2em 1.2em;padding:0;columns:26em;list-style:none}
.oc-report table{border-collapse:collapse;table-layout:fixed;width:100%;max-width:76em;margin:0}
.oc-report th,.oc-report td{text-align:left;vertical-align:middle;padding:.25em .8em .25em 0;
border:0;border-top:1px solid rgba(128,128,128,.25);background:none;overflow-wrap:anywhere;
white-space:normal;max-width:none}
.oc-report thead th{border:0;font-weight:400;opacity:.66;padding-bottom:0}
.oc-report .bar{display:inline-block;width:5em;height:.6em;margin-right:.5em;border-radius:.3em;
background:rgba(128,128,128,.3);overflow:hidden}
.oc-report .bar i{display:block;height:100%;background:#3e7bfa}
.oc-report svg{display:block;width:100%;max-width:170px;height:30px}
.oc-report td small{display:block;opacity:.66;font-size:11px}
@container (max-width:640px){
.oc-report table,.oc-report tbody{display:block}
.oc-report thead,.oc-report colgroup,.oc-report td:empty{display:none}
.oc-report tr{display:grid;grid-template-columns:1fr 1fr;
grid-template-areas:"leaf set" "leaf axis" "shape bound" "shape outside";
border-top:1px solid rgba(128,128,128,.25);padding:.4em 0}
.oc-report td{border:0;padding:.1em .6em .1em 0}
.oc-report .axis::before{content:"axis "}
}
</style>"""

_COLUMNS = {
    "leaf": ("leaf", 22),
    "set": ("constraint", 23),
    "axis": ("axis", 6),
    "bound": ("units at their bound", 19),
    "shape": ("all units", 20),
    "outside": ("outside by", 10),
}
"""Heading and width in percent of each column."""


def report_html(rows: Sequence["Row"]) -> str:
    """A report as HTML: a table for each module, its free leaves folded.

    Args:
        rows: The rows of the report.

    Returns:
        One `div` with its own style, which any page can hold.
    """
    if not rows:
        return '<div class="oc-report"><p>no leaves</p></div>'
    body = _module("", _blocks(rows), 0, len(rows) <= _ALL_OPEN, top=True)
    return f'<div class="oc-report">{_STYLE}{_head(rows)}{body}{_legend(rows)}</div>'


def _head(rows: Sequence["Row"]) -> str:
    own = [row for row in rows if row.constraint is not None]
    parts = [f"<b>{len(own):,} of {len(rows):,}</b> leaves constrained"]
    if share := _share(own):
        parts.append(f"<b>{share[0]:,} of {share[1]:,}</b> units at their bound")
    outside = [row for row in own if not row.inside]
    if outside:
        worst = max(outside, key=lambda row: (row.outside != row.outside, row.outside))
        parts.append(
            f'<span class="bad">⚠ {len(outside):,} outside</span>, furthest '
            f"{worst.outside:.3g} in <code>{escape(_name(worst.path))}</code>"
        )
    elif own:
        parts.append("none outside")
    return f"<p>{' · '.join(parts)}</p>"


def _legend(rows: Sequence["Row"]) -> str:
    if not any(row.histogram for row in rows):
        return ""
    return (
        '<p class="soft"><small>Histograms show units as they are, what is outside in red and '
        "bounds as lines; heights go by the square root of the count. Units at their bound are "
        "those after a projection.</small></p>"
    )


def _blocks(rows: Sequence["Row"]) -> list[list["Row"]]:
    """Rows, those of a group together."""
    blocks: list[list[Row]] = []
    for row in rows:
        if blocks and row.group is not None and row.group == blocks[-1][0].group:
            blocks[-1].append(row)
        else:
            blocks.append([row])
    return blocks


def _segments(block: list["Row"]) -> list[str]:
    """The module that a row is in, or all rows of a group are."""
    paths = [row.path.split("/")[:-1] for row in block]
    same = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return [names[0] for names in same]


def _module(name: str, blocks: list[list["Row"]], depth: int, all_open: bool, top: bool) -> str:
    """What is in one module, whose path has `depth` segments."""
    rows = [row for block in blocks for row in block]
    here, below = [], {}
    for block in blocks:
        segments = _segments(block)
        if len(segments) > depth:
            below.setdefault(segments[depth], []).append(block)
        else:
            here.append(block)
    if not here and len(below) == 1:  # a name that all have
        ((only, inner),) = below.items()
        return _module(f"{name}{only}/", inner, depth + 1, all_open, top)
    if not top and len(rows) <= _FLAT:
        here, below = blocks, {}
    own = [row for row in rows if row.constraint is not None]
    shown = [row for block in here for row in block]
    body = _table([row for row in shown if row.constraint is not None], depth)
    body += "".join(
        _module(f"{segment}/", inner, depth + 1, all_open, False)
        for segment, inner in below.items()
    )
    body += _folded([row for row in shown if row.constraint is None], depth)
    name = escape(name.rstrip("/"))
    if not name:
        return body
    if not own:
        text = f'<span class="soft">{name} {_count(rows)}, free</span>'
        return f"<details><summary>{text}</summary>{_names(rows, depth)}</details>"
    free = f", {len(rows) - len(own):,} free" if len(own) < len(rows) else ""
    text = f'<b>{name}</b> <span class="soft">{_count(rows)}{free}</span>'
    if share := _share(own):
        text += f" &nbsp;{_bar(*share)}"
    if outside := sum(not row.inside for row in own):
        text += f' &nbsp;<span class="bad">⚠ {outside:,} outside</span>'
    is_open = " open" if all_open or top or outside else ""
    return f"<details{is_open}><summary>{text}</summary>{body}</details>"


def _table(rows: list["Row"], depth: int) -> str:
    """The constrained leaves of a module."""
    if not rows:
        return ""
    widths = "".join(f'<col style="width:{width}%">' for _, width in _COLUMNS.values())
    heads = "".join(f"<th>{name}</th>" for name, _ in _COLUMNS.values())
    lines = "".join(_line(row, depth) for row in rows)
    return (
        f"<table><colgroup>{widths}</colgroup><thead><tr>{heads}</tr></thead>"
        f"<tbody>{lines}</tbody></table>"
    )


def _folded(rows: list["Row"], depth: int) -> str:
    """The free leaves of a module."""
    if not rows:
        return ""
    return (
        f'<details class="free"><summary class="soft">{_count(rows, " free")}</summary>'
        f"{_names(rows, depth)}</details>"
    )


def _count(rows: Sequence["Row"], kind: str = "") -> str:
    return f"{len(rows):,}{kind} {'leaf' if len(rows) == 1 else 'leaves'}"


def _names(rows: list["Row"], depth: int) -> str:
    return f"<ul>{''.join(f'<li>{_leaf(row, depth)}</li>' for row in rows)}</ul>"


def _name(path: str, depth: int = 0) -> str:
    return "/".join(path.split("/")[depth:]) or "(root)"


def _leaf(row: "Row", depth: int) -> str:
    shape = "x".join(map(str, row.shape)) or "scalar"
    about = f"{shape} {row.dtype}" + (f", {row.layer}" if row.layer else "")
    return f"{escape(_name(row.path, depth))} <small class='soft'>{escape(about)}</small>"


def _line(row: "Row", depth: int) -> str:
    """One row of a table."""
    follows = row.group is not None and row.histogram is None and row.units is None
    axis = "" if row.axis is None else ", ".join(map(str, row.axis)) or "none"
    bar = "" if row.units is None else _bar(row.at_bound, row.units)
    if row.inside:
        outside = '<span class="soft">inside</span>'
    else:
        outside = f'<span class="bad">⚠ {row.outside:.3g}</span>'
    group = f"<small>{escape(row.group)}</small>" if row.group and not follows else ""
    constraint = "as above" if follows else escape(row.constraint or "")
    cells = (
        _leaf(row, depth),
        f'<span class="soft">{constraint}</span>' if follows else constraint + group,
        axis,
        bar,
        "" if row.histogram is None else _histogram(row.histogram),
        outside,
    )
    named = zip(_COLUMNS, cells, strict=True)
    text = "".join(
        f'<td class="{name}" style="grid-area:{name}">{cell}</td>' for name, cell in named
    )
    return f"<tr>{text}</tr>"


def _share(rows: Sequence["Row"]) -> tuple[int, int] | None:
    """Units at their bound, and units, where sets say it."""
    own = [row for row in rows if row.units]
    if not own:
        return None
    return sum(row.at_bound or 0 for row in own), sum(row.units or 0 for row in own)


def _bar(at_bound: int | None, units: int) -> str:
    if at_bound is None:
        return f"<span class='soft'>of {units:,}</span>"
    percent = 100 * at_bound / units if units else 0
    return f'<span class="bar"><i style="width:{percent:.4g}%"></i></span>{at_bound:,} of {units:,}'


def _histogram(found: Histogram) -> str:
    """An SVG picture of 150 x 30 units, and a line of text below it."""
    width, height = 150, 30
    highest = max(found.counts) or 1
    step = width / len(found.counts)

    def bars(counts: Sequence[int], colour: str) -> str:
        shapes = []
        for i, count in enumerate(counts):
            if count:
                tall = max((height - 4) * (count / highest) ** 0.5, 2)
                shapes.append(f"M{i * step:.1f} {height}v-{tall:.1f}h{step - 0.6:.1f}v{tall:.1f}z")
        return f'<path fill="{colour}" d="{"".join(shapes)}"/>' if shapes else ""

    def place(bound: float) -> float:
        return width * (bound - found.start) / (found.end - found.start)

    lines = "".join(
        f'<path d="M{place(bound):.1f} 0V{height}" stroke="currentColor" stroke-width="1.2" '
        'stroke-dasharray="3 2"/>'
        for bound in found.bounds[:16]
    )
    if not sum(found.counts):
        text = found.name
    elif found.least == found.largest:
        text = f"{found.name} {found.least:.3g}"
    else:
        text = f"{found.name} {found.least:.3g} to {found.largest:.3g}"
    if found.not_finite:
        text += f", {found.not_finite:,} not finite"
    bounds = ", ".join(f"{bound:.3g}" for bound in found.bounds[:16])
    label = escape(f"{text}; bound {bounds}" if bounds else text)
    return (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}"><title>{label}</title>'
        f'<path d="M0 {height - 0.5}H{width}" stroke="currentColor" opacity=".3"/>'
        f"{bars(found.counts, '#3e7bfa')}{bars(found.outside, '#e5484d')}{lines}</svg>"
        f"<small>{escape(text)}</small>"
    )


# Sets in symbols.


def set_html(constraint: Constraint) -> str:
    """A set as HTML: its name, its promises and the set in symbols."""
    kinds = [
        word
        for word, holds in (
            ("convex", constraint.convex),
            ("smooth", constraint.smooth),
            ("entry by entry", constraint.elementwise),
        )
        if holds
    ]
    about = " · ".join([type(constraint).__name__, *kinds])
    soft = "opacity:.66;font-size:90%"
    serif = "font:1.2em/1.6 'STIX Two Math','Cambria Math','Latin Modern Math',serif"
    lines = ((soft, about), (serif, symbols(constraint)), (soft, _where(constraint)))
    text = "\n".join(f'<div style="{style}">{escape(line)}</div>' for style, line in lines if line)
    return f'<div style="margin:.6em 0">{text}</div>'


def symbols(constraint: Constraint) -> str:
    """A set in symbols, its numbers in their places: ``{ w : ‖u‖₂ ≤ 2 }``."""

    def field(match: re.Match[str]) -> str:
        name, between = match[1], match[2] or ", "
        value: Any = getattr(constraint, name, match[0])
        if name == "constraints":
            return between.join(map(symbols, value))
        return _symbol(name, value)

    text = re.sub(r"\{(\w+)(?::([^{}]*))?\}", field, constraint.formula)
    # A minus sign, but not in words with a hyphen.
    return re.sub(r"(?<!\w)-", "\N{MINUS SIGN}", text)


def _symbol(name: str, value: Any) -> str:
    """A hyperparameter: its value where that is short, otherwise its name."""
    if isinstance(value, Constraint):
        return symbols(value)
    if name == "axis":
        axes = value if isinstance(value, tuple) else (value,)
        return f"{'axis' if len(axes) == 1 else 'axes'} {', '.join(map(str, axes))}"
    if isinstance(value, (tuple, list)):
        texts = [_symbol(name, part) for part in value]
        return ", ".join(texts if len(texts) <= 8 else [*texts[:3], "…", texts[-1]])
    if isinstance(value, Tracer) or is_schedule(value):
        return name if isinstance(value, Tracer) else f"{name}(t)"
    if is_array(value):
        if np.ndim(value) or not is_readable(value):
            return name
        value = float(value)
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)


def _where(constraint: Constraint) -> str:
    """What the letters of the set in symbols stand for."""
    found = dict.fromkeys(map(_letter, parts_of(constraint)))
    return "; ".join(text for text in found if text)


def _letter(constraint: Constraint) -> str:
    if type(constraint) not in own_classes:
        written = type(constraint).__dict__.get("__doc__") or ""
        # That of a dataclass is its signature, if nobody has written one.
        line = next((line for line in written.splitlines() if line), "")
        return line if " " in line.partition("(")[0] else "P: the projection"
    axis = getattr(constraint, "axis", ())
    if isinstance(constraint, UnitSet):
        if axis is None:
            return "u: the whole array"
        if axis == "fan_in":
            return "u: the incoming weights of one unit"
        return f"u: each slice along {_symbol('axis', axis)}"
    if isinstance(constraint, MatrixSet):
        if axis is None:
            return "W: the last two axes"
        if axis == "fan_in":
            return "W: incoming weights, one column for each unit"
        return f"W: {_symbol('axis', axis)} as rows, the others as columns"
    return ""
