"""The baked network in formats that run without this library and without its class: ``torch.export`` and ONNX."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.atomic_files import whole
from lightning_peft.baking.agreement import ExportError, check_agreement, other_inputs, tensors_of
from lightning_peft.baking.plain_network import (
    Inputs,
    arguments,
    batch_size,
    builtin_output,
    call,
    has_batch,
    plain_network,
    with_batch_size,
)

_ONNX_LIMIT = 2_000_000_000  # a protobuf message holds no more


def to_exported(
    module: nn.Module,
    example_inputs: Inputs,
    *,
    dynamic_batch: bool = True,
    network: str | None = None,
    tolerance: float | None = None,
) -> torch.export.ExportedProgram:
    """Export the baked network with ``torch.export``, and check it against eager on the example and another batch.

    Args:
        module: A LightningModule or a network, in training, trained or baked; it stays as it is.
        example_inputs: What the network is called with: a tensor, a tuple of positional arguments or a mapping of keyword
            arguments. The first tensor gives the batch size; tensors of the same length run over the batch.
        dynamic_batch: Whether the exported network takes any batch size.
        network: Qualified name of the network when a LightningModule has several candidates.
        tolerance: Largest difference allowed, relative to the largest output where that exceeds one; by default 1e-4 in
            float32.

    Returns:
        The program; ``torch.export.save`` writes it.

    Raises:
        ExportError: The network cannot be traced, or the program computes something else.
        MisconfigurationException: No network or no batch is found.
    """
    plain = _portable(module, network)
    program = _traced(plain, example_inputs, dynamic_batch)
    runnable = program.module()
    examples = [example_inputs, other_inputs(example_inputs, larger=dynamic_batch)]
    check_agreement(plain, lambda inputs: tensors_of(call(runnable, inputs)), examples, "exported program", tolerance)
    return program


def to_onnx(
    module: nn.Module,
    path: str | Path,
    example_inputs: Inputs,
    *,
    dynamic_batch: bool = True,
    network: str | None = None,
    tolerance: float | None = None,
    opset: int | None = None,
) -> Path:
    """Write the baked network as one ONNX file, after ONNX Runtime gave the same results as eager.

    Needs the extra ``export`` (onnx, onnxscript, onnxruntime). Zeros of a pruned weight are stored as they are.

    Args:
        module: As for :func:`to_exported`.
        path: File to write; it appears only when everything is checked.
        example_inputs: As for :func:`to_exported`.
        dynamic_batch: Whether the file takes any batch size.
        network: As for :func:`to_exported`.
        tolerance: As for :func:`to_exported`.
        opset: Version of ONNX's operators; by default PyTorch's choice.

    Returns:
        ``path``.

    Raises:
        ExportError: The network cannot be exported, or ONNX Runtime computes something else.
        MisconfigurationException: The extra is missing, the network is too large for one file, or as :func:`to_exported`.
    """
    _require("onnx", "onnxscript", "onnxruntime")
    path = Path(path)
    plain = _portable(module, network)
    tensors = [tensor for tensor in plain.state_dict().values() if isinstance(tensor, Tensor)]
    if any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        raise MisconfigurationException(
            "ONNX Runtime cannot check bfloat16 on the CPU. Convert the module first: module.float() or module.half()."
        )
    size = sum(tensor.nbytes for tensor in tensors)
    if size > _ONNX_LIMIT:
        raise MisconfigurationException(
            f"The network has {size / 1e9:.1f} GB of tensors; one ONNX file holds 2 GB. Convert it to a shorter type first "
            "(module.half()), or use to_exported()."
        )
    program = _traced(plain, example_inputs, dynamic_batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks of the converter on its own parts; the result is checked below
        try:
            converted: Any = torch.onnx.export(program, (), dynamo=True, verbose=False, opset_version=opset)
        except Exception as error:  # the converter raises whatever its operators raise
            raise ExportError(f"{type(plain).__name__} could not be converted to ONNX: {_first_line(error)}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        converted.save(part, external_data=False)
        examples = [example_inputs, other_inputs(example_inputs, larger=dynamic_batch)]
        check_agreement(plain, _runtime(part), examples, "ONNX file", tolerance)
    return path


def _portable(module: nn.Module, network: str | None) -> nn.Module:
    """Copy the network, and let it give back containers that a process without the network's packages can read."""
    plain = plain_network(module, network)
    plain.register_forward_hook(lambda network, inputs, output: builtin_output(output))
    return plain


def _traced(plain: nn.Module, inputs: Inputs, dynamic_batch: bool) -> torch.export.ExportedProgram:
    size = batch_size(inputs)
    # PyTorch takes a dimension of one for a constant.
    args, kwargs = arguments(with_batch_size(inputs, max(size, 2)) if dynamic_batch else inputs)
    size = max(size, 2) if dynamic_batch else size
    shapes: Any = None
    if dynamic_batch:
        batch = torch.export.Dim("batch")
        dims = [{0: batch} if has_batch(value, size) else None for value in (*args, *kwargs.values())]
        shapes = dict(zip(kwargs, dims, strict=True)) if kwargs else tuple(dims)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # Recurrent layers assign views of their weights when they run; whether that did harm is checked on other inputs.
            warnings.filterwarnings("ignore", message="The tensor attributes? .* assigned during export")
            return torch.export.export(plain, args, kwargs=kwargs or None, dynamic_shapes=shapes)
    except Exception as error:  # tracing raises whatever the network's code raises
        hint = " If it is made for one batch size, pass dynamic_batch=False." if dynamic_batch else ""
        if "not a known type" in str(error):
            hint = (
                " Let it return tensors, tuples or dicts (a language model of transformers: use_cache=False among the inputs), "
                "or register the type with torch.utils._pytree.register_pytree_node."
            )
        raise ExportError(f"{type(plain).__name__} could not be traced by torch.export: {_first_line(error)}{hint}") from error


def _runtime(path: Path) -> Callable[[Inputs], list[Tensor]]:
    """Return a function that runs an ONNX file on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]

    def run(inputs: Inputs) -> list[Tensor]:
        args, kwargs = arguments(inputs)
        values = [value for value in args if isinstance(value, Tensor)] if args else [kwargs[name] for name in names]
        given = {name: value.detach().cpu().numpy() for name, value in zip(names, values, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, given)]

    return run


def _require(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise MisconfigurationException(
            f'ONNX export needs {", ".join(missing)}. Install the extra: pip install "lightning-peft[export]".'
        )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
