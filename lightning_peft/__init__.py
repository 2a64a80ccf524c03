"""Published training methods as callbacks for any LightningModule: compose them, resume them, bake the result.

Methods are imported from their plugin on first use: ``from lightning_peft import NMSparsity``. ``from lightning_peft import *``
brings all of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Lane": "compose.lanes",
    "LayerPart": "weights.layer_part",
    "Loss": "compose.loss",
    "MergeAtEnd": "merging.merge_at_end",
    "LowRank": "deltas.slots",
    "Method": "method",
    "Resource": "compose.lanes",
    "Run": "compose.run",
    "Schedule": "compose.schedule",
    "Step": "compose.loss",
    "StepClosure": "compose.step_closure",
    "WeightMap": "weights.maps",
    "WrappedOptimizer": "optim.wrapped",
    "apply_terms": "attaching.hub",
    "attach": "attaching.hub",
    "bake": "baking.bake",
    "bake_checkpoint": "baking.bake",
    "blend": "deltas.blend",
    "calibrate": "calibration.calibrate",
    "compare_deployments": "report.compare_deployments",
    "greedy_soup": "merging.greedy",
    "load_baked": "baking.baked_folder",
    "load_from_checkpoint": "baking.bake",
    "load_peft": "deltas.peft_folder",
    "match_weights": "merging.weight_matching",
    "merge": "merging.merge",
    "merge_function": "merging.merge_function",
    "plan": "attaching.plan",
    "save_baked": "baking.baked_folder",
    "save_peft": "deltas.peft_folder",
    "switch": "weights.switch",
    "semi_structured": "baking.semi_structured",
    "to_exported": "baking.portable",
    "to_onnx": "baking.portable",
    "split_low_rank": "baking.split_low_rank",
    "unmerge": "weights.merge",
}
_SUBPACKAGES = ("functional", "registry", "shifts", "testing")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"lightning_peft.{_HOMES[name]}"), name)
    elif name in _SUBPACKAGES:
        value = import_module(f"lightning_peft.{name}")
    elif name == "__all__":
        return _all()
    elif name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    else:
        from lightning_peft import registry

        entries = registry.installed()
        if name not in entries:
            hint = registry.suggest(name, [*entries, *_HOMES, *_SUBPACKAGES])
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{hint}")
        value = entries[name].load()
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from lightning_peft import registry

    return sorted({"__version__", *_HOMES, *_SUBPACKAGES, *registry.installed()})


def _all() -> list[str]:
    """Names that ``from lightning_peft import *`` brings: functions, classes and every method that can be imported."""
    import warnings

    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from lightning_peft import registry

    names = list(_HOMES)
    for name, entry in registry.installed().items():
        try:
            entry.load()
        except MisconfigurationException as error:
            warnings.warn(str(error), stacklevel=3)
        else:
            names.append(name)
    return names
