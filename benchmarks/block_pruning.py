"""What is left of a language model when whole blocks leave it: each score beside the last blocks, at once and trained on.

    python benchmarks/block_pruning.py --seeds 0 1 2 --work blocks --output docs/evidence/block_pruning

The Llama of the recipe `language/grow_llama_reviews`, 16 blocks from the first step on. Every pruned one starts from the dense
network of its seed, loses its blocks at step 20 and is trained on; "none" is trained on as long. Each run is kept in `--work`,
so that an interrupted benchmark goes on. Times are of 128 tokens, one thread, in turns with the dense network.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from pruning_networks import keep_memory, kept, spread, trainer
from rich.progress import track

from lightning_peft import BlockPruning
from lightning_peft_plugins.pruning._ftwt.skipping.clock import paired_times
from lightning_peft_recipes.language_model import LanguageModel
from lightning_peft_recipes.review_texts import ReviewTextsDataModule

DEPTH, CONTEXT, CUT = 16, 128, 20
AMOUNTS = (4, 8)
CHOICES = ("influence", "taylor", "magnitude", "last")
STEPS, LR = 300, 1e-3


def build(lr: float) -> LanguageModel:
    """The module at full depth."""
    return LanguageModel(1024, CONTEXT, hidden_size=96, depth=DEPTH, heads=3, ffn=256, lr=lr)


def data_of(steps: int) -> ReviewTextsDataModule:
    """The reviews, as many as there are steps."""
    sizes: dict[str, Any] = {"train_size": steps * 8 * CONTEXT, "val_size": 32_768, "test_size": 131_072}
    data = ReviewTextsDataModule(vocab_size=1024, context=CONTEXT, batch_size=8, eval_batch_size=32, **sizes)
    data.prepare_data()
    return data


def dense(seed: int, work: Path) -> Path:
    """Train the dense network of a seed, unless that is done, and return its checkpoint."""
    path = work / f"{seed}-dense.ckpt"
    if not path.exists():
        seed_everything(seed, verbose=False)
        runner = trainer(1, [], gradient_clip_val=1.0)
        runner.fit(build(2e-3), data_of(2000))
        runner.save_checkpoint(path)
    return path


def pruning(choice: str, amount: int) -> list[BlockPruning]:
    """The method of a choice of blocks."""
    if choice == "none":
        return []
    settings: dict[str, Any] = {"start": CUT, "every": CUT}
    if choice == "last":
        settings["targets"] = [f"model.model.layers.{number}" for number in range(DEPTH - amount, DEPTH)]
    return [BlockPruning(amount, "influence" if choice == "last" else choice, **settings)]


def perplexity(module: LanguageModel) -> float:
    """On the test tokens."""
    return float(trainer(1, []).test(module, data_of(STEPS), verbose=False)[0]["test/perplexity"])


def one(seed: int, choice: str, amount: int, work: Path) -> dict[str, Any]:
    """Prune and test the network of a seed, unless that is done."""
    path = work / f"{seed}-{choice}-{amount}.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    start = torch.load(dense(seed, work), weights_only=True)["state_dict"]
    found: dict[str, Any] = {"seed": seed, "choice": choice, "amount": amount}
    for name, lr, steps in (("at_once", 0.0, CUT + 1), ("trained", LR, STEPS)):
        seed_everything(seed, verbose=False)
        module = build(lr)
        module.load_state_dict(start)
        methods = pruning(choice, amount)
        runner = trainer(1, methods, max_steps=steps, gradient_clip_val=1.0)
        runner.fit(module, data_of(STEPS))
        found[name] = perplexity(module)
        layers: Any = module.model.get_submodule("model.layers")
        assert len(layers) == DEPTH - amount
    return kept(path, found | clock(module.model.eval(), start))


@torch.inference_mode()
def clock(pruned: torch.nn.Module, start: dict[str, Any]) -> dict[str, Any]:
    """Time a pruned network beside the dense one."""
    whole = build(LR)
    whole.load_state_dict(start)
    samples = list(torch.randint(0, 1024, (16, 1, CONTEXT)))
    times = paired_times(whole.model.eval(), pruned, samples, runs=32)
    return {"speedup": [times.low, times.ratio, times.high], "ms": [1e3 * times.first, 1e3 * times.second]}


def table(runs: list[dict[str, Any]]) -> str:
    """Means over seeds, lowest and highest in brackets."""
    head = ["blocks removed", "by", "seeds", "perplexity at once", f"after {STEPS} steps", "speed-up"]
    lines = [f"| {' | '.join(head)} |", "|-" * len(head) + "|"]
    for amount, choice in dict.fromkeys((run["amount"], run["choice"]) for run in runs):
        group = [run for run in runs if (run["amount"], run["choice"]) == (amount, choice)]
        cells = [spread([run[key] for run in group], 1) for key in ("at_once", "trained")]
        cells.append(spread([run["speedup"][1] for run in group], 2))
        lines.append(f"| {amount} of {DEPTH} | {choice} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("blocks"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    cases = [("none", 0), *((choice, amount) for amount in AMOUNTS for choice in CHOICES)]
    todo = [(seed, choice, amount) for seed in args.seeds for choice, amount in cases]
    runs = [one(*each, args.work) for each in track(todo, description="blocks")]
    print(table(runs))
    if args.output:
        args.output.with_suffix(".json").write_text(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
