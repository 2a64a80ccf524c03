"""RandLoRA in folders of PEFT: diagonals, and the random matrices that all weights cut theirs from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_peft.deltas.form import Form
from lightning_peft.deltas.peft_format import (
    Adapted,
    PeftFormat,
    Saved,
    Target,
    check_linear,
    check_rank,
    check_shapes,
    number,
    one_rank,
)
from lightning_peft_plugins.deltas.randlora import ScaledBasesForm

_A, _B, _INNER, _OUTER = "randlora_A", "randlora_B", "randlora_lambda", "randlora_gamma"


class RandLoraFormat(PeftFormat):
    """``randlora_lambda`` and ``randlora_gamma`` of each layer, ``randlora_A`` and ``randlora_B`` of all, or their seed."""

    peft_type = "RANDLORA"
    owner = "RandLoRA"
    beginning = "randlora_"
    tensors = (frozenset({_INNER, _OUTER}),)
    shared = frozenset({_A, _B})
    settings = frozenset({"r", "randlora_alpha", "projection_prng_key", "save_projection", "sparse", "very_sparse"})
    past = frozenset({"init_weights"})
    dropout = "randlora_dropout"

    def forms(self, targets: Sequence[Target], saved: Saved) -> list[Form | None]:
        first = saved.layers[targets[0].name][_INNER]
        rank = len(first) if first.ndim else 0
        for target in targets:
            check_rank(target, rank)
            smaller = target.layout.largest_rank
            products = math.ceil(smaller / rank)
            check_shapes(target, saved.layers[target.name], {_INNER: (rank, products), _OUTER: (products, smaller)})
        if number(saved.config, "r") != rank:
            raise MisconfigurationException(f"The adapter's r is {saved.config['r']}, and its tensors have the rank {rank}.")
        small, large = _bases(targets, saved, rank)
        scale = number(saved.config, "randlora_alpha") / rank
        return [_form(target, saved.layers[target.name], scale, small, large) for target in targets]

    def written(self, adapted: Sequence[Adapted]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        check_linear(adapted, self.owner, transposed=True)
        rank, scale = one_rank(adapted), adapted[0].form.scale
        small = max((each.form.small for each in adapted), key=lambda values: values.shape[-1])
        large = max((_cube(each.form) for each in adapted), key=lambda values: values.numel())
        tensors = {_A: small, _B: large}
        for each in adapted:
            form, cube = each.form, _cube(each.form)
            rows, products = cube.shape[:2]
            whole = rows <= large.shape[0] and products <= large.shape[1]
            if not (
                whole
                and torch.equal(form.small, small[..., : form.small.shape[-1]])
                and torch.equal(cube, large[:rows, :products])
            ):
                raise MisconfigurationException(
                    f"PEFT cuts the random matrices of all weights from one pair, and those of {each.name} are others: they "
                    "were drawn for its shape. Train on weights of one shape, or write it as a LoRA: own=False."
                )
            tensors[f"{each.name}.{_INNER}"] = form.inner * (form.share * form.scale / scale)
            tensors[f"{each.name}.{_OUTER}"] = form.outer
            # PEFT names the pair under each layer as well, and warns of a file that does not
            tensors |= {f"{each.name}.{_A}": small, f"{each.name}.{_B}": large}
        transposed = any(each.form.layout.transposed for each in adapted)
        return tensors, {"r": rank, "randlora_alpha": scale * rank, "fan_in_fan_out": transposed}


def _cube(form: ScaledBasesForm) -> Tensor:
    """Every ``B_k`` of a form, shape ``(larger side, products, rank)``."""
    return form.large.view(len(form.large), -1, form.rank)


def _form(target: Target, tensors: Mapping[str, Tensor], scale: float, small: Tensor, large: Tensor) -> ScaledBasesForm:
    rank, products = tensors[_INNER].shape
    smaller, larger = sorted(target.layout.matrix_shape)
    form = ScaledBasesForm(target.layout, rank, scale, given=True)
    form.set_bases(small[..., :smaller], large[:larger, :products].reshape(larger, -1))
    with torch.no_grad():
        form.inner.copy_(tensors[_INNER])
        form.outer.copy_(tensors[_OUTER])
    return form


def _bases(targets: Sequence[Target], saved: Saved, rank: int) -> tuple[Tensor, Tensor]:
    """``A``, shape ``(rank, 1, smaller side)``, and ``B``, ``(larger side, products, rank)``, large enough for every layer."""
    outputs, inputs = (max(target.layout.matrix_shape[side] for target in targets) for side in (0, 1))
    smaller, larger = sorted((outputs, inputs))
    products = math.ceil(smaller / rank)
    if not saved.shared.keys() >= {_A, _B}:
        return _drawn(saved, rank, products, smaller, larger)
    small, large = (saved.shared[key] for key in (_A, _B))
    least = max(target.layout.largest_rank for target in targets)
    if not (
        (small.ndim, large.ndim) == (3, 3)
        and small.shape[:2] == (rank, 1)
        and large.shape[2] == rank
        and small.shape[2] >= least
        and len(large) >= larger
        and large.shape[1] >= math.ceil(least / rank)
    ):
        raise MisconfigurationException(
            f"The adapter's random matrices have shapes {tuple(small.shape)} and {tuple(large.shape)}; for these layers they "
            f"would be {(rank, 1, smaller)} and {(larger, products, rank)} or larger. It was trained beside another network."
        )
    return small, large


def _drawn(saved: Saved, rank: int, products: int, smaller: int, larger: int) -> tuple[Tensor, Tensor]:
    """The random matrices as PEFT draws them where a file has none: in bfloat16, from the seed that it names."""
    seed, config = saved.config.get("projection_prng_key", 0), saved.config
    if config.get("save_projection", True) or config.get("sparse") or config.get("very_sparse"):
        raise MisconfigurationException(
            f"{saved.path} lacks randlora_A or randlora_B. It was not written to the end, or is sparse: save it again with "
            "save_projection=True."
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise MisconfigurationException(f"projection_prng_key of {saved.path} is {seed!r}, no seed. Save it again.")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)

    small = draw(rank, 1, smaller)
    large = torch.cat([draw(larger, 1, rank) for _ in range(products)], 1)
    return (small / small.std()).float(), (large / large.std()).float()
