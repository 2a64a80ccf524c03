"""The contract between a method and the engine: everything its author overrides and calls."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.arguments import as_plain
from lightning_peft.capture.calibration_block import CalibrationBlock
from lightning_peft.capture.evaluation import Call
from lightning_peft.compose.lanes import Lane, Resource
from lightning_peft.compose.loss import Loss, Step
from lightning_peft.compose.run import Run
from lightning_peft.compose.step_closure import StepClosure
from lightning_peft.namespaces import both
from lightning_peft.network.adapters import check_unadapted
from lightning_peft.network.targets import TargetSpec, explicitly_named, holding_weights, select
from lightning_peft.structure.edit_types import PutEdit
from lightning_peft.structure.edits import Change, EditRequest
from lightning_peft.structure.forms import Form
from lightning_peft.structure.put import put_edit
from lightning_peft.structure.reorder import Orders
from lightning_peft.structure.replacement import Replacement
from lightning_peft.weights.layer_part import LayerPart
from lightning_peft.weights.maps import WeightMap, attach_map, attached_map
from lightning_peft.weights.parts import put_part

PartT = TypeVar("PartT", bound=LayerPart)


SHARDED = frozenset({"single", "ddp", "fsdp2"})
"""Strategies of a method whose arithmetic holds where parameters are shards between steps."""

SPLIT = SHARDED | {"tensor-parallel"}
"""Those of a method whose arithmetic also holds where each process computes with a part of a layer."""


class Contract:
    """A method as the engine sees it; authors subclass :class:`lightning_peft.Method`, which is this and a Lightning callback.

    Subclasses set :attr:`lane` and whatever of :attr:`reads`, :attr:`writes`, :attr:`weight_maps` and :attr:`parts` applies,
    and override the few of these they need, each called in lane order whatever the order of the callbacks list:

    - :meth:`attach` once the module is complete and before optimizers exist: weight maps, layer parts, structure;
    - :meth:`trained` to say what a fit trains, the rest being frozen, and :meth:`next_trained` to say something else later;
    - :meth:`start` when training is about to begin, after a checkpoint was restored;
    - :meth:`wrap_optimizer` once, to wrap or replace an optimizer;
    - :meth:`batch_start` before and :meth:`loss` inside every ``training_step``;
    - :meth:`compute_gradients` around the forward and backward passes of a real optimizer step, :meth:`before_step` before
      its gradients are clipped, :meth:`after_clipping` after that, and :meth:`after_step` after the step;
    - :meth:`epoch_end` after every training epoch, :meth:`validation_start` and :meth:`validation_end` around every validation;
    - :meth:`calibrate` to act on a trained network block by block, outside of any run;
    - :meth:`adapt_start` and :meth:`adapt` (lane ``ADAPT``) to answer the network's calls in ``test`` and its like;
    - :meth:`metrics` for numbers worth a curve, :meth:`state` and :meth:`load_state` for what must survive a crash, and
      :meth:`state_form` for what a damaged file must not bring back.

    ``__init__`` makes what a method is before any run. When a training begins at its first step, the engine runs it again on
    the same object with the same arguments, so that nothing of an earlier training is left; what was set on the object between
    two runs stays.

    Args:
        targets: Layers to act on, in the grammar of :func:`lightning_peft.network.targets.select`.
        exclude: Layers to leave alone, same grammar.
        network: Qualified name of the network when the module has several candidates.
        name: Name in logs, plans and checkpoints; needed only when one class is used twice in a Trainer.

    Attributes:
        lane: Where in a step the method acts.
        reads: What it reads of a training step.
        writes: What it changes; two methods that write one thing are a conflict.
        commutes: Whether all it does to gradients is to add something that does not depend on them, so that it comes to the
            same before and after others that do so.
        strategies: Kinds of Lightning strategy it works with: ``"single"``, ``"ddp"``, ``"fsdp2"``, and
            ``"tensor-parallel"`` within that.
        weight_maps: Weight maps it may attach, so that its checkpoints can be baked without the model's class.
        replacements: What it may put in a layer's place, so that its checkpoints can be loaded.
        parts: Layer parts it may put beside layers, for the same reason.
        paper: Source, "Authors, venue year, link".
        spares_frozen: Whether it leaves frozen weights alone, as lanes ``REPARAM`` and ``MASK`` do.
        checkpoint: ``"full"``, or ``"trained"``: checkpoints of a fit leave out what it does not change, and hold digests of
            that instead. One method that says so is enough.
        rank_state: Keys of :meth:`state` under which each rank has what it saw of its own samples. A checkpoint holds that of
            all ranks, and a resumed rank gets its own back; for another number of ranks see :meth:`pooled`.
        stays: Whether the maps and parts it attaches in a fit stay on the module when that is over, live, instead of going into
            the weights.
        validated_as: What validations see of its weight maps: ``"trained"`` as in training, ``"baked"`` as would be shipped.
        fixed_arguments: Constructor arguments of a base that the class gives itself, and does not take.
        ties: Whether it gives all layers that share a tensor one map of it, where it is told to act on all of them.
        after: Names of methods of the same lane that act before this one, where otherwise names decide; set it on the class, or
            on the object: ``method.after = ("other",)``.
        restarts: Whether it lets learning-rate schedules begin again (``run.schedules``).
        run: The run it takes part in, from before :meth:`attach` until after :meth:`finish`; ``None`` in none.
    """

    lane: ClassVar[Lane]
    reads: ClassVar[frozenset[Resource]] = frozenset()
    writes: ClassVar[frozenset[Resource]] = frozenset()
    commutes: ClassVar[bool] = False
    strategies: frozenset[str] = frozenset({"single", "ddp"})
    weight_maps: ClassVar[tuple[type[WeightMap], ...]] = ()
    replacements: ClassVar[tuple[type[Replacement], ...]] = ()
    parts: ClassVar[tuple[type[LayerPart], ...]] = ()
    paper: ClassVar[str] = ""
    spares_frozen: ClassVar[bool] = False
    fixed_arguments: ClassVar[frozenset[str]] = frozenset()
    ties: ClassVar[bool] = False

    checkpoint: Literal["full", "trained"] = "full"
    stays: bool = False
    rank_state: ClassVar[frozenset[str]] = frozenset()
    validated_as: Literal["trained", "baked"] = "trained"
    run: Run | None = None
    after: Sequence[str] = ()
    _arguments: dict[str, Any]

    def __init__(
        self,
        *,
        targets: TargetSpec | None = None,
        exclude: TargetSpec | None = None,
        network: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.targets = targets
        self.exclude = exclude
        self.network = network
        self.name = name or snake_case(type(self).__name__)
        self.steps = 0
        self.restored = False
        self.restarts = False
        self._epochs_ended = 0

    # What an author overrides.

    def select(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return the layers the method acts on by qualified name; override when the grammar of targets is not enough.

        A method that would change frozen weights (lanes ``REPARAM`` and ``MASK``, and whoever sets :attr:`spares_frozen`) is
        given none of them, unless ``targets`` names their layers: presets and classes name no layer.

        Raises:
            MisconfigurationException: What ``targets`` name has no weight, all layers are frozen, or one that is to be masked
                has an adapter of PEFT.
        """
        if self.targets is None:
            return {}
        found = select(module, self.targets, self.exclude)
        if self.lane in (Lane.REPARAM, Lane.MASK):
            found = holding_weights(module, self.targets, found)
        spared = self.spared(module, found)
        if len(spared) == len(found) and self.fits:
            raise MisconfigurationException(
                f"{self.name} leaves frozen weights alone, and all that targets={self.targets!r} selects are frozen: "
                f"{', '.join(list(spared)[:3])}. Name them, targets={list(spared)[:3]!r}, to change them all the same, or call "
                "requires_grad_(True) on them before the fit."
            )
        kept = {name: layer for name, layer in found.items() if name not in spared}
        if self.lane == Lane.MASK:
            check_unadapted(self.name, module, kept)
        return kept

    def trained(self, module: nn.Module) -> Iterable[str | nn.Parameter] | None:
        """Say which parameters of the module a fit trains, by qualified name or as they are; ``None`` has no say.

        Everything that no method names is frozen for the fit, before optimizers are made, and given back afterwards. Weight
        maps follow: a reparametrisation is trained with its weight, a delta or a mask always. Asked again after an edit, and
        when :meth:`next_trained` says so.
        """
        return None

    def reads_now(self) -> frozenset[Resource]:
        """Return what this instance reads; override when it depends on the arguments."""
        return self.reads

    def writes_now(self) -> frozenset[Resource]:
        """Return what this instance writes; override when it depends on the arguments."""
        return self.writes

    def claims(self, module: nn.Module) -> Iterable[str]:
        """Name the tensors the method will map or mask, so that overlaps are found before anything is touched."""
        return [f"{name}.weight" for name in self.select(module)]

    def attach(self, module: LightningModule) -> None:
        """Change the module before optimizers exist; must be deterministic.

        Called again when the module has grown; :meth:`map_weight` leaves tensors alone that carry the method's map already.
        """

    def first_edit(self, module: LightningModule) -> EditRequest | None:
        """Ask for another structure to train with from the start; only lane ``STRUCTURE`` is asked, in a new fit."""
        return None

    def next_edit(self, run: Run) -> EditRequest | None:
        """Ask for a change of structure; only methods of lane ``STRUCTURE`` are asked, before a step, until all say ``None``.

        Never within an accumulation window, and not while a tuner runs its trial fit.
        """
        return None

    def next_order(self, run: Run) -> Orders | None:
        """Ask for another order of coupled channels that leaves what the network computes as it is; asked after edits.

        Weights, optimizer states, averages and held masks follow. No name or shape changes, so checkpoints stay what they
        are. :meth:`batch_start` comes next. Declare ``Resource.STRUCTURE`` in :meth:`writes_now`: others may count channels.
        """
        return None

    def next_trained(self, run: Run) -> bool:
        """Say whether :meth:`trained` names others from now on; asked before every step, after edits.

        What is frozen then loses its gradient and its optimizer state. Until optimizers are made :meth:`trained` is to name
        all that it will ever name, or nothing.
        """
        return False

    def structure_changed(self, module: LightningModule, change: Change) -> None:
        """Called after an edit: rename or drop state kept by tensor name. :meth:`attach` has run again if it was asked to."""

    def lr_factor(self) -> float:
        """Return a factor on all learning rates for the next optimizer step, on top of any scheduler."""
        return 1.0

    def start(self, run: Run) -> None:
        """Prepare for training; a restored checkpoint is already in place."""

    def wrap_optimizer(self, run: Run, optimizer: Optimizer) -> Optimizer:
        """Return what is to stand in an optimizer's place; called once for each, before a checkpoint restores them.

        A wrapper subclasses :class:`~lightning_peft.optim.wrapped.WrappedOptimizer`. A replacement is built from
        ``optimizer.param_groups``, so that the groups stay the same objects and learning-rate schedulers hold. Declare
        ``Resource.OPTIMIZER`` in :attr:`writes`.
        """
        return optimizer

    def batch_start(self, run: Run, batch: Any) -> None:
        """Act before a training batch, after edits; between accumulated batches too."""

    def loss(self, step: Step) -> Loss | Tensor | None:
        """Return a term for the optimised loss; called inside ``training_step``, before accumulation and AMP scale it.

        Called again for the same batch when a method evaluates the step once more; ``step.repeated`` says so.
        """
        return None

    def compute_gradients(self, run: Run, optimizer: Optimizer, closure: StepClosure) -> None:
        """Compute the gradients of a real optimizer step: ``closure()`` once, then ``closure.again()`` as often as wanted.

        Afterwards gradients are unscaled, shown to :meth:`before_step`, clipped and used. What the weights are changed to in
        between is to be undone here. A method of a higher lane has those of lower lanes within its closure. Declare
        ``Resource.GRADIENT`` in :attr:`writes`.
        """
        closure()

    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        """Look at the gradients of a real optimizer step: accumulated, unscaled, not yet clipped.

        They may be changed in place by a method that declares ``Resource.GRADIENT`` in :attr:`writes`. An optimizer that
        unscales by itself (``fused=True`` under a gradient scaler) shows them scaled.
        """

    def after_clipping(self, run: Run, optimizer: Optimizer) -> None:
        """Look at the gradients that the step will use, or change them as in :meth:`before_step`.

        A module that optimizes by hand clips before both.
        """

    def after_step(self, run: Run) -> None:
        """Act after a real optimizer step of any optimizer."""

    def epoch_end(self, run: Run) -> None:
        """Act after a training epoch, on every rank."""

    def validation_start(self, run: Run) -> None:
        """Act before a validation, the sanity check too; one within an epoch may come amid accumulated batches."""

    def validation_end(self, run: Run) -> None:
        """Act after a validation, within a fit or on its own, on every rank; not after the sanity check."""

    def awaited(self, run: Run) -> Iterable[str]:
        """Name what was to come in this training and has not: events, phases, the end of a schedule; asked when a fit ends.

        Each is warned of as ``"<name>: ... ended before <what was to come>"``, so say what, and when it would have come.
        """
        return ()

    def adapt_start(self, run: Run) -> None:
        """Prepare for an evaluation on its own; a checkpoint it loads is already in place.

        Called for methods of lane ``STRUCTURE``, and for all when one of lane ``ADAPT`` is among them.
        """

    def adapt(self, call: Call) -> Any:
        """Answer a call of the network during such an evaluation; only methods of lane ``ADAPT`` are asked.

        Gradients are off and can be enabled. Return what the network would: ``call()`` runs it.
        """
        return call()

    def calibrate(self, block: CalibrationBlock) -> None:
        """Act on a block of a trained network, for :func:`lightning_peft.calibrate`; the blocks before it are done.

        Gradients are off and can be enabled. Random numbers are those of the block, so that a calibration that was killed goes
        on as it would have; what must be known at the next block belongs into :meth:`state`.
        """

    def finish(self, run: Run) -> None:
        """Let go of resources when the Trainer is done with the module or has failed."""

    def metrics(self, run: Run) -> Mapping[str, Tensor | float]:
        """Return numbers to log as ``peft/<name>/<key>``; asked every ``log_every_n_steps`` and evaluated batch."""
        return {}

    def state(self) -> dict[str, Any]:
        """Return what must survive a crash, as plain data: tensors, numbers, strings, lists, dicts."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave."""

    def pooled(self, key: str, states: Sequence[Any], rank: int) -> Any:
        """Return what a rank goes on from when a checkpoint comes from another number of ranks.

        Args:
            key: One of :attr:`rank_state`.
            states: What each of those ranks had under it.
            rank: The rank that goes on.
        """
        raise NotImplementedError(f"{type(self).__name__} has {key!r} in rank_state and does not define pooled()")

    def state_form(self, tensors: Mapping[str, Tensor] | None) -> Form | None:
        """Say what :meth:`state` looks like (:mod:`lightning_peft.structure.forms`), so that nothing else is loaded.

        Args:
            tensors: The module's tensors by plain name, to hold names and shapes against; ``None`` when it is not at hand.
        """
        return None

    def describe(self, module: nn.Module) -> str:
        """Say in a few words what the method does to this module, for the printed plan."""
        claims = list(self.claims(module))
        return f"{len(claims)} tensor{'s' if len(claims) != 1 else ''}" if claims else ""

    # What an author calls.

    @property
    def given_arguments(self) -> Mapping[str, Any]:
        """The constructor arguments its user gave."""
        return {}

    @property
    def fits(self) -> bool:
        """Whether the run it takes part in trains; without a run, as in :func:`lightning_peft.plan`, it would."""
        return self.run is None or self.run.trainer.state.fn == TrainerFn.FITTING

    def is_frozen(self, parameter: object) -> bool:
        """Whether a parameter was frozen by its owner, for good as far as anybody can know.

        What the engine froze for :meth:`trained` does not count, nor anything while one of Lightning's finetuning callbacks
        decides in the course of the training.
        """
        if not isinstance(parameter, nn.Parameter) or parameter.requires_grad:
            return False
        if self.run is None:
            return True
        callbacks = self.run.trainer.callbacks  # type: ignore[attr-defined]
        return parameter not in self.run.frozen and not any(isinstance(each, both(BaseFinetuning)) for each in callbacks)

    def left_alone(self, module: nn.Module) -> list[str]:
        """Name the layers that :meth:`select` leaves out because their weights are frozen."""
        return [] if self.targets is None else list(self.spared(module, select(module, self.targets, self.exclude)))

    def spared(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Return those of some layers that :attr:`spares_frozen` is about: frozen, and not named by ``targets``."""
        if not (self.spares_frozen or self.lane in (Lane.REPARAM, Lane.MASK)):
            return {}
        frozen = {name: layer for name, layer in layers.items() if self.is_frozen(layer._parameters.get("weight"))}
        named = explicitly_named(module, self.targets) if frozen else ()
        return {name: layer for name, layer in frozen.items() if layer not in named}

    def map_weight(self, module: nn.Module, name: str, weight_map: WeightMap) -> WeightMap:
        """Attach a map to the tensor called ``name`` (``"model.fc1.weight"``) and return it, or the one it carries already."""
        weight_map.owner, weight_map.method = type(self).__name__, self.name
        present = attached_map(module, name, weight_map)
        if present is None:
            attach_map(module, name, weight_map)
        return weight_map if present is None else present

    def put_part(self, module: nn.Module, name: str, part: PartT) -> PartT:
        """Put a part beside the layer called ``name`` (``"model.fc1"``) and return it, or the one that stands there already."""
        part.owner, part.method = type(self).__name__, self.name
        return put_part(module, name, part)

    def put(self, module: nn.Module, path: str, replacement: Replacement) -> PutEdit:
        """Describe one of :attr:`replacements` in the place of the layer called ``path``, for an :class:`EditRequest`."""
        return put_edit(module, path, replacement, method=type(self).__name__)

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments as plain data."""
        return {key: as_plain(value) for key, value in self._arguments.items()}

    def in_training_step(self) -> bool:
        """Whether the user's ``training_step`` runs now, for the first time: only its calls of the network are the training's.

        The ``training`` flag of a layer does not say so: networks are fine-tuned in evaluation mode too. A step that is
        evaluated once more (:meth:`StepClosure.again`) is computed as ever (``run.in_step``), and not to be remembered.
        """
        return self.run is not None and self.run.in_step and not self.run.repeated

    @property
    def state_key(self) -> str:
        """Key of the method's state in a checkpoint."""
        return f"lightning_peft/{self.name}"


def ordered(methods: Iterable[Contract]) -> list[Contract]:
    """Return methods in the order they act: by lane, then by ``after``, then by name, never by their place in a callbacks list.

    Raises:
        MisconfigurationException: Methods come after one another in a circle.
    """
    waiting = sorted(methods, key=lambda method: (method.lane, method.name))
    found: list[Contract] = []
    while waiting:
        free = (method for method in waiting if not any(_comes_after(method, other) for other in waiting))
        first = next(free, None)
        if first is None:
            names = " and ".join(method.name for method in waiting if method.after)
            raise MisconfigurationException(f"{names} name each other in after=, in a circle. Take one of the names out.")
        waiting.remove(first)
        found.append(first)
    return found


def _comes_after(method: Contract, other: Contract) -> bool:
    return method.lane > other.lane or (method.lane == other.lane and goes_after(method, other))


def goes_after(method: Contract, other: Contract) -> bool:
    """Whether a method names another in its ``after``."""
    return other.name in ((method.after,) if isinstance(method.after, str) else method.after)


def overrides(method: Contract, hook: str) -> bool:
    """Whether a method does something in a hook of the contract."""
    return getattr(type(method), hook) is not getattr(Contract, hook)


def snake_case(name: str) -> str:
    """Turn a class name into a log name.

    Example:
        >>> snake_case("NMSparsity"), snake_case("PSKD"), snake_case("DoRA")
        ('nm_sparsity', 'pskd', 'dora')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name.replace("oRA", "ora")).lower()


def methods_of(callbacks: Iterable[object]) -> Iterator[Contract]:
    """Yield the methods among a Trainer's callbacks."""
    return (callback for callback in callbacks if isinstance(callback, Contract))
