"""Finding the format of a folder, or of a form: LoRA's own, and those that plugins bring."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from lightning_peft.deltas.peft_format import PeftFormat
from lightning_peft.deltas.peft_lora import LoraFormat

GROUP = "lightning_peft.peft_formats"


def format_named(name: str) -> PeftFormat:
    """Return the format of a name.

    Raises:
        LookupError: There is none.
    """
    if name == LoraFormat.peft_type:
        return LoraFormat()
    made: PeftFormat = {point.name: point for point in entry_points(group=GROUP)}[name].load()()
    return made


def format_of(config: Mapping[str, Any]) -> PeftFormat | None:
    """Return the format of a folder by its configuration: a variant that is switched on before the plain type."""
    peft_type = config.get("peft_type")
    names = known()
    for name in names:
        base, _, variant = name.partition(".")
        if variant and base == peft_type and _switched_on(config, variant):
            return format_named(name)
    return format_named(peft_type) if peft_type in names and "." not in peft_type else None


def known() -> list[str]:
    """Names of all formats.

    Example:
        >>> "LORA" in known()
        True
    """
    return [LoraFormat.peft_type, *sorted({point.name for point in entry_points(group=GROUP)})]


def _switched_on(config: Mapping[str, Any], variant: str) -> bool:
    return config.get(variant) not in (None, False) or any(
        isinstance(value, str) and value.lower() == variant for key, value in config.items() if key.startswith("init_")
    )
