"""Training recipes: TOML files that say what to train on what, and how."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvexport.errors import UsageError
from dvexport.files import read_text
from dvexport.models.settings import parse_settings

__all__ = [
    "RECIPES",
    "DataOptions",
    "GateOptions",
    "OptimiserOptions",
    "Recipe",
    "TransformerOptions",
    "load_recipe",
    "recipe_names",
]

RECIPES = Path(__file__).parents[1] / "recipes"
"""Where the shipped recipes lie, one `NAME.toml` each."""


@dataclass(frozen=True)
class DataOptions:
    """The data set of a recipe.

    Attributes:
        name: `motion` is the only one (`dvexport.models.training.motion`).
        size: height and width of the frames.
        frames: frames in a clip.
        frame_rate: frames per second that a stream of the trained model expects.
        seed: the seed of the data set.
        clips_per_epoch: new clips in each epoch.
        validation_clips: how many of the validation split are scored after each epoch.
        mirrored: train on each clip's eight mirror images in time, height and width, with the classes
            they then show (`motion.mirror_images`); a step then renders an eighth of `batch`, and an
            epoch an eighth of `clips_per_epoch`.
    """

    name: str = "motion"
    size: int = 160
    frames: int = 8
    frame_rate: float = 4.0
    seed: int = 0
    clips_per_epoch: int = 24576
    validation_clips: int = 384
    mirrored: bool = False


@dataclass(frozen=True)
class OptimiserOptions:
    """AdamW with a linear warm-up and a cosine decay to zero, over the whole training or at its end.

    Attributes:
        epochs: length of the training.
        batch: clips in a step.
        learning_rate: at its highest.
        warmup_epochs: how long the learning rate warms up.
        weight_decay: the decay of weights with two or more axes.
        clip_norm: the gradient's norm is cut to this.
        decay_epochs: the learning rate stays at its highest until so many epochs before the end; 0 to decay
            from the beginning. Until then an epoch does not depend on how many there are.
        half: multiply in bfloat16 on a CPU too, where a GPU always does; half the time on a CPU with AMX.
    """

    epochs: int
    batch: int = 128
    learning_rate: float = 2e-3
    warmup_epochs: float = 1.0
    weight_decay: float = 0.02
    clip_norm: float = 5.0
    decay_epochs: float = 0.0
    half: bool = False


@dataclass(frozen=True)
class GateOptions:
    """The losses on the gates, see `dvexport.models.training.losses`.

    Attributes:
        target: D, the share of the gated blocks' cost that may be executed.
        warmup_epochs: K, the epochs without sparsity loss.
        alpha, beta: the constants of lambda(e) = alpha exp(beta e).
        gamma: weight of the bound loss.
        density: the density of the tile masks at first.
        floor, ceiling: the bounds on the density in the end.
        relax_epochs: how long the bounds take to relax; 0 for relaxed ones from the beginning.
        spread: standard deviation of the policies' first biases, which gives channels different
            roles to begin with (the official zeros make every action equally likely).
        noise_until: the epoch at which the Gumbel noise has faded to zero, linearly from epoch 0;
            0 for none at all.
    """

    target: float
    warmup_epochs: float
    alpha: float
    beta: float
    relax_epochs: float
    noise_until: float
    gamma: float = 1.0
    density: float = 0.7
    floor: float = 0.0
    ceiling: float = 1.0
    spread: float = 1.0


@dataclass(frozen=True)
class TransformerOptions:
    """What shortens the training of a video transformer, see `dvexport.models.training.motion_hints`.

    Attributes:
        embedding_clips: the embedding begins whitened by this many clips; 0 for a random one.
        gain: a factor on the first linear weights in the blocks.
        hints: weight of the loss on what tokens tell of the object.
        still_epochs: the camera stands still for so long, and starts to move within as many more.
    """

    embedding_clips: int = 0
    gain: float = 1.0
    hints: float = 0.0
    still_epochs: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Attributes:
        name: names the weights that come out.
        model: name in the zoo.
        seed: the seed of weights, gates and dropout.
        start_from: weights to begin with in place of random ones: a safetensors file, or the name of
            a training whose weights lie in the output folder, or of a model that ships.
        settings: the model's options; classes, frames and size follow from the data.
        data, optimiser: see there.
        gates: None for a model without gates.
        transformer: None for a model that is none, or to train one without help.
    """

    name: str
    model: str
    optimiser: OptimiserOptions
    data: DataOptions = field(default_factory=DataOptions)
    gates: GateOptions | None = None
    transformer: TransformerOptions | None = None
    seed: int = 0
    start_from: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as they stand in JSON; choices that came later only where they are made."""
        values = dataclasses.asdict(self)
        # Recipes from before there were these choices stay what they were.
        if not self.data.mirrored:
            del values["data"]["mirrored"]
        for later in ("decay_epochs", "half"):
            if not values["optimiser"][later]:
                del values["optimiser"][later]
        if self.transformer is None:
            del values["transformer"]
        return values

    @property
    def digest(self) -> str:
        """Tells recipes apart: a checkpoint goes on only under the recipe that began it."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def with_epochs(self, epochs: int) -> Recipe:
        """Return this recipe for another number of epochs; UsageError if that is below 1."""
        if epochs < 1:
            raise UsageError(f"a training of {epochs} epochs", hint="at least 1")
        return dataclasses.replace(self, optimiser=dataclasses.replace(self.optimiser, epochs=epochs))


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_recipe(recipe: str | Path) -> Recipe:
    """Read a recipe: the name of a shipped one, or a TOML file.

    Raises:
        UsageError: no such recipe, not TOML, a missing or unknown key, a value that does not fit.
    """
    path = RECIPES / f"{recipe}.toml" if str(recipe) in recipe_names() else Path(recipe)
    try:
        values = tomllib.loads(read_text(path))
    except FileNotFoundError:
        raise UsageError(f"no recipe '{recipe}'", hint=f"a TOML file, or one of: {', '.join(recipe_names())}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError("the recipe can't be read", where=str(path), why=str(error)) from None
    try:
        return _parse(values)
    except UsageError as error:
        raise UsageError(error.what, where=str(path), why=error.why, hint=error.hint) from None


def _parse(values: dict[str, Any]) -> Recipe:
    tables = {"data": DataOptions, "optimiser": OptimiserOptions, "gates": GateOptions,
              "transformer": TransformerOptions}  # fmt: skip
    parsed: dict[str, Any] = {name: _options(name, tables[name], values[name]) for name in tables if name in values}
    settings = values.get("settings", {})
    if not isinstance(settings, dict):
        raise UsageError("[settings] is not a table", hint="write [settings] and options below it")
    plain = {k: v for k, v in values.items() if k not in tables and k != "settings"}
    recipe = _options("the recipe", Recipe, {**plain, **parsed}, settings=settings)
    _check(recipe)
    return recipe


def _options(table: str, kind: Any, values: Any, **ready: Any) -> Any:
    """Return `kind` made of `values`; UsageError names the key at fault."""
    if not isinstance(values, dict):
        raise UsageError(f"[{table}] is not a table", hint=f"write [{table}] and options below it")
    simple = {k: v for k, v in values.items() if not dataclasses.is_dataclass(v)}
    nested = {k: v for k, v in values.items() if dataclasses.is_dataclass(v)}
    try:
        options = {**parse_settings(kind, simple), **nested, **ready}
    except UsageError as error:
        raise UsageError(f"{table}: {error.what}", hint=error.hint) from None
    required = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in options]
    if missing:
        raise UsageError(f"{table}: '{missing[0]}' is missing", hint=f"required: {', '.join(required)}")
    return kind(**options)


