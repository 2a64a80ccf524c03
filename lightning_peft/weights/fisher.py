"""Diagonal Fisher information of a classifier, in the three conventions in use."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_peft.arguments import one_of
from lightning_peft.network.batches import batch_size, plain, take, tensors_of
from lightning_peft.network.called_with import call_with
from lightning_peft.network.labels import LABEL_KEYS
from lightning_peft.network.logits import as_logits
from lightning_peft.network.modes import modes_kept

Forward = Callable[[nn.Module, Any], Any]
_log = logging.getLogger(__name__)


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    convention: Literal["batch", "sample", "expected"] = "batch",
    labels: Literal["model", "data"] = "model",
    parameters: Iterable[str] | None = None,
    forward: Forward | None = None,
    eval_mode: bool = True,
    chunk_size: int = 8,
) -> dict[str, Tensor]:
    r"""Diagonal of the Fisher information of a classifier, one value per parameter entry.

    With ``l(y | x)`` the log-likelihood of class ``y``, the conventions in use differ and so do their magnitudes:

    * ``"batch"``: the squared gradient of the mean of ``l`` over a batch, averaged over batches. What the code
      of EATA computes (Niu et al., 2022, arXiv:2204.02610); its published strengths belong to this convention. About
      batch size times smaller than the next.
    * ``"sample"``: the squared gradient of each sample, averaged over samples (the empirical Fisher).
    * ``"expected"``: :math:`\sum_c p(c | x) (\nabla l(c | x))^2`, averaged over samples: the true Fisher, exact over
      classes, one backward pass per class (Matena & Raffel, 2022, arXiv:2111.09832).

    Per-sample gradients are vectorised over ``chunk_size`` samples where ``torch.func.vmap`` supports the model and
    computed one by one where it does not; the result is the same. Nothing of the model changes: neither ``grad``,
    ``requires_grad``, mode nor buffers. Works under ``torch.inference_mode``.

    Args:
        model: Network or LightningModule.
        batches: Batches to average over: a tensor ``x``, a tuple ``(x, y, ...)``, or a dict of keyword arguments, each
            with samples along dimension 0. They are moved to the device of the parameters.
        convention: See above.
        labels: Class to differentiate: ``"model"`` the predicted one (argmax), ``"data"`` the one in the batch.
        parameters: Names of the parameters to score; by default all that require a gradient. Frozen ones may be named.
        forward: ``(model, batch) -> output`` for batches of another kind. The logits are taken from the output: a
            tensor (samples, classes), its attribute or key ``logits``, or its first item.
        eval_mode: Score in evaluation mode. With ``False`` every module keeps its mode.
        chunk_size: Samples whose gradients are in memory at once (``"sample"`` and ``"expected"``).

    Returns:
        Parameter name to scores of the parameter's shape, on its device, in at least float32.

    Raises:
        MisconfigurationException: If there is no batch, no logits (samples, classes), no label where ``"data"`` asks
            for one, or no parameter of a given name.

    Example:
        >>> net = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.zeros_(net.weight)
        >>> diagonal_fisher(net, [torch.tensor([[1.0, 2.0]])], convention="expected")
        {'weight': tensor([[0.2500, 1.0000],
                [0.2500, 1.0000]])}
    """
    one_of("convention", convention, ("batch", "sample", "expected"))
    if labels not in ("model", "data") or (convention == "expected" and labels == "data"):
        raise MisconfigurationException(
            f'labels={labels!r} does not fit convention={convention!r}: "expected" weighs every class by its '
            'probability and reads no labels; the others take "model" or "data".'
        )
    # even the sums must not be made inside an evaluation loop's inference mode, or nobody could update them later
    with torch.inference_mode(False), torch.enable_grad(), modes_kept(model, evaluate=eval_mode):
        scorer = _Scorer(model, parameters, forward, labels)
        totals = {name: torch.zeros_like(p, dtype=_at_least_float32(p)) for name, p in scorer.wanted.items()}
        count = 0
        for raw in batches:
            batch = scorer.prepare(raw)
            size = _batch_size(batch)
            if convention == "batch":
                scores, size = scorer.batch(batch), 1
            else:
                scores = scorer.samples(batch, size, chunk_size, expected=convention == "expected")
            for name, score in scores.items():
                totals[name] += score
            count += size
        if count == 0:
            raise MisconfigurationException("Fisher information needs at least one batch; `batches` is empty.")
        return {name: total / count for name, total in totals.items()}


class _Scorer(nn.Module):
    """The model as a pure function of its parameters, and the squared gradients of its log-likelihood."""

    def __init__(self, model: nn.Module, parameters: Iterable[str] | None, forward: Forward | None, labels: str) -> None:
        super().__init__()
        self.model = model
        self.run, self.labels = forward or _call, labels
        self.vectorised = True
        named = dict(model.named_parameters())
        names = [n for n, p in named.items() if p.requires_grad] if parameters is None else list(parameters)
        for name in names:
            if name not in named:
                near = ", ".join(difflib.get_close_matches(name, named, n=3)) or ", ".join(list(named)[:3])
                raise MisconfigurationException(f"The model has no parameter {name!r}. Nearest: {near}.")
        if not names:
            raise MisconfigurationException("No parameter requires a gradient; name those to score in `parameters`.")
        self.wanted = {name: plain(named[name]) for name in names}
        self.fixed = {f"model.{n}": plain(p) for n, p in named.items() if n not in self.wanted}
        self.statistics = {f"model.{n}": b.detach() for n, b in model.named_buffers()}

    def forward(self, batch: Any) -> Tensor:
        return _logits(self.run(self.model, batch))

    def prepare(self, batch: Any) -> Any:
        device = next(iter(self.wanted.values())).device
        return apply_to_collection(move_data_to_device(batch, device), Tensor, plain)

    def log_likelihood(self, values: dict[str, Tensor], batch: Any) -> Tensor:
        """Log-probabilities (samples, classes) with ``values`` as parameters."""
        # copies, so that running statistics move in the copy only
        buffers = {name: buffer.clone() for name, buffer in self.statistics.items()}
        state = {**self.fixed, **buffers, **{f"model.{name}": value for name, value in values.items()}}
        logits = call_with(self, state, (batch,), {})
        return F.log_softmax(logits, dim=-1, dtype=_at_least_float32(logits))

    def classes(self, log_p: Tensor, batch: Any) -> Tensor:
        """Class to differentiate, shape (samples,)."""
        return _labels(batch) if self.labels == "data" else log_p.detach().argmax(-1)

    def batch(self, batch: Any) -> dict[str, Tensor]:
        values = {name: value.requires_grad_() for name, value in self.wanted.items()}
        log_p = self.log_likelihood(values, batch)
        mean = -F.nll_loss(log_p, self.classes(log_p, batch))
        return _squared(values, torch.autograd.grad(mean, list(values.values()), allow_unused=True))

    def samples(self, batch: Any, count: int, chunk_size: int, expected: bool) -> dict[str, Tensor]:
        totals: dict[str, Tensor] = {}
        for start in range(0, count, chunk_size):
            chunk = take(batch, count, slice(start, start + chunk_size))
            size = min(chunk_size, count - start)
            for name, score in self._chunk(chunk, size, expected).items():
                totals[name] = totals[name] + score if name in totals else score
        return totals

    def _chunk(self, chunk: Any, size: int, expected: bool) -> dict[str, Tensor]:
        if self.vectorised:
            try:
                return self._chunk_vmap(chunk, size, expected)
            except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                # whatever is wrong with the model itself is raised again below
                _log.debug("Fisher information one sample at a time, because vmap failed: %s", error)
                self.vectorised = False
        return self._chunk_loop(chunk, size, expected)

    def _chunk_vmap(self, chunk: Any, size: int, expected: bool) -> dict[str, Tensor]:
        tensors = tensors_of(chunk)
        batched = [t.ndim > 0 and t.shape[0] == size for t in tensors]

        def single(*leaves: Tensor) -> dict[str, Tensor]:
            pairs = zip(leaves, batched, strict=True)
            it = iter([leaf.unsqueeze(0) if is_batched else leaf for leaf, is_batched in pairs])
            sample = apply_to_collection(chunk, Tensor, lambda _: next(it))
            log_p, pullback, *_ = vjp(partial(self.log_likelihood, batch=sample), self.wanted)
            cotangents = _cotangents(log_p, None if expected else self.classes(log_p, sample))
            return _sum(_squared(self.wanted, list(pullback(c)[0].values())) for c in cotangents)

        with sdpa_kernel(SDPBackend.MATH):  # fused attention kernels have no batching rule on every device
            scores = vmap(single, in_dims=tuple(0 if b else None for b in batched), randomness="different")(*tensors)
        return {name: score.sum(0) for name, score in scores.items()}

    def _chunk_loop(self, chunk: Any, size: int, expected: bool) -> dict[str, Tensor]:
        values = {name: value.requires_grad_() for name, value in self.wanted.items()}

        def single(index: int) -> Iterator[dict[str, Tensor]]:
            sample = take(chunk, size, slice(index, index + 1))
            log_p = self.log_likelihood(values, sample)
            for cotangent in _cotangents(log_p, None if expected else self.classes(log_p, sample)):
                leaves = list(values.values())
                grads = torch.autograd.grad(log_p, leaves, cotangent, retain_graph=True, allow_unused=True)
                yield _squared(values, grads)

        return _sum(score for index in range(size) for score in single(index))


def _cotangents(log_p: Tensor, label: Tensor | None) -> Iterator[Tensor]:
    """What to pull back through log-probabilities (1, classes) so that the squared gradients add up to the Fisher."""
    one_hot = torch.eye(log_p.shape[-1], dtype=log_p.dtype, device=log_p.device)
    if label is not None:
        yield one_hot[label].reshape(log_p.shape)
        return
    root = log_p.detach().exp().sqrt()  # sqrt(p) g squares to p g^2
    for row in one_hot:
        yield root * row


def _squared(values: Mapping[str, Tensor], grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(value) if grad is None else grad.detach().to(_at_least_float32(grad)).square()
        for (name, value), grad in zip(values.items(), grads, strict=True)
    }


def _sum(scores: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for score in scores:
        total = {name: total[name] + value for name, value in score.items()} if total else score
    return total


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**{key: value for key, value in batch.items() if key not in LABEL_KEYS})
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _labels(batch: Any) -> Tensor:
    found = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[1]  # behind the inputs, whatever follows; `labels_of` gives none where several could be labels
    if not isinstance(found, Tensor):
        raise MisconfigurationException(
            f'labels="data" finds no labels in a batch of type {type(batch).__name__}. Pass (x, y) tuples or dicts '
            f'with one of {", ".join(LABEL_KEYS)}, or use labels="model".'
        )
    return found


def _logits(output: Any) -> Tensor:
    logits = as_logits(output)
    if logits.ndim != 2:
        raise MisconfigurationException(
            f"Fisher information needs logits of shape (samples, classes), got {tuple(logits.shape)}. "
            "Pass forward=lambda model, batch: ... that returns them."
        )
    return logits


def _batch_size(batch: Any) -> int:
    size = batch_size(batch)
    if size == 0:
        raise MisconfigurationException("Fisher information: a batch holds no sample (no tensor, or an empty one).")
    return size


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
