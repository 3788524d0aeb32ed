"""A compiled network in this process: the C runtime through ctypes, with the interface of the ONNX Runtime session."""

from __future__ import annotations

import _ctypes
import ctypes
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dvexport.errors import DeviceError
from dvexport.numbers import whole_number
from dvexport.targets.runtime import MOST_THREADS, Port, checked_threads
from dvexport.targets.tvm.plan_file import VERSION, read_limit

__all__ = ["CallTime", "Info", "NativeSession"]

_ERROR_SIZE = 256
_MAX_RANK = 6

MOST_CORES = 1024
"""Numbers of cores are below this, as in runtime/internal.h."""

_WHY = "memory for each thread is laid out at export, for as many as the target has cores"
_HINT = "to have more, export for a target file with more cores (all_cores, see docs/adding-a-target.md)"
_DTYPES = tuple(np.dtype(name) for name in ("float32", "int64", "int32", "bool"))


@dataclass(frozen=True)
class CallTime:
    """One kernel call of a step.

    Attributes:
        label: the node it is made from.
        gate: the gate it belongs to, or nothing.
        kernel: the variant chosen; None: skipped, since there was nothing to compute.
        seconds: its duration; 0 where the session does not profile.
        threads: that shared it.
        counts: output channels, input channels and pixel vectors computed; None: not gated.
    """

    label: str
    gate: str
    kernel: str | None
    seconds: float
    threads: int
    counts: tuple[int | None, int | None, int | None]


