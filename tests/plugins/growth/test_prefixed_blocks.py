"""Lists whose entries are called by a prefix and a number, as torchvision's vision transformer has them."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from lightning.pytorch import LightningModule
from torch import Tensor, nn

import lightning_peft
from lightning_peft import BlockPruning, LayerGrowth, Method, StageSharing
from lightning_peft.calibration.find_blocks import find_blocks
from lightning_peft.structure.edits import CheckpointError, apply, check
from lightning_peft.structure.foresight import check_sizes
from lightning_peft.structure.journal import journal_of
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import trainer
from lightning_peft.testing.trace import difference

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def vit(depth: int) -> nn.Module:
    torch.manual_seed(1)
    sizes = {"image_size": 16, "patch_size": 8, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 12, "num_classes": 4}
    network = torchvision.models.VisionTransformer(num_layers=depth, **sizes)
    nn.init.normal_(network.heads.head.weight)  # zero as built
    return network


class Lit(LightningModule):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.network = vit(depth)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.network(batch).square().mean()

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.network(batch)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(IMAGES, batch_size=2)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


METHODS = {
    "stack": (lambda: LayerGrowth("stack", at="epoch:1", to={"depth": 4}), 2, 4),
    "interpolate": (lambda: LayerGrowth("interpolate", at="epoch:1", to={"depth": 4}), 2, 4),
    "zero": (lambda: LayerGrowth("zero", at="epoch:1", to={"depth": 3}), 2, 3),
    "msg": (lambda: LayerGrowth("msg", at="epoch:1", to={"depth": 3}, grow_time=2), 2, 3),
    "ligo": (lambda: LayerGrowth("ligo", at="epoch:1", to={"depth": 3}), 2, 3),
    "start": (lambda: LayerGrowth("stack", at="epoch:1", start=2), 4, 4),
    "pruned": (lambda: BlockPruning(2, start=4, every=2, exclude=["network.encoder.layers.encoder_layer_1"]), 4, 2),
    "shared": (lambda: StageSharing(2, at="epoch:1"), 4, 4),
}


def fitted(method: Method, depth: int, folder: Path, resume: str | None = None) -> Lit:
    torch.manual_seed(0)
    module = Lit(depth)
    runner = trainer(callbacks=[method, every_epoch(folder)], max_epochs=3)
    runner.fit(module, ckpt_path=folder / resume if resume else None, weights_only=True if resume else None)
    return module


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_they_change_and_the_class_builds_what_they_become(name: str, tmp_path: Path) -> None:
    make, built, ends = METHODS[name]
    module = fitted(make(), built, tmp_path)
    assert list(module.network.encoder.layers._modules) == [f"encoder_layer_{place}" for place in range(ends)]
    assert journal_of(module)
    expected = module.network.eval()(IMAGES)
    twin = vit(ends)
    twin.load_state_dict(module.network.state_dict())
    assert torch.equal(twin.eval()(IMAGES), expected)
    loaded = lightning_peft.load_from_checkpoint(Lit, tmp_path / "epoch=2.ckpt", depth=built)
    assert torch.equal(loaded.network.eval()(IMAGES), expected)
    for epoch in range(2):
        again = fitted(make(), built, tmp_path, f"epoch={epoch}.ckpt")
        assert difference(dict(module.state_dict()), dict(again.state_dict())) is None


def test_the_block_that_is_named_stays(tmp_path: Path) -> None:
    make, built, _ = METHODS["pruned"]
    torch.manual_seed(0)
    before = Lit(built)
    stays = before.network.encoder.layers.encoder_layer_1
    trainer(callbacks=[make()], max_epochs=3).fit(before)
    assert any(block is stays for block in before.network.encoder.layers)


def test_calibration_finds_them() -> None:
    names = ["network.encoder.layers.encoder_layer_0", "network.encoder.layers.encoder_layer_1"]
    assert list(find_blocks(Lit(2), None)) == list(find_blocks(Lit(2), "network.encoder.layers")) == names


def grown() -> tuple[nn.Module, dict[str, Any]]:
    module = nn.Module()
    module.h = nn.Sequential(OrderedDict((f"block_{number}", nn.Linear(2, 2)) for number in (1, 2)))
    edit = lightning_peft.structure.depth.blocks_edit(module, "h", [0, 1, 1])
    return module, dict(edit)


def test_numbers_may_begin_at_one_and_records_are_held_against_the_module() -> None:
    module, edit = grown()
    assert edit["numbering"] == ["block_", 1]
    for wrong in (["block_", 0], ["b.", 1], ["block_", "1"], "block_", ["block_", 1, 2], ["", -1]):
        with pytest.raises(CheckpointError, match=r"first is|malformed"):
            check(module, edit | {"numbering": wrong})
    with pytest.raises(CheckpointError, match=r"the first is h\.0"):
        check(module, {key: value for key, value in edit.items() if key != "numbering"})
    change = apply(module, edit)
    assert list(module.h._modules) == ["block_1", "block_2", "block_3"]
    assert change.copied == {"h.block_3": "h.block_2"}
    check_sizes([edit], module.state_dict())
    with pytest.raises(CheckpointError, match="leads to 3 blocks of h, but the file holds tensors of 2"):
        check_sizes([edit], {name: value for name, value in module.state_dict().items() if "block_3" not in name})
