"""The blocks that are done, one file each, from which a calibration goes on after a crash."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft.atomic_files import whole
from lightning_peft.contract import Contract
from lightning_peft.network.tensor_bytes import checksum
from lightning_peft.structure import journal, method_state
from lightning_peft.structure.checkpoint import check_tensors
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.structure.forms import Form, anything, dict_of, fields, list_of, text
from lightning_peft.structure.forms import whole as whole_number
from lightning_peft.structure.plain import not_plain
from lightning_peft.weights.maps import plain_tensors

FORMAT = 1
_FORM: Form = fields(
    {
        "version": whole_number(FORMAT, FORMAT),
        "blocks": list_of(text),
        "batches": list_of(whole_number(), 2),
        "methods": anything,
        "start": dict_of(whole_number()),
        "edits": list_of(dict_of(anything)),
        "tensors": dict_of(anything),
        "states": dict_of(anything),
    }
)


class DoneBlocks:
    """Writes a file when a block is done, and reads those of an earlier calibration.

    Args:
        folder: The folder; ``None`` writes and reads nothing.
        module: The module.
        blocks: Names of the blocks, in order.
        methods: The methods, in order.
        batches: Digest and number of the batches.
    """

    def __init__(
        self,
        folder: Path | None,
        module: LightningModule,
        blocks: Sequence[str],
        methods: Sequence[Contract],
        batches: Sequence[int],
    ) -> None:
        self._folder, self._module, self._blocks, self._methods = folder, module, list(blocks), methods
        records = [{"method": type(method).__name__, "name": method.name, "config": method.config()} for method in methods]
        self._run = {"version": FORMAT, "blocks": self._blocks, "batches": list(batches), "methods": records}
        self._start = {} if folder is None else _digests(module, blocks)

    def restore(self) -> int:
        """Give the module and the methods what the files hold, and return how many blocks are done.

        Raises:
            CheckpointError: A file is damaged, or of a calibration of another network, with other methods or batches.
        """
        if self._folder is None:
            return 0
        found: list[dict[str, Any]] = []
        while (path := self._path(len(found))).exists() and len(found) < len(self._blocks):
            found.append(self._read(path))
        for place, saved in enumerate(found):
            self._check(self._path(place), saved, done=self._blocks[: len(found)])
        for name, saved in zip(self._blocks, found, strict=False):
            self._put_back(name, saved)
        if found:
            for method in self._methods:
                self._load_state(method, found[-1]["states"].get(method.name))
        return len(found)

    def _path(self, place: int) -> Path:
        assert self._folder is not None
        return self._folder / f"block-{place:04d}.pt"

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            saved = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # what a damaged file does to torch.load cannot be foreseen
            raise _damaged(path, error) from error
        if (wrong := _FORM(saved, "it")) is not None:
            raise _damaged(path, wrong)
        return dict(saved)

    def _check(self, path: Path, saved: dict[str, Any], done: Sequence[str]) -> None:
        names = {"blocks": "blocks", "batches": "batches", "methods": "methods or arguments"}
        other = next((word for key, word in names.items() if saved[key] != self._run[key]), None)
        begun = {name: digest for name, digest in saved["start"].items() if name not in done}
        if other is None and begun != {name: self._start.get(name) for name in begun}:
            other = "weights"
        if other is not None:
            raise CheckpointError(
                f"{path} belongs to a calibration with other {other}. Give folder= a new folder, or the module, methods and "
                "batches it was begun with."
            )

    def _put_back(self, name: str, saved: dict[str, Any]) -> None:
        own = journal.journal_of(self._module)
        if saved["edits"] and own[-len(saved["edits"]) :] != saved["edits"]:
            for edit in saved["edits"]:
                journal.edit(self._module, edit)
        block = self._module.get_submodule(name)
        check_tensors(saved["tensors"], block)
        if set(plain_tensors(block)) != set(saved["tensors"]):
            raise CheckpointError(f"The saved tensors of {name} are not those of the module. Give folder= a new folder.")
        block.load_state_dict(saved["tensors"], strict=False)

    def _load_state(self, method: Contract, saved: Any) -> None:
        form = method.state_form(plain_tensors(self._module))
        method.load_state(method_state.read(method.name, saved, form).state)

    def save(self, place: int, edits: Sequence[Any]) -> None:
        """Write the file of a block that is done.

        Args:
            place: Position of the block.
            edits: Changes of structure made to it.

        Raises:
            MisconfigurationException: ``state()`` of a method holds something that is no plain data.
        """
        if self._folder is None:
            return
        block = self._module.get_submodule(self._blocks[place])
        states = {method.name: method_state.write(method.steps, 0, method.state()) for method in self._methods}
        if (odd := not_plain(states)) is not None:
            raise MisconfigurationException(f"state() of a method holds something that is not plain data: {odd}.")
        tensors = {name: tensor.detach().cpu() for name, tensor in plain_tensors(block).items()}
        saved = {**self._run, "start": self._start, "edits": list(edits), "tensors": tensors, "states": states}
        with whole(self._path(place)) as part:
            torch.save(saved, part)


def _damaged(path: Path, reason: object) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {reason}. Remove it and those after it, and calibrate again.")


def _digests(module: nn.Module, blocks: Sequence[str]) -> dict[str, int]:
    """Of the tensors of every block by its name, and of all others under the empty name."""
    found: dict[str, int] = dict.fromkeys(["", *blocks], 0)
    for name, tensor in plain_tensors(module).items():
        home = next((block for block in blocks if name.startswith(f"{block}.")), "")
        found[home] = _digest(name, tensor, found[home])
    return found


def _digest(name: str, tensor: Tensor, start: int) -> int:
    return checksum(tensor, zlib.crc32(name.encode(), start))


def shapes(module: nn.Module) -> Mapping[str, torch.Size]:
    """Shape of every tensor by name."""
    return {name: tensor.shape for name, tensor in plain_tensors(module).items()}
