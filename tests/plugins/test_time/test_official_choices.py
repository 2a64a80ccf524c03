"""Choices of the official codes: which tensors move, what is counted, how images are resized."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from tta_toys import CLASSES, Classifier, close, layer_norm_net, run, stream

from lightning_peft import ETA, SAR, CoTTA, RDumb, Tent
from lightning_peft.functional import shuffle_patches
from lightning_peft.network.layers import parameter_names

MARGINS = {"lr": 0.05, "e_margin": 0.6, "d_margin": 0.7}


def published_by_sar(net):
    """What `collect_params` of SAR's code takes, by its rule on names (read at commit 492c1ad)."""
    found = set()
    for name, module in net.named_modules():
        if any(part in name for part in ("layer4", "blocks.9", "blocks.10", "blocks.11", "norm.")) or name == "norm":
            continue
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
            found |= {f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)}
    return found


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "resnet18"])
def test_sar_moves_the_tensors_of_the_official_code(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        net = timm.create_model(name)
    found = {each.removeprefix("net.") for each in parameter_names(SAR().select(Classifier(net)))}
    assert found == published_by_sar(net)
    assert set(parameter_names(SAR().select(net))) == published_by_sar(net)


class Named(nn.Module):
    """A norm inside a block and one at the end, both called `norm`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.ModuleDict({"first": nn.Linear(192, 16), "norm": nn.LayerNorm(16)})
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, CLASSES)
        self.eval()

    def forward(self, x):
        x = self.block["norm"](self.block["first"](x.flatten(1)))
        return self.head(self.norm(x))


def test_the_last_norm_alone_is_left_alone_in_a_run():
    net = Named()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    run(net, SAR(lr=0.5, e_margin=1.1, keep=True), loaders=stream(2))
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"block.norm.weight", "block.norm.bias"}


def official_rdumb(batches, every):
    """The number of updates after which every batch is predicted: 0 for those that follow a return to the source."""
    since, found = 0, []
    for index in range(batches):
        if index % every == 0:
            since = 0
        found.append(since)
        since += 1
    return found


def test_rdumb_counts_batches_whether_or_not_they_teach():
    net, data = layer_norm_net(), stream(7, size=6)
    method, returns = RDumb(reset=3, lr=0.05, e_margin=1e-9, d_margin=0.7), []
    to_source = method.to_source
    method.to_source = lambda: (returns.append(method.batches), to_source())
    run(net, method, loaders=data)
    assert method.updates == 0
    # Before the fourth and the seventh batch, as `total_steps % 1000 == 0` at the start of a call, and once at the end.
    assert returns == [3, 6, 7]
    assert official_rdumb(7, 3) == [0, 1, 2, 0, 1, 2, 0]


def test_rdumb_predicts_as_eta_on_pieces_of_the_stream():
    net, data = layer_norm_net(), list(stream(7, size=6))
    found = run(net, RDumb(reset=3, **MARGINS), loaders=stream(7, size=6))
    for start in (0, 3, 6):
        piece = torch.utils.data.DataLoader(data[start : start + 3], batch_size=None)
        close(found[start : start + 3], run(net, ETA(**MARGINS), loaders=piece), 1e-5)


def test_a_reset_after_the_last_batch_does_not_empty_what_is_kept():
    nets = [layer_norm_net() for _ in range(2)]
    run(nets[0], Tent(lr=0.05, reset=3, keep=True, backward="whole"), loaders=stream(3))
    run(nets[1], Tent(lr=0.05, keep=True, backward="whole"), loaders=stream(3))
    close(nets[0].state_dict().values(), nets[1].state_dict().values(), 0)


def test_cotta_moves_weights_and_biases_alone():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 16)), nn.Parameter(torch.randn(1, 16))
            self.first, self.norm, self.head = nn.Linear(192, 16), nn.LayerNorm(16), nn.Linear(16, CLASSES)

        def forward(self, x):
            return self.head(self.norm(self.first(x.flatten(1)) + self.cls_token + self.pos_embed))

    for options, still in (({}, {"cls_token", "pos_embed"}), ({"targets": ["net"]}, {"first.weight", "head.bias"})):
        net = Token().eval()
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        run(net, CoTTA(lr=0.1, views=2, keep=True, teacher_momentum=0.5, **options), loaders=stream(2))
        moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
        assert moved == set(before) - still if not options else {"cls_token", "pos_embed"} <= moved


def test_patches_are_resized_as_torchvision_does():
    transforms = pytest.importorskip("torchvision.transforms")
    x = torch.rand(2, 3, 30, 30, generator=torch.Generator().manual_seed(0))
    # One patch: nothing is shuffled, and nothing has to be resized; two of 31 resize to 30 and back.
    assert torch.equal(shuffle_patches(x, 1), x)
    odd = torch.rand(1, 3, 31, 31, generator=torch.Generator().manual_seed(1))
    small = transforms.Resize((30, 30))(odd)
    tiles = [small[..., r : r + 15, c : c + 15] for r in (0, 15) for c in (0, 15)]
    order = torch.rand(1, 4, generator=torch.Generator().manual_seed(5)).argsort(-1)[0].tolist()
    rows = [torch.cat([tiles[order[2 * r]], tiles[order[2 * r + 1]]], -1) for r in (0, 1)]
    expected = transforms.Resize((31, 31))(torch.cat(rows, -2))
    close([shuffle_patches(odd, 2, torch.Generator().manual_seed(5))], [expected], 1e-5)
