"""``dst-optax subset ...``: look into subset files, compare, apply, extract, compose and verify them."""

import contextlib
import enum
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dst_optax.paths import as_path
from dst_optax.subset import Subset, SubsetError, compose, files, from_models, models, peft, tied

app = typer.Typer(
    help="Look into subset files, compare, apply, extract, compose and verify them.",
    no_args_is_help=True,
    add_completion=False,
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
PLACE: dict[str, Any] = {"parser": as_path, "metavar": "PATH"}  # local, or gs://...
Directory = Annotated[pathlib.Path, typer.Argument(help="Directory of a subset.", **PLACE)]
Out = Annotated[pathlib.Path, typer.Option(help="Directory to write.", **PLACE)]
Seed = Annotated[
    pathlib.Path, typer.Option(help="Safetensors file or directory, or a T5X or Orbax checkpoint.", **PLACE)
]


class Coordinates(enum.StrEnum):
    """Whose names and layouts a subset has."""

    HF = "hf"
    JAX = "jax"


class OnConflict(enum.StrEnum):
    """What to do where subsets have different values."""

    ERROR = "error"
    FIRST = "first"
    LAST = "last"
    MEAN = "mean"


def run(command: Callable[[], dict[str, Any]], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    """Prints a command's result; an error goes to standard error, with exit code 1."""
    try:
        result = command()
    except (ValueError, TypeError, OSError) as e:
        if as_json:
            print(json.dumps({"error": str(e)}))
        else:
            Console(stderr=True).print(f"error: {e}", style="red", markup=False)
        raise typer.Exit(1) from e
    if as_json:
        print(json.dumps(result))
    else:
        show(result)


def table(columns: list[str], rows: list[list[Any]], title: str | None = None) -> None:
    """Prints a table whose first column is text and whose others are right-aligned."""
    grid = Table(title=title and Text(title))
    grid.add_column(columns[0], overflow="fold")  # names of one layer begin alike
    for column in columns[1:]:
        grid.add_column(column, justify="right")
    for row in rows:
        grid.add_row(*(Text(f"{x:.4g}" if isinstance(x, float) else str(x)) for x in row))
    Console().print(grid)


@app.command()
def inspect(directory: Directory, as_json: Json = False) -> None:
    """What a subset holds: a row for each tensor, and a histogram of its values' magnitudes."""

    def command() -> dict[str, Any]:
        loaded, stored = Subset.load(directory), files.stored_bytes(directory)
        rows = []
        for path, e in loaded.items():
            positions = stored.get(f"{path}.positions", 0)
            rows.append(
                {
                    "tensor": path,
                    "entries": len(e),
                    "share": len(e) / e.size if e.size else 0.0,
                    "dtype": e.dtype.name,
                    "bytes": sum(stored.get(f"{path}.{kind}", 0) for kind in files.KINDS),
                    "bits_per_position": 8 * positions / len(e) if len(e) else 0.0,
                }
            )
        total = {"entries": loaded.count, "parameters": loaded.size, "seed_values": loaded.has_seed_values}
        return {"leaves": rows, **total, "magnitudes": _magnitudes(loaded), "metadata": loaded.metadata}

    def show(result: dict[str, Any]) -> None:
        rows = result["leaves"]
        table(list(rows[0]) if rows else ["tensor"], [list(r.values()) for r in rows], str(directory))
        magnitudes = result["magnitudes"]
        counts = {f"1e{k:+d}": n for k, n in zip(magnitudes["decades"], magnitudes["counts"], strict=True)}
        others = {"0": magnitudes["zero"], "inf or NaN": magnitudes["nonfinite"]}
        counts |= {name: n for name, n in others.items() if n}
        kind = "change from the seed" if result["seed_values"] else "value"
        bars = [[name, n, "#" * round(40 * n / max(counts.values()))] for name, n in counts.items()]
        table([f"magnitude of the {kind}", "entries", ""], bars)

    run(command, as_json, show)


def _magnitudes(subset: Subset) -> dict[str, Any]:
    """Entries by decade of their change, or of their value where no seed values are stored."""
    counts: dict[int, int] = {}
    zero = nonfinite = 0
    for e in subset.values():
        x = e.values.astype(np.float64)
        if subset.has_seed_values and e.seed_values is not None:
            with np.errstate(invalid="ignore"):
                x = x - e.seed_values.astype(np.float64)
        finite = np.isfinite(x)
        zero += int(np.count_nonzero(x == 0))
        nonfinite += int(np.count_nonzero(~finite))
        x = np.abs(x[finite & (x != 0)])
        decades, number = np.unique(np.floor(np.log10(x)).astype(int), return_counts=True)
        for d, n in zip(decades.tolist(), number.tolist(), strict=True):
            counts[d] = counts.get(d, 0) + n
    ordered = sorted(counts)
    of_decades = {"decades": ordered, "counts": [counts[d] for d in ordered]}
    return {**of_decades, "zero": zero, "nonfinite": nonfinite}


@app.command()
def diff(a: Directory, b: Directory, as_json: Json = False) -> None:
    """How two subsets of one seed overlap."""

    def command() -> dict[str, Any]:
        first, second = Subset.load(a), Subset.load(b)
        with _counted([a, b]):
            both, joined = first.intersection(second), compose([first, second], "first")
        collisions = joined.metadata["collisions"]
        rows = [
            {
                "tensor": path,
                "both": len(both[path]),
                "only_a": len(e) - len(both[path]),
                "only_b": len(second[path]) - len(both[path]),
                "different_values": collisions.get(path, 0),
            }
            for path, e in first.items()
        ]
        same = not sum(collisions.values()) and both.count == first.count == second.count
        return {"leaves": rows, "jaccard": first.jaccard(second), "identical": same}

    def show(result: dict[str, Any]) -> None:
        rows = result["leaves"]
        title = f"jaccard {result['jaccard']:.4f}, {'identical' if result['identical'] else 'different'}"
        table(list(rows[0]) if rows else ["tensor"], [list(r.values()) for r in rows], title)

    run(command, as_json, show)


@contextlib.contextmanager
def _counted(directories: Sequence[pathlib.Path]) -> Iterator[None]:
    """Says in errors which directories the subsets are of that the library counts."""
    try:
        yield
    except SubsetError as e:
        names = ", ".join(f"subset {i}: {directory}" for i, directory in enumerate(directories, 1))
        raise SubsetError(f"{e} ({names})") from e


@app.command()
def apply(
    seed: Seed,
    subset: Annotated[pathlib.Path, typer.Option(help="Directory of the subset.", **PLACE)],
    out: Out,
    as_json: Json = False,
) -> None:
    """Write the tuned model as safetensors, tensor by tensor."""

    def command() -> dict[str, Any]:
        loaded = Subset.load(subset)
        left_out = models.apply_to_files(loaded, seed, out)
        return {"out": str(out), "entries": loaded.count, "left_out": left_out}

    def show(result: dict[str, Any]) -> None:
        print(f"{result['entries']} entries applied; written to {result['out']}")
        if result["left_out"]:
            print(f"left out, as they hold weights of the seed: {', '.join(result['left_out'])}")

    run(command, as_json, show)


@app.command()
def extract(
    seed: Seed,
    tuned: Annotated[
        pathlib.Path, typer.Option(help="The fine-tuned model, same kinds as the seed.", **PLACE)
    ],
    out: Out,
    fraction: Annotated[float | None, typer.Option(help="Keep the largest changes only.")] = None,
    with_seed_values: Annotated[bool, typer.Option(help="Store the seed's values too.")] = False,
    as_json: Json = False,
) -> None:
    """Make a subset out of two models."""

    def command() -> dict[str, Any]:
        before, after = models.open_model(seed), models.open_model(tuned)
        before, after = tied.without_copies(before, after), tied.without_copies(after, before)
        metadata = {"seed": seed.name, "tuned": tuned.name, "fraction_of_free_params": fraction}
        extracted = from_models(before, after, fraction, with_seed_values=with_seed_values, metadata=metadata)
        extracted.save(out)
        return {"out": str(out), "entries": extracted.count, "parameters": extracted.size}

    run(command, as_json, _wrote)


@app.command()
def convert(
    directory: Directory,
    to: Annotated[
        Coordinates, typer.Option(help="hf for Hugging Face's names and layouts, jax for those of training.")
    ],
    seed: Annotated[
        pathlib.Path, typer.Option(help="Hugging Face directory of the seed, with config.json.", **PLACE)
    ],
    out: Out,
    stacked: Annotated[
        bool, typer.Option(help="With --to jax: layers are stacked, as scan_layers has them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a subset in other coordinates, for another engine."""
    if stacked and to is Coordinates.HF:
        raise typer.BadParameter("--stacked is for --to jax: checkpoints of Hugging Face stack no layers.")
    from dst_optax.finetuning.models import huggingface

    def command() -> dict[str, Any]:
        loaded, model = Subset.load(directory), models.open_model(seed)
        if to is Coordinates.HF:
            table = huggingface.tensors_of(seed, stacked=huggingface.is_stacked(loaded, seed))
            converted = loaded.to_hf(table, model)
        else:
            converted = loaded.from_hf(huggingface.tensors_of(seed, stacked=stacked), model)
        converted.save(out)
        return {"out": str(out), "entries": converted.count, "parameters": converted.size}

    run(command, as_json, _wrote)


@app.command("compose")
def compose_(
    subsets: Annotated[
        list[pathlib.Path], typer.Argument(help="Directories of subsets of one seed.", **PLACE)
    ],
    out: Out,
    on_conflict: Annotated[
        OnConflict, typer.Option(help="Where values differ: refuse, or take one of them or their mean.")
    ] = OnConflict.ERROR,
    as_json: Json = False,
) -> None:
    """One subset out of several."""

    def command() -> dict[str, Any]:
        loaded = [Subset.load(d) for d in subsets]
        with _counted(subsets):
            composed = compose(loaded, on_conflict)
        composed.save(out)
        totals = {"entries": composed.count, "parameters": composed.size}
        return {"out": str(out), **totals, "collisions": composed.metadata["collisions"]}

    run(command, as_json, _wrote)


def _wrote(result: dict[str, Any]) -> None:
    print(f"{result['entries']} of {result['parameters']} entries; written to {result['out']}")
    if result.get("collisions"):
        table(["tensor", "collisions"], [list(item) for item in result["collisions"].items()])


@app.command()
def export_peft(
    directory: Directory,
    out: Out,
    base_model: Annotated[str | None, typer.Option(help="Name or path of the seed for the adapter.")] = None,
    not_linear: Annotated[
        str, typer.Option(help="Regex of matrices that belong to no linear layer.")
    ] = peft.NOT_LINEAR,
    as_json: Json = False,
) -> None:
    """Write a SHiRA adapter for PEFT; the subset needs seed values, and entries in linear layers only."""

    def command() -> dict[str, Any]:
        loaded = Subset.load(directory)
        peft.save_shira(loaded, out, base_model, not_linear)
        return {"out": str(out), "entries": loaded.count, "parameters": loaded.size}

    run(command, as_json, _wrote)


@app.command()
def verify(
    directory: Directory,
    seed: Annotated[pathlib.Path | None, typer.Option(help="Compare its fingerprints too.", **PLACE)] = None,
    as_json: Json = False,
) -> None:
    """Check a subset's files, and that a seed is the one it was made for."""

    def command() -> dict[str, Any]:
        loaded = Subset.load(directory)
        if seed is not None:
            model = models.open_model(seed, loaded)
            loaded = tied.for_model(loaded, model)
            loaded.check(model)
        unknown = sum(e.seed_fingerprint is None for e in loaded.values())
        checked = 0 if seed is None else len(loaded) - unknown
        if seed is not None and not checked:
            raise SubsetError(
                f"{directory} knows no fingerprint of its seed, so nothing of {seed} was compared: extract "
                "it again from its two models."
            )
        counts = {"entries": loaded.count, "tensors": len(loaded), "tensors_compared": checked}
        return {**counts, "format_version": files.VERSION}

    def show(result: dict[str, Any]) -> None:
        compared = result["tensors_compared"]
        others = result["tensors"] - compared
        print(
            "the files are whole"
            + (f"; {compared} tensors of the seed agree" if compared else "; no seed was compared")
            + (f", {others} without a fingerprint were not compared" if compared and others else "")
        )

    run(command, as_json, show)
