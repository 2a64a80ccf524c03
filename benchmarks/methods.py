"""What each method does to accuracy and calibration on real data: several seeds, stated as they come out.

    python benchmarks/methods.py --study sparsity --seeds 0 1 2 --output docs/evidence/sparsity

Finished runs are kept in OUTPUT.json and skipped, so an interrupted study goes on where it stopped; several processes may work
on one study with different seeds when each has its own output, and ``--merge`` joins them.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from adapter_costs import AdapterCosts, closed_count
from delta_variants import LITE0, MINILM, STORY, Variants, deltas, rates, rest
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from lightning_peft import PSKD, NMSparsity, WeightCompander
from lightning_peft.contract import methods_of
from lightning_peft.functional import is_nm
from lightning_peft.measure.calibration import calibration_table, mean_table
from lightning_peft.report.calibration import calibration_errors_table
from lightning_peft.report.markdown import table_to_markdown
from lightning_peft_recipes.cifar10 import CIFAR10DataModule
from lightning_peft_recipes.classification import Classifier, ImageClassifier
from lightning_peft_recipes.groceries import GroceriesDataModule
from lightning_peft_recipes.image_classifier import TimmClassifier
from lightning_peft_recipes.language_model import PretrainedLanguageModel
from lightning_peft_recipes.prose import ProseDataModule
from lightning_peft_recipes.reviews import ReviewsDataModule
from lightning_peft_recipes.text_classifier import TextClassifier

Run = dict[str, Any]
Results = dict[str, dict[str, Run]]
Columns = tuple[tuple[str, str, float], ...]
"""Key of a run, heading and unit of a column."""

ZEROS: Columns = (
    ("test/accuracy", "accuracy, %", 100),
    ("test/ece", "ECE, %", 100),
    ("test/loss", "test loss", 1),
    ("zeros", "zero weights, %", 100),
    ("seconds", "training, s", 1),
)
COSTS: Columns = (
    ("trainables", "trained, thousand", 1e-3),
    ("step_ms", "step, ms", 1),
    ("memory_mb", "memory beside weights, MB", 1),
    ("file_kb", "file, kB", 1),
)


def sparse(pattern: str, recipe: str) -> Callable[[], list[Callback]]:
    """Sparsify every pointwise convolution with one recipe, its other arguments at their defaults."""
    exclude = ["first", "head", r"re:blocks\.[0123]\."]  # as in the quickstart recipe
    return lambda: [NMSparsity(pattern, recipe=recipe, targets="pointwise", exclude=exclude, fine_tune="20%")]


@dataclass(frozen=True)
class Study:
    """Variants and what they are trained on.

    Attributes:
        variants: Name to what makes the methods.
        setting: Data and network, in words.
        module: Makes the module for a learning rate.
        data: Makes the data module.
        clip: Norm to clip gradients at.
        columns: What the table shows.
        rates: Learning rates of variants that do not take ``--lr``.
    """

    variants: Variants
    setting: str
    module: Callable[[float], LightningModule]
    data: Callable[[argparse.Namespace], LightningDataModule]
    clip: float | None = None
    columns: Columns = ZEROS
    rates: Mapping[str, float] = field(default_factory=dict)


def lite0(lr: float) -> ImageClassifier:
    """EfficientNet-Lite0 with its ImageNet weights."""
    return TimmClassifier(lr=lr, head_lr_scale=10)


def groceries(args: argparse.Namespace) -> LightningDataModule:
    """675 photos for training, 1,322 for testing."""
    return GroceriesDataModule(image_size=args.image_size, batch_size=16, val=args.hold_out or "official")


class CIFAR10ResNet(ImageClassifier):
    """ResNet-18 of a quarter of the width, with the stem for images of 32 pixels that the papers use."""

    def __init__(self, lr: float) -> None:
        super().__init__(10, "sgd", lr=lr, weight_decay=5e-4, warmup=0.05)
        self.model = timm.create_model("resnet18", num_classes=10, channels=(16, 32, 64, 128), zero_init_last=False)
        first = self.model.layer1[0]
        self.model.conv1, self.model.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        first.conv1, first.downsample = nn.Conv2d(16, 16, 3, padding=1, bias=False), None
        self.model.maxpool = nn.Identity()
        self.model.to(memory_format=torch.channels_last)

    def head(self) -> nn.Module:
        """The linear layer."""
        return self.model.get_classifier()


PATTERNS, SPARSITY_RECIPES = ("2:4", "1:8", "1:16"), ("ste", "sr-ste", "mdgf-exponential")
STUDIES = {
    "sparsity": Study(
        {
            "dense": list,
            **{f"{recipe} {pattern}": sparse(pattern, recipe) for pattern in PATTERNS for recipe in SPARSITY_RECIPES},
        },
        "groceries, EfficientNet-Lite0",
        lite0,
        groceries,
        clip=1.0,
    ),
    "regularizers": Study(
        {
            "plain": list,
            "PSKD 0.3": lambda: [PSKD(alpha=0.3)],
            "PSKD 0.8": lambda: [PSKD(alpha=0.8)],
            "WeightCompander": lambda: [WeightCompander(targets="pointwise", init="fitted")],
            "all three": lambda: [
                *sparse("2:4", "mdgf-exponential")(),
                WeightCompander(targets="pointwise", init="fitted"),
                PSKD(alpha=0.3),
            ],
        },
        "groceries, EfficientNet-Lite0",
        lite0,
        groceries,
        clip=1.0,
    ),
    "compander": Study(
        {
            "plain": list,
            "learned scales": lambda: [WeightCompander()],
            "resnet18/cifar10": lambda: [WeightCompander(preset="resnet18/cifar10")],
            "fitted": lambda: [WeightCompander(init="fitted")],
        },
        "CIFAR-10, ResNet-18 of a quarter of the width",
        CIFAR10ResNet,
        lambda args: CIFAR10DataModule(train_size=args.train_size, eval_batch_size=500),
    ),
    "deltas_stories": Study(
        deltas() | rest(STORY),
        "Alice in Wonderland, story Llama of 15 M weights",
        lambda lr: PretrainedLanguageModel(lr=lr),
        lambda args: ProseDataModule(batch_size=4, eval_batch_size=8, train_size=args.train_size),
        clip=1.0,
        columns=(("test/perplexity", "perplexity", 1), *COSTS),
        rates=rates("deltas_stories"),
    ),
    "deltas_reviews": Study(
        deltas(("head",)) | rest(MINILM, ("head",)),
        "Rotten Tomatoes, MiniLM",
        lambda lr: TextClassifier(lr=lr, head_lr_scale=5e-3 / lr),
        lambda args: ReviewsDataModule(
            "rotten_tomatoes", max_length=32, batch_size=8, eval_batch_size=50, train_size=args.train_size, test_size=800
        ),
        clip=1.0,
        columns=(("test/accuracy", "accuracy, %", 100), ("test/loss", "test loss", 1), *COSTS),
        rates=rates("deltas_reviews"),
    ),
    "deltas_groceries": Study(
        deltas(("head",)) | rest(LITE0, ("head",)),
        "groceries, EfficientNet-Lite0",
        lambda lr: TimmClassifier(lr=lr, head_lr_scale=5e-3 / lr),
        groceries,
        clip=1.0,
        columns=(("test/accuracy", "accuracy, %", 100), ("test/loss", "test loss", 1), *COSTS),
        rates=rates("deltas_groceries"),
    ),
}


def trained(
    study: Study, variant: str, seed: int, lr: float, args: argparse.Namespace, **settings: Any
) -> tuple[Trainer, LightningModule, LightningDataModule, list[Callback], Run]:
    """Train once; return what was trained, the methods, and seconds with the costs if the study's columns show them."""
    seed_everything(seed, verbose=False)
    model, data = study.module(lr), study.data(args)
    callbacks, costs = study.variants[variant](), AdapterCosts()
    counted = COSTS[0] in study.columns
    count = closed_count(model, methods_of(callbacks)) if counted else 0
    trainer = Trainer(
        max_epochs=args.epochs,
        gradient_clip_val=study.clip,
        precision=args.precision,
        accelerator="auto",
        devices=1,
        callbacks=[costs, *callbacks] if counted else callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        **settings,
    )
    start = time.perf_counter()
    trainer.fit(model, datamodule=data)
    run: Run = {"seconds": time.perf_counter() - start}
    trainer.callbacks = [callback for callback in trainer.callbacks if callback not in (costs, *callbacks)]
    if counted:
        assert costs.trainables == count, f"{costs.trainables} parameters trained, {count} by the closed formula"
        run |= costs.found()
    return trainer, model, data, callbacks, run


