"""Files that are compressed, whole and cut off; the other bad inputs are in test_corpora.py."""

import gzip
import json
from pathlib import Path

import pytest

from moesaic.data.corpora import DataOptions
from moesaic.data.pretrain import prepare
from moesaic.errors import DataError


@pytest.mark.parametrize("ending", ["jsonl.gz", "json.zst", "txt.gz", "txt.zst"])
def test_compressed_files_are_read_as_what_they_are(tmp_path: Path, ending: str) -> None:
    text = "".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(50))
    plain = tmp_path / ("plain.jsonl" if ending.startswith("json") else "plain.txt")
    plain.write_text(text)
    data = text.encode()
    if ending.endswith("gz"):
        packed = gzip.compress(data)
    else:
        packed = pytest.importorskip("zstandard").compress(data)
    (tmp_path / f"packed.{ending}").write_bytes(packed)
    stores = []
    for path in (plain, tmp_path / f"packed.{ending}"):
        given = DataOptions(source="files", path={"a": str(path)}, cache=str(tmp_path / "cache"))
        stores.append(prepare(given))
    assert stores[0].fingerprint == stores[1].fingerprint
    assert stores[0].shards[0].documents == (50 if ending.startswith("json") else 1)
    (tmp_path / f"cut.{ending}").write_bytes(packed[: len(packed) * 2 // 3])
    with pytest.raises(DataError, match=r"cut\..*: damaged"):
        prepare(given.model_copy(update={"path": str(tmp_path / f"cut.{ending}")}))
    (tmp_path / f"bad.{ending}").write_bytes(b"no such format" * 9)
    with pytest.raises(DataError, match=r"bad\..*: damaged, or not compressed as its name says"):
        prepare(given.model_copy(update={"path": str(tmp_path / f"bad.{ending}")}))
