"""Calibration block after block: against a loop by hand, bounded in memory, and after a crash."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

import lightning_peft
from lightning_peft.calibration import calibrate as calibration
from lightning_peft.capture.calibration_block import CalibrationBlock
from lightning_peft.capture.recorded_calls import RecordedCalls
from lightning_peft.compose.lanes import Lane
from lightning_peft.method import Method
from lightning_peft.structure import journal
from lightning_peft.structure.errors import CheckpointError
from lightning_peft.structure.low_rank_pair import LowRankPair
from lightning_peft.testing.modules import Plain, deepened, loader
from lightning_peft.testing.runs import fit
from lightning_peft.testing.toys import ToyScale, ToyThreshold, ToyWanda
from lightning_peft.testing.trace import difference, trace

Deep = deepened(Plain)


def deep(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Deep()


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def calibrate(module: LightningModule, methods: Any, batches: Any = None, **settings: Any) -> list[str]:
    batches = loader() if batches is None else batches
    return lightning_peft.calibrate(module, methods, batches, **{"progress": False, "accelerator": "cpu", **settings})


@torch.no_grad()
def pruned_by_hand(layers: dict[str, nn.Linear], run: Callable[[], None], share: float = 0.5) -> None:
    """Wanda on the layers of one block: ``run`` calls the block on its inputs."""
    squares: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: Any, args: Any) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            squares[name] = squares.get(name, torch.zeros(rows.shape[1])) + (rows**2).sum(0)

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    run()
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        scores = layer.weight.abs() * squares[name].sqrt()
        for row, score in zip(layer.weight, scores, strict=True):
            row[score.argsort(stable=True)[: int(share * len(score))]] = 0


class TinyLlama(LightningModule):
    """A language model whose blocks are called with a mask and position embeddings by keyword, and with a cache."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, attn_implementation="eager",
        )  # fmt: skip
        self.model = transformers.LlamaForCausalLM(config)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        output = self.model(input_ids=batch["ids"], attention_mask=batch["mask"], labels=batch["ids"])
        self.log("loss", output.loss)


def sentences() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    masks = [torch.ones(2, 7, dtype=torch.long) for _ in range(3)]
    masks[1][0, 5:] = 0
    return [{"ids": torch.randint(0, 32, (2, 7), generator=generator), "mask": mask} for mask in masks]


@torch.no_grad()
def test_a_llama_is_pruned_as_in_a_loop_by_hand() -> None:
    torch.manual_seed(0)
    module = TinyLlama()
    torch.manual_seed(0)
    expected = TinyLlama().eval()
    inner: Any = expected.model.model
    states, rest = [], []
    for batch in sentences():
        hidden = inner.embed_tokens(batch["ids"])
        positions = torch.arange(7)[None]
        causal = torch.full((7, 7), torch.finfo(torch.float32).min).triu(1)[None, None].repeat(2, 1, 1, 1)
        causal = causal.masked_fill(batch["mask"][:, None, None, :] == 0, torch.finfo(torch.float32).min)
        states.append(hidden)
        rest.append({"attention_mask": causal, "position_embeddings": inner.rotary_emb(hidden, positions)})
    for block in inner.layers:
        layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
        assert len(layers) == 7

        def run(block: Any = block, states: list[Tensor] = states) -> list[Tensor]:
            found = [block(state, **given) for state, given in zip(states, rest, strict=True)]
            return [output[0] if isinstance(output, tuple) else output for output in found]

        pruned_by_hand(layers, run)  # type: ignore[arg-type]
        states = run()
    method = ToyWanda()
    assert calibrate(module, method, sentences()) == [f"model.model.layers.{place}" for place in range(3)]
    assert len(method.pruned) == 21
    for name, tensor in expected.state_dict().items():
        assert ((tensor == 0) == (module.state_dict()[name] == 0)).all(), name
        torch.testing.assert_close(module.state_dict()[name], tensor)


def test_a_vision_transformer_is_pruned_as_in_a_loop_by_hand() -> None:
    timm = pytest.importorskip("timm")

    class Vision(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=2, num_heads=2, num_classes=3)

        def forward(self, images: Tensor) -> Any:
            return self.net(images)

    torch.manual_seed(0)
    module = Vision()
    torch.manual_seed(0)
    net = Vision().eval().net
    images = [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(place)) for place in range(2)]
    with torch.no_grad():
        states = [net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(image)))) for image in images]
        for block in net.blocks:
            layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
            pruned_by_hand(layers, lambda block=block, states=states: [block(state) for state in states])  # type: ignore[misc]
            states = [block(state) for state in states]
    assert calibrate(module, ToyWanda(), images) == ["net.blocks.0", "net.blocks.1"]
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(module.net.state_dict()[name], tensor)


