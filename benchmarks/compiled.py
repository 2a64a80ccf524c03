"""Counts how often a compiled network is compiled in a fit with each training method, and compares what comes of it.

    PYTHONPATH=tests/pairs python benchmarks/compiled.py --output docs/evidence/compile

The user's network is compiled with ``fullgraph=True``, so that a graph break is an error, before methods are attached: in
place, as ``torch.compile(network)``, or in ``configure_model``. Fits accumulate gradients and validate after each epoch.
Backend ``"eager"`` runs the graph as it is, so weights can be compared bit for bit with those of a fit that is not compiled.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from deltas import lean
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from overhead import quiet
from pairs import CONFIGURATIONS, Network
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.repro.after_dynamo import lookup_backend
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import Lane, LayerGrowth, LoRA, MagnitudePruning, Method, NMSparsity, WeightCompander

CLASSES, SAMPLES, BATCH, EPOCHS, ACCUMULATED, WORDS, WIDTH = 4, 32, 4, 2, 2, 16, 16
WAYS, PHASES = ("in place", "wrapped", "configure_model"), ("training", "evaluation")
EVERYWHERE: dict[str, Any] = {"targets": "all-weights", "exclude": ()}
MORE: dict[str, Callable[[], list[Method]]] = {
    **{
        f"NMSparsity, {recipe}": lambda recipe=recipe: [NMSparsity("2:4", recipe, targets="all-weights", dense=2, fine_tune=2)]
        for recipe in ("one-shot", "ste", "sr-ste", "mdgf-linear", "sdgf-stepwise")
    },
    "MagnitudePruning, gradual": lambda: [MagnitudePruning(0.5, exclude=(), start=1, end=7)],
    "LoRA, dropout": lambda: [LoRA(rank=2, dropout=0.1, checkpoint="full", **EVERYWHERE)],
    "LoRA and 2:4": lambda: [LoRA(rank=2, checkpoint="full", **EVERYWHERE), NMSparsity("2:4", **EVERYWHERE)],
    "WeightCompander, fixed": lambda: [WeightCompander(learnable=False)],
    "WeightCompander, fitted": lambda: [WeightCompander(init="fitted")],
    "LayerGrowth, zero": lambda: [LayerGrowth(operator="zero", at="step:2", start=1)],
    "LayerGrowth, msg": lambda: [LayerGrowth(operator="msg", at="step:2", start=1, grow_time=4)],
}


class Attention(nn.Module):
    """Multi-head attention of four linear layers, ``(batch, tokens, WIDTH)`` in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        """Attend."""
        heads = (each(hidden).unflatten(-1, (2, -1)).transpose(1, 2) for each in (self.query, self.key, self.value))
        output: Tensor = self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2))
        return output


class Layer(nn.Module):
    """A pre-norm encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        """Attend, and transform each token."""
        hidden = hidden + self.attention(self.norm1(hidden))
        output: Tensor = hidden + self.down(F.gelu(self.up(self.norm2(hidden))))
        return output


class Encoder(nn.Module):
    """A small transformer that classifies sequences of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        output: Tensor = self.head(self.norm(hidden).mean(1))
        return output


