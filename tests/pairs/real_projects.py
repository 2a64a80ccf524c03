"""Modules of real projects, from checkouts and installed packages, each with random data of the form that it takes.

The checkouts lie side by side in one folder: ``pytorch-lightning`` and ``tutorials`` of Lightning-AI, ashleve's
``lightning-hydra-template`` and lightly-ai's ``lightly``. Packages: torchgeo, pytorch-forecasting, chemprop, scvi-tools,
torch-uncertainty, neuralforecast. A project that is not there is left out.
"""

from __future__ import annotations

import importlib
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import timm
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from project_styles import Rows, vector
from source_classes import Source
from torch import Tensor, nn
from torch.utils.data import DataLoader

SIDE, BATCH, SAMPLES = 32, 4, 8


@dataclass
class Project:
    """A module with its data.

    Attributes:
        module: As its project builds it, smaller where the project's own size is an argument.
        data: Gives a new loader.
        callbacks: That the module cannot train without.
    """

    module: LightningModule
    data: Callable[[], Any]
    callbacks: tuple[Callback, ...] = ()


PROJECTS: dict[str, Callable[[Path], Project]] = {}


def project(name: str) -> Callable[[Callable[[Path], Project]], Callable[[Path], Project]]:
    """Register a function from the folder of checkouts to a project."""

    def keep(build: Callable[[Path], Project]) -> Callable[[Path], Project]:
        PROJECTS[name] = build
        return build

    return keep


def rows(make: Callable[[torch.Generator], Any], **settings: Any) -> Callable[[], Any]:
    """Loaders of samples that are made from a generator."""
    return lambda: DataLoader(Rows(make, SAMPLES), **{"batch_size": BATCH, **settings})


def picture(generator: torch.Generator, side: int = SIDE, channels: int = 3) -> Tensor:
    return torch.rand(channels, side, side, generator=generator)


def labelled(classes: int = 10, side: int = SIDE, channels: int = 3) -> Callable[[], Any]:
    """Pictures with a class."""
    return rows(lambda g: (picture(g, side, channels), torch.randint(classes, (), generator=g)))


def views(count: int, side: int = SIDE) -> Callable[[], Any]:
    """Several views of a picture, its class and its file name, as lightly's data sets give them."""
    return rows(lambda g: ([picture(g, side) for _ in range(count)], torch.randint(10, (), generator=g), "name"))


def resnet18(*_: Any, num_classes: int = 1000, **__: Any) -> nn.Module:
    """An untrained network, whatever weights were asked for."""
    return importlib.import_module("torchvision").models.resnet18(num_classes=num_classes)


class Untrained:
    """The part of torchvision that a script uses, without weights to fetch."""

    models = SimpleNamespace(resnet18=resnet18)


def examples(name: str, file: str, module: str, data: Callable[[], Any], *arguments: Any, **given: Any) -> None:
    """Register a class of Lightning's examples."""

    @project(name)
    def build(folder: Path) -> Project:
        source = Source(folder / "pytorch-lightning" / "examples" / file, **given)
        return Project(getattr(source, module)(*(each(source) if callable(each) else each for each in arguments)), data)


DIGITS = labelled(channels=1, side=28)
examples("examples: autoencoder", "pytorch/basics/autoencoder.py", "LitAutoEncoder", DIGITS)
examples("examples: image classifier", "pytorch/basics/backbone_image_classifier.py", "LitClassifier", DIGITS)
examples(
    *("examples: transformer", "pytorch/basics/transformer.py", "LanguageModel"),
    rows(lambda g: (torch.randint(50, (12,), generator=g), torch.randint(50, (12,), generator=g))),
    50,
)
examples(
    *("examples: profiler", "pytorch/basics/profiler_example.py", "ModelToProfile", labelled()),
    get_torchvision_model=resnet18,
)
examples(
    *("examples: profiler, by hand", "pytorch/basics/profiler_example.py", "ModelToProfile", labelled()),
    *("resnet18", False),
    get_torchvision_model=resnet18,
)
examples(
    *("examples: servable", "pytorch/servable_module/production.py", "LitModule", labelled()), get_torchvision_model=resnet18
)
examples("examples: boring", "pytorch/bug_report/bug_report_model.py", "BoringModel", rows(partial(vector, size=32)))
examples("examples: GAN", "pytorch/domain_templates/generative_adversarial_net.py", "GAN", DIGITS)


