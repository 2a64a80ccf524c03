"""The report on two networks: what one costs less than the other, layer by layer, and whether the clock agrees."""

from __future__ import annotations

from functools import partial

import torch

from lightning_peft.measure.clock import Latency
from lightning_peft.measure.figures import Comparison, Figures
from lightning_peft.report import deployment_plots
from lightning_peft.report import plots as report_plots
from lightning_peft.report.contents import Cell, Fact, Figure, Section, Table, number
from lightning_peft.report.deployment_layers import layers_section
from lightning_peft.report.report import Report
from lightning_peft.report.trial import flop_text

_SAME = 0.01  # ratios this near to one count as equal


def deployment_report(found: Comparison, made_by: str = "") -> Report:
    """Return the report of a comparison; ``save`` it."""
    before, after = found.names
    sections = [_overview(found), _speed(found), layers_section(found)]
    if found.quality is not None:
        sections.append(_quality(found))
    sections.append(_method(found))
    return Report(
        f"Deployment: {after} against {before}",
        f"Measured in one run on {found.after.device}, PyTorch {torch.__version__}.",
        _facts(found),
        tuple(sections),
        found.as_data(),
        made_by,
    )


def _facts(found: Comparison) -> tuple[Fact, ...]:
    one, other = found.before, found.after
    size, speedup = next(iter(found.achieved().items()))
    first, second = one.latencies[0], other.latencies[0]
    name = found.names[0]
    facts = [
        Fact("parameters", number(other.parameters), f"{name} {number(one.parameters)}"),
        Fact("non-zero", f"{100 * other.nonzero / max(other.parameters, 1):.1f} %", f"{number(other.nonzero)} parameters"),
        Fact("FLOPs a sample", _flops(other), f"{name} {_flops(one)}", _better(found.predicted)),
        Fact(
            f"latency, batch {size}",
            _milliseconds(second.median),
            f"{name} {_milliseconds(first.median)}: {_faster(speedup)}",
            _apart(first, second),
        ),
    ]
    if found.quality is not None:
        was, now = found.quality
        facts += [
            Fact("accuracy", f"{100 * now.accuracy:.1f} %", f"{name} {100 * was.accuracy:.1f} %"),
            Fact("calibration error", f"{100 * now.ece:.1f} %", f"{name} {100 * was.ece:.1f} %"),
        ]
    return tuple(facts)


def _overview(found: Comparison) -> Section:
    one, other = found.before, found.after
    rows: list[tuple[Cell, ...]] = [
        ("parameters", one.parameters, other.parameters, _ratio(one.parameters, other.parameters)),
        ("non-zero parameters", one.nonzero, other.nonzero, _ratio(one.nonzero, other.nonzero)),
        ("FLOPs a sample", _flops(one), _flops(other), _ratio(one.flops_spread.mean, other.flops_spread.mean)),
    ]
    if any(figures.flops_spread.low < figures.flops_spread.high for figures in (one, other)):
        rows.append((f"lowest and highest of {len(one.flops)} samples", _range(one), _range(other), ""))
    for first, second in zip(one.latencies, other.latencies, strict=True):
        rows.append(
            (f"latency, batch {first.batch_size}", _times_of(first), _times_of(second), _ratio(first.median, second.median))
        )
    rows += [
        ("weights in memory", _size(one.weight_bytes), _size(other.weight_bytes), _ratio(one.weight_bytes, other.weight_bytes)),
        (
            f"peak activations, batch {one.batch_size}",
            _size(one.activation_bytes),
            _size(other.activation_bytes),
            _ratio(one.activation_bytes, other.activation_bytes),
        ),
        ("file", _size(one.file_bytes), _size(other.file_bytes), _ratio(one.file_bytes, other.file_bytes)),
    ]
    if found.quality is not None:
        was, now = found.quality
        rows += [
            ("accuracy", f"{100 * was.accuracy:.2f} %", f"{100 * now.accuracy:.2f} %", _points(was.accuracy, now.accuracy)),
            ("expected calibration error", f"{100 * was.ece:.2f} %", f"{100 * now.ece:.2f} %", _points(was.ece, now.ece)),
        ]
    caption = "Latency is the median, with the quartiles in brackets. The last column is before divided by after."
    return Section("Before and after", (), (Table(("", *found.names, "change"), tuple(rows), caption),))


