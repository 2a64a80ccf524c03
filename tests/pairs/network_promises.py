"""What methods promise about a network, checked by numbers on one network in one short training."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from network_families import Family, answer, quiet
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from verdicts import WrongError

import lightning_peft as peft
from lightning_peft import Method
from lightning_peft.network.nm_layers import input_dim
from lightning_peft.structure.journal import journal_of
from lightning_peft.structure.ranges import indices
from lightning_peft.testing.modules import trainer
from lightning_peft.testing.trace import difference
from lightning_peft_plugins.growth._layer_growth.operators import OPERATORS
from lightning_peft_plugins.growth._layer_growth.width_families import find_width_map
from lightning_peft_plugins.growth._shared.blocks_to_grow import block_lists, find_blocks
from lightning_peft_plugins.pruning._structured_pruning.cut_proof import _is_vector, _narrowed

AT, SAMPLES = 2, 4  # the step before which structure changes; samples of an epoch
_CLOSE = 1e-3  # relative distance of outputs that counts as rounding: single precision, summed in another order
KEEPS_DEPTH, KEEPS_WIDTH = ("zero", "net2net", "lemon", "msg"), ("net2net", "fpi", "lemon", "msg")


class Samples(Dataset[Any]):
    """Samples of a family."""

    def __init__(self, family: Family) -> None:
        self.family = family

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return self.family.sample(torch.Generator().manual_seed(place))


class Holder(LightningModule):
    """Trains a network to answer zero.

    Attributes:
        answers: What it returned in a test.
        watch: Looks at it in training.
    """

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.network = family.build()
        self.answers: list[Tensor] = []

    def forward(self, **batch: Tensor) -> Any:
        return self.network(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        watch = next(callback for callback in self.trainer.callbacks if isinstance(callback, Watch))
        watch.in_step(self)
        return answer(self(**batch)).pow(2).mean()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.answers.append(answer(self(**batch)).detach().clone())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Watch(Callback):
    """What a network answers before its structure changes, after it, and at the end of the training.

    Attributes:
        whole: The network before.
        before: What it answered then.
        after: What it answered in the step that follows.
        live: What it answered at the end, with everything still attached.
    """

    def __init__(self, family: Family) -> None:
        self.batch = family.batch()
        self.whole: nn.Module | None = None
        self.cut: nn.Module | None = None
        self.before = self.after = self.live = torch.zeros(0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == AT:
            self.before, self.whole = probe(pl_module.network, self.batch), copy.deepcopy(pl_module.network)

    def in_step(self, module: Any) -> None:
        """Look at the network within a step."""
        learns = any(not parameter.is_leaf for parameter in module.parameters())  # an operator, on this batch
        if module.trainer.global_step == AT and not learns:
            self.after, self.cut = probe(module.network, self.batch), copy.deepcopy(module.network)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.live = probe(pl_module.network, self.batch)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """A network in evaluation mode for a while, without a trace in its modes or in random numbers."""
    modes = {part: part.training for part in network.modules()}
    network.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def probe(network: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What a network answers in evaluation mode."""
    with evaluating(network):
        torch.manual_seed(0)
        return answer(network(**batch)).clone()


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative distance; infinite where shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.nan_to_num(), expected.nan_to_num()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def same(what: str, found: Tensor, expected: Tensor, tolerance: float = _CLOSE) -> None:
    """Fail unless two answers agree.

    Raises:
        WrongError: They do not.
    """
    if (apart := distance(found, expected)) > tolerance:
        raise WrongError(f"{what}: outputs differ by {apart:.2%}")


