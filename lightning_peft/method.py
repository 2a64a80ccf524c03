"""Turns a contract into a Lightning callback: construction, and the hooks that go to the hub."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_peft import registry
from lightning_peft.arguments import check_types, whole_signature
from lightning_peft.attaching import method_records
from lightning_peft.attaching.hub import Hub, complete_checkpoint, enter
from lightning_peft.contract import Contract
from lightning_peft.namespaces import inherit_both
from lightning_peft.renewal import Origin


class Method(Contract, Callback):
    """Base of every method: what its author overrides (:class:`~lightning_peft.contract.Contract`), as a Lightning callback.

    Every hook of Lightning goes to the hub, which acts once for all methods.
    """

    _hub: Hub | None = None
    _origin: Origin

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        inherit_both(Method, Callback)
        cls.__signature__ = whole_signature(cls)  # type: ignore[attr-defined]
        registry.define(cls)

    def __new__(cls, *args: Any, **kwargs: Any) -> Method:
        inherit_both(Method, Callback)  # pytorch_lightning may have been imported since the class was
        self = super().__new__(cls)
        taken = inspect.signature(cls)
        try:
            bound = taken.bind_partial(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{cls.__name__}: {error}. It takes {', '.join(taken.parameters)}.") from None
        check_types(cls, bound.arguments)
        self._origin = Origin(dict(bound.arguments))
        bound.apply_defaults()
        self._arguments = dict(bound.arguments)
        return self

    @property
    def given_arguments(self) -> Mapping[str, Any]:
        return self._origin.given

    def state_dict(self) -> dict[str, Any]:
        """Return the versioned state Lightning saves.

        Raises:
            MisconfigurationException: :meth:`state` returned something that could not be loaded again.
        """
        return method_records.state_of(self)

    # Lightning refuses two callbacks of one key when it finds this overridden, before the plan can say which argument helps.
    state_dict.__wrapped__ = Callback.state_dict  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            MisconfigurationException: The state has another version or form; nothing of it is taken over then.
        """
        method_records.restore(self, state_dict, None if self.run is None else self.run.module)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Enter the module's hub."""
        self._hub = enter(trainer, pl_module)

    def on_after_setup(self, fabric: Any, module: nn.Module) -> None:
        """Refuse Fabric, which has no fit to be part of; it calls this when it sets a module up.

        Raises:
            MisconfigurationException: Always.
        """
        raise MisconfigurationException(
            f"{self.name} was given to Fabric, which calls no methods. Give it to lightning.pytorch.Trainer(callbacks=[...]) "
            "and let that run a LightningModule; lightning_peft.functional has the mathematics for loops of your own."
        )

    def _drive(self, event: str, *args: Any) -> None:
        if self._hub is not None and self._hub.driver is self:
            getattr(self._hub, event)(*args)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything is restored: start, so that the sanity check sees what training will."""
        self._drive("start")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything is restored: start."""
        self._drive("start")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note which batch comes."""
        self._drive("begin_batch", batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The gradients of a step are complete."""
        self._drive("before_step", optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log."""
        self._drive("log")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the epoch for every method."""
        self._drive("end_epoch")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what is to be validated."""
        self._drive("start_validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell every method."""
        self._drive("end_validation")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what did not come."""
        self._drive("end_training")

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note which batch comes; before the first, start to adapt."""
        self._drive("begin_evaluation_batch", batch, batch_idx, dataloader_idx)

    on_validation_batch_start = on_predict_batch_start = on_test_batch_start

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log."""
        self._drive("log_evaluation")

    on_validation_batch_end = on_test_batch_end

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make a checkpoint saved after a fit as complete as one saved during it."""
        complete_checkpoint(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module clean."""
        self._leave(failed=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module clean; Lightning does not call ``teardown`` after a failure."""
        self._leave(failed=True)

    def _leave(self, *, failed: bool) -> None:
        hub, self._hub = self._hub, None
        if hub is not None:
            hub.leave(failed=failed)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_hub", "run")}

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}={value!r}" for key, value in self._arguments.items() if value is not None)
        return f"{type(self).__name__}({shown})"
