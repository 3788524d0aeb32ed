"""`manifest.json`: everything a bundle says of itself, as strict models.

Only shapes, names and digests: nothing here needs torch, a backend or the model's definition.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)

from dvexport.bundle.limits import Limits
from dvexport.decisions import PROBE, decision_key
from dvexport.errors import BundleError, UsageError
from dvexport.ports import LOGITS, Output, OutputKind
from dvexport.video.preprocess import Preprocess

__all__ = [
    "FORMAT_VERSION",
    "FileEntry",
    "GateEntry",
    "InputEntry",
    "Manifest",
    "ModelEntry",
    "OutputEntry",
    "PassEntry",
    "Seen",
    "SeenFrames",
    "StateEntry",
    "TokenEntry",
    "check_member_name",
    "parse_manifest",
]

FORMAT_VERSION = 2
"""2 has kinds and labels of outputs, inputs beside the video, and limits; what 1 had means the same."""

_DRIVE = re.compile(r"^[A-Za-z]:")

Shape = tuple[Annotated[int, Field(ge=1)], ...]
Dtype = Literal["float32", "float16", "int64", "int32", "int8", "uint8", "bool"]
Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def _preprocess(value: Any) -> Preprocess | None:
    if value is None or isinstance(value, Preprocess):
        return value
    if not isinstance(value, Mapping):
        raise ValueError("needs an object")
    try:
        return Preprocess.from_dict(value)
    except UsageError as error:
        raise ValueError(f"{error.where}: {error.why}") from error


def _preprocess_json(value: Preprocess | None) -> dict[str, Any] | None:
    return None if value is None else value.to_dict()


class InputEntry(_Entry):
    """An input: its static shape and what to do to a video to fill it; None for one that no video fills."""

    name: str
    shape: Shape
    dtype: Dtype
    preprocess: Annotated[Preprocess | None, PlainValidator(_preprocess), PlainSerializer(_preprocess_json)]


class OutputEntry(_Entry):
    """An output, such as the logits: its static shape, and what it means (`dvexport.ports.Output`).

    A bundle of format 1 says nothing of that; its only output are logits. Their labels are the manifest's.
    """

    name: str
    shape: Shape
    dtype: Dtype
    kind: OutputKind = "array"
    labels: list[str] = []


class StateEntry(_Entry):
    """What a stream keeps from step to step: the output `output` of one step is `input` of the next.

    The first step gets zeros. Where `in_place`, both may be one buffer: whatever reads it comes before what writes it.
    """

    name: str
    input: str
    output: str
    shape: Shape
    dtype: Dtype
    init: Literal["zeros"] = "zeros"
    in_place: bool = False


class SeenFrames(_Entry):
    """In how many of `frames` something was seen of a gate; a clip that is read as one counts as one frame.

    Attributes:
        computed, reused: any channel was, in an active tile.
        skipped: any channel was.
        stale: what was reused the frame before had left out: the channel was not computed, or the tile not active.
        no_tiles, some_tiles, all_tiles: were active.
        new_tiles: a tile was active that was not in the frame before.
        chosen: tokens were chosen.
    """

    frames: Count
    computed: Count = 0
    reused: Count = 0
    skipped: Count = 0
    stale: Count = 0
    no_tiles: Count = 0
    some_tiles: Count = 0
    all_tiles: Count = 0
    new_tiles: Count = 0
    chosen: Count = 0


class Seen(_Entry):
    """What was seen of a gate while its artifact was compared: on the clip, and in forced steps, None without any."""

    clip: SeenFrames
    forced: SeenFrames | None = None


class GateEntry(_Entry):
    """A gate and what it became.

    Attributes:
        kind: `channels`, `tiles`, `channels+tiles`, `tokens`, ... as its lowering knows it.
        channels: output channels under the gate.
        grid: rows and columns of its tile grid; None without tiles.
        tokens: how many tokens go on, and of how many; None for a gate that chooses none.
        lowering: what it became in this artifact.
        reason: why that lowering was chosen.
        overridden: the user chose it.
        expected_ms: milliseconds a frame that the cost table promised for each lowering.
        seen: what the comparisons of the export saw of it; None in a bundle of before there were any.
    """

    name: str
    kind: str
    channels: Count
    grid: tuple[int, int] | None = None
    tokens: tuple[int, int] | None = None
    lowering: str
    reason: str = ""
    overridden: bool = False
    expected_ms: dict[str, float] = {}
    seen: Seen | None = None


class TokenEntry(_Entry):
    """How the decisions of kind `tokens` map to a clip (`dvexport.tokens`).

    Attributes:
        grid: first tokens in time, height and width.
        stages: for each stage of pruning the gates of its groups, in the order of time.
        grids: for each stage None if it drops tokens of those that the stage before left, or the grid of the tokens
            it begins with, where the model has merged them; no grids: None for all.
    """

    grid: tuple[int, int, int]
    stages: list[list[str]]
    grids: list[tuple[int, int, int] | None] = []


class ModelEntry(_Entry):
    """The model and where its options come from.

    Attributes:
        name: as it was asked for.
        settings: options given by name.
        inferred: options that the weights told, and the model's name.
        assumed: options that nothing told, at their defaults.
        weights_key: where the weights stand in the checkpoint's file, if that was said.
        notes: how the weights were found, and what an assumption means.
    """

    name: str
    settings: dict[str, Any] = {}
    inferred: dict[str, Any] = {}
    assumed: dict[str, Any] = {}
    weights_key: str | None = None
    notes: list[str] = []


class PassEntry(_Entry):
    """A graph pass that ran."""

    name: str
    modified: bool
    detail: str = ""


class FileEntry(_Entry):
    """A file of the bundle: lower-case hexadecimal SHA-256 and size in bytes."""

    sha256: Digest
    size: Count


class Manifest(_Entry):
    """The whole manifest.

    Attributes:
        mode: `stream` (a frame a step, explicit state) or `clip` (all frames at once).
        labels: class names in the order of the logits.
        flops: multiply-accumulates of the fixed part and of every gate.
        files: by relative POSIX path; filled in when the bundle is written.
        left_out: files of the bundle that a slim one was made of, where it has them not, or not all of their bytes.
        checkpoint: SHA-256 of the weights the model was given; None for random or shipped ones.
        tools: version of every package that had a part in it.
        passes: in the order they ran.
        tokens: where its tokens lie, for a model that chooses them and tells.
        limits: how far the artifact may be from the model, as its backend stated at export.
        memory: bytes that an instance needs on the device, by use; empty where the backend does not know.
    """

    format: Literal[1, 2] = 2
    model: ModelEntry
    target: str
    backend: str
    mode: Literal["stream", "clip"]
    inputs: list[InputEntry] = Field(min_length=1)
    outputs: list[OutputEntry] = Field(min_length=1)
    labels: list[str] = []
    states: list[StateEntry] = []
    gates: list[GateEntry] = []
    flops: dict[str, Any] = {}
    files: dict[str, FileEntry] = {}
    left_out: dict[str, FileEntry] = {}
    checkpoint: Digest | None = None
    tools: dict[str, str] = {}
    passes: list[PassEntry] = []
    memory: dict[str, Count] = {}
    tokens: TokenEntry | None = None
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _has_video(self) -> Manifest:
        if self.inputs[0].preprocess is None:
            raise ValueError("the first input is a video, and has no preprocess")
        return self

    @model_validator(mode="after")
    def _means_something(self) -> Manifest:
        """What an output is said to be fits its shape, every name is one port's, and limits are of outputs."""
        for entries in (self.inputs, self.outputs):
            names = [entry.name for entry in entries]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"two inputs or outputs are called '{twice[0]}'")
        shapes = {entry.name: entry.shape for entry in self.outputs}
        try:
            outputs = self.declared_outputs
            for output in outputs:
                output.check(shapes[output.name])
        except UsageError as error:
            raise ValueError(f"output '{error.where}': {error.what}") from error
        if not outputs:
            raise ValueError("no output is the model's own, all are decisions")
        known = {output.name for output in outputs}
        if unknown := [name for name in self.limits.outputs if name not in known]:
            raise ValueError(f"a limit is of '{unknown[0]}', which is no output")
        return self

    @property
    def preprocess(self) -> Preprocess:
        """Preprocessing of the first input, the video."""
        found = self.inputs[0].preprocess
        assert found is not None
        return found

    @property
    def declared_outputs(self) -> tuple[Output, ...]:
        """The outputs that are no decisions, with what they mean."""
        found = []
        for entry in self.outputs:
            kind: OutputKind = "logits" if self.format == 1 and entry.name == LOGITS else entry.kind
            if decision_key(entry.name, PROBE) is None:
                found.append(Output(entry.name, kind, tuple(self.labels if kind == "logits" else entry.labels)))
        return tuple(found)

    def to_json(self) -> bytes:
        """Return the bytes of `manifest.json`: the same for the same content."""
        text = json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False)
        return (text + "\n").encode()


