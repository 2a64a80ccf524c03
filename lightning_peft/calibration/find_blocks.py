"""Which blocks are calibrated, and in which order the user's step calls them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.calibration.step_passes import StepPasses
from lightning_peft.capture.shim import Shim
from lightning_peft.capture.tap import forward_attribute
from lightning_peft.network.block_lists import BlockList, as_list, find_lists, is_trunk


def find_blocks(module: nn.Module, names: str | Iterable[str] | None) -> dict[str, nn.Module]:
    """Return the blocks by qualified name, each once.

    Args:
        module: The module.
        names: Lists, whose entries are the blocks, or blocks; ``None`` finds the lists that make the network deep.

    Raises:
        MisconfigurationException: There is no such submodule or no list, or one block is a part of another.
    """
    if names is None:
        found: dict[str, nn.Module] = {}
        for path, entries in find_lists(module, is_trunk).items():
            found |= _entries(path, entries)
        if not found:
            raise MisconfigurationException(
                f"{type(module).__name__} has no list of equal blocks. Name the modules to calibrate, in order: "
                'blocks=["model.stem", "model.body"].'
            )
    else:
        found = {}
        for name in [names] if isinstance(names, str) else names:
            found |= _named(module, name)
    unique = {id(block): (name, block) for name, block in reversed(found.items()) if any(True for _ in block.parameters())}
    blocks = dict(reversed(unique.values()))
    for name in blocks:
        outer = next((other for other in blocks if other != name and f"{name}.".startswith(f"{other}.")), None)
        if outer is not None:
            raise MisconfigurationException(f"blocks= names {name}, a part of {outer}, which is a block too. Name one of them.")
    return blocks


def _named(module: nn.Module, name: str) -> dict[str, nn.Module]:
    try:
        part = module.get_submodule(name)
    except AttributeError:
        raise MisconfigurationException(f"blocks= names {name!r}, which {type(module).__name__} does not have.") from None
    blocks = as_list(part)
    return {name: part} if blocks is None else _entries(name, blocks)


def _entries(path: str, blocks: BlockList) -> dict[str, nn.Module]:
    return {f"{path}.{name}": entry for name, entry in zip(blocks.names, blocks.entries, strict=True)}


Seen = Callable[[tuple[Any, ...], dict[str, Any]], None]


@contextmanager
def calls_seen(block: nn.Module, seen: Seen) -> Iterator[None]:
    """See what every call of a block is given, before it runs; calls within a call are not its own."""
    inside = False

    def handler(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:
            return inner(*args, **kwargs)
        seen(args, kwargs)
        inside = True
        try:
            return inner(*args, **kwargs)
        finally:
            inside = False

    shim = Shim(block, forward_attribute(block), handler, traced=False).install()
    try:
        yield
    finally:
        shim.remove()


def in_order(blocks: dict[str, nn.Module], passes: StepPasses) -> list[str]:
    """Run the step once over all batches, and return the names of the blocks in the order of their first calls.

    Blocks that the step never calls are warned of, and left out.

    Raises:
        MisconfigurationException: It calls none of them.
    """
    order: dict[str, None] = {}

    def note(name: str) -> Seen:
        return lambda args, kwargs: order.setdefault(name)

    with ExitStack() as stack:
        for name, block in blocks.items():
            stack.enter_context(calls_seen(block, note(name)))
        passes.run()
    missed = [name for name in blocks if name not in order]
    if not order:
        raise MisconfigurationException(
            f"The step calls none of the blocks {', '.join(missed)}. Name blocks that it calls with blocks=, or the step "
            "that runs the network with stage=."
        )
    if missed:
        warnings.warn(f"The step never calls {', '.join(missed)}: not calibrated.", stacklevel=3)
    return list(order)
