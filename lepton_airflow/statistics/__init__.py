"""How good, how sure, better or not, how different: pure functions on arrays, without I/O.

::

    metrics.py     point estimates                    classification_metrics, regression_metrics
    bootstrap.py   intervals for one model            bootstrap_intervals
    paired.py      champion against candidate         paired_test, verdict
    distances.py   one sample against another         population_stability_index, stability_test, ...
    clusters.py    which rows are dependent

Importing this package imports no numpy; its functions do when they are called.
"""

from lepton_airflow.statistics.bootstrap import Interval, bootstrap_intervals
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
from lepton_airflow.statistics.metrics import (
    CLASSIFICATION,
    HIGHER_IS_BETTER,
    REGRESSION,
    classification_metrics,
    regression_metrics,
)
from lepton_airflow.statistics.paired import PairedResult, Verdict, paired_test, verdict

__all__ = [
    "CLASSIFICATION",
    "HIGHER_IS_BETTER",
    "REGRESSION",
    "DesignEffect",
    "Interval",
    "KolmogorovSmirnov",
    "PairedResult",
    "StabilityTest",
    "Verdict",
    "bootstrap_intervals",
    "classification_metrics",
    "design_effect",
    "holm",
    "jensen_shannon",
    "kolmogorov_smirnov",
    "kolmogorov_smirnov_binned",
    "paired_test",
    "population_stability_index",
    "regression_metrics",
    "stability_test",
    "verdict",
    "wasserstein",
]
