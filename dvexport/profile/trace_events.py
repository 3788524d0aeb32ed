"""A profile in the Chrome trace event format, for chrome://tracing and Perfetto.

Two processes: the clip (one event a frame, counters of executed GMACs and active tiles) and one step
(one track a gate, a span for the gate with its nodes inside, and a track for the rest).
"""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

from dvexport.files import atomic_write
from dvexport.profile.result import NodeTime, ProfileResult

__all__ = ["trace_events", "write_trace"]

CLIP, STEP = 1, 2
OUTSIDE = "outside the gates"

Event = dict[str, Any]


def trace_events(result: ProfileResult) -> list[Event]:
    """Return the trace events of `result`; times in microseconds, events of a track nest."""
    return [*_clip_events(result), *_step_events(result)]


def write_trace(result: ProfileResult, path: str | Path) -> None:
    """Write the trace as JSON."""
    trace = {
        "traceEvents": trace_events(result),
        "displayTimeUnit": "ms",
        "otherData": {"model": result.model, "target": result.target, "device": result.device.cpu},
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(trace) + "\n", encoding="utf-8")


def _name(kind: str, name: str, process: int, track: int = 0) -> Event:
    return {"ph": "M", "name": f"{kind}_name", "pid": process, "tid": track, "args": {"name": name}}


def _span(name: str, start: float, duration: float, process: int, track: int, **args: Any) -> Event:
    return {
        "ph": "X",
        "name": name,
        "ts": start,
        "dur": duration,
        "pid": process,
        "tid": track,
        "args": args,
    }


def _clip_events(result: ProfileResult) -> list[Event]:
    """One span a frame, laid end to end, and the counters at its begin."""
    events = [_name("process", f"clip {result.clip.name}", CLIP), _name("thread", "frames", CLIP)]
    starts = accumulate((step.latency_ms * 1e3 for step in result.steps), initial=0.0)
    for step, start in zip(result.steps, starts, strict=False):
        executed = step.executed_macs / 1e9
        args = {"executed GMACs": executed, "dense GMACs": step.dense_macs / 1e9, "prediction": step.label}
        events.append(_span(f"frame {step.frame}", start, step.latency_ms * 1e3, CLIP, 0, **args))
        counters = {"executed GMACs": executed}
        if step.gates:
            counters["active tiles"] = sum(gate.tiles_active for gate in step.gates.values())
        events += [
            {"ph": "C", "name": name, "ts": start, "pid": CLIP, "tid": 0, "args": {name: value}}
            for name, value in counters.items()
        ]
    return events


def _step_events(result: ProfileResult) -> list[Event]:
    tracks: dict[str, list[NodeTime]] = {}
    for node in result.timeline:
        tracks.setdefault(node.gate or OUTSIDE, []).append(node)
    events = [_name("process", "one step", STEP)] if tracks else []
    lowering = {gate.gate: gate.lowering for gate in result.gates}
    for track, (gate, nodes) in enumerate(tracks.items(), start=1):
        events.append(_name("thread", gate, STEP, track))
        spans = _nested(nodes, track)
        if gate != OUTSIDE:
            begin = spans[0]["ts"]
            end = max(span["ts"] + span["dur"] for span in spans)
            events.append(_span(gate, begin, end - begin, STEP, track, lowering=lowering.get(gate)))
        events += spans
    return events


def _nested(nodes: list[NodeTime], track: int) -> list[Event]:
    """Return the spans of one track, each inside or after the one before.

    Runtimes round begins and durations, and medians may stand in for durations; viewers drop or
    misplace events that half overlap. A leaf ends where the next node begins; a control node
    encloses its branch, whose nodes end no later than it does.
    """
    spans: list[Event] = []
    ends: list[float] = []
    for index, node in enumerate(nodes):
        start, end = node.start_us, node.start_us + node.timeline_us
        if node.role != "control" and index + 1 < len(nodes):
            end = min(end, nodes[index + 1].start_us)
        while ends and ends[-1] <= start:
            ends.pop()
        if ends:
            end = min(end, ends[-1])
        if node.role == "control":
            ends.append(end)
        spans.append(_span(node.node, start, end - start, STEP, track, op=node.op, median_us=node.median_us))
    return spans
