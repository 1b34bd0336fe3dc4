"""What Airflow tells us of a run."""
