"""Whether the layers that methods were attached to are those that are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft.compose.run import Run
from lightning_peft.weights.detach import attachments


def convert(run: Run, inner: Callable[[Any], Any], module: Any) -> Any:
    """Convert a module to the precision of a fit, and refuse a plugin that replaces layers, as those for 8 and 4 bits do.

    Args:
        run: The run.
        inner: ``convert_module`` of the Trainer's precision plugin.
        module: What the strategy gives it.

    Raises:
        MisconfigurationException: What was attached went with a layer, or its successor is not frozen.
    """
    attached = attachments(run.module)
    frozen = {name for name, parameter in run.module.named_parameters() if parameter in run.frozen}
    converted = inner(module)
    lost = {each.method for each in set(attached).difference(attachments(run.module))}
    thawed = [name for name, parameter in run.module.named_parameters() if name in frozen and parameter.requires_grad]
    if lost or thawed:
        what = f"those that {', '.join(sorted(lost))} acts on" if lost else f"that of {thawed[0]}, which is frozen,"
        raise MisconfigurationException(
            f"{type(run.trainer.precision_plugin).__name__} puts layers of its own in the place of the module's, {what} among "
            "them, so the methods would be lost. Train with precision='bf16-mixed' or 'bf16-true', or with a plugin that "
            "leaves layers in place."
        )
    return converted
