"""The kind of a layer, told without importing the library that defines it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_peft.network.plain_class import plain_class

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
_HEAD_NAMES = ("classifier", "score", "lm_head", "qa_outputs")


def own_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Name to stored tensor of the module's own parameters; parametrized ones under their public name."""
    own: dict[str, Tensor] = {name: p for name, p in module._parameters.items() if p is not None}
    if parametrize.is_parametrized(module):
        for name, maps in module.parametrizations.items():  # type: ignore[union-attr,operator]
            own[name] = maps.original if hasattr(maps, "original") else maps.original0
    return own


def parameter_names(layers: Mapping[str, nn.Module]) -> list[str]:
    """Qualified names of the parameters that named layers hold themselves.

    Example:
        >>> parameter_names({"net.fc": nn.Linear(2, 1), "": nn.LayerNorm(2)})
        ['net.fc.weight', 'net.fc.bias', 'weight', 'bias']
    """
    return [f"{name}.{key}" if name else key for name, layer in layers.items() for key in own_parameters(layer)]


def loose_matrices(model: nn.Module) -> list[str]:
    """Weight matrices that no linear layer, convolution or embedding holds: of ``nn.MultiheadAttention``, LSTMs, expert stacks.

    Example:
        >>> loose_matrices(nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2)))
        ['1.in_proj_weight']
    """
    found = []
    for path, module in model.named_modules():
        if is_weight(module) or isinstance(module, (nn.Embedding, nn.ParameterList)):
            continue
        for name, tensor in own_parameters(module).items():
            if tensor.ndim > 1 and tensor.shape[0] > 1 and ("weight" in name or tensor.ndim > 2):
                found.append(f"{path}.{name}".removeprefix("."))
    return found


def is_linear(module: nn.Module) -> bool:
    """``nn.Linear`` or the transposed one of transformers, ``Conv1D`` (GPT-2)."""
    return isinstance(module, nn.Linear) or (has_class(module, "Conv1D") and hasattr(module, "nf"))


def is_conv(module: nn.Module) -> bool:
    """A convolution over one to three dimensions, transposed ones apart."""
    return isinstance(module, _CONVS)


def is_weight(module: nn.Module) -> bool:
    """A linear layer or a convolution."""
    return is_linear(module) or is_conv(module)


def is_depthwise(module: nn.Module) -> bool:
    """A convolution with more than one group."""
    return isinstance(module, _CONVS) and module.groups > 1


def is_pointwise(module: nn.Module) -> bool:
    """A convolution that mixes all channels of one position."""
    return isinstance(module, _CONVS) and module.groups == 1 and all(size == 1 for size in module.kernel_size)


def is_norm(module: nn.Module) -> bool:
    """A normalisation layer with an affine weight of one dimension: torch's, timm's, Hugging Face's, RMSNorm included."""
    weight = own_parameters(module).get("weight")
    return weight is not None and weight.ndim == 1 and (isinstance(module, _NORMS) or "Norm" in public_class(module))


def has_class(module: nn.Module, name: str) -> bool:
    """Whether the module's class or one of its bases has that name."""
    return any(base.__name__ == name for base in type(module).__mro__)


def heads(modules: Collection[nn.Module]) -> list[nn.Module]:
    """Output layers: what the model declares (timm, Hugging Face, torchvision), else its last Linear."""
    declared = [head for module in modules for head in _declared_heads(module)]
    layers = [[layer for layer in head.modules() if layer in modules and is_weight(layer)] for head in declared]
    last = [found[-1] for found in layers if found]  # of an MLP head only the projection to the logits
    return last or [module for module in modules if is_linear(module)][-1:]


def _declared_heads(module: nn.Module) -> Iterator[nn.Module]:
    for getter in ("get_classifier", "get_output_embeddings"):
        method = getattr(module, getter, None)
        head = method() if callable(method) else None
        for part in head if isinstance(head, (tuple, list)) else [head]:
            if isinstance(part, nn.Module):
                yield part
    for name in _HEAD_NAMES:
        child = module._modules.get(name)
        if child is not None:
            yield child


def public_class(module: nn.Module) -> str:
    """Class name without the subclass that weight maps or ``parametrize`` make."""
    return plain_class(module).__name__
