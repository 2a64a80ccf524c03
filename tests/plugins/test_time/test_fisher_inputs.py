"""Fisher information is that of the network on what it is given in the user's own step."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tta_toys import Trained, close, layer_norm_net, norm_parameters, one, stream

from lightning_peft import EATA, FisherEstimator
from lightning_peft.functional import diagonal_fisher
from lightning_peft.testing.modules import trainer

SAMPLES = 24
NAMES = [f"{i}.{kind}" for i in (2, 5) for kind in ("weight", "bias")]


def expected(net, change, batches=2):
    """Scores of the network on inputs that are changed by hand."""
    return diagonal_fisher(net, [change(x) for x, _ in stream(batches)], parameters=NAMES)


def check(scores, wanted, tolerance=1e-5):
    assert set(scores) == {f"net.{name}" for name in wanted}
    close([scores[f"net.{name}"] for name in wanted], wanted.values(), tolerance)


class Transfers(Trained):
    """Normalises where Lightning documents it, and differently in training."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        scale = 5.0 if self.trainer.training or self.training else 2.0
        return (batch[0] - 3) / scale, batch[1]


class Dicts(Trained):
    """Batches are dictionaries, and the step says what of them the network sees."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch["image"] / 5), batch["label"])

    def validation_step(self, batch, index):
        self.predictions.append(self.net(batch["image"] / 2))

    def test_step(self, batch):
        self.predictions.append(self.net(batch["image"] / 2))


class Inside(Trained):
    """Normalises in its own forward pass."""

    def forward(self, x):
        return self.net((x - 1) * 2)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.predictions.append(self(batch[0]))

    validation_step = test_step


CASES = {
    "transfer hook": (Transfers, lambda x: (x - 3) / 2, lambda loader: loader),
    "dictionaries": (Dicts, lambda x: x / 2, lambda loader: [{"image": x, "label": y} for x, y in loader]),
    "forward": (Inside, lambda x: (x - 1) * 2, lambda loader: loader),
}
every_case = pytest.mark.parametrize("case", CASES)


def loader(form, batches=2):
    made = form(stream(batches))
    return DataLoader(made, batch_size=None) if isinstance(made, list) else made


@every_case
def test_in_a_validation(case):
    style, change, form = CASES[case]
    estimator, module = FisherEstimator(samples=SAMPLES), style(layer_norm_net())
    trainer(callbacks=[estimator]).validate(module, loader(form), verbose=False)
    check(estimator.scores, expected(layer_norm_net(), change))


@every_case
def test_at_the_end_of_a_fit(case):
    style, change, form = CASES[case]
    estimator, module = FisherEstimator(samples=SAMPLES), style(layer_norm_net().train())
    trainer(max_epochs=1, callbacks=[estimator]).fit(module, loader(form, 3), loader(form))
    check(estimator.scores, expected(module.net, change))


@every_case
@pytest.mark.parametrize("verb", ["test", "validate"])
def test_for_eata(case, verb):
    style, change, form = CASES[case]
    method, module = EATA(fisher=loader(form), lr=0.0), style(layer_norm_net())
    seen = {}
    release = method.release
    method.release = lambda: (seen.update(method._importance), release())
    getattr(trainer(callbacks=[method]), verb)(module, loader(form), verbose=False)
    check(seen, expected(layer_norm_net(), change))


def test_training_data_go_through_the_training_step():
    estimator, module = FisherEstimator(data="train", samples=SAMPLES), Transfers(layer_norm_net().train())
    trainer(max_epochs=1, callbacks=[estimator]).fit(module, stream(2), stream(1))
    check(estimator.scores, expected(module.net, lambda x: (x - 3) / 5))


def test_several_training_loaders():
    class Both(Trained):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch["own"][0] + batch["other"][0]), batch["own"][1])

    estimator, module = FisherEstimator(data="train", samples=SAMPLES), Both(layer_norm_net().train())
    trainer(max_epochs=1, callbacks=[estimator]).fit(module, {"own": stream(2), "other": stream(2)}, stream(1))
    check(estimator.scores, expected(module.net, lambda x: 2 * x))


def test_predictions_whose_step_takes_no_labels():
    class Unlabelled(Trained):
        def predict_step(self, batch, batch_idx):
            return self.net(batch.float())

    method, module = EATA(fisher=stream(2), lr=0.0), Unlabelled(layer_norm_net())
    seen = {}
    release = method.release
    method.release = lambda: (seen.update(method._importance), release())
    trainer(callbacks=[method]).predict(module, DataLoader(stream(1).dataset.tensors[0], batch_size=4))
    check(seen, expected(layer_norm_net(), lambda x: x))


def test_nothing_of_the_users_sees_the_batches():
    modules = [Trained(layer_norm_net()) for _ in range(2)]
    results, numbers = [], []
    for module, fisher in zip(modules, (stream(3, seed=4), {f"net.{name}": torch.ones(16) for name in NAMES}), strict=True):
        torch.manual_seed(3)
        results.append(trainer(callbacks=[EATA(fisher=fisher, lr=0.0)]).test(module, stream(2), verbose=False)[0]["accuracy"])
        numbers.append(torch.rand(2))
    assert len(modules[0].predictions) == 2
    assert results[0] == results[1]
    close([numbers[0]], [numbers[1]], 0)


def test_a_fit_is_the_same_with_and_without():
    states = []
    for callbacks in ([], [FisherEstimator(samples=SAMPLES)], [FisherEstimator(data="train", samples=SAMPLES)]):
        torch.manual_seed(0)
        net = nn.Sequential(layer_norm_net()[:2], nn.Dropout(0.3), layer_norm_net()[2:]).train()
        module = Trained(net)
        shuffled = DataLoader(stream(3).dataset, batch_size=12, shuffle=True)
        trainer(max_epochs=2, callbacks=callbacks).fit(module, shuffled, stream(1))
        states.append(copy.deepcopy(module.state_dict()))
        assert not {"training_step", "validation_step"} & set(vars(module))
    for state in states[1:]:
        close(state.values(), states[0].values(), 0)


@pytest.mark.parametrize("sanity", [0, 2])
def test_what_cannot_be_scored_is_said_at_the_start(sanity):
    class Elsewhere(Trained):
        def validation_step(self, batch, batch_idx):
            """Calls no network."""

    class Unvalidated(LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

        training_step, configure_optimizers = Trained.training_step, Trained.configure_optimizers

    class Maps(Trained):
        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).mean()

        def validation_step(self, batch, batch_idx):
            self.net(batch[0])

    for module, data, pattern in (
        (Unvalidated(layer_norm_net().train()), None, "this fit has none.*data=.train"),
        (Elsewhere(layer_norm_net().train()), stream(1), "validation_step did not call the network"),
        (Maps(nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))), stream(1), "needs logits of shape"),
    ):
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(MisconfigurationException, match=pattern):
            trainer(max_epochs=3, callbacks=[FisherEstimator()], num_sanity_val_steps=sanity).fit(module, stream(2), data)
        close(module.state_dict().values(), before.values(), 0)


def test_batches_that_no_step_takes_are_refused_with_what_it_said():
    with pytest.raises(MisconfigurationException, match=r"test_step does not take these batches .*go through your step"):
        trainer(callbacks=[EATA(fisher=[torch.zeros(())])]).test(Trained(layer_norm_net()), stream(1), verbose=False)


def test_another_module_is_scored_anew():
    estimator = FisherEstimator(samples=SAMPLES)
    first, second = Trained(layer_norm_net()), Trained(layer_norm_net())
    norm_parameters(second.net)[0].data *= 2
    trainer(callbacks=[estimator]).validate(first, stream(2), verbose=False)
    trainer(callbacks=[estimator]).validate(second, stream(2), verbose=False)
    check(estimator.scores, expected(second.net, lambda x: x))
    copy.deepcopy(estimator)


def test_a_spoilt_sample_is_left_out_of_the_scores():
    x, y = (tensor.clone() for tensor in stream(1).dataset.tensors)
    x[3, 0, 0, 0] = float("nan")
    estimator, module = FisherEstimator(samples=12), Trained(layer_norm_net())
    trainer(callbacks=[estimator]).validate(module, one((x, y)), verbose=False)
    rows = [row for row in range(12) if row != 3]
    check(estimator.scores, diagonal_fisher(layer_norm_net(), [x[rows]], parameters=NAMES))


def test_half_precision_scores_what_the_network_is_given():
    net = layer_norm_net()

    class Half(Trained):
        def test_step(self, batch, batch_idx):
            self.predictions.append(self.net(batch[0].to(self.dtype)))

    method, module = EATA(fisher=stream(2), lr=0.05, e_margin=1.1, d_margin=1.1), Half(net)
    trainer(callbacks=[method], precision="bf16-true").test(module, stream(2), verbose=False)
    assert torch.cat(module.predictions).isfinite().all()


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_fit_that_validates_no_more_scores_the_validation_data(tmp_path):
    """Lightning makes the validation loader when a validation is due, and the last epoch need not have one."""
    settings = {"max_epochs": 3, "check_val_every_n_epoch": 2}
    loader = DataLoader([(x, y) for xs, ys in stream(2) for x, y in zip(xs, ys, strict=True)], batch_size=8)
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
    torch.manual_seed(0)
    whole = FisherEstimator("val", SAMPLES)
    trainer(callbacks=[whole, keep], **settings).fit(Trained(layer_norm_net()).train(), loader, loader)
    torch.manual_seed(0)
    resumed = FisherEstimator("val", SAMPLES)
    module = Trained(layer_norm_net()).train()
    trainer(callbacks=[resumed, copy.deepcopy(keep)], **settings).fit(
        module, loader, loader, ckpt_path=tmp_path / "epoch=1.ckpt"
    )
    assert resumed.scores
    check(resumed.scores, {name.removeprefix("net."): score for name, score in whole.scores.items()})
