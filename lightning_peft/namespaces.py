"""Lightning under both of its names: ``lightning.pytorch`` and ``pytorch_lightning``, two copies of one code.

A class of one copy is not that of the other, so whoever asks for a class of Lightning with ``isinstance`` asks for
:func:`both`. The other package is never imported here: before its user has done that, there is no object of its classes.
"""

from __future__ import annotations

import sys
from typing import Any, TypeVar

ClassT = TypeVar("ClassT", bound=type)


def both(*classes: ClassT) -> tuple[ClassT, ...]:
    """Return classes of ``lightning.pytorch`` and, when ``pytorch_lightning`` is imported, the same ones of that.

    Example:
        >>> from lightning.pytorch import Callback, LightningModule
        >>> isinstance(LightningModule(), both(LightningModule)), isinstance(LightningModule(), both(Callback))
        (True, False)
    """
    twins = (_twin(cls) for cls in classes)
    return (*classes, *(twin for twin in twins if twin is not None))


def own(cls: ClassT, instance: object) -> ClassT:
    """Return the one of :func:`both` that an object is an instance of; the given one when it is neither's.

    Example:
        >>> from lightning.pytorch import LightningModule
        >>> own(LightningModule, LightningModule()) is LightningModule
        True
    """
    return next((found for found in both(cls) if isinstance(instance, found)), cls)


def inherit_both(cls: type, base: type) -> None:
    """Let a subclass of a class of ``lightning.pytorch`` inherit from the same one of ``pytorch_lightning`` too.

    To be called again whenever the user may have imported that package since.
    """
    lacking = tuple(found for found in both(base) if not issubclass(cls, found))
    if lacking:  # assigning makes Python forget what it has looked up in every subclass, which costs a millisecond
        cls.__bases__ += lacking


def _twin(cls: Any) -> Any:
    module = sys.modules.get(cls.__module__.replace("lightning.pytorch", "pytorch_lightning", 1))
    twin = getattr(module, cls.__name__, None)
    return None if twin is cls else twin
