"""Test-time adaptation against the official codes: time and memory, on the same model, batches and selections, in one run.

    git clone https://github.com/mr-eggplant/EATA; git clone https://github.com/mr-eggplant/SAR
    git clone https://github.com/DequanWang/tent
    python benchmarks/tta.py --eata EATA --sar SAR --tent tent --output docs/evidence/tta_speed

Ours runs inside ``trainer.test``; after each of its batches the official code adapts its own copy of the model to the same
batch, so both see the machine at the same moments. The share of samples that are chosen is set by the entropy margin; learning
rates are tiny, so that it stays. Predictions are compared. A method without its official checkout is skipped.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import logging
import math
import os
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import EATA, SAR, Tent
from lightning_peft.functional import softmax_entropy
from lightning_peft_plugins.test_time._shared.entropy import EntropyMethod

CLASSES = 100
LR = 1e-8  # the model, and with it the selection, stays what it is
BARS = {
    ("vit_tiny", "EATA", 0.5): 0.85,
    ("vit_tiny", "EATA", 0.25): 0.65,
    ("resnet18", "EATA", 0.5): 1.0,
    ("resnet18", "EATA", 0.25): 1.0,
    ("vit_tiny", "Tent", 1.0): 1.0,
    ("resnet18", "Tent", 1.0): 1.0,
}
OFFICIAL = {"Tent": "tent", "EATA": "eata", "SAR": "sar"}
MODELS = {"vit_tiny": "vit_tiny_patch16_224", "resnet18": "resnet18"}


class Classifier(LightningModule):
    """A plain classifier; keeps the predictions of the last batch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def test_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        self.last = self.net(batch[0])


class Official(Callback):
    """Times our batch, then lets the official code adapt to it and times that."""

    def __init__(self, adapt: Callable[[Tensor], Tensor], warmup: int) -> None:
        self.adapt, self.warmup = adapt, warmup
        self.ours: list[float] = []
        self.theirs: list[float] = []
        self.difference = 0.0

    def on_test_batch_start(self, *args: Any) -> None:
        self.start = now()

    def on_test_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any) -> None:
        middle = now()
        self.way = next(c for c in trainer.callbacks if isinstance(c, EntropyMethod)).way
        with torch.inference_mode(False):
            x = batch[0].clone()
            start = now()
            logits = self.adapt(x)
            end = now()
        if batch_idx >= self.warmup:
            self.ours.append(middle - self.start)
            self.theirs.append(end - start)
        self.difference = max(self.difference, float((logits - module.last).detach().abs().max()))


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def graph_bytes() -> Iterator[list[int]]:
    """Peak bytes that graphs hold for their backward passes; leaves (weights, images) are there anyway and do not count."""
    holders: Counter[int] = Counter()
    live, peak = [0], [0]

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            storage = tensor.untyped_storage()
            self.tensor, self.key = tensor.detach(), storage.data_ptr()  # with its graph it would keep itself alive
            self.size = 0 if tensor.is_leaf else storage.nbytes()
            holders[self.key] += 1
            if holders[self.key] == 1:
                live[0] += self.size
                peak[0] = max(peak[0], live[0])

        def __del__(self) -> None:
            holders[self.key] -= 1
            if holders[self.key] == 0:
                live[0] -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        yield peak


def load(folder: Path, file: str) -> Any:
    """Import one file of an official checkout."""
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location(f"official_{folder.name}_{file}", folder / f"{file}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(folder))


def official_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, LR, momentum=0.9)


def official_model(net: nn.Module) -> tuple[nn.Module, list[nn.Parameter]]:
    """Configure as the SAR repository does for all its methods: every norm layer, nothing else."""
    net = copy.deepcopy(net).requires_grad_(False)
    parameters: list[nn.Parameter] = []
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
            parameters += list(module.requires_grad_(True).parameters())
    return net, parameters


def rivals(name: str, net: nn.Module, margin: float, args: argparse.Namespace) -> tuple[Any, Callable[[Tensor], Tensor]] | None:
    """Our method and the official one with the same settings; None without the official checkout."""
    folder = getattr(args, OFFICIAL[name])
    if folder is None:
        return None
    official, parameters = official_model(net)
    fishers = {n: torch.rand_like(p) for n, p in official.named_parameters() if p.requires_grad}
    own = own_margin(margin)
    if name == "Tent":
        model = load(folder, "tent").Tent(official, official_optimizer(parameters))
        return Tent(lr=LR), model
    if name == "EATA":
        pairs = {n: [f, dict(official.named_parameters())[n].detach().clone()] for n, f in fishers.items()}
        model = load(folder, "eata").EATA(
            official, official_optimizer(parameters), pairs, fisher_alpha=2000.0, e_margin=margin, d_margin=2.0
        )
        fisher = {f"net.{n}": f for n, f in fishers.items()}
        return EATA(lr=LR, e_margin=own, d_margin=2.0, fisher=fisher), model
    sam = load(folder, "sam").SAM
    optimizer = sam(parameters, torch.optim.SGD, lr=LR, momentum=0.9)
    model = load(folder, "sar").SAR(official, optimizer, margin_e0=margin, reset_constant_em=-1.0)
    return SAR(lr=LR, e_margin=own, exclude=(), reset_threshold=-1.0), model


