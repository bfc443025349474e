"""Figures of merit: pure functions of recorded results, never of a model.

Attack side, of `fooled_at` (N,): `counts`. User side, of probabilities (N, K), which `probabilities` makes from scores
of a declared kind, and labels (N,): `usefulness` gives all of them. Everything is float64.
"""

from queryfoil.metrics.calibration import Reliability as Reliability
from queryfoil.metrics.calibration import adaptive_ece as adaptive_ece
from queryfoil.metrics.calibration import bin_index as bin_index
from queryfoil.metrics.calibration import binned_gap as binned_gap
from queryfoil.metrics.calibration import classwise_ece as classwise_ece
from queryfoil.metrics.calibration import ece as ece
from queryfoil.metrics.calibration import mce as mce
from queryfoil.metrics.calibration import reliability as reliability
from queryfoil.metrics.counts import NEVER as NEVER
from queryfoil.metrics.counts import accuracy_at as accuracy_at
from queryfoil.metrics.counts import average_queries as average_queries
from queryfoil.metrics.counts import average_queries_of_successes as average_queries_of_successes
from queryfoil.metrics.counts import success_curve as success_curve
from queryfoil.metrics.inputs import Floats as Floats
from queryfoil.metrics.inputs import probabilities as probabilities
from queryfoil.metrics.intervals import Interval as Interval
from queryfoil.metrics.intervals import bootstrap as bootstrap
from queryfoil.metrics.intervals import corrected as corrected
from queryfoil.metrics.intervals import ece_difference as ece_difference
from queryfoil.metrics.intervals import ece_interval as ece_interval
from queryfoil.metrics.intervals import percentiles as percentiles
from queryfoil.metrics.intervals import wilson as wilson
from queryfoil.metrics.scoring import brier as brier
from queryfoil.metrics.scoring import nll as nll