def _check(recipe: Recipe) -> None:
    """Raise UsageError for a value out of range."""
    data, optimiser, gates = recipe.data, recipe.optimiser, recipe.gates
    rules = [
        (data.name == "motion", f"no data set '{data.name}'", 'name = "motion"'),
        (optimiser.epochs >= 1, f"epochs = {optimiser.epochs}", "at least 1"),
        (1 <= optimiser.batch <= data.clips_per_epoch, f"batch = {optimiser.batch}",
         f"from 1 to clips_per_epoch, {data.clips_per_epoch}"),
        (not data.mirrored or optimiser.batch % 8 == 0, f"batch = {optimiser.batch} of mirrored clips",
         "a multiple of 8: each clip has eight mirror images"),
        (optimiser.learning_rate > 0, f"learning_rate = {optimiser.learning_rate}", "above 0"),
        (0 <= optimiser.decay_epochs <= optimiser.epochs, f"decay_epochs = {optimiser.decay_epochs}",
         f"from 0 to epochs, {optimiser.epochs}"),
        (recipe.start_from != recipe.name, f"start_from = '{recipe.start_from}', its own name",
         "the name of another training, or a file"),
        (data.validation_clips >= 1, f"validation_clips = {data.validation_clips}", "at least 1"),
    ]  # fmt: skip
    if recipe.transformer is not None:
        helps = recipe.transformer
        rules += [
            (helps.gain > 0, f"gain = {helps.gain}", "above 0"),
            (min(helps.embedding_clips, helps.hints, helps.still_epochs) >= 0,
             f"embedding_clips = {helps.embedding_clips}, hints = {helps.hints}, still_epochs = {helps.still_epochs}",
             "0 or more"),
        ]  # fmt: skip
    if gates is not None:
        rules += [
            (0 < gates.target <= 1, f"target = {gates.target}", "above 0, at most 1"),
            (0 <= gates.floor <= gates.density <= gates.ceiling <= 1,
             f"floor {gates.floor}, density {gates.density}, ceiling {gates.ceiling}",
             "0 <= floor <= density <= ceiling <= 1"),
            (min(gates.relax_epochs, gates.noise_until) >= 0,
             f"relax_epochs = {gates.relax_epochs}, noise_until = {gates.noise_until}", "0 or more"),
        ]  # fmt: skip
    for holds, what, hint in rules:
        if not holds:
            raise UsageError(f"the recipe has {what}", hint=hint)
