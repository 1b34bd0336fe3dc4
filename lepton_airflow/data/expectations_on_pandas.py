"""Great Expectations on pandas, with the meaning that SQL gives to a row_condition, to moments of several kinds and to sums of decimals.

Import it only where ``great_expectations`` is installed.
"""

from __future__ import annotations

import inspect
import math
import operator
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pandas as pd
from great_expectations.execution_engine import PandasExecutionEngine
from great_expectations.expectations.metrics.column_aggregate_metric_provider import (
    ColumnAggregateMetricProvider,
    column_aggregate_value,
)
from great_expectations.expectations.metrics.column_aggregate_metrics.column_sum import ColumnSum
from great_expectations.expectations.metrics.column_map_metrics.column_values_between import (
    ColumnValuesBetween,
)
from great_expectations.expectations.metrics.map_metric_provider import (
    ColumnMapMetricProvider,
    ColumnPairMapMetricProvider,
    MulticolumnMapMetricProvider,
    column_condition_partial,
    column_pair_condition_partial,
    multicolumn_condition_partial,
)
from great_expectations.expectations.metrics.multicolumn_map_metrics.multicolumn_sum_equal import (
    MulticolumnSumEqual,
)
from great_expectations.expectations.metrics.multicolumn_map_metrics.multicolumn_values_equal import (
    MulticolumnValuesEqual,
)
from great_expectations.expectations.metrics.multicolumn_map_metrics.select_column_values_unique_within_record import (
    SelectColumnValuesUniqueWithinRecord,
)
from great_expectations.expectations.row_conditions import (
    AndCondition,
    Condition,
    NullityCondition,
    OrCondition,
    PassThroughCondition,
    deserialize_row_condition,
)

from lepton_airflow.data.held_values import as_float, whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa
    from great_expectations.expectations.row_conditions import ComparisonCondition

_EXACT_IN_FLOAT = 2**53  # whole numbers below it are
_SCALES = "decimals"  # how many digits decimals have after the point, by column
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
    are, but for those that a float would round. Their scales stay in ``attrs``. Bytes are the text that
    they say in UTF-8, with what is none as ``\\xff``.
    """
    import pyarrow as pa

    frame = table.to_pandas()
    frame.attrs[_SCALES] = {f.name: f.type.scale for f in table.schema if pa.types.is_decimal(f.type)}
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
            else:
                frame[name] = [math.nan if value is None else as_float(value) for value in frame[name]]
        if (
            pa.types.is_binary(column.type)
            or pa.types.is_large_binary(column.type)
            or pa.types.is_fixed_size_binary(column.type)
        ):
            frame[name] = frame[name].map(
                lambda value: value.decode("utf-8", "backslashreplace"), na_action="ignore"
            )
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
    sign, value = str(condition.operator), whole(condition.parameter)
    present = column.dropna()
    if sign in ("IN", "NOT_IN"):
        met = present.isin(list(value)) == (sign == "IN")
    else:
        met = _COMPARE[sign](present, value)
    return met.astype(bool).reindex(column.index, fill_value=False)


# -- metrics that differ ----------------------------------------------------------------------------------------------

_DOMAIN = ("batch_id", "table", "row_condition", "condition_parser", "ignore_row_if")


def _original(provider: type[Any], *columns: Any, **kwargs: Any) -> Any:
    """What Great Expectations' own metric says of columns."""
    return inspect.unwrap(vars(provider)["_pandas"])(provider, *columns, **kwargs)


def _moments_alike(columns: Sequence[pd.Series[Any]]) -> list[pd.Series[Any]]:
    """Columns to compare with each other: beside a timestamp, those with a zone are in UTC without one, and dates their midnight."""
    if not any(pd.api.types.is_datetime64_any_dtype(column) for column in columns):
        return list(columns)
    return list(map(_without_zone, columns))


def _without_zone(column: pd.Series[Any]) -> pd.Series[Any]:
    if isinstance(column.dtype, pd.DatetimeTZDtype):
        return column.dt.tz_convert("UTC").dt.tz_localize(None)
    of_dates = pd.api.types.infer_dtype(column, skipna=True) == "date"
    return column.astype("datetime64[s]") if of_dates else column


def _units(column: pd.Series[Any], scale: int, digits: int) -> list[int | None]:
    """Decimals of this scale, or whole numbers, as whole numbers of 10^-digits; None where one is missing."""
    if column.dtype == object:
        return [None if pd.isna(value) else int(Fraction(str(value)) * 10**digits) for value in column]
    scaled = (column * 10**scale).round() if scale else column
    return [None if pd.isna(value) else int(value) * 10 ** (digits - scale) for value in scaled.tolist()]


