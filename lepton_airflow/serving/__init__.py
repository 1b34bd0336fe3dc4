"""How does a server answer with a model? ``python -m lepton_airflow serve ENDPOINT``, by the Open Inference Protocol, version 2.

``supervisor.py`` is the process that follows the store (``reconcile.py``) and keeps the workers, ``worker.py`` answers requests:
``http.py`` reads them, ``protocol.py`` turns them into tensors and answers into bytes, ``model.py`` loads and checks one version,
``counters.py`` counts.
"""
