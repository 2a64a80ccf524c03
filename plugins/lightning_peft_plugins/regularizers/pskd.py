"""PS-KD: the targets of every sample soften with what the network itself predicted for it before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_peft import Lane, Loss, Method, Resource, Run, Step
from lightning_peft.arguments import one_of
from lightning_peft.contract import SPLIT, Contract
from lightning_peft.network.deep_copy import deep_copy
from lightning_peft.network.logits import as_logits
from lightning_peft.structure.edits import Change
from lightning_peft.structure.part_states import unmergeable
from lightning_peft.weights.detach import detach_maps
from lightning_peft_plugins.regularizers._pskd.batch_index import index_in_batch
from lightning_peft_plugins.regularizers._pskd.checks import check_loss, check_positions
from lightning_peft_plugins.regularizers._pskd.prediction_outbox import PredictionOutbox
from lightning_peft_plugins.regularizers._pskd.soft_label_memory import MAPPED_FROM, SoftLabelMemory, Storage, fits_memory
from lightning_peft_plugins.regularizers.functional.pskd import pskd_alpha, soft_cross_entropy

_DTYPES = {"float32": torch.float32, "float16": torch.float16}


class PSKD(Method):
    """Progressive self-knowledge distillation (Kim et al., ICCV 2021, section 3).

    In epoch ``e`` of ``T`` a sample's target is ``(1 - a) y + a p`` with ``a = alpha * (e + 1) / T`` and ``p`` the class
    probabilities the network predicted for it in the epoch before: in training mode, on that epoch's augmented view, with the
    weights before that step. Epoch 0 is plain training.

    Cross entropy is linear in its target, so the method needs no targets: the optimised loss is ``(1 - a)`` times the user's
    loss plus ``a`` times the cross entropy with ``p``. The user's loss keeps its label smoothing and class weights. Of a batch
    in which only ``n`` of ``B`` samples were seen before, the scale of the user's loss is ``1 - a n / B``.

    Args:
        alpha: Final weight of the past prediction, in [0, 1]. 0 is plain training, bit for bit.
        sample_index: ``"auto"`` follows the training loader; else where in the batch each sample's dataset position is:
            ``"2"``, ``"index"``, ``"meta.index"``.
        epochs: ``T``; ``None`` takes it from the Trainer.
        memory: ``"ram"``; ``"mapped"`` for a temporary file under ``Trainer(default_root_dir=...)``; ``"auto"`` for the file
            from 1 GiB on.
        num_samples: Size of the dataset. ``None`` asks the loader, or lets the memory grow when the index is in the batch.
        dtype: ``"float32"``, or ``"float16"`` for half the memory.
        teacher: ``"memory"`` is the published algorithm. ``"copy"`` predicts ``p`` with a copy of the network as it was at the
            end of the epoch before, on the present view: needs no sample index, costs a second forward pass.
        reduction: How the user's loss sums over the batch.
        check: ``"on"`` looks at the first batch of a fit: whether the loss is a cross entropy over the network's classes to
            which every sample adds, whether the loader keeps samples in order, and whether indices are positions.
        network: Qualified name of the network when the module has several candidates.
        name: Name in logs, plans and checkpoints.

    Raises:
        MisconfigurationException: An argument is out of range.

    Example:
        >>> PSKD(alpha=0.8)
        PSKD(alpha=0.8, sample_index='auto', memory='auto', dtype='float32', teacher='memory', reduction='mean', check='on')
    """

    strategies = SPLIT
    lane = Lane.LOSS
    reads = frozenset({Resource.LOGITS})
    writes = frozenset({Resource.LOSS_SCALE})
    paper = "Kim, Ji, Yoon, Hwang, Self-Knowledge Distillation with Progressive Refinement of Targets, ICCV 2021"

    def __init__(
        self,
        alpha: float = 0.8,
        sample_index: str = "auto",
        *,
        epochs: int | None = None,
        memory: Storage = "auto",
        num_samples: int | None = None,
        dtype: Literal["float32", "float16"] = "float32",
        teacher: Literal["memory", "copy"] = "memory",
        reduction: Literal["mean", "sum"] = "mean",
        check: Literal["on", "off"] = "on",
        network: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(network=network, name=name)
        if not 0 <= alpha <= 1:
            raise MisconfigurationException(f"PSKD(alpha={alpha}): alpha is a share and must lie between 0 and 1.")
        for label, number in (("epochs", epochs), ("num_samples", num_samples)):
            if number is not None and number < 1:
                raise MisconfigurationException(f"PSKD({label}={number}): must be at least 1, or None to find out.")
        one_of("memory", memory, ("auto", "ram", "mapped"))
        one_of("dtype", dtype, tuple(_DTYPES))
        one_of("teacher", teacher, ("memory", "copy"))
        one_of("reduction", reduction, ("mean", "sum"))
        one_of("check", check, ("on", "off"))
        self.alpha = alpha
        self.sample_index = sample_index
        self.epochs = epochs
        self.storage = memory
        self.num_samples = num_samples
        self.dtype = dtype
        self.teacher = teacher
        if teacher == "copy":  # shards are not copied
            self.strategies = Contract.strategies
        self.reduction = reduction
        self.check = check
        self.memory: SoftLabelMemory | None = None
        self._copy: nn.Module | None = None
        self._loaded: dict[str, Any] | None = None
        self._outbox = PredictionOutbox()
        self._targets: dict[int, tuple[Tensor, int]] = {}  # of the batches of the step at hand
        self._total = 1
        self._reached: float | None = None
        self._fits = self._warned = self._unchecked = False
        self._unchecked = check == "on"

    def reads_now(self) -> frozenset[Resource]:
        if self.teacher == "copy":
            return self.reads | {Resource.INPUTS}
        return self.reads | {Resource.SAMPLE_INDEX} if self.sample_index == "auto" else self.reads

    def describe(self, module: nn.Module) -> str:
        source = "a copy of the network" if self.teacher == "copy" else "past predictions"
        return f"up to {self.alpha:g} of each target from {source}"

    def start(self, run: Run) -> None:
        self._fits, self._reached = False, None
        self._unchecked = self.check == "on"
        self._total = self.epochs or _epochs_of(run)
        if self._total == 1:
            rank_zero_info("PSKD changes nothing in a training of one epoch: the first epoch is plain cross entropy.")
        loaded, self._loaded = self._loaded, None
        if loaded and self.teacher == "memory":
            rows: Tensor = loaded["probabilities"]
            self.memory = self._new_memory(run, len(rows) if loaded["fixed"] else None, rows.shape[1])
            self.memory.load(rows, loaded["seen"])
        elif loaded:
            self._copy = _frozen(run.network)
            try:
                self._copy.load_state_dict(loaded["weights"])
            except (RuntimeError, TypeError, AttributeError) as error:
                raise MisconfigurationException(
                    f"{self.name} was not restored: the teacher's weights in the checkpoint are not those of this "
                    "network. Resume from another checkpoint, or start anew from the weights, without ckpt_path."
                ) from error

    def loss(self, step: Step) -> Loss | None:
        if self.alpha == 0:
            return None
        logits = _class_logits(step.logits)
        if self._unchecked:
            self._check(step, logits)
        self._reached = alpha = pskd_alpha(step.run.epoch, self._total, self.alpha)
        if self.teacher == "copy":
            return self._distil_copy(step, logits, alpha)
        index = step.sample_index if self.sample_index == "auto" else index_in_batch(step.batch, self.sample_index)
        if index.shape[0] != logits.shape[0]:
            raise MisconfigurationException(
                f"The network returned logits of {len(logits)} samples for a batch of {len(index)}. PSKD needs one row of "
                "logits a sample; a step that mixes, drops or repeats samples can carry the index through with sample_index=..."
            )
        memory = self._memory_of(step.run, logits.shape[1])
        epoch = step.run.epoch
        # A step may be evaluated several times; the prediction that counts is the first, and so is the target.
        again = step.repeated or self._outbox.holds(epoch, step.batch_idx)
        if not again:
            self._outbox.deliver(memory)
        if not step.repeated:
            self._targets[step.batch_idx] = memory.read(index)
        previous, seen = self._targets[step.batch_idx]
        first = epoch == 0 or seen == 0
        log_probabilities = _log_softmax(logits.detach() if first else logits)
        if not again:
            self._outbox.put(epoch, step.batch_idx, index, log_probabilities.detach().exp())
        if first:
            return Loss()
        if logits.is_cuda:
            previous = previous.pin_memory()
        previous = previous.to(logits.device, non_blocking=True)
        value = soft_cross_entropy(log_probabilities, previous, self.reduction, alpha)
        return Loss(value=value, scale=1 - alpha * (seen / index.shape[0]))

    def _check(self, step: Step, logits: Tensor) -> None:
        self._unchecked = False
        check_loss(step.base_loss, logits)
        if self.teacher == "copy":
            return
        if self.sample_index == "auto" and step.run.samples is not None:
            step.run.samples.check_order()
        elif self.num_samples is None:
            loader = step.run.trainer.train_dataloader
            check_positions(index_in_batch(step.batch, self.sample_index), getattr(loader, "dataset", None), self.sample_index)

    def after_step(self, run: Run) -> None:
        self._targets.clear()

    def structure_changed(self, module: LightningModule, change: Change) -> None:
        """Copy the network anew: a teacher of the structure before could not be restored beside that of now."""
        if self._copy is not None and self.run is not None:
            self._copy = _frozen(self.run.network)

    def epoch_end(self, run: Run) -> None:
        if self.teacher == "copy":
            if self.alpha > 0:
                self._copy = _frozen(run.network)
            return
        if self.memory is not None:
            self._outbox.deliver(self.memory)
            self._merge(self.memory, run)

    def awaited(self, run: Run) -> Iterator[str]:
        """The epoch in which past predictions weigh most."""
        if self._reached is not None and self._reached < self.alpha - 1e-6:
            yield f"alpha reached {self.alpha:g} in epoch {self._total}; it came to {self._reached:.2g}"

    def finish(self, run: Run) -> None:
        if self.memory is not None:
            with suppress(RuntimeError):  # a broken device must not keep the module from being left clean
                self._outbox.deliver_processed(self.memory, run.trainer)
        self._outbox.clear()

    def metrics(self, run: Run) -> dict[str, float]:
        alpha = pskd_alpha(run.epoch, self._total, self.alpha)
        if self.memory is None:
            return {"alpha": alpha}
        return {"alpha": alpha, "coverage": int(self.memory.seen.sum()) / max(1, self.memory.size)}

    def state(self) -> dict[str, Any]:
        """Return the memory, merged across ranks (a collective: Lightning asks every rank), or the teacher's weights."""
        if self._loaded is not None:
            return self._loaded
        if self._copy is not None:
            return {"teacher": "copy", "weights": dict(self._copy.state_dict())}
        if self.memory is None:
            return {}
        with torch.inference_mode(False):
            if self.run is not None:
                self._outbox.deliver_processed(self.memory, self.run.trainer)
                self._merge(self.memory, self.run)
            if self.memory.nbytes >= MAPPED_FROM and not self._warned:
                self._warned = True
                rank_zero_warn(
                    f"Every checkpoint holds PSKD's memory of {self.memory.nbytes / 2**30:.1f} GiB, without which a resume is "
                    'not exact. Save less often, or halve it with dtype="float16".'
                )
            return {"teacher": "memory", **self.memory.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        saved = state.get("teacher", self.teacher)
        if saved != self.teacher:
            raise MisconfigurationException(
                f"The checkpoint was trained with PSKD(teacher={saved!r}), not {self.teacher!r}. Resume with the same one."
            )
        if state and not (fits_memory(state) if saved == "memory" else isinstance(state.get("weights"), dict)):
            raise MisconfigurationException("The checkpoint's state of PSKD is malformed; resume from another checkpoint.")
        self.memory = self._copy = None
        self._outbox.clear()
        self._loaded = state or None

    def _distil_copy(self, step: Step, logits: Tensor, alpha: float) -> Loss:
        if self._copy is None:
            return Loss()
        with torch.no_grad():
            previous = as_logits(self._copy(*step.call.args, **step.call.kwargs)).float().softmax(-1)
        return Loss(value=soft_cross_entropy(_log_softmax(logits), previous, self.reduction, alpha), scale=1 - alpha)

    def _memory_of(self, run: Run, classes: int) -> SoftLabelMemory:
        if self.memory is not None and self._fits:
            return self.memory
        size = self.num_samples
        if size is None and run.samples is not None and self.sample_index == "auto":
            size = run.samples.size
        if self.memory is None:
            self.memory = self._new_memory(run, size, classes)
        elif self.memory.fixed and size is not None and size != self.memory.size:
            raise MisconfigurationException(
                f"PSKD remembers predictions of {self.memory.size} training samples, but the training dataset now has {size}, "
                f"so they would belong to other samples. Resume with the dataset it was trained on, or start anew "
                "from its weights, without ckpt_path."
            )
        elif self.memory.classes != classes:
            raise MisconfigurationException(
                f"PSKD remembers predictions over {self.memory.classes} classes, but the network now returns {classes} logits. "
                "Resume with the head it was trained with, or start anew from the weights, without ckpt_path."
            )
        self._fits = True
        return self.memory

    def _new_memory(self, run: Run, size: int | None, classes: int) -> SoftLabelMemory:
        folder = run.trainer.default_root_dir
        return SoftLabelMemory(size, classes, dtype=_DTYPES[self.dtype], storage=self.storage, folder=folder)

    def _merge(self, memory: SoftLabelMemory, run: Run) -> None:
        if run.trainer.world_size == 1:
            memory.forget_visits()
            return
        strategy = run.trainer.strategy
        memory.merge(lambda tensor: strategy.all_gather(tensor.to(strategy.root_device)).cpu())


def _epochs_of(run: Run) -> int:
    try:
        return run.total_epochs
    except MisconfigurationException:
        raise MisconfigurationException(
            "PSKD raises alpha over the whole training, but the Trainer has no end: give PSKD(epochs=...), or set "
            "Trainer(max_epochs=...)."
        ) from None


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _class_logits(logits: Tensor) -> Tensor:
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise MisconfigurationException(
            "PSKD needs class logits of shape (batch, classes) with at least 2 classes; the network returned "
            f"{tuple(logits.shape)}. Predictions for every token or pixel, and single-logit binary heads, are outside the "
            "published method."
        )
    return logits


def _frozen(network: nn.Module) -> nn.Module:
    """Copy a network as a teacher: shims do not travel with copies, and evaluation mode draws no random numbers.

    Weights become what its layers see now: a soft mask that goes on hardening would make another teacher after a resume.
    """
    teacher = deep_copy(network)
    detach_maps(teacher, "live", parts=not unmergeable(teacher))
    return teacher.eval().requires_grad_(False)