def _speed(found: Comparison) -> Section:
    text = [_verdict(found)]
    if found.after.nonzero < 0.99 * found.after.parameters:
        text.append(
            "Zeros are stored and multiplied like other values by the dense kernels used here, so a mask alone changes "
            "neither FLOPs nor time. To turn zeros into speed, remove whole units or use kernels for the pattern (2:4 on "
            "CUDA: `lightning_peft.semi_structured`)."
        )
    rows = []
    for (size, speedup), first, second in zip(
        found.achieved().items(), found.before.latencies, found.after.latencies, strict=True
    ):
        rows.append(
            (
                size,
                f"{found.predicted:.2f} x",
                f"{speedup:.2f} x",
                f"{100 * speedup / found.predicted:.0f} %",
                "no" if _apart(first, second) is None else "yes",
            )
        )
    heads = ("batch", "by FLOPs", "by the clock", "achieved", "quartiles apart")
    panels = {
        f"batch {first.batch_size}": dict(zip(found.names, (first, second), strict=True))
        for first, second in list(zip(found.before.latencies, found.after.latencies, strict=True))[:4]
    }
    figure = Figure(
        "latency",
        f"Every one of {found.runs} calls; the box is from quartile to quartile, the bar the median.",
        partial(deployment_plots.latencies, panels),
    )
    caption = f"How many times as fast as {found.names[0]}. Achieved is the second as a share of the first."
    return Section("Predicted and achieved", tuple(text), (Table(heads, tuple(rows), caption),), (figure,))


def _verdict(found: Comparison) -> str:
    size, speedup = next(iter(found.achieved().items()))
    apart = _apart(found.before.latencies[0], found.after.latencies[0])
    clock = f"by the clock it is {_faster(speedup)}" + (", within the spread of the calls" if apart is None else "")
    after, before = reversed(found.names)
    if abs(found.predicted - 1) < _SAME:
        return f"{after} needs as many FLOPs as {before}, so no difference is predicted; at batch size {size} {clock}."
    return f"By FLOPs {after} should be {_faster(found.predicted)} as {before}; at batch size {size} {clock}."


def _quality(found: Comparison) -> Section:
    assert found.quality is not None
    was, now = found.quality
    same = sum(a == b for a, b in zip(was.predictions, now.predictions, strict=True))
    text = (
        f"{was.samples:,} labelled samples; both networks give the same class to {100 * same / was.samples:.1f} % of them.",
        "Samples in 15 bins by confidence. On the dashed line the network is right as often as it claims; below it, it is "
        "overconfident (Guo et al., ICML 2017).",
    )
    models = dict(zip(found.names, (was.bins, now.bins), strict=True))
    figure = Figure("reliability", "Reliability of both networks.", partial(report_plots.reliability, models))
    return Section("Accuracy and calibration", text, (), (figure,))


def _method(found: Comparison) -> Section:
    cuda = not found.after.device.startswith("cpu")
    memory = (
        "what PyTorch's allocator gave out during a call beyond what was there before"
        if cuda
        else "the tensors alive at once during a call, inputs and weights left out, workspace inside kernels not seen"
    )
    text = [
        f"Both networks ran in evaluation mode without gradients, {found.warm_up} calls of each to warm up, then {found.runs} "
        "timed calls of each in turn, the first of every round changing. FLOPs are counted while real inputs run: matrix "
        "products, convolutions, attention and recurrent layers, a multiplication and an addition as two; elementwise work is "
        f"left out, what a gate skips is not counted. Peak activations are {memory}. The file is the state dict as "
        "`torch.save` writes it."
    ]
    if unknown := sorted({*found.before.unknown, *found.after.unknown}):
        text.append(f"Not counted, because their formula failed: {', '.join(unknown)}.")
    return Section("How it was measured", tuple(text))


def _flops(figures: Figures) -> str:
    return flop_text(figures.flops_spread.mean) or "none counted"


def _range(figures: Figures) -> str:
    spread = figures.flops_spread
    return f"{flop_text(spread.low) or '0'} to {flop_text(spread.high) or '0'}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _times_of(latency: Latency) -> str:
    low, high = latency.quartiles
    return f"{1e3 * latency.median:.3g} ms ({1e3 * low:.3g} to {1e3 * high:.3g})"


def _faster(ratio: float) -> str:
    return "as fast" if abs(ratio - 1) < _SAME else f"{ratio:.2f} times as fast"


def _ratio(before: float, after: float) -> str:
    return f"{before / after:.2f} x" if after else ""


def _points(before: float, after: float) -> str:
    return f"{100 * (after - before):+.2f} points"


def _size(size: float) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _better(ratio: float) -> bool | None:
    return None if abs(ratio - 1) < _SAME else ratio > 1


def _apart(one: Latency, other: Latency) -> bool | None:
    """Whether the second is faster, ``None`` when the boxes from quartile to quartile overlap."""
    (low, high), (other_low, other_high) = one.quartiles, other.quartiles
    return True if other_high < low else False if other_low > high else None
