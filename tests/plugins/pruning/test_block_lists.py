"""BlockPruning: which blocks are found, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from block_networks import (
    IMAGES,
    Deep,
    Wrapped,
    cut,
    resnet,
    silent,
    timm,
    train,
    transformers,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft.structure.journal import journal_of
from lightning_peft.testing.modules import Plain, ResidualBlock
from lightning_peft.testing.runs import fit
from lightning_peft_plugins.pruning._block_pruning.prunable_lists import lists_to_prune, residual_lists
from lightning_peft_plugins.pruning.block_pruning import BlockPruning


def test_lists_are_found_where_blocks_are() -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=12, depths=(2, 4), num_heads=(1, 1))
    assert residual_lists(swin) == {"layers.0.blocks": [0, 1], "layers.1.blocks": [0, 1, 2, 3]}
    assert list(residual_lists(resnet(2, 2, 1, 1), "net")) == ["net.layer1", "net.layer2"]
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "vocab_size": 20}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **special, num_layers=3))
    lists = lists_to_prune(t5, "", None, None)  # the first block of each holds the positions of all
    assert {path: found.may_go for path, found in lists.items()} == {"encoder.block": [1, 2], "decoder.block": [1, 2]}
    assert lists_to_prune(t5, "", ["encoder.block.0"], None)["encoder.block"].may_go == [0]
    shared = ResidualBlock()
    tied = nn.ModuleList([shared, ResidualBlock(), shared, ResidualBlock()])
    assert residual_lists(tied, "x") == {"x": [1, 3]}


def test_arguments_are_checked_at_once() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"amount": 0}, "share of the blocks between 0 and 1, or a whole number"),
        ({"amount": 1.5}, "share of the blocks"),
        ({"amount": True}, "share of the blocks"),
        ({"score": "influense"}, "score='influense' is unknown; choose one of .* Did you mean influence"),
        ({"optimizer_state": "slice"}, "optimizer_state='slice' is unknown"),
    ]
    for arguments, message in cases:
        with pytest.raises(MisconfigurationException, match=message):
            BlockPruning(**arguments)


def test_too_much_and_nothing_at_all_are_refused() -> None:
    for amount in (4, 0.9):
        with pytest.raises(MisconfigurationException, match=r"asks to remove 4 of the 4 blocks of blocks, but only 3 can"):
            fit([BlockPruning(amount, start=3)], style=Deep)
    with pytest.raises(MisconfigurationException, match=r"no list of residual blocks.*Name it with targets="):
        fit([BlockPruning(1, start=3)], style=Plain)
    with pytest.raises(MisconfigurationException, match=r"targets='model' is neither a residual block.*'blocks' \(4 blocks\)"):
        fit([BlockPruning(1, start=3, targets="model")], style=Deep)
    with pytest.raises(MisconfigurationException, match="Widen targets= or narrow exclude="):
        fit([BlockPruning(1, start=3, exclude="blocks")], style=Deep)


def test_blocks_that_change_the_shape_stay_and_the_reason_is_said(tmp_path: Path) -> None:
    def module() -> Wrapped:
        return Wrapped(lambda: resnet(1, 2, 2, 1), IMAGES)

    named = ["network.layer2.0", "network.layer2.1"]
    with pytest.warns(UserWarning, match=r"network\.layer2\.0 stays, though targets= names it: it changes the shape \(\(4, 64"):
        train(pruned := module(), tmp_path, method=cut(1, targets=named))
    assert [(edit["path"], edit["sources"]) for edit in journal_of(pruned)] == [("network.layer2", [0])]
    with pytest.raises(MisconfigurationException, match=r"only 2 can.*layer3\.0 changes the shape.*Lower amount="):
        train(module(), tmp_path, method=cut(3))


def test_what_was_not_scored_stays() -> None:
    class Skipping(Plain):
        """Skips its second block after the first step."""

        def build(self) -> None:
            super().build()
            self.trunk = nn.ModuleList(ResidualBlock() for _ in range(2))
            self.calls = 0

        def forward(self, inputs: Tensor) -> Any:
            self.calls += 1
            for block in self.trunk[: 2 if self.calls == 1 else 1]:
                inputs = block(inputs)
            return self.model(inputs)

    run = fit([BlockPruning(1, start=3)], style=Skipping)
    assert journal_of(run.module)[0]["sources"] == [1]
    module = silent()
    module.blocks.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match=r"only 0 can be removed\. blocks\.0 has frozen weights only"):
        fit([BlockPruning(1, "taylor", start=3)], module=module)


class Branches(Plain):
    """Has a trunk, and branches beside each other that are no trunk."""

    takes_list = False

    def build(self) -> None:
        super().build()
        self.trunk = nn.ModuleList(ResidualBlock() for _ in range(3))
        self.branches = nn.ModuleList(ResidualBlock() for _ in range(2))

    def forward(self, inputs: Tensor) -> Any:
        for block in self.trunk:
            inputs = block(inputs)
        return self.model(inputs + sum(branch(inputs) for branch in self.branches))


def test_branches_beside_each_other_stay() -> None:
    run = fit([BlockPruning(2, start=3)], style=Branches)
    assert [(edit["path"], edit["from"]) for edit in journal_of(run.module)] == [("trunk", 3)]
    with pytest.raises(MisconfigurationException, match=r"branches\.0 passes nothing on to another block of its list"):
        fit([BlockPruning(1, start=3, targets="branches")], style=Branches)


def test_blocks_that_return_no_tensor_are_refused() -> None:
    class Mapped(ResidualBlock):
        def forward(self, inputs: Tensor) -> Any:
            return {"hidden": super().forward(inputs)}

    class Dicts(Plain):
        def build(self) -> None:
            super().build()
            self.trunk = nn.ModuleList(Mapped() for _ in range(3))

        def forward(self, inputs: Tensor) -> Any:
            for block in self.trunk:
                inputs = block(inputs)["hidden"]
            return self.model(inputs)

    with pytest.raises(MisconfigurationException, match=r"trunk\.0 takes Tensor and returns dict.*exclude=\['trunk'\]"):
        fit([BlockPruning(1, start=3)], style=Dicts)


def test_a_trunk_that_is_not_called_is_refused() -> None:
    class Aside(Plain):
        def build(self) -> None:
            super().build()
            self.unused = nn.Sequential(ResidualBlock(), ResidualBlock())

    with pytest.raises(MisconfigurationException, match="No block of unused was called in training before step 2"):
        fit([BlockPruning(1, start=2)], style=Aside)
