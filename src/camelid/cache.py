"""Where camelid keeps what it can make again."""

import os
from pathlib import Path

from camelid.inputs import expand_home


def cache_folder() -> Path:
    """CAMELID_CACHE, or camelid's folder in the user's cache folder."""
    chosen = os.environ.get("CAMELID_CACHE")
    return Path(expand_home(chosen or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "camelid"))
