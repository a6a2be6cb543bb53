#!/usr/bin/env python
"""Draws one step of Dynamic Subset Tuning: proposal, distances, silos, thresholds, projection.

python scripts/draw_method.py            # docs/images/method.svg and method_dark.svg; needs matplotlib
"""

import argparse
import pathlib

import matplotlib
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

SEED = {
    "silo 1: attention/query": np.array([0.5, -0.8, 0.9, 0.2, -0.4, 0.6, -0.9, 0.1, 0.7, -0.2]),
    "silo 2: mlp/wi": np.array([0.3, 0.8, -0.6, 0.9, -0.1, 0.4, -0.8, 0.6, -0.3, 0.2]),
}
MOVES = {
    "silo 1: attention/query": np.array([0.22, -0.26, 0.6, -0.2, 0.34, -0.9, 0.24, -0.3, 0.28, -0.75]),
    "silo 2: mlp/wi": np.array([-0.14, 0.17, 0.42, -0.21, 0.15, -0.18, -0.46, 0.14, 0.38, -0.16]),
}
KEPT = 3  # entries a silo
THEMES = {
    "method.svg": {"ink": "#24292f", "faint": "#8c959f", "moved": "#3f51b5", "threshold": "#d1570a"},
    "method_dark.svg": {"ink": "#e6edf3", "faint": "#7d8590", "moved": "#a5b1ff", "threshold": "#ffa657"},
}
COLUMNS = (
    "1  The optimizer proposes\nnew values for every entry",
    "2  How far is each from the seed?\nEvery silo has its own threshold",
    "3  Above it the proposal is kept;\nall else is the seed, bit for bit",
)


def proposal(axes: Axes, seed: np.ndarray, proposed: np.ndarray, ink: dict[str, str]) -> None:
    at = np.arange(len(seed))
    axes.scatter(at, seed, s=34, facecolors="none", edgecolors=ink["faint"], linewidths=1.4)
    for x, start, stop in zip(at, seed, proposed, strict=True):
        arrow = {"arrowstyle": "->", "color": ink["moved"], "lw": 1.4, "shrinkA": 3, "shrinkB": 0}
        axes.annotate("", (x, stop), (x, start), arrowprops=arrow)


def distances(axes: Axes, delta: np.ndarray, threshold: float, ink: dict[str, str]) -> None:
    kept = delta > threshold
    axes.bar(np.arange(len(delta)), delta, 0.55, color=np.where(kept, ink["moved"], ink["faint"]))
    axes.axhline(threshold, color=ink["threshold"], lw=1.6, ls=(0, (4, 2)))
    axes.text(-0.6, threshold + 0.03, "threshold", color=ink["threshold"])
    axes.set_ylim(0, 1.0)


def projection(
    axes: Axes, seed: np.ndarray, proposed: np.ndarray, kept: np.ndarray, ink: dict[str, str]
) -> None:
    at = np.arange(len(seed))
    axes.scatter(at, seed, s=34, facecolors="none", edgecolors=ink["faint"], linewidths=1.4)
    axes.scatter(at[kept], proposed[kept], s=40, color=ink["moved"])
    axes.vlines(at[kept], seed[kept], proposed[kept], color=ink["moved"], lw=1, ls=":")


def draw(ink: dict[str, str], file: pathlib.Path) -> None:
    plt.rcParams.update({"font.size": 10, "svg.hashsalt": "dst-optax", "text.color": ink["ink"]})
    figure, grid = plt.subplots(len(SEED), 3, figsize=(10, 4.4), layout="constrained")
    for row, (name, seed) in zip(grid, SEED.items(), strict=True):
        proposed = seed + MOVES[name]
        delta = np.abs(MOVES[name])
        threshold = np.sort(delta)[-KEPT - 1]
        proposal(row[0], seed, proposed, ink)
        distances(row[1], delta, threshold, ink)
        projection(row[2], seed, proposed, delta > threshold, ink)
        row[0].set_ylabel(name, color=ink["ink"])
        for axes in (row[0], row[2]):
            axes.set_ylim(-1.35, 1.65)
            axes.axhline(0, color=ink["faint"], lw=0.6, zorder=0)
    grid[0, 0].text(2.3, 0.85, "seed", color=ink["faint"], va="center")
    grid[0, 0].text(2.3, 1.4, "proposal", color=ink["moved"], va="center")
    for axes, title in zip(grid[0], COLUMNS, strict=True):
        axes.set_title(title, fontsize=11, color=ink["ink"], loc="left")
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], xlim=(-0.7, 9.7), facecolor="none")
        axes.spines[:].set_visible(False)
        axes.spines["bottom"].set(visible=True, color=ink["faint"])
    figure.savefig(file, transparent=True, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    images = pathlib.Path(__file__).parents[1] / "docs" / "images"
    parser.add_argument("--out", type=pathlib.Path, default=images, help="directory of the two files")
    out = parser.parse_args().out
    for name, ink in THEMES.items():
        draw(ink, out / name)


if __name__ == "__main__":
    main()
