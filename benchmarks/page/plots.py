"""Which plots the document of a run makes, and how they are drawn.

Colours are Okabe and Ito's, which the colour-blind tell apart; markers and line styles say the same in black and
white. matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..run.providers import BASELINE, OURS
from ..run.stages import WHOLE
from .document import OP, Found, Row, bare, entries, label, median, number, peers, split, title_of, which

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h", "<", ">", "p")
_LINES = {"fp32": "-", "bf16": "--"}  # further dtypes are dotted
_WIDTH = 10.5  # inches
_TICKS = (0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100, 200, 500, 1000)
_FINE_TICKS = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9, 10)
_LONGEST_NAME = 32  # of a stage; that of an op that is several stages is a list of them
_LEAST_BAND, _LINE = 0.24, 0.085  # inches of a case, and of a peer in it
_LONGEST_BAR = 1.5  # of the peak; algorithms with fewer multiplications than the direct one pass any end
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_NAMED = re.compile(r"#((?![0-9a-fA-F]{6}\b)[\w.-]+)")  # what refers to an element by its id, and is no colour
_SETTINGS = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.edgecolor": "#555555",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.markersize": 5,
    "lines.linewidth": 1.2,
    "hatch.linewidth": 0.6,
}


@dataclass(frozen=True)
class Plot:
    """A plot that there is data for. `draw` fills a figure of `height` inches."""

    section: str  # of tables.sections
    title: str
    alt: str  # what it shows, for those who do not see it
    height: float
    draw: Callable[[Figure], None]

    def svg(self, key: str) -> str:
        """The plot as an SVG element for an HTML page on which no other has the key.

        Raises:
            ImportError: matplotlib is not there.
        """
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": key}):
            figure = Figure((_WIDTH, self.height), layout="constrained")
            self.draw(figure)
            out = io.BytesIO()
            figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
        return _embedded(out.getvalue(), key, self.title, self.alt)


def _embedded(svg: bytes, key: str, title: str, alt: str) -> str:
    """An SVG file as an element: no metadata, no style for the page around, no name that another may have."""
    tree = ElementTree.fromstring(svg)
    for parent in list(tree.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    used = {name for element in tree.iter() for value in element.attrib.values() for name in _NAMED.findall(value)}
    for element in tree.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        element.attrib = {
            name.removeprefix(_XLINK): f"{key}-{value}" if name == "id" else _NAMED.sub(rf"#{key}-\1", value)
            for name, value in element.attrib.items()
        }
    width = float(tree.attrib.pop("width").removesuffix("pt"))
    del tree.attrib["height"]
    tree.attrib |= {"role": "img", "aria-labelledby": f"{key}-title {key}-desc", "style": f"width:{width / 72:.2f}in"}
    for position, (tag, text) in enumerate((("title", title), ("desc", alt))):
        element = ElementTree.Element(tag, {"id": f"{key}-{tag}"})
        element.text = text
        tree.insert(position, element)
    return ElementTree.tostring(tree, encoding="unicode")


def plots(found: Found) -> list[Plot]:
    """All plots that there is data for, in the order of the page's sections."""
    look = Look(found)
    rows = entries(found, "rows")
    ops = [row for row in rows if row["group"] == OP]
    models = [row for row in rows if row["group"] != OP]
    made = [
        _faster(models, look, "speed", "Ours over each of the others, case by case"),
        *_scaling(entries(found, "scaling"), look),
        *(_stages(group) for group in split(entries(found, "stages"), "case", "provider", "dtype")),
        *(_layers(group, look) for group in split(entries(found, "layers"), "case", "dtype")),
        _faster(ops, look, "ops", "Ours over each of the others, op by op"),
    ]
    return [plot for plot in made if plot is not None]