WATCHED = "watches its layers until it begins to act"
MASKS = "masks come into force"
TAKES_OFF = "asks the network without its attachments too, in every step"
CHANGED = "the network is another one from then on"
WHY: dict[str, str] = {
    "BALoRA": TAKES_OFF,
    "RAMT": TAKES_OFF,
    "BlockPruning": CHANGED,
    "StructuredPruning": CHANGED,
    "StageSharing": CHANGED,
    "LayerGrowth": CHANGED,
    "LayerGrowth, zero": CHANGED,
    "LayerGrowth, msg": f"{CHANGED}; once more when the mask is fully open and goes",
    "MixtureGrowth": "two members become one",
    "CorDA": WATCHED,
    "EVA": WATCHED,
    "LoRASB": WATCHED,
    "SPT": WATCHED,
    "FTWT": "counts the cost of its layers in the first call",
    "FisherEstimator": "differentiates single samples by calls of its own; statistics of batch norms are held by Python",
    "HFT": "every draw freezes other parameters; in more than seven rounds raise `torch._dynamo.config.recompile_limit`",
    "IncreLoRA": "a block in reserve, then the growth",
    "TriAdaptLoRA": "ranks grow",
    "LoRAGGPO": "perturbs from the second step on",
    "DyLoRA": "a compiled step multiplies with all ranks, of which some are zero: rounding",
    "PeftAdapter": "PEFT's own layers run as Python. Without `fullgraph` they do, uncompiled",
    "SaRA": "its values stand elsewhere, in another number",
    "SpIEL": "its values are chosen",
    "NMSparsity": "phases of the recipe; rounding in convolutions, where exactly was not looked for",
    **{f"NMSparsity, {recipe}": "phases of the recipe; rounding as above" for recipe in ("ste", "sr-ste")},
    **{f"NMSparsity, {recipe}": "phases of the recipe; rounding as above" for recipe in ("mdgf-linear", "sdgf-stepwise")},
    **dict.fromkeys(("GBLM", "GroupEnvelope", "ISSP", "MaskedPruning", "SAP", "Wanda", "NMSparsity, one-shot"), MASKS),
    "LoRA and 2:4": "phases of the recipe; rounding as above",
    "MagnitudePruning, gradual": f"{MASKS}; that more is pruned later compiles nothing",
}
PAGE = """# Networks compiled with `fullgraph=True`

    PYTHONPATH=tests/pairs python benchmarks/compiled.py --output docs/evidence/compile

The author of the network compiles it with `torch.compile(fullgraph=True)` before any method is there: a network of
convolutions in place (`network.compile()`), a transformer by `self.network = torch.compile(network)`. Each method trains it for
eight optimizer steps of two batches, in two epochs with a validation after each, with torch {torch} and the backend
`{backend}`, on the CPU. A graph break would be an error. Counted is how often the compiler was called; weights are compared
with those of the same fit without a compiler.

Without a method there are two calls: one for training, one for evaluation.

## As without a method

One call for training, one for evaluation, and the same weights, bit for bit:

{ordinary}.

## Otherwise

Numbers are the optimizer steps before which the compiler was called. A method that acts from some step on is compiled once more
there, and never in every step.

| method | network | for training | for evaluation | weights apart by | why |
|-|-|-|-|-|-|
{rows}

## Not tried

These networks do not suit them:

{refused}

## What is not in here

Methods for test time, a LightningModule that is compiled whole (it is compiled in pieces where a method reads the network's
calls), GPUs, and whole fits with other backends. The counts depend on configurations: every further moment at which a method
acts anew adds one.
"""
NETWORKS: dict[str, Callable[[], nn.Module]] = {"convolutions": Network, "transformer": Encoder}


USUAL = {"convolutions": "in place", "transformer": "wrapped"}


class Counts(Callback):
    """A backend that notes before which optimizer step it is asked to compile, by phase.

    Args:
        backend: What compiles.
    """

    def __init__(self, backend: str) -> None:
        self.steps: dict[str, list[int]] = {phase: [] for phase in PHASES}
        self._phase, self._step, self._compile = "training", 0, lookup_backend(backend)

    def __call__(self, graph: Any, inputs: Any, **options: Any) -> Any:
        self.steps[self._phase].append(self._step)
        return self._compile(graph, inputs, **options)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._phase, self._step = "training", trainer.global_step

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        self._phase, self._step = "evaluation", trainer.global_step


