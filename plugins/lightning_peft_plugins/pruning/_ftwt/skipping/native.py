"""The kernels in `kernels.c` for tensors: the one place where Python meets C, and done without where there is no compiler."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lightning_peft_plugins.pruning._ftwt.skipping import compiled
from lightning_peft_plugins.pruning._ftwt.skipping.values import is_plain, readable, unobserved

SWITCH = "LIGHTNING_PEFT_KERNELS"  # "0" does without
_BY_INPUT = {2: (1, 0), 4: (2, 3, 1, 0)}  # order of a weight's dimensions in memory, by their number


class Kernels:
    """Functions of the compiled library.

    They take any arguments: what C cannot see (type, device, layout) is checked here, sizes and positions there, before
    anything is read.

    Args:
        library: The library.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer = ctypes.c_void_p
        tensors: list[Any] = [pointer] * 6
        self._convolve, self._choose = library.convolve, library.choose
        self._convolve.argtypes, self._convolve.restype = [ctypes.c_char_p, *tensors, ctypes.c_int64], ctypes.c_int
        self._choose.argtypes, self._choose.restype = [ctypes.c_char_p, *tensors], ctypes.c_int64

    def convolve(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, columns: Part, rows: Part
    ) -> Tensor:
        """Convolve selected channels with selected channels.

        Args:
            inputs: Maps whose channels are the selected ones, shape ``(batch, channels, height, width)``, channels-last.
            weight: Shape ``(outputs, inputs, *filter)``, laid out as :func:`by_input` does.
            bias: Shape ``(outputs,)``.
            geometry: Of the filter.
            columns: Inputs used.
            rows: Outputs computed.

        Returns:
            Shape ``(batch, rows.width, height, width)``, channels-last; outputs beyond those computed are zero.

        Raises:
            ValueError: Arguments that are not float32 on the CPU in these layouts, or do not fit each other.
            MemoryError: None was left.
        """
        addresses = _address(_map(inputs)), _address(_laid(weight)), None if bias is None else _address(_list(bias))
        batch, channels, height, width = inputs.shape
        every_output, every_input = weight.shape[:2]
        out_height, out_width = geometry.places(height, width) if min(geometry.stride) > 0 else (0, 0)
        if min(out_height, out_width) < 1 or not 1 <= rows.width <= max(every_output, rows.size):
            raise ValueError(f"A map of {height} x {width} has no output of {rows.width} channels under {geometry}.")
        output = torch.empty((batch, out_height, out_width, rows.width), dtype=torch.float32, device="cpu")
        shape = _packed(
            *(batch, height, width, out_height, out_width, *geometry.filter, *geometry.stride, *geometry.padding),
            *(*geometry.dilation, columns.used, every_input, channels, rows.used, every_output, rows.width),
            *(inputs.numel(), weight.numel(), 0 if bias is None else bias.numel(), output.numel()),
            *(columns.size, rows.size),
        )
        done = self._convolve(
            shape, *addresses, output.data_ptr(), columns.address, rows.address, max(1, torch.get_num_threads())
        )
        _check(done)
        return output.permute(0, 3, 1, 2)

    def choose(
        self, inputs: Tensor, columns: Part, weight: Tensor, bias: Tensor, *, all_inputs: int, standard: bool
    ) -> tuple[Tensor, Tensor]:
        """Predict from one sample which channels are needed.

        Args:
            inputs: One map whose channels are the selected ones, shape ``(1, channels, height, width)``, channels-last.
            columns: Inputs at hand, among those of the weight; the others are zero.
            weight: Of the predictor, shape ``(outputs, inputs)``, laid out as :func:`by_input` does.
            bias: Of the predictor.
            all_inputs: Inputs whose means count in their scale: those of the weight, and others that are always zero.
            standard: Whether means are brought to zero mean and unit variance, instead of a softmax.

        Returns:
            Positions of the channels chosen, at least one, and the logits of all.

        Raises:
            ValueError: Arguments that are not float32 on the CPU in these layouts, or do not fit each other.
            MemoryError: None was left.
        """
        addresses = _address(_map(inputs)), columns.address, _address(_laid(weight)), _address(_list(bias))
        outputs, every_input = weight.shape
        if len(inputs) != 1 or min(outputs, every_input, inputs.numel()) < 1:
            raise ValueError(f"Channels are chosen for one sample that has values, not for {tuple(inputs.shape)}.")
        logits = torch.empty((1, outputs), dtype=torch.float32, device="cpu")
        chosen = torch.empty(outputs, dtype=torch.int64, device="cpu")
        question = _packed(
            *(inputs.shape[2] * inputs.shape[3], columns.used, inputs.shape[1], every_input, all_inputs, outputs, standard),
            *(inputs.numel(), weight.numel(), bias.numel(), outputs, outputs, columns.size),
        )
        count = self._choose(question, *addresses, logits.data_ptr(), chosen.data_ptr())
        _check(count)
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
        positions: Of these channels in the weight, ascending, int64; ``None`` for the first ones.
    """

    used: int
    width: int
    positions: Tensor | None = None

    @property
    def address(self) -> int | None:
        """Of the positions.

        Raises:
            ValueError: They are no list of int64 on the CPU.
        """
        return None if self.positions is None else _address(_list(self.positions), torch.int64)

    @property
    def size(self) -> int:
        """Number of positions in the list."""
        return 0 if self.positions is None else self.positions.numel()


def by_input(weight: Tensor) -> Tensor:
    """The same weight in the memory layout that kernels read: place of the filter, then input, then output.

    Columns of a matrix are gathered as rows of its transpose, in long runs. It stays one tensor, of the usual shape, so that
    whatever changes it is computed with.
    """
    order = _BY_INPUT[weight.ndim]
    back = sorted(range(weight.ndim), key=order.__getitem__)
    return weight.permute(order).contiguous().permute(back)


def is_by_input(weight: Tensor) -> bool:
    """Whether a weight lies in memory as :func:`by_input` puts it."""
    return weight.ndim in _BY_INPUT and weight.permute(_BY_INPUT[weight.ndim]).is_contiguous()


def usable(*tensors: Tensor | None) -> bool:
    """Whether the kernels may work on tensors: values that may be looked at, in float32 on the CPU, and nobody looking on."""
    given = [tensor for tensor in tensors if tensor is not None]
    return readable(given[0]) and all(map(_is_buffer, given)) and unobserved(given) and kernels() is not None


def _is_buffer(tensor: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a tensor's numbers can be read from its memory, as far as its order allows; some are only negated when used."""
    return (
        is_plain(tensor)
        and tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
        and tensor.numel() > 0
    )


