"""Models that a factory of the user's returns."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dvexport.errors import DvexportError, UsageError

__all__ = ["model_of_factory"]


def model_of_factory(
    name: str, checkpoint: str | Path | None, settings: Mapping[str, Any], weights_key: str | None
) -> Any:
    """Return what `package.module:factory` of the user's gives; the working folder is searched too.

    Args:
        name: the factory.
        checkpoint: weights for the module that it returns, under its own names.
        settings: its arguments; strings are read as Python writes values, where they are any.
        weights_key: where the weights stand in the checkpoint, see `read_checkpoint`.

    Raises:
        UsageError: it can't be found, fails, takes other options, or returns no module.
        CheckpointError: weights that can't be read, or are those of another module.
    """
    from torch import nn

    from dvexport.models.described import Described

    module_name, _, attribute = name.partition(":")
    with _working_folder_first():
        try:
            factory = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UsageError(
                f"can't find the model factory '{name}'",
                why=str(error),
                hint="package.module:factory, importable from here or installed",
            ) from error
        except Exception as error:
            raise _broken_factory(name, error) from error
    options = {key: _literal(value) for key, value in settings.items()}
    _check_options(name, factory, options)
    try:
        model = factory(**options)
    except DvexportError:
        raise
    except Exception as error:
        raise _broken_factory(name, error) from error
    weights = model.unwrapped if isinstance(model, Described) else model
    if not isinstance(weights, nn.Module):
        raise UsageError(
            f"'{name}' returned a {type(model).__name__}, not a torch module", hint="see docs/adding-a-model.md"
        )
    if checkpoint is not None:
        from dvexport.models.checkpoints.checkpoint import read_checkpoint
        from dvexport.models.checkpoints.importers import load_weights

        load_weights(weights, read_checkpoint(checkpoint, weights_key).state, where=str(checkpoint))
    return model


def _check_options(name: str, factory: Any, options: Mapping[str, Any]) -> None:
    """Raise UsageError if it is no factory or takes no such options; one without a signature says so itself."""
    if not callable(factory):
        raise UsageError(
            f"'{name}' is no model factory",
            why=f"it is a {type(factory).__name__}, which can't be called",
            hint="name a function or class that returns the module",
        )
    with contextlib.suppress(ValueError):
        signature = inspect.signature(factory)
        try:
            signature.bind(**options)
        except TypeError as error:
            takes = f"{name.partition(':')[2]}{signature}"
            raise UsageError(f"the options don't fit the model factory '{name}'", where=takes, why=str(error)) from None


def _broken_factory(name: str, error: Exception) -> UsageError:
    """Return the error for a user's module or factory that raised, with the line that did."""
    last = error if isinstance(error, SyntaxError) else traceback.extract_tb(error.__traceback__)[-1]
    return UsageError(
        f"the model factory '{name}' failed",
        where=f"{last.filename}:{last.lineno}",
        why=f"{type(error).__name__}: {error}",
    )


def _literal(value: Any) -> Any:
    """Return the Python value that a string of `--set` writes, the string itself if it writes none."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return value


@contextlib.contextmanager
def _working_folder_first() -> Iterator[None]:
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
