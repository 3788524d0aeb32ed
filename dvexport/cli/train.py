"""`dvexport train`: train a model by a recipe."""

from __future__ import annotations

from pathlib import Path

import click

from dvexport.cli.options import path_option

__all__ = ["train"]


@click.command()
@click.argument("recipe")
@path_option("-o", "--output", help="Folder for weights, curves and the state.", required=True)
@click.option("--resume/--restart", default=True, show_default=True, help="Go on with what OUTPUT has, or begin anew.")
@click.option("--device", help="cpu or cuda.  [default: cuda where there is one]")
@click.option("--epochs", type=click.IntRange(1, 100_000), help="In place of the recipe's.")
def train(recipe: str, output: Path, resume: bool, device: str | None, epochs: int | None) -> None:
    """Train a model by a recipe.

    RECIPE is the name of a shipped one or a .toml file. A killed training goes on where it was.
    """
    from dvexport.models.training.train import train as run_training

    run_training(recipe, output=output, resume=resume, device=device, epochs=epochs, progress=click.echo)
