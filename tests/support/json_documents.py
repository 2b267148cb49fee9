"""What a command prints with --json, read and held to the schema that is published for it."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

from ibnorm_export import json_schema

#: The keys of every result.
ALWAYS = {"schema_version", "command", "version", "date", "environment", "files"}


def read_document(text: str, command: str) -> Any:
    """Parse the output of a command, and fail unless it is as its schema says.

    Suites in other environments may lack jsonschema, which `make setup` installs; tests/cli/test_json.py fails
    without it.
    """
    document = json.loads(text)
    if importlib.util.find_spec("jsonschema") is not None:
        import jsonschema

        jsonschema.Draft202012Validator(json_schema(command)).validate(document)
    assert "error" in document or document.keys() >= ALWAYS
    return document
