"""Every registered method in one small configuration, and what two of them do in one short training."""

from __future__ import annotations

import itertools
import traceback
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_peft as peft
from lightning_peft import Lane, Method
from lightning_peft.testing.modules import trainer
from lightning_peft.testing.trace import difference, trace, without

CLASSES, STEPS = 4, 4

CONFIGURATIONS: dict[str, Callable[[], Method]] = {
    "ALLoRA": lambda: peft.ALLoRA(rank=2, targets="all-weights", exclude=(), checkpoint="full"),
    "AdaLoRA": lambda: peft.AdaLoRA(rank=2, target=1, targets="all-weights", exclude=(), checkpoint="full"),
    "BALoRA": lambda: peft.BALoRA(rank=2, targets="all-weights", exclude=(), checkpoint="full"),
    "BatchNormAdapt": peft.BatchNormAdapt,
    "BitFit": lambda: peft.BitFit(checkpoint="full"),
    "BlockPruning": lambda: peft.BlockPruning(1, start=2),
    "Bone": lambda: peft.Bone(rank=1, targets="all-weights", exclude=(), checkpoint="full"),
    "CMF": lambda: peft.CMF(lr=0.1),
    "CoTTA": lambda: peft.CoTTA(views=2, threshold=1.0),
    "CorDA": lambda: peft.CorDA(rank=2, looks=1, targets="all-weights", exclude=(), checkpoint="full"),
    "DSEE": lambda: peft.DSEE(rank=1, sparse=8, targets="all-weights", exclude=(), checkpoint="full"),
    "DeYO": lambda: peft.DeYO(lr=0.1, e_threshold=2.0, drop=-1.0),
    "DoRA": lambda: peft.DoRA(rank=2, targets="all-weights", exclude=(), checkpoint="full"),
    "DyLoRA": lambda: peft.DyLoRA(rank=2, targets="all-weights", exclude=(), checkpoint="full"),
    "EATA": lambda: peft.EATA(lr=0.1, fisher_alpha=0.0, e_margin=2.0, d_margin=2.0),
    "ETA": lambda: peft.ETA(lr=0.1, e_margin=2.0, d_margin=2.0),
    "EVA": lambda: peft.EVA(rank=2, looks=1, targets="all-weights", exclude=(), checkpoint="full"),
    "FLoRA": lambda: peft.FLoRA(rank=2, targets="all-weights", exclude=(), checkpoint="full"),
    "FOA": lambda: peft.FOA(source=batches(3), population=3),
    "FTWT": lambda: peft.FTWT(0.5, tokens="sample", lr_scale=100.0),
    "FisherEstimator": peft.FisherEstimator,
    "GBLM": lambda: peft.GBLM(0.5, exclude=()),
    "GroupEnvelope": lambda: peft.GroupEnvelope(0.5, exclude=(), end=3),
    "HFT": lambda: peft.HFT(every=2),
    "ISSP": lambda: peft.ISSP(0.5, exclude=(), end=3),
    "IncreLoRA": lambda: peft.IncreLoRA(top=16, warmup=0, every=1, exclude=(), checkpoint="full"),
    "KaSA": lambda: peft.KaSA(rank=1, targets="all-weights", exclude=(), checkpoint="full"),
    "LAME": lambda: peft.LAME(neighbours=2),
    "LIFT": lambda: peft.LIFT(rank=1, every=2, targets="all-weights", exclude=(), checkpoint="full"),
    "LayerGrowth": lambda: peft.LayerGrowth(at="step:2", start=2),
    "LoLDU": lambda: peft.LoLDU(rank=2, targets="all-weights", exclude=(), checkpoint="full"),
    "LoRA": lambda: peft.LoRA(rank=2, targets="all-weights", exclude=(), checkpoint="full"),
    "LoRAGGPO": lambda: peft.LoRAGGPO(rank=2, targets="all-weights", exclude=(), checkpoint="full"),
    "LoRASB": lambda: peft.LoRASB(rank=2, looks=1, targets="all-weights", exclude=(), checkpoint="full"),
    "LoRAXS": lambda: peft.LoRAXS(rank=2, targets="all-weights", exclude=(), checkpoint="full"),
    "MEMO": lambda: peft.MEMO(views=2, lr=0.1),
    "MagnitudePruning": lambda: peft.MagnitudePruning(0.5, exclude=()),
    "MaskedPruning": lambda: peft.MaskedPruning(0.5, "taylor", exclude=(), start=1, end=3, every=1),
    "MiSS": lambda: peft.MiSS(rank=2, targets="all-weights", exclude=(), checkpoint="full"),
    "MixtureGrowth": lambda: peft.MixtureGrowth(at="step:2"),
    "NMSparsity": lambda: peft.NMSparsity("2:4", targets="all-weights"),
    "NOLA": lambda: peft.NOLA(rank=2, bases=4, targets="all-weights", exclude=(), checkpoint="full"),
    "NormTuning": lambda: peft.NormTuning(checkpoint="full"),
    "OLoRA": lambda: peft.OLoRA(rank=2, targets="all-weights", exclude=(), checkpoint="full"),
    "PEGO": lambda: peft.PEGO(rank=1, members=2, targets="all-weights", exclude=(), checkpoint="full"),
    "PERP": lambda: peft.PERP(exclude=()),
    "PHM": lambda: peft.PHM(terms=1, targets="all-weights", exclude=(), checkpoint="full"),
    "PSKD": peft.PSKD,
    "PeftAdapter": lambda: peft.PeftAdapter({"peft_type": "LOHA", "r": 2}, targets="all-weights", checkpoint="full"),
    "PiSSA": lambda: peft.PiSSA(rank=2, targets="all-weights", exclude=(), checkpoint="full"),
    "RAMT": lambda: peft.RAMT(0.5, threshold=0.0, targets="all-weights", exclude=(), checkpoint="full"),
    "RDumb": lambda: peft.RDumb(lr=0.1, e_margin=2.0, d_margin=2.0),
    "RMT": lambda: peft.RMT(lr=0.1, source=batches(3), warm_up=4),
    "ROID": lambda: peft.ROID(lr=0.1),
    "RandLoRA": lambda: peft.RandLoRA(rank=2, alpha=4, targets="all-weights", exclude=(), checkpoint="full"),
    "RoTTA": lambda: peft.RoTTA(lr=0.1, capacity=4, every=4),
    "SALT": lambda: peft.SALT(rank=1, share=0.5, targets="all-weights", exclude=(), checkpoint="full"),
    "SAP": lambda: peft.SAP(exclude=(), start=2, end=3, every=1),
    "SAR": lambda: peft.SAR(lr=0.1, e_margin=2.0),
    "SORSA": lambda: peft.SORSA(rank=2, targets="all-weights", exclude=(), checkpoint="full"),
    "SPT": lambda: peft.SPT(budget=0.2, rank=1, looks=1, targets="all-weights", exclude=(), checkpoint="full"),
    "SSF": lambda: peft.SSF(checkpoint="full"),
    "SVFit": lambda: peft.SVFit(rank=2, targets="all-weights", exclude=(), checkpoint="full"),
    "SaRA": lambda: peft.SaRA(0.1, reselect=2, targets="all-weights", exclude=(), checkpoint="full"),
    "SelfSupervisedAdapt": lambda: peft.SelfSupervisedAdapt(sharpness, lr=0.1),
    "SoKA": lambda: peft.SoKA(rank=1, targets="all-weights", exclude=(), checkpoint="full"),
    "SpIEL": lambda: peft.SpIEL(0.1, every=3, window=1, targets="all-weights", exclude=(), checkpoint="full"),
    "StageSharing": lambda: peft.StageSharing([2, 2], at="step:2"),
    "StructuredPruning": lambda: peft.StructuredPruning(0.4, start=2),
    "T3A": peft.T3A,
    "TLoRA": lambda: peft.TLoRA(rank=2, targets="all-weights", exclude=(), checkpoint="full"),
    "TemporaryForgetting": lambda: peft.TemporaryForgetting(2, std=0.1, targets=["network.head"]),
    "Tent": lambda: peft.Tent(lr=0.1),
    "TrainedRankPruning": lambda: peft.TrainedRankPruning(0.5, period=2, exclude=()),
    "TriAdaptLoRA": lambda: peft.TriAdaptLoRA(target=2, every=1, end=2, exclude=(), checkpoint="full"),
    "Wanda": lambda: peft.Wanda(0.5, exclude=()),
    "WeightCompander": peft.WeightCompander,
}
ELSEWHERE = {"FOA": "shows no such way"}  # methods for networks of another kind, and how this one is refused
PAIRS = list(itertools.combinations(CONFIGURATIONS, 2))


