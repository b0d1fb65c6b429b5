"""Images that a person names: those of a manifest are held to what it says of them."""

import hashlib
from pathlib import Path

import pyarrow as pa

from components.dataset import manifest, named
from tests.components.dataset.conftest import digit, encoded, put


def test_a_replaced_image_of_a_manifest_is_said_in_its_place(tmp_path: Path) -> None:
    rows = []
    for i in range(3):
        content = encoded(digit(i))
        put(tmp_path / f"{i}.png", content)
        row = {"path": f"{i}.png", "label": 0, "split": "val", "source": "real"}
        rows.append({**row, "sha256": hashlib.sha256(content).hexdigest()})
    manifest.write(pa.Table.from_pylist(rows, schema=manifest.SCHEMA), tmp_path / "clean.parquet")
    put(tmp_path / "1.png", encoded(digit(7)))
    found = dict(named.find([tmp_path / "clean.parquet"], str(tmp_path)).read(8))
    assert [name for name, image in found.items() if isinstance(image, str)] == ["1.png"]
    assert str(found["1.png"]).startswith("image.changed: 1.png has another content")
    put(tmp_path / "elsewhere" / "1.png", encoded(digit(7)))
    (_, image), *_ = named.find([tmp_path / "elsewhere"], str(tmp_path)).read(8)
    assert not isinstance(image, str), "a file is what it is"
