from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lepton_airflow.data.dataset import DatasetInfo, info_sql, load_frame, read_info
from lepton_airflow.errors import BadInput


def test_a_dataset_carries_its_description(tmp_path: Path) -> None:
    info = DatasetInfo(
        target="it's y", features=['a "b"', "größe"], classes=[0, 1], time_range=["2024-01-01", "2024-01-02"]
    )
    duckdb.sql(f"COPY (SELECT 1 AS x) TO '{tmp_path}/d.parquet' (FORMAT parquet, {info_sql(info)})")
    assert read_info(tmp_path / "d.parquet") == info


def test_what_a_newer_version_added_to_the_description_is_passed_over(tmp_path: Path) -> None:
    schema = pa.schema([("x", pa.int64())], metadata={"lepton": '{"target": "y", "from_the_future": 1}'})
    pq.write_table(pa.table({"x": [1]}, schema=schema), tmp_path / "d.parquet")
    assert read_info(tmp_path / "d.parquet") == DatasetInfo(target="y")


def test_a_file_without_description_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "plain.parquet")
    with pytest.raises(BadInput, match=r"plain.parquet does not say what its target.*prepare.output"):
        read_info(tmp_path / "plain.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "plain.parquet").read_bytes()[:50])
    (tmp_path / "s.csv").write_text("x\n1\n")
    for name, said in (
        ("cut.parquet", "cannot be read as Parquet"),
        ("s.csv", "is no Parquet file: land it with"),
    ):
        for plain in (False, True):
            with pytest.raises(BadInput, match=f"{name} {said}"):
                read_info(tmp_path / name, plain=plain)


def test_load_frame_names_the_absent_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"distance": [1], "x": [2]}), tmp_path / "d.parquet")
    assert load_frame(tmp_path / "d.parquet", ["x"]).x.tolist() == [2]
    with pytest.raises(BadInput, match=r"column 'distnace' is not in d.parquet; did you mean 'distance'"):
        load_frame(tmp_path / "d.parquet", ["distnace"])