class Look:
    """One colour and one marker for each provider, in all plots; the dtype decides the line and fills the marker."""

    def __init__(self, found: Found) -> None:
        rows = [row for name in ("rows", "scaling", "layers") for row in entries(found, name)]
        names = dict.fromkeys([OURS, BASELINE, *(bare(row["provider"]) for row in rows)])
        self._places = {name: place for place, name in enumerate(names)}

    def of(self, provider: str, dtype: str) -> dict[str, Any]:
        """Keywords of `Axes.plot`."""
        place = self._places[bare(provider)]
        colour = _COLOURS[place % len(_COLOURS)]
        return {
            "color": colour,
            "marker": _MARKERS[place % len(_MARKERS)],
            "linestyle": _LINES.get(dtype, ":"),
            "markerfacecolor": colour if dtype == "fp32" else "white",
        }


def _faster(rows: Sequence[Row], look: Look, section: str, title: str) -> Plot | None:
    """Dots with whiskers: a band per case, a line in it per peer, a panel per dtype."""
    others = peers(rows)
    rows = [row for row in rows if row["provider"] in others and (median(row, "ours_faster") or 0) > 0]
    if not rows:
        return None
    bands = _bands(rows)
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    alt = (
        f"How many times as fast ours is as {', '.join(peers(rows))}, in {len(bands)} cases, on a logarithmic axis: "
        "medians of the ratios of runs side by side, with whiskers from the 10th to the 90th percentile. The tables "
        "hold the figures."
    )
    height = bands[-1].end

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
        for axes, dtype in zip(panels, dtypes, strict=True):
            _dots(axes, [row for row in rows if row["dtype"] == dtype], bands, look)
            axes.set_title(dtype)
            axes.set_xlabel("times as fast (log scale)")
            axes.tick_params(axis="x", labeltop=height > 3)
        names = [title_of(band.case.removeprefix(f"{OP} ")) for band in bands]
        panels[0].set_yticks([(band.start + band.end) / 2 for band in bands], names)
        panels[0].set_ylim(height, 0)
        _legend(figure, panels)

    return Plot(section, title, alt, 1.4 + height, draw)


@dataclass(frozen=True)
class _Band:
    """Where a case is along the axis of cases, in inches."""

    case: str
    start: float
    end: float


def _bands(rows: Sequence[Row]) -> list[_Band]:
    """Bands as high as the most peers that a dtype has in the case."""
    bands, start = [], 0.0
    for of_case in split(rows, "case"):
        most = max(map(len, split(of_case, "dtype")))
        bands.append(_Band(of_case[0]["case"], start, start + max(_LEAST_BAND, 0.1 + _LINE * most)))
        start = bands[-1].end
    return bands


def _dots(axes: Axes, rows: Sequence[Row], bands: Sequence[_Band], look: Look) -> None:
    heights = {}
    for band in bands:
        own = [row["provider"] for row in rows if row["case"] == band.case]
        first = (band.start + band.end - _LINE * (len(own) - 1)) / 2
        heights |= {(band.case, name): first + _LINE * place for place, name in enumerate(own)}
    for name in peers(rows):
        own = [row for row in rows if row["provider"] == name]
        middle = [row["ours_faster"]["median"] for row in own]
        ends = [
            [abs(m - (number(row["ours_faster"][end]) or m)) for m, row in zip(middle, own, strict=True)]
            for end in ("p10", "p90")
        ]
        style = {**look.of(name, own[0]["dtype"]), "linestyle": "none"}
        places = [heights[row["case"], name] for row in own]
        axes.errorbar(middle, places, xerr=ends, elinewidth=0.9, capsize=1.5, label=name, **style)
    axes.axvline(1, color="#555555", linewidth=0.9)
    for band in bands[::2]:
        axes.axhspan(band.start, band.end, color="#f4f4f4", linewidth=0)
    axes.set_xscale("log")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    low, high = axes.get_xlim()
    _plain_ticks(axes, "x", _FINE_TICKS if high / low < 5 else _TICKS)


def _plain_ticks(axes: Axes, which: str, ticks: Sequence[float], write: Callable[[float], str] = "{:g}".format) -> None:
    """Numbers as people write them on a logarithmic axis, the ticks that lie within it."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis = getattr(axes, f"{which}axis")
    low, high = getattr(axes, f"get_{which}lim")()
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, position: write(value)))


def _decades(within: Sequence[int]) -> list[float]:
    return [float(f"{first}e{power}") for power in range(-18, 10) for first in within]


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Everybody once, above the panels; names without the dtype that the panel's title has."""
    found = (zip(*axes.get_legend_handles_labels(), strict=True) for axes in reversed(panels))
    handles = {bare(name): handle for panel in found for handle, name in panel}
    figure.legend(handles.values(), handles, loc="outside upper left", ncols=min(5, len(handles)), handletextpad=0.3)


