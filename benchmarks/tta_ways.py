"""The ways through a batch that entropy methods choose among, each against the whole graph, in turns in one run.

    python benchmarks/tta_ways.py --rounds 6

EATA on a ViT-tiny with random weights: the first layers' time is the same for all ways, the share of chosen samples is set by
the entropy margin, and a tiny learning rate keeps it. Prints medians of the ratios of neighbouring batches.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from functools import partial

import timm
import torch
from tta import CLASSES, LR, MODELS, entropy_quantile, own_margin

from lightning_peft import EATA
from lightning_peft.capture.evaluation import Call
from lightning_peft.compose.run import Run
from lightning_peft.testing.modules import trainer

WAYS = [("whole", None), ("chunks", 1), ("chunks", 2), ("second-pass", None)]


def main() -> None:
    """Measure and print."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="batches of each way")
    parser.add_argument("--batch-size", type=int, default=16, help="samples in a batch")
    parser.add_argument("--image-size", type=int, default=224, help="side of the images")
    parser.add_argument("--ways", nargs="*", default=[f"{name}:{size or ''}" for name, size in WAYS], help="name:chunk size")
    args = parser.parse_args()
    torch.manual_seed(0)
    net = timm.create_model(MODELS["vit_tiny"], num_classes=CLASSES).eval()
    net.get_classifier().weight.data.normal_(std=0.1)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    print(f"{torch.get_num_threads()} threads, medians of {args.rounds} batches")
    for share in (0.25, 0.5, 1.0):
        margin = own_margin(entropy_quantile(net, images, share, args.batch_size, "cpu") if share < 1 else 100.0)
        methods = {}
        for way in args.ways:
            name, _, size = way.partition(":")
            method = EATA(
                lr=LR, e_margin=margin, d_margin=2.0, fisher_alpha=0.0, backward=name, chunk_size=int(size) if size else None
            )
            method.run = Run(trainer(), net, "", net)
            method.adapt_start(method.run)
            methods[way] = method
        seconds = {way: [] for way in methods}
        for turn in range(args.rounds + 1):
            for way, method in methods.items():
                with torch.no_grad():
                    start = time.perf_counter()
                    method.adapt(Call(partial(lambda forward, *x: forward(*x), net.forward), (images.clone(),), {}, turn, 0))
                    if turn:
                        seconds[way].append(time.perf_counter() - start)
        first = seconds[args.ways[0]]
        for way, values in seconds.items():
            ratio = statistics.median(b / a for a, b in zip(first, values, strict=True))
            print(f"share {share}: {methods[way].way}: {1e3 * statistics.median(values):.0f} ms, {ratio:.3f} of the first")


if __name__ == "__main__":
    main()
