"""What `check`, `compare` and `evaluate` can find: title, meaning, importance, remedy and example by code."""

from __future__ import annotations

from typing import Final

from ibnorm_export.findings.code import FindingCode as Code

__all__ = ["TEXTS"]

TEXTS: Final[dict[Code, tuple[str, str, str, str, str]]] = {
    Code.STEP_FAILED: (
        "A step of the check ended in an error",
        "The export, comparison or measurement could not be done.",
        "Nothing is known about this case, so the check fails.",
        "Read the message; run the command of this step alone, for example `ibnorm-export export`.",
        "The checkpoint's folder was renamed.",
    ),
    Code.BACKEND_MISSING: (
        "A backend of the check is not installed",
        "The check names this runtime, and it cannot run on this machine.",
        "Files are not compared there.",
        'Install what the message names, or use backends = ["present"] to leave out what is missing.',
        "pip install 'ibnorm-export[openvino]'",
    ),
    Code.ABOVE_MAX_ERROR: (
        "An output exceeds the limit of your check",
        "The error is within the tolerance of its dtype, and above max_error of check.toml.",
        "You have asked for a smaller error than the dtype allows.",
        "Raise max_error, or export in a dtype with more digits.",
        "relative error 2e-06, max_error 1e-06",
    ),
    Code.NOTHING_COMPARED: (
        "Nothing was compared",
        "The comparison ended without a result for any output.",
        "A check that compares nothing must not pass.",
        "Read the other cases of this export.",
        "Every sample was refused by the runtime.",
    ),
    Code.NOT_RUN: (
        "A part of the check was left out",
        "This case was not run: fast coverage leaves it out, its backend is missing, or an earlier case explains it.",
        "A pass does not cover it.",
        "Run the check with --coverage full, and see the earlier case.",
        "ibnorm-export check --coverage fast",
    ),
    Code.TOO_SLOW: (
        "The time is above its limit",
        "The whole 95% interval of the time, or of the ratio of times, is above the limit.",
        "It is not noise: fewer than one in 40 such verdicts is wrong.",
        "Look for what changed: runtime, threads, kernels. `ibnorm-export bench` shows them.",
        "ratio 1.21 (95% interval 1.18 to 1.25, 60 rounds); budget 1 plus 5%",
    ),
    Code.SPEED_UNDECIDED: (
        "The rounds are too few to tell",
        "The interval of the time contains the limit.",
        "Neither a pass nor a failure is shown.",
        "Measure more rounds (the message states how many), and stop other programs on the machine.",
        "about 120 rounds would decide",
    ),
    Code.CONDITIONS_DIFFER: (
        "The two measurements were made under different conditions",
        "A difference that you allowed, or the version of a package, is not the same in both.",
        "The difference in time may come from it.",
        "Measure both again under the same conditions if you want to compare the files alone.",
        "ibnorm-export compare a.json b.json --allow runtime",
    ),
    Code.ACCURACY_LOST: (
        "The model has lost more accuracy than allowed",
        "On the same samples the model is worse than the reference by more than --max-drop, with the whole interval.",
        "Users get worse answers.",
        "Use another type of weights or a smaller block size; look at the samples that changed.",
        "drop 2.1% (1.6% to 2.6%), limit 0.5%",
    ),
    Code.ACCURACY_UNDECIDED: (
        "The samples are too few to tell",
        "The interval of the difference contains the limit.",
        "Neither a pass nor a failure is shown.",
        "Evaluate more samples: raise --limit, or leave it out.",
        "drop 0.4% (-0.2% to 1.0%), limit 0.5%",
    ),
}
