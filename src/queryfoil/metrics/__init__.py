"""Figures of merit: pure functions of recorded results, never of a model.

Attack side, of `fooled_at` (N,): `counts`. User side, of probabilities (N, K), which `probabilities` makes from scores
of a declared kind, and labels (N,): all the others, and `usefulness` gives all of them at once. Everything is float64.
"""

from queryfoil.metrics.calibration import Reliability as Reliability
from queryfoil.metrics.calibration import adaptive_ece as adaptive_ece
from queryfoil.metrics.calibration import bin_index as bin_index
from queryfoil.metrics.calibration import binned_gap as binned_gap
from queryfoil.metrics.calibration import classwise_ece as classwise_ece
from queryfoil.metrics.calibration import ece as ece
from queryfoil.metrics.calibration import lead as lead
from queryfoil.metrics.calibration import mce as mce
from queryfoil.metrics.calibration import near_boundary_ece as near_boundary_ece
from queryfoil.metrics.calibration import reliability as reliability
from queryfoil.metrics.calibration import rms_calibration_error as rms_calibration_error
from queryfoil.metrics.counts import NEVER as NEVER
from queryfoil.metrics.counts import accuracy_at as accuracy_at
from queryfoil.metrics.counts import average_queries as average_queries
from queryfoil.metrics.counts import average_queries_of_successes as average_queries_of_successes
from queryfoil.metrics.counts import success_curve as success_curve
from queryfoil.metrics.inputs import Floats as Floats
from queryfoil.metrics.inputs import probabilities as probabilities
from queryfoil.metrics.intervals import Estimate as Estimate
from queryfoil.metrics.intervals import Interval as Interval
from queryfoil.metrics.intervals import bootstrap as bootstrap
from queryfoil.metrics.intervals import corrected as corrected
from queryfoil.metrics.intervals import ece_by_chance as ece_by_chance
from queryfoil.metrics.intervals import ece_difference as ece_difference
from queryfoil.metrics.intervals import ece_interval as ece_interval
from queryfoil.metrics.intervals import percentiles as percentiles
from queryfoil.metrics.intervals import wilson as wilson
from queryfoil.metrics.ranks import kendall as kendall
from queryfoil.metrics.ranks import rank_kept as rank_kept
from queryfoil.metrics.ranks import rank_reversed as rank_reversed
from queryfoil.metrics.ranks import spearman as spearman
from queryfoil.metrics.scoring import brier as brier
from queryfoil.metrics.scoring import nll as nll
from queryfoil.metrics.scoring import top_label_brier as top_label_brier
from queryfoil.metrics.selective import RiskCoverage as RiskCoverage
from queryfoil.metrics.selective import aupr_of_errors as aupr_of_errors
from queryfoil.metrics.selective import aurc as aurc
from queryfoil.metrics.selective import auroc as auroc
from queryfoil.metrics.selective import confidence_levels as confidence_levels
from queryfoil.metrics.selective import e_aurc as e_aurc
from queryfoil.metrics.selective import fpr_at_95_tpr as fpr_at_95_tpr
from queryfoil.metrics.selective import risk_at as risk_at
from queryfoil.metrics.selective import risk_coverage as risk_coverage
from queryfoil.metrics.selective import tied_share as tied_share
from queryfoil.metrics.usefulness import usefulness as usefulness