def run_once(study: Study, variant: str, seed: int, args: argparse.Namespace) -> Run:
    """Train, test, and return the metrics with what else the study's columns show."""
    trainer, model, data, callbacks, run = trained(study, variant, seed, study.rates.get(variant, args.lr), args)
    wanted = [key for key, _, _ in study.columns]
    for callback in callbacks:
        if isinstance(callback, NMSparsity):
            weights = [layer.weight for layer in callback.select(model).values()]
            assert all(is_nm(weight, *callback.pattern, dim=1) for weight in weights), "not N:M after training"
    metrics = trainer.test(model, datamodule=data, verbose=False)[0]
    run |= {key: metrics[key] for key in wanted if key in metrics}
    if "test/ece" in wanted and isinstance(model, Classifier):
        run["calibration"] = calibration_table(*answers(model, data.test_dataloader()))
    if "zeros" in wanted:
        run["zeros"] = zeros(model)
    return run


def zeros(model: nn.Module) -> float:
    """Share of zero weights in pointwise convolutions."""
    weights = [module.weight for module in model.modules() if getattr(module, "kernel_size", None) == (1, 1)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


@torch.no_grad()
def answers(model: Classifier, batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Logits and labels of all samples."""
    model.eval()
    pairs = [model.logits_and_labels(batch) for batch in batches]
    return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])


def summarise(results: Results, columns: Columns) -> list[tuple[str, ...]]:
    """One row per variant: mean and standard deviation over seeds."""
    rows = []
    for variant, runs in results.items():
        cells = [variant, str(len(runs))]
        for key, _, scale in columns:
            values = [scale * run[key] for run in runs.values()]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        rows.append(tuple(cells))
    return rows


def calibration_text(results: Results) -> str:
    """Each estimator's mean over seeds for every variant, without those that an earlier version of this benchmark trained."""
    tables = {variant: [run.get("calibration") for run in runs.values()] for variant, runs in results.items()}
    judged = {variant: mean_table(found) for variant, found in tables.items() if all(found)}
    table = calibration_errors_table(judged, "Mean over seeds, as it is to after a temperature")
    return table_to_markdown(table) if judged else ""


def head(study: Study) -> tuple[str, ...]:
    """Headings of a study's table."""
    return ("variant", "seeds", *(heading for _, heading, _ in study.columns))


def write(results: Results, args: argparse.Namespace) -> None:
    """Write OUTPUT.json and the table OUTPUT.md; what there is to say of it is written by hand."""
    study = STUDIES[args.study]
    args.output.with_suffix(".json").write_text(json.dumps(results, indent=1))
    lines = [
        f"# {args.study}: {study.setting}, {args.epochs} epochs",
        "",
        f"`python benchmarks/methods.py --study {args.study} --epochs {args.epochs} --lr {args.lr}`; mean ± std over seeds.",
        "",
        f"| {' | '.join(head(study))} |",
        "|-" * len(head(study)) + "|",
        *(f"| {' | '.join(row)} |" for row in summarise(results, study.columns)),
        "",
        calibration_text(results),
    ]
    args.output.with_suffix(".md").write_text("\n".join(lines))


def plot(results: Results, columns: Columns, path: Path) -> None:
    """The first two columns of every variant, accuracy and calibration error: a dot a seed, a line at the mean."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 0.8 + 0.36 * len(results)), sharey=True, layout="constrained")
    for axis, (key, label, scale) in zip(axes, columns[:2], strict=True):
        for row, runs in enumerate(results.values()):
            values = [scale * run[key] for run in runs.values()]
            axis.plot(values, [row] * len(values), "o", color="C0", alpha=0.5, markeredgewidth=0)
            axis.plot([statistics.mean(values)] * 2, [row - 0.32, row + 0.32], color="black", linewidth=2)
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(results)), list(results))
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110)


def load(path: Path) -> Results:
    """Read finished runs."""
    return json.loads(path.read_text()) if path.exists() else {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says which trainings a study has."""
    parser.add_argument("--study", choices=STUDIES, required=True)
    parser.add_argument("--variants", nargs="*", default=None, help="all by default")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=128, help="pixels of a photo")
    parser.add_argument(
        "--train-size", type=int, default=None, help="training images of CIFAR-10, reviews or tokens; all by default"
    )
    parser.add_argument(
        "--hold-out", type=float, help="share of the training photos for validation, in place of the 57 official"
    )
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)


def begin(args: argparse.Namespace) -> Study:
    """Return the study, and let it run on as many threads as asked for without a word."""
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    return STUDIES[args.study]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--merge", nargs="*", type=Path, default=[], help="JSON files of other processes to join first")
    args = parser.parse_args(argv)
    study = begin(args)
    results = load(args.output.with_suffix(".json"))
    for path in args.merge:
        for variant, runs in load(path).items():
            results.setdefault(variant, {}).update(runs)
    todo = [(variant, seed) for seed in args.seeds for variant in args.variants or study.variants]
    for variant, seed in track(todo, description=args.study, console=Console(stderr=True)):
        runs = results.setdefault(variant, {})
        if str(seed) not in runs:
            runs[str(seed)] = run_once(study, variant, seed, args)
            write(results, args)
    write(results, args)
    plot(results, study.columns, args.output.with_suffix(".png"))
    table = Table(*head(study), title=args.study)
    for row in summarise(results, study.columns):
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