class Block(nn.Module):
    """A residual block, ``(batch, 8, height, width)`` in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv1, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = inputs + self.conv2(self.conv1(self.norm(inputs)).relu())
        return output


class Network(nn.Module):
    """Has something for every method: convolutions, batch norms, a list of equal residual blocks, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.head(self.norm(self.blocks(self.stem(images))).relu().mean((2, 3)))
        return output


class Classifier(LightningModule):
    """Asks nothing of Lightning: no logging, no scheduler, no question about the length of the training."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()
        self.answers: list[Tensor] = []

    def forward(self, images: Tensor) -> Any:
        return self.network(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.answers.append(self(batch[0]).clone())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def sharpness(module: LightningModule, batch: Any) -> Tensor:
    """A loss that needs no label."""
    return -module(batch[0]).softmax(-1).square().mean()


@cache
def data(samples: int = 8, seed: int = 0) -> TensorDataset:
    """Images and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 3, 8, 8, generator=generator)
    return TensorDataset(images, torch.randint(CLASSES, (samples,), generator=generator))


def batches(seed: int = 0) -> DataLoader[Any]:
    """Two batches of four."""
    return DataLoader(data(seed=seed), batch_size=4)


def run(*methods: Method, strategy: Any = "auto") -> tuple[Trainer, Classifier]:
    """Train for four steps with validation and its sanity check; methods that adapt act in a test afterwards.

    Args:
        methods: The methods, new.
        strategy: Strategy of the last of these runs.
    """
    torch.manual_seed(0)
    module = Classifier()
    tests = not methods or any(method.lane == Lane.ADAPT for method in methods)
    runner = trainer(callbacks=list(methods), max_epochs=2, num_sanity_val_steps=2, strategy="auto" if tests else strategy)
    runner.fit(module, batches(), batches(1))
    if tests:
        tester = trainer(callbacks=list(methods), strategy=strategy)
        tester.test(module, batches(2), verbose=False)
    return runner, module


