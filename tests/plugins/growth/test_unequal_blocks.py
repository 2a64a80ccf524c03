"""Lists with odd blocks, sources that the user gives, and new blocks that train alone."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import transformers
from growth_toys import Deep, grow
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft import LayerGrowth, StageSharing
from lightning_peft.structure import edits
from lightning_peft_plugins.growth._layer_growth.growth_plan import GrowthPlan
from lightning_peft_plugins.growth._shared.blocks_to_grow import check_equal, find_blocks, longest_run

T5 = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "vocab_size": 50}


def t5(blocks: int) -> nn.Module:
    return transformers.T5EncoderModel(transformers.T5Config(**T5, num_layers=blocks))


def alternating(blocks: int) -> nn.Module:
    """A network whose class makes every other block wider, built from a configuration."""
    return Alternating(transformers.PretrainedConfig(num_layers=blocks))


class Alternating(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 8 + 4 * (place % 2)), nn.ReLU(), nn.Linear(8 + 4 * (place % 2), 4))
            for place in range(config.num_layers)
        )


def plan(network: nn.Module, operator: str = "stack", to: int = 6, **settings: Any) -> tuple[GrowthPlan, Any]:
    made = GrowthPlan(operator, [{"depth": to}], settings.get("start"), settings.get("blocks"), [], None, True)
    made.find(network, "")
    return made, made.edit(network, 0, 0)[0]


def test_the_run_of_equal_blocks_grows() -> None:
    made, edit = plan(t5(3))
    assert made.path == "encoder.block"
    assert edit["sources"] == [0, 1, 2, 1, 2, 1]
    assert plan(t5(3), "interpolate")[1]["sources"] == [0, 1, 1, 1, 2, 2]


def test_a_network_with_an_odd_block_begins_small_and_ends_as_built() -> None:
    network = t5(5)
    made = GrowthPlan("stack", [{}], 3, None, [], None, True)
    made.find(network, "")
    first = made.first_edit(network)
    assert first is not None
    assert first["sources"] == [0, 1, 2]  # type: ignore[typeddict-item]
    edits.apply(network, first)
    edits.apply(network, made.edit(network, 0, 0)[0])
    twin = t5(5)
    twin.load_state_dict(network.state_dict())
    ids = torch.arange(6)[None]
    assert torch.equal(network.eval()(ids)[0], twin.eval()(ids)[0])
    small = GrowthPlan("stack", [{}], 1, None, [], None, True)
    small.find(t5(3), "")
    with pytest.raises(MisconfigurationException, match=r"1 of the 3 blocks of encoder\.block are unlike"):
        small.first_edit(t5(3))


def test_the_run_that_training_began_with_grows_though_another_is_longer_then() -> None:
    def stage() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(4, width), nn.Linear(width, 4)) for width in (3, 5, 5, 5, 5, 6, 6)))

    network = nn.ModuleDict({"stage": stage()})
    made = GrowthPlan("stack", [{}], 4, "stage", [], None, True)
    made.find(network, "")
    first = made.first_edit(network)
    assert first is not None
    assert first["sources"] == [0, 1, 5, 6]  # type: ignore[typeddict-item]
    edits.apply(network, first)
    assert made.edit(network, 0, 0)[0]["sources"] == [0, 1, 1, 1, 1, 2, 3]


def test_blocks_that_alternate_repeat_as_a_whole_where_the_class_makes_them_so() -> None:
    assert plan(alternating(4), to=8, blocks="blocks")[1]["sources"] == [0, 1, 2, 3] * 2
    with pytest.raises(MisconfigurationException, match="No two blocks of blocks in a row are equal"):
        plan(alternating(4), "interpolate", to=8, blocks="blocks")


def test_refusals_name_the_odd_block() -> None:
    with pytest.raises(MisconfigurationException, match=r"block 0 has .*relative_attention_bias.weight, block 1 no "):
        check_equal(t5(3), "encoder.block")
    with pytest.raises(MisconfigurationException, match=r"in the largest, blocks, block 0 has \[8\] as 0.bias, block 1 \[12\]"):
        find_blocks(alternating(4))


def test_the_longest_run() -> None:
    assert longest_run(["a", "b", "b", "c", "c"]) == range(1, 3)
    assert longest_run(["a"]) == range(1)


def test_lists_whose_entries_have_names_are_refused_with_a_cure_that_works() -> None:
    blocks = {name: nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for name in ("first", "second")}
    network = nn.Sequential(OrderedDict(body=nn.Sequential(OrderedDict(blocks)), head=nn.Linear(4, 2)))
    with pytest.raises(MisconfigurationException, match=r"names of their own that do not count \('first'\).*nn\.Sequential\("):
        plan(network)
    network.body = nn.Sequential(*network.body)
    edits.apply(network, plan(network, to=4)[1])
    assert len(network.body) == 4
    assert network(torch.randn(1, 4)).shape == (1, 2)


class Frozen(Deep):  # type: ignore[misc,valid-type]
    """Its blocks are frozen, as for LLaMA-Pro, and left out of the optimizer."""

    def __init__(self, optimizer: str = "adam") -> None:
        super().__init__(optimizer)
        self.blocks.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


def test_new_blocks_train_alone_though_their_sources_are_frozen() -> None:
    seen: list[dict[str, Tensor]] = []

    class Watched(Frozen):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            seen.append({name: tensor.detach().clone() for name, tensor in self.state_dict().items()})

    run = grow([LayerGrowth("zero", at="step:2", sources=[0, 0, 1, 1, 2, 3], train="new")], style=Watched, max_epochs=2)
    grown = next(state for state in seen if "blocks.5.fc1.weight" in state)
    ends = run.module.state_dict()
    moved = {name for name, value in ends.items() if not torch.equal(value, grown[name])}
    assert moved
    assert {name.split(".")[1] for name in moved} == {"1", "3"}
    assert all(name.startswith("blocks.") for name in moved)
    assert [block.fc1.weight.requires_grad for block in run.module.blocks] == [False, True, False, True, False, False]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"sources": [0, 1, 0, 1, 9]}, "names block 9"),
        ({"sources": [0, 1, 2]}, "copies no block"),
        ({"sources": [0, 0, -1]}, "counted from 0"),
        ({"sources": [0, 0], "to": 3}, "leave out to="),
        ({"sources": [0, 0], "at": [1, 2]}, "one at="),
        ({"sources": [0, 0], "train": "some"}, "train"),
    ],
)
def test_sources_that_are_refused(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(MisconfigurationException, match=reason):
        grow([LayerGrowth(**{"at": "step:1", **arguments})])


def test_sharing_names_the_odd_block() -> None:
    class Odd(Deep):  # type: ignore[misc,valid-type]
        def __init__(self, optimizer: str = "adam") -> None:
            super().__init__(optimizer)
            self.blocks[0].extra = nn.Linear(2, 2)

    with pytest.raises(MisconfigurationException, match=r"block 0 has .* extra\.bias, block 1 no"):
        grow([StageSharing(2, blocks="blocks")], style=Odd)
