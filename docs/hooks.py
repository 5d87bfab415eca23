"""MkDocs hook: draw the site's pictures before a build that finds none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def on_pre_build(config: Any) -> None:
    folder = Path(config["docs_dir"]) / "pictures"
    if not folder.exists():
        sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
        from pictures import draw_all

        draw_all(folder)