@project("examples: U-Net")
def unet(folder: Path) -> Project:
    source = Source(folder / "pytorch-lightning/examples/pytorch/domain_templates/semantic_segmentation.py")
    place = Path(tempfile.mkdtemp()) / "Kitti"
    source._create_synth_kitti_dataset(str(place), image_dims=(64, 64))
    module = source.SegModel(str(place), features_start=8)
    module.learning_rate = module.lr  # which its optimizer asks for, and nobody sets
    return Project(module, rows(lambda g: (picture(g), torch.randint(19, (SIDE, SIDE), generator=g))))


@project("examples: transfer learning")
def transfer(folder: Path) -> Project:
    path = folder / "pytorch-lightning/examples/pytorch/domain_templates/computer_vision_fine_tuning.py"
    source = Source(path, get_torchvision_model=lambda *_, **__: importlib.import_module("torchvision").models.resnet50())
    finetuning = source.MilestonesFinetuning(milestones=(1, 2))
    return Project(source.TransferLearningModel(), labelled(2), (finetuning,))


class OldEnvironment:
    """gymnasium behind the interface of gym that these examples were written for."""

    def __init__(self, name: str) -> None:
        self._env = importlib.import_module("gymnasium").make(name.replace("-v0", "-v1"))
        self.observation_space, self.action_space = self._env.observation_space, self._env.action_space

    def reset(self) -> Any:
        return self._env.reset()[0]

    def step(self, action: Any) -> Any:
        state, reward, ended, cut, more = self._env.step(int(action) if np.ndim(action) == 0 else action)
        return state, reward, ended or cut, more


class OldGym:
    make, Env = OldEnvironment, OldEnvironment
    spaces = None


def acting(folder: Path, path: str, module: str, *arguments: Any, **settings: Any) -> Project:
    """A module that has its loader with itself and acts in an environment."""
    spaces = importlib.import_module("gymnasium").spaces
    source = Source(folder / path, gym=type("gym", (OldGym,), {"spaces": spaces}))
    built = getattr(source, module)(*arguments, **settings)
    return Project(built, built.train_dataloader)


@project("examples: DQN")
def dqn(folder: Path) -> Project:
    path = "pytorch-lightning/examples/pytorch/domain_templates/reinforce_learn_Qnet.py"
    return acting(folder, path, "DQNLightning", "CartPole-v0", warm_start_steps=200, episode_length=16)


@project("examples: PPO")
def ppo(folder: Path) -> Project:
    path = "pytorch-lightning/examples/pytorch/domain_templates/reinforce_learn_ppo.py"
    return acting(folder, path, "PPOLightning", "CartPole-v0", batch_size=8, steps_per_epoch=32)


def tutorial(name: str, chapter: str, build: Callable[[Source], Any], data: Callable[[], Any], **given: Any) -> None:
    """Register a module of Lightning's tutorials."""

    @project(f"tutorials: {name}")
    def of(folder: Path) -> Project:
        (file,) = (folder / "tutorials").glob(f"*/{chapter}*/*.py")
        return Project(build(Source(file, **given)), data)


def cifar(source: Source, name: str, **model: Any) -> Any:
    """A network of the chapter on architectures."""
    found = {"ResNet": "ResNet", "GoogleNet": "GoogleNet", "DenseNet": "DenseNet"}[name]
    source.model_dict = {name: getattr(source, found)}
    return source.CIFARModule(name, {"num_classes": 10, "act_fn_name": "relu", **model}, "Adam", {"lr": 1e-3})


def cycle_of_twos(count: int) -> Callable[[torch.Generator], Any]:
    """Pictures of few classes, so that every half of a batch holds each."""
    return lambda g: (picture(g), torch.randint(2, (), generator=g))


