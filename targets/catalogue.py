"""The device catalogue: what a lowering and a backend need to know of a device, by product name.

One TOML file a device in `catalog/`; a path to such a file is accepted wherever a name is. See
docs/adding-a-target.md for the keys.
"""

from __future__ import annotations

import os
import platform
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from dvexport.errors import UsageError, unknown_name
from dvexport.files import read_text
from dvexport.targets.discover import BACKENDS, PLANNED, part_of
from dvexport.targets.runtime import DEFAULT_THREADS, MOST_THREADS
from dvexport.targets.table import Positive, Table

__all__ = [
    "HOST",
    "Cost",
    "Cpu",
    "Quantity",
    "Target",
    "host_name",
    "load",
    "load_file",
    "names",
    "path_of",
    "runs_here",
]

TableT = TypeVar("TableT", bound=Table)

HOST = "host"
"""Stands for the catalogue entry that fits the machine dvexport runs on."""

_CATALOG = Path(__file__).parent / "catalog"


class Cpu(Table):
    """The cores worth using: the big cluster where there are two kinds.

    Attributes:
        model: what its maker calls it.
        triple: LLVM target triple.
        mcpu: LLVM processor name.
        features: LLVM features beyond those of `mcpu`, such as `+neon`.
        lanes: float32 lanes of a vector register.
        cores: number of these cores.
        all_cores: number of all cores, small ones included; None where one entry stands for processors that differ.
        l1_kib, l2_kib, l3_kib: data caches in KiB; l1 and l2 as one core sees them, l3 of all, 0: none.
    """

    model: str
    triple: Annotated[str, Field(pattern=r"^[a-z0-9_]+(-[a-z0-9_]+){1,3}$")]
    mcpu: str
    features: list[Annotated[str, Field(pattern=r"^[+-][a-z0-9_.-]+$")]] = Field(default_factory=list)
    lanes: Literal[1, 2, 4, 8, 16]
    cores: Positive
    all_cores: Positive | None = None
    l1_kib: Positive
    l2_kib: Annotated[int, Field(ge=0)]
    l3_kib: Annotated[int, Field(ge=0)] = 0

    @field_validator("all_cores")
    @classmethod
    def _no_fewer(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value < info.data.get("cores", value):
            raise ValueError("they include the cores worth using, and are no fewer")
        return value

    @property
    def most_threads(self) -> int:
        """How many threads a native plan is laid out for: one a core, of every kind.

        Whether a thread on a small core helps is for who runs it to say, and its memory is small. Where the cores are
        unknown it is `DEFAULT_THREADS`, or `cores` if they are more; in no case above `MOST_THREADS`.
        """
        return min(self.all_cores or max(self.cores, DEFAULT_THREADS), MOST_THREADS)


class Quantity(Table):
    """A figure and where it is from; `estimated` unless someone measured it on the device."""

    value: Annotated[float, Field(gt=0, allow_inf_nan=False, strict=False)]
    source: Annotated[str, Field(min_length=1)]
    estimated: bool


class Cost(Table):
    """One measured point of the cost table that lowerings are chosen by.

    Attributes:
        kernel: the lowering measured.
        size: its problem size, a text or numbers, as that lowering defines it.
        ms: median milliseconds.
        threads: threads it ran on.
    """

    kernel: str
    size: str | list[int]
    ms: Annotated[float, Field(gt=0, allow_inf_nan=False, strict=False)]
    threads: Positive = 1


class Target(Table):
    """A device.

    Attributes:
        name: how to ask for it.
        title: product name.
        memory_mib: memory of the device in MiB (the usual variant).
        conditional: `lazy` where only the branch taken of an `If` runs, `eager` where both do.
        dynamic_shapes: whether sizes may be known only at run time.
        peak_gflops_per_core: float32, a multiply-accumulate counts two.
        bandwidth_gb_per_s: what main memory gives all cores together, in 1e9 bytes per second.
        costs: measured points; empty: choose by the figures above.
        costs_source: on what and when the costs were measured.
        runtimes: what can execute there, by backend: the backend's own table, or the values where it is planned.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    title: str
    memory_mib: Positive
    conditional: Literal["lazy", "eager"]
    dynamic_shapes: bool
    cpu: Cpu
    peak_gflops_per_core: Quantity
    bandwidth_gb_per_s: Quantity
    runtimes: dict[str, Any]
    costs: list[Cost] = Field(default_factory=list)
    costs_source: str | None = None

    def runtime(self, table: type[TableT]) -> TableT | None:
        """Return what the device says of a backend, by the type of the backend's table; None: it does not run there."""
        return next((said for said in self.tables if isinstance(said, table)), None)

    @property
    def tables(self) -> list[Table]:
        """What the device says of each backend of this release."""
        return [said for said in self.runtimes.values() if isinstance(said, Table)]

    @property
    def backends(self) -> list[str]:
        """Names of the backends that the device takes."""
        return sorted(self.runtimes)

    @field_validator("runtimes")
    @classmethod
    def _tables(cls, runtimes: dict[str, Any]) -> dict[str, Any]:
        return {name: _runtime_table(name, values) for name, values in runtimes.items()}

    @model_validator(mode="after")
    def _coherent(self) -> Target:
        if not self.runtimes:
            raise ValueError(f"runtimes: name at least one of {', '.join((*BACKENDS, *PLANNED))}")
        if self.costs and not self.costs_source:
            raise ValueError("costs_source: say on what the costs were measured")
        return self


def _runtime_table(backend: str, values: Any) -> Any:
    """Return `[runtimes.BACKEND]` as that backend reads it; ValueError with the key at fault."""
    if backend in PLANNED:
        return values
    if backend not in BACKENDS:
        raise ValueError(f"{backend}: Extra inputs are not permitted")
    try:
        return part_of(backend, "table").TABLE.model_validate(values)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        key = ".".join(map(str, (backend, *fault["loc"])))
        raise ValueError(f"{key}: {fault['msg'].removeprefix('Value error, ')}") from error


def names() -> list[str]:
    """Return the names of the catalogue, in order; `host` is accepted beside them."""
    return sorted(path.stem for path in _CATALOG.glob("*.toml"))


def load(name_or_path: str | Path) -> Target:
    """Return the device of that name, of the machine itself for `host`, or of a TOML file.

    `host` is the entry that fits this machine, with the cores that this machine has.

    Raises:
        UsageError: an unknown name, a missing file, or a bad one, with file, key and reason.
    """
    target = load_file(path_of(name_or_path))
    if str(name_or_path) != HOST:
        return target
    cores = os.cpu_count() or target.cpu.cores
    return target.model_copy(update={"cpu": target.cpu.model_copy(update={"cores": cores, "all_cores": cores})})


def path_of(name_or_path: str | Path) -> Path:
    """Return the file of that device; UsageError for an unknown name."""
    text = str(name_or_path)
    if text.endswith(".toml"):
        return Path(name_or_path)
    name = host_name() if text == HOST else text
    known = names()
    if name not in known:
        raise unknown_name("target", name, [HOST, *known])
    return _CATALOG / f"{name}.toml"


def load_file(path: Path) -> Target:
    """Return the device that the TOML file at `path` describes; UsageError as `load`."""
    try:
        values = tomllib.loads(read_text(path))
    except FileNotFoundError as error:
        raise UsageError("there is no such target file", where=str(path)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("the target file can't be read", where=str(path), why=str(error)) from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError("the target file is no TOML", where=str(path), why=str(error)) from error
    try:
        return Target.model_validate(values)
    except ValidationError as error:
        raise _bad_key(path, error) from error


def runs_here(cpu: Cpu) -> bool:
    """Tell whether code for a processor is for this kind of machine."""
    return cpu.triple.startswith(_architecture()) and "android" not in cpu.triple


def host_name() -> str:
    """Return the catalogue name that fits this machine; UsageError on a processor without one."""
    machine = _architecture()
    if machine == "x86_64":
        return "x86-64-avx512" if "avx512f" in _cpu_flags() else "x86-64-avx2"
    if machine == "aarch64":
        return "arm64"
    raise UsageError(
        f"no target of the catalogue fits this machine ({machine})", hint=f"name one of: {', '.join(names())}"
    )


def _architecture() -> str:
    """Return what this machine is called in target triples, where systems differ."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64", "armv7l": "armv7"}.get(machine, machine)


def _cpu_flags() -> set[str]:
    """Return the processor's features as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}


def _bad_key(path: Path, error: ValidationError) -> UsageError:
    """Name the first key at fault; where a validator of ours found it, the rest of the key is in its text."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    reason, parts = fault["msg"], [str(part) for part in fault["loc"]]
    reason = reason.removeprefix("Value error, ")
    if fault["type"] == "value_error" and parts in ([], ["runtimes"]):
        inner, _, reason = reason.partition(": ")
        parts.append(inner)
    key = ".".join(parts)
    return UsageError(
        f"the target file has a bad key '{key}'",
        where=str(path),
        why=reason,
        hint="docs/adding-a-target.md lists the keys",
    )
