"""Masks on what growth has added to a network in training, after MSG (Yao et al., ICLR 2024, arXiv 2305.02869).

In width every layer reads new units times ``m``, and normalisations count them by it; in depth a new block becomes
``m * block(x) + (1 - m) * x``. With ``m = 0`` the network computes what it did before it grew, with ``m = 1`` what it computes
without masks, bit for bit. The arithmetic of one layer is that of ``msg``; here are the hooks that put it into a module.

Stream writers are not masked a second time: whoever reads what they write masks it, whether it comes from a layer or from a
parameter of the network's own, such as a position embedding.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.network.layers import is_conv
from lightning_peft.structure.axes import OLD, is_old, size
from lightning_peft.structure.block_names import block_name, numbering_of
from lightning_peft.structure.edits import Edit
from lightning_peft.weights.maps import split_name
from lightning_peft_plugins.growth._layer_growth.depth_operators import new_places
from lightning_peft_plugins.growth._layer_growth.msg import masked_layer_norm, masked_rms_norm


class Masks:
    """The mask of one growth: a number that all hooks of the growth share, on the module and on copies of it.

    Copies made while the masks are on (averages of the weights) carry the same hooks, and so follow :meth:`set`. Pickled copies
    keep the mask they were saved with. Nothing is recorded in the module: after a resume, ``install`` with the edit of the
    journal and the mask of the step gives the same function.

    Example:
        >>> from lightning_peft.structure import depth
        >>> net = nn.Sequential(nn.Linear(1, 1))
        >>> edit = depth.blocks_edit(nn.Sequential(net), "0", [0, 0])
        >>> outer = nn.Sequential(net)
        >>> _ = depth.set_blocks(outer, edit)
        >>> masks = Masks.install(outer, edit)
        >>> bool(outer(torch.ones(1)) == net[0](torch.ones(1)))
        True
        >>> masks.set(1.0)
        >>> masks.remove()
    """

    def __init__(self, module: nn.Module, edit: Edit, value: float) -> None:
        self._module: weakref.ref[nn.Module] | None = weakref.ref(module)
        self._axes = {label: list(pair) for label, pair in edit.get("axes", {}).items()}
        self._held: dict[torch.device, dict[str, Tensor]] = {}
        self.set(value)

    @classmethod
    def install(cls, module: nn.Module, edit: Edit, value: float = 0.0, later: Sequence[Edit] = ()) -> Masks:
        """Put masks on a module that has gone through an edit.

        Args:
            module: The module.
            edit: The edit, of either kind.
            value: The mask.
            later: Edits the module has gone through since, for instance the rest of its journal. Blocks they moved and copied
                carry the masks that moves and copies of masked blocks would have.

        Returns:
            The handle.

        Raises:
            MisconfigurationException: Something new could not be masked; no hook is left then.
        """
        masks = cls(module, edit, value)
        find = _block_hooks if edit["op"] == "blocks" else _unit_hooks
        # By identity: one layer may have several names.
        hooks = {id(layer): (layer, hook) for layer, hook in find(masks, module, edit, later)}
        for layer, hook in hooks.values():
            hook.attach(layer)
        for device in {parameter.device for parameter in module.parameters()}:
            masks.held(device)
        return masks

    @property
    def value(self) -> float:
        """The mask of new units and blocks."""
        return self._value

    def set(self, value: float) -> None:
        """Change the mask, between two optimizer steps.

        Args:
            value: In [0, 1], see :func:`lightning_peft_plugins.growth._layer_growth.msg.mask_at`.
        """
        if not 0.0 <= value <= 1.0:
            raise MisconfigurationException(f"A mask lies between 0 and 1; {value} does not.")
        self._value = float(value)
        # Hooks read this flag and a tensor, never the number, for which compiled code would be made anew at every step.
        self.full = self._value == 1.0
        with torch.inference_mode(False), torch.no_grad():
            for tensors in self._held.values():
                tensors[""].fill_(self._value)

    def remove(self) -> None:
        """Take the masks off the module; on copies that were made of it they become 1 and do nothing.

        Unless the mask is 1 this changes what the network computes.
        """
        self.set(1.0)
        module = None if self._module is None else self._module()
        for layer in () if module is None else module.modules():
            _remove(layer, self)

    def held(self, device: torch.device) -> dict[str, Tensor]:
        """The mask on a device, under ``""``, and which units are old, by the product of axes."""
        if device not in self._held:
            # Evaluation may be the first to come here; what is made in inference mode could not be trained with.
            with torch.inference_mode(False), torch.no_grad():
                self._held[device] = {"": torch.tensor(self._value, device=device)}
        return self._held[device]

    def units(self, dim: str, device: torch.device) -> Tensor:
        """The mask of every coordinate of a dimension, shape ``(size,)``."""
        held = self.held(device)
        if dim not in held:
            with torch.inference_mode(False):
                held[dim] = is_old(dim, self._axes).to(device)
        return torch.where(held[dim], 1.0, held[""])

    def __deepcopy__(self, memo: dict[int, Any]) -> Masks:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_held": {}, "_module": None}


class _Hook:
    """A hook of a growth. It knows the layer by being called with it, so a copied layer can keep it."""

    def __init__(self, masks: Masks) -> None:
        self.masks = masks

    def attach(self, layer: nn.Module) -> None:
        layer.register_forward_hook(self, with_kwargs=True)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return self


class _Reader(_Hook):
    """A layer reads new units times the mask."""

    def __init__(self, masks: Masks, dim: str, trailing: int) -> None:
        super().__init__(masks)
        self.dim = dim
        self.shape = (-1, *(1,) * trailing)  # a convolution has its channels before the dimensions of space

    def attach(self, layer: nn.Module) -> None:
        layer.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> Any:
        if self.masks.full:
            return None
        x = _first(args, kwargs)
        masked = x * self.masks.units(self.dim, x.device).to(x.dtype).view(self.shape)
        return ((masked, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): masked})


class _Norm(_Hook):
    """A normalisation counts units by their mask, in single precision at least, as the norms themselves do."""

    def __init__(self, masks: Masks, norm: Mapping[str, Any]) -> None:
        super().__init__(masks)
        self.dim, self.rms, self.eps = norm["dim"], norm["kind"] == "rms", norm.get("eps", ["eps"])[0]
        self.offset = norm.get("offset", 0.0)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        if self.masks.full:
            return None
        x = _first(args, kwargs)
        return self.masked(layer, x, self.masks.units(self.dim, x.device)).to(output.dtype)

    def masked(self, layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        weight, bias, eps = (getattr(layer, name, None) for name in ("weight", "bias", self.eps))
        weight = weight + self.offset if self.offset else weight
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        return masked_rms_norm(x, mask, weight, eps) if self.rms else masked_layer_norm(x, mask, weight, bias, eps)

    def check(self, layer: nn.Module, path: str, like: Tensor) -> None:
        """Refuse a layer that computes something else than this hook does without a mask.

        Args:
            layer: The layer.
            path: Its name.
            like: Has the dtype and device that the layer works in, and as many coordinates.

        Raises:
            MisconfigurationException: It does.
        """
        tolerance = 0.05 if like.dtype.itemsize < 4 else 1e-3
        try:
            if list(layer.buffers()):
                raise TypeError("it keeps statistics")
            with torch.inference_mode(False), torch.no_grad():
                x = torch.arange(2 * len(like), device=like.device).sin().view(2, 1, -1).to(like.dtype)
                plain, own = layer.forward(x), self.masked(layer, x, torch.ones_like(like))
            torch.testing.assert_close(own.to(plain.dtype), plain, rtol=tolerance, atol=tolerance)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            kind = "RMSNorm" if self.rms else "LayerNorm"
            raise MisconfigurationException(
                f"{path} ({type(layer).__name__}) does not compute what a {kind} over its last dimension does, so new units "
                "cannot be masked in it. Grow this network with another operator."
            ) from error


class _Block(_Hook):
    """A new block grows from the identity."""

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.masks.full:
            return None
        x, out = _first(args, kwargs), output[0] if isinstance(output, tuple) else output
        if not isinstance(x, Tensor) or not isinstance(out, Tensor) or x.shape != out.shape:
            found, given = (tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in (out, x))
            raise MisconfigurationException(
                f"A new {type(layer).__name__} returns {found} for {given}; only a block that keeps the shape of its first "
                "input can grow from the identity. Use another operator."
            )
        mask = self.masks.held(x.device)[""]
        mixed = mask * out + (1.0 - mask) * x
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def layers_now(module: nn.Module, path: str, later: Sequence[Edit]) -> Iterator[tuple[str, nn.Module]]:
    """Layers that stem from one called ``path`` before later edits, with their names."""
    paths = [path]
    for edit in later:
        paths = [now for path in paths for now in _names_after(path, edit)]
    return ((path, module.get_submodule(path)) for path in paths)


def _names_after(path: str, edit: Edit) -> list[str]:
    start = f"{edit['path']}."
    if edit["op"] != "blocks" or not path.startswith(start):
        return [path]
    name, dot, rest = path.removeprefix(start).partition(".")
    number = numbering_of(edit).place(name)
    source = edit["tied"][number] if "tied" in edit else number
    return [f"{block_name(edit, place)}{dot}{rest}" for place, old in enumerate(edit["sources"]) if old == source]


def _block_hooks(masks: Masks, module: nn.Module, edit: Edit, later: Sequence[Edit]) -> Iterator[tuple[nn.Module, _Hook]]:
    if edit.get("shared"):
        raise MisconfigurationException(f"New blocks of {edit['path']} are the old ones, which cannot be masked apart.")
    for place in new_places(edit["sources"]):
        for _, layer in layers_now(module, block_name(edit, place), later):
            yield layer, _Block(masks)


def _unit_hooks(masks: Masks, module: nn.Module, edit: Edit, later: Sequence[Edit]) -> Iterator[tuple[nn.Module, _Hook]]:
    _check_readers(module, edit, later)
    for path, dim in edit["inputs"].items():
        for now, layer in layers_now(module, path, later) if _grows(dim, edit) else ():
            _check_free(layer, now)
            yield layer, _Reader(masks, dim, layer.weight.ndim - 2 if is_conv(layer) else 0)
    like = next(iter(module.parameters()))
    for path, norm in edit["norms"].items():
        for now, layer in layers_now(module, path, later) if _grows(norm["dim"], edit) else ():
            hook = _Norm(masks, norm)
            hook.check(layer, now, like.new_empty(size(norm["dim"], edit["axes"])))
            yield layer, hook


def _grows(dim: str, edit: Edit) -> bool:
    return size(dim, edit["axes"], OLD) != size(dim, edit["axes"])


def _check_readers(module: nn.Module, edit: Edit, later: Sequence[Edit]) -> None:
    """Refuse weights that are applied without a call of their layer, which no hook would notice."""
    for name, entry in edit["tensors"].items():
        place = entry["input"]
        if place is None or entry["from"][place] == entry["to"][place]:
            continue
        path = split_name(name)[0]
        parents = [layer for _, layer in layers_now(module, split_name(path)[0], later)]
        if path not in edit["inputs"] or any(isinstance(parent, nn.MultiheadAttention) for parent in parents):
            raise MisconfigurationException(
                f"{name} reads new units without a layer of its own being called, so they cannot be masked. Grow this network "
                "with another operator."
            )


def _check_free(layer: nn.Module, path: str) -> None:
    """Refuse a layer under the masks of an earlier growth, whose units have another number now."""
    if any(isinstance(hook, _Reader) and not hook.masks.full for hook in layer._forward_pre_hooks.values()):
        raise MisconfigurationException(
            f"{path} has grown again before the masks of its last growth were at 1. Leave more steps between the two."
        )


def _remove(layer: nn.Module, masks: Masks) -> None:
    for hooks, flags in (
        (layer._forward_hooks, layer._forward_hooks_with_kwargs),
        (layer._forward_pre_hooks, layer._forward_pre_hooks_with_kwargs),
    ):
        for key, hook in list(hooks.items()):
            if isinstance(hook, _Hook) and hook.masks is masks:
                del hooks[key]
                flags.pop(key, None)
