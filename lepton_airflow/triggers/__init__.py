"""What waits without a worker slot? What runs in Airflow's triggerer."""
