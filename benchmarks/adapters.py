"""Runtimes for the same static network, each behind the same two calls; imports nothing of any until it is asked for.

A folder holds the network in every form that a runtime starts from: `model.onnx`, `model.pt` (TorchScript),
`model.pt2` (`torch.export`), or a compiled artifact of ours. What a runtime has to convert first it leaves
beside them, for the next one that opens the folder. All run in float32 on the CPU, one frame at a time.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np

__all__ = ["ADAPTERS", "Adapter", "missing", "version"]


class Adapter(Protocol):
    """A runtime.

    Attributes:
        packages: what has to be installed, for the version the first.
    """

    packages: tuple[str, ...]

    def prepare(self, folder: Path, threads: int) -> None:
        """Convert the network of a folder, if that was not done before, and load it."""

    def run(self, x: np.ndarray) -> np.ndarray:
        """Return the logits of one frame, float32 `[1, 3, H, W]`."""


class OnnxRuntime:
    """ONNX Runtime's own CPU kernels, its threads spinning as they do by default."""

    packages: tuple[str, ...] = ("onnxruntime",)

    def prepare(self, folder: Path, threads: int) -> None:
        """See `Adapter`."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self._session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    def run(self, x: np.ndarray) -> np.ndarray:
        """See `Adapter`."""
        return self._session.run(None, {self._input: x})[0]


class OpenVino:
    """OpenVINO's CPU plugin, one request at a time."""

    packages: tuple[str, ...] = ("openvino",)

    def prepare(self, folder: Path, threads: int) -> None:
        """See `Adapter`. Its mere import reports usage, unless the package that does so can't be imported."""
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
        import openvino as ov

        core = ov.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }  # fmt: skip
        compiled = core.compile_model(core.read_model(str(folder / "model.onnx")), "CPU", settings)
        self._output = compiled.output(0)
        self._request = compiled.create_infer_request()

    def run(self, x: np.ndarray) -> np.ndarray:
        """See `Adapter`."""
        return self._request.infer({0: x})[self._output]


class Ncnn:
    """Tencent's ncnn, converted by its pnnx; halves of floats are switched off, so that it computes the same."""

    packages: tuple[str, ...] = ("ncnn", "pnnx")

    def prepare(self, folder: Path, threads: int) -> None:
        """See `Adapter`."""
        import ncnn

        if not (folder / "ncnn" / "model.ncnn.bin").is_file():
            self._convert(folder)
        self._net = ncnn.Net()
        options = self._net.opt
        options.num_threads, options.use_vulkan_compute = threads, False
        for half in ("fp16", "bf16"):
            for use in ("packed", "storage", "arithmetic"):
                if hasattr(options, f"use_{half}_{use}"):
                    setattr(options, f"use_{half}_{use}", False)
        self._net.load_param(str(folder / "ncnn" / "model.ncnn.param"))
        self._net.load_model(str(folder / "ncnn" / "model.ncnn.bin"))
        self._input, self._output = self._net.input_names()[0], self._net.output_names()[0]
        self._tensor = ncnn.Mat

    def run(self, x: np.ndarray) -> np.ndarray:
        """See `Adapter`."""
        extractor = self._net.create_extractor()
        extractor.input(self._input, self._tensor(x[0]))
        _, logits = extractor.extract(self._output)
        return np.array(logits)[None]

    def _convert(self, folder: Path) -> None:
        """Run pnnx, the program; the module of that name imports torch to do the same."""
        (folder / "ncnn").mkdir(exist_ok=True)
        frame = np.load(folder / "input.npy", mmap_mode="r")
        package = importlib.util.find_spec("pnnx")
        assert package is not None and package.submodule_search_locations
        program = Path(package.submodule_search_locations[0]) / "pnnx"
        shape = ",".join(str(size) for size in frame.shape)
        command = [str(program), str(folder / "model.pt"), f"inputshape=[{shape}]", "fp16=0"]
        by_products = ("pnnxparam", "pnnxbin", "pnnxpy", "pnnxonnx", "ncnnpy")
        command += [f"{kind}={folder / 'ncnn' / kind}" for kind in by_products]
        command += [f"ncnn{kind}={folder / 'ncnn' / f'model.ncnn.{kind}'}" for kind in ("param", "bin")]
        subprocess.run(command, check=True, cwd=folder / "ncnn", capture_output=True)


class LiteRt:
    """LiteRT with XNNPACK, converted by litert-torch."""

    packages: tuple[str, ...] = ("ai-edge-litert", "litert-torch")

    def prepare(self, folder: Path, threads: int) -> None:
        """See `Adapter`."""
        path = folder / "model.tflite"
        if not path.is_file():
            import litert_torch
            import torch

            network = torch.export.load(folder / "model.pt2").module()
            frame = torch.from_numpy(np.load(folder / "input.npy"))
            litert_torch.convert(network, (frame,)).export(str(path))
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(model_path=str(path), num_threads=threads)
        self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]["index"]
        self._output = self._interpreter.get_output_details()[0]["index"]

    def run(self, x: np.ndarray) -> np.ndarray:
        """See `Adapter`."""
        self._interpreter.set_tensor(self._input, x)
        self._interpreter.invoke()
        return self._interpreter.get_tensor(self._output)


class XnnExecuTorch:
    """ExecuTorch with the whole network left to XNNPACK."""

    packages: tuple[str, ...] = ("executorch",)

    def prepare(self, folder: Path, threads: int) -> None:
        """See `Adapter`. The pool of threads may only change size before a network is loaded."""
        import torch
        from executorch.extension.pybindings import portable_lib

        path = folder / "model.pte"
        if not path.is_file():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            exported = torch.export.load(folder / "model.pt2")
            lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
            path.write_bytes(lowered.to_executorch().buffer)
        portable_lib._unsafe_reset_threadpool(threads)
        from executorch.runtime import Runtime

        self._program = Runtime.get().load_program(path)
        self._method: Any = self._program.load_method("forward")
        self._tensor = torch.from_numpy

    def run(self, x: np.ndarray) -> np.ndarray:
        """See `Adapter`."""
        return self._method.execute([self._tensor(x)])[0].numpy()


class Native:
    """Kernels compiled by this package; a gated one takes its decisions from `decisions.npz`."""

    packages: tuple[str, ...] = ("dvexport", "apache-tvm", "ziglang")

    def prepare(self, folder: Path, threads: int) -> None:
        """See `Adapter`."""
        from dvexport.targets.tvm.session import NativeSession

        library, plan = ((folder / name).read_bytes() for name in ("library.so", "step.plan"))
        self._session = NativeSession(library, plan, folder / "weights.bin", threads=threads)
        decisions = folder / "decisions.npz"
        self._decisions = dict(np.load(decisions)) if decisions.is_file() else {}

    def run(self, x: np.ndarray) -> np.ndarray:
        """See `Adapter`."""
        return self._session.run({"frames": x, **self._decisions})["logits"]


ADAPTERS: dict[str, type[Adapter]] = {
    "ONNX Runtime": OnnxRuntime,
    "OpenVINO": OpenVino,
    "ncnn": Ncnn,
    "LiteRT": LiteRt,
    "ExecuTorch": XnnExecuTorch,
    "native": Native,
}


def missing(adapter: type[Adapter]) -> list[str]:
    """Return the packages of an adapter that are not installed."""
    return [name for name in adapter.packages if not _installed(name)]


def version(adapter: type[Adapter]) -> str:
    """Return the version of an adapter's runtime."""
    return importlib.metadata.version(adapter.packages[0])


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
