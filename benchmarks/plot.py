"""The roofline plot of a run: arithmetic intensity against TFLOP/s, on the roofs that the run measured."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

MARKERS = "os^DvP"
OURS = "black"


def _intensity(r: dict) -> float:
    return r["operations"] / r["bytes"]


def _roofs(axes: Axes, head: dict, low: float, high: float) -> None:
    """Bandwidth up to each peak, then flat."""
    bandwidth = head["gb_s"] / 1e3  # TB/s, so that FLOP/byte × TB/s is TFLOP/s
    for kind, style in (("float", "-"), ("int8", "--")):
        peak = head["tflop_s"][kind]
        ridge = peak / bandwidth
        name = head["dtype"] if kind == "float" else kind
        xs = [low, min(max(ridge, low), high), high]
        axes.plot(xs, [min(bandwidth * x, peak) for x in xs], style, color="0.6", linewidth=1, zorder=1)
        axes.annotate(
            f"{name} {peak:.0f}" if peak >= 100 else f"{name} {peak:.2g}",
            (high, peak),
            xytext=(-2, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color="0.4",
            fontsize=8,
        )


def _points(axes: Axes, rows: list[dict], markers: dict[str, str], colours: dict[str, str]) -> None:
    for r in rows:
        x, marker = _intensity(r), markers[r["op"]]
        for name, us in r["peers_us"].items():
            y = r["operations"] / us / 1e6
            axes.plot(x, y, marker, markerfacecolor="none", markeredgecolor=colours[name], markersize=6, zorder=2)
        axes.plot(x, r["tflop_s"], marker, color=OURS, markersize=5, zorder=3)


def roofline(head: dict, rows: list[dict], path: Path) -> None:
    """Draws `rows` to `path`: ours filled, peers hollow, the op in the shape of the marker.

    A peer stands at the intensity of our op, right above or below it: the height compares them, and a peer that reads
    wider weights has a lower roof than the one drawn.
    """
    if not rows:
        raise ValueError("no rows to draw")
    markers = dict(zip(dict.fromkeys(r["op"] for r in rows), MARKERS))
    names = dict.fromkeys(name for r in rows for name in r["peers_us"])
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte (packed weights, x, y)", ylabel="TFLOP/s")
    intensities = [_intensity(r) for r in rows]
    _roofs(axes, head, min(intensities) / 1.5, max(intensities) * 1.5)
    _points(axes, rows, markers, colours)
    axes.set_title(f"{head['device']}, torch {head['torch']}, read bandwidth {head['gb_s']:.0f} GB/s", fontsize=10)
    axes.grid(True, which="major", color="0.9", linewidth=0.5)
    ours = [Line2D([], [], linestyle="", marker=m, color=OURS, label=op) for op, m in markers.items()]
    hollow = {"linestyle": "", "marker": "o", "markerfacecolor": "none"}
    others = [Line2D([], [], markeredgecolor=colours[name], label=name, **hollow) for name in names]
    axes.legend(handles=ours + others, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(f"wrote {path}")
