"""The static verdict: what the file states, node by node and weight by weight, against the checkpoint."""

from __future__ import annotations

from ibnorm_export.artifacts.exported_model import ExportedModel
from ibnorm_export.artifacts.loaded_model import LoadedModel
from ibnorm_export.op.torch_op import IBNorm
from ibnorm_export.verifier.coverage import Coverage
from ibnorm_export.verifier.report import StaticReport
from ibnorm_export.verifier.static_functions import check_functions
from ibnorm_export.verifier.static_norms import check_norms
from ibnorm_export.verifier.static_weights import compare_weights

__all__ = ["check_static"]


def check_static(exported: ExportedModel, model: LoadedModel, *, coverage: Coverage) -> StaticReport:
    """Compare norm nodes, function bodies and weights with those of the checkpoint.

    Args:
        exported: the file.
        model: the checkpoint.
        coverage: what takes part in the checkpoint's output; the rest need not be in the file.
    """
    weights = compare_weights(exported, model, coverage=coverage)
    if exported.metadata.inlined:
        note = (
            "the norms are inlined, so their nodes cannot be told from others: weights were compared; lambda and "
            "epsilon are covered only by the numeric verdict"
        )
        norms = sum(isinstance(module, IBNorm) for module in model.module.modules())
        return StaticReport(norms, weights.compared, weights.findings, (note, *weights.notes))
    findings = (*check_norms(exported, model, coverage=coverage), *check_functions(exported), *weights.findings)
    return StaticReport(len(exported.norms), weights.compared, findings, weights.notes)
