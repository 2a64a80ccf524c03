"""``lightning_peft.merge``: several models into one, or the parts on a module into its weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from lightning_peft.arguments import one_of
from lightning_peft.merging import outputs
from lightning_peft.merging.combining import Combining, Progress, Settings
from lightning_peft.merging.errors import MergeError
from lightning_peft.merging.merge_function import MergeFunction, find
from lightning_peft.merging.model import Model
from lightning_peft.merging.opening import Source, open_model, open_models
from lightning_peft.weights.merge import merge as merge_parts

_TYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@overload
def merge(models: nn.Module) -> merge_parts: ...


@overload
def merge(
    models: Sequence[Source],
    method: str | Callable[..., Tensor] = ...,
    *,
    base: Source | None = ...,
    fisher: Sequence[Source] | None = ...,
    weights: Sequence[float] | None = ...,
    scale: float | Sequence[float] | None = ...,
    per_tensor: bool = ...,
    dtype: str | torch.dtype | None = ...,
    seed: int = ...,
    out: str | Path | None = ...,
    trusted: bool = ...,
    progress: Progress | None = ...,
    **options: Any,
) -> dict[str, Any]: ...


def merge(
    models: Sequence[Source] | nn.Module,
    method: str | Callable[..., Tensor] = "soup",
    *,
    base: Source | None = None,
    fisher: Sequence[Source] | None = None,
    weights: Sequence[float] | None = None,
    scale: float | Sequence[float] | None = None,
    per_tensor: bool = False,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    trusted: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any] | merge_parts:
    """Merge models that were trained from one start into one, or put the parts on a module into its weights.

    Of a module alone, ``merge(module)`` is :class:`lightning_peft.weights.merge.merge`: the layer parts on it, such as a LoRA,
    go into its weights, at once or for the time of a ``with`` block, and :func:`lightning_peft.unmerge` takes them out.

    Of a list of models, it returns the state dict of a merged one. Tensors are matched by name and merged one after the other,
    by most methods in pieces, so that the result and little else is held in memory. What is no floating-point number is the
    first model's. An N:M pattern that a weight has in all models stays. Running statistics of batch norms are averaged, and do
    not belong to the merged weights: estimate them again, ``torch.optim.swa_utils.update_bn(loader, module)``.

    Args:
        models: State dicts or paths: checkpoints of Lightning, trained with methods or without; state dicts that
            ``torch.save`` wrote; safetensors; folders of Hugging Face, of :func:`lightning_peft.save_baked`. Adapters in
            folders of PEFT, and checkpoints that hold only what was trained, are merged as the whole models that they are on
            ``base``.
        method: Name of a merge function (``lightning-peft merge --help`` lists them), or one of your own.
        base: The model that all were trained from, for methods that combine differences to it and for adapters.
        fisher: For ``"fisher"``: the diagonal Fisher information of each model, tensors by the same names.
        weights: How much each model counts; all the same by default.
        scale: What the merged difference is multiplied by before it is added to the base; two numbers grow from the first
            block to the last, as LiNeS has it (Wang et al., ICLR 2025, https://arxiv.org/abs/2410.17146).
        per_tensor: Whether thresholds are found for each tensor, and not for a model as a whole.
        dtype: Type of the result. It is computed in single precision, or double where a model is in it.
        seed: What chance starts from, for methods that drop at random.
        out: File or folder to write: ``.ckpt`` for a checkpoint, ``.pt`` for a state dict, ``.safetensors``; without an ending
            a folder with ``model.safetensors`` and what else stands in the folder of the base, or of the first model.
        trusted: Whether Python objects in a checkpoint may be rebuilt, which can run any code.
        progress: Called with the number of entries that are done, and of all.
        **options: Of the method, such as ``density``.

    Returns:
        The merged state dict.

    Raises:
        CheckpointError: A file is damaged, or holds Python objects and is not trusted.
        FileNotFoundError: There is no such file.
        MergeError: Models do not fit together, one holds numbers that are not finite, or a method or option does not exist.

    Example:
        >>> one, two = {"weight": torch.tensor([1.0, 2.0])}, {"weight": torch.tensor([3.0, 2.0])}
        >>> merge([one, two])
        {'weight': tensor([2., 2.])}
        >>> merge([one, two], "task_arithmetic", base={"weight": torch.zeros(2)}, scale=0.5)
        {'weight': tensor([2., 2.])}
    """
    if isinstance(models, nn.Module):
        return merge_parts(models)
    function = find(method, options)
    target = None if out is None else outputs.checked(Path(out))
    start = None if base is None else open_model(base, "the base", trusted=trusted)
    opened = open_models(models, start, trusted=trusted)
    information = None if fisher is None else _fisher(fisher, opened, trusted)
    _check(function, opened, start, information, {"scale": scale, "weights": weights})
    settings = Settings(_weights(weights, len(opened)), _scale(scale), per_tensor, _dtype(dtype), seed)
    combining = Combining(opened, function, settings, start, information)
    state = combining.run(progress)
    if combining.rechosen:
        name, (pattern, lost) = max(combining.rechosen.items(), key=lambda item: item[1][1])
        warnings.warn(
            f"{len(combining.rechosen)} tensors are {pattern} in all models, under masks that differ. The largest entries of "
            f"each group of the merged ones were kept; of {name}, the most, {lost:.0%} of the sum of squares went. Train the "
            "merged model on with NMSparsity, or merge models of one mask.",
            UserWarning,
            stacklevel=2,
        )
    if averaged := next((entry.name for entry in combining.entries if entry.fate == "averaged"), None):
        warnings.warn(
            f"Running statistics of batch norms, such as {averaged}, are the mean of the models' and not those of the merged "
            "network. Estimate them again on training data: torch.optim.swa_utils.update_bn(loader, module).",
            UserWarning,
            stacklevel=2,
        )
    if target is not None:
        record = {"method": function.name, "options": dict(function.options), "models": [each.label for each in opened]}
        outputs.write(state, outputs.like(start, opened), target, record)
    return state


def _fisher(fisher: Sequence[Source], models: Sequence[Model], trusted: bool) -> list[Model]:
    if len(fisher) != len(models):
        raise MergeError(f"fisher= has {len(fisher)} entries for {len(models)} models. Give one for each, in the same order.")
    return [open_model(source, f"of model {place}", trusted=trusted) for place, source in enumerate(fisher, 1)]


def _check(
    function: MergeFunction,
    models: Sequence[Model],
    base: Model | None,
    fisher: Sequence[Model] | None,
    given: Mapping[str, object],
) -> None:
    """Refuse what the method lacks, or would not look at."""
    needs_base = function.of_deltas or "base" in function.supplied
    if needs_base and base is None:
        raise MergeError(
            f"The method {function.name!r} combines differences to the model that all were trained from. Give it with base= "
            "(on the command line: --base)."
        )
    if len(models) == 1 and not needs_base:
        raise MergeError(f"There is one model only, {models[0].label}, and {function.name!r} takes two or more.")
    if ("fisher" in function.supplied) != (fisher is not None):
        raise MergeError(
            f"The method {function.name!r} needs fisher=, the Fisher information of each model."
            if fisher is None
            else f"fisher= is for the method 'fisher', not for {function.name!r}."
        )
    if given["weights"] is not None and "weights" not in function.supplied:
        raise MergeError(f"The method {function.name!r} counts all models alike. Leave weights= out.")
    if given["scale"] is not None and not function.of_deltas:
        raise MergeError(f"scale= multiplies a difference to the base, and {function.name!r} merges values. Leave it out.")


def _weights(weights: Sequence[float] | None, count: int) -> list[float]:
    found = [1.0] * count if weights is None else [float(each) for each in weights]
    if len(found) != count:
        raise MergeError(f"weights= has {len(found)} numbers for {count} models. Give one for each.")
    if not all(abs(each) < float("inf") for each in found):
        raise MergeError(f"weights={weights} must be finite.")
    return found


def _scale(scale: float | Sequence[float] | None) -> tuple[float, float]:
    pair = (1.0, 1.0) if scale is None else (scale, scale) if isinstance(scale, (int, float)) else tuple(scale)
    if len(pair) != 2 or not all(isinstance(each, (int, float)) and abs(each) < float("inf") for each in pair):
        raise MergeError(f"scale={scale!r} must be a number, or two, for the first block and for the last.")
    return float(pair[0]), float(pair[1])


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in _TYPES.values():
        return dtype  # type: ignore[return-value]
    one_of("dtype", dtype, _TYPES)
    return _TYPES[str(dtype)]
