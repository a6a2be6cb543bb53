"""Figures of the experiments, drawn from numbers alone."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from dst_optax.atomic import atomic_file


def blank(rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 4.2)) -> Any:
    """An empty figure.

    Args:
      rows: of panels.
      columns: of panels.
      size: of one panel, in inches.

    Returns:
      The matplotlib figure; its panels are ``figure.axes``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.subplots(rows, columns)
    return figure


def save(figure: Any, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def scores(rows: Sequence[Mapping[str, Any]], title: str) -> Any:
    """Score against free parameters, of the runs of one command.

    Args:
      rows: with ``method``, ``score`` and ``free_params``.
      title: of the figure.

    Returns:
      The figure. Methods without free parameters, the majority class and the seed model, are lines; runs of
      one method with several random seeds are a point with its spread.
    """
    figure = blank(size=(6.4, 4.0))
    (axes,) = figure.axes
    styles = cycle(("dotted", "dashed", "dashdot"))
    for method in dict.fromkeys(row["method"] for row in rows):
        same = [row["score"] for row in rows if row["method"] == method]
        mean, free = float(np.mean(same)), _mean(rows, method, "free_params")
        if free == 0:
            axes.axhline(mean, linestyle=next(styles), color="gray", label=method)
            continue
        spread = float(np.std(same, ddof=1)) if len(same) > 1 else 0.0
        axes.errorbar(free, mean, yerr=spread, fmt="o", capsize=3, label=method)
    axes.set(xscale="log", xlabel="free parameters", ylabel="score", title=title, ylim=(0, 102))
    axes.legend(frameon=False)
    return figure


def score_vs_budget(
    summary: Sequence[Mapping[str, Any]], task: str, ranges: Mapping[str, tuple[float, float]]
) -> Any:
    """Score against free parameters: a line with a band of one standard deviation for each method.

    Args:
      summary: of :func:`~dst_optax.finetuning.experiments.summary.summarise`.
      task: whose rows are drawn.
      ranges: of :func:`~dst_optax.finetuning.experiments.summary.operational_ranges`.

    Returns:
      The figure; methods without a budget (baselines, full fine-tuning) are horizontal lines. Bars below
      are the ranges.
    """
    figure = blank(2, 1, (6.4, 3.2))
    axes, bars = figure.axes
    axes.get_gridspec().set_height_ratios((4, 1))
    bars.sharex(axes)
    rows = [s for s in summary if s["task"] == task]
    styles = cycle(("dotted", "dashed", "dashdot", "solid"))
    for method in dict.fromkeys(s["method"] for s in rows):
        same = sorted((s for s in rows if s["method"] == method), key=lambda s: s["free_params"])
        mean, std = (np.array([s[name] for s in same]) for name in ("mean", "std"))
        if same[0]["budget"] is None:
            axes.axhline(mean[0], color="gray", linestyle=next(styles), label=method)
            continue
        free = [s["free_params"] for s in same]
        (line,) = axes.plot(free, mean, marker="o", label=method)
        axes.fill_between(free, mean - std, mean + std, alpha=0.15, color=line.get_color(), linewidth=0)
        if method in ranges:
            bars.plot(ranges[method], [method, method], marker="|", linewidth=4, color=line.get_color())
    axes.set(xscale="log", ylabel="score", title=task, ylim=(0, 102))
    axes.legend(frameon=False, fontsize="x-small", ncols=2, loc="lower right")
    bars.set(xlabel="free parameters", title="where a method works")
    bars.tick_params(axis="y", labelsize="x-small")
    bars.margins(y=0.3)
    return figure


def convergence(results: Mapping[str, Any]) -> Any:
    """Four panels of how subsets settle.

    Args:
      results: of :func:`~dst_optax.finetuning.experiments.subset_convergence.subset_convergence`.

    Returns:
      The figure: churn, thresholds, overlap with the last and the previous snapshot, overlap of seeds.
    """
    figure = blank(2, 2, (5.2, 3.4))
    churn, thresholds, itself, seeds = figure.axes
    for i, (name, run) in enumerate(results["rng"].items()):
        if series := run["logged"].get("churn"):
            churn.plot(*zip(*series, strict=True), color=f"C{i}", label=name)
        for style, kind in (("-", "median"), (":", "min"), (":", "max")):
            if series := run["logged"].get(f"threshold_{kind}"):
                label = name if kind == "median" else "_"
                thresholds.plot(*zip(*series, strict=True), style, color=f"C{i}", label=label)
        itself.plot(*_series(run["overlap_final"]), label=f"{name}, with the last")
        itself.plot(*_series(run["overlap_previous"]), "--", label=f"{name}, with the one before")
    if results["overlap_seeds"]:
        seeds.plot(*_series(results["overlap_seeds"]), marker="o", label="mean of pairs")
    churn.set(title="churn of a step", ylabel="share", ylim=(0, None))
    thresholds.set(title="thresholds: median, least and most", ylabel="distance")
    itself.set(title="snapshots of a run", ylabel="Jaccard index", ylim=(0, 1.02))
    seeds.set(title="random seeds", ylabel="Jaccard index", ylim=(0, 1.02))
    for axes in figure.axes:
        axes.set_xlabel("step")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize="x-small")
    return figure


