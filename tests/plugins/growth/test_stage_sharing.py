"""StageSharing: one block for each stage, in training, in checkpoints, and expanded."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from growth_toys import Deep, grow, values
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

import lightning_peft
from lightning_peft import LayerGrowth, NMSparsity, StageSharing, WeightCompander
from lightning_peft.network.block_lists import ties
from lightning_peft.structure import journal
from lightning_peft.structure.depth import blocks_edit
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.testing import MethodTester, run_ddp
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import FEATURES, Plain, ResidualBlock, deepened
from lightning_peft.testing.runs import Fit, assert_same
from lightning_peft.testing.trace import difference
from lightning_peft_plugins.growth import stage_sharing

HERE = str(Path(__file__))
TENSORS = len(ResidualBlock().state_dict())


class TestStageSharing(MethodTester):
    methods = [
        lambda: StageSharing([2, 2], at="step:2"),
        lambda: StageSharing([3, 1, 2], at="step:2", to=4, optimizer_state="copy", lr="rewarm:3"),
        lambda: StageSharing(1, at="step:1", to=[4], optimizer_state="pad", lr="restart"),
    ]
    adapted = staticmethod(deepened)
    new_parameters = "expanded blocks are new parameters"


def shared(stages: Any, built: int = 4, **arguments: Any) -> tuple[Plain, StageSharing]:
    """A module whose blocks share, and the method that made them."""
    torch.manual_seed(0)
    module, method = deepened(Plain, built)(), StageSharing(stages, **arguments)
    journal.edit(module, method.first_edit(module).edit)
    return module, method


def expand(module: Plain, method: StageSharing) -> None:
    """The edit of the expansion, without a training."""
    journal.edit(module, method.next_edit(SimpleNamespace(module=module, epoch=0)).edit)


# The published algorithm.


def test_the_auxiliary_network_of_the_paper() -> None:
    module, _ = shared([3, 3, 4, 3, 3], built=16)
    assert ties(module.blocks) == [0, 0, 0, 3, 3, 3, 6, 6, 6, 6, 10, 10, 10, 13, 13, 13]
    assert len(list(module.blocks.parameters())) == 5 * TENSORS
    assert len({tensor.data_ptr() for tensor in module.blocks.state_dict().values()}) == 5 * TENSORS
    assert len(module.blocks.state_dict()) == 16 * TENSORS


def test_the_descendant_of_the_paper() -> None:
    module, method = shared([3, 3, 4, 3, 3], built=16, to=12)
    then = [copy.deepcopy(module.blocks[first]) for first in (0, 3, 6, 10, 13)]
    expand(module, method)
    assert ties(module.blocks) == list(range(12))
    for block, stage in zip(module.blocks, [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4], strict=True):
        assert difference(dict(then[stage].state_dict()), dict(block.state_dict())) is None
    assert len({tensor.data_ptr() for tensor in module.blocks.state_dict().values()}) == 12 * TENSORS


def test_a_shared_gradient_is_the_sum_over_its_uses() -> None:
    module, _ = shared([1, 3])
    inputs, labels = torch.randn(5, FEATURES).double(), torch.tensor([0, 1, 2, 0, 1])
    apart = copy.deepcopy(module)
    journal.edit(apart, blocks_edit(apart, "blocks", [0, 1, 1, 1]))
    for net in (module.double(), apart.double()):
        nn.functional.cross_entropy(net(inputs), labels).backward()
    for name, parameter in module.blocks[1].named_parameters():
        total = sum(dict(apart.blocks[place].named_parameters())[name].grad for place in (1, 2, 3))
        assert torch.allclose(parameter.grad, total, rtol=0, atol=1e-15), name


@pytest.mark.parametrize(("stages", "built"), [([3, 1, 2], 4), ([2, 2], 4), (3, 8)])
def test_nothing_jumps_when_stages_keep_their_lengths(stages: Any, built: int) -> None:
    module, method = shared(stages, built=built, to=sum(stages) if isinstance(stages, list) else None)
    inputs = torch.randn(5, FEATURES)
    before = module(inputs)
    expand(module, method)
    assert torch.equal(module(inputs), before)


def test_stages_can_be_named_one_by_one() -> None:
    module, method = shared([2, 2], to=[1, 4])
    second = copy.deepcopy(module.blocks[2])
    expand(module, method)
    same = [torch.equal(block.fc1.weight, second.fc1.weight) for block in module.blocks]
    assert same == [False, True, True, True, True]


# Structure: names, undoing, replaying.


def test_undone_edits_leave_the_blocks_that_were() -> None:
    torch.manual_seed(0)
    module = deepened(Plain, 6)()
    before, objects = values(module), dict(module.named_parameters())
    method = StageSharing([1, 3], to=3)
    journal.edit(module, method.first_edit(module).edit)
    middle, tied = values(module), ties(module.blocks)
    expand(module, method)
    journal.take_back(module)
    assert ties(module.blocks) == tied
    assert difference(middle, values(module)) is None
    journal.take_back(module)
    assert difference(before, values(module)) is None
    assert all(parameter is objects[name] for name, parameter in module.named_parameters())


def test_edits_are_replayed_and_undone_in_another_process() -> None:
    module, method = shared([3, 1, 2], to=4)
    middle = journal.journal_of(module), values(module)
    expand(module, method)
    final = journal.journal_of(module), values(module)
    other = Deep()
    for edits, state in (final, middle, final, ([], values(Deep())), middle):
        journal.replay(other, edits, state)
        other.load_state_dict(state)
        assert difference(state, dict(other.state_dict())) is None
        assert len(set(ties(other.blocks))) == (3 if edits is middle[0] else 4)


def test_names_after_the_expansion() -> None:
    module, method = shared([2, 2], to=[1, 3])
    change = journal.edit(module, method.next_edit(SimpleNamespace(module=module, epoch=0)).edit)
    assert [change.new_name(f"blocks.{place}.w") for place in range(4)] == [f"blocks.{new}.w" for new in (0, 0, 1, 1)]
    assert [change.source(f"blocks.{place}.w") for place in range(4)] == [None, None, "blocks.2.w", "blocks.2.w"]
    assert change.removed == {}


def test_a_record_of_other_ties_is_refused() -> None:
    module, method = shared([2, 2])
    edit = method.next_edit(SimpleNamespace(module=module, epoch=0)).edit
    for broken in (None, [0, 0, 0, 3], "0022"):
        with pytest.raises(CheckpointError, match=r"other blocks are the same one: .* against \[0, 0, 2, 2\]"):
            journal.edit(module, {**edit, "tied": broken})
    with pytest.raises(CheckpointError, match="other blocks are the same one"):
        journal.edit(deepened(Plain)(), edit)


# Resuming, before and after the expansion at step 6 of 12.


def check_resume(make: Any, folder: Path, **settings: Any) -> Fit:
    averaged = settings.pop("averaged", False)

    def run(**more: Any) -> Fit:
        return grow(make(), before=[EMAWeightAveraging(decay=0.5)] if averaged else [], **settings, **more)

    whole = run(after=[every_epoch(folder)])
    for epoch in range(2):
        resumed = run(seed=epoch + 9, resume=folder / f"epoch={epoch}.ckpt")
        assert_same(whole, resumed, f"uninterrupted against resumed after epoch {epoch}")
    return whole


@pytest.mark.parametrize("rule", ["reset", "copy", "pad"])
@pytest.mark.parametrize("averaged", [False, True], ids=["plain", "ema"])
def test_resumes(rule: str, averaged: bool, tmp_path: Path) -> None:
    run = check_resume(lambda: [StageSharing([3, 1, 2], at="step:6", to=5, optimizer_state=rule)], tmp_path, averaged=averaged)
    assert ties(run.module.blocks) == list(range(5))
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert len(checkpoint["optimizer_states"][0]["state"]) == 3 * TENSORS + len(list(Plain().parameters()))


@pytest.mark.parametrize("averaged", [False, True], ids=["plain", "ema"])
def test_resumes_with_masks_and_maps(averaged: bool, tmp_path: Path) -> None:
    def methods() -> Any:
        return [NMSparsity("2:4"), WeightCompander(), StageSharing([3, 1], at="step:6", to=5)]

    run = check_resume(methods, tmp_path, averaged=averaged)
    assert all((block.fc1.weight == 0).float().mean() == 0.5 for block in run.module.blocks)


def test_resumes_in_two_processes(tmp_path: Path) -> None:
    whole = run_ddp(f"{HERE}:train", {"folder": str(tmp_path)})
    assert difference(whole[0], whole[1]) is None
    for epoch in (0, 1):
        arguments = {"folder": str(tmp_path / "again"), "resume": str(tmp_path / f"epoch={epoch}.ckpt")}
        assert difference(whole[0], run_ddp(f"{HERE}:train", arguments)[0]) is None


def train(folder: str, resume: str = "") -> Any:
    """Three epochs of two steps as one of two ranks."""
    method = StageSharing([3, 1, 2], at="step:3", to=5, optimizer_state="copy")
    settings = {"devices": 2, "strategy": "ddp", "resume": resume or None, "seed": 5 if resume else 0}
    return values(grow([method], after=[every_epoch(Path(folder))], **settings).module)


# A training that ends before the expansion.


def test_a_checkpoint_of_shared_blocks_loads_baked(tmp_path: Path) -> None:
    run = grow([WeightCompander(), StageSharing([2, 2], at="step:100")], after=[every_epoch(tmp_path)])
    assert ties(run.module.blocks) == [0, 0, 2, 2]
    loaded = lightning_peft.load_from_checkpoint(Deep, tmp_path / "epoch=2.ckpt")
    assert ties(loaded.blocks) == [0, 0, 2, 2]
    assert difference(dict(run.module.state_dict()), dict(loaded.state_dict())) is None
    plain = Deep.load_from_checkpoint(
        lightning_peft.bake_checkpoint(tmp_path / "epoch=2.ckpt", tmp_path / "baked.ckpt"), weights_only=True
    )
    assert difference(dict(run.module.state_dict()), dict(plain.state_dict())) is None


@pytest.mark.parametrize("maps", [False, True], ids=["plain", "maps"])
def test_shared_blocks_train_on_in_the_next_fit(maps: bool, tmp_path: Path) -> None:
    def methods(at: str) -> Any:
        return [StageSharing([2, 2], at=at), *([WeightCompander()] if maps else [])]

    first = grow(methods("step:100"))
    first.trainer.save_checkpoint(tmp_path / "after.ckpt")
    resumed = grow(methods("step:14"), seed=4, resume=tmp_path / "after.ckpt", max_epochs=4)
    assert ties(resumed.module.blocks) == [0, 1, 2, 3]
    again = grow(methods("step:2"), module=first.module, max_epochs=1)
    assert ties(again.module.blocks) == [0, 1, 2, 3]


def test_the_loss_goes_on_falling() -> None:
    run = grow([StageSharing([2, 2], at="50%")], max_epochs=10)
    half = len(run.losses) // 2
    assert run.losses[half] < run.losses[0]
    assert sum(run.losses[-4:]) < sum(run.losses[half - 4 : half])


# What is refused, and what networks note about their depth.


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"stages": [2, 0]}, "stages="),
        ({"stages": 0}, "stages="),
        ({"stages": [2, 2], "to": 0}, "to="),
        ({"stages": [2, 2], "to": [1, 2, 3]}, "names 3 stages; there are 2"),
        ({"stages": [2, 2], "to": []}, "to="),
        ({"stages": 2, "optimizer_state": "keep"}, "reset, copy, pad"),
    ],
)
def test_arguments_that_are_refused(arguments: Any, reason: str) -> None:
    with pytest.raises(MisconfigurationException, match=reason):
        StageSharing(**arguments)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"stages": 5}, "has 4 blocks, too few for 5 stages"),
        ({"stages": 4}, "nothing is shared"),
        ({"stages": [2, 2, 2], "to": 2}, "need at least as many blocks"),
        ({"stages": 2, "blocks": "layers"}, r"Lists of equal blocks: 'blocks' \(4 blocks\)"),
    ],
)
def test_modules_that_are_refused(arguments: Any, reason: str) -> None:
    module = Deep()
    with pytest.raises(MisconfigurationException, match=reason):
        grow([StageSharing(**arguments)], module=module)
    assert ties(module.blocks) == [0, 1, 2, 3]


def test_a_module_that_was_expanded_trains_on_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(stage_sharing, "rank_zero_info", said.append)
    run = grow([StageSharing(2, at="step:2", lr="rewarm:3")])
    method = StageSharing(2, at="step:2", lr="rewarm:3")
    again = grow([method], module=run.module)
    assert "expanded in an earlier training" in "".join(said)
    assert (method.done, method.changed_at, method.lr_factor(), ties(again.module.blocks)) == (1, None, 1.0, [0, 1, 2, 3])


def test_a_module_that_was_cut_by_hand_is_refused() -> None:
    module = Deep()
    journal.edit(module, blocks_edit(module, "blocks", [0, 1, 2]))
    with pytest.raises(MisconfigurationException, match="are not shared by stages"):
        grow([StageSharing(2, at="step:2")], module=module)


def test_two_methods_that_change_structure_are_refused() -> None:
    module = Deep()
    with pytest.raises(MisconfigurationException, match="layer_growth and stage_sharing both change the structure"):
        grow([StageSharing(2, at="step:2"), LayerGrowth(at="step:2", start=3)], module=module)
    assert ties(module.blocks) == [0, 1, 2, 3]


def test_stochastic_depth_and_layer_numbers() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    size = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "num_heads": 2, "num_classes": 3}
    module = Deep()
    module.model = timm.models.VisionTransformer(**size, depth=6, drop_path_rate=0.5)
    method = StageSharing([2, 2, 2], to=9, blocks="model.blocks")
    journal.edit(module, method.first_edit(module).edit)
    rates = [block.drop_path1.drop_prob for block in module.model.blocks]
    assert rates == pytest.approx([0.05, 0.05, 0.25, 0.25, 0.45, 0.45])
    expand(module, method)
    assert [block.drop_path1.drop_prob for block in module.model.blocks] == pytest.approx([0.0625 * n for n in range(9)])


def test_a_cache_by_layer_number_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 50}
    module = Deep()
    module.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=4, **sizes)).eval()
    method = StageSharing([2, 2], blocks="model.model.layers")
    with pytest.raises(MisconfigurationException, match="use_cache = False"):
        method.first_edit(module)
    module.model.config.use_cache = False
    journal.edit(module, method.first_edit(module).edit)
    tokens = torch.randint(0, 50, (2, 7))
    before = module.model(tokens).logits
    expand(module, method)
    layers = module.model.model.layers
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]
    assert torch.equal(module.model(tokens).logits, before)
    module.model.config.use_cache = True
    assert torch.allclose(module.model(tokens).logits, before, atol=1e-6)
