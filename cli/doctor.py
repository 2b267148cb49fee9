"""`ibnorm-export doctor`."""

from __future__ import annotations

from ibnorm_export.cli import options
from ibnorm_export.cli.console import finish, show_progress
from ibnorm_export.errors import ExitCode


def doctor_command(as_json: options.AsJson = False) -> None:
    """Report what works on this machine, what does not, and what to install.

    Example: ibnorm-export doctor
    """
    from ibnorm_export.doctor import diagnose

    with show_progress() as progress:
        diagnosis = diagnose(progress=progress)
    has_demo = any(check.name == "demo" and check.works for check in diagnosis.checks)
    then = ["demo"] if has_demo else ["export", "CHECKPOINT", "-o", "MODEL.onnx"]
    finish(diagnosis, "doctor", as_json=as_json, then=then, failure=ExitCode.UNAVAILABLE)
