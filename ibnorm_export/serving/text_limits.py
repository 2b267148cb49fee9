"""How much the text endpoint accepts."""

from __future__ import annotations

from dataclasses import KW_ONLY, asdict, dataclass

from ibnorm_export.choices import real_number, whole_number

__all__ = ["TextLimits"]


@dataclass(frozen=True, slots=True)
class TextLimits:
    """Limits of the text endpoint.

    Args:
        concurrency: maximum number of texts at once; further requests get 429 with Retry-After.
        request_bytes: maximum size of a request's body in bytes; a larger one gets 413.
        request_s: maximum seconds for a text; then the request gets 504, or its stream ends with an error.
        waiting: maximum number of texts without a first token; further requests get 429. None means that only
            `concurrency` is a limit. A prompt uses every core, so prompts that arrive together wait for each other:
            the last of n waits for all n.

    Raises:
        IBNormError: a value is outside its range.
    """

    concurrency: int = 16
    request_bytes: int = 1 << 20
    _: KW_ONLY
    request_s: float = 120.0
    waiting: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None:
                shown = f"the text endpoint's limit {name}"
                if name == "request_s":
                    real_number(value, name=shown, above=0.0)
                else:
                    whole_number(value, name=shown, least=1)
