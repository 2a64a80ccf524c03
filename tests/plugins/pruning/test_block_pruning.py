"""BlockPruning in training: what leaves, what is left, how it goes on from checkpoints, and what is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_peft
from lightning_peft.structure.journal import journal_of
from lightning_peft.testing import MethodTester
from lightning_peft.testing.callbacks import every_epoch
from lightning_peft.testing.modules import Plain, ResidualBlock, deepened, loader, trainer
from lightning_peft.testing.runs import Fit, assert_same, fit
from lightning_peft_plugins.pruning.block_influence import block_influence
from lightning_peft_plugins.pruning.block_pruning import BlockPruning
from lightning_peft_plugins.pruning.block_watch import BlockWatch, Seen
from lightning_peft_plugins.pruning.residual_lists import lists_to_prune, residual_lists

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
models = pytest.importorskip("torchvision").models

Deep = deepened(Plain)


class TestBlockPruning(MethodTester):
    # Cuts come after the first of three epochs, whose checkpoint a class that knows nothing of cuts loads baked.
    methods = [lambda: BlockPruning(0.5, start="50%", end="75%", every=1, shape="linear")]
    adapted = staticmethod(deepened)
    removed_parts = "blocks leave"


def silent(*places: int, blocks: int = 4) -> Plain:
    """A module some of whose blocks do nothing, and learn nothing."""
    torch.manual_seed(0)
    module = deepened(Plain, blocks)()
    for place in places:
        nn.init.zeros_(module.blocks[place].fc2.weight)
        nn.init.zeros_(module.blocks[place].fc2.bias)
        module.blocks[place].fc2.requires_grad_(False)
    return module


# What leaves.


def test_blocks_that_do_nothing_leave_and_optimizers_let_go() -> None:
    module = silent(1, 2)
    stays = [module.blocks[0], module.blocks[3]]
    run = fit([BlockPruning(2, start=3, every=2)], module=module)
    assert list(module.blocks) == stays
    assert [(edit["sources"], edit["step"]) for edit in journal_of(module)] == [([0, 3], 3)]
    held = {p for group in run.trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == set(module.parameters())
    assert set(run.trainer.optimizers[0].state) <= held


def test_the_score_is_the_mean_of_the_window() -> None:
    module = silent(blocks=3)
    seen: list[dict[int, Tensor]] = []

    def record(place: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            if module.training:
                if place == 0:
                    seen.append({})
                seen[-1][place] = block_influence(args[0].detach(), output.detach())

        return hook

    handles = [block.register_forward_hook(record(place)) for place, block in enumerate(module.blocks)]
    fit([BlockPruning(1, start=4, every=3)], module=module, max_epochs=2)
    for handle in handles:
        handle.remove()
    means = [float(torch.stack([call[place] for call in seen[1:4]]).mean()) for place in range(3)]
    gone = means.index(min(means))
    assert journal_of(module)[0]["sources"] == [place for place in range(3) if place != gone]


def test_weights_and_gradients_rank_too() -> None:
    module = silent(blocks=4)
    with torch.no_grad():
        for layer in (module.blocks[2].fc1, module.blocks[2].fc2):
            layer.weight.mul_(0.1)
    fit([BlockPruning(1, "magnitude", start=2, every=1)], module=module)
    assert journal_of(module)[0]["sources"] == [0, 1, 3]
    module = silent(blocks=4)
    sums: list[list[float]] = []

    class Gradients(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            blocks = [[p for p in block.parameters() if p.ndim > 1] for block in module.blocks]
            sums.append([float(sum((p.detach() * p.grad).abs().sum() for p in weights)) for weights in blocks])

    fit([BlockPruning(1, "taylor", start=3, every=2)], module=module, after=[Gradients()])
    means = [(one + two) / 2 for one, two in zip(*sums[1:3], strict=True)]
    gone = means.index(min(means))
    assert journal_of(module)[0]["sources"] == [place for place in range(4) if place != gone]


def test_cuts_over_time_rank_what_is_left_anew() -> None:
    module = silent(0, 2, blocks=6)
    fit([BlockPruning(3, start=2, end=8, every=2, shape="linear")], module=module, max_epochs=3)
    steps = [(edit["step"], edit["from"], len(edit["sources"])) for edit in journal_of(module)]
    assert steps == [(4, 6, 5), (6, 5, 4), (8, 4, 3)]


def test_targets_and_excludes_follow_their_blocks() -> None:
    module = silent(0, 1, 2, 3)
    fit([BlockPruning(2, start=2, end=4, every=1, targets=["blocks.1", "blocks.3"])], module=module, max_epochs=2)
    sources = [edit["sources"] for edit in journal_of(module)]
    assert sources in ([[0, 1, 2], [0, 2]], [[0, 2, 3], [0, 1]])
    module = silent(0, 1, 2, 3)
    fit([BlockPruning(1, start=2, exclude=["blocks.0", "blocks.1", "blocks.2"])], module=module)
    assert journal_of(module)[0]["sources"] == [0, 1, 2]


def test_ranks_decide_by_what_all_saw() -> None:
    class Both:
        """A strategy of two ranks, the other of which saw twice as much."""

        root_device = torch.device("cpu")

        def reduce(self, table: Tensor, reduce_op: str) -> Tensor:
            return table + table * torch.tensor([4.0, 2.0, 2.0, 2.0, 2.0])

    watch = BlockWatch(lambda: True, lambda: True)
    watch.seen = {"b.0": Seen(torch.tensor(0.5), scored=2, calls=2, links=1)}
    reduced = watch.reduced(["b.0", "b.1"], Both())  # type: ignore[arg-type]
    assert reduced["b.0"].mean() == pytest.approx(2.5 / 6)
    assert reduced["b.0"].why_it_stays() == ""
    assert reduced["b.1"].why_it_stays() == "was not called"
    assert watch.seen["b.0"].scored == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_trunk_is_watched_when_the_window_opens_late() -> None:
    module = silent(1)
    module.blocks.compile(backend="eager")
    fit([BlockPruning(1, start=3, every=1)], module=module)
    torch._dynamo.reset()
    assert journal_of(module)[0]["sources"] == [0, 2, 3]


# What is left.


class Wrapped(LightningModule):
    """Trains a network on images or tokens."""

    def __init__(self, make: Callable[[], nn.Module], inputs: Tensor) -> None:
        super().__init__()
        self.network, self.inputs = make(), inputs

    def forward(self, inputs: Tensor) -> Tensor:
        output = self.network(inputs)
        return output if isinstance(output, Tensor) else output.logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch), torch.zeros(()).expand_as(self(batch)))

    def train_dataloader(self) -> Any:
        return DataLoader(self.inputs, batch_size=len(self.inputs))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 20, "max_position_embeddings": 16}
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(0))


def vit(depth: int) -> nn.Module:
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "num_heads": 3, "num_classes": 5}
    return timm.models.VisionTransformer(depth=depth, **sizes)


def llama(depth: int) -> nn.Module:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
    config = transformers.LlamaConfig(**SIZES, **special, num_hidden_layers=depth, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(config)


def bert(depth: int) -> nn.Module:
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)  # its random numbers are not saved
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **dropout, num_hidden_layers=depth))


def resnet(*depths: int) -> nn.Module:
    return models.resnet.ResNet(models.resnet.BasicBlock, list(depths), num_classes=5)


NETWORKS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...], Tensor, list[str]]] = {
    "vit": (vit, (4,), IMAGES, ["network.blocks"]),
    "llama": (llama, (4,), TOKENS, ["network.model.layers"]),
    "bert": (bert, (4,), TOKENS, ["network.bert.encoder.layer"]),
    "resnet": (resnet, (2, 3, 1, 1), IMAGES, ["network.layer1", "network.layer2"]),
}


def cut(amount: int | float = 2, **settings: Any) -> BlockPruning:
    """A cut after two of four steps."""
    return BlockPruning(amount, start=2, every=1, **settings)


def train(module: LightningModule, folder: Path, resume: str = "", method: BlockPruning | None = None) -> None:
    """Four epochs of one step, with a checkpoint of each."""
    runner = trainer(callbacks=[method or cut(), every_epoch(folder)], max_epochs=4, log_every_n_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Checkpoint directory")
        runner.fit(module, ckpt_path=folder / resume if resume else None, weights_only=True if resume else None)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_left_is_the_network_its_class_builds_with_so_many_blocks(name: str, tmp_path: Path) -> None:
    make, depths, inputs, paths = NETWORKS[name]

    def module() -> Wrapped:
        return Wrapped(lambda: make(*depths), inputs)

    torch.manual_seed(0)
    trained = module()
    train(trained, tmp_path)
    assert {edit["path"] for edit in journal_of(trained)} <= set(paths)
    left = [len(trained.get_submodule(path)) for path in paths]
    assert sum(left) == sum(depths[: len(paths)]) - 2
    built = make(*left, *depths[len(paths) :])
    built.load_state_dict(trained.network.state_dict())
    plain = Wrapped(lambda: built, inputs).eval()
    trained.eval()
    assert torch.equal(plain(inputs), trained(inputs))
    if hasattr(built, "config"):
        assert trained.network.config.num_hidden_layers == left[0]
    train(loaded := module(), tmp_path, "epoch=2.ckpt")
    assert torch.equal(loaded.eval()(inputs), trained(inputs))
    runner = trainer(callbacks=[cut(), every_epoch(tmp_path)])
    runner.predict(trained, DataLoader(inputs, 4), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert sum(len(trained.get_submodule(path)) for path in paths) == sum(depths[: len(paths)])  # what left came back


def test_a_removed_block_was_all_that_changed() -> None:
    network = vit(3).eval()
    skipped = copy.deepcopy(network)
    skipped.blocks[1] = nn.Identity()
    from lightning_peft.structure import depth, edits

    change = edits.apply(network, depth.blocks_edit(network, "blocks", [0, 2]))
    assert torch.equal(network(IMAGES), skipped(IMAGES))
    edits.undo(network, change)
    assert len(network.blocks) == 3


# How it goes on.


def cuts(score: str = "influence") -> BlockPruning:
    """Cuts after steps 6 and 8, each seen for two steps."""
    return BlockPruning(2, score, start=4, end=8, every=2, shape="linear")


def check_resume(make: Callable[[], list[Any]], folder: Path, averaged: bool = False, **settings: Any) -> Fit:
    """Train whole, then from the checkpoint of every step: before and between cuts, in the middle of a window, after all."""

    def before() -> list[Any]:
        return [EMAWeightAveraging(decay=0.5)] if averaged else []

    settings = {"style": Deep, "max_epochs": 12, "data": loader(8), **settings}  # one step an epoch
    whole = fit(make(), after=[every_epoch(folder)], before=before(), **settings)
    assert [edit["step"] for edit in journal_of(whole.module)] == [6, 8]
    for step in (1, 3, 5, 6, 7, 8, 9, 11):
        path = folder / f"epoch={step - 1}.ckpt"
        resumed = fit(make(), seed=step + 9, resume=path, before=before(), **settings)
        assert_same(whole, resumed, f"uninterrupted against resumed after step {step}")
    return whole


@pytest.mark.parametrize("score", ["influence", "taylor", "magnitude"])
def test_resumes_bit_exactly_from_every_step(score: str, tmp_path: Path) -> None:
    check_resume(lambda: [cuts(score)], tmp_path)


def test_resumes_with_masks_maps_and_averages(tmp_path: Path) -> None:
    def methods() -> list[Any]:
        return [lightning_peft.NMSparsity("2:4", targets="all-linear", exclude=()), lightning_peft.WeightCompander(), cuts()]

    whole = check_resume(methods, tmp_path, averaged=True)
    loaded = lightning_peft.load_from_checkpoint(Deep, tmp_path / "epoch=11.ckpt")
    assert loaded.state_dict().keys() == whole.module.state_dict().keys()


def test_reset_begins_anew() -> None:
    run = fit([BlockPruning(1, start=2, every=1, optimizer_state="reset")], style=Deep)
    assert {int(state["step"]) for state in run.trainer.optimizers[0].state.values()} == {2}
    run = fit([BlockPruning(1, start=2, every=1)], style=Deep)
    assert {int(state["step"]) for state in run.trainer.optimizers[0].state.values()} == {4}


# What is found, and what is refused.


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
        ({"score": "influense"}, "score='influense' is unknown. Did you mean influence"),
        ({"optimizer_state": "slice"}, "optimizer_state='slice' is unknown"),
    ]
    for arguments, message in cases:
        with pytest.raises(MisconfigurationException, match=message):
            BlockPruning(**arguments)


def test_too_much_and_nothing_at_all_are_refused() -> None:
    for amount in (4, 0.9):
        with pytest.raises(MisconfigurationException, match=r"asks for 4 blocks to leave blocks, which have 4, but only 3 can"):
            fit([BlockPruning(amount, start=3)], style=Deep)
    with pytest.raises(MisconfigurationException, match=r"has no list of residual blocks that may go.*Name it with targets="):
        fit([BlockPruning(1, start=3)], style=Plain)
    with pytest.raises(MisconfigurationException, match=r"targets='model' names no residual block.*'blocks' \(4 blocks\)"):
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
    with pytest.raises(MisconfigurationException, match=r"only 0 can\. blocks\.0 has the taylor nan"):
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


def test_tuples_are_read_and_features_are_found() -> None:
    images, tokens = torch.randn(2, 4, 3, 3), torch.randn(2, 5, 4)
    flat = block_influence(images.movedim(1, -1).flatten(0, 2), tokens.new_ones(18, 4))
    assert torch.isclose(block_influence(images, torch.ones_like(images), dim=1), flat)
    assert block_influence(tokens.half(), tokens.half()).dtype == torch.float32

    class Pair(ResidualBlock):
        def forward(self, inputs: Tensor) -> Any:
            return super().forward(inputs), None

    class Tuples(Plain):
        def build(self) -> None:
            super().build()
            self.trunk = nn.ModuleList(Pair() for _ in range(3))

        def forward(self, inputs: Tensor) -> Any:
            for block in self.trunk:
                inputs = block(inputs)[0]
            return self.model(inputs)

    assert len(fit([BlockPruning(1, start=3)], style=Tuples).module.trunk) == 2
