"""Run the whole life of a model inside the Airflow you already have."""

__version__ = "0.1.0"
