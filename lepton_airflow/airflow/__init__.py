"""What does Airflow tell us of a run?"""
