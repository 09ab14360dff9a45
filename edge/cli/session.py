"""What the verbs share: the global options, and how they read the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge.config import Config


@dataclass(slots=True)
class Session:
    """The global options of one call of `edge`."""

    config_path: Path | None = None
    debug: bool = False

    def config(self) -> Config:
        """The configuration; ConfigError when it cannot be used."""
        from edge.config import load  # 100 ms with numpy: only for verbs that need it

        return load(self.config_path)

    def logged_config(self) -> Config:
        """The configuration, with logging set up as it says: for verbs that do work here."""
        from edge import log

        config = self.config()
        log.configure("debug" if self.debug else config.log.level)
        return config
