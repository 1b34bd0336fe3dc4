"""What a stage that changes something outside the store may do in a backfill: the one policy of ``on_backfill``.

==================  ==================================================================================================
``register_only``   the work is done and kept, and nothing that others see moves (the default)
``skip``            nothing is done: the task is skipped
``full``            as in a scheduled run
==================  ==================================================================================================
"""

from __future__ import annotations

from lepton_airflow.errors import Skipped
from lepton_airflow.sdk.stage import RunInfo


def may_act(run: RunInfo, on_backfill: str, otherwise: str) -> bool:
    """Whether this run may change what others see.

    :param otherwise: what does not happen in a backfill that is skipped, as the beginning of a sentence.
    :raises Skipped: this is a backfill, and ``on_backfill`` says ``skip``.
    """
    if run.identity.run_type != "backfill" or on_backfill == "full":
        return True
    if on_backfill == "skip":
        raise Skipped(f"{otherwise}: {reason(on_backfill)}")
    return False


def reason(on_backfill: str) -> str:
    """Why a backfill leaves something as it is, in words."""
    return f"this is a backfill and on_backfill={on_backfill!r}."
