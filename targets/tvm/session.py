"""A compiled network in this process: the C runtime through ctypes, with the interface of the ONNX Runtime session."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dvexport.errors import DeviceError
from dvexport.targets.runtime import Port

__all__ = ["CallTime", "Info", "NativeSession"]

_ERROR_SIZE = 256
_MAX_RANK = 6
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
    """A compiled network, its states at zero.

    Args:
        library: the shared library, for this machine.
        plan: the plan.
        weights: the weights, used in place if they start on 64 bytes, or the path of a file of them, which is mapped
            and not copied.
        threads: that share a step.
        cores: cores that the threads run on, where the system allows it; the first is the caller's to take.
        profile: time every call, for `call_times`.

    Attributes:
        inputs, outputs: what is fed and returned, in order.
        seconds: duration of the last `run` inside the runtime.
        memory: bytes of working memory and states.

    Raises:
        DeviceError: the library can't be loaded here, a file is damaged or does not fit the others, the processor
            lacks an instruction set, there is too little memory.
    """

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
        self._library = _load(library)
        self._profile = profile
        self._weights = weights  # the library may use the bytes in place
        self._net = self._open(plan, weights, _options(threads, cores, profile))
        self.inputs = self._ports(self._library.dvx_input_count, self._library.dvx_input)
        self.outputs = self._ports(self._library.dvx_output_count, self._library.dvx_output)
        self.seconds = 0.0
        self.memory = self.info.memory
        self._recorded: list[list[CallTime]] = []
        self.reset()

    def reset(self) -> None:
        """Set every state to zero."""
        self._check(self._library.dvx_reset(self._handle()), "a reset failed")

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one step over `feeds` (every input, of its shape and type) and return the outputs.

        Raises:
            DeviceError: a wrong input: its name, type or shape, NaN or infinite values. The states stay as they were.
        """
        arrays = [self._feed(name, port, feeds) for name, port in self.inputs.items()]
        if unknown := [name for name in feeds if name not in self.inputs]:
            raise DeviceError(f"there is no input '{unknown[0]}'", hint=f"the inputs are {', '.join(self.inputs)}")
        blobs = (_Blob * len(arrays))(*[_Blob(None, array.ctypes.data, array.nbytes) for array in arrays])
        failed = self._library.dvx_step(self._handle(), blobs, len(arrays))
        self._check(failed, "the native runtime refused a step")
        self.seconds = self.info.last_step_ns / 1e9
        if self._profile:
            self._recorded.append(self.call_times())
        return {name: self._output(i, port) for i, (name, port) in enumerate(self.outputs.items())}

    def call_times(self) -> list[CallTime]:
        """Return the kernel calls of the last step, in order; nothing before the first."""
        assert self._profile, "the session was not made with profile=True"
        calls = []
        for i in range(self._library.dvx_call_count(self._handle())):
            info = _CallInfo()
            if self._library.dvx_call(self._handle(), i, ctypes.byref(info)):
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
        self._library.dvx_get_info(self._handle(), ctypes.byref(info))
        return info

    def close(self) -> None:
        """Stop the threads and free the memory; a closed session can't be used."""
        if self._net is not None:
            self._library.dvx_close(self._net)
            self._net = None

    def __enter__(self) -> NativeSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_net", None) is not None:
            self.close()

    def _handle(self) -> int:
        if self._net is None:
            raise DeviceError("the session is closed")
        return self._net

    def _open(self, plan: bytes, weights: bytes | memoryview | Path, options: _Options) -> int:
        net, error = ctypes.c_void_p(), ctypes.create_string_buffer(_ERROR_SIZE)
        blobs = (_blob(plan), _blob(weights))
        if self._library.dvx_open(*blobs, ctypes.byref(options), ctypes.byref(net), error):
            raise DeviceError("the native runtime can't open the network", why=_text(error.value))
        assert net.value is not None
        return net.value

    def _check(self, failed: int, what: str) -> None:
        if failed:
            raise DeviceError(what, why=_text(self._library.dvx_error(self._handle())))

    def _ports(self, count: Any, port: Any) -> dict[str, Port]:
        ports = [port(self._handle(), i).contents for i in range(count(self._handle()))]
        return {_text(p.name): Port(tuple(p.sizes[: p.rank]), _DTYPES[p.type]) for p in ports}

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
        data = self._library.dvx_output_data(self._handle(), index)
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
    try:
        with tempfile.TemporaryDirectory(prefix="dvexport-") as folder:
            path = Path(folder) / "network.so"
            path.write_bytes(data)
            return _declare(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        raise DeviceError(
            "the network's library can't be loaded on this machine",
            why=str(error),
            hint="it runs on the target it was exported for; --target host exports for this machine",
        ) from error


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


def _options(threads: int, cores: Sequence[int], profile: bool) -> _Options:
    array = (ctypes.c_int * len(cores))(*cores) if cores else None
    return _Options(threads, array, len(cores), int(profile))


def _blob(source: bytes | memoryview | Path) -> _Blob:
    if isinstance(source, Path):
        return _Blob(os.fsencode(source), None, 0)
    return _Blob(None, np.frombuffer(source, np.uint8).ctypes.data if len(source) else None, len(source))


def _call_time(info: _CallInfo) -> CallTime:
    rows, columns, pixels = (count if count >= 0 else None for count in info.counts)
    kernel = None if info.kernel is None else _text(info.kernel)
    return CallTime(_text(info.label), _text(info.gate), kernel, info.ns / 1e9, info.threads, (rows, columns, pixels))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
