"""The ``dst-optax`` command; needs the extra ``cli``."""

import typer

from dst_optax.subset.cli import app as subset

app = typer.Typer(help="Dynamic Subset Tuning.", no_args_is_help=True, add_completion=False)


@app.callback()
def main() -> None:
    """Dynamic Subset Tuning."""


app.add_typer(subset, name="subset")
