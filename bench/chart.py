"""A bar chart as SVG: how many times as fast as one peer, on a logarithmic axis.  Pure."""

from dataclasses import dataclass
from html import escape
from math import floor, log10
from typing import Final

_COLOURS: Final = ("#2a6f97", "#61a5c2", "#e09f3e", "#9e2a2b", "#6a994e", "#7f6a93", "#8d99ae", "#bc6c25")
_LABEL_PX: Final = 330
_PLOT_PX: Final = 520
_BAR_PX: Final = 11
_GAP_PX: Final = 12
_HEAD_PX: Final = 78
_FONT: Final = 'font-family="sans-serif" font-size="12"'


@dataclass(frozen=True, slots=True)
class Bar:
    """One value of a group."""

    series: str
    value: float
    low: float
    high: float


def draw(title: str, groups: dict[str, list[Bar]]) -> str:
    """Draw the groups below one another; the line at 1 is the peer.

    Args:
        title: Stands on top.
        groups: Label -> bars.
    """
    values = [edge for bars in groups.values() for bar in bars for edge in (bar.low, bar.high) if edge > 0]
    first = floor(log10(min([*values, 0.5])))
    last = -floor(-log10(max([*values, 2.0])))
    scale = _PLOT_PX / (last - first)
    series = list(dict.fromkeys(bar.series for bars in groups.values() for bar in bars))
    body = [*_legend(series), *_axis(first, last, scale, _height(groups))]
    top = float(_HEAD_PX)
    for label, bars in groups.items():
        middle = top + len(bars) * _BAR_PX / 2 + 4
        body.append(f'<text x="{_LABEL_PX - 8}" y="{middle:.1f}" text-anchor="end">{escape(label)}</text>')
        for bar in bars:
            body += _bar(bar, top, first, scale, _COLOURS[series.index(bar.series) % len(_COLOURS)])
            top += _BAR_PX
        top += _GAP_PX
    width, height = _LABEL_PX + _PLOT_PX + 60, _height(groups) + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {_FONT}>\n'
        f'<rect width="100%" height="100%" fill="white"/>\n'
        f'<text x="10" y="20" font-size="15" font-weight="bold">{escape(title)}</text>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _height(groups: dict[str, list[Bar]]) -> float:
    return _HEAD_PX + sum(len(bars) * _BAR_PX + _GAP_PX for bars in groups.values())


def _legend(series: list[str]) -> list[str]:
    parts, left = [], 10.0
    for index, name in enumerate(series):
        colour = _COLOURS[index % len(_COLOURS)]
        parts.append(f'<rect x="{left:.0f}" y="32" width="11" height="11" fill="{colour}"/>')
        parts.append(f'<text x="{left + 15:.0f}" y="42">{escape(name)}</text>')
        left += 30 + 6.6 * len(name)
    return parts


def _axis(first: int, last: int, scale: float, bottom: float) -> list[str]:
    parts = []
    for exponent in range(first, last + 1):
        for factor in (1, 2, 5) if exponent < last else (1,):
            value = factor * 10.0**exponent
            x = _LABEL_PX + (log10(value) - first) * scale
            colour, width = ("#333333", 1.5) if value == 1 else ("#dddddd", 1)
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_HEAD_PX - 8}" y2="{bottom:.0f}" '
                f'stroke="{colour}" stroke-width="{width}"/>'
            )
            parts.append(f'<text x="{x:.1f}" y="{_HEAD_PX - 14}" text-anchor="middle" fill="#555555">{value:g}</text>')
    return parts


def _bar(bar: Bar, top: float, first: int, scale: float, colour: str) -> list[str]:
    def place(value: float) -> float:
        return _LABEL_PX + (log10(max(value, 10.0**first)) - first) * scale

    start, stop = sorted((place(1), place(bar.value)))
    middle = top + _BAR_PX / 2
    return [
        f'<rect x="{start:.1f}" y="{top:.1f}" width="{max(1.0, stop - start):.1f}" height="{_BAR_PX - 1}" '
        f'fill="{colour}"><title>{escape(bar.series)}: {bar.value:.2f}</title></rect>',
        f'<line x1="{place(bar.low):.1f}" x2="{place(bar.high):.1f}" y1="{middle:.1f}" y2="{middle:.1f}" '
        f'stroke="#333333" stroke-width="1"/>',
    ]
