"""What every source of evidence says about itself; goes to /metrics and `edge status`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceStats:
    """Totals of one source since it was made.

    `errors` are inputs or system calls that failed, `dropped` is evidence that was there and was not used (a line too
    long, a full queue, a bogon); both are expected to stay 0. `lag_bytes` is what waits to be read now. `last_event_s`
    is on the clock the source was given, None before the first event. `detail` holds the source's own counters.
    """

    name: str
    events: int
    errors: int
    dropped: int
    lines: int
    bytes: int
    lag_bytes: int = 0
    last_event_s: float | None = None
    detail: Mapping[str, int] = field(default_factory=dict)