class Looped(Plain):
    """Calls its first block twice, its second in some batches only, its third never, and its fourth before the others."""

    def build(self) -> None:
        super().build()
        self.parts = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])
        self.passed: list[int] = []

    def forward(self, inputs: Tensor) -> Any:
        first, second, _, fourth = self.parts
        hidden = first(first(fourth(inputs)))
        if inputs.sum() > 0:
            hidden = second(hidden)
        return super().forward(hidden)


class Noting(Method):
    """Notes how often each block was called, and makes its layer the zero map."""

    lane = Lane.MASK

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}

    def calibrate(self, block: CalibrationBlock) -> None:
        self.seen[block.name] = len(block.calls)
        for call, output in zip(block.calls, block.outputs(), strict=True):
            assert output.shape == call.args[0].shape

    def state(self) -> dict[str, Any]:
        return {"seen": dict(self.seen)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.seen = dict(state["seen"])


def test_blocks_come_in_the_order_of_their_calls_with_as_many_as_there_were() -> None:
    module, method = Looped(), Noting()
    batches = list(loader())
    positive = sum(bool(inputs.sum() > 0) for inputs, *_ in batches)
    assert 0 < positive < 4
    with pytest.warns(UserWarning, match=r"never calls parts\.2: not calibrated"):
        order = calibrate(module, method, batches, blocks="parts")
    assert order == ["parts.3", "parts.0", "parts.1"]
    assert method.seen == {"parts.3": 4, "parts.0": 8, "parts.1": positive}


def test_nothing_is_left_on_the_module() -> None:
    module = fit([], module=deep()).module
    module.blocks[1].eval()
    before, owner = trace(module), module._trainer
    calibrate(module, Noting())
    assert difference(before, trace(module)) is None
    assert module._trainer is owner
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    calibrate(module, Noting())
    assert torch.equal(torch.rand(2), expected), "random numbers of the caller"


class Recording(Method):
    """Remembers what its blocks were given."""

    lane = Lane.MASK

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []
        self.spilled: list[int] = []
        self.kept: list[int] = []

    def calibrate(self, block: CalibrationBlock) -> None:
        self.given += [call.args[0] for call in block.calls]
        self.spilled.append(block.calls.spilled)
        self.kept.append(block.calls._used)


def test_no_more_inputs_are_kept_in_memory_than_was_asked_for(tmp_path: Path) -> None:
    whole, bounded = Recording(), Recording()
    calibrate(deep(), whole)
    size = whole.given[0].nbytes
    calibrate(deep(), bounded, memory=size + 1, folder=tmp_path)
    assert whole.spilled == [0] * 4
    assert bounded.spilled == [3] * 4
    assert max(bounded.kept) == size
    assert all(torch.equal(a, b) for a, b in zip(whole.given, bounded.given, strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"block-{place:04d}.pt" for place in range(4)]


class Killed(RuntimeError):
    pass


class Drawing(ToyWanda):
    """Prunes, and adds noise of its own; dies at a block."""

    def __init__(self, dies: int = -1, **settings: Any) -> None:
        super().__init__(**settings)
        self.dies = dies

    def config(self) -> dict[str, Any]:
        return {}

    def calibrate(self, block: CalibrationBlock) -> None:
        super().calibrate(block)
        for layer in block.inside(self.select(block.root)).values():
            noise: Any = layer
            noise.weight += 0.01 * torch.randn(noise.weight.shape, generator=block.generator) + 0.01 * torch.rand(())
        if block.position == self.dies:
            raise Killed


@pytest.mark.parametrize("dies", [0, 2, 3])
@pytest.mark.parametrize("kept", [False, True], ids=["a new module", "the module as it was left"])
def test_a_killed_calibration_goes_on_bit_for_bit(dies: int, kept: bool, tmp_path: Path) -> None:
    expected, whole = deep(), Drawing()
    calibrate(expected, whole)
    module = deep()
    with pytest.raises(Killed):
        calibrate(module, Drawing(dies), folder=tmp_path)
    again, target = Drawing(), module if kept else deep()
    calibrate(target, again, folder=tmp_path)
    assert difference(values(expected), values(target)) is None
    assert again.pruned == whole.pruned


def test_a_finished_calibration_is_not_done_again(tmp_path: Path) -> None:
    module = deep()
    calibrate(module, ToyWanda(), folder=tmp_path)
    other, method = deep(), ToyWanda()
    method.calibrate = lambda block: pytest.fail("done already")  # type: ignore[method-assign]
    calibrate(other, method, folder=tmp_path)
    assert difference(values(module), values(other)) is None


OTHERS: dict[str, tuple[Callable[[], tuple[Any, Any, Any]], str]] = {
    "weights": (lambda: (deep(1), ToyWanda(), loader()), "with other weights"),
    "methods": (lambda: (deep(), ToyWanda(0.25), loader()), "with other methods or arguments"),
    "batches": (lambda: (deep(), ToyWanda(), loader(seed=1)), "with other batches"),
    "blocks": (lambda: (deepened(Plain, 2)(), ToyWanda(), loader()), "with other blocks"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_folder_of_another_calibration_is_refused(what: str, tmp_path: Path) -> None:
    calibrate(deep(), ToyWanda(), folder=tmp_path)
    make, message = OTHERS[what]
    module, method, batches = make()
    before = values(module)
    with pytest.raises(CheckpointError, match=message):
        calibrate(module, method, batches, folder=tmp_path)
    assert difference(before, values(module)) is None


@pytest.mark.parametrize("content", [b"", b"no file of torch"])
def test_a_damaged_file_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    calibrate(deep(), ToyWanda(), folder=tmp_path)
    (tmp_path / "block-0001.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"(?s)block-0001\.pt is damaged.*Remove it"):
        calibrate(deep(), ToyWanda(), folder=tmp_path)
    for path in sorted(tmp_path.iterdir())[1:]:
        path.unlink()
    calibrate(deep(), ToyWanda(), folder=tmp_path)


class Splitting(Method):
    """Replaces a layer of each block by a journalled edit."""

    lane = Lane.STRUCTURE
    replacements = (LowRankPair,)

    def calibrate(self, block: CalibrationBlock) -> None:
        journal.edit(block.root, self.put(block.root, f"{block.name}.fc1", LowRankPair(2)))


class Breaking(Method):
    lane = Lane.STRUCTURE

    def calibrate(self, block: CalibrationBlock) -> None:
        block.module.fc1 = nn.Linear(16, 16, bias=False)


def test_journalled_changes_of_structure_go_on_too(tmp_path: Path) -> None:
    module = deep()
    calibrate(module, [Splitting(), ToyWanda()], folder=tmp_path)
    assert len(journal.journal_of(module)) == 4
    (tmp_path / "block-0003.pt").unlink()
    again = deep()
    calibrate(again, [Splitting(), ToyWanda()], folder=tmp_path)
    assert difference(values(module), values(again)) is None
    assert journal.journal_of(again) == journal.journal_of(module)
    with pytest.raises(MisconfigurationException, match=r"breaking changed the names or shapes.*with an edit"):
        calibrate(deep(), Breaking())


class Shuffled:
    """Other batches in every pass, from random numbers of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self) -> Any:
        return iter([(torch.randn(2, 16, generator=self.generator), torch.zeros(2, dtype=torch.long)) for _ in range(2)])


REFUSED: dict[str, tuple[Callable[[], list[str]], str]] = {
    "generator": (lambda: calibrate(deep(), ToyWanda(), iter(loader())), r"batches=list\(batches\)"),
    "empty": (lambda: calibrate(deep(), ToyWanda(), []), "holds no batch"),
    "shuffled": (lambda: calibrate(deep(), ToyWanda(), Shuffled()), "other batches in a later pass.*without shuffle"),
    "method": (lambda: calibrate(deep(), ToyThreshold()), "toy_threshold does not calibrate"),
    "no method": (lambda: calibrate(deep(), []), "methods= is empty"),
    "no list": (lambda: calibrate(Plain(), ToyWanda()), "has no list of equal blocks"),
    "no such block": (lambda: calibrate(deep(), ToyWanda(), blocks=["nothing"]), "blocks= names 'nothing'"),
    "nested": (lambda: calibrate(deep(), ToyWanda(), blocks=["blocks", "blocks.0.fc1"]), "a part of blocks.0"),
    "stage": (lambda: calibrate(deep(), ToyWanda(), stage="train"), "choose one of validate, test, predict"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_calibrated_is_refused_with_the_way_out(what: str) -> None:
    run, message = REFUSED[what]
    with pytest.raises(MisconfigurationException, match=message):
        run()


def test_a_module_under_maps_is_refused() -> None:
    module = deep()
    ToyScale().attach(module)
    with pytest.raises(MisconfigurationException, match="Bake it first"):
        calibrate(module, ToyWanda())
    calibrate(lightning_peft.bake(module), ToyWanda())


def test_a_loader_that_shuffles_with_the_global_random_numbers_is_the_same_in_every_pass(tmp_path: Path) -> None:
    batches = torch.utils.data.DataLoader(loader().dataset, batch_size=8, shuffle=True)
    module, again = deep(), deep()
    calibrate(module, ToyWanda(), batches, folder=tmp_path)
    (tmp_path / "block-0003.pt").unlink()
    torch.manual_seed(9)  # as another process may begin
    calibrate(again, ToyWanda(), batches, folder=tmp_path)
    assert difference(values(module), values(again)) is None


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_the_step_that_is_asked_for_runs(stage: Any) -> None:
    ran = []

    class Stages(Deep):  # type: ignore[misc,valid-type]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            ran.append("validate")
            super().validation_step(batch, batch_idx)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            ran.append("test")
            super().test_step(batch, batch_idx)

    calibrate(Stages(), ToyWanda(), stage=stage)
    assert set(ran) == {stage}
    assert len(ran) == 4 * (4 + 1)


def test_calls_run_under_the_precision_of_the_step() -> None:
    class Typed(Method):
        lane = Lane.MASK

        def calibrate(self, block: CalibrationBlock) -> None:
            inner: Any = block.module
            block.watch({"fc2": inner.fc2}, lambda name, inputs: seen.append(inputs.dtype))

    seen: list[torch.dtype] = []
    calibrate(deep(), Typed(), precision="bf16-mixed")
    assert seen == [torch.bfloat16] * 16


class Growing:
    """Such a cache as attention changes while it runs."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []


def test_a_call_is_given_back_as_it_was_every_time(tmp_path: Path) -> None:
    for memory in (10**6, 0):
        calls, cache, mask = RecordedCalls(memory, tmp_path), Growing(), torch.ones(2)
        cache.keys.append(mask)
        calls.record((torch.zeros(3), None), {"cache": cache, "mask": mask, "run": print, "scale": 0.5})
        cache.keys.append(torch.ones(1))
        mask.zero_()
        for _ in range(2):
            (given,) = calls
            assert given.args[1] is None
            assert given.kwargs["run"] is print
            assert given.kwargs["scale"] == 0.5
            assert given.kwargs["mask"].tolist() == [1, 1]
            assert given.kwargs["cache"].keys[0] is given.kwargs["mask"]
            assert len(given.kwargs["cache"].keys) == 1
            given.kwargs["cache"].keys.append(given.args[0])
            given.args[0].fill_(7)
        assert len(list(tmp_path.iterdir())) == (memory == 0)
        assert calls[0:1][0].args[0].tolist() == [0, 0, 0]
        calls.clear()
        assert not list(tmp_path.iterdir())


def test_a_generator_among_the_arguments_is_refused() -> None:
    calls = RecordedCalls(10, Path())
    with pytest.raises(MisconfigurationException, match="cannot be copied"):
        calls.record(((n for n in range(2)),), {})


def test_gradients_can_be_enabled_on_what_was_recorded() -> None:
    class Learning(Method):
        lane = Lane.MASK

        def calibrate(self, block: CalibrationBlock) -> None:
            assert not torch.is_grad_enabled()
            with torch.enable_grad():
                block.run(block.calls[0]).sum().backward()
            learnt.append(all(parameter.grad is not None for parameter in block.module.parameters()))

    learnt: list[bool] = []
    calibrate(deep(), Learning())
    assert learnt == [True] * 4


def test_a_bar_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(deep(), ToyWanda(), progress=True)
    assert "calibrate" in capsys.readouterr().out
    calibrate(deep(), ToyWanda())
    assert "calibrate" not in capsys.readouterr().out
    assert calibration.GIB == 2**30


def test_layers_that_are_read_by_function_are_named() -> None:
    class Attending(Plain):
        def build(self) -> None:
            super().build()
            self.parts = nn.ModuleList([nn.MultiheadAttention(16, 2, batch_first=True)])

        def forward(self, inputs: Tensor) -> Any:
            states = inputs[:, None]
            return super().forward(self.parts[0](states, states, states)[0][:, 0])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calibrate(Attending(), ToyWanda(targets=["out_proj"]), blocks="parts")
    assert any("inputs of parts.0.out_proj are unknown: never called" in str(entry.message) for entry in caught)
