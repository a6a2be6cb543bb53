"""Figures of a comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def plot_scores(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> Any:
    """Draws score against free parameters.

    Methods without free parameters, the majority class and the seed model, become lines; runs of one
    method with several seeds of randomness a point with its spread.

    Args:
      rows: with ``method``, ``score`` and ``free_params``.
      path: PNG to write.
      title: of the figure.

    Returns:
      The matplotlib figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    styles = iter(("dotted", "dashed", "dashdot"))
    for method in dict.fromkeys(row["method"] for row in rows):
        same = [row for row in rows if row["method"] == method]
        scores = [row["score"] for row in same]
        free = float(np.mean([row["free_params"] for row in same]))
        if free == 0:
            axes.axhline(float(np.mean(scores)), linestyle=next(styles), color="gray", label=method)
            continue
        spread = float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
        axes.errorbar(free, float(np.mean(scores)), yerr=spread, fmt="o", capsize=3, label=method)
    axes.set(xscale="log", xlabel="free parameters", ylabel="score", title=title, ylim=(0, 102))
    axes.legend(frameon=False)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary)
    temporary.replace(path)
    return figure
