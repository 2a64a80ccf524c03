"""What one process of a sharded fit holds between two steps: counted in two processes, and by the formula for large networks.

    python benchmarks/sharded_memory.py

A small Llama trains under FSDP2 on two processes, float32, AdamW. Every process counts the bytes of its shards: parameters,
the optimizer's state, what methods hold beside. The formula has to give the same number; then it is written out for Llama-2's
7B and 70B, whose shapes are built without storage. Gradients, activations and blocks gathered for a moment come on top.
What autograd keeps until the backward pass is counted too, without activation checkpointing and with it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from deltas import Kept, lean
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from overhead import quiet
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LoRA, MagnitudePruning, NMSparsity, WeightCompander
from lightning_peft.network.layers import is_linear
from lightning_peft.testing.ddp import run_ddp
from lightning_peft.weights.attachment import Attachment
from lightning_peft.weights.detach import attachments

RANK, RANKS = 8, 2
TARGETS: dict[str, Any] = {"targets": "all-linear", "exclude": ("head",)}
METHODS: dict[str, Callable[[], list[Callback]]] = {
    "none": list,
    "LoRA": lambda: [LoRA(RANK, **TARGETS)],
    "NMSparsity": lambda: [NMSparsity("2:4", **TARGETS)],
    "MagnitudePruning": lambda: [MagnitudePruning(0.5, start=0, **TARGETS)],
    "WeightCompander": lambda: [WeightCompander(**TARGETS)],
}
SHAPES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
SHAPES["70B"]["num_key_value_heads"] = 8


def llama(name: str) -> nn.Module:
    """A Llama of some size."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=256 if name == "small" else 32000, **SHAPES[name]))


class Tuned(LightningModule):
    """Fine-tunes a sharded Llama on noise."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama("small")

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        for block in self.model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[0]).loss  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


class Counts(Callback):
    """Adds up what this process holds when a step is over."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        held = [*pl_module.parameters()]
        held += [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        for each in attachments(pl_module):
            held += beside(each)
        self.bytes = sum(local(tensor).nbytes for tensor in held if tensor.ndim)  # the counts of steps are numbers


def beside(attachment: Attachment) -> list[Tensor]:
    """Tensors of an attachment that are no parameters, such as masks."""
    return [*attachment.buffers(), *(value for value in vars(attachment).values() if isinstance(value, Tensor))]


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def on_rank(method: str, checkpointed: bool) -> list[int]:
    """Train two steps; return the bytes held between steps, and those that autograd keeps until the backward pass."""
    quiet()
    counts, kept, module = Counts(), Kept(), Tuned().train()
    if checkpointed:
        module.model.gradient_checkpointing_enable({"use_reentrant": False})
    strategy = ModelParallelStrategy(RANKS, 1, save_distributed_checkpoint=False)
    runner = lean(devices=RANKS, strategy=strategy, max_steps=2, callbacks=[*METHODS[method](), counts, kept])
    runner.fit(module, DataLoader(TensorDataset(torch.randint(256, (8, 4))), batch_size=1))
    return [counts.bytes, kept.bytes]


def formula(network: nn.Module, method: str, ranks: int, mask: int = 1) -> float:
    """Bytes a process.

    Args:
        network: The network, with or without storage.
        method: The method.
        ranks: Processes that share its tensors, four bytes a number, and eight of AdamW where it is trained.
        mask: Bytes of a mask's entry that every process holds: one, and on a CPU a number to multiply by.
    """
    linear = [layer for name, layer in network.named_modules() if is_linear(layer) and not name.endswith("lm_head")]
    whole = sum(parameter.numel() for parameter in network.parameters())
    trained = {"LoRA": sum(RANK * sum(layer.weight.shape) for layer in linear)}.get(method)  # type: ignore[arg-type, misc]
    shared = 12 * whole if trained is None else 4 * whole + 12 * trained
    if method == "WeightCompander":
        shared += 2 * 12 * ranks * len(linear)  # two scales a layer, which one process holds and the others pad
    masks = sum(layer.weight.numel() for layer in linear) if method == "MagnitudePruning" else 0  # type: ignore[operator]
    return shared / ranks + mask * masks


def main() -> None:
    """Command line."""
    quiet()
    console = Console()
    table = Table("method", "counted, most", "formula", "kept", "kept, checkpointed", title="small Llama, two processes, bytes")
    network = llama("small")
    for method in METHODS:
        found = [run_ddp(f"{Path(__file__)}:on_rank", {"method": method, "checkpointed": way}) for way in (False, True)]
        numbers = [max(rank[0] for rank in found[0]), formula(network, method, RANKS, mask=5), *(way[0][1] for way in found)]
        table.add_row(method, *(f"{number:,.0f}" for number in numbers))
    console.print(table)
    table = Table("network", "processes", *METHODS, title="by the formula, GB a process")
    for name in ("7B", "70B"):
        with torch.device("meta"):
            network = llama(name)
        for ranks in (8, 64):
            table.add_row(name, str(ranks), *(f"{formula(network, method, ranks) / 1e9:.2f}" for method in METHODS))
    console.print(table)


if __name__ == "__main__":
    main()