PICTURES = [(torch.zeros(1, 28, 28), 0)]
VIT = {"embed_dim": 32, "hidden_dim": 64, "num_heads": 4, "num_layers": 3, "patch_size": 8, "num_channels": 3}
VIT |= {"num_patches": 16, "num_classes": 10, "dropout": 0.2}
tutorial("ViT", "11-vision", lambda s: s.ViT(VIT, 1e-3), labelled(), train_loader=[(torch.zeros(2, 3, SIDE, SIDE), 0)])
tutorial("ResNet", "04-inception", lambda s: cifar(s, "ResNet", c_hidden=[8, 16, 32], num_blocks=[2, 2, 2]), labelled())
tutorial("GoogleNet", "04-inception", lambda s: cifar(s, "GoogleNet"), labelled())
tutorial(
    *("DenseNet", "04-inception"),
    lambda s: cifar(s, "DenseNet", num_layers=[2, 2, 2, 2], bn_size=2, growth_rate=8),
    labelled(),
)
tutorial(
    "transformer",
    "05-transformers",
    lambda s: s.ReversePredictor(10, 32, 10, 1, 3, lr=1e-3, warmup=5, max_iters=100),
    rows(lambda g: ((x := torch.randint(10, (16,), generator=g)), x.flip(0))),
)
tutorial(
    *("energy model", "07-deep-energy", lambda s: s.DeepEnergyModel((1, 28, 28), BATCH, hidden_features=16)),
    DIGITS,
    device=torch.device("cpu"),
)
tutorial("autoencoder", "08-deep-auto", lambda s: s.Autoencoder(8, 32), labelled())
tutorial(
    *("flow", "09-normalizing", lambda s: s.create_multiscale_flow()),
    rows(lambda g: (torch.randint(256, (1, 28, 28), generator=g), torch.randint(10, (), generator=g))),
    train_set=PICTURES,
    device=torch.device("cpu"),
)
tutorial(
    *("PixelCNN", "10-autoregressive", lambda s: s.PixelCNN(1, 16)),
    rows(lambda g: (torch.randint(256, (1, 28, 28), generator=g), torch.randint(10, (), generator=g))),
    train_set=[(torch.zeros(1, 28, 28, dtype=torch.long), 0)],
)
tutorial(
    "ProtoNet",
    "12-meta",
    lambda s: s.ProtoNet(16, 1e-3),
    rows(cycle_of_twos(2), batch_size=8),
)
tutorial(
    "ProtoMAML",
    "12-meta",
    lambda s: s.ProtoMAML(16, 1e-3, 0.1, 0.1, 1),
    rows(
        lambda g: (torch.stack([picture(g) for _ in range(8)]), torch.tensor([0, 1] * 4)),
        batch_size=2,
        collate_fn=list,
    ),
)
tutorial(
    "SimCLR",
    "13-contrastive",
    lambda s: s.SimCLR(16, 1e-3, 0.07, 1e-4),
    rows(lambda g: ([picture(g), picture(g)], torch.randint(10, (), generator=g))),
)
tutorial(
    "logistic regression",
    "13-contrastive",
    lambda s: s.LogisticRegression(32, 10, 1e-3, 1e-3),
    rows(lambda g: (vector(g, 32), torch.randint(10, (), generator=g))),
)
tutorial(
    "CIFAR-10 baseline",
    "cifar10-baseline",
    lambda s: s.LitResnet(),
    labelled(),
    BATCH_SIZE=256,
)
tutorial("MNIST", "mnist-hello", lambda s: offline(s.LitMNIST()), DIGITS)
tutorial("MNIST, shortest", "mnist-hello", lambda s: s.MNISTModel(), DIGITS)
tutorial("GAN", "basic-gan", lambda s: s.GAN(1, 28, 28), DIGITS)
tutorial(
    "Barlow twins",
    "barlow-twins",
    lambda s: s.BarlowTwins(headless(), 512, SAMPLES, BATCH),
    rows(lambda g: ((picture(g), picture(g), picture(g)), torch.randint(10, (), generator=g))),
)
tutorial(
    "augmentation on the device",
    "augmentation_kornia",
    lambda s: offline(s.CoolSystem()),
    labelled(1000),
    torchvision=Untrained,
)


def offline(module: LightningModule) -> LightningModule:
    """Keep a module that fetches its data from doing so."""
    module.prepare_data = module.setup = lambda *_, **__: None
    return module


def headless() -> nn.Module:
    network = resnet18()
    network.fc = nn.Identity()
    return network


@project("tutorials: DQN")
def tutorial_dqn(folder: Path) -> Project:
    path = "tutorials/lightning_examples/reinforce-learning-DQN/dqn.py"
    return acting(folder, path, "DQNLightning", env="CartPole-v0", warm_start_steps=300)


class NoMetric:
    @staticmethod
    def load_metric(*_: Any, **__: Any) -> Any:
        return type(
            "Metric",
            (),
            {"compute": lambda self, predictions, references: {"right": float((predictions == references).mean())}},
        )()


@project("tutorials: GLUE")
def glue(folder: Path) -> Project:
    transformers = importlib.import_module("transformers")
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    place = tempfile.mkdtemp()
    transformers.BertForSequenceClassification(config).save_pretrained(place)
    names = ("AutoConfig", "AutoModelForSequenceClassification", "get_linear_schedule_with_warmup")
    given = {name: getattr(transformers, name) for name in names} | {"datasets": NoMetric, "AdamW": torch.optim.AdamW}
    source = Source(folder / "tutorials/lightning_examples/text-transformers/notebook.py", **given)
    sample = lambda g: {  # noqa: E731
        "input_ids": torch.randint(100, (12,), generator=g),
        "attention_mask": torch.ones(12, dtype=torch.long),
        "labels": torch.randint(2, (), generator=g),
    }
    return Project(source.GLUETransformer(place, 2, "mrpc"), rows(sample))