def _scaling(rows: Sequence[Row], look: Look) -> Iterator[Plot]:
    """Time and memory on two logarithmic axes, against length and against batch."""
    units = {"length": "audio length, s", "batch": "utterances in a batch"}
    quantities = {"seconds": ("time of one forward, s", 1.0), "memory": ("memory that one forward adds, GB", 1e9)}
    for group in split([row for row in rows if len(_points(row)) > 1], "along", "model", "at"):
        along = group[0]["along"]
        panels = split(group, "quantity")
        what = " and ".join(quantities[panel[0]["quantity"]][0] for panel in panels)

        def draw(figure: Figure, panels: list[list[Row]] = panels, along: str = along) -> None:
            places = figure.subplots(1, 2, squeeze=False)[0]
            places[-1].set_visible(len(panels) > 1)
            for axes, panel in zip(places, panels, strict=False):
                name, scale = quantities[panel[0]["quantity"]]
                _lines(axes, panel, scale, look)
                axes.set_xlabel(f"{units[along]} (log scale)")
                axes.set_ylabel(f"{name} (log scale)")

        alt = (
            f"{what[0].upper()}{what[1:]} against {units[along]}, both axes logarithmic, with the exponents of fitted "
            f"powers, for {', '.join(dict.fromkeys(label(row) for row in group))}. The tables below hold the figures."
        )
        title = {"length": "Cost against audio length", "batch": "Cost against batch"}[along]
        yield Plot("scaling", title + which(group[0]), alt, 3.7 + 0.19 * max(map(len, panels)), draw)


def _points(row: Row) -> list[tuple[float, float]]:
    return [(x, y) for x, y in row["points"] if (number(x) or 0) > 0 and (number(y) or 0) > 0]


def _lines(axes: Axes, rows: Sequence[Row], scale: float, look: Look) -> None:
    for row in rows:
        points = _points(row)
        exponent = number(row["exponent"])
        style = look.of(row["provider"], row["dtype"])
        text = label(row) if exponent is None else f"{label(row)}, exponent {exponent:.2f}"
        x, y = zip(*points, strict=True)
        axes.plot(x, [value / scale for value in y], label=text, **style)
        if exponent is not None:
            # The fitted power passes through the mean of the points' logarithms.
            middle = [sum(map(math.log, values)) / len(values) for values in (x, y)]
            fit = [math.exp(middle[1] + exponent * (math.log(end) - middle[0])) / scale for end in (x[0], x[-1])]
            axes.plot((x[0], x[-1]), fit, color=style["color"], linestyle=(0, (1, 2)), linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(True)
    _plain_ticks(axes, "x", sorted({x for row in rows for x, _ in _points(row)}))
    low, high = axes.get_ylim()
    _plain_ticks(axes, "y", _decades((1, 2, 5) if high / low < 200 else (1,)))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), handlelength=3.2)


