"""Write docs/reference/findings.md, the page of all findings, from their registry."""

from __future__ import annotations

from pathlib import Path

from ibnorm_export.findings.explanation import EXPLANATIONS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "findings.md"

_HEAD = """# Findings

Every finding of `verify`, `check`, `compare`, `evaluate`, `inspect` and `doctor` has a code that never changes its
meaning. `ibnorm-export explain IBN103` prints what is written here, and so does `ibnorm_export.explain("IBN103")` in
Python. This page is written by `python scripts/write_findings_page.py`.

| code | finding |
|---|---|
"""


def page() -> str:
    """Return the page: a table of all findings, and a section for each."""
    table = "".join(f"| [{x.code}](#{x.code.lower()}) | {x.title} |\n" for x in EXPLANATIONS.values())
    sections = "".join(
        f"\n## {x.code}\n\n**{x.title}.** {x.meaning}\n\n*Why it matters:* {x.importance}\n\n"
        f"*What to do:* {x.remedy}\n\n*Example:* `{x.example.replace('`', '')}`\n"
        for x in EXPLANATIONS.values()
    )
    return _HEAD + table + sections


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