@project("tutorials: graphs")
def graphs(folder: Path) -> Project:
    source = Source(folder / "tutorials/course_UvA-DL/06-graph-neural-networks/overview.py")
    geometric = importlib.import_module("torch_geometric")

    def loader() -> Any:
        made = [
            geometric.data.Data(x=torch.randn(6, 7), edge_index=torch.randint(6, (2, 10)), y=torch.randint(2, (1,)))
            for _ in range(SAMPLES)
        ]
        return geometric.loader.DataLoader(made, batch_size=BATCH)

    module = source.GraphLevelGNN(
        c_in=7, c_out=2, c_hidden=16, dp_rate_linear=0.5, dp_rate=0.0, num_layers=3, layer_name="GraphConv"
    )
    return Project(module, loader)


@project("tutorials: nodes")
def nodes(folder: Path) -> Project:
    source = Source(folder / "tutorials/course_UvA-DL/06-graph-neural-networks/overview.py")
    geometric = importlib.import_module("torch_geometric")
    marks = {f"{part}_mask": torch.rand(20) < 0.5 for part in ("train", "val", "test")}
    graph = geometric.data.Data(x=torch.randn(20, 7), edge_index=torch.randint(20, (2, 60)), y=torch.randint(3, (20,)), **marks)
    module = source.NodeLevelGNN("GNN", layer_name="GCN", c_in=7, c_hidden=16, c_out=3, num_layers=2, dp_rate=0.1)
    return Project(module, lambda: geometric.loader.DataLoader([graph, graph], batch_size=1))


@project("hydra template")
def template(folder: Path) -> Project:
    dense = Source(folder / "lightning-hydra-template/src/models/components/simple_dense_net.py")
    source = Source(folder / "lightning-hydra-template/src/models/mnist_module.py")
    optimizer = partial(torch.optim.Adam, lr=1e-3)
    scheduler = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode="min", factor=0.1, patience=10)
    return Project(
        source.MNISTLitModule(dense.SimpleDenseNet(lin1_size=32, lin2_size=64, lin3_size=32), optimizer, scheduler, False),
        DIGITS,
    )


def lightly(file: str, module: str, count: int, side: int = SIDE, **given: Any) -> None:
    """Register a module of lightly's examples."""

    @project(f"lightly: {file}")
    def build(folder: Path) -> Project:
        source = Source(folder / f"lightly/examples/pytorch_lightning/{file}.py", **given)
        built = getattr(source, module)()
        source.model = weakref.proxy(built)  # some call the script's own variable
        return Project(built, views(count, side))


LIGHTLY = {"byol": "BYOL", "densecl": "DenseCL", "mmcr": "MMCR", "moco": "MoCo", "nnclr": "NNCLR", "simclr": "SimCLR"}
LIGHTLY |= {"smog": "SMoGModel", "vicreg": "VICReg"}
for file, module in LIGHTLY.items():
    lightly(file, module, 2)
for file, module in {"dino": "DINO", "swav": "SwaV"}.items():
    lightly(file, module, 4)
small_vit = partial(timm.create_model, "vit_tiny_patch16_224", img_size=SIDE, patch_size=8, depth=3, embed_dim=64, num_heads=4)
lightly("mae", "MAE", 1, vit_base_patch32_224=small_vit)


def geo(name: str, task: str, data: Callable[[], Any], **settings: Any) -> None:
    """Register a task of torchgeo."""

    @project(f"torchgeo: {name}")
    def build(_: Path) -> Project:
        return Project(getattr(importlib.import_module("torchgeo.trainers"), task)(**settings), data)


SCENES = rows(lambda g: {"image": picture(g), "label": torch.randint(4, (), generator=g)})
geo("classification", "ClassificationTask", SCENES, model="resnet18", in_channels=3, num_classes=4)
geo(
    *("regression", "RegressionTask", rows(lambda g: {"image": picture(g), "label": torch.rand(1, generator=g)})),
    model="resnet18",
    in_channels=3,
)
geo(
    "segmentation",
    "SemanticSegmentationTask",
    rows(lambda g: {"image": picture(g), "mask": torch.randint(4, (SIDE, SIDE), generator=g)}),
    model="unet",
    backbone="resnet18",
    in_channels=3,
    num_classes=4,
)
geo(
    "pixelwise regression",
    "PixelwiseRegressionTask",
    rows(lambda g: {"image": picture(g), "mask": torch.rand(SIDE, SIDE, generator=g)}),
    model="unet",
    backbone="resnet18",
    in_channels=3,
)
UNLABELLED = rows(lambda g: {"image": picture(g)})
geo("BYOL", "BYOLTask", UNLABELLED, model="resnet18", in_channels=3)
geo("SimCLR", "SimCLRTask", UNLABELLED, model="resnet18", in_channels=3, layers=2)
geo("MoCo", "MoCoTask", UNLABELLED, model="resnet18", in_channels=3, layers=2, memory_bank_size=8)


