"""What a trial of a method says: it works, it is rejected in words, or it breaks."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_peft.compose.loss import NonFiniteLossError

WORKS, REJECTED, BREAKS = "works", "rejected", "breaks"
SIGNS = {WORKS: "+", REJECTED: "-", BREAKS: "!"}


@dataclass(frozen=True)
class Verdict:
    """An outcome.

    Attributes:
        what: :data:`WORKS`, :data:`REJECTED` or :data:`BREAKS`.
        words: The message of what was raised, or what was said beside working.
    """

    what: str
    words: str = ""


class WrongError(AssertionError):
    """A promise that was checked by numbers and does not hold."""


def verdict(trial: Callable[[], str | None]) -> Verdict:
    """Run a trial.

    Args:
        trial: Raises :class:`WrongError` where a promise does not hold; may return what is to be said beside working.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Verdict(WORKS, trial() or "")
    except MisconfigurationException as error:
        ours = any("lightning_peft" in frame.filename for frame in traceback.extract_tb(error.__traceback__)[-2:])
        return Verdict(REJECTED if ours else BREAKS, str(error))
    except (
        NonFiniteLossError
    ) as error:  # networks in which half of the weights are no answer: said in words, nothing was changed
        return Verdict(REJECTED, str(error))
    except WrongError as error:
        return Verdict(BREAKS, str(error))
    except Exception as error:
        return Verdict(BREAKS, f"{type(error).__name__}: {error}")


def shortened(words: str, length: int = 120) -> str:
    """The first line of a message, for a cell of a table."""
    first = words.split("\n")[0]
    return (first if len(first) <= length else f"{first[: length - 3]}...").replace("|", r"\|")


def general(words: str) -> str:
    """The first clause of a message, without the names and numbers of one network, so that equal reasons are equal.

    Example:
        >>> general("LlamaForCausalLM has 4 blocks in 'model.layers'. Name others.")
        '... has N blocks in ....'
        >>> general("The library does not know how to widen a OPTForCausalLM; it knows VisionTransformer, LlamaPreTrai")
        'The library does not know how to widen a ...'
    """
    words = re.sub(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]", "...", words.split("\n")[0])
    words = re.sub(r"\b[A-Za-z_]\w*(\.\w+)+\b|\b\w*[a-z0-9][A-Z]\w*\b|\b[A-Z]{2,}[a-z]\w*\b", "...", words)
    words = re.split(r"; | \(|, so |(?<=[a-z.])\. (?=[A-Z])", re.sub(r"\b\d+(\.\d+)?\b", "N", words), maxsplit=1)[0]
    return words.strip()
