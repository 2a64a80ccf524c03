"""The hub: one per LightningModule and run, owner of every intrusion into it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_peft.attaching import after_fit, averaging, kept_layers, part_calls, validating
from lightning_peft.attaching.adapting import Adapting
from lightning_peft.attaching.editing import edit_training
from lightning_peft.attaching.first_edits import FirstEdits
from lightning_peft.attaching.lasting import leave_hooks
from lightning_peft.attaching.loader_state import restore_loader
from lightning_peft.attaching.map_groups import MapGroups
from lightning_peft.attaching.method_lives import MethodLives
from lightning_peft.attaching.missing_blocks import MissingBlocks
from lightning_peft.attaching.neighbours import check_neighbours
from lightning_peft.attaching.new_blocks import NewBlocks
from lightning_peft.attaching.optimizer_wraps import wrap_optimizers
from lightning_peft.attaching.plan import network_of, resolve
from lightning_peft.attaching.reordering import reorder_training
from lightning_peft.attaching.saving import CheckpointHooks
from lightning_peft.attaching.step_gradients import StepGradients
from lightning_peft.attaching.step_rates import StepRates
from lightning_peft.attaching.steps import StepTerms
from lightning_peft.attaching.trained import TrainedParameters
from lightning_peft.attaching.twins import warn_of_copies, warn_of_twins
from lightning_peft.attaching.unfinished import warn_unfinished
from lightning_peft.capture.evaluation import Passes
from lightning_peft.capture.sampling import SampleRecorder
from lightning_peft.capture.shim import Shim
from lightning_peft.compose.lanes import Lane, Resource
from lightning_peft.compose.pace import Pace
from lightning_peft.compose.run import Run
from lightning_peft.contract import Contract, methods_of, ordered, overrides
from lightning_peft.namespaces import own
from lightning_peft.network.resolve import check_materialised
from lightning_peft.optim.schedulers import FreshSchedule
from lightning_peft.strategies import sharding
from lightning_peft.strategies.checkpoints import WholeFiles, files_of, read_folders
from lightning_peft.strategies.support import check_strategy, rewrap, shards
from lightning_peft.structure.carry import regroup
from lightning_peft.weights import stash
from lightning_peft.weights.attachment import Attachment
from lightning_peft.weights.detach import attachments, check_stay, detach_maps
from lightning_peft.weights.map_modules import shown_within
from lightning_peft.weights.maps import forget_pristine, mapped_tensors
from lightning_peft.weights.merge import unmerge
from lightning_peft.weights.parts import placed_parts

_HUBS: weakref.WeakKeyDictionary[nn.Module, Hub] = weakref.WeakKeyDictionary()


def enter(trainer: Trainer, module: LightningModule) -> Hub:
    """Return the hub of this run, creating it when the first method of the Trainer asks."""
    hub = _HUBS.get(module)
    if hub is not None and hub.run.trainer is trainer:
        return hub
    if hub is not None:  # another Trainer died without a word
        hub.leave(failed=True)
    hub = Hub(trainer, module)
    try:
        hub.install()
    except Exception:
        hub.lives.end(refused=True)
        raise
    _HUBS[module] = hub  # last: a hub that was refused must not be found by the next fit of its Trainer
    return hub


def passes_of(module: LightningModule) -> Passes | None:
    """Counts of the network's passes in the evaluation that is running; ``None`` when no method adapts in it."""
    hub = _HUBS.get(module)
    return None if hub is None or hub._adapting is None else hub._adapting.passes


def apply_terms(module: LightningModule, loss: Tensor) -> Tensor:
    """Add the loss terms of all methods to a loss, for modules that use manual optimization.

    Call it inside ``training_step`` on the loss that is passed to ``manual_backward``. Without methods, or outside training,
    the loss comes back unchanged, so the call can stay in the module.

    Args:
        module: The LightningModule (``self``).
        loss: Scalar loss, with its graph.

    Returns:
        The scalar to optimise.
    """
    hub = _HUBS.get(module)
    return loss if hub is None else hub.apply(loss)


def attach(module: LightningModule) -> None:
    """Attach the methods of the Trainer that runs, for modules that make their layers and shard them in ``configure_model``.

    Call it there between the two. Without methods, or under a strategy that does not shard, nothing happens now.

    Args:
        module: The LightningModule (``self``).

    Example::

        def configure_model(self):
            if self.model is None:
                self.model = build()
                lightning_peft.attach(self)
                for block in self.model.blocks:
                    fully_shard(block, mesh=self.device_mesh["data_parallel"])
                fully_shard(self.model, mesh=self.device_mesh["data_parallel"])
    """
    hub = _HUBS.get(module)
    if hub is not None and hub._shards and hub._fitting:
        hub.attach()


