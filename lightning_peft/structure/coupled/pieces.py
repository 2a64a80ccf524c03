"""Where the parts of a concatenation and the pieces of a split lie, from the sizes that autograd noted in the call."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any

from torch import Tensor

_UNSIGNED = 2**64  # autograd notes a negative dimension as a number below this


def map_pieces(tp: ModuleType, graph: Any) -> None:
    """Correct the offsets of concatenated and split channels in a traced graph.

    Torch-Pruning infers the size of each part from the layers around it, takes the readers of a split for its pieces, one
    each, and leaves out parts that need no gradient, such as the network's input. Autograd knows sizes and pieces. What stays
    wrong, or cannot be asked, is found when the cuts are proven.

    Args:
        tp: Torch-Pruning.
        graph: Its graph; index mappings of concatenations and splits along channels are replaced. Splits into equal
            pieces get their size and their sum as ``pieces``: halves of a narrower tensor must be equal too.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a long way to the next layer, as through the steps of a recurrent one
        for node in graph.module2node.values():
            if node.type == tp.ops.OPTYPE.CONCAT and node.enable_index_mapping:
                _map_concatenation(tp, graph, node)
            elif node.type == tp.ops.OPTYPE.SPLIT and node.enable_index_mapping:
                _map_split(tp, node)


def _map_concatenation(tp: ModuleType, graph: Any, node: Any) -> None:
    dim = getattr(node.grad_fn, "_saved_dim", 1)
    if dim != 1 and dim < tp.dependency.constants.MAX_VALID_DIM:
        return  # along another dimension; what follows is slow where steps of a recurrent layer are concatenated
    offsets = _part_offsets(node.grad_fn, [parameter for parameter, _ in graph.unwrapped_parameters])
    read = tp.dependency.shape_infer.infer_in_channels_recursively(graph, node, [0])
    if offsets is None or len(offsets) != len(node.inputs) or read not in (None, _size(node.grad_fn, 0)):
        return
    kind = tp.dependency.index_mapping._ConcatIndexMapping
    _set(node.dependencies, node.inputs, 1, [kind(offset=list(offset), reverse=True) for offset in offsets])
    for part in _distinct(node.inputs):
        mine = [offset for other, offset in zip(node.inputs, offsets, strict=True) if other is part]
        mappings = [kind(offset=list(offset), reverse=False) for offset in mine]
        _set(part.dependencies, [node] * len(mappings), 1, mappings)


def _map_split(tp: ModuleType, node: Any) -> None:
    kind = tp.dependency.index_mapping._SplitIndexMapping
    if not any(isinstance(dependency.index_mapping[0], kind) for dependency in node.dependencies):
        return  # along another dimension than that of channels
    sizes = _piece_sizes(node.grad_fn)
    node.pieces = (sizes[0], sum(sizes)) if len(set(sizes)) == 1 else None
    for reader in _distinct(node.outputs):
        offsets = _piece_offsets(node.grad_fn, reader.grad_fn)
        if len(offsets) != sum(other is reader for other in node.outputs):
            continue
        for dependencies, target, back in ((node.dependencies, reader, False), (reader.dependencies, node, True)):
            mappings = [kind(offset=list(offset), reverse=back) for offset in offsets]
            _set(dependencies, [target] * len(mappings), 0, mappings)


def _distinct(nodes: Sequence[Any]) -> list[Any]:
    return list({id(node): node for node in nodes}.values())


def _set(dependencies: Sequence[Any], targets: Sequence[Any], slot: int, mappings: Sequence[Any]) -> None:
    """Give each dependency on a target its mapping; a target that is met again has a further dependency."""
    left = list(dependencies)
    for target, mapping in zip(targets, mappings, strict=True):
        place = next((at for at, dependency in enumerate(left) if dependency.target is target), None)
        if place is not None:
            left.pop(place).index_mapping[slot] = mapping


def _dim(step: Any) -> int:
    noted = int(step._saved_dim)
    return noted - _UNSIGNED if noted >= _UNSIGNED // 2 else noted


def _size(step: Any, output: int) -> int:
    """Size of a result of a step of autograd, in the step's dimension."""
    return int(step._input_metadata[output].shape[_dim(step)])


def _piece_sizes(split: Any) -> list[int]:
    """Size of every piece, empty where it cannot be told."""
    try:
        return [_size(split, output) for output in range(len(split._input_metadata))]
    except (AttributeError, IndexError):  # another version of PyTorch
        return []


def _piece_offsets(split: Any, reader: Any) -> list[tuple[int, int]]:
    """First and last coordinate of each piece that a reader takes, in its order; empty where they cannot be told."""
    ends = list(pairwise(accumulate(_piece_sizes(split), initial=0)))
    return [ends[output] for parent, output in reader.next_functions if parent is split] if ends else []


def _part_offsets(step: Any, parameters: Sequence[Tensor]) -> list[tuple[int, int]] | None:
    """First and last coordinate of every part that the graph knows, ``None`` where they cannot be told."""
    try:
        sizes: list[int | None] = []
        known = []
        for parent, output in step.next_functions:
            leaf = getattr(parent, "variable", None)
            known.append(parent is not None and (leaf is None or any(leaf is parameter for parameter in parameters)))
            shape = None if parent is None else parent._input_metadata[output].shape if leaf is None else leaf.shape
            sizes.append(None if shape is None else int(shape[_dim(step)]))
        rest = _size(step, 0) - sum(size for size in sizes if size is not None)
    except (AttributeError, IndexError):  # another version of PyTorch
        return None
    if sizes.count(None) > 1:
        return None
    ends = pairwise(accumulate((rest if size is None else size for size in sizes), initial=0))
    return [offset for offset, found in zip(ends, known, strict=True) if found]