class NativeSession:
    """A compiled network, its states at zero. It has a copy of the library of its own, which `close` unloads.

    Args:
        library: the shared library, for this machine.
        plan: the plan.
        weights: the weights, used in place if they start on 64 bytes and not to be changed, or the path of a file of
            them, which is read.
        threads: that share a step; 1 to the number that the plan's memory is laid out for.
        cores: cores that the threads run on, where the system allows it, at least one a thread; the first is the
            caller's to take.
        profile: time every call, for `call_times`.

    Attributes:
        inputs, outputs: what is fed and returned, in order.
        seconds: duration of the last `run` inside the runtime.
        memory: bytes of working memory and states.
        max_threads: that the plan's memory is laid out for.

    Raises:
        UsageError: a number is none, or outside its range, which is named.
        DeviceError: the library can't be loaded here, a file is damaged or does not fit the others, the processor
            lacks an instruction set, there is too little memory.
    """

    _unload = staticmethod(_ctypes.dlclose)
    """What ctypes never calls; of the class, since modules may be gone when the last session is."""

    def __init__(
        self,
        library: bytes,
        plan: bytes,
        weights: bytes | memoryview | Path,
        *,
        threads: int = 1,
        cores: Sequence[int] = (),
        profile: bool = False,
    ) -> None:
        self._net: int | None = None
        self._library: ctypes.CDLL | None = None
        self._lock = threading.RLock()  # nothing is unloaded while it runs
        options = _options(threads, cores, profile, _limit(plan))
        self._library = _load(library)
        self._profile = bool(profile)
        self._weights: object = weights  # the library may use the bytes in place
        try:
            self._open(plan, weights, options)
            self.inputs, self.outputs = self._ports("input"), self._ports("output")
            self.seconds = 0.0
            self.memory, self.max_threads = self.info.memory, self.info.max_threads
            self._recorded: list[list[CallTime]] = []
            self.reset()
        except BaseException:
            self.close()
            raise

    def reset(self) -> None:
        """Set every state to zero; DeviceError if the session is closed."""
        self._check("dvx_reset", what="a reset failed")

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one step over `feeds` (every input, of its shape and type) and return the outputs.

        Raises:
            DeviceError: a wrong input: its name, type or shape, NaN or infinite values. The states stay as they were.
                Or the session is closed.
        """
        arrays = [self._feed(name, port, feeds) for name, port in self.inputs.items()]
        if unknown := [name for name in feeds if name not in self.inputs]:
            raise DeviceError(f"there is no input '{unknown[0]}'", hint=f"the inputs are {', '.join(self.inputs)}")
        blobs = (_Blob * len(arrays))(*[_Blob(None, array.ctypes.data, array.nbytes) for array in arrays])
        with self._lock:
            self._check("dvx_step", blobs, len(arrays), what="the native runtime refused a step")
            self.seconds = self.info.last_step_ns / 1e9
            if self._profile:
                self._recorded.append(self.call_times())
            return {name: self._output(i, port) for i, (name, port) in enumerate(self.outputs.items())}

    def call_times(self) -> list[CallTime]:
        """Return the kernel calls of the last step, in order; nothing before the first."""
        assert self._profile, "the session was not made with profile=True"
        calls = []
        with self._lock:
            for i in range(self._call("dvx_call_count")):
                info = _CallInfo()
                if self._call("dvx_call", i, ctypes.byref(info)):
                    return []
                calls.append(_call_time(info))
        return calls

    def end_profile(self) -> list[list[CallTime]]:
        """Return the kernel calls of every step so far."""
        assert self._profile, "the session was not made with profile=True"
        return self._recorded

    @property
    def info(self) -> Info:
        """What the runtime tells of itself."""
        info = Info()
        self._call("dvx_get_info", ctypes.byref(info))
        return info

    def close(self) -> None:
        """Stop the threads, free the memory and unload the library; a closed session can't be used.

        Waits for a step that runs in another thread. What was recorded stays.
        """
        with self._lock:
            library, net = self._library, self._net
            self._library = self._net = self._weights = None
            if library is None:
                return
            if net is not None:
                library.dvx_close(net)
            self._unload(library._handle)

    def __enter__(self) -> NativeSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_library", None) is not None:  # also where it was never opened
            self.close()

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the library on the network; DeviceError if that is closed."""
        with self._lock:
            if self._library is None or self._net is None:
                raise DeviceError("the session is closed")
            return getattr(self._library, name)(self._net, *arguments)

    def _check(self, name: str, *arguments: Any, what: str) -> None:
        """Call a function that may fail; `what` is the error's first sentence."""
        with self._lock:
            if self._call(name, *arguments):
                raise DeviceError(what, why=_text(self._call("dvx_error")))

    def _open(self, plan: bytes, weights: bytes | memoryview | Path, options: _Options) -> None:
        assert self._library is not None
        net, error = ctypes.c_void_p(), ctypes.create_string_buffer(_ERROR_SIZE)
        blobs = (_blob(plan), _blob(weights))
        if self._library.dvx_open(*blobs, ctypes.byref(options), ctypes.byref(net), error):
            raise DeviceError("the native runtime can't open the network", why=_text(error.value))
        self._net = net.value

    def _ports(self, kind: str) -> dict[str, Port]:
        ports = [self._call(f"dvx_{kind}", i).contents for i in range(self._call(f"dvx_{kind}_count"))]
        named = {_text(p.name): Port(tuple(p.sizes[: p.rank]), _DTYPES[p.type]) for p in ports}
        if len(named) < len(ports):  # one's place would be read with the size of another
            raise DeviceError("the native runtime can't open the network", why=f"two {kind}s have one name")
        return named

    def _feed(self, name: str, port: Port, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        if name not in feeds:
            raise DeviceError(f"the input '{name}' is missing")
        array = np.asarray(feeds[name])
        if array.shape != port.shape or array.dtype != port.dtype:
            raise DeviceError(
                f"the input '{name}' must be {port.dtype} of shape {list(port.shape)}",
                why=f"it is {array.dtype} of shape {list(array.shape)}",
            )
        return np.require(array, requirements=["C", "A"])

    def _output(self, index: int, port: Port) -> np.ndarray:
        data = self._call("dvx_output_data", index)
        array = np.empty([int(size) for size in port.shape], port.dtype)
        ctypes.memmove(array.ctypes.data, data, array.nbytes)
        return array


class _Blob(ctypes.Structure):
    _fields_ = (("path", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Options(ctypes.Structure):
    _fields_ = (
        ("threads", ctypes.c_int),
        ("cores", ctypes.POINTER(ctypes.c_int)),
        ("core_count", ctypes.c_int),
        ("profile", ctypes.c_int),
    )


class _Port(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("type", ctypes.c_int),
        ("rank", ctypes.c_int),
        ("sizes", ctypes.c_int64 * _MAX_RANK),
        ("bytes", ctypes.c_size_t),
    )


class Info(ctypes.Structure):
    """`dvx_info` of runtime/dvx.h, which says what its fields are."""

    _fields_ = (
        ("threads", ctypes.c_int),
        ("pinned", ctypes.c_int),
        ("memory", ctypes.c_uint64),
        ("weights", ctypes.c_uint64),
        ("weights_copied", ctypes.c_int),
        ("steps", ctypes.c_uint64),
        ("last_step_ns", ctypes.c_uint64),
        ("max_threads", ctypes.c_int),
        ("derived", ctypes.c_uint64),
    )


class _CallInfo(ctypes.Structure):
    _fields_ = (
        ("label", ctypes.c_char_p),
        ("gate", ctypes.c_char_p),
        ("kernel", ctypes.c_char_p),
        ("threads", ctypes.c_int),
        ("counts", ctypes.c_int32 * 3),
        ("ns", ctypes.c_uint64),
    )


def _load(data: bytes) -> ctypes.CDLL:
    """Load a library that is no file: through one that is gone when this returns."""
    with _written(data) as path:
        library = None
        try:
            library = ctypes.CDLL(str(path))
            return _declare(library)
        except (OSError, AttributeError) as error:
            if library is not None:
                _ctypes.dlclose(library._handle)
            noexec = _NOEXEC in str(error)
            raise DeviceError(
                "the network's library can't be loaded on this machine",
                where=str(path.parent.parent) if noexec else None,
                why="programs may not run from the folder of temporary files" if noexec else str(error),
                hint="name another folder with TMPDIR" if noexec else _HERE,
            ) from error


_NOEXEC = "failed to map segment from shared object"
"""What the loader says of a file system without programs (noexec)."""

_HERE = "it runs on the target it was exported for; --target host exports for this machine"


@contextmanager
def _written(data: bytes) -> Iterator[Path]:
    """Yield a library's file, gone afterwards; DeviceError if it can't be written."""
    folder = None
    try:
        folder = tempfile.TemporaryDirectory(prefix="dvexport-", ignore_cleanup_errors=True)
        path = Path(folder.name) / "network.so"
        path.write_bytes(data)
    except OSError as error:
        if folder is not None:
            folder.cleanup()
        raise DeviceError(
            "the network's library can't be written to a temporary file",
            where=error.filename or tempfile.gettempdir(),
            why=error.strerror or str(error),
            hint="free some space, or name another folder with TMPDIR",
        ) from error
    with folder:
        yield path


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    net, integer = ctypes.c_void_p, ctypes.c_int
    pointer, text = ctypes.POINTER, ctypes.c_char_p
    functions: dict[str, tuple[Any, list[Any]]] = {
        "dvx_open": (integer, [_Blob, _Blob, pointer(_Options), pointer(net), text]),
        "dvx_close": (None, [net]),
        "dvx_reset": (integer, [net]),
        "dvx_step": (integer, [net, pointer(_Blob), integer]),
        "dvx_output_data": (ctypes.c_void_p, [net, integer]),
        "dvx_input_count": (integer, [net]),
        "dvx_output_count": (integer, [net]),
        "dvx_input": (pointer(_Port), [net, integer]),
        "dvx_output": (pointer(_Port), [net, integer]),
        "dvx_error": (text, [net]),
        "dvx_get_info": (None, [net, pointer(Info)]),
        "dvx_call_count": (integer, [net]),
        "dvx_call": (integer, [net, integer, pointer(_CallInfo)]),
    }
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _limit(plan: bytes) -> int:
    """Return how many threads a plan is laid out for; `MOST_THREADS` for what is none, which the runtime has texts for.

    Raises:
        DeviceError: it is of another release, whose memory may be laid out otherwise.
    """
    version, limit = read_limit(plan) or (VERSION, MOST_THREADS)
    if version != VERSION:
        raise DeviceError(
            f"the plan has format version {version}, this dvexport reads version {VERSION}",
            hint="export it again with this dvexport",
        )
    return limit if 1 <= limit <= MOST_THREADS else MOST_THREADS


def _options(threads: int, cores: Sequence[int], profile: bool, limit: int) -> _Options:
    """Return the options, every number checked: ctypes cuts off what does not fit, so that 2^32 + 2 threads were 2."""
    count = checked_threads(threads, limit, why=_WHY, hint=_HINT)
    given = [whole_number(core, "a core's number", least=0, most=MOST_CORES - 1) for core in cores]
    if given:
        whole_number(len(given), "the number of cores", least=count, most=MOST_CORES, why="each thread needs one")
    array = (ctypes.c_int * len(given))(*given) if given else None
    return _Options(count, array, len(given), int(bool(profile)))


def _blob(source: bytes | memoryview | Path) -> _Blob:
    if isinstance(source, Path):
        return _Blob(os.fsencode(source), None, 0)
    array = np.frombuffer(source, np.uint8)
    return _Blob(None, array.ctypes.data if array.size else None, array.size)


def _call_time(info: _CallInfo) -> CallTime:
    rows, columns, pixels = (count if count >= 0 else None for count in info.counts)
    kernel = None if info.kernel is None else _text(info.kernel)
    return CallTime(_text(info.label), _text(info.gate), kernel, info.ns / 1e9, info.threads, (rows, columns, pixels))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
