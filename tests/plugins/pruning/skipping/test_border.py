"""Both sides of the border between Python and C, given arguments nobody should give."""

from __future__ import annotations

import random
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft_plugins.pruning._ftwt.skipping import compiled
from lightning_peft_plugins.pruning._ftwt.skipping.native import Geometry, Kernels, Part, kernels

SANITIZERS = "-fsanitize=address,undefined"


def border() -> Kernels:
    found = kernels()
    if found is None:
        pytest.skip("no kernels here")
    return found


def inside(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Values with nothing but what must not be read around them."""
    size = torch.Size(shape).numel()
    around = torch.full((size + 4096,), torch.nan)
    around[2048 : 2048 + size] = torch.randn(size)
    return around[2048 : 2048 + size].view(shape).to(dtype)


def arguments() -> dict[str, Any]:
    """A call that is right."""
    return {
        "inputs": inside((2, 5, 6, 9)).permute(0, 3, 1, 2),
        "weight": inside((3, 3, 12, 20)).permute(3, 2, 0, 1),
        "bias": inside((20,)),
        "geometry": Geometry((3, 3), (1, 2), (1, 0), (1, 1)),
        "columns": Part(8, 9, torch.tensor([0, 1, 3, 4, 6, 8, 10, 11, 0])),
        "rows": Part(4, 6, torch.tensor([2, 5, 11, 19, 0, 0])),
    }


def expected(call: dict[str, Any]) -> Tensor:
    """What PyTorch gives; an error where the call means nothing."""
    geometry, (columns, rows) = call["geometry"], (call["columns"], call["rows"])
    taken = [torch.arange(p.used) if p.positions is None else p.positions[: p.used] for p in (rows, columns)]
    weight, bias = call["weight"][taken[0]][:, taken[1]], None if call["bias"] is None else call["bias"][taken[0]]
    found = F.conv2d(call["inputs"][:, : columns.used], weight, bias, geometry.stride, geometry.padding, geometry.dilation)
    return F.pad(found, (0, 0, 0, 0, 0, rows.width - rows.used))


WILD = [-(2**63), -1, 0, 1, 2, 7, 1000, 2**31, 2**63 - 1, 2**70]


def spoil_number(call: dict[str, Any], draw: random.Random) -> None:
    name = draw.choice(["geometry", "columns", "rows"])
    if name == "geometry":
        pairs = [list(pair) for pair in call["geometry"]]
        pairs[draw.randrange(4)][draw.randrange(2)] = draw.choice(WILD[1:7])
        call["geometry"] = Geometry(*map(tuple, pairs))  # type: ignore[arg-type]
    else:
        call[name] = call[name]._replace(**{draw.choice(["used", "width"]): draw.choice(WILD)})


def spoil_positions(call: dict[str, Any], draw: random.Random) -> None:
    name = draw.choice(["columns", "rows"])
    positions = call[name].positions.clone()
    positions[draw.randrange(len(positions))] = draw.choice(WILD[:-1])
    changes = [positions, positions[:2], positions.int(), positions.float(), positions[None], positions.to("meta"), None]
    call[name] = call[name]._replace(positions=draw.choice([positions, *changes]))


def spoil_tensor(call: dict[str, Any], draw: random.Random) -> None:
    name = draw.choice(["inputs", "weight", "bias"])
    value: Tensor = call[name]
    changes = [value.double(), value.half(), value.bfloat16(), value.int(), value.to("meta"), value[:0], value[:1], value[None]]
    changes += [value[..., :1], value.flatten(), value.contiguous(), value.expand(2, *value.shape), torch._neg_view(value)]
    changes += [value.to_sparse(), value[::2], value.as_subclass(type("Other", (Tensor,), {}))]
    call[name] = draw.choice(changes)


def test_python_calls_with_wrong_arguments() -> None:
    """Each is refused, or computes what it says."""
    found, draw, outcomes = border(), random.Random(0), {"computed": 0, "refused": 0}
    assert found.convolve(**arguments()).isfinite().all()
    for i in range(600):
        call = arguments()
        for _ in range(draw.choice([1, 1, 2])):
            [spoil_number, spoil_positions, spoil_tensor][(i + _) % 3](call, draw) if not _ else spoil_number(call, draw)
        try:
            result = found.convolve(**call)
        except ValueError:
            outcomes["refused"] += 1
            continue
        torch.testing.assert_close(result, expected(call), rtol=1e-4, atol=1e-3)
        outcomes["computed"] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_more_channels_than_the_weight_has_are_refused() -> None:
    found, call = border(), arguments()
    few = {"weight": inside((3, 3, 5, 20)).permute(3, 2, 0, 1), "columns": Part(9, 9)}
    with pytest.raises(ValueError, match="do not fit"):
        found.convolve(**{**call, **few})
    maps, bias = inside((1, 2, 2, 9)).permute(0, 3, 1, 2), inside((20,))
    with pytest.raises(ValueError, match="do not fit"):
        found.choose(maps, Part(9, 9), inside((5, 20)).t(), bias, all_inputs=15, standard=True)
    with pytest.raises(ValueError, match="do not fit"):  # nor can fewer count in the scale than there are
        found.choose(maps, Part(9, 9), inside((12, 20)).t(), bias, all_inputs=11, standard=True)


@pytest.mark.parametrize("name", ["columns", "rows"])
def test_channels_that_are_named_twice_are_refused(name: str) -> None:
    twice = Part(3, 3, torch.tensor([1, 4, 4]))
    call = arguments() | {name: twice, "inputs": inside((2, 5, 6, 9 if name == "rows" else 3)).permute(0, 3, 1, 2)}
    assert border().convolve(**{**call, name: twice._replace(positions=torch.tensor([1, 4, 5]))}).isfinite().all()
    with pytest.raises(ValueError, match="do not fit"):
        border().convolve(**call)


def test_memory_that_was_given_back_is_not_read() -> None:
    call, gone = arguments(), torch.ones(20)
    gone.untyped_storage().resize_(0)  # as FSDP does; PyTorch itself cannot even print it
    with pytest.raises(ValueError, match="was given back"):
        border().convolve(**{**call, "bias": gone})


def test_python_asks_for_a_choice_with_wrong_arguments() -> None:
    found, draw, outcomes = border(), random.Random(0), {"computed": 0, "refused": 0}
    right: dict[str, Any] = {
        "inputs": inside((1, 5, 6, 9)).permute(0, 3, 1, 2),
        "columns": Part(8, 9, torch.tensor([0, 1, 3, 4, 6, 8, 10, 11, 0])),
        "weight": inside((12, 20)).t(),
        "bias": inside((20,)),
        "all_inputs": 15,
        "standard": True,
    }
    for i in range(400):
        call = dict(right)
        if i % 4 == 0:
            call["columns"] = call["columns"]._replace(used=draw.choice(WILD))
        elif i % 4 == 1:
            both = {"columns": call["columns"], "rows": call["columns"]}
            spoil_positions(both, draw)
            call["columns"] = both[draw.choice(["columns", "rows"])]
            call["all_inputs"] = draw.choice([15, *WILD])
        elif i % 4 == 2:
            spoil_tensor(call, draw)
        else:
            call["standard"] = not call["standard"]
        try:
            active, logits = found.choose(**call)
        except ValueError:
            outcomes["refused"] += 1
            continue
        assert logits.isfinite().all()
        assert active.tolist() == (logits[0] > 0).nonzero().flatten().tolist() or len(active) == 1
        outcomes["computed"] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_c_under_sanitizers(tmp_path: Path) -> None:
    """Right calls in buffers of exactly their size beside sums in double precision; then each of them spoilt."""
    command = compiled.compiler()
    options = [SANITIZERS, "-fno-sanitize-recover=all", "-O1", "-g"]
    if (
        not command
        or subprocess.run(
            [*command, *options, "-x", "c", "-", "-o", "a.out"],
            cwd=tmp_path,
            input="int main(void){}",
            text=True,
            capture_output=True,
            check=False,
        ).returncode
    ):
        pytest.skip("no C compiler with sanitizers is here")
    processor = compiled._PROCESSOR.get(torch.backends.cpu.get_cpu_capability(), ())
    source, folder = Path(__file__).with_name("fuzz_kernels.c"), str(compiled.SOURCE.parent)
    build = [
        *command,
        *options,
        *processor,
        "-I",
        folder,
        str(source),
        "-o",
        str(tmp_path / "fuzz"),
        "-lm",
        "-Wno-unknown-pragmas",
    ]
    subprocess.run(build, check=True, capture_output=True)
    for seed in ("1", "2"):
        done = subprocess.run([str(tmp_path / "fuzz"), "400", seed], capture_output=True, text=True, check=False)
        assert done.returncode == 0, shlex.join(build) + done.stdout + done.stderr