def _scales(columns: pd.DataFrame) -> list[int] | None:
    """The scale of each column; None where one is neither a decimal nor a whole number."""
    known = columns.attrs.get(_SCALES, {})
    scales = [
        known.get(name, 0 if pd.api.types.is_integer_dtype(columns[name]) else None) for name in columns
    ]
    return None if None in scales else scales


class _Between(ColumnMapMetricProvider):
    condition_metric_name = "column_values.between"
    condition_value_keys = ("min_value", "max_value", "strict_min", "strict_max")

    @column_condition_partial(engine=PandasEngine)
    def _pandas(cls, column: Any, min_value: Any = None, max_value: Any = None, **kwargs: Any) -> Any:
        return _original(ColumnValuesBetween, column, whole(min_value), whole(max_value), **kwargs)


class _PairEqual(ColumnPairMapMetricProvider):
    condition_metric_name = "column_pair_values.equal"
    condition_domain_keys = (*_DOMAIN, "column_A", "column_B")
    condition_value_keys = ()

    @column_pair_condition_partial(engine=PandasEngine)
    def _pandas(cls, column_A: Any, column_B: Any, **kwargs: Any) -> Any:  # noqa: N803 - names of Great Expectations
        a, b = _moments_alike([column_A, column_B])
        return a == b


class _PairGreater(ColumnPairMapMetricProvider):
    condition_metric_name = "column_pair_values.a_greater_than_b"
    condition_domain_keys = (*_DOMAIN, "column_A", "column_B")
    condition_value_keys = ("or_equal",)

    @column_pair_condition_partial(engine=PandasEngine)
    def _pandas(cls, column_A: Any, column_B: Any, **kwargs: Any) -> Any:  # noqa: N803
        a, b = _moments_alike([column_A, column_B])
        return a >= b if kwargs.get("or_equal") else a > b


def _alike(columns: pd.DataFrame) -> pd.DataFrame:
    return pd.concat(_moments_alike([columns[name] for name in columns]), axis=1)


class _UniqueWithinRecord(MulticolumnMapMetricProvider):
    condition_metric_name = "select_column_values.unique.within_record"
    condition_domain_keys = (*_DOMAIN, "column_list")

    @multicolumn_condition_partial(engine=PandasEngine)
    def _pandas(cls, column_list: Any, **kwargs: Any) -> Any:
        return _original(SelectColumnValuesUniqueWithinRecord, _alike(column_list), **kwargs)


class _MulticolumnEqual(MulticolumnMapMetricProvider):
    condition_metric_name = "multicolumn_values.equal"
    condition_domain_keys = (*_DOMAIN, "column_list")
    condition_value_keys = ()

    @multicolumn_condition_partial(engine=PandasEngine)
    def _pandas(cls, column_list: Any, **kwargs: Any) -> Any:
        return _original(MulticolumnValuesEqual, _alike(column_list), **kwargs)


class _MulticolumnSum(MulticolumnMapMetricProvider):
    condition_metric_name = "multicolumn_sum.equal"
    condition_domain_keys = (*_DOMAIN, "column_list")
    condition_value_keys = ("sum_total",)

    @multicolumn_condition_partial(engine=PandasEngine)
    def _pandas(cls, column_list: Any, **kwargs: Any) -> Any:
        scales = _scales(column_list)
        if scales is None:
            return _original(MulticolumnSumEqual, column_list, **kwargs)
        digits = max(scales)
        parts = [
            _units(column_list[name], scale, digits) for name, scale in zip(column_list, scales, strict=True)
        ]
        total = Fraction(repr(kwargs["sum_total"])) * 10**digits
        met = [None not in row and sum(row) == total for row in zip(*parts, strict=True)]
        return pd.Series(met, index=column_list.index, dtype=bool)


class _ColumnSum(ColumnAggregateMetricProvider):
    metric_name = "column.sum"

    @column_aggregate_value(engine=PandasEngine)
    def _pandas(cls, column: Any, **kwargs: Any) -> Any:
        scale = column.attrs.get(_SCALES, {}).get(column.name)
        if scale is None:
            whole_numbers = pd.api.types.is_integer_dtype(column)  # whose sum numpy would take modulo 2^64
            return sum(column.tolist()) if whole_numbers else _original(ColumnSum, column, **kwargs)
        units = sum(value for value in _units(column, scale, scale) if value is not None)
        return as_float(Decimal(f"{units}e-{scale}"))
