"""What a training step with an adapter costs: ours against PEFT's and against full fine-tuning, side by side in one run.

    python benchmarks/deltas.py --output docs/evidence/deltas

Random weights of real architectures, AdamW, a Lightning Trainer each. As in ``overhead.py`` every variant is a fit in a process
of its own, and takes one step when the baton comes round. Bytes are those that autograd keeps for the backward pass beside
parameters, each storage once.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import peft
import timm
import torch
import transformers
from lightning.pytorch import Callback, LightningModule, Trainer
from overhead import Baton, compared, interleave, quiet
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LoRA

RANK = 8
BAR = 0.92  # of PEFT's step


def minilm() -> nn.Module:
    """The encoder of MiniLM-L6: six blocks of 384."""
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=2
    )
    return transformers.BertForSequenceClassification(config)


def smollm(blocks: int = 30) -> nn.Module:
    """SmolLM2-135M."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = transformers.LlamaConfig(vocab_size=49152, num_hidden_layers=blocks, tie_word_embeddings=True, **sizes)
    return transformers.LlamaForCausalLM(config)


def vit() -> nn.Module:
    """ViT-tiny of timm."""
    return timm.create_model("vit_tiny_patch16_224", num_classes=2)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "minilm": (minilm, (16, 64)),
    "vit": (vit, (16, 3, 224, 224)),
    "smollm2": (smollm, (2, 64)),
}


class Tuned(LightningModule):
    """Fine-tunes a network to say nothing."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.model = network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        said = self.model(batch[0])
        return (said if isinstance(said, Tensor) else said.logits).float().square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-5)


def with_peft(network: nn.Module) -> nn.Module:
    """The network in PEFT's hands: every linear layer but the head."""
    heads = {name for name, _ in network.named_modules() if name.split(".")[-1] in ("head", "classifier", "lm_head")}
    names = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear) and name not in heads]
    return peft.get_peft_model(network, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))


VARIANTS = ("full", "peft", "ours")


def built(name: str, variant: str) -> tuple[Tuned, list[Callback]]:
    """The module and the callbacks of a variant."""
    torch.manual_seed(0)
    network = NETWORKS[name][0]()
    module = Tuned(with_peft(network) if variant == "peft" else network)
    return module.train(), [LoRA(rank=RANK)] if variant == "ours" else []


def batches(name: str, count: int) -> DataLoader[Any]:
    """Random inputs of the network's kind."""
    shape = NETWORKS[name][1]
    size = (shape[0] * count, *shape[1:])
    data = torch.randn(size) if len(shape) > 2 else torch.randint(1000, size)
    return DataLoader(TensorDataset(data), batch_size=shape[0])


class Kept(Callback):
    """Counts the bytes that the graph of the last step keeps."""

    bytes = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.own = {p.untyped_storage().data_ptr() for p in pl_module.parameters()}
        self.found: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.found[storage.data_ptr()] = storage.nbytes()
        return tensor

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self.found:
            self.bytes = sum(self.found.values())

    def on_train_batch_end(self, *_: Any) -> None:
        self.hooks.__exit__()


def fit(name: str, variant: str, pipe: Connection, args: argparse.Namespace) -> None:
    """Train in this process, a step at a time; the last step is counted and not timed."""
    quiet()
    torch.set_num_threads(args.threads)
    module, callbacks = built(name, variant)
    trainer = lean(callbacks=[Baton(pipe, time.perf_counter), *callbacks], max_steps=args.warmup + args.rounds + 1)
    trainer.fit(module, batches(name, args.warmup + args.rounds + 1))


def lean(**settings: Any) -> Trainer:
    """A Trainer that prints and writes nothing."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", devices=1, **off, **settings)


def kept(name: str, variant: str) -> int:
    """Bytes that autograd keeps for the backward pass of one step."""
    counter = Kept()
    module, callbacks = built(name, variant)
    lean(callbacks=[*callbacks, counter], max_steps=1).fit(module, batches(name, 1))
    return counter.bytes


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Compare the variants on one network."""
    seconds = interleave(name, VARIANTS, args, fit)
    rows = {}
    for variant, times in seconds.items():
        ratio, interval = compared(times, seconds["peft"])
        rows[variant] = {
            "ms": 1000 * statistics.median(times),
            "ratio": ratio,
            "interval": interval,
            "kept": kept(name, variant),
        }
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    quiet()
    about = {"torch": torch.__version__, "peft": peft.__version__, "python": platform.python_version(), "threads": args.threads}
    results = {name: measure(name, args) for name in args.networks}
    for name, rows in results.items():
        table = Table("variant", "step, ms", "of PEFT's", "95 % interval", "kept, MB", "of PEFT's", title=name)
        for variant, row in rows.items():
            interval, share = "{:.3f} to {:.3f}".format(*row["interval"]), row["kept"] / rows["peft"]["kept"]
            table.add_row(
                variant, f"{row['ms']:.1f}", f"{row['ratio']:.3f}", interval, f"{row['kept'] / 1e6:.1f}", f"{share:.3f}"
            )
        Console().print(table)
    if args.output is not None:
        args.output.with_suffix(".json").write_text(json.dumps({"about": about, "results": results}, indent=1))


if __name__ == "__main__":
    main()
