"""The arguments with which a LightningModule's own test loop calls its network, whatever its batches look like."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_peft.measure.network_calls import NetworkCalls
from lightning_peft.network.labels import labels_of


class NetworkInputs(NetworkCalls):
    """Collects the inputs of the network's first call in every test batch, and the labels of the batch if it has any.

    Labels that a network takes as an argument to compute its loss are left out of its inputs.

    Attributes:
        inputs: Positional arguments as a tuple, or keyword arguments as a dict, on the CPU.
        labels: Class indices of each batch, or ``None``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[tuple[Any, ...] | dict[str, Any]] = []
        self.labels: list[Tensor | None] = []

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take what the network was given.

        Raises:
            MisconfigurationException: It was not called, or in a way that mixes positional and keyword tensors.
        """
        assert self._tap is not None
        if not self._tap.calls:
            raise MisconfigurationException(
                f"The test_step of {type(pl_module).__name__} does not call {self._tap.name or 'its forward'}, so there are no "
                "example inputs. Export from Python: lightning_peft.to_onnx(module, path, example_inputs)."
            )
        found = self._tap.calls[0]
        labels = labels_of(batch)
        keywords = {name: value for name, value in found.kwargs.items() if value is not labels}
        if found.args and keywords:
            raise MisconfigurationException(
                f"{self._tap.name} is called with positional and keyword arguments, and examples can hold only one kind. "
                "Export from Python: lightning_peft.to_onnx(module, path, example_inputs)."
            )
        self.inputs.append(tuple(map(_kept, found.args)) or {name: _kept(value) for name, value in keywords.items()})
        self.labels.append(None if labels is None else labels.cpu())
        self._tap.close()


def _kept(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value