@cache
def plain() -> tuple[Trainer, Classifier]:
    """The same without a method."""
    return run()


@cache
def outcome(*names: str) -> str:
    """What methods do together: ``""`` when they train and leave a clean module, else the words of the refusal.

    Raises:
        AssertionError: They left something on the module, broke it, or were refused without help.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(gone before|never|did not).*", category=UserWarning)
            _, module = run(*(CONFIGURATIONS[name]() for name in names))
    except MisconfigurationException as error:
        assert_helpful(error, names)
        return str(error)
    assert_clean(module)
    return ""


def assert_helpful(error: MisconfigurationException, names: Iterable[str]) -> None:
    """Fail unless a refusal is the library's own, and names both methods or what to do."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    assert "lightning_peft" in raised_in, f"a refusal from {raised_in}: {error}"
    both = all(CONFIGURATIONS[name]().name in str(error) for name in names)
    cure = any(word in str(error) for word in ("exclude=", "targets=", "network=", "Remove ", "Train with", "Give "))
    assert both or cure, f"a refusal that names neither both methods nor a cure: {error}"


def assert_clean(module: Classifier) -> None:
    """Fail unless a module is finite and carries nothing that plain Lightning would not have left."""
    broken = [name for name, value in module.state_dict().items() if not value.isfinite().all()]
    broken += [f"answers[{number}]" for number, answer in enumerate(module.answers) if not answer.isfinite().all()]
    assert not broken, f"not finite: {broken}"
    clean, now = trace(plain()[1]), trace(module)
    found = difference(without(clean, now), without(now, clean))
    assert found is None, f"plain Lightning against these methods: {found}"
    mapped = [name for name in now["state"] if "parametrizations" in name]
    assert not mapped, f"weight maps were left on {mapped}"
