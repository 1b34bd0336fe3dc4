"""How good, how sure, better or not, how different? Pure functions on arrays, without I/O.

::

    catalogue.py   which metrics there are            METRICS, metrics_of
    metrics.py     point estimates                    classification_metrics, regression_metrics
    bootstrap.py   intervals for one model            bootstrap_intervals
    paired.py      champion against candidate         paired_test, paired_verdict
    sequential.py  candidate against stable, looked at again and again: Harm, Shift, Units, Share
    distances.py   one sample against another         population_stability_index, stability_test, ...
    clusters.py    which rows are dependent

Importing this package does not import numpy; its functions do when they are called.
"""

from lepton_airflow.statistics.bootstrap import Interval, bootstrap_intervals
from lepton_airflow.statistics.catalogue import METRICS, Metric, metrics_of
from lepton_airflow.statistics.distances import (
    DesignEffect,
    KolmogorovSmirnov,
    StabilityTest,
    design_effect,
    holm,
    jensen_shannon,
    kolmogorov_smirnov,
    kolmogorov_smirnov_binned,
    population_stability_index,
    stability_test,
    wasserstein,
)
from lepton_airflow.statistics.metrics import classification_metrics, regression_metrics
from lepton_airflow.statistics.paired import PairedResult, PairedVerdict, paired_test, paired_verdict

__all__ = [
    "METRICS",
    "DesignEffect",
    "Interval",
    "KolmogorovSmirnov",
    "Metric",
    "PairedResult",
    "PairedVerdict",
    "StabilityTest",
    "bootstrap_intervals",
    "classification_metrics",
    "design_effect",
    "holm",
    "jensen_shannon",
    "kolmogorov_smirnov",
    "kolmogorov_smirnov_binned",
    "metrics_of",
    "paired_test",
    "paired_verdict",
    "population_stability_index",
    "regression_metrics",
    "stability_test",
    "wasserstein",
]
