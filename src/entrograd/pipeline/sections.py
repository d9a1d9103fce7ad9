"""The whole of params.yaml."""

from __future__ import annotations

from entrograd.annotate.params import AnnotateParams
from entrograd.data.params import PrepareParams
from entrograd.evaluate.params import EvaluateParams, ScoreParams
from entrograd.methods.params import MethodParams
from entrograd.models.params import BaseModelParams
from entrograd.report.params import ReportParams
from entrograd.rollout.params import RolloutParams
from entrograd.train.params import TrainOfflineParams, TrainOnlineParams, TrainOnlineStage


class Params(TrainOnlineStage):
    """Every section: what stage report and `entrograd check` read."""

    base_model: BaseModelParams
    prepare: PrepareParams
    rollout: RolloutParams
    annotate: AnnotateParams
    method: MethodParams
    train_offline: TrainOfflineParams
    train_online: TrainOnlineParams
    evaluate: EvaluateParams
    score: ScoreParams
    report: ReportParams
