"""Threads that run parts of a batch side by side, one core each.

Small batches waste cores: two threads share the operations of one sample badly, where two threads with a sample each do not.
"""

from __future__ import annotations

import copy
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from threading import Barrier
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_peft.capture.evaluation import Call
from lightning_peft.capture.shim import Shim
from lightning_peft.namespaces import both
from lightning_peft.network.batches import tensors_of
from lightning_peft.weights.mapped_layer import is_mapped

T = TypeVar("T")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
TENSORS = ("_parameters", "_buffers")
# A network is looked through for every batch: what cannot hold a module is passed over quickly.
PLAIN = (bool, int, float, str, type(None))
NOT_LOOKED_INTO = frozenset({"_modules", "forward", *TENSORS, *HOOKS})


class Workers:
    """As many threads as torch takes for an operation, each of which takes one.

    The number of threads is a property of a thread, but whoever sets it sets the default of threads to come as well, so the
    caller's is set anew once the workers have theirs.
    """

    def __init__(self) -> None:
        self.count = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="lightning-peft")
        everybody = Barrier(self.count)
        try:
            wait([self._pool.submit(_take_one_core, everybody) for _ in range(self.count)])
        finally:
            torch.set_num_threads(self.count)

    def run(self, work: Callable[..., T], calls: Sequence[Call], *arguments: Sequence[Any]) -> Iterator[T]:
        """Yield what some work makes of each call, in their order, whichever ends first.

        Each worker but one has a network object of its own, which shares the parameters. Gradients are off, and autocast is as
        with the caller, without its cache. When this is left early, calls that did not begin are dropped, the others awaited.

        Args:
            work: What to do with a call, which runs the network when it is called, and its arguments.
            calls: Parts of a batch; :func:`fits` says whether they may run here.
            arguments: Further arguments, one of each for every call.
        """
        networks: SimpleQueue[Callable[..., Any]] = SimpleQueue()
        networks.put(calls[0].forward)
        for _ in range(1, min(self.count, len(calls))):
            networks.put(_on_replica(calls[0].forward))
        autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

        def answer(call: Call, *given: Any) -> T:
            forward = networks.get()
            try:
                with torch.no_grad(), torch.autocast("cpu", autocast[1], autocast[0], cache_enabled=False):
                    return work(replace(call, forward=forward), *given)
            finally:
                networks.put(forward)

        pending = deque(self._pool.submit(answer, *row) for row in zip(calls, *arguments, strict=True))
        try:
            while pending:  # what was yielded is let go
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            wait(pending)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)


def fits(call: Call) -> bool:
    """Whether parts of a call may run side by side: on the CPU, on more than one thread, on faithful replicas of the network.

    Refused are networks in training mode (their random numbers would depend on who comes first), hooks, parametrisations,
    compiled and scripted modules, LightningModules, whose ``forward`` may log, a ``forward`` that somebody replaced, and
    modules that hold other modules where :meth:`torch.nn.Module.named_modules` does not see them. Objects that a module holds
    (a configuration) are shared: a ``forward`` that writes to them, and not to the module, is not seen here.
    """
    network = _network(call.forward)
    if network is None or torch.get_num_threads() == 1:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():  # these do not follow into threads
        return False
    if nn.modules.module._has_any_global_hook():
        return False
    on_cpu = all(t.device.type == "cpu" for t in tensors_of((call.args, call.kwargs)))
    return on_cpu and all(_replicable(m, m is network) for m in network.modules())


def replica(network: nn.Module) -> nn.Module:
    """A network with the same parameters and buffers, but module objects of its own.

    What a forward pass writes to ``self``, or puts into a list, dict or set that hangs there, stays in the replica.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> twin = replica(net)
        >>> twin[0] is net[0], twin[0].weight is net[0].weight
        (False, True)
    """
    twins: dict[nn.Module, nn.Module] = {}
    for module in network.modules():
        twin = twins[module] = module.__new__(type(module))
        twin.__dict__ = {k: copy.copy(v) if type(v) in (list, dict, set) else v for k, v in vars(module).items()}
        if isinstance(twin.__dict__.get("forward"), Shim):  # would run the network it stands in front of
            del twin.__dict__["forward"]
    for twin in twins.values():
        twin._modules = {name: None if child is None else twins[child] for name, child in twin._modules.items()}
    return twins[network]


def _take_one_core(everybody: Barrier) -> None:
    torch.get_num_threads()  # a thread takes over the default when it first asks, and must not do so later
    torch.set_num_threads(1)
    everybody.wait()  # so that no worker takes two turns


def _network(forward: Callable[..., Any]) -> nn.Module | None:
    """The network whose own forward pass is counted here."""
    inner = forward.args[0] if isinstance(forward, partial) and len(forward.args) == 1 else None
    if not isinstance(inner, types.MethodType) or not isinstance(inner.__self__, nn.Module):
        return None
    return inner.__self__ if inner.__func__ is type(inner.__self__).forward else None


def _on_replica(forward: Callable[..., Any]) -> Callable[..., Any]:
    network = _network(forward)
    assert network is not None
    assert isinstance(forward, partial)
    return partial(forward.func, replica(network).forward)


def _replicable(module: nn.Module, root: bool) -> bool:
    own = vars(module)
    return not (
        module.training
        or ("forward" in own and not root)
        or any(own.get(name) for name in HOOKS)
        or own.get("_compiled_call_impl") is not None
        or isinstance(module, (torch.jit.ScriptModule, *both(LightningModule), torch._dynamo.OptimizedModule))
        or is_mapped(module)
        or is_parametrized(module)
        or any(t is not None and t.device.type != "cpu" for kind in TENSORS for t in own[kind].values())
        or any(type(v) not in PLAIN and _holds_module(v) for k, v in own.items() if k not in NOT_LOOKED_INTO)
    )


def _holds_module(value: Any) -> bool:
    if isinstance(value, (nn.Module, Shim)):
        return True
    if isinstance(value, types.MethodType):
        return isinstance(value.__self__, nn.Module)
    if isinstance(value, partial):
        return _holds_module([value.func, *value.args, *value.keywords.values()])
    if isinstance(value, dict):
        return any(_holds_module(v) for v in value.values())
    return isinstance(value, (list, tuple, set)) and any(_holds_module(v) for v in value)
