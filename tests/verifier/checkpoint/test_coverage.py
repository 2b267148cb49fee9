"""What one run of a checkpoint uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ibnorm_export import IBNorm, IBNormSpec, models
from ibnorm_export.verifier.checkpoint.coverage import measure_coverage


class _Masked(nn.Module):
    """Asks about a mask, and uses one of the comparisons as data too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = IBNorm(4, IBNormSpec("T", 3.0))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        padding = mask.eq(0)
        if not torch.compiler.is_exporting() and bool(padding.any()) and int(mask.sum()) < 0:
            raise ValueError
        return self.norm(x).masked_fill(padding[..., None], 0.0)


def test_a_question_whose_answer_is_data_counts() -> None:
    examples: dict[str, Any] = {"x": torch.randn(2, 3, 4), "mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    model = models.from_module(_Masked().eval(), examples)
    inputs = {name: tensor.numpy() for name, tensor in examples.items()}
    used = measure_coverage(model, model.in_float64(), inputs=inputs).integer_operators
    assert used["eq"] == 1
    assert used.get("any", 0) == used.get("sum", 0) == 0
