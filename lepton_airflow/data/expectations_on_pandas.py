"""Great Expectations on pandas, with the meaning that SQL gives to a row_condition.

Import it only where ``great_expectations`` is installed.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import pandas as pd
from great_expectations.execution_engine import PandasExecutionEngine
from great_expectations.expectations.row_conditions import (
    AndCondition,
    Condition,
    NullityCondition,
    OrCondition,
    PassThroughCondition,
    deserialize_row_condition,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from great_expectations.expectations.row_conditions import ComparisonCondition

_EXACT_IN_FLOAT = 2**53  # whole numbers below it are
_COMPARE = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def frame_of(table: pa.Table) -> pd.DataFrame:
    """The rows as a frame.

    Whole numbers keep their digits where some are missing and floats would round them. Decimals are floats, as the numbers of a suite
    are, unless these would round them: to Python, 0.3 is not ``Decimal("0.3")``.
    """
    import pyarrow as pa

    frame = table.to_pandas()
    for name, column in zip(table.column_names, table.columns, strict=True):
        if (
            pa.types.is_integer(column.type)
            and frame[name].dtype == float
            and frame[name].abs().max() >= _EXACT_IN_FLOAT
        ):
            frame[name] = column.to_pandas(integer_object_nulls=True)
        if pa.types.is_decimal(column.type):
            largest = max((abs(value) for value in frame[name].dropna()), default=0)
            if largest * 10**column.type.scale < _EXACT_IN_FLOAT:
                frame[name] = frame[name].astype(float)
    return frame


class PandasEngine(PandasExecutionEngine):
    """Computes metrics over a frame.

    The original writes a row_condition as a text for ``DataFrame.query``, in which a date is no date, and keeps rows of missing
    values where the condition is ``!=``.
    """

    def _apply_row_condition_filter(
        self, data: pd.DataFrame, row_condition: Any, domain_kwargs: dict[str, Any]
    ) -> pd.DataFrame:
        condition = deserialize_row_condition(row_condition)
        if not isinstance(condition, Condition) or isinstance(condition, PassThroughCondition):
            return super()._apply_row_condition_filter(data, row_condition, domain_kwargs)
        return data[_meets(data, condition)]


def _meets(data: pd.DataFrame, condition: Condition) -> pd.Series[bool]:
    """Which rows meet a condition; a comparison with a missing value is not met."""
    if isinstance(condition, (AndCondition, OrCondition)):
        parts = [_meets(data, one) for one in condition.conditions]
        joined = parts[0]
        for part in parts[1:]:
            joined = joined & part if isinstance(condition, AndCondition) else joined | part
        return joined
    name = condition.column.name
    if name not in data:
        raise KeyError(f'The column "{name}" in BatchData does not exist')
    if isinstance(condition, NullityCondition):
        return data[name].isna() if condition.is_null else data[name].notna()
    return _compares(data[name], condition)


def _compares(column: pd.Series[Any], condition: ComparisonCondition) -> pd.Series[bool]:
    sign, value = str(condition.operator), condition.parameter
    present = column.dropna()
    if sign in ("IN", "NOT_IN"):
        met = present.isin(list(value)) == (sign == "IN")
    else:
        met = _COMPARE[sign](present, value)
    return met.astype(bool).reindex(column.index, fill_value=False)
