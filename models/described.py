"""An ordinary torch module with what a bundle has to know of it, so that it can be exported like a `VideoModel`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dvexport.errors import DvexportError, TraceError, UsageError
from dvexport.models.base import VideoModel
from dvexport.ports import LOGITS, VIDEO, Output, check_names, named_outputs
from dvexport.video.preprocess import Preprocess

__all__ = ["Described", "Description", "Example", "described", "shapes_of"]

Example = Tensor | Sequence[Tensor] | Mapping[str, Tensor]

UNNAMED = "output"
"""What a result is called that comes alone and without a name."""

_FRAMES = 3  # frames of the example that names and shapes are read off: a size of 1 could be any axis
_OTHERS = (torch.int64, torch.int32, torch.bool)


class Described:
    """A module and what its bundle has to know of it; the attributes are those of `VideoModel`.

    Everything else is the module's own: its weights, `decisions()`, `token_groups` and so on.
    """

    import_report: Any = None

    def __init__(
        self,
        unwrapped: nn.Module,
        name: str,
        description: Description,
        outputs: Sequence[Output],
        shapes: Sequence[tuple[int, ...]],
        unnamed: bool = False,
    ) -> None:
        assert description.preprocess is not None
        self.unwrapped, self.name = unwrapped.eval(), name
        self._description = description
        self.preprocess: Preprocess = description.preprocess
        self.input_shapes = dict(description.inputs)
        self.causal, self.whole_clip = description.causal, description.whole_clip
        self._shapes, self._unnamed = shapes, unnamed
        self.declared_outputs = tuple(outputs)

    @property
    def labels(self) -> list[str]:
        """Names of the classes of its logits; none for a model that is no classifier."""
        return next((list(one.labels) for one in self.declared_outputs if one.kind == "logits"), [])

    def __call__(self, *inputs: Tensor) -> Any:
        """Return what the module gives."""
        return self.unwrapped(*inputs)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.__dict__["unwrapped"], name)
        if name != "without_pruning":
            return found
        return lambda: Described(found(), self.name, self._description, self.declared_outputs, self._shapes)

    def set_labels(self, labels: list[str]) -> None:
        """Name the classes; UsageError if there are more or fewer names than classes, or nothing has classes."""
        outputs = _labelled(self._as_classifier(), labels)
        for output, shape in zip(outputs, self._shapes, strict=True):
            output.check(shape)
        self.declared_outputs = outputs

    def _as_classifier(self) -> tuple[Output, ...]:
        """Return the outputs; one of a row of numbers a frame, of which nothing was said, is logits."""
        return (Output(LOGITS, "logits"),) if self._unnamed and len(self._shapes[0]) == 2 else self.declared_outputs

    def eval(self) -> Described:
        """Put the module in evaluation mode."""
        self.unwrapped.eval()
        return self


@dataclass(frozen=True)
class Description:
    """What nothing in a module tells.

    Attributes:
        inputs: shape of one frame of every input, by the names of forward's parameters, in their order; the first is
            the video, `(3, height, width)`.
        preprocess: how the video's frames are made.
        outputs: what forward gives and what it means, in order; a tuple needs all, a dict or NamedTuple has its own
            names, and what is not declared there is an `array`.
        labels: the class names of the one output that has classes.
        causal: False if a frame's result depends on later frames.
        whole_clip: forward reads exactly `preprocess.frames` frames as one clip and gives one row.
        fallback: a model that describes itself is no error, and needs none of this.
    """

    inputs: Mapping[str, tuple[int, ...]]
    preprocess: Preprocess | None = None
    outputs: Sequence[Output] = ()
    labels: Sequence[str] = ()
    causal: bool = True
    whole_clip: bool = False
    fallback: bool = False

    def around(self, module: nn.Module, name: str) -> Described:
        """Return the module with its description, which a run on zeros completes.

        Raises:
            UsageError: the description does not fit the module's forward, or does not say enough.
            TraceError: forward fails, or gives what no bundle can hold.
        """
        shapes = self._named(module)
        check_names(shapes, [output.name for output in self.outputs])
        told = replace(self, inputs=shapes, causal=self.causal and not self.whole_clip)
        self._check_video(next(iter(shapes)), shapes)
        given, unnamed = told._run(module)
        outputs = self._outputs(given)
        check_names(shapes, [output.name for output in outputs])
        for output in outputs:
            output.check([*given[output.name].shape])
        return Described(module, name, told, outputs, [tuple(given[one.name].shape) for one in outputs], unnamed)

    def _named(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """Return the shapes by the names of forward's parameters; numbers as names stand for places."""
        where = f"{type(module).__name__}.forward"
        names: list[str] = []
        needed = 0
        for parameter in inspect.signature(module.forward).parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise UsageError(
                    f"forward takes {'*' if parameter.kind == parameter.VAR_POSITIONAL else '**'}{parameter.name}",
                    where=where,
                    why="the inputs of a bundle have the names of its parameters",
                    hint="write a forward with a parameter for each input",
                )
            if parameter.kind == parameter.KEYWORD_ONLY:
                if parameter.default is parameter.empty:
                    raise UsageError(f"forward takes '{parameter.name}' by keyword only", where=where)
                continue
            names.append(parameter.name)
            needed += parameter.default is parameter.empty
        told = {
            names[int(key)] if key.isdecimal() and int(key) < len(names) else key: size
            for key, size in self.inputs.items()
        }
        ordered = {name: tuple(told[name]) for name in names if name in told}
        for key in told:
            if key not in ordered:
                raise UsageError(f"forward has no input '{key}'", where=where, why=f"it takes {', '.join(names)}")
        for index, name in enumerate(names[: max(needed, len(ordered))]):
            if index >= len(ordered) or name not in ordered:
                raise UsageError(
                    f"the example lacks the input '{name}'",
                    where=where,
                    hint="give each input by its name: example={'frames': ..., 'flow': ...}, or --input NAME=SIZES",
                )
        return ordered

    def _check_video(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        shape = shapes[name]
        if len(shape) != 3 or shape[0] != 3:
            raise UsageError(
                f"the first input must be the video, [frames, 3, height, width]; '{name}' is [frames, "
                f"{', '.join(map(str, shape))}]"
            )
        if self.preprocess is None:
            raise UsageError(
                "nothing tells how the model's frames are made of a video",
                hint=f"preprocess=dvexport.models.base.imagenet_preprocess({shape[1:]}, frames=8), or what your "
                "training did; on the command line --preprocess imagenet",
            )
        if self.preprocess.size != shape[1:]:
            raise UsageError(
                f"frames of {self.preprocess.size} do not fit the input '{name}' of {shape[1:]}",
                where="preprocess.size",
            )

    def _run(self, module: nn.Module) -> tuple[dict[str, Tensor], bool]:
        """Return the outputs for zeros, checked, and whether one came alone without a name."""
        assert self.preprocess is not None
        frames = self.preprocess.frames if self.whole_clip else _FRAMES
        try:
            with torch.no_grad():
                result = module.eval()(*[torch.zeros(frames, *shape) for shape in self.inputs.values()])
        except DvexportError:
            raise
        except Exception as error:
            text = str(error).strip().splitlines()
            raise TraceError(
                "the model fails on an example of the inputs told",
                where=type(module).__name__,
                why=text[0] if text else type(error).__name__,
            ) from error
        names = [output.name for output in self.outputs]
        unnamed = not names and isinstance(result, Tensor)
        if unnamed:
            names = [LOGITS if self.labels and result.ndim == 2 else UNNAMED]
        given = named_outputs(result, names)
        if not given:
            raise TraceError("the model gives no outputs", where=type(module).__name__)
        for name, value in given.items():
            self._check_output(name, value, 1 if self.whole_clip else frames)
        return given, unnamed

    def _check_output(self, name: str, value: Tensor, rows: int) -> None:
        if value.ndim == 0 or value.shape[0] != rows:
            raise TraceError(
                "an output lacks the frame axis",
                where=name,
                why=f"for {'one clip' if self.whole_clip else f'{rows} frames'} its shape is {list(value.shape)}",
                hint="give one row for each frame, frames first",
            )
        if not value.numel():
            raise TraceError("an output holds nothing", where=name, why=f"its shape is {list(value.shape)}")
        if value.dtype != torch.float32 and value.dtype not in _OTHERS:
            raise TraceError(f"an output is {value.dtype}", where=name, hint="give float32, int64, int32 or bool")

    def _outputs(self, given: Mapping[str, Tensor]) -> tuple[Output, ...]:
        declared = {output.name: output for output in self.outputs}
        for name in declared:
            if name not in given:
                raise UsageError(f"the model gives no output '{name}'", why=f"it gives {', '.join(given)}")
        found = [
            declared.get(name) or Output(name, "logits" if name == LOGITS and value.ndim == 2 else "array")
            for name, value in given.items()
        ]
        return _labelled(found, self.labels) if self.labels else tuple(found)


def _labelled(outputs: Sequence[Output], labels: Sequence[str]) -> tuple[Output, ...]:
    places = [output.name for output in outputs if output.kind in ("logits", "map", "scores")]
    if len(places) != 1:
        raise UsageError(
            "labels name the classes of one output of logits, a map or scores",
            why=f"the model has {len(places)} of them: {', '.join(places) or 'none'}",
            hint="say which holds classes: outputs=[dvexport.Output('masks', 'map', labels)], on the command line "
            f"--kind {outputs[0].name}=logits",
        )
    return tuple(replace(one, labels=tuple(labels)) if one.name in places else one for one in outputs)


def described(model: Any, name: str, description: Description | None = None) -> Any:
    """Return a model that says what it takes and gives: a `VideoModel` as it is, any module with its description.

    Raises:
        UsageError: no module; a description is missing, does not fit, or is given where none is needed.
        TraceError: as `Description.around`.
    """
    if isinstance(model, VideoModel | Described):
        if description is not None and not description.fallback:
            what = f"a {type(model).__name__} says itself what it takes and gives"
            raise UsageError(what, hint="leave out its example and description")
        return model
    if not isinstance(model, nn.Module):
        raise UsageError(f"a {type(model).__name__} is no torch module")
    if description is None:
        video = next(iter(inspect.signature(model.forward).parameters), VIDEO)
        raise UsageError(
            f"nothing tells what a {type(model).__name__} takes",
            where=name,
            hint=f"give an example of its inputs: example={{'{video}': torch.zeros(3, 3, H, W)}}, on the command line "
            f"--input {video}=3xHxW; or subclass dvexport.models.base.VideoModel, see docs/adding-a-model.md",
        )
    return description.around(model, name)


def shapes_of(example: Example) -> dict[str, tuple[int, ...]]:
    """Return the shape of one frame of every input of an example; places stand for names where it has none.

    Args:
        example: a tensor, several in the order of forward, or by name; frames first.

    Raises:
        UsageError: it has no tensors, or others than float32.
    """
    if isinstance(example, Mapping):
        named = {str(name): value for name, value in example.items()}
    else:
        parts = [example] if isinstance(example, Tensor) else list(example)
        named = {str(index): value for index, value in enumerate(parts)}
    for name, value in named.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            raise UsageError("an example is tensors, frames first", where=name, why=f"this is a {type(value).__name__}")
        if value.dtype != torch.float32:
            raise UsageError(
                f"an input must be float32, not {value.dtype}",
                where=name,
                why="bundles take no other inputs yet",
                hint="convert it inside forward",
            )
    if not named:
        raise UsageError("an example is tensors, frames first", why="there is none")
    return {name: tuple(value.shape[1:]) for name, value in named.items()}
