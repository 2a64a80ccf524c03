"""What an author of a method subclasses."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import registry
from lightning_peft.arguments import as_plain, check_types, whole_signature
from lightning_peft.attach.targets import TargetSpec, select
from lightning_peft.compose.lanes import Lane, Resource
from lightning_peft.compose.loss import Loss, Step
from lightning_peft.compose.run import Run
from lightning_peft.namespaces import inherit_both
from lightning_peft.renewal import Origin
from lightning_peft.strategies import adaptive
from lightning_peft.structure import method_state
from lightning_peft.structure.forms import Form
from lightning_peft.structure.method_state import MethodState
from lightning_peft.structure.plain import not_plain
from lightning_peft.weights.maps import WeightMap, attach_map, attached_map, plain_tensors

if TYPE_CHECKING:
    from lightning_peft.attach.evaluation import Call
    from lightning_peft.attach.hub import Hub
    from lightning_peft.structure.edits import Change, Growth

adaptive.register()  # whoever has a method can name the strategy


class Method(Callback):
    """Base of every method: a Lightning callback that declares what it does and leaves the life cycle to the hub.

    Subclasses set :attr:`lane` and whatever of :attr:`reads`, :attr:`writes` and :attr:`weight_maps` applies, and override
    the few of these they need, each called in lane order whatever the order of the callbacks list:

    - :meth:`attach` once the module is complete and before optimizers exist: weight maps, structure;
    - :meth:`start` when training is about to begin, after a checkpoint was restored;
    - :meth:`loss` inside every ``training_step``;
    - :meth:`before_step` before and :meth:`after_step` after every real optimizer step;
    - :meth:`epoch_end` after every training epoch;
    - :meth:`adapt_start` and :meth:`adapt` (lane ``ADAPT``) to answer the network's calls in ``test`` and its like;
    - :meth:`metrics` for numbers worth a curve, :meth:`state` and :meth:`load_state` for what must survive a crash, and
      :meth:`state_form` for what a damaged file must not bring back.

    ``__init__`` makes what a method is before any run. When a training begins at its first step, the engine runs it again on
    the same object with the same arguments, so that nothing of an earlier training is left; what was set on the object between
    two runs stays.

    Args:
        targets: Layers to act on, in the grammar of :func:`lightning_peft.attach.targets.select`.
        exclude: Layers to leave alone, same grammar.
        network: Qualified name of the network when the module has several candidates.
        name: Name in logs, plans and checkpoints; needed only when one class is used twice in a Trainer.

    Attributes:
        lane: Where in a step the method acts.
        reads: What it reads of a training step.
        writes: What it changes; two methods that write one thing are a conflict.
        strategies: Kinds of Lightning strategy it works with: ``"single"``, ``"ddp"``.
        weight_maps: Weight maps it may attach, so that its checkpoints can be baked without the model's class.
        paper: Source, "Authors, venue year, link".
        fixed_arguments: Constructor arguments of a base that the class gives itself, and does not take.
        features: Qualified names of submodules whose calls :meth:`loss` reads from ``step.features``.
        restarts: Whether it lets learning-rate schedules begin again (``run.schedules``).
    """

    lane: ClassVar[Lane]
    reads: ClassVar[frozenset[Resource]] = frozenset()
    writes: ClassVar[frozenset[Resource]] = frozenset()
    strategies: ClassVar[frozenset[str]] = frozenset({"single", "ddp"})
    weight_maps: ClassVar[tuple[type[WeightMap], ...]] = ()
    paper: ClassVar[str] = ""
    fixed_arguments: ClassVar[frozenset[str]] = frozenset()

    _hub: Hub | None = None
    _arguments: dict[str, Any]
    _origin: Origin

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        inherit_both(Method, Callback)
        cls.__signature__ = whole_signature(cls)  # type: ignore[attr-defined]
        registry.define(cls)

    def __new__(cls, *args: Any, **kwargs: Any) -> Method:
        inherit_both(Method, Callback)  # pytorch_lightning may have been imported since the class was
        self = super().__new__(cls)
        taken = inspect.signature(cls)
        try:
            bound = taken.bind_partial(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{cls.__name__}: {error}. It takes {', '.join(taken.parameters)}.") from None
        check_types(cls, bound.arguments)
        self._origin = Origin(dict(bound.arguments))
        bound.apply_defaults()
        self._arguments = dict(bound.arguments)
        return self

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
        self.features: tuple[str, ...] = ()
        self.name = name or snake_case(type(self).__name__)
        self.steps = 0
        self.restored = False
        self.restarts = False
        self._epochs_ended = 0

    # What an author overrides.

    def select(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return the layers the method acts on by qualified name; override when the grammar of targets is not enough."""
        return {} if self.targets is None else select(module, self.targets, self.exclude)

    def reads_now(self) -> frozenset[Resource]:
        """Return what this instance reads; override when it depends on the arguments."""
        return self.reads

    def claims(self, module: nn.Module) -> Iterable[str]:
        """Name the tensors the method will map or mask, so that overlaps are found before anything is touched."""
        return [f"{name}.weight" for name in self.select(module)]

    def attach(self, module: LightningModule) -> None:
        """Change the module before optimizers exist; must be deterministic.

        Called again when the module has grown; :meth:`map_weight` leaves tensors alone that carry the method's map already.
        """

    def first_edit(self, module: LightningModule) -> Growth | None:
        """Ask for another structure to train with from the start; only lane ``STRUCTURE`` is asked, in a new fit."""
        return None

    def next_edit(self, run: Run) -> Growth | None:
        """Ask for a change of structure; only methods of lane ``STRUCTURE`` are asked, before a step, until all say ``None``.

        Never within an accumulation window, and not while a tuner runs its trial fit.
        """
        return None

    def structure_changed(self, module: LightningModule, change: Change) -> None:
        """Called after an edit: rename or drop state kept by tensor name. :meth:`attach` has run again if it was asked to."""

    def lr_factor(self) -> float:
        """Return a factor on all learning rates for the next optimizer step, on top of any scheduler."""
        return 1.0

    def start(self, run: Run) -> None:
        """Prepare for training; a restored checkpoint is already in place."""

    def loss(self, step: Step) -> Loss | Tensor | None:
        """Return a term for the optimised loss; called inside ``training_step``, before accumulation and AMP scale it."""
        return None

    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        """Look at the gradients of a real optimizer step: accumulated, unscaled, not yet clipped."""

    def after_step(self, run: Run) -> None:
        """Act after a real optimizer step of any optimizer."""

    def epoch_end(self, run: Run) -> None:
        """Act after a training epoch, on every rank."""

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

    def map_weight(self, module: nn.Module, name: str, weight_map: WeightMap) -> WeightMap:
        """Attach a map to the tensor called ``name`` (``"model.fc1.weight"``) and return it, or the one it carries already."""
        weight_map.owner = type(self).__name__
        present = attached_map(module, name, weight_map)
        return attach_map(module, name, weight_map).maps[-1] if present is None else present

    def config(self) -> dict[str, Any]:
        """Return the constructor arguments as plain data."""
        return {key: as_plain(value) for key, value in self._arguments.items()}

    def in_training_step(self) -> bool:
        """Whether the user's ``training_step`` runs now: only its calls of the network are the training's.

        The ``training`` flag of a layer does not say so: networks are fine-tuned in evaluation mode too.
        """
        return self._hub is not None and self._hub.run.in_step

    # What Lightning calls. Every hook goes to the hub, which acts once for all methods.

    @property
    def state_key(self) -> str:
        """Key of the method's state in a checkpoint."""
        return f"lightning_peft/{self.name}"

    def state_dict(self) -> dict[str, Any]:
        """Return the versioned state Lightning saves.

        Raises:
            MisconfigurationException: :meth:`state` returned something that could not be loaded again.
        """
        state = self.state()
        if (found := not_plain(state)) is not None:
            raise MisconfigurationException(
                f"state() of {self.name} holds something that is no plain data, and the checkpoint could not be resumed from: "
                f"{found}. Return tensors, numbers, strings, lists and dicts only."
            )
        return method_state.write(self.steps, self._epochs_ended, state)

    # Lightning refuses two callbacks of one key when it finds this overridden, before the plan can say which argument helps.
    state_dict.__wrapped__ = Callback.state_dict  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            MisconfigurationException: The state has another version or form; nothing of it is taken over then.
        """
        saved = self.check_state_dict(state_dict, None if self._hub is None else self._hub.run.module)
        self.steps, self._epochs_ended = saved.steps, saved.epochs
        self.restored = True
        try:
            self.load_state(saved.state)
        except MisconfigurationException:
            raise
        except Exception as error:  # what load_state meets in a damaged file, its author cannot foresee
            raise method_state.not_restored(self.name, f"{type(error).__name__}: {error}") from error

    def check_state_dict(self, state_dict: Any, module: nn.Module | None = None) -> MethodState:
        """Refuse what :meth:`state_dict` cannot have returned, without touching the method.

        Args:
            state_dict: What a checkpoint holds.
            module: The module, with the structure the checkpoint was saved with.

        Raises:
            MisconfigurationException: Another version, or another form.
        """
        form = self.state_form(None if module is None else plain_tensors(module))
        return method_state.read(self.name, state_dict, form)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Enter the module's hub."""
        from lightning_peft.attach.hub import enter

        self._hub = enter(trainer, pl_module)

    def on_after_setup(self, fabric: Any, module: nn.Module) -> None:
        """Refuse Fabric, which has no fit to be part of; it calls this when it sets a module up.

        Raises:
            MisconfigurationException: Always.
        """
        raise MisconfigurationException(
            f"{self.name} was given to Fabric, which calls no method. Give it to lightning.pytorch.Trainer(callbacks=[...]) "
            "and let that run a LightningModule; lightning_peft.functional has the mathematics for loops of your own."
        )

    def _drive(self, event: str, *args: Any) -> None:
        if self._hub is not None and self._hub.driver is self:
            getattr(self._hub, event)(*args)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything is restored: start, so that the sanity check sees what training will."""
        self._drive("start")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything is restored: start."""
        self._drive("start")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note which batch comes."""
        self._drive("begin_batch", batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The gradients of a step are complete."""
        self._drive("before_step", optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log."""
        self._drive("log")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the epoch for every method."""
        self._drive("end_epoch")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what did not come."""
        self._drive("end_training")

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note which batch comes; before the first, start to adapt."""
        self._drive("begin_evaluation_batch", batch_idx, dataloader_idx)

    on_validation_batch_start = on_predict_batch_start = on_test_batch_start

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log."""
        self._drive("log_evaluation")

    on_validation_batch_end = on_test_batch_end

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make a checkpoint saved after a fit as complete as one saved during it."""
        from lightning_peft.attach.hub import complete_checkpoint

        complete_checkpoint(trainer, pl_module, checkpoint)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module clean."""
        self._leave(failed=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module clean; Lightning does not call ``teardown`` after a failure."""
        self._leave(failed=True)

    def _leave(self, *, failed: bool) -> None:
        hub, self._hub = self._hub, None
        if hub is not None:
            hub.leave(failed=failed)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_hub"}

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}={value!r}" for key, value in self._arguments.items() if value is not None)
        return f"{type(self).__name__}({shown})"


def ordered(methods: Iterable[Method]) -> list[Method]:
    """Return methods in the order they act: by lane, then by name, never by their place in a callbacks list."""
    return sorted(methods, key=lambda method: (method.lane, method.name))


def snake_case(name: str) -> str:
    """Turn a class name into a log name.

    Example:
        >>> snake_case("NMSparsity"), snake_case("PSKD"), snake_case("WeightCompander")
        ('nm_sparsity', 'pskd', 'weight_compander')
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def methods_of(callbacks: Iterable[object]) -> Iterator[Method]:
    """Yield the methods among a Trainer's callbacks."""
    return (callback for callback in callbacks if isinstance(callback, Method))