class _FormatOnly(BaseModel):
    """The one key that every format version has."""

    model_config = ConfigDict(strict=True, extra="ignore")

    format: Annotated[int, Field(ge=1)]


def parse_manifest(raw: bytes, *, where: str) -> Manifest:
    """Return the manifest in `raw`.

    Raises:
        BundleError: it is no JSON, a key is missing, unknown or wrong (which is named), or its
            format is newer than this version of dvexport.
    """
    try:
        version = _FormatOnly.model_validate_json(raw).format
        if version > FORMAT_VERSION:
            raise BundleError(
                f"the bundle has format {version}, this dvexport reads up to {FORMAT_VERSION}",
                where=where,
                hint="update dvexport",
            )
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        raise BundleError("the bundle's manifest.json is not usable", where=where, why=_keys(error)) from error
    for name in manifest.files:
        check_member_name(name, where=where)
    return manifest


def _keys(error: ValidationError) -> str:
    """Return the first three faults as `key: reason`."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    lines = [f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}" for fault in faults[:3]]
    return "; ".join(lines + ([f"and {len(faults) - 3} more"] if len(faults) > 3 else []))


def check_member_name(name: str, *, where: str) -> None:
    """Check that `name` is a plain relative POSIX path that stays inside the folder it is put in.

    Raises:
        BundleError: it is absolute, has `..`, a drive, a backslash, a control character, ...
    """
    if not name or name.startswith("/") or _DRIVE.match(name):
        reason = "it is not a relative path"
    elif "\\" in name or not name.isprintable():
        reason = "it has a backslash or a control character"
    elif any(part in ("", ".", "..") for part in name.split("/")):
        reason = "it has an empty, '.' or '..' part"
    else:
        return
    raise BundleError(f"the bundle has an unsafe file name {name!r}", where=where, why=reason)
