"""What a training step with an adapter costs: ours against PEFT's, full fine-tuning and a frozen network, in one run.

    python benchmarks/deltas.py --output docs/evidence/deltas

Random weights of real architectures, AdamW, a Lightning Trainer each. As in ``overhead.py`` every variant is a fit in a process
of its own, and takes a few steps when the baton comes round. The same code differs by some percent from one process to the
next, so all of it is started several times. Two kinds of bytes are counted in one more step: those that autograd keeps for the
backward pass beside parameters, each storage once, and the most that are in use at a time. Attaching is timed in turns, in this
process.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LoRA

RANK = 8
TURN = 4  # steps


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


VARIANTS = ("full", "peft", "ours", "frozen")


def frozen(network: nn.Module) -> nn.Module:
    """The floor: gradients go all the way back, and no matrix gets one."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("norm" in name.lower())
    return network


def built(name: str, variant: str) -> tuple[Tuned, list[Callback]]:
    """The module and the callbacks of a variant."""
    torch.manual_seed(0)
    network = NETWORKS[name][0]()
    module = Tuned({"peft": with_peft, "frozen": frozen}.get(variant, nn.Identity())(network))
    return module.train(), [LoRA(rank=RANK)] if variant == "ours" else []


def batches(name: str, count: int) -> DataLoader[Any]:
    """Random inputs of the network's kind."""
    shape = NETWORKS[name][1]
    size = (shape[0] * count, *shape[1:])
    data = torch.randn(size) if len(shape) > 2 else torch.randint(1000, size)
    return DataLoader(TensorDataset(data), batch_size=shape[0])


class Kept(Callback):
    """Counts bytes of tensors that the last step made: those that its backward pass begins with, and the most there were."""

    bytes = peak = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.used = InUse({parameter.untyped_storage()._cdata for parameter in pl_module.parameters()})
        self.used.__enter__()

    def on_before_backward(self, *_: Any) -> None:
        self.bytes = self.used.now

    def on_train_batch_end(self, *_: Any) -> None:
        self.used.__exit__(None, None, None)
        self.peak = self.used.peak


class InUse(TorchDispatchMode):
    """Counts the bytes of tensors made meanwhile, as long as they are there; a view of what was there before is nothing new."""

    def __init__(self, there: set[int]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = there

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return made

    def freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def fit(name: str, variant: str, pipe: Connection, args: argparse.Namespace) -> None:
    """Train in this process, a step at a time."""
    train(name, *built(name, variant), pipe, args)


def train(name: str, module: Tuned, callbacks: list[Callback], pipe: Connection, args: argparse.Namespace) -> None:
    """Train a variant when its turn comes."""
    quiet()
    torch.set_num_threads(args.threads)
    steps = TURN * (args.warmup + args.rounds) + 1  # a turn ends where the next one would begin
    baton = Baton(pipe, time.perf_counter, TURN)
    lean(callbacks=[baton, *callbacks], max_steps=steps, accelerator=args.device).fit(module, batches(name, steps))


def lean(**settings: Any) -> Trainer:
    """A Trainer that prints and writes nothing."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(**{"accelerator": "cpu", "devices": 1, **off, **settings})


def counted(name: str, variant: str, device: str) -> tuple[int, int]:
    """Bytes that autograd keeps for the backward pass of one step, and the most that are in use in it."""
    counter = Kept()
    module, callbacks = built(name, variant)
    lean(callbacks=[*callbacks, counter], max_steps=1, accelerator=device).fit(module, batches(name, 1))
    return counter.bytes, counter.peak


def attaching(name: str, rounds: int) -> float:
    """Seconds that attaching takes, as a share of what PEFT takes."""
    shares = []
    for _ in range(rounds):
        network, module = NETWORKS[name][0](), Tuned(NETWORKS[name][0]())
        start = time.perf_counter()
        with_peft(network)
        theirs = time.perf_counter() - start
        start = time.perf_counter()
        LoRA(rank=RANK).attach(module)
        shares.append((time.perf_counter() - start) / theirs)
    return statistics.median(shares)


def timed(
    name: str, variants: Sequence[str], against: str, args: argparse.Namespace, fit: Callable[..., None]
) -> dict[str, dict[str, Any]]:
    """Compare the steps of all variants with those of one, in turns, by the medians of every start."""
    starts = [interleave(name, variants, args, fit) for _ in range(args.starts)]
    rows = {}
    for variant in variants:
        ratios = [compared(seconds[variant], seconds[against])[0] for seconds in starts]
        times = [time for seconds in starts for time in seconds[variant]]
        row = {"ms": 1000 * statistics.median(times), "ratio": statistics.median(ratios), "range": (min(ratios), max(ratios))}
        rows[variant] = row
    return rows


def arguments(description: str | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--starts", type=int, default=4, help="how often all processes begin anew")
    parser.add_argument("--rounds", type=int, default=5, help=f"counted turns of each start, of {TURN} steps")
    parser.add_argument("--warmup", type=int, default=1, help="turns before those")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def main() -> None:
    """Command line."""
    args = arguments(__doc__)
    quiet()
    about = {"torch": torch.__version__, "peft": peft.__version__, "python": platform.python_version(), "threads": args.threads}
    results = {name: timed(name, VARIANTS, "peft", args, fit) for name in args.networks}
    for name, rows in results.items():
        for variant, row in rows.items():
            row["kept"], row["peak"] = counted(name, variant, args.device)
    attaches = {name: attaching(name, 2 * args.starts) for name in args.networks}
    for name, rows in results.items():
        table = Table(
            "variant", "step, ms", "of PEFT's", "least to most", "kept, MB", "of PEFT's", "peak, MB", "of PEFT's", title=name
        )
        for variant, row in rows.items():
            spread = "{:.3f} to {:.3f}".format(*row["range"])
            memory = [(row[key] / 1e6, row[key] / rows["peft"][key]) for key in ("kept", "peak")]
            cells = [cell for size, share in memory for cell in (f"{size:.1f}", f"{share:.3f}")]
            table.add_row(variant, f"{row['ms']:.1f}", f"{row['ratio']:.3f}", spread, *cells)
        Console().print(table)
        Console().print(f"attaching takes {attaches[name]:.2f} of PEFT's time")
    if args.output is not None:
        args.output.with_suffix(".json").write_text(
            json.dumps({"about": about, "results": results, "attaching": attaches}, indent=1)
        )


if __name__ == "__main__":
    main()
