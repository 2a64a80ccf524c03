"""What is trained: the rest of the module is frozen for a fit, and given back afterwards."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from torch import nn

from lightning_peft.compose.lanes import Lane
from lightning_peft.compose.run import Run
from lightning_peft.contract import Contract
from lightning_peft.optim.optimizers import owner, parameter_names, trained_by
from lightning_peft.weights.maps import mapped_tensors
from lightning_peft.weights.parts import placed_parts


class TrainedParameters:
    """Freezes what no method names, as soon as one names something.

    Weight maps follow the weight they stand on: a reparametrisation is frozen with it, for it is another view of the same
    numbers; deltas, masks and layer parts are there to be trained beside a frozen weight.

    Args:
        run: The fit.
        methods: All methods, in plan order.
    """

    def __init__(self, run: Run, methods: Sequence[Contract]) -> None:
        self._run = run
        self._methods = methods
        self._frozen = False
        self._frozen_names: list[str] = []

    def freeze(self) -> None:
        """Freeze what is not trained.

        Call it before optimizers are made, which may ask ``requires_grad``, and before DDP wraps the module.

        Raises:
            MisconfigurationException: A method names something that is not there, or nothing would be trained.
        """
        wanted = self._wanted()
        if wanted is None:
            return
        self._frozen = True
        module, frozen = self._run.module, self._run.frozen
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and parameter not in wanted:
                parameter.requires_grad_(False)
                frozen.add(parameter)
                self._frozen_names.append(name)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if not trained:
            raise MisconfigurationException(
                f"{self._names()} names only parameters of {type(module).__name__} that were frozen before the fit. Let "
                "trained() name others, or call requires_grad_(True) on these."
            )
        sizes = [sum(parameter.numel() for parameter in part) / 1e6 for part in (trained, frozen)]
        rank_zero_info(f"lightning_peft: {sizes[0]:.2f} M parameters are trained, {sizes[1]:.2f} M frozen for this fit")

    def find_again(self) -> None:
        """Find what is frozen for the fit among the shards that stand in the place of parameters."""
        present = dict(self._run.module.named_parameters())
        self._run.frozen.clear()
        self._run.frozen.update(present[name] for name in self._frozen_names)

    def freeze_late(self) -> bool:
        """Freeze what methods name only now that optimizers and state are in place; say whether anything was frozen."""
        if not self._frozen:
            self.freeze()
            return self._frozen
        return False

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Lift the freeze while the module is edited, so that new parts are copies of what their owner made, then ask again."""
        self.thaw()
        try:
            yield
        finally:
            self.freeze()

    def choose_again(self) -> None:
        """Ask the methods anew, between two steps; what is frozen now leaves neither a gradient nor optimizer state behind."""
        optimizers = self._run.trainer.optimizers
        before = [parameter for parameter in self._run.module.parameters() if parameter.requires_grad]
        with self.lifted():
            pass
        self.check()
        for parameter in before:
            if not parameter.requires_grad:
                parameter.grad = None
                for optimizer in optimizers:
                    optimizer.state.pop(parameter, None)

    def check(self) -> None:
        """See that what is to be trained is in an optimizer.

        Raises:
            MisconfigurationException: It is not.
        """
        names = parameter_names(self._run.module)
        for parameter in self._wanted() or ():
            if parameter.requires_grad and owner(self._run.trainer.optimizers, parameter) is None:
                raise MisconfigurationException(
                    f"{names[parameter]} is to be trained, but no optimizer has it. Let configure_optimizers take "
                    "self.parameters(), or those with requires_grad."
                )

        self._check_scaler()

    def _check_scaler(self) -> None:
        """Under a gradient scaler, see that every optimizer has something to train; without a gradient its step fails.

        Raises:
            MisconfigurationException: One has not.
        """
        if not self._frozen or self._run.gradient_scaler is None:
            return
        for place, optimizer in enumerate(self._run.trainer.optimizers):
            if not any(parameter.requires_grad for parameter in trained_by(optimizer)):
                raise MisconfigurationException(
                    f"{self._names()} leave optimizer {place} nothing to train, and the gradient scaler of 16-mixed lets no "
                    "optimizer take a step without gradients. Train with precision='bf16-mixed', or name some of its "
                    "parameters among what is trained, for instance tune=('head',)."
                )

    def thaw(self) -> None:
        """Leave parameters as trainable as they were before the fit."""
        for parameter in self._run.frozen:
            parameter.requires_grad_(True)
        self._run.frozen.clear()
        self._frozen_names.clear()
        self._frozen = False

    def _names(self) -> str:
        return " and ".join(each.name for each in self._methods if type(each).trained is not Contract.trained)

    def _wanted(self) -> set[nn.Parameter] | None:
        """What the methods name, with the maps that are trained along and the parts of methods that name nothing.

        ``None`` when no method has a say.
        """
        module = self._run.module
        said = [(method, names) for method in self._methods if (names := method.trained(module)) is not None]
        if not said:
            return None
        wanted = {parameter for method, names in said for parameter in _parameters(module, method, names)}
        for mapped in mapped_tensors(module):
            for weight_map in mapped.maps:
                if weight_map.lane != Lane.REPARAM or mapped.stored in wanted:
                    wanted.update(weight_map.parameters())
        silent = {method.name for method in self._methods} - {method.name for method, _ in said}
        for placed in placed_parts(module):
            if placed.part.method in silent:
                wanted.update(placed.part.parameters())
        return wanted


def _parameters(module: nn.Module, method: Contract, names: Iterable[str | nn.Parameter]) -> Iterable[nn.Parameter]:
    known = dict(module.named_parameters(remove_duplicate=False))
    own = set(known.values())
    for name in names:
        found = known.get(name) if isinstance(name, str) else name
        if found is None or found not in own:
            near = ", ".join(difflib.get_close_matches(str(name), known, n=3)) or ", ".join(list(known)[:3])
            what = repr(name) if isinstance(name, str) else f"a parameter of shape {tuple(name.shape)}"
            raise MisconfigurationException(
                f"trained() of {method.name} names {what}, which {type(module).__name__} does not have. Nearest: {near}."
            )
        yield found


_OF_A_MISSING_GRADIENT = ("NoneType", "does not require grad")


@contextlib.contextmanager
def explained(run: Run) -> Iterator[None]:
    """Say in a user's step that needs a gradient of every parameter why some have none.

    Raises:
        MisconfigurationException: The step failed at what is not there, and parameters are frozen for this fit.
    """
    try:
        yield
    except (AttributeError, RuntimeError, TypeError) as error:
        if not run.frozen or not any(words in str(error) for words in _OF_A_MISSING_GRADIENT):
            raise
        raise MisconfigurationException(
            f"{type(run.module).__name__}.training_step failed: {type(error).__name__}: {error}. {len(run.frozen)} parameters "
            "are frozen for this fit, because no method names them as trained, so their gradient is None. A step that handles "
            "gradients itself should pass those by (if parameter.grad is not None), or train them as well."
        ) from error
