"""Folders that belong to the user."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where downloads and unpacked data are kept: $SAGL_CACHE, else $XDG_CACHE_HOME/sagl, else ~/.cache/sagl."""
    if chosen := os.environ.get("SAGL_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sagl"
