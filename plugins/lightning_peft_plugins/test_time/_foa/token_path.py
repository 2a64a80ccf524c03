"""Where tokens enter the blocks of a vision transformer, and where its class token can be read: found by asking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft import Run
from lightning_peft.capture.evaluation import Call
from lightning_peft.network.block_lists import find_lists, is_equal
from lightning_peft.network.layers import is_conv, is_norm
from lightning_peft_plugins.test_time._shared.classifier import Classifier


class TokenPath:
    """A list of equal blocks from which the class token goes to a norm and the classifier.

    Nothing is told by names. A call shows which list of blocks hands on tokens of shape ``(samples, tokens, width)``, which
    norm each block begins with, which norm follows the last, and that the classifier is given the first of its tokens.

    Args:
        method: Name of the method, for messages.
        run: The run, with its network.
        classifier: The classifier.
        call: A call to ask with.

    Raises:
        MisconfigurationException: The network is none of this kind; says what is missing.

    Attributes:
        width: Width of a token.
        fan_in: Numbers that one patch has in the layer that embeds it, for the scale of first prompts.
    """

    def __init__(self, method: str, run: Run, classifier: Classifier, call: Call) -> None:
        self._method, self._network, self._classifier = method, run.network, classifier
        lists = find_lists(run.network, is_equal)
        if not lists:
            self._refuse("it has no list of equal blocks")
        reasons = []
        for name, blocks in sorted(lists.items(), key=lambda item: -len(item[1].entries)):
            reason = self._ask(blocks.entries, call)
            if not reason:
                return
            reasons.append(f"{name}: {reason}")
        self._refuse("; ".join(reasons))

    def _refuse(self, reason: str) -> None:
        raise MisconfigurationException(
            f"{self._method} puts prompts among the tokens of a vision transformer that classifies by its class token, and "
            f"{type(self._network).__name__} shows no such way: {reason}. Take T3A, LAME or BatchNormAdapt, which need no "
            'gradient either, or name the transformer within: network="<name>".'
        )

    def _ask(self, blocks: Sequence[nn.Module], call: Call) -> str:
        """Look for the way through some blocks; return what is missing."""
        norms = [module for module in self._network.modules() if is_norm(module)]
        convs = [module for module in self._network.modules() if is_conv(module)]
        entered: dict[nn.Module, Any] = {}
        normed: list[tuple[nn.Module, Tensor, Tensor]] = []
        left: list[Any] = []
        embedded: list[nn.Module] = []
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(_removed(block.register_forward_pre_hook(_keep_first(entered))))
            stack.enter_context(_removed(blocks[-1].register_forward_hook(lambda _, args, out: left.append(out))))
            for norm in norms:
                hook = norm.register_forward_hook(lambda norm, args, out: normed.append((norm, args[0], out)))
                stack.enter_context(_removed(hook))
            for conv in convs:
                hook = conv.register_forward_pre_hook(lambda conv, _: None if entered else embedded.append(conv))
                stack.enter_context(_removed(hook))
            with torch.no_grad():
                _, features = self._classifier.run(call)
        tokens = entered.get(blocks[0])
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or len(tokens) != call.size:
            return "its first block is given no tokens (samples, tokens, width)"
        own = [_given(normed, entered.get(block), block) for block in blocks[1:]]
        if None in own:
            return "a block does not begin with a norm"
        out = left[-1][0] if left and isinstance(left[-1], (tuple, list)) else left[-1] if left else None
        last = _given(normed, out, None)
        if last is None:
            return "no norm follows the last block"
        final = next(output for norm, _, output in reversed(normed) if norm is last)
        if final.ndim != 3 or not torch.equal(final[:, 0], features):
            return "the classifier is not given the first token"
        self._entrance, self._norms = blocks[0], [norm for norm in own if norm is not None] + [last]
        self.width = tokens.shape[-1]
        self.fan_in = embedded[-1].get_parameter("weight")[0].numel() if embedded else self.width
        return ""

    def run(self, call: Call, prompts: Tensor | None) -> tuple[Any, Tensor]:
        """Run a call with prompts behind the class token.

        Args:
            call: The call.
            prompts: Shape ``(prompts, width)``; ``None`` for none.

        Returns:
            The output, and the class token after every block, normalised as the next one takes it, shape
            ``(samples, blocks * width)``.
        """
        seen: dict[nn.Module, Tensor] = {}
        with ExitStack() as stack:
            if prompts is not None:
                stack.enter_context(_removed(self._entrance.register_forward_pre_hook(_among_tokens(prompts))))
            for norm in self._norms:
                hook = norm.register_forward_hook(lambda norm, args, out: seen.__setitem__(norm, out[:, 0]))
                stack.enter_context(_removed(hook))
            try:
                output = call()
            except Exception as error:
                if prompts is None:
                    raise
                self._refuse(f"its blocks do not take {len(prompts)} more tokens ({type(error).__name__}: {error})")
        return output, torch.cat([seen[norm] for norm in self._norms], 1)


def _keep_first(into: dict[nn.Module, Any]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        into[module] = args[0] if args else None

    return hook


def _among_tokens(prompts: Tensor) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens = args[0]
        among = prompts.to(tokens.device, tokens.dtype)
        return (torch.cat([tokens[:, :1], among.expand(len(tokens), -1, -1), tokens[:, 1:]], 1), *args[1:])

    return hook


def _given(normed: list[tuple[nn.Module, Tensor, Tensor]], tokens: Any, inside: nn.Module | None) -> nn.Module | None:
    """The norm, within a module, that was given some tokens."""
    if not isinstance(tokens, Tensor):
        return None
    allowed = None if inside is None else {*inside.modules()}
    for norm, given, _ in normed:
        if (allowed is None or norm in allowed) and given.shape == tokens.shape and torch.equal(given, tokens):
            return norm
    return None


@contextmanager
def _removed(hook: Any) -> Iterator[None]:
    try:
        yield
    finally:
        hook.remove()
