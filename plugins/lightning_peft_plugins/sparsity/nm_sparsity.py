"""N:M structured sparsity during training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft import Lane, Method, Resource, Run
from lightning_peft.arguments import one_of
from lightning_peft.compose.schedule import parse_point
from lightning_peft.contract import SPLIT, Contract
from lightning_peft.network.nm_layers import input_dim, inputs, output_dim, outputs, wide_layers
from lightning_peft.network.targets import SENSITIVE, TargetSpec, by_layer, explicitly_named
from lightning_peft.optim.optimizers import trained_by
from lightning_peft.strategies.support import shards
from lightning_peft.structure.edits import Change
from lightning_peft.structure.forms import Form, fields, list_of, whole
from lightning_peft.structure.reorder import Orders
from lightning_peft.weights.maps import maps_of
from lightning_peft.weights.nm_pattern import parse_pattern
from lightning_peft.weights.nm_prune import pruned_values
from lightning_peft.weights.penalties import add_penalty
from lightning_peft_plugins.sparsity._nm_sparsity.channel_order import Sparse
from lightning_peft_plugins.sparsity._nm_sparsity.nm_map import HeldNMMap, MaskRule, NMMap
from lightning_peft_plugins.sparsity._nm_sparsity.nm_schedule import NEVER, RECIPES, PhaseTimeline, Recipe, needs_end, phase_at
from lightning_peft_plugins.sparsity._nm_sparsity.permutation import STATE_FORM, Permutation
from lightning_peft_plugins.sparsity._nm_sparsity.step_masks import StepMasks


class NMSparsity(Method):
    """Trains weights into N:M sparsity: N of every M consecutive weights along the input dimension stay.

    After training every complete group holds exactly N of M, in a module that is otherwise unchanged; ``2:4`` is the pattern
    sparse tensor cores compute with.

    Recipes: ``"one-shot"`` (prune once, keep the mask: ASP), ``"ste"`` (mask chosen anew in every step, straight-through
    gradient), ``"sr-ste"`` (the same, pruned weights pulled to zero, Zhou et al. 2021 eq. 7), ``"mdgf-linear"`` and
    ``"mdgf-exponential"`` (pruned weights fade out by a decaying factor), ``"sdgf-stepwise"`` and ``"sdgf-geometric"`` (N and M
    move to the target in frames); the last four are Bambhaniya et al. 2024.

    Args:
        pattern: ``"N:M"``, any 0 < N <= M.
        recipe: How weights become sparse.
        targets: Layers to sparsify; Linear, Conv1d/2d/3d and HF ``Conv1D`` are possible. ``"auto"`` takes linear layers, or
            convolutions where most weights are in those.
        exclude: Layers to leave dense; by default the first layer, the head, depthwise convolutions, and what is tied to an
            embedding. Pass ``()`` for none.
        patterns: Patterns of single layers, ``{target: "N:M"}``; the last match counts.
        dense: How long to train dense first: steps, ``"10%"`` or ``"3ep"``.
        fine_tune: How long to train with the final binary mask at the end, same units.
        grad_mode: ``"ste"``: pruned weights receive the full gradient (the official code); ``"masked"``: the gradient decays
            with the weight (the abstract of Bambhaniya et al.).
        sr_lambda: Pull of SR-STE.
        decay: Decay per step of the MDGF recipes; ``"auto"`` scales the official end point to the length of the training.
        refresh: Choose masks anew every so many optimizer steps; ``one-shot`` never does.
        transposable: Keep N of every M weights along the outputs too, so that the backward pass also multiplies with an N:M
            matrix (Hubara et al., NeurIPS 2021).
        permute: Put channels into an order in which the pattern keeps more magnitude, once, when the masks begin (Pool & Yu,
            NeurIPS 2021). The network computes what it did before. Needs Torch-Pruning
            (``pip install lightning-peft[prune]``) and one dense step at least, in which the network's call is seen.
        permute_escapes: Random swaps with which the search goes on after it came to its end, per group of channels.
        validate: What validations see: the network as it is ``"trained"``, or with the target pattern, as it would be
            ``"baked"``, so that ``ModelCheckpoint(monitor=)`` and ``EarlyStopping`` compare what is shipped.
        network: Qualified name of the network when the module has several candidates; for ``permute`` alone.
        name: Name in logs and checkpoints.

    Raises:
        MisconfigurationException: Impossible pattern or recipe, targets that match nothing or are narrower than M; ``permute``
            without Torch-Pruning, or with an optimizer whose state cannot follow.

    Example:
        >>> NMSparsity("2:4", recipe="sr-ste", targets="pointwise", fine_tune="20%")
        NMSparsity(pattern='2:4', recipe='sr-ste', targets='pointwise', ... fine_tune='20%', ...)
    """

    strategies = SPLIT
    lane = Lane.MASK
    commutes = True
    writes = frozenset({Resource.MASK})
    weight_maps = (NMMap, HeldNMMap)
    paper = (
        "Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers, 2024, "
        "arXiv 2402.04744; Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, ICLR 2021, "
        "arXiv 2102.04010"
    )

    def __init__(
        self,
        pattern: str = "2:4",
        recipe: Recipe = "mdgf-exponential",
        targets: TargetSpec = "auto",
        exclude: TargetSpec = SENSITIVE,
        patterns: Mapping[str, str] | None = None,
        *,
        dense: int | str = 0,
        fine_tune: int | str = 0,
        grad_mode: str = "ste",
        sr_lambda: float = 2e-4,
        decay: float | str = "auto",
        refresh: int = 1,
        transposable: bool = False,
        permute: bool = False,
        permute_escapes: int = 10,
        validate: Literal["trained", "baked"] = "trained",
        network: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, exclude=exclude or None, network=network, name=name)
        one_of("recipe", recipe, RECIPES)
        one_of("grad_mode", grad_mode, ("ste", "masked"))
        one_of("validate", validate, ("trained", "baked"))
        self.validated_as = validate
        if decay != "auto" and not (isinstance(decay, (int, float)) and decay > 0):
            raise MisconfigurationException(f'decay={decay!r} must be a positive number per step or "auto".')
        if refresh < 1:
            raise MisconfigurationException(f"refresh={refresh} must be at least 1 optimizer step.")
        if sr_lambda < 0:
            raise MisconfigurationException(f"sr_lambda={sr_lambda} would push pruned weights away from zero; use 0 or more.")
        if transposable and permute:
            raise MisconfigurationException(
                "permute=True looks for the order that keeps most along the inputs alone, not along both sides. "
                "Leave out permute= or transposable=."
            )
        if permute:  # the order is looked for in whole weights, in place
            self.strategies = Contract.strategies
        self.transposable = transposable
        self.permutation = Permutation(permute, permute_escapes, self.in_training_step)
        self.pattern = parse_pattern(pattern)
        self.patterns = {target: parse_pattern(text) for target, text in (patterns or {}).items()}
        self.recipe = recipe
        self.dense = parse_point(dense)
        self.fine_tune = parse_point(fine_tune)
        self.grad_mode = grad_mode
        self.sr_lambda = sr_lambda if recipe == "sr-ste" else 0.0
        self.coefficient = None if decay == "auto" else float(decay)
        self.refresh = refresh
        self.timeline: PhaseTimeline | None = None
        self._begins = False
        self._rules: dict[tuple[int, int], MaskRule] = {}

    @property
    def holds_masks(self) -> bool:
        """Whether masks are kept between steps instead of being chosen from every weight."""
        return self.recipe == "one-shot" or self.refresh > 1

    def select(self, module: nn.Module) -> dict[str, nn.Module]:
        """Leave out layers of a preset that have fewer than M inputs; refuse when nothing is left."""
        found = super().select(module)
        patterns = self._layer_patterns(module, found)
        return wide_layers(found, patterns, self.targets)

    def _layer_patterns(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
        return by_layer(module, layers, self.pattern, self.patterns, "patterns")

    def describe(self, module: nn.Module) -> str:
        """Name patterns, and columns left dense because they fill no group."""
        layers = self.select(module)
        patterns = self._layer_patterns(module, layers)
        counts: dict[str, int] = {}
        for n, m in patterns.values():
            counts[f"{n}:{m}"] = counts.get(f"{n}:{m}", 0) + 1
        text = f"{self.recipe} " + ", ".join(f"{pattern} on {count} layers" for pattern, count in counts.items())
        if (2, 4) in patterns.values():
            text += f" ({_on_tensor_cores({name: layers[name] for name, pattern in patterns.items() if pattern == (2, 4)})})"
        ragged = [name for name, layer in layers.items() if inputs(layer) % patterns[name][1]]
        if self.transposable:
            text += f", along both sides{_one_side(layers, patterns)}"
        if self.permutation.wanted:
            found = (Sparse(cast(Tensor, layer.weight), *patterns[name], input_dim(layer)) for name, layer in layers.items())
            text += f", {self.permutation.describe([*found])}"
        return text + (f" ({len(ragged)} with a dense remainder: {', '.join(ragged[:3])})" if ragged else "")

    def attach(self, module: LightningModule) -> None:
        """Put one map on every target, all dense until training starts or a checkpoint says otherwise."""
        layers = self.select(module)
        for name, (n, m) in self._layer_patterns(module, layers).items():
            rule = self._rules.setdefault((n, m), MaskRule(n, m))
            kind = HeldNMMap if self.holds_masks else NMMap
            masked = self.grad_mode == "masked" or self.recipe == "one-shot"
            across = output_dim(layers[name], m) if self.transposable else None
            self.map_weight(module, f"{name}.weight", kind(n, m, input_dim(layers[name]), masked, rule, across))
        self._enter_phase()

    def start(self, run: Run) -> None:
        """Fix the phases of this training; masks that a checkpoint had in their final form stay so in a longer one."""
        before = self.timeline
        dense_end = run.place(self.dense, "dense=")
        if self.permutation.wanted:  # which needs a call of the network
            dense_end = max(1, dense_end)
            self.permutation.start(run)
        if self.fine_tune.amount or needs_end(self.recipe, self.coefficient):
            self.timeline = PhaseTimeline(dense_end, self._sparse_end(run), run.total_steps)
        else:
            total = run.end or NEVER
            self.timeline = PhaseTimeline(dense_end, total, total)
        if before is not None and self._is_final(before) and not self._is_final(self.timeline):
            self.timeline = PhaseTimeline(before.dense_end, min(before.sparse_end, self.steps), self.timeline.total)
        for rule in self._rules.values():  # between processes that hold shards of the weights, each would hold whole masks
            rule.pulls = self.sr_lambda > 0 and not shards(run.trainer.strategy)
            rule.together.apart = shards(run.trainer.strategy)
        self._enter_phase()
        self._refresh(run.module, fresh_only=True)

    def _is_final(self, timeline: PhaseTimeline) -> bool:
        targets = [(n, m, phase_at(self.steps, timeline, self.recipe, n, m, self.coefficient)) for n, m in self._rules]
        return all((phase.n, phase.m, phase.decay) == (n, m, 0.0) for n, m, phase in targets)

    def reads_now(self) -> frozenset[Resource]:
        return self.reads | ({Resource.INPUTS} if self.permutation.wanted else set())

    def writes_now(self) -> frozenset[Resource]:
        own = self.writes | ({Resource.GRADIENT} if self.sr_lambda else set())
        return own | ({Resource.STRUCTURE} if self.permutation.wanted else set())

    def next_order(self, run: Run) -> Orders | None:
        """Permute channels when the dense phase is over."""
        self.permutation.settle()
        if not self.permutation.waits or self.timeline is None or self.steps < self.timeline.dense_end:
            return None
        sparse = {
            mapped.name: Sparse(mapped.entering(nm_map), nm_map.n, nm_map.m, nm_map.dim)
            for mapped, nm_map in maps_of(run.module, NMMap, type(self).__name__)
        }
        self._begins = True
        return self.permutation.orders(run, sparse, self.name, self.is_frozen, self._excused(run.module))

    def _excused(self, module: nn.Module) -> set[str]:
        """Layers that ``exclude`` names one by one, which need not take part in a call of the network."""
        entries = [self.exclude] if isinstance(self.exclude, (str, type)) else self.exclude or ()
        named = explicitly_named(module, [entry for entry in entries if entry not in SENSITIVE])
        return {name for name, layer in module.named_modules() if layer in named}

    def batch_start(self, run: Run, batch: Any) -> None:
        """Begin with the masks once the channels are permuted; choose none for what weights were at an earlier batch."""
        for rule in self._rules.values():
            rule.together.begin()
        if self._begins:
            self._begins = False
            self._enter_phase()
            self._refresh(run.module, fresh_only=False)

    @torch.no_grad()
    def before_step(self, run: Run, optimizer: Optimizer) -> None:
        """Pull pruned weights towards zero, in SR-STE."""
        if not self.sr_lambda:
            return
        trained, strength = trained_by(optimizer), self.sr_lambda * run.gradient_scale(optimizer)
        for mapped, nm_map in maps_of(run.module, NMMap, type(self).__name__):
            if mapped.stored in trained and not nm_map.rule.dense:
                add_penalty(mapped, nm_map, partial(_pruned, nm_map), strength)

    def _sparse_end(self, run: Run) -> int:
        try:
            return run.place_from_end(self.fine_tune, "fine_tune=")
        except MisconfigurationException as error:
            raise MisconfigurationException(
                f'{error} A training without an end can have recipe="sr-ste", "ste" or "one-shot", or an MDGF recipe with '
                "decay= per step, all with fine_tune=0."
            ) from None

    def structure_changed(self, module: LightningModule, change: Change) -> None:
        """Choose masks of new layers at once: a training that goes on from here would, when it starts."""
        if self.timeline is not None:
            self._refresh(module, fresh_only=True)

    def after_step(self, run: Run) -> None:
        """Move to the phase of the new step and choose held masks anew when their time has come."""
        self._enter_phase()
        if self.holds_masks:
            once = self.recipe == "one-shot"
            if once or self.steps % self.refresh == 0:
                self._refresh(run.module, fresh_only=once)

    def awaited(self, run: Run) -> Iterator[str]:
        """The phase in which masks are binary, and of the whole pattern."""
        line = self.timeline
        if line is not None and self.steps < line.dense_end:
            yield f"masks began at step {line.dense_end}, so its weights are dense"
        elif line is not None and self.permutation.waits:
            yield f"the batch after step {self.steps}, with which channels are permuted and masks begin, so it is dense"
        elif line is not None and self.steps < line.sparse_end and self.recipe.startswith(("mdgf", "sdgf")):
            yield f"masks took their final form at step {line.sparse_end}"

    def _enter_phase(self) -> None:
        if self.timeline is None or self.permutation.waits:
            return
        for (n, m), rule in self._rules.items():
            phase = phase_at(self.steps, self.timeline, self.recipe, n, m, self.coefficient)
            rule.set(phase.n, phase.m, phase.decay)

    def _refresh(self, module: nn.Module, *, fresh_only: bool) -> None:
        """Choose held masks; ``fresh_only`` leaves those that exist."""
        for mapped, held in maps_of(module, HeldNMMap, type(self).__name__):
            if not held.rule.dense and not (fresh_only and held.holds(mapped.stored)):
                held.refresh(mapped.entering(held))

    def finish(self, run: Run) -> None:
        """Stop waiting for a call, and let go of the weights of this fit."""
        self.permutation.stop()
        for rule in self._rules.values():
            rule.together = StepMasks()

    @torch.no_grad()
    def metrics(self, run: Run) -> dict[str, Tensor | float]:
        """Share of non-zero weights in the targets, and how much of a pruned weight is left."""
        kept = total = 0
        for mapped, _ in maps_of(run.module, NMMap, type(self).__name__):
            weight = getattr(mapped.layer, mapped.attribute)
            kept += torch.count_nonzero(weight)
            total += weight.numel()
        rule = self._rules[max(self._rules)]
        return {"density": kept / max(total, 1), "decay": float(rule.decay)}

    def state(self) -> dict[str, Any]:
        """The phases, so that an evaluation of a checkpoint sees what training saw; how far the permutation is."""
        line = self.timeline
        phases = {"timeline": [] if line is None else [line.dense_end, line.sparse_end, line.total]}
        return phases | self.permutation.state()

    def state_form(self, tensors: Mapping[str, Tensor] | None) -> Form:
        forms = {"timeline": _timeline_form}
        permuted = forms | STATE_FORM
        return lambda value, place: fields(permuted if isinstance(value, dict) and "kept" in value else forms)(value, place)

    def load_state(self, state: dict[str, Any]) -> None:
        self.permutation.load_state(state)
        if state["timeline"]:
            self.timeline = PhaseTimeline(*(int(step) for step in state["timeline"]))
        self._enter_phase()


def _pruned(nm_map: NMMap, weight: Tensor) -> Tensor:
    """Gradient of SR-STE's penalty, by the masks that the forward pass had."""
    return pruned_values(weight, nm_map.take_mask(weight))


def _on_tensor_cores(layers: Mapping[str, nn.Module]) -> str:
    """Say which layers PyTorch can hand to sparse tensor cores, once they are baked."""
    from lightning_peft.baking.semi_structured import why_dense

    reasons = {name: reason for name, layer in layers.items() if (reason := why_dense(layer))}
    if not reasons:
        return "all fit sparse tensor cores"
    some = ", ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
    return f"{len(layers) - len(reasons)} fit sparse tensor cores; not {some}{', ...' if len(reasons) > 3 else ''}"


def _one_side(layers: Mapping[str, nn.Module], patterns: Mapping[str, tuple[int, int]]) -> str:
    """Name layers whose outputs do not fill blocks."""
    found = [name for name, layer in layers.items() if output_dim(layer, m := patterns[name][1]) is None or outputs(layer) % m]
    return f" (not all outputs of {', '.join(found[:3])}{', ...' if len(found) > 3 else ''})" if found else ""


def _timeline_form(value: Any, place: str) -> str | None:
    found = list_of(whole(), 0, 3)(value, place)
    return found or (None if value == sorted(value) else f"{place} is {value}, but phases end one after the other")
