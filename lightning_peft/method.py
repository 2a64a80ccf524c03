"""What an author of a method subclasses."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import registry
from lightning_peft.attach.targets import TargetSpec, select
from lightning_peft.compose.lanes import Lane, Resource
from lightning_peft.compose.loss import Loss, Step
from lightning_peft.compose.run import Run
from lightning_peft.namespaces import inherit_both
from lightning_peft.strategies import adaptive
from lightning_peft.structure.plain import not_plain
from lightning_peft.weights.maps import WeightMap, attach_map, attached_map

if TYPE_CHECKING:
    from lightning_peft.attach.evaluation import Call
    from lightning_peft.attach.hub import Hub
    from lightning_peft.structure.edits import Change, Growth

STATE_FORMAT = 1

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
    - :meth:`metrics` for numbers worth a curve, :meth:`state` and :meth:`load_state` for what must survive a crash.

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
        features: Qualified names of submodules whose calls :meth:`loss` reads from ``step.features``.
        restarts: Whether it lets learning-rate schedules begin again (``run.schedules``).
    """

    lane: ClassVar[Lane]
    reads: ClassVar[frozenset[Resource]] = frozenset()
    writes: ClassVar[frozenset[Resource]] = frozenset()
    strategies: ClassVar[frozenset[str]] = frozenset({"single", "ddp"})
    weight_maps: ClassVar[tuple[type[WeightMap], ...]] = ()
    paper: ClassVar[str] = ""

    _hub: Hub | None = None
    _arguments: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        inherit_both(Method, Callback)
        cls.__signature__ = whole_signature(cls)  # type: ignore[attr-defined]
        registry.define(cls)

    def __new__(cls, *args: Any, **kwargs: Any) -> Method:
        inherit_both(Method, Callback)  # pytorch_lightning may have been imported since the class was
        self = super().__new__(cls)
        bound = inspect.signature(cls).bind_partial(*args, **kwargs)
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
        """Learn what was edited, to carry over what is kept by name; :meth:`attach` was called again before, if wanted."""

    def lr_factor(self) -> float:
        """Return what the learning rates of the next optimizer step are multiplied with, beside any scheduler."""
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
        return {"version": STATE_FORMAT, "steps": self.steps, "epochs": self._epochs_ended, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            MisconfigurationException: The state has another version or shape.
        """
        if not isinstance(state_dict, dict) or state_dict.get("version") != STATE_FORMAT:
            found = state_dict.get("version") if isinstance(state_dict, dict) else type(state_dict).__name__
            raise MisconfigurationException(
                f"The checkpoint holds state of {self.name} in format {found!r}; this version reads format {STATE_FORMAT}. "
                "Use the version of lightning-peft that wrote it, or start from its baked weights."
            )
        steps, epochs, state = (state_dict.get(key) for key in ("steps", "epochs", "state"))
        if type(steps) is not int or type(epochs) is not int or not isinstance(state, dict):
            raise MisconfigurationException(
                f"The checkpoint's state of {self.name} is malformed: it needs integers under 'steps' and 'epochs' and a dict "
                "under 'state'. The file is damaged or was edited; resume from another one."
            )
        self.steps, self._epochs_ended = steps, epochs
        self.restored = True
        self.load_state(state)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Enter the module's hub."""
        from lightning_peft.attach.hub import enter

        self._hub = enter(trainer, pl_module)

    def _drive(self, event: str, *args: Any) -> None:
        if self._hub is not None and self._hub.driver is self:
            getattr(self._hub, event)(*args)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Optimizers exist and are not yet restored: bind to them."""
        self._drive("bind_optimizers")

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

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything is restored: start to adapt."""
        self._drive("start_evaluation")

    on_validation_start = on_predict_start = on_test_start

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note which batch comes."""
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


def whole_signature(cls: type) -> inspect.Signature:
    """Signature of a class whose ``__init__`` hands ``**kwargs`` on to its bases: all that it takes, by name."""
    parameters: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        own = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        for parameter in own:
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                parameters.setdefault(parameter.name, parameter)
        if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in own):
            break
    return inspect.Signature(sorted(parameters.values(), key=lambda parameter: parameter.kind))


def as_plain(value: Any) -> Any:
    """Turn a constructor argument into plain data; what is neither data nor a dataclass becomes its repr."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [as_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else repr(value)


def methods_of(callbacks: Iterable[object]) -> Iterator[Method]:
    """Yield the methods among a Trainer's callbacks."""
    return (callback for callback in callbacks if isinstance(callback, Method))
