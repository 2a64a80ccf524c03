"""How a network is made of axes (the residual stream, heads, hidden units), declared layer by layer.

The axis ``"width"`` is the residual stream; how a dimension is written as a product of axes stands in ``axes``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Layer:
    """A linear layer, convolution or embedding.

    Attributes:
        input: Product of axes it reads; ``""`` does not grow.
        output: Product of axes it writes.
        root: Number of the layer, attribute or buffer, that what it writes is multiplied by: the root of the size it writes.
            A class may multiply beside the layer instead, and the layer then has no such number.
    """

    input: str = ""
    output: str = ""
    root: str = ""


@dataclass(frozen=True)
class Norm:
    """A layer normalisation or RMS normalisation.

    Attributes:
        dim: What it normalises.
        post: Whether its output is added to: the stream of post-LN networks.
        before: Layer that alone reads it and whose weight may be tied to an embedding.
        of: Sibling layer whose output alone it normalises, where that is not the stream: queries or keys.
        offset: What it adds to its weight: Gemma stores factors less 1.
    """

    dim: str = "width"
    post: bool = False
    before: str = ""
    of: str = ""
    offset: float = 0.0


@dataclass(frozen=True)
class Scale:
    """Learnt factors on what the sibling layer ``of`` adds to the stream (LayerScale)."""

    of: str
    dim: str = "width"


@dataclass(frozen=True)
class WidthMap:
    """How a network is made of axes. Patterns are those of ``fnmatch``, relative to the network; the first that fits counts.

    Attributes:
        sizes: Units of every axis now. ``"head_dim"`` never changes.
        layers: By pattern on the qualified name of a layer; ``None`` keeps the layer as it is.
        tensors: Parameters and buffers outside such layers: one product for each dimension they write, or a :class:`Layer` for
            a weight or bias that is no layer of its own; ``None`` keeps the tensor.
        attributes: Numbers that modules note, by pattern on their name, as products of axes, or as the root of one:
            ``"root width"``. What ``torch``'s own layers and ``Conv1D`` note follows from ``layers``.
        config: The same for the network's configuration.
        eps_config: Key of the configuration that holds the epsilon of the norms.
        demand: What the class demands of attention: ``"span"``, heads that span the width (``heads * head_dim == width``), or
            ``"divide"``, a width that divides by their number.
    """

    sizes: Mapping[str, int]
    layers: Mapping[str, Layer | Norm | Scale | None]
    tensors: Mapping[str, Sequence[str] | Layer | None] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    config: Mapping[str, str] = field(default_factory=dict)
    eps_config: str = ""
    demand: Literal["", "span", "divide"] = ""
