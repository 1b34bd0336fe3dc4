"""How does a server answer with a model? ``python -m lepton_airflow serve ENDPOINT``, by the Open Inference Protocol, version 2.

``protocol.py`` turns a request into tensors and answers into JSON, ``model.py`` loads and checks one version,
``reconcile.py`` follows what the store asks for, ``server.py`` is the process with its routes and metrics.
"""
