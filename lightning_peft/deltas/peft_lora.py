"""LoRA and DoRA in folders of PEFT: any product of two thin matrices."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.deltas.decomposed_form import DecomposedForm
from lightning_peft.deltas.low_rank_form import LowRankForm
from lightning_peft.deltas.peft_format import Adapted, PeftFormat, Saved, Target, check_rank, is_number

DOWN, UP, LENGTHS = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
_TABLE_UP, _TABLE_DOWN = "lora_embedding_A", "lora_embedding_B"  # PEFT keeps the transposed of an embedding's factors
_OTHER_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


class LoraFormat(PeftFormat):
    """``lora_A``, ``lora_B``, and for DoRA the lengths of the rows."""

    peft_type = "LORA"
    owner = "LoRA"
    beginning = "lora_"
    tensors = (frozenset({DOWN, UP}), frozenset({_TABLE_UP, _TABLE_DOWN}))
    settings = frozenset({"r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights"})
    past = frozenset(
        {
            "megatron_config",
            "megatron_core",
            "loftq_config",
            "eva_config",
            "corda_config",
            "lora_ga_config",
            "qalora_group_size",
        }
    )
    dropout = "lora_dropout"
    kind = LowRankForm

    def complete(self, config: Mapping[str, Any]) -> Collection[frozenset[str]]:
        return [each | {LENGTHS} for each in self.tensors] if config.get("use_dora") else self.tensors

    def check(self, saved: Saved) -> None:
        init = saved.config.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_OTHER_BASE):
            raise MisconfigurationException(
                f"{saved.path} was initialised as {init!r}, which changes the base, and the changed base cannot be found again "
                "from the folder alone. Convert it where it was trained: save_pretrained(..., "
                "path_initial_model_for_weight_conversion=...) of PEFT; for 'loftq', merge it there."
            )

    def form(self, target: Target, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowRankForm:
        if _TABLE_UP in tensors:
            down, up = tensors[_TABLE_DOWN].T, tensors[_TABLE_UP].T
        else:
            down, up = tensors[DOWN], tensors[UP]
        rank = up.shape[1] if up.ndim > 1 else 0
        check_rank(target, rank)
        kind = DecomposedForm if config.get("use_dora") else self.kind
        scale = _alpha(config, target.name, rank) / (rank**0.5 if config.get("use_rslora") else rank)
        form = kind(target.layout, rank, scale, table=isinstance(target.layer, nn.Embedding))
        up = up.reshape(up.shape[:2])
        if (down.shape, up.shape) != (form.down.shape, form.up.shape):
            raise MisconfigurationException(
                f"The adapter's factors of {target.name!r} have shapes {tuple(down.shape)} and {tuple(up.shape)}; the layer's "
                f"would be {tuple(form.down.shape)} and {tuple(form.up.shape)}. It was trained beside another network."
            )
        with torch.no_grad():
            form.down.copy_(down)
            form.up.copy_(up)
            if isinstance(form, DecomposedForm):
                form.magnitude.copy_(_lengths(target, tensors[LENGTHS], form))
        return form

    def factors(self, form: Any) -> tuple[Tensor, Tensor]:
        """The factors that are written, without the scale."""
        down, up = form.written_factors()
        return down, up

    def written(self, adapted: Sequence[Adapted]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        ranks, alphas = {}, {}
        for each in adapted:
            down, up = self.factors(each.form)
            tensors |= _named(each, down, up)
            ranks[each.name], alphas[each.name] = len(down), each.form.scale * each.form.share * len(down)
        first = adapted[0].name
        return tensors, {
            "r": ranks[first],
            "lora_alpha": alphas[first],
            "rank_pattern": _patterns(ranks, ranks[first]),
            "alpha_pattern": _patterns(alphas, alphas[first]),
            "use_rslora": False,
            "use_dora": any(isinstance(each.form, DecomposedForm) for each in adapted),
            "init_lora_weights": True,
            "fan_in_fan_out": any(each.form.layout.transposed for each in adapted),
        }


def _named(each: Adapted, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """The factors of a layer as PEFT names and shapes them."""
    shape = each.form.layout.input_shape
    kernel = (1,) * (len(shape) - 1)
    if isinstance(each.layer, nn.Embedding):
        return {f"{each.name}.{_TABLE_UP}": up.T, f"{each.name}.{_TABLE_DOWN}": down.T}
    found = {
        f"{each.name}.{DOWN}": down.reshape(-1, *shape),
        f"{each.name}.{UP}": up.reshape(*up.shape, *kernel),
    }
    if isinstance(each.form, DecomposedForm):  # for a convolution PEFT keeps them in the shape of the output
        lengths = each.form.magnitude
        found[f"{each.name}.{LENGTHS}"] = lengths.view(1, -1, *kernel) if kernel else lengths
    return found


def _lengths(target: Target, lengths: Tensor, form: DecomposedForm) -> Tensor:
    if lengths.numel() != form.magnitude.numel():
        raise MisconfigurationException(
            f"The adapter holds {lengths.numel()} lengths of rows for {target.name!r}, which has {form.magnitude.numel()}. It "
            "was trained beside another network."
        )
    return lengths.flatten()


def _alpha(config: Mapping[str, Any], name: str, rank: int) -> float:
    """The numerator of a layer's scale."""
    alpha = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", rank))
    if not is_number(alpha) or not alpha:
        raise MisconfigurationException(
            f"The adapter's alpha for {name!r} is {str(alpha)[:30]!r}, not a number. Save it again."
        )
    return float(alpha)


def _pattern(patterns: Any, name: str, otherwise: Any) -> Any:
    """The value of the first pattern that a name ends with, as PEFT looks it up; ``^`` says that it is the whole name.

    PEFT takes them for regular expressions. One from a file could run for ever, so that only names are read.
    """
    for key, value in (patterns if isinstance(patterns, dict) else {}).items():
        plain = re.sub(r"\\(\W)", r"\1", key.removeprefix("^"))
        if re.search(r"[\\*+?()\[\]{}|$]", plain):
            raise MisconfigurationException(
                f"The adapter's alpha_pattern has the regular expression {key!r}, and this library reads names. Write the "
                "names of the layers in adapter_config.json instead."
            )
        if name == plain or (not key.startswith("^") and name.endswith(f".{plain}")):
            return value
    return otherwise


def _patterns(values: Mapping[str, float], otherwise: float) -> dict[str, float]:
    """The values that are not the common one, by patterns that fit no other layer."""
    return {_alone(name, values): value for name, value in values.items() if value != otherwise}


def _alone(name: str, names: Iterable[str]) -> str:
    inner = any(other.endswith(f".{name}") for other in names)
    return f"^{re.escape(name)}" if inner else name
