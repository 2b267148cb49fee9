"""Hooks of MkDocs: what is written from the code and from records is added when the site is built."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from ibnorm_export.json_document import json_schema, schema_names
from scripts.reference_pages import PAGES
from scripts.site_pictures import PLOTS

__all__ = ["on_files"]

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Any, *, config: Any) -> Any:
    """Add the generated pages and plots to those of docs/."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for path, write in PAGES.items():
        files.append(File.generated(config, path, content=write()))
    for name, draw in PLOTS.items():
        for dark in (False, True):
            path = f"assets/{name}-{'dark' if dark else 'light'}.svg"
            files.append(File.generated(config, path, content=draw(pyplot, dark=dark)))
    for command in schema_names():
        text = json.dumps(json_schema(command), indent=1) + "\n"
        files.append(File.generated(config, f"reference/schemas/{command}.schema.json", content=text))
    files.append(File.generated(config, "development/benchmarks.md", content=_benchmarks()))
    return files


def _benchmarks() -> str:
    """benchmarks/README.md as a page: its links to pages are moved, and those to other files become names."""
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(\.\./docs/([^)]+)\)", r"](../\1)", text)
    return re.sub(r"\[([^\]]+)\]\((?!\.\./|https?://|#)([^)]+)\)", r"`benchmarks/\2`", text)