def compare(model: str, name: str, share: float, args: argparse.Namespace, device: str) -> dict[str, Any] | None:
    """Run one method on one model at one share of chosen samples."""
    torch.manual_seed(0)
    net = timm.create_model(MODELS[model], num_classes=CLASSES).eval().to(device)
    batches = args.warmup + args.batches
    images = torch.randn(args.batch_size * batches, 3, args.image_size, args.image_size)
    head = net.get_classifier()
    head.weight.data.normal_(std=0.1)
    margin = entropy_quantile(net, images, share, args.batch_size, device)
    found = rivals(name, net, margin, args)
    if found is None:
        return None
    ours, theirs = found
    memory = {}
    x = images[: args.batch_size].to(device)
    with graph_bytes() as peak:
        theirs(x)
    memory["theirs"] = peak[0]
    clock = Official(theirs, args.warmup)
    trainer = Trainer(
        accelerator=device,
        devices=1,
        callbacks=[clock, ours],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(images), batch_size=args.batch_size)
    trainer.test(Classifier(net), loader, verbose=False)
    way = clock.way
    if way.name == "workers":  # the hooks that count see one thread; the workers hold as much each
        ours.backward, ours.chunk_size, ours.weighs_in_threads = "chunks", way.chunk_size, False
    with graph_bytes() as peak:
        trainer = Trainer(
            accelerator=device, devices=1, callbacks=[ours], logger=False, enable_progress_bar=False, limit_test_batches=1
        )
        trainer.test(Classifier(net), loader, verbose=False)
    memory["ours"] = peak[0] * (args.threads if way.name == "workers" else 1)
    ratios = [a / b for a, b in zip(clock.ours, clock.theirs, strict=True)]
    return {
        "model": model,
        "method": name,
        "share": share,
        "ours_ms": 1000 * statistics.median(clock.ours) / args.batch_size,
        "theirs_ms": 1000 * statistics.median(clock.theirs) / args.batch_size,
        "ratio": statistics.median(ratios),
        "low": sorted(ratios)[len(ratios) // 4],
        "high": sorted(ratios)[3 * len(ratios) // 4],
        "bar": BARS.get((model, name, share)),
        "way": str(way),
        "memory_ratio": memory["ours"] / memory["theirs"],
        "difference": clock.difference,
    }


def own_margin(margin: float) -> float:
    return margin / math.log(CLASSES)


def entropy_quantile(net: nn.Module, images: Tensor, share: float, size: int, device: str) -> float:
    """Entropy below which the wanted share of the predictions lies, BatchNorm on batch statistics."""
    model, _ = official_model(net)
    entropies = torch.cat([softmax_entropy(model(part.to(device))) for part in images.split(size)])
    return float(entropies.quantile(share)) if share < 1 else 2 * math.log(CLASSES)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("eata", "sar", "tent"):
        parser.add_argument(f"--{name}", type=Path, help="official checkout")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=OFFICIAL, default=list(OFFICIAL))
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=10, help="batches in which the ways are tried")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for package in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{package}").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cells = [(m, n, s) for m in args.models for n in args.methods for s in ((1.0,) if n == "Tent" else (0.5, 0.25))]
    rows = []
    for cell in track(cells, description="tta", console=Console(stderr=True)):
        row = compare(*cell, args, device)
        if row is None:
            Console(stderr=True).print(f"{cell[1]}: no official checkout given with --{OFFICIAL[cell[1]]}, skipped")
        else:
            rows.append(row)
    head = ("model", "method", "chosen", "ours, ms a sample", "official", "ratio", "quartiles", "bar", "way", "graph bytes")
    table = Table(*head, "difference")
    for r in rows:
        table.add_row(
            r["model"],
            r["method"],
            f"{r['share']:.2f}",
            f"{r['ours_ms']:.1f}",
            f"{r['theirs_ms']:.1f}",
            f"{r['ratio']:.3f}",
            f"{r['low']:.3f} to {r['high']:.3f}",
            "" if r["bar"] is None else f"<= {r['bar']:.2f}",
            r["way"],
            f"{r['memory_ratio']:.2f}",
            f"{r['difference']:.1e}",
        )
    Console(width=180).print(table)
    if args.output is not None:
        args.output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    # glibc gives large activations back or keeps them as it happens to have learnt; both sides are to keep theirs.
    if os.environ.get("MALLOC_MMAP_MAX_") is None:
        os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36)}
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main()
