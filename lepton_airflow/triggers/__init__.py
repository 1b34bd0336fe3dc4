"""What waits without a worker slot, in Airflow's triggerer?"""
