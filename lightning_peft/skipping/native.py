"""The kernels in `kernels.c`: built once per machine by the C compiler that is there, and done without where there is none."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_peft.assets import cache_dir

SWITCH = "LIGHTNING_PEFT_KERNELS"  # "0" does without
_SOURCE = Path(__file__).with_name("kernels.c")
_PROCESSOR = {"AVX512": ("-mavx512f", "-mavx2", "-mfma"), "AVX2": ("-mavx2", "-mfma")}
_COMPILE_S = 120


class Kernels:
    """Functions of the compiled library, for tensors that :func:`usable` allows.

    Args:
        library: The library.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._convolve, self._choose = library.convolve, library.choose
        tensors: list[Any] = [pointer] * 6
        self._convolve.argtypes, self._convolve.restype = [ctypes.c_char_p, *tensors, number], ctypes.c_int
        means: list[Any]
        weights: list[Any]
        means, weights = [pointer, number, number, number, pointer, number], [pointer, pointer, pointer, number]
        self._choose.argtypes = [*means, *weights, ctypes.c_int, pointer, pointer]
        self._choose.restype = number

    def convolve(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, columns: Part, rows: Part
    ) -> Tensor:
        """Convolve selected channels with selected channels.

        Args:
            inputs: Maps whose channels are the selected ones, shape ``(batch, channels, height, width)``, channels-last.
            weight: Shape ``(places of the filter, inputs, outputs)``.
            bias: Shape ``(outputs,)``.
            geometry: Of the filter.
            columns: Inputs used.
            rows: Outputs computed.

        Returns:
            Shape ``(batch, rows.width, height, width)``, channels-last; outputs beyond those computed are zero.
        """
        batch, channels, height, width = inputs.shape
        out_height, out_width = geometry.places(height, width)
        output = inputs.new_empty((batch, out_height, out_width, rows.width))
        _, every_input, every_output = weight.shape
        shape = struct.pack(
            *("19q", batch, height, width, out_height, out_width, *geometry.filter, *geometry.stride, *geometry.padding),
            *(*geometry.dilation, columns.used, every_input, channels, rows.used, every_output, rows.width),
        )
        done = self._convolve(
            shape,
            inputs.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            output.data_ptr(),
            columns.address,
            rows.address,
            torch.get_num_threads(),
        )
        if not done:
            raise MemoryError("a layer that selects channels found no memory to work in")
        return output.permute(0, 3, 1, 2)

    def choose(
        self, inputs: Tensor, columns: Part, weight: Tensor, sums: Tensor, bias: Tensor, *, standard: bool
    ) -> tuple[Tensor, Tensor]:
        """Predict from one sample which channels are needed.

        Args:
            inputs: One map whose channels are the selected ones, shape ``(1, channels, height, width)``, channels-last.
            columns: Inputs at hand; the others are zero.
            weight: Of the predictor, shape ``(inputs, outputs)``.
            sums: Of that weight over its inputs.
            bias: Of the predictor.
            standard: Whether means are brought to zero mean and unit variance, instead of a softmax.

        Returns:
            Positions of the channels chosen, at least one, and the logits of all.
        """
        every, outputs = weight.shape
        logits = bias.new_empty(1, outputs)
        chosen = torch.empty(outputs, dtype=torch.int64)
        count = self._choose(
            *(inputs.data_ptr(), inputs.shape[2] * inputs.shape[3], columns.used, inputs.shape[1], columns.address, every),
            *(weight.data_ptr(), sums.data_ptr(), bias.data_ptr(), outputs, standard, logits.data_ptr(), chosen.data_ptr()),
        )
        if not count:
            raise MemoryError("a predictor of channels found no memory to work in")
        return chosen[:count], logits