def train(family: Family, *methods: Method) -> tuple[Holder, Watch, Trainer, list[str]]:
    """Train for four steps.

    Returns:
        The module, what was seen of it, the Trainer, and what was warned of.
    """
    torch.manual_seed(0)
    module, watch = Holder(family), Watch(family)
    runner = trainer(callbacks=[watch, *methods], max_epochs=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        runner.fit(module, loader(family))
    finite(module)
    return module, watch, runner, [str(each.message) for each in said]


def loader(family: Family) -> DataLoader[Any]:
    """Two batches of two."""
    return DataLoader(Samples(family), batch_size=SAMPLES // 2)


def finite(module: nn.Module) -> None:
    """Fail unless all weights are.

    Raises:
        WrongError: Some are not.
    """
    broken = [name for name, value in module.state_dict().items() if value.is_floating_point() and value.isnan().any()]
    if broken:
        raise WrongError(f"not finite: {', '.join(broken[:3])}")


def reloads(family: Family, network: nn.Module, batch: Mapping[str, Tensor], *, must: bool = True) -> nn.Module | None:
    """Save a network as its class does and load it with its class; it must answer the same.

    Args:
        family: Its family.
        network: The network.
        batch: What it is asked.
        must: Whether the class must be able to; else it may refuse, but not answer something else.

    Returns:
        What was loaded; ``None`` where the class cannot do that with a network of its own either, or may refuse and did.

    Raises:
        WrongError: It cannot be loaded, or answers something else.
    """
    load = _from_folder if family.configured else _strictly
    if not _reloads_itself(family):
        return None
    try:
        loaded = load(family, network)
    except Exception as error:
        if not must:
            return None
        raise WrongError(f"its class does not load it: {type(error).__name__}: {error}") from error
    same("loaded by its class", probe(loaded, batch), probe(network, batch))
    return loaded


@cache
def _reloads_itself(family: Family) -> bool:
    fresh, load = family.build().eval(), _from_folder if family.configured else _strictly
    try:
        return distance(probe(load(family, fresh), family.batch()), probe(fresh, family.batch())) <= _CLOSE
    except Exception:
        return False


@cache
def _generates_itself(family: Family) -> tuple[bool, bool]:
    """Whether a network of the class generates, and whether it does so with its cache as without."""
    fresh, batch = family.build(), family.batch()
    try:
        return True, torch.equal(tokens(fresh, batch), tokens(fresh, batch, use_cache=False))
    except Exception:
        return False, False


def _from_folder(family: Family, network: Any) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder, quiet():
        network.save_pretrained(folder)
        loaded, info = type(network).from_pretrained(folder, output_loading_info=True)
    wrong = {key: sorted(map(str, names))[:2] for key, names in info.items() if names and key != "error_msgs"}
    if wrong:
        raise WrongError(f"{wrong}")
    return loaded  # type: ignore[no-any-return]


def _strictly(family: Family, network: nn.Module) -> nn.Module:
    fresh = family.build()
    fresh.load_state_dict(network.state_dict(), strict=True)
    return fresh


def tokens(network: Any, batch: Mapping[str, Tensor], **settings: Any) -> Tensor:
    """Generate three tokens, greedily."""
    ids = {key: value for key, value in batch.items() if not key.startswith("decoder")}
    with evaluating(network), quiet():
        found: Tensor = network.generate(**ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, **settings)
    return found


def generates(family: Family, network: Any, other: Any) -> None:
    """Fail unless a network generates what another of the same weights does, and the same with its cache as without.

    Raises:
        WrongError: It does not.
    """
    if not family.generates:
        return
    itself, steady = _generates_itself(family)
    if not itself:
        return
    batch = family.batch()
    try:
        expected = None if other is None else tokens(other, batch)
    except Exception:
        return  # the class cannot at this size either
    found = tokens(network, batch)
    if expected is not None and not torch.equal(found, expected):
        raise WrongError("generate() gives other tokens than the same weights in a network that the class has built")
    if steady and not torch.equal(found, tokens(network, batch, use_cache=False)):
        raise WrongError("generate() gives other tokens with its cache than without")


def resumes(family: Family, module: Holder, runner: Trainer, batch: Mapping[str, Tensor]) -> nn.Module:
    """Save the training and load it as the README says; it must answer the same.

    Raises:
        WrongError: It answers something else.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "last.ckpt")
        runner.save_checkpoint(path)
        loaded = peft.load_from_checkpoint(Holder, path, family=family).network
    same("load_from_checkpoint", probe(loaded, batch), probe(module.network, batch))
    return loaded  # type: ignore[no-any-return]


# The trials, each of one method on one family. They return what was said beside working.


def growth(family: Family, operator: str, *, wide: bool) -> str:
    """Grow to twice the blocks or width; networks without a configuration begin with half and grow to what they were."""
    settings: dict[str, Any] = {"at": f"step:{AT}", "operator_steps": 2, "operator": operator}
    path, depth = ("", 0) if wide else _largest_list(family)
    if wide:
        settings["to"] = {"width": 2 * _width(family)}
    elif family.configured:
        settings |= {"to": 2 * depth, "blocks": path}
    else:
        settings |= {"start": (depth + 1) // 2, "blocks": path}
    module, watch, runner, said = train(family, peft.LayerGrowth(**settings))
    change = distance(watch.after, watch.before)
    warned = next((words for words in said if "promises that" in words), "")
    if operator in (KEEPS_WIDTH if wide else KEEPS_DEPTH) and change > _CLOSE and not warned:
        raise WrongError(f"{operator} keeps the function, but outputs changed by {change:.2%}")
    loaded = reloads(family, module.network, watch.batch, must=not wide or family.configured)
    if operator in ("stack", "net2net"):  # what files and generation depend on, structure, is the same for all
        loaded = loaded or resumes(family, module, runner, watch.batch)
        generates(family, module.network, loaded)
    return f"the function changes, and that is said: {warned}" if warned else ""


def _largest_list(family: Family) -> tuple[str, int]:
    """The largest list of blocks, as a user names it after having been told that there are several, and its length."""
    module = Holder(family)
    path = next(iter(block_lists(module)), None) or find_blocks(module)
    return path, len(list(module.get_submodule(path).children()))


def _width(family: Family) -> int:
    return find_width_map(family.build()).sizes["width"]


def structured(family: Family) -> str:
    """Cut channels and heads; the cut network computes what the whole one does with them silenced."""
    module, watch, runner, said = train(family, peft.StructuredPruning(0.2, start=AT))
    edits = [edit for edit in journal_of(module) if edit["op"] == "slice"]
    if not edits:
        raise WrongError("nothing was cut")
    assert watch.whole is not None
    assert watch.cut is not None
    same("cut against silenced", watch.after, silenced(watch.whole, watch.cut, edits[0], watch.batch))
    loaded = resumes(family, module, runner, watch.batch)
    reloads(family, module.network, watch.batch, must=False)
    generates(family, module.network, loaded)
    return next((words for words in said if "leaves whole" in words), "")


def silenced(whole: nn.Module, cut: nn.Module, edit: Mapping[str, Any], batch: Mapping[str, Tensor]) -> Tensor:
    """What a network answers with the coordinates that an edit removes set to zero, and norms on those that stay."""
    tensors = dict(whole.named_parameters(remove_duplicate=False)) | dict(whole.named_buffers(remove_duplicate=False))
    parts = dict(whole.named_modules(remove_duplicate=False))
    hooks = []
    for name, entry in edit["tensors"].items():
        name = name.removeprefix("network.")
        path = name.rpartition(".")[0]
        for dim, kept in enumerate(entry["kept"]):
            if kept is None:
                continue
            stays = torch.zeros(entry["from"][dim], dtype=torch.bool)
            stays[indices(kept)] = True
            tensors[name].data.movedim(dim, 0)[~stays] = 0
            if name.endswith("weight") and _is_vector(parts[path]):
                hooks.append(parts[path].register_forward_hook(_narrowed(cut.get_submodule(path), stays)))
    try:
        cut.eval()
        return probe(whole, batch)
    finally:
        for hook in hooks:
            hook.remove()


def shorter(family: Family) -> str:
    """Remove one block; what is left computes what the whole network does when that block passes on its input."""
    module, watch, runner, _ = train(family, peft.BlockPruning(1, start=AT))
    edits = [edit for edit in journal_of(module) if edit["op"] == "blocks"]
    if not edits:
        raise WrongError("nothing was removed")
    loaded = resumes(family, module, runner, watch.batch)
    by_class = reloads(family, module.network, watch.batch, must=family.configured) if family.configured else None
    assert watch.whole is not None
    if by_class is None:  # the class says what belongs to a position, where it can be asked
        edit, blocks = edits[0], watch.whole.get_submodule(edits[0]["path"].removeprefix("network."))
        gone = [block for place, block in enumerate(blocks.children()) if place not in edit["sources"]]
        hooks = [block.register_forward_hook(_passing, with_kwargs=True) for block in gone]
        passed = probe(watch.whole, watch.batch)
        for hook in hooks:
            hook.remove()
        if distance(watch.after, passed) > _CLOSE:  # what forward does beside each block goes with it
            for place in sorted(set(range(edit["from"])) - set(edit["sources"]), reverse=True):
                del blocks[place]  # type: ignore[attr-defined]
            same("cut against a list without the block", watch.after, probe(watch.whole, watch.batch))
    generates(family, module.network, by_class or loaded)
    return ""


def _passing(block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return (given, *output[1:]) if isinstance(output, tuple) else given


def masked(family: Family) -> str:
    """Half of the weights of the targets are zero afterwards."""
    method = peft.MaskedPruning(0.5, start=1)
    module, watch, runner, _ = train(family, method)
    layers = method.select(module)
    weights: list[Tensor] = [layer.weight for layer in layers.values()]  # type: ignore[misc]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    if not 0.49 < zeros < 0.52:
        raise WrongError(f"{zeros:.1%} of the weights are zero, not half")
    return _ordinary(family, module, watch, runner)


def two_of_four(family: Family) -> str:
    """Every complete group of four holds at most two weights."""
    method = peft.NMSparsity("2:4")
    module, watch, runner, _ = train(family, method)
    for name, layer in method.select(module).items():
        weight: Tensor = layer.weight.detach()  # type: ignore[assignment, operator]
        rows = weight.movedim(input_dim(layer), -1)
        whole = rows[..., : rows.shape[-1] // 4 * 4].unflatten(-1, (-1, 4))
        if int((whole != 0).sum(-1).max()) > 2:
            raise WrongError(f"{name} holds groups with more than two of four")
    return _ordinary(family, module, watch, runner)


def _ordinary(family: Family, module: Holder, watch: Watch, runner: Trainer) -> str:
    same("after the fit against its end", probe(module.network, watch.batch), watch.live)
    loaded = resumes(family, module, runner, watch.batch)
    generates(family, module.network, reloads(family, module.network, watch.batch) or loaded)
    return ""


def deployed(family: Family) -> str:
    """The network that skips computes what the one that masks did at the end of the training."""
    method = peft.FTWT(0.8, tokens="sample", cooldown=None)
    module, watch, _, _ = train(family, method)
    found = method.deploy(module, next(iter(watch.batch.values())), calibrate=False)
    same("deployed against live", probe(found.network, watch.batch), watch.live)
    reloads(family, module.network, watch.batch)
    return ""


def adapted(family: Family) -> str:
    """The first predictions are those before an update, with the statistics of the batch; the module is given back."""
    torch.manual_seed(0)
    module = Holder(family)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    reference = copy.deepcopy(module.network).eval()
    for part in reference.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.train()
    trainer(callbacks=[peft.Tent(lr=1e-3)]).test(module, loader(family), verbose=False)
    with torch.no_grad():
        expected = answer(reference(**next(iter(loader(family)))))
    same("the first answer against the statistics of its batch", module.answers[0], expected)
    if (found := difference(before, dict(module.state_dict()))) is not None:
        raise WrongError(f"not given back: {found}")
    return ""


TRIALS: dict[str, Callable[[Family], str]] = {
    **{f"deeper: {name}": (lambda family, name=name: growth(family, name, wide=False)) for name in OPERATORS},  # type: ignore[misc]
    **{
        f"wider: {name}": (lambda family, name=name: growth(family, name, wide=True))  # type: ignore[misc]
        for name, operator in OPERATORS.items()
        if operator.widens
    },
    "StructuredPruning": structured,
    "BlockPruning": shorter,
    "MaskedPruning": masked,
    "NMSparsity": two_of_four,
    "FTWT deployed": deployed,
    "Tent": adapted,
}
