"""Checks that a module under methods is an ordinary module to whoever looks at it in the middle of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

import lightning_peft
from lightning_peft.structure import journal
from lightning_peft.structure.checkpoint import KEY
from lightning_peft.testing.modules import Plain, Shared, Teaching, loader, trainer
from lightning_peft.testing.probe import Probe, shape_of
from lightning_peft.testing.runs import Fit
from lightning_peft.testing.shared_runs import Factory, SharedRuns, probe_of
from lightning_peft.testing.trace import difference


class Elsewhere(SingleDeviceStrategy):
    """Moves the module when a run is over, as Lightning's strategies do before callbacks are torn down.

    Double precision stands for another device, because every machine has it.
    """

    def __init__(self) -> None:
        super().__init__(device=torch.device("cpu"))

    def teardown(self) -> None:
        super().teardown()
        assert self.lightning_module is not None
        self.lightning_module.double()


def left_behind(module: nn.Module) -> list[str]:
    """Names of floating-point tensors of a module that did not follow it to :class:`Elsewhere`."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for path, part in module.named_modules():
        tensors += [(f"{path}.{name}", value) for name, value in vars(part).items() if isinstance(value, Tensor)]
    return [name for name, tensor in tensors if tensor.is_floating_point() and tensor.dtype != torch.float64]


def _answer(module: Plain) -> Tensor:
    with torch.no_grad():
        return module.eval().logits(next(iter(loader(8)))[0])


class OrdinaryChecks(SharedRuns):
    """Order of parameters, pickles, a move at the end, and code that matches parameters by their place."""

    no_exact_bake: ClassVar[str] = ""
    no_ordinary_file: ClassVar[str] = ""
    no_shared: ClassVar[str] = ""
    no_teacher: ClassVar[str] = ""

    def test_parameters_keep_their_places(self, reference: Fit) -> None:
        probe = probe_of(reference)
        assert probe.misplaced is None, probe.misplaced
        built, baked = (shape["parameter order"] for shape in (shape_of(self.style()), probe.baked_shape))
        found = difference(built, baked)
        assert found is None, f"named_parameters() of a new module against bake(copy.deepcopy(module)) in training: {found}"

    @pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.:UserWarning")
    def test_checkpoints_are_ordinary(self, factory: Factory, reference: Fit, folder: Path) -> None:
        """A file of the middle of training, by Lightning alone, with the method, and baked: what validation saw then."""
        for epoch, answered in enumerate(probe_of(reference).validated):
            path = folder / f"epoch={epoch}.ckpt"
            again = trainer(callbacks=[factory()])
            found: Any = again.predict(self.style(), loader(8), ckpt_path=path, weights_only=True)
            assert torch.equal(answered, found[0]), f"{path.name}: evaluated with the method against what validation saw"
            restructured = bool(journal.read(torch.load(path, weights_only=True)[KEY]))
            if not (restructured or self.no_ordinary_file):
                found = _answer(self.style.load_from_checkpoint(path, weights_only=True))
                # A layer part goes into the weight up to rounding.
                allowed = self.tolerance if type(reference.methods[0]).parts else 0.0
                error = (answered - found).abs().max().item()
                assert error <= allowed, f"{path.name}: loaded by Lightning alone against what validation saw: {error:.3g}"
            if not (self.no_exact_bake or self.no_ordinary_file):
                error = (_answer(lightning_peft.load_from_checkpoint(self.style, path)) - answered).abs().max().item()
                assert error <= self.tolerance, f"{path.name}: loaded baked against what validation saw: {error:.3g}"

    def test_pickles_are_baked(self, reference: Fit) -> None:
        for route, found in probe_of(reference).pickled.items():
            assert found is None, f"{route} in training against bake(copy.deepcopy(module)): {found}"

    def test_pickles_of_a_shared_layer_are_baked(self, lead: Factory) -> None:
        if self.no_shared:
            with pytest.raises(MisconfigurationException, match=self.no_shared):
                self._fit([lead()], style=self._adapted(Shared))
            return
        probe = probe_of(self._fit([lead()], style=self._adapted(Shared), after=[Probe(3)]))
        assert probe.misplaced is None, probe.misplaced
        found = None if self.removed_parts else difference(shape_of(self._adapted(Shared)()), probe.baked_shape)
        assert found is None, f"a layer used twice: bake(copy.deepcopy(module)) is no ordinary module: {found}"
        for route, found in probe.pickled.items():
            assert found is None, f"a layer used twice, {route} in training against bake(copy.deepcopy(module)): {found}"

    def test_follows_a_move_at_the_end(self, lead: Factory) -> None:
        torch.manual_seed(0)
        module = self.style("sgd")
        before = dict(module.named_parameters())
        moved = self._fit([lead()], module=module, strategy=Elsewhere())
        stayed = left_behind(module)
        assert not stayed, f"the strategy moved the module before callbacks were torn down; these stayed behind: {stayed}"
        after = dict(module.named_parameters())
        replaced = [name for name in before if name in after and after[name] is not before[name]]
        assert self.new_parameters or self.removed_parts or not replaced, (
            f"these parameters were replaced by others in the move: {replaced}"
        )
        self._assert_close(self._descended(lead), moved, "a module that stays against one that is moved at the end")

    # A method that maps the network's weights and not the teacher's is warned of, rightly; here the places matter.
    @pytest.mark.filterwarnings("ignore:.* is a copy of .*, but only:UserWarning")
    def test_a_teacher_follows_by_place(self, lead: Factory) -> None:
        if self.no_teacher:
            with pytest.raises(MisconfigurationException, match=self.no_teacher):
                self._fit([lead()], style=self._adapted(Teaching))
            return
        module: Any = self._fit([lead()], style=self._adapted(Teaching)).module
        assert not module.astray, f"of a teacher that follows by zip(parameters()), these follow others: {module.astray}"