def _series(by_step: Mapping[int, float]) -> tuple[list[int], list[float]]:
    steps = sorted(by_step)
    return steps, [by_step[step] for step in steps]


def places(by_step: Mapping[int, Mapping[str, Mapping[str, float]]]) -> Any:
    """Maps of the share of free entries: modules by layers, one panel a step.

    Args:
      by_step: step to module to layer to share.

    Returns:
      The figure.
    """
    from matplotlib import colors

    figure = blank(1, len(by_step), (3.6, 4.2))
    modules = list(dict.fromkeys(m for by_module in by_step.values() for m in by_module))
    every = {x for by_module in by_step.values() for module in by_module.values() for x in module}
    layers = sorted(every, key=lambda x: (x.split()[0] == "decoder", int(x.split()[1])))
    maps = [
        np.array([[by_module[m].get(x, np.nan) for x in layers] for m in modules])
        for by_module in by_step.values()
    ]
    norm = colors.Normalize(0, max(float(np.nanmax(x)) for x in maps))
    panels = list(figure.axes)
    for axes, step, shares in zip(panels, by_step, maps, strict=True):
        image = axes.imshow(shares, aspect="auto", norm=norm)
        axes.set_title(f"step {step}")
        axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize="x-small")
        axes.set_yticks(range(len(modules)), modules if axes is panels[0] else [], fontsize="x-small")
        if axes is panels[-1]:
            figure.colorbar(image, ax=panels, label="share of free entries")
    return figure


def regularisation(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The gap between training and other examples, and the score on others, against free parameters.

    Args:
      rows: of :func:`~dst_optax.finetuning.experiments.regularisation.regularisation`.

    Returns:
      The figure: two panels, a line for each number of training examples.
    """
    figure = blank(1, 2, (5.2, 3.8))
    for axes, name, label in zip(figure.axes, ("gap", "score"), ("gap", "score on others"), strict=True):
        for size in dict.fromkeys(r["examples"] for r in rows):
            same = [r for r in rows if r["examples"] == size]
            methods = dict.fromkeys(r["method"] for r in same)
            points = sorted(
                (_mean(same, method, "free_params"), _mean(same, method, name)) for method in methods
            )
            axes.plot(*zip(*points, strict=True), marker="o", label=f"{size} examples")
        axes.set(xscale="log", xlabel="free parameters", ylabel=label)
        axes.legend(frameon=False, fontsize="small")
    return figure


def _mean(rows: Sequence[Mapping[str, Any]], method: str, name: str) -> float:
    return float(np.mean([r[name] for r in rows if r["method"] == method]))


def latency(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Milliseconds of a request against free parameters, one panel a model.

    Args:
      rows: of :func:`~dst_optax.finetuning.experiments.serving_latency.serving_latency`.

    Returns:
      The figure: lines for subsets and LoRA, horizontal ones for whole checkpoints and for no switch.
    """
    models = list(dict.fromkeys(r["model"] for r in rows))
    figure = blank(1, len(models), (4.6, 3.8))
    for axes, model in zip(figure.axes, models, strict=True):
        same = [r for r in rows if r["model"] == model]
        for way in ("subset", "lora"):
            points = sorted((r["entries"], r["request"]["p50"]) for r in same if r["way"] == way)
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=way)
        for way, style in (("full", "dashed"), ("none", "dotted")):
            for r in same:
                if r["way"] == way:
                    axes.axhline(r["request"]["p50"], color="gray", linestyle=style, label=way)
        axes.set(xscale="log", yscale="log", xlabel="free parameters", ylabel="ms a request", title=model)
        axes.legend(fontsize="small", framealpha=1.0)
    return figure
