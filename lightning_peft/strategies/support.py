"""Which Lightning strategies a method can work under."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch.nn.parallel import DistributedDataParallel

from lightning_peft.compose.lanes import Lane
from lightning_peft.contract import Contract
from lightning_peft.namespaces import both

_GROW_FIRST = (
    " Shards are laid out before training begins, so structure cannot change after it: change it in a fit under one of these, "
    "then lightning_peft.load_from_checkpoint the result and shard that in configure_model."
)

_ADAPT_WHOLE = (
    " Processes that share a network's parameters have to run it equally often, forwards and backwards, and how often this "
    "method does depends on the samples of each. Adapt under one of these to what lightning_peft.load_from_checkpoint makes of "
    "a checkpoint of shards."
)

_FIT_FIRST = (
    " Or give it a fit of its own under one of these, then lightning_peft.load_from_checkpoint the result and shard that in "
    "configure_model."
)

_WAYS_OUT = {Lane.STRUCTURE: _GROW_FIRST, Lane.ADAPT: _ADAPT_WHOLE}


def strategy_kind(strategy: Strategy) -> str:
    """Return ``"single"``, ``"ddp"``, ``"fsdp"``, ``"fsdp2"``, ``"deepspeed"``, or the class name of another strategy."""
    kinds: list[tuple[type[Strategy], str]] = [
        (SingleDeviceStrategy, "single"),
        (DDPStrategy, "ddp"),
        (FSDPStrategy, "fsdp"),
        (ModelParallelStrategy, "fsdp2"),
        (DeepSpeedStrategy, "deepspeed"),
    ]
    return next((kind for cls, kind in kinds if isinstance(strategy, both(cls))), type(strategy).__name__)


def shards(strategy: Strategy) -> bool:
    """Whether a strategy is that of FSDP2, under which parameters are shards between steps."""
    return strategy_kind(strategy) == "fsdp2"


def waits_for_gradients(strategy: Strategy) -> bool:
    """Whether processes wait for a gradient of every trained parameter, as those of DDP do, and those of shards do not."""
    return strategy_kind(strategy) == "ddp"


def check_strategy(trainer: Trainer, methods: Iterable[Contract]) -> None:
    """Refuse a strategy that any method does not support, before anything is touched.

    Raises:
        MisconfigurationException: Names the method, the strategy and those that work.
    """
    kind = strategy_kind(trainer.strategy)
    for method in methods:
        if kind not in method.strategies:
            raise MisconfigurationException(
                f"{method.name} does not work under the {kind} strategy ({type(trainer.strategy).__name__}), which shards or "
                f"moves the tensors it acts on. Use Trainer(strategy=...) with one of: {', '.join(sorted(method.strategies))}."
                + _WAYS_OUT.get(method.lane, _FIT_FIRST if kind == "fsdp2" else "")
            )


def rewrap(trainer: Trainer) -> None:
    """Let the strategy see that the module has other parameters than before.

    The wrapper of DDP synchronises the gradients of the parameters it was built with; new ones would diverge between ranks
    without a word. Building it again sends rank 0's parameters and buffers to the others.
    """
    strategy = trainer.strategy
    if isinstance(strategy, both(DDPStrategy)) and isinstance(strategy.model, DistributedDataParallel):
        strategy.model = strategy.lightning_module
        strategy.configure_ddp()
