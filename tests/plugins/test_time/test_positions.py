"""Networks that predict pixels and tokens: where the classes are, and which methods can do with them."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tta_toys import Classifier, close, stream

from lightning_peft import EATA, ETA, LAME, MEMO, ROID, SAR, BatchNormAdapt, CoTTA, DeYO, RDumb, RoTTA, Tent
from lightning_peft.functional import marginal_entropy
from lightning_peft.testing.modules import trainer

CLASSES = 5  # the maps are 8 x 8


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, CLASSES, 1)
        self(torch.randn(8, 3, 8, 8))
        self.eval()

    def forward(self, x):
        return self.last(self.norm(self.conv(x)))


class Language(nn.Module):
    """Tokens, classes last; with ``flat`` as rows of one long list."""

    def __init__(self, flat):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm, self.last, self.flat = nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 20), flat
        self.eval()

    def forward(self, input_ids, attention_mask=None):
        logits = self.last(self.norm(self.table(input_ids)))
        return logits.flatten(0, 1) if self.flat else logits


class Step(Classifier):
    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.predictions.append(self.net(*batch[:-1]))


def adapted(net, method, loader):
    """Predictions, the parameters afterwards, and what was logged."""
    module = Step(net)
    logged = trainer(callbacks=[method]).test(module, loader, verbose=False)[0]
    return module.predictions, [p.detach() for p in net.parameters()], logged


def noisy(x):
    return x * 1.1


def words(mask=None):
    ids = torch.randint(0, 20, (8, 6), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(ids, *(() if mask is None else (mask,)), ids), batch_size=4)


MAPS = {
    "Tent": lambda **o: Tent(lr=0.05, **o),
    "ETA": lambda **o: ETA(lr=0.05, e_margin=1.1, d_margin=1.1, **o),
    "RDumb": lambda **o: RDumb(lr=0.05, e_margin=1.1, d_margin=1.1, **o),
    "SAR": lambda **o: SAR(lr=0.05, e_margin=1.1, **o),
    "CoTTA": lambda **o: CoTTA(lr=0.05, views=2, threshold=1.1, restore=0.0, augment=noisy, **o),
    "MEMO": lambda **o: MEMO(lr=0.05, views=2, episodic=False, augment=noisy, **o),
}


@pytest.mark.parametrize("name", MAPS)
def test_the_classes_of_a_map_are_dimension_1(name):
    class Last(nn.Module):
        """The same network with classes in the last place, said so."""

        def __init__(self):
            super().__init__()
            self.net = Segmenter()

        def forward(self, x):
            return self.net(x).movedim(1, -1)

    found, moved, _ = adapted(Segmenter(), MAPS[name](keep=True), stream(3, size=4))
    expected, other, _ = adapted(Last(), MAPS[name](keep=True, class_dim=-1), stream(3, size=4))
    assert found[0].shape == (4, CLASSES, 8, 8)
    close(found, [each.movedim(-1, 1) for each in expected], 1e-5)
    close(moved, other, 1e-5)
    assert not torch.equal(moved[2], Segmenter().norm.weight)


def test_tent_on_maps_is_the_published_loop():
    net = Segmenter()
    norm = nn.BatchNorm2d(6, track_running_stats=False)
    twin = nn.Sequential(net.conv, norm, net.last).requires_grad_(False)
    norm.requires_grad_(True)
    optimizer, expected = torch.optim.SGD(norm.parameters(), 0.05, 0.9), []
    for x, _ in stream(3, size=4):
        z = twin(x)
        expected.append(z.detach())
        (-(z.softmax(1) * z.log_softmax(1)).sum(1).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    found, _, logged = adapted(net, Tent(lr=0.05), stream(3, size=4))
    close(found, expected, 1e-5)
    assert logged["peft/tent/selected"] == 1.0


ONE_A_SAMPLE = {
    "ROID": lambda: ROID(),
    "RoTTA": lambda: RoTTA(),
    "DeYO": lambda: DeYO(e_threshold=1.1),
    "LAME": lambda: LAME(),
}


@pytest.mark.parametrize("name", ONE_A_SAMPLE)
@pytest.mark.parametrize("flat", [None, False, True])
def test_methods_of_samples_refuse_positions(name, flat):
    net, loader = (Segmenter(), stream(1, size=4)) if flat is None else (Language(flat), words())
    with pytest.raises(MisconfigurationException, match=r"needs one prediction|found no head"):
        adapted(net, ONE_A_SAMPLE[name](), loader)


@pytest.mark.parametrize("make", [lambda **o: CoTTA(views=2, **o), lambda **o: MEMO(views=2, **o)])
def test_views_that_move_pixels_are_refused_and_the_cure_works(make):
    with pytest.raises(MisconfigurationException, match=r"do not line up.*augment="):
        adapted(Segmenter(), make(), stream(1, size=4))
    assert adapted(Segmenter(), make(augment=noisy), stream(1, size=4))[0][0].isfinite().all()


@pytest.mark.parametrize("make", [MAPS["Tent"], MAPS["ETA"], MAPS["SAR"], MAPS["CoTTA"]], ids=["Tent", "ETA", "SAR", "CoTTA"])
def test_tokens_as_rows_are_tokens(make):
    mask = torch.ones(8, 6, dtype=torch.int64)
    mask[::2, 4:] = 0
    rows, moved, _ = adapted(Language(True), make(keep=True), words(mask))
    tokens, other, _ = adapted(Language(False), make(keep=True), words(mask))
    close(rows, [each.flatten(0, 1) for each in tokens], 1e-5)
    close(moved, other, 1e-5)


def test_memo_refuses_rows_that_are_no_samples():
    with pytest.raises(MisconfigurationException, match="needs one prediction a sample"):
        adapted(Language(True), MEMO(views=2), words())


def test_statistics_do_not_care():
    assert adapted(Segmenter(), BatchNormAdapt(), stream(1, size=4))[0][0].shape == (4, CLASSES, 8, 8)
    fisher = {f"net.norm.{kind}": torch.ones(6) for kind in ("weight", "bias")}
    assert adapted(Segmenter(), EATA(fisher=fisher), stream(1, size=4))[0][0].isfinite().all()


def test_the_marginal_entropy_of_positions_is_that_of_each():
    z = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    p = F.softmax(z, -1).mean(0)
    close([marginal_entropy(z)], [-(p * p.log()).sum(-1)], 1e-5)
