"""What smaller computation is worth where people serve: against the dense network in ONNX Runtime and compiled by PyTorch.

    python benchmarks/skipping.py --network resnet50 --stages longer FTWT cut --seeds 0 --work skipping
    python benchmarks/runtimes.py --network resnet50 --seeds 0 --work skipping --output docs/evidence/runtimes.json

Times what `skipping.py` trained, batch 1 on the CPU, in float32, with one and with two threads, all in turns: the dense network
(eager with its norms folded and in the faster memory layout, compiled with frozen weights, in ONNX Runtime), what
StructuredPruning left of it (the same three ways), and what FTWT's `deploy` makes of it. Run it when the machine does nothing
else.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from pruning_networks import keep_memory
from skipping import SETTINGS, build, ftwt, paths, samples_of
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

import lightning_peft
from lightning_peft.measure.clock import time_calls, waiter

RIVAL = "dense, ONNX Runtime"


class Session(nn.Module):
    """An ONNX file in ONNX Runtime.

    Args:
        file: The file.
        threads: Threads of one operator.
    """

    def __init__(self, file: Path, threads: int) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads, options.inter_op_num_threads = 3, threads, 1
        # Threads that wait by spinning would take the cores of whose turn is next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def forward(self, images: Tensor) -> Tensor:
        """What the file computes."""
        return torch.from_numpy(self.session.run(None, {self.input: images.numpy()})[0])


def ways(name: str, network: nn.Module, sample: Tensor, work: Path, threads: int) -> dict[str, nn.Module]:
    """A network in three ways to serve it."""
    folded = fuse(network.eval()).to(memory_format=torch.channels_last)
    plain: dict[str, nn.Module] = {f"{name}, eager": folded}
    torch._inductor.config.freezing = True
    torch._dynamo.reset()
    compiled: Any = torch.compile(fuse(network))
    file = lightning_peft.to_onnx(network, work / f"{name}.onnx", (sample,), dynamic_batch=False)
    return plain | {f"{name}, compiled": compiled, f"{name}, ONNX Runtime": Session(file, threads)}


def loaded(network: str, stage: str, path: Path) -> Any:
    """The module that a stage trained."""
    return lightning_peft.load_from_checkpoint(type(build(network, stage)), path).eval()


@torch.no_grad()
def clock(network: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Time everything that was trained with a seed."""
    path = paths(network, seed, args)
    start = path.get("more", path["dense"])
    samples = list(samples_of(network).split(1))
    found: dict[str, Any] = {"network": network, "seed": seed, "accuracy": {}, "threads": {}}
    for stage, file in {"dense": start, **{stage: path[stage] for stage in ("longer", "cut", "FTWT")}}.items():
        if file.exists():
            found["accuracy"][stage] = json.loads(file.with_suffix(".json").read_text())["accuracy"]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        networks = ways("dense", loaded(network, "dense", start).model, samples[0], args.work, threads)
        if path["cut"].exists():
            networks |= ways("cut", loaded(network, "cut", path["cut"]).model, samples[0], args.work, threads)
        if path["FTWT"].exists():
            module = loaded(network, "FTWT", path["FTWT"])
            networks["FTWT, deployed"] = ftwt(network).deploy(module, torch.cat(samples), checkpoint=path["FTWT"]).network
        _agree(networks, samples[0])
        seconds = time_calls(networks, samples, runs=args.runs, warm_up=5, wait=waiter(samples[0].device))
        rival = seconds[RIVAL]
        found["threads"][threads] = {
            name: {
                "ms": 1e3 * statistics.median(taken),
                "against ONNX Runtime": statistics.quantiles([a / b for a, b in zip(rival, taken, strict=True)], n=4),
            }
            for name, taken in seconds.items()
        }
        _show(network, seed, threads, found["threads"][threads])
    return found


def _agree(networks: dict[str, nn.Module], sample: Tensor) -> None:
    for name in ("dense", "cut"):
        answers = [run(sample) for key, run in networks.items() if key.startswith(f"{name},")]
        for answer in answers[1:]:
            torch.testing.assert_close(answer, answers[0], rtol=1e-3, atol=1e-3)


def _show(network: str, seed: int, threads: int, times: dict[str, Any]) -> None:
    print(f"{network}, seed {seed}, {threads} threads")
    for name, each in times.items():
        low, middle, high = each["against ONNX Runtime"]
        print(f"  {name:22} {each['ms']:7.1f} ms  {middle:.2f} ({low:.2f} to {high:.2f}) times as fast as {RIVAL}", flush=True)


def main() -> None:
    """Time all seeds and write the evidence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=list(SETTINGS), default=["resnet50"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--dense-seed", type=int, help="as for skipping.py")
    parser.add_argument("--runs", type=int, default=48)
    parser.add_argument("--work", type=Path, default=Path("skipping"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    keep_memory()
    found = [clock(network, seed, args) for network in args.network for seed in args.seeds]
    if args.output:
        args.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