@project("torch-uncertainty: classification")
def uncertain(_: Path) -> Project:
    routines = importlib.import_module("torch_uncertainty.routines")
    recipe = lambda module: torch.optim.SGD(module.parameters(), lr=1e-2)  # noqa: E731
    network = resnet18(num_classes=10)
    module = routines.ClassificationRoutine(network, 10, nn.CrossEntropyLoss(), optim_recipe=recipe(network))
    return Project(module, labelled())


@project("chemprop: MPNN")
def molecules(_: Path) -> Project:
    chemprop = importlib.import_module("chemprop")
    smiles = ["CCO", "CCC", "CCN", "c1ccccc1", "CC(=O)O", "CCCl", "CO", "CCCC"]
    points = [chemprop.data.MoleculeDatapoint.from_smi(each, np.array([len(each) / 8.0])) for each in smiles]
    module = chemprop.models.MPNN(
        chemprop.nn.BondMessagePassing(d_h=32), chemprop.nn.MeanAggregation(), chemprop.nn.RegressionFFN(input_dim=32)
    )
    data = chemprop.data.MoleculeDataset(points)
    return Project(module, lambda: chemprop.data.build_dataloader(data, batch_size=BATCH, num_workers=0))


@project("scvi-tools: SCVI")
def cells(_: Path) -> Project:
    anndata, scvi = importlib.import_module("anndata"), importlib.import_module("scvi")
    counts = anndata.AnnData(np.random.default_rng(0).poisson(2.0, (32, 20)).astype(np.float32))
    scvi.model.SCVI.setup_anndata(counts)
    model = scvi.model.SCVI(counts, n_hidden=16, n_latent=4)
    return Project(scvi.train.TrainingPlan(model.module), lambda: model._make_data_loader(adata=counts, batch_size=8))


def series() -> Any:
    """Three made-up time series."""
    pandas = importlib.import_module("pandas")
    return pandas.DataFrame(
        {
            "value": np.sin(np.arange(90) / 3).astype(np.float32) + 2,
            "group": np.repeat(["a", "b", "c"], 30),
            "time_idx": np.tile(np.arange(30), 3),
        }
    )


def forecasting(name: str, model: str, **settings: Any) -> None:
    """Register a network of pytorch-forecasting."""

    @project(f"pytorch-forecasting: {name}")
    def build(_: Path) -> Project:
        package = importlib.import_module("pytorch_forecasting")
        data = package.TimeSeriesDataSet(
            series(),
            time_idx="time_idx",
            target="value",
            group_ids=["group"],
            max_encoder_length=12,
            min_encoder_length=12,
            max_prediction_length=4,
            min_prediction_length=4,
            time_varying_unknown_reals=["value"],
            allow_missing_timesteps=False,
            **({"add_relative_time_idx": True} if model == "TemporalFusionTransformer" else {}),
        )
        built = getattr(package, model).from_dataset(data, learning_rate=1e-2, **settings)
        return Project(built, lambda: data.to_dataloader(train=True, batch_size=8, num_workers=0))


forecasting("TFT", "TemporalFusionTransformer", hidden_size=8, attention_head_size=2, hidden_continuous_size=8)
forecasting("DeepAR", "DeepAR", hidden_size=8)
forecasting("N-BEATS", "NBeats", widths=[16, 32], backcast_loss_ratio=0.1)


@project("neuralforecast: NHITS")
def nhits(_: Path) -> Project:
    models, tsdataset = importlib.import_module("neuralforecast.models"), importlib.import_module("neuralforecast.tsdataset")
    table = series().rename(columns={"group": "unique_id", "time_idx": "ds", "value": "y"})
    data, *_rest = tsdataset.TimeSeriesDataset.from_df(table)
    module = models.NHITS(h=4, input_size=12, max_steps=8, mlp_units=[[16, 16]] * 3)
    made = tsdataset.TimeSeriesDataModule(data, batch_size=2, valid_batch_size=2)
    return Project(module, made.train_dataloader)
