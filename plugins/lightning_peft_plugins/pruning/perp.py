"""Parameter-efficient retraining after pruning."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft import Lane, Method, Resource, Run
from lightning_peft.arguments import one_of
from lightning_peft.contract import SPLIT
from lightning_peft.network.targets import SENSITIVE, TargetSpec
from lightning_peft.network.tunable import TUNABLE, kinds_of, share_trained, tunable
from lightning_peft.weights.maps import mapped_tensors
from lightning_peft.weights.shards import whole
from lightning_peft_plugins.pruning.functional.perp import MaskLoRAMap, ScaleLoRAMap

LORA = {"mask": MaskLoRAMap, "scale": ScaleLoRAMap}


class PERP(Method):
    """Retrains a pruned network by a small share of its parameters: biases, norms, head, and low-rank maps of pruned weights.

    The zeros of a weight stay zeros. They come from a method beside it that prunes in the same training, or are those the
    network already has. Everything else is frozen for the fit; what was frozen before stays so.

    Args:
        tune: Which parameters are trained as they are: ``"bias"``, ``"norm"`` (weights and biases of normalisation layers),
            ``"head"`` (the layers that write the logits).
        lora: What the weights of the targets get: ``"mask"``, ``W + (alpha / rank) M (B A)``; ``"scale"``, ``W (B A)`` by
            element; ``None``, nothing.
        rank: Columns of ``B``.
        alpha: Factor of ``"mask"``.
        targets: Layers whose weights get a low-rank map.
        exclude: Layers that get none; by default those that pruning leaves dense.
        checkpoint: ``"trained"`` leaves what is frozen out of checkpoints, which then need the same base to be loaded.
        name: Name in logs and checkpoints.

    Raises:
        MisconfigurationException: An unknown part or map, nothing left to train, or a network that grows.

    Example:
        >>> PERP(("bias", "norm"), lora="scale", rank=4)
        PERP(tune=('bias', 'norm'), lora='scale', rank=4, ...)
    """

    lane = Lane.DELTA
    reads = frozenset({Resource.STRUCTURE})
    writes = frozenset({Resource.DELTA})
    weight_maps = (MaskLoRAMap, ScaleLoRAMap)
    strategies = SPLIT
    paper = "Zimmer et al., PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs, 2023, arXiv 2312.15230"

    def __init__(
        self,
        tune: Collection[str] = TUNABLE,
        lora: Literal["mask", "scale"] | None = "mask",
        rank: int = 16,
        alpha: float = 32.0,
        targets: TargetSpec = "all-weights",
        exclude: TargetSpec = SENSITIVE,
        *,
        checkpoint: Literal["full", "trained"] = "full",
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude or None, name=name)
        self.tune = kinds_of(tune)
        one_of("lora", lora, (*LORA, None))
        if not self.tune and lora is None:
            raise MisconfigurationException("Nothing would be trained: name parts with tune=, or a map with lora=.")
        if rank < 1:
            raise MisconfigurationException(f"rank={rank} must be at least 1.")
        self.lora, self.rank, self.alpha = lora, rank, alpha
        one_of("checkpoint", checkpoint, ("full", "trained"))
        self.checkpoint = checkpoint

    def claims(self, module: nn.Module) -> Iterable[str]:
        """The weights that get a map."""
        return [] if self.lora is None else super().claims(module)

    def attach(self, module: LightningModule) -> None:
        """Put the maps on."""
        for tensor in self.claims(module):
            layer = module.get_submodule(tensor.rpartition(".")[0])
            assert isinstance(layer.weight, Tensor)
            kind = LORA[self.lora or ""]
            self.map_weight(module, tensor, kind(layer.weight.shape, self.rank, self.alpha, tensor).to(layer.weight))

    def trained(self, module: nn.Module) -> Iterable[nn.Parameter]:
        """The parts; maps are trained whatever they stand on."""
        tuned = self.tuned(module)
        if self.lora is None and not any(parameter.requires_grad for parameter in tuned):
            raise MisconfigurationException(
                f"tune={self.tune} names no trainable parameter of {type(module).__name__}. Name another part, or give lora=."
            )
        return tuned

    def tuned(self, module: nn.Module) -> dict[nn.Parameter, str]:
        """Parameters to train as they are, each with the name of its layer."""
        return tunable(module, self.tune, {tensor.rpartition(".")[0] for tensor in self.claims(module)})

    def start(self, run: Run) -> None:
        """See that no zeros will be lost.

        Raises:
            MisconfigurationException: A head is sparse.
        """
        masked = {mapped.stored for mapped in mapped_tensors(run.module) if mapped.maps[-1].lane == Lane.MASK}
        for parameter, name in self.tuned(run.module).items():
            if parameter.requires_grad and parameter not in masked and _is_sparse(parameter):
                raise MisconfigurationException(
                    f"{name} has zeros that would be trained. Give it a low-rank map instead, by leaving 'head' out of "
                    "exclude=, or a mask."
                )

    def describe(self, module: nn.Module) -> str:
        """Name what is trained."""
        maps = f"{self.lora} LoRA of rank {self.rank} on {len(list(self.claims(module)))} layers" if self.lora else ""
        return ", ".join([*self.tune, *([maps] if maps else [])])

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Share of the parameters that are trained."""
        return {"trained": share_trained(run.module)}


def _is_sparse(parameter: Tensor) -> bool:
    """Whether some weights of a matrix are zero; not all, as in a head that is yet to be trained."""
    return parameter.ndim > 1 and 0 < int(whole(parameter).count_nonzero()) < parameter.numel()