class Geometry(NamedTuple):
    """Where the filter of a convolution in two dimensions goes; each a pair of height and width."""

    filter: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def places(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what it gives.

        Example:
            >>> Geometry((3, 3), (2, 2), (1, 1), (1, 1)).places(8, 9)
            (4, 5)
        """
        (tall, wide), (step_y, step_x), (pad_y, pad_x), (gap_y, gap_x) = self
        down = (height + 2 * pad_y - gap_y * (tall - 1) - 1) // step_y + 1
        return down, (width + 2 * pad_x - gap_x * (wide - 1) - 1) // step_x + 1


class Part(NamedTuple):
    """Some channels of a dimension.

    Attributes:
        used: How many.
        width: Size of the dimension in memory; what is not among them is zero.
        positions: Of these channels in the weight, ascending, int64; ``None`` for all.
    """

    used: int
    width: int
    positions: Tensor | None = None

    @property
    def address(self) -> int | None:
        """Of the positions."""
        return None if self.positions is None else self.positions.data_ptr()


def usable(inputs: Tensor, weight: Tensor) -> bool:
    """Whether the kernels may work on a tensor: plain float32 on the CPU, with nobody looking on who must see operators."""
    return (
        type(inputs) is Tensor
        and inputs.dtype is weight.dtype is torch.float32
        and inputs.device.type == "cpu"
        and not (torch.is_grad_enabled() and (inputs.requires_grad or weight.requires_grad))
        and _get_current_dispatch_mode() is None
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and not torch.is_autocast_enabled("cpu")
        and kernels() is not None
    )


def kernels() -> Kernels | None:
    """The compiled kernels, built at the first call; ``None`` where that is not possible, and :func:`missing` says why."""
    return _built()[0]


def missing() -> str:
    """Why there are no kernels; empty when there are."""
    return _built()[1]


@lru_cache(maxsize=1)
def _built() -> tuple[Kernels | None, str]:
    if os.environ.get(SWITCH) == "0":
        return None, f"{SWITCH}=0 asks to do without"
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None, "no C compiler (cc, gcc or clang) is on the path"
    problem = ""
    for threads in _thread_flags():
        for again in (False, True):  # a library that lies there and cannot be loaded is built again
            try:
                found = Kernels(ctypes.CDLL(str(_library(compiler, threads, again)), mode=os.RTLD_NOW))
                if _computes(found):
                    return found, ""
                problem = f"what {compiler} built computes something else than PyTorch does"
            except (OSError, AttributeError, subprocess.SubprocessError) as error:
                output = getattr(error, "stderr", None) or str(error)
                problem = f"{compiler} did not build them: {output.strip().splitlines()[-1][:200]}"
    return None, problem


def _computes(found: Kernels) -> bool:
    """Whether the kernels do what they should, on one small example."""
    values = torch.arange(2000, dtype=torch.float32, device="cpu").sin()
    weight, maps = values[: 33 * 5 * 9].view(33, 5, 3, 3), values[: 4 * 4 * 3].view(1, 4, 4, 3).permute(0, 3, 1, 2)
    columns, rows = torch.tensor([0, 2, 3], device="cpu"), torch.arange(0, 33, 2, device="cpu")
    expected = torch.nn.functional.conv2d(maps, weight[rows][:, columns], padding=1)
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1))
    by_input = weight.flatten(2).permute(2, 1, 0).contiguous()
    result = found.convolve(maps, by_input, None, geometry, Part(3, 3, columns), Part(17, 17, rows))
    return torch.allclose(result, expected, atol=1e-5)


def _thread_flags() -> Iterator[Sequence[str]]:
    """With the OpenMP that PyTorch has loaded, so that both use the same threads; then without threads."""
    maps = Path("/proc/self/maps")
    loaded = re.findall(r"\S*/libgomp[^/\s]*", maps.read_text()) if maps.exists() else []
    if loaded:
        yield "-fopenmp", loaded[0]
    yield ()


def _library(compiler: str, threads: Sequence[str], again: bool) -> Path:
    """Compile the kernels, unless that has been done with the same source, compiler and options and not to be done again."""
    options = ["-O3", "-fPIC", "-shared", *_PROCESSOR.get(torch.backends.cpu.get_cpu_capability(), ()), *threads]
    key = hashlib.sha256("\0".join([_SOURCE.read_text(), compiler, *options]).encode()).hexdigest()[:16]
    folder = cache_dir() / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"kernels-{key}.so"
    if again or not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / library.name
            command = [compiler, str(_SOURCE), "-o", str(built), *options, "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_S)
            built.replace(library)
    return library