def _address(tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
    if not _is_buffer(tensor, dtype) or not tensor.is_contiguous():
        raise ValueError(
            f"The kernels take contiguous {dtype} on the CPU, not {type(tensor).__name__} of {tensor.dtype} and shape "
            f"{tuple(tensor.shape)} on {tensor.device}."
        )
    address = tensor.data_ptr()
    if not address:
        raise ValueError(f"The kernels take tensors whose memory is there; that of {tuple(tensor.shape)} was given back.")
    return address


def _list(values: Tensor) -> Tensor:
    if values.ndim != 1:
        raise ValueError(f"The kernels take biases and positions of one dimension, not {values.ndim}.")
    return values


def _map(inputs: Tensor) -> Tensor:
    """A map in the order of its memory."""
    if inputs.ndim != 4:
        raise ValueError(f"The kernels take maps of four dimensions, not {inputs.ndim}.")
    return inputs.permute(0, 2, 3, 1)


def _laid(weight: Tensor) -> Tensor:
    """A weight in the order of its memory."""
    if weight.ndim not in _BY_INPUT:
        raise ValueError(f"The kernels take weights of two or four dimensions, not {weight.ndim}.")
    return weight.permute(_BY_INPUT[weight.ndim])


def _packed(*numbers: int) -> bytes:
    try:
        return struct.pack(f"{len(numbers)}q", *numbers)
    except struct.error as error:
        raise ValueError(f"The kernels take sizes that are integers of 64 bits: {error}") from error


def _check(result: int) -> None:
    if result == 0:
        raise MemoryError("The kernels found no memory to work in.")
    if result < 0:
        raise ValueError("The kernels were given sizes or positions that do not fit each other.")


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
    try:
        command = compiled.compiler()
    except ValueError as error:
        return None, _warned(f"CC cannot be read: {error}")
    if not command:
        return None, "no C compiler (cc, gcc or clang) is on the path"
    problem = ""
    for threads in compiled.thread_flags():
        try:
            found = Kernels(compiled.library(command, threads))
            if _computes(found):
                return found, ""
            problem = f"the kernels that {' '.join(command)} built give other results than PyTorch"
        except (OSError, AttributeError, subprocess.SubprocessError) as error:
            output = getattr(error, "stderr", None) or str(error)
            problem = f"{' '.join(command)} did not build them: {output.strip().splitlines()[-1][:200]}"
    return None, _warned(problem)


def _warned(problem: str) -> str:
    warnings.warn(
        f"Networks that skip compute without compiled kernels, more slowly: {problem}. Set CC to a C compiler that works here, "
        f"or {SWITCH}=0 to do without.",
        stacklevel=2,
    )
    return problem


@torch.no_grad()
def _computes(found: Kernels) -> bool:
    """Whether the kernels do what they should, on one small example, whatever the caller is in the middle of."""
    with _disable_current_modes(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        values = torch.arange(2000, dtype=torch.float32).sin()
        weight, maps = values[: 33 * 5 * 9].view(33, 5, 3, 3), values[: 4 * 4 * 3].view(1, 4, 4, 3).permute(0, 3, 1, 2)
        columns, rows = torch.tensor([0, 2, 3]), torch.arange(0, 33, 2)
        expected = torch.nn.functional.conv2d(maps, weight[rows][:, columns], padding=1)
        geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1))
        result = found.convolve(maps, by_input(weight), None, geometry, Part(3, 3, columns), Part(17, 17, rows))
        return torch.allclose(result, expected, atol=1e-5)
