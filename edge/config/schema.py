"""The whole configuration as one tree of structs; a section is written where its module is, or in edge.parameters."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from edge.core.plan import PlanParams
from edge.core.step import CoreParams
from edge.parameters import (
    Challenge,
    Control,
    Evidence,
    Exempt,
    Heartbeat,
    Interfaces,
    Journal,
    Limits,
    Log,
    Metrics,
    Nftables,
    Paths,
    Protect,
    Section,
    Services,
    Strict,
    Tables,
)


class Config(Section, frozen=True):
    """edge-throttler: /etc/edge/edge.toml. Every key has a default; `edge check-config` says what is wrong."""

    mode: Annotated[
        Literal["observe", "enforce"],
        Meta(
            description="observe: judge and count, refuse nothing. enforce: refuse. Watch the metrics for a week first."
        ),
    ] = "observe"
    tick_s: Annotated[
        float,
        Meta(ge=0.1, le=60, description="Seconds between two rounds of reading counters and evidence and deciding."),
    ] = 1.0
    interfaces: Interfaces = Interfaces()
    services: Services = Services()
    protect: Protect = Protect()
    limits: Limits = Limits()
    heartbeat: Heartbeat = Heartbeat()
    exempt: Exempt = Exempt()
    strict: Strict = Strict()
    challenge: Challenge = Challenge()
    evidence: Evidence = Evidence()
    core: CoreParams = CoreParams()
    plan: PlanParams = PlanParams()
    nftables: Nftables = Nftables()
    metrics: Metrics = Metrics()
    control: Control = Control()
    paths: Paths = Paths()
    tables: Tables = Tables()
    journal: Journal = Journal()
    log: Log = Log()
