"""A look at a module in the middle of its training: what it computes, and what its copies and pickles are."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

import lightning_peft
from lightning_peft.testing.trace import difference, trace
from lightning_peft.weights.maps import plain_name


class Probe(Callback):
    """Copies, bakes and pickles the module in the middle of its training, and keeps what each computes.

    Attributes:
        live: What the module computes on the batch at hand, ``(batch, classes)``.
        copied: What its deep copy computes.
        baked: What that copy computes once it is baked.
        baked_shape: What tells that the baked copy is an ordinary module.
        independent: Whether the copy shares no parameter with the module.
        misplaced: The first parameter that has another place than in the baked copy, if any has.
        pickled: By route, what is wrong with the module that comes back from a pickle; ``None`` where nothing is.
        validated: What the module answered to the first batch of each validation.
    """

    live: Tensor
    copied: Tensor
    baked: Tensor
    baked_shape: dict[str, Any]
    independent = False
    misplaced: str | None
    pickled: dict[str, str | None]

    def __init__(self, step: int = 6) -> None:
        self.step = step
        self.validated: list[Tensor] = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and not trainer.sanity_checking:
            with torch.no_grad():
                self.validated.append(pl_module.logits(batch[0]).clone())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self.step:
            return
        training = pl_module.training
        pl_module.eval()
        with torch.no_grad():
            self._look(pl_module, batch[0])
        pl_module.train(training)

    def _look(self, module: LightningModule, inputs: Tensor) -> None:
        self.live = module(inputs)
        twin = copy.deepcopy(module)
        self.copied = twin(inputs)
        twin = lightning_peft.bake(twin)
        self.baked = twin(inputs)
        self.baked_shape = shape_of(twin)
        self.misplaced = misplaced(module, twin)
        self.pickled = {
            "pickle.dumps(module)": unlike(twin, inputs, lambda: pickle.loads(pickle.dumps(module))),
            "torch.save(module)": unlike(twin, inputs, lambda: _saved_and_loaded(module)),
        }
        for parameter in twin.parameters():
            parameter.zero_()
        self.independent = torch.equal(module(inputs), self.live)


def shape_of(module: nn.Module) -> dict[str, Any]:
    """The features that tell an ordinary module from a mapped one: classes, parameter names in order, state-dict keys."""
    described = trace(module)
    return {key: described[key] for key in ("classes", "parameter order", "state")}


def misplaced(module: nn.Module, ordinary: nn.Module) -> str | None:
    """Say which parameter of a module under methods has another place than in an ordinary module; ``None`` when none has.

    Parameters of weight maps may follow the module's own, and may not stand among those of one of its parts.

    Args:
        module: The module.
        ordinary: The same without methods.
    """
    for path, part in ordinary.named_modules():
        expected = [name for name, _ in part.named_parameters()]
        found = [plain_name(name) for name, _ in module.get_submodule(path).named_parameters()]
        if not path:
            found = found[: len(expected)]
        wrong = difference(expected, found)
        if wrong is not None:
            return f"named_parameters() of {path or 'the module'}, ordinary against under methods{wrong}"
    return None


def _saved_and_loaded(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def unlike(ordinary: nn.Module, inputs: Tensor, come_back: Any) -> str | None:
    """Say in what a module that comes back from a pickle differs from the ordinary one."""
    try:
        module = come_back()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    found = difference(shape_of(ordinary), shape_of(module))
    found = found or difference(dict(ordinary.state_dict()), dict(module.state_dict()))
    return found or difference(ordinary(inputs), module(inputs), "output")
