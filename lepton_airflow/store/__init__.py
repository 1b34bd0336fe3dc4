"""How do bytes stay exact, and exist once?"""

from lepton_airflow.store.files import Store

__all__ = ["Store"]