def _stages(rows: Sequence[Row]) -> Plot | None:
    """Bars: the time of each stage, and its arithmetic beside what the machine can do."""
    rows = [row for row in rows if number(row["seconds"]) is not None]
    if not rows:
        return None
    names = [row["stage"] for row in rows]
    rates = [_share_of_peak(row) for row in rows]
    title = f"{title_of(rows[0]['case'])}, {label(rows[0])}, stage by stage"
    alt = (
        f"Milliseconds of each of {len(rows)} stages, and their arithmetic as a share of the machine's measured peak. "
        "The table below holds the figures."
    )

    def draw(figure: Figure) -> None:
        times, shares = figure.subplots(1, 2, sharey=True)
        whole = [name == WHOLE for name in names]
        total = sum(row["seconds"] for row in rows if row["stage"] != WHOLE)
        seconds = [row["seconds"] for row in rows]
        texts = [
            f"{1e3 * s:.1f}" + ("" if w or total <= 0 else f" ({s / total:.0%})")
            for s, w in zip(seconds, whole, strict=True)
        ]
        _bars(times, [1e3 * s for s in seconds], texts, whole, None)
        times.set_yticks(range(len(names)), [_shortened(name) for name in names])
        times.set_ylim(len(names) - 0.4, -0.6)
        times.set_xlabel("time, ms (share of all stages)")
        shares.set_visible(any(rates))
        peak = next((row["peak_gflops"] for row in rows if number(row["peak_gflops"])), None)
        texts = ["" if r is None else f"{r:.0%}" for r in rates]
        _bars(shares, rates, texts, whole, _LONGEST_BAR)
        shares.axvline(1, color="#000000", linewidth=1)
        shares.set_xlabel("share of the measured peak" + (f", {peak:.0f} GFLOP/s" if peak else ""))
        shares.xaxis.set_major_formatter(lambda value, position: f"{value:.0%}")

    return Plot("stages", title, alt, 0.9 + 0.25 * len(rows), draw)


def _shortened(stages: str) -> str:
    first, *_, last = stages.split(" + ") * 2
    return stages if len(stages) <= _LONGEST_NAME else f"{first} + … + {last}"


def _share_of_peak(row: Row) -> float | None:
    gflop, peak, seconds = (number(row[name]) for name in ("gflop", "peak_gflops", "seconds"))
    return gflop / seconds / peak if gflop and peak and seconds else None


def _bars(
    axes: Axes, lengths: Sequence[float | None], texts: Sequence[str], whole: Sequence[bool], end: float | None
) -> None:
    """Bars with their figures; one that is longer than `end` is cut there, and its figure says so."""
    longest = max((length for length in lengths if length), default=1.0)
    limit = longest if end is None else min(end, max(1.0, longest))
    for place, (length, text, hatched) in enumerate(zip(lengths, texts, whole, strict=True)):
        if length is None:
            continue
        shown = min(length, limit)
        look = {"color": "white", "hatch": "////"} if hatched else {"color": "#56B4E9"}
        axes.barh(place, shown, height=0.68, edgecolor="#0072B2", linewidth=0.7, **look)
        cut = " →" if length > limit else ""
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        place_of_text = {"xytext": (3, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(text + cut, (max(shown, 0), place), fontsize=8.5, bbox=box, zorder=3, **place_of_text)
    axes.set_xlim(0, 1.3 * limit)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def _layers(rows: Sequence[Row], look: Look) -> Plot | None:
    """Lines: the error of each layer, relative to the layer's largest value."""
    errors = [row for row in rows if (number(row["error"]) or 0) > 0]
    if not errors:
        return None
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    allowed = {row["layer"]: row["allowed"] for row in rows if number(row["allowed"])}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        if allowed:
            places = [layers.index(layer) for layer in allowed]
            axes.plot(places, list(allowed.values()), color="#555555", linestyle=(0, (1, 1.5)), label="allowed")
        for own in split(errors, "provider"):
            places = [layers.index(row["layer"]) for row in own]
            axes.plot(
                places,
                [row["error"] for row in own],
                label=label(own[0]),
                **look.of(own[0]["provider"], own[0]["dtype"]),
            )
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        _plain_ticks(axes, "y", _decades((1, 2, 3, 5) if high / low < 50 else (1,)), "{:.0e}".format)
        axes.set_ylabel("max |x - truth| / max |truth| (log scale)")
        axes.set_xticks(range(len(layers)), layers, rotation=40, ha="right", rotation_mode="anchor")
        axes.grid(True)
        figure.legend(loc="outside upper left", ncols=5)

    names = ", ".join(dict.fromkeys(label(row) for row in errors))
    alt = (
        f"The largest error of {names} at each of {len(layers)} layers against float64, relative to the layer's "
        "largest value, on a logarithmic axis. The table below holds the figures."
    )
    return Plot("layers", f"{title_of(rows[0]['case'])} in {rows[0]['dtype']}: error by layer", alt, 3.9, draw)
