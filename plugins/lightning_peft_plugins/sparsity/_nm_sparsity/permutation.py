"""The one permutation of a training: what it waits for, what it found, and what of it a checkpoint must hold."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_peft import Run
from lightning_peft.attaching.first_call import FirstCall
from lightning_peft.structure.coupled.dependency import torch_pruning
from lightning_peft.structure.coupled.example import example_form
from lightning_peft.structure.forms import Form, list_of, maybe, number
from lightning_peft.structure.reorder import Orders
from lightning_peft_plugins.sparsity._nm_sparsity.channel_order import Sparse, channel_order, kept_share

STATE_FORM: Mapping[str, Form] = {"example": maybe(example_form), "kept": list_of(number(0.0), 0, 2)}


class Permutation:
    """Puts channels into the order in which the pattern keeps the most, once in a training.

    Args:
        wanted: Whether it does.
        escapes: See :func:`~lightning_peft.weights.nm_permutation.nm_permutation`.
        counts: Whether a call of the network that is made now counts as one of the training.

    Attributes:
        kept: Shares of the magnitude that the pattern kept without and with it; empty before it was done.
    """

    def __init__(self, wanted: bool, escapes: int, counts: Callable[[], bool]) -> None:
        if type(escapes) is not int or escapes < 0:
            raise MisconfigurationException(f"permute_escapes={escapes!r} must be a number of random swaps, 0 for none.")
        self.wanted, self._escapes = wanted, escapes
        self._call = FirstCall(counts)
        self.kept: list[float] = []

    @property
    def waits(self) -> bool:
        """Whether it is still to come."""
        return self.wanted and not self.kept

    def start(self, run: Run) -> None:
        """Wait for a call of the network, if it is still to come.

        Raises:
            MisconfigurationException: Torch-Pruning is missing, which must show before the training.
        """
        if self.waits:
            torch_pruning()
            self._call.wait(run)

    def settle(self) -> None:
        """Stop waiting once there was a call."""
        self._call.settle()

    def stop(self) -> None:
        """Stop waiting."""
        self._call.stop()

    def orders(
        self,
        run: Run,
        sparse: Mapping[str, Sparse],
        name: str,
        frozen: Callable[[Tensor], bool],
        excused: Collection[str] = (),
    ) -> Orders:
        """Search.

        Args:
            run: The run.
            sparse: The weights that will be N:M, by name in the module.
            name: Who asks, for the log.
            frozen: Whether a parameter is to stay as it is.
            excused: Qualified names of layers that need not take part in a call of the network.

        Raises:
            MisconfigurationException: The network was not called.
        """
        if self._call.example is None:
            raise MisconfigurationException(
                f"The network {run.network_name or '(the module itself)'!r} was not called in training before step {run.step}, "
                'so its channels cannot be followed. Name the submodule your training_step calls with network="<name>".'
            )
        try:
            found = channel_order(
                run.module,
                run.network_name,
                run.network,
                self._call.example,
                sparse,
                escapes=self._escapes,
                frozen=frozen,
                excused=excused,
            )
        except MisconfigurationException as reason:  # the masks do without
            rank_zero_warn(f"{name} leaves all channels in their order. {reason}")
            self.kept = [kept_share(sparse.values())] * 2
            return {}
        self.kept = [found.before, found.kept]
        rank_zero_info(
            f"lightning_peft: {name} permuted the channels of {found.groups} groups: the pattern keeps {found.kept:.2%} of the "
            f"magnitude, {found.before:.2%} without"
        )
        if found.left:
            some = "; ".join(f"{layer}: {why}" for layer, why in list(found.left.items())[:3])
            more = f"; and {len(found.left) - 3} more" if len(found.left) > 3 else ""
            rank_zero_warn(f"{name} leaves the channels of some layers in their order. {some}{more}.")
        return found.orders

    def describe(self, sparse: Collection[Sparse]) -> str:
        """Say how much the pattern keeps without it, and with it once that is known."""
        if self.kept:
            return f"channels permuted: {self.kept[1]:.1%} of the magnitude kept, {self.kept[0]:.1%} without"
        return f"channels to be permuted: {kept_share(sparse):.1%} of the magnitude kept without"

    def state(self) -> dict[str, Any]:
        """The call that was seen, and what was found; nothing where it is not wanted."""
        return {"example": self._call.example, "kept": self.kept} if self.wanted else {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on as a checkpoint says; one without the argument has permuted nothing."""
        if self.wanted:
            self._call.example, self.kept = state.get("example"), list(state.get("kept", ()))