def complete_checkpoint(trainer: Trainer, module: LightningModule) -> None:
    """Make a checkpoint saved after a fit as complete as the hub makes those saved during it; shards are saved as they are."""
    if module not in _HUBS and not shards(trainer.strategy):
        after_fit.complete(trainer, module)


class Hub:
    """Runs the methods of one Trainer on one module.

    The first method in the callbacks list drives: it forwards Lightning's hooks, and the hub calls every method in plan order.
    While that callback is not among ``trainer.callbacks`` (the learning-rate finder swaps them for its trial fit) the hub is
    inactive: weights stay mapped, but no loss term, no clock and no method runs.

    Args:
        trainer: The Trainer that runs.
        module: The user's module.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        listed = list(methods_of(trainer.callbacks))  # type: ignore[attr-defined]
        self.driver = listed[0]
        self.methods = ordered(listed)
        self._editing = [method for method in self.methods if method.lane == Lane.STRUCTURE]
        self._ordering = [method for method in self.methods if overrides(method, "next_order")]
        self._choosing = [method for method in self.methods if overrides(method, "next_trained")]
        self.run = Run(trainer, module, "", module)
        self._pace = Pace(self.run)
        self._fitting = trainer.state.fn == TrainerFn.FITTING
        self._shards = shards(trainer.strategy)
        self.lives = MethodLives(self.methods, self.run, fitting=self._fitting)
        self._rates = StepRates(self.methods, lambda: self.active and self.run.started)
        self._map_groups = MapGroups(self.run)
        self._trained = TrainedParameters(self.run, self.methods)
        self._files: WholeFiles | None = None
        self._shims: list[Shim] = []
        self._handles: list[RemovableHandle] = []
        self._terms: StepTerms | None = None
        self._gradients: StepGradients | None = None
        self._adapting: Adapting | None = None
        self._saving: CheckpointHooks | None = None
        self._new_blocks = NewBlocks()
        self._first = FirstEdits(module, self.methods)
        self._finished: list[Contract] = []
        self._found: frozenset[Attachment] = frozenset()
        self._gradients_pending = False
        self._attached = self._moved = self._ready = False

    @property
    def active(self) -> bool:
        """Whether this Trainer is running its own callbacks at the moment."""
        return self.driver in self.run.trainer.callbacks  # type: ignore[attr-defined]

    def install(self) -> None:
        """Take hold of the module; methods are attached once its own ``setup`` and ``configure_model`` have run."""
        check_strategy(self.run.trainer, self.methods)
        if self._shards and (self._fitting or any(method.lane == Lane.ADAPT for method in self.methods)):
            sharding.check_layout(self.run.trainer.strategy, self.methods)
        if self._shards and self._fitting:
            self._files = files_of(self.run.trainer, self.run.module)
            self._shims += [shim.install() for shim in self._files.shims()]
        elif self._fitting:
            self._shadow(self.run.trainer.strategy, "load_checkpoint", read_folders)
        # Not configure_model itself: WeightAveraging asks in its own setup whether that is overridden.
        self._shadow(self.run.module, "setup", self._setup)
        if self._fitting and any(Resource.SAMPLE_INDEX in method.reads_now() for method in self.methods):
            self.run.samples = SampleRecorder(self.run.trainer)
            self.run.samples.install()

    def _shadow(self, owner: Any, name: str, handler: Callable[..., Any]) -> None:
        self._shims.append(Shim(owner, name, handler).install())

    def _setup(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        inner(*args, **kwargs)
        if is_overridden("configure_model", self.run.module, own(LightningModule, self.run.module)):
            self._shadow(self.run.module, "configure_model", self._configure_model)
        else:
            self.attach()

    def _configure_model(self, inner: Callable[..., Any]) -> None:
        if not self._shards:
            inner()
        elif not self._fitting:  # baked weights are evaluated, and nothing goes beside them
            inner()
            self._adapt_shards()
            return
        else:
            sharding.configure(self.run.module, inner, self.attach)
            if not self._attached:
                sharding.check_whole(self.run.module)
            self._trained.find_again()
        self.attach()

    def attach(self) -> None:
        """Resolve the plan and attach every method, in lane order; does nothing the second time."""
        if self._attached:
            return
        module = self.run.module
        # The order matters: edits before the plan, which names the layers there will be; stored values of an earlier fit after
        # the maps, which invert what layers see and know nothing of them; averages last, for their callbacks copied the module
        # without maps and pair parameters by position.
        check_materialised(module)
        unmerge(module)
        if self._fitting:
            self._first.make()
        self.run.network_name, self.run.network = network_of(self.methods, module)
        plan = resolve(self.methods, module, self.run.network_name)
        check_neighbours(self.run.trainer, self.methods, module)
        stashed, stashed_parts = stash.peek(module), stash.peek_parts(module)
        self._found = frozenset(attachments(module))
        self._attached = True
        for method in self.methods:
            method.attach(module)
        check_stay(module, self._staying(attached=True))
        if self._fitting:
            warn_of_twins(module)
        stash.restore(module, stashed)
        stash.restore_parts(module, stashed_parts)
        if self._fitting:
            self._trained.freeze()
            if self._first.made or any(True for _ in (*mapped_tensors(module), *placed_parts(module))):
                averaging.rebuild(self.run.trainer, module)
            self._terms = StepTerms(self.run, self.methods, lambda: self.active)
            self._shadow(module, "training_step", self._terms.training_step)
            if any(Resource.STRUCTURE in method.writes_now() for method in self.methods):
                for step in ("training_step", "validation_step"):  # the sanity check comes first
                    self._shadow(module, step, MissingBlocks(module).step)
            self._gradients = StepGradients(self.run, self.methods, self._terms, lambda: self.active)
            self._shims += [shim.install() for shim in self._gradients.shims()]
            self._shadow(self.run.trainer.precision_plugin, "convert_module", partial(kept_layers.convert, self.run))
            self._shadow(module, "on_fit_start", self._fit_start)
            self._shadow(module, "configure_optimizers", self._configure_optimizers)
        if not self._fitting:
            self._let_adapt()
        self._saving = CheckpointHooks(self.run, self.methods, self._trained, fitting=self._fitting)
        save = self._saving.save
        self._shadow(module, "on_save_checkpoint", save if self._files is None else partial(self._files.save, save))
        self._shadow(module, "on_load_checkpoint", self._saving.load)
        rank_zero_info(str(plan))

    def _adapt_shards(self) -> None:
        """Let a method adapt in the evaluation of a sharded module, beside which no other one stands."""
        adapting = [method for method in self.methods if method.lane == Lane.ADAPT]
        if adapting:
            self.run.network_name, self.run.network = network_of(self.methods, self.run.module)
            rank_zero_info(str(resolve(adapting, self.run.module, self.run.network_name)))
            self._let_adapt()

    def _let_adapt(self) -> None:
        adapter = next((method for method in self.methods if method.lane == Lane.ADAPT), None)
        if adapter is not None:
            self._adapting = Adapting(self.run, adapter, self._finish)

    # Training.

    def _configure_optimizers(self, inner: Callable[[], Any]) -> Any:
        with shown_within(self.run.module):
            return inner()

    def _fit_start(self, inner: Callable[[], None]) -> None:
        """Bind after every callback: finetuning ones replace the groups of a resumed optimizer in their ``on_fit_start``."""
        self.bind_optimizers()
        inner()

    def bind_optimizers(self) -> None:
        """Follow every optimizer's real steps and give the parameters of weight maps their own groups."""
        trainer = self.run.trainer
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        wrap_optimizers(self.run, self.methods)
        self._map_groups.place()
        self._trained.check()
        if self._saving is not None and self._saving.groups is not None:
            regroup(self.run.module, trainer.optimizers, schedulers, self._saving.groups)
        after_fit.note_groups(trainer, self.run.module)  # of a training that is over already, nothing more is heard
        if any(method.lane == Lane.STRUCTURE or method.restarts for method in self.methods):
            self.run.schedules = [FreshSchedule.of(scheduler) for scheduler in schedulers]
        for index, optimizer in enumerate(trainer.optimizers):
            self._handles += self._rates.follow(optimizer)
            self._handles.append(optimizer.register_step_post_hook(self._step_hook(index)))

    def _step_hook(self, index: int) -> Callable[..., None]:
        # Lightning has no hook after a step. This one is called for real steps alone, by hand too: not for accumulated batches
        # nor steps that a gradient scaler skips. Rates are given back even in a tuner's trial fit, which no method sees. The
        # first optimizer is the clock; methods act after the step of any.
        def stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._rates.give_back()
            if not self.active:
                return
            self._pace.step(index)
            if not self._moved:
                self._moved = True
                forget_pristine(self.run.module)
            if index == 0:
                self.run.step += 1
                self._gradients_pending = False
            for method in self.methods:
                method.steps = self.run.step
                method.after_step(self.run)

        return stepped

    def before_step(self, optimizer: Optimizer) -> None:
        """Show every method the gradients of a step."""
        if self._shards:
            sharding.settle_gradients(optimizer)
        if self.active and self.run.started:
            if not self._moved:
                part_calls.check_called(self.run.module)
            self._new_blocks.check(self.run.module)
            for method in self.methods:
                method.before_step(self.run, optimizer)
            if self._gradients is not None and not self.run.module.automatic_optimization:
                self._gradients.after_clipping(optimizer)

    def start(self) -> None:
        """Start every method, once, when weights, optimizers and loops are restored."""
        if self.run.started:
            return
        self.run.started = True
        if restore_loader(self.run.trainer) and self.run.samples is not None:
            self.run.samples.restores = True
        self.run.step = max(method.steps for method in self.methods)
        for method in self.methods:
            method.steps = self.run.step
            method.start(self.run)
        if self._trained.freeze_late():
            rewrap(self.run.trainer)
        part_calls.warn_untrained(self.run.trainer, self.run.module)
        if self._fitting:
            validating.warn_of_judges(self.run, self.methods)
        self._end_missed_epoch()
        self._get_ready()

    def _get_ready(self) -> None:
        """From here on there is no way back to before a checkpoint was loaded."""
        self._ready = True
        if self._saving is not None:
            self._saving.before = None

    def _end_missed_epoch(self) -> None:
        """End the last epoch for methods whose state was saved after its last batch and before its end.

        Lightning resumes such a checkpoint (``every_n_train_steps``, or saved after validation) in the next epoch, without
        ``on_train_epoch_end`` for the one before.
        """
        epoch = self.run.trainer.current_epoch
        self.run.late_epoch = epoch - 1
        for method in self.methods:
            if method.restored and method._epochs_ended == epoch - 1:
                method.epoch_end(self.run)
            method._epochs_ended = epoch
        self.run.late_epoch = None

    def begin_batch(self, batch: Any, batch_idx: int) -> None:
        """Note the batch a step will see; between two optimizer steps, give the module the structure methods ask for."""
        self._map_groups.follow()
        if not self._gradients_pending:
            if self._editing or self._ordering:
                self.run.batch = (batch, batch_idx)
                try:
                    self._edit()
                finally:
                    self.run.batch = None
            self._choose_trained()
        self._gradients_pending = True
        self._pace.batch()
        if self._terms is not None:
            self._terms.batch = (batch, batch_idx)
        if self.run.samples is not None:
            self.run.samples.advance()
        for method in self.methods:
            method.batch_start(self.run, batch)

    def _choose_trained(self) -> None:
        """Train other parameters from here on if a method says so."""
        asked = [method.next_trained(self.run) for method in self._choosing]  # every one, whatever the first says
        if any(asked):
            self._trained.choose_again()
            rewrap(self.run.trainer)

    def start_validation(self) -> None:
        """Tell every method that a validation comes, and let layers compute with baked weights where one wants those judged."""
        for method in self.methods:
            method.validation_start(self.run)
        validating.show_baked(self.run.module, self.methods, on=True)

    def end_validation(self) -> None:
        """Tell every method that a validation is over."""
        self._reshard()
        validating.show_baked(self.run.module, self.methods, on=False)
        if not self.run.trainer.sanity_checking:
            for method in self.methods:
                method.validation_end(self.run)

    def _reshard(self) -> None:
        if self._shards:
            sharding.reshard(self.run.module)

    def _edit(self) -> None:
        for method in self._editing:
            while (growth := method.next_edit(self.run)) is not None:
                change = edit_training(
                    self.run.trainer, self.run.module, self.methods, growth, self._trained, self.run.schedules
                )
                self._new_blocks.added(change)
        for method in self._ordering:
            if (orders := method.next_order(self.run)) is not None:
                reorder_training(self.run.trainer, self.run.module, orders)

    def end_epoch(self) -> None:
        """Tell every method that an epoch is over."""
        self._pace.end_epoch()
        if self.run.module.automatic_optimization:  # the next epoch begins with cleared gradients
            self._gradients_pending = False
        for method in self.methods:
            method.epoch_end(self.run)
            method._epochs_ended = self.run.epoch + 1
        if self._terms is not None:
            self._terms.end_epoch()

    def end_training(self) -> None:
        """Say what this training was to bring and has not; note names while optimizers hold what the module does.

        Lightning moves the module before it calls ``teardown``, to where parameters may become other objects.
        """
        if not self.run.started:
            return
        warn_unfinished(self.run, self.methods)
        part_calls.warn_uncalled(self.run.module)
        after_fit.note_groups(self.run.trainer, self.run.module)

    def apply(self, loss: Tensor) -> Tensor:
        """Add every loss term to a loss of the user's."""
        return loss if self._terms is None else self._terms.apply(loss)

    def log(self) -> None:
        """Log losses and metrics of the step."""
        if self._terms is not None:
            self._terms.log()

    # Evaluation on its own; the validation within a fit shows the module as it is.

    def start_evaluation(self) -> None:
        """Start every method that adapts, or changes what the network is."""
        if self.run.started or self._fitting:
            return
        self.run.started = True
        for callback in [] if self._adapting is None else averaging.swapped_in(self.run.trainer):
            self._shadow(callback, "_swap_models", self._adapting.swap_back)  # type: ignore[union-attr]
        # What a method keeps must not be made in the loop's inference mode, or it could never be changed in place.
        with torch.inference_mode(False), torch.no_grad():
            for method in self.methods:
                if self._adapting is not None or method.lane == Lane.STRUCTURE:
                    method.adapt_start(self.run)
        self._get_ready()
        if self._adapting is not None:
            self._adapting.begin()

    def begin_evaluation_batch(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Note the batch whose calls come; at the first one every callback has put in place what is to be evaluated."""
        self.start_evaluation()
        if self._adapting is not None:
            self._adapting.note(batch, batch_idx, dataloader_idx)

    def log_evaluation(self) -> None:
        """Log what the adapting method says of the batch."""
        if self._adapting is not None:
            self._adapting.log()

    # The end.

    def leave(self, *, failed: bool) -> None:
        """Take everything off the module; what its layers compute stays as trained.

        After a fit the module holds baked weights. After an evaluation, or a fit that failed before its first step, it holds
        what it held before; after a fit that failed later, what its layers saw last.
        """
        module = self.run.module
        if _HUBS.pop(module, None) is None:
            return
        self._reshard()
        validating.show_baked(module, self.methods, on=False)
        for handle in self._handles:
            handle.remove()
        if self._terms is not None:
            self._terms.remove()
        if self._adapting is not None:
            self._adapting.remove()
        for shim in reversed(self._shims):
            shim.remove()
        if self.run.samples is not None:
            self.run.samples.remove()
        try:
            for method in reversed(self.methods):  # what one gives back is what it found, the work of those before it
                method.restored = False
                self._finish(method)
        finally:
            refused = failed and not self._ready
            if refused and self._saving is not None and self._saving.before is not None:
                self._saving.before.restore()
            if self._attached:
                self._strip(failed)
            else:
                self._first.undo(trained=self._moved)
            self._trained.thaw()
            leave_hooks(module)
            self.lives.end(refused=refused)

    def _staying(self, *, attached: bool) -> frozenset[Attachment]:
        """What is on the module when the run is over: after a fit what its methods keep, and what was there that is not theirs.

        Args:
            attached: Whether what the methods of this fit attached counts; else there is what was there before.
        """
        if not (self._fitting and attached):
            return self._found
        stays = {method.name: method.stays for method in self.methods}
        present = attachments(self.run.module)
        return frozenset(each for each in present if stays.get(each.method, each.stays))

    def _finish(self, method: Contract) -> None:
        if method not in self._finished:
            self._finished.append(method)
            method.finish(self.run)

    def _strip(self, failed: bool) -> None:
        module = self.run.module
        stay = self._staying(attached=not failed or self._moved)
        if self._fitting and self.run.started and failed:
            after_fit.note_groups(self.run.trainer, module)
        if self._fitting:
            stash.fill(module, stay)
            if not stay.issuperset(attachments(module)):
                warn_of_copies(module, averaging.copies(self.run.trainer))
            if not failed:
                part_calls.warn_lost(module, stay)
        detach_maps(module, "baked" if self._fitting and not failed else "pristine", stay=stay)
        for attachment in stay:
            attachment.stays = True
        if self._shards:
            sharding.forget_taken_off(self.run.trainer, module)
        if failed:
            self._first.undo(trained=self._moved)
        stash.seal(module)