class Classifier(LightningModule):
    """Trains a network that its author compiles.

    Args:
        network: Name of the network.
        way: How it is compiled; ``None`` leaves it as it is.
        counts: The backend.
    """

    def __init__(self, network: str, way: str | None, counts: Counts) -> None:
        super().__init__()
        self.network: Any = NETWORKS[network]()
        self.way, self.options = way, {"backend": counts, "fullgraph": True}
        if way == "wrapped":
            self.network = torch.compile(self.network, **self.options)
        elif way == "in place":
            self.network.compile(**self.options)

    def configure_model(self) -> None:
        """Compile, where that is the way."""
        if self.way == "configure_model" and self.network._compiled_call_impl is None:
            self.network.compile(**self.options)

    def forward(self, inputs: Tensor) -> Any:
        """Logits."""
        return self.network(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Call the network."""
        self(batch[0])

    def configure_optimizers(self) -> Any:
        """SGD."""
        return torch.optim.SGD(self.parameters(), 0.1)


@dataclass
class Outcome:
    """What came of one fit.

    Attributes:
        training: Step before which the network was compiled for training, for each time.
        evaluation: The same for evaluation.
        weights: The state dict that was left, under names without the wrapper's.
        refused: Why the method did not train.
        broke: Why the graph broke.
    """

    training: list[int] = field(default_factory=list)
    evaluation: list[int] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    refused: str = ""
    broke: str = ""

    def difference(self, other: Outcome) -> float:
        """Largest difference of a weight from those of another fit; infinite where there are others."""
        if self.weights.keys() != other.weights.keys():
            return math.inf
        pairs = ((value, other.weights[name]) for name, value in self.weights.items())
        return max(math.inf if a.shape != b.shape else float((a - b).double().abs().max()) for a, b in pairs)


@cache
def data(network: str) -> TensorDataset:
    """Inputs and labels."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(WORDS, (SAMPLES, 8), generator=generator)
    inputs = tokens if network == "transformer" else torch.randn(SAMPLES, 3, 8, 8, generator=generator)
    return TensorDataset(inputs, torch.randint(CLASSES, (SAMPLES,), generator=generator))


def fit(make: Callable[[], list[Method]], network: str, way: str | None, backend: str) -> Outcome:
    """Train once."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    counts = Counts(backend)
    module, batches, outcome = Classifier(network, way, counts), DataLoader(data(network), BATCH), Outcome()
    settings = {"max_epochs": EPOCHS, "accumulate_grad_batches": ACCUMULATED, "num_sanity_val_steps": 0}
    try:
        with torch._dynamo.config.patch(recompile_limit=100, accumulated_recompile_limit=1000):
            lean(callbacks=[*make(), counts], **settings).fit(module, batches, batches)
    except MisconfigurationException as error:
        outcome.refused = str(error)
    except TorchDynamoException as error:
        outcome.broke = str(error).partition("\n")[0]
    outcome.training, outcome.evaluation = counts.steps["training"], counts.steps["evaluation"]
    outcome.weights = {name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()}
    return outcome


def compared(make: Callable[[], list[Method]], network: str, way: str, backend: str) -> dict[str, Any]:
    """Train without a compiler and with it; what came of it, as plain data."""
    plain = fit(make, network, None, backend)
    if plain.refused:
        return {"refused": plain.refused}
    found = fit(make, network, way, backend)
    told = {key: value for key in ("refused", "broke") if (value := getattr(found, key))}
    return told or {"way": way, "difference": found.difference(plain), **{key: getattr(found, key) for key in PHASES}}


def configurations() -> dict[str, Callable[[], list[Method]]]:
    """Every configuration of a training method, by name."""
    found = {name: (lambda make=make: [make()]) for name, make in CONFIGURATIONS.items() if make().lane != Lane.ADAPT}
    return {"plain": list, **found, **MORE}


def is_ordinary(found: dict[str, Any]) -> bool:
    """Whether a fit is compiled as one without a method is, and ends with the same weights."""
    return found.get("difference") == 0 and all(len(found[phase]) == 1 for phase in PHASES)


def page(results: dict[str, dict[str, Any]], backend: str) -> str:
    """The evidence as Markdown."""
    whole = [name for name, found in results.items() if all(is_ordinary(each) or "refused" in each for each in found.values())]
    rows = [
        f"| {code(name)} | {', '.join(networks)} | {cells} | {WHY.get(name, '')} |"
        for name, found in results.items()
        if name not in whole
        for cells, networks in _alike(found).items()
    ]
    refused = [
        f"- {code(name)}, {network}: {each['refused']}"
        for name, found in results.items()
        for network, each in found.items()
        if "refused" in each
    ]
    ordinary = ", ".join(code(name) for name in whole if any("refused" not in each for each in results[name].values()))
    return PAGE.format(
        torch=torch.__version__, backend=backend, ordinary=ordinary, rows="\n".join(rows), refused="\n".join(refused)
    )


def code(name: str) -> str:
    """A name with the method's class as code."""
    first, *rest = name.split(", ", 1)
    return " ".join([f"`{first}`" if first.isidentifier() and first != "plain" else first, *(f"({each})" for each in rest)])


def _alike(found: dict[str, Any]) -> dict[str, list[str]]:
    """Networks by what came of a method on them."""
    alike: dict[str, list[str]] = {}
    for network, each in found.items():
        if "refused" not in each:
            alike.setdefault(_cells(each), []).append(network)
    return alike


def _cells(found: dict[str, Any]) -> str:
    if "broke" in found:
        return "breaks the graph | | "
    steps = [", ".join(map(str, found[phase])) for phase in PHASES]
    return " | ".join([*steps, f"{found['difference']:.1g}" if found["difference"] else "none"])


def main() -> None:
    """Read the command line, train and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = configurations()
    parser.add_argument("--methods", nargs="+", choices=known, default=list(known))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--way", choices=WAYS, help="by default in place for one network, wrapped for the other")
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--output", type=Path, help="what is in OUTPUT.json is not tried again")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    record = args.output.with_suffix(".json") if args.output else None
    results: dict[str, dict[str, Any]] = json.loads(record.read_text()) if record and record.exists() else {}
    for name, network in itertools.product(args.methods, args.networks):
        if network not in results.setdefault(name, {}):
            results[name][network] = compared(known[name], network, args.way or USUAL[network], args.backend)
            print(name, network, results[name][network])
            if record:
                record.write_text(json.dumps(results, indent=1) + "\n")
    if args.output:
        args.output.with_suffix(".md").write_text(
            page({name: results[name] for name in known if name in results}, args.backend)
        )


if __name__ == "__main__":
    main()
