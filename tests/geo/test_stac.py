"""The STAC item: valid offline, with check sums that are the files', lineage and the model. Lists of pairs."""

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pystac
import pytest
from pystac.validation.stac_validator import JsonSchemaSTACValidator

from geo.pairs import find_pairs
from geo.stac import EXTENSIONS, Lineage, ProductFile, footprint, product_item, write_item
from medmamba.errors import ConfigError
from medmamba.files import hash_file
from medmamba.grid import Grid
from tests.geo.maker import grid

LINEAGE = Lineage(
    inputs=("../before.tif", "../after.tif"),
    sentence="before and after on the grid of before; change by m@1",
    software={"medmamba": "0.1.0"},
    model={"name": "m", "bundle": "ab12", "version": "3", "run": "77"},
    created=datetime(2026, 11, 21, 12, tzinfo=UTC),
    start=datetime(2020, 6, 1, tzinfo=UTC),
    end=datetime(2024, 6, 1, tzinfo=UTC),
)
FIELDS = {  # what the extensions demand of the fields we write, in our words; keyed like EXTENSIONS
    "processing": {
        "processing:lineage": {"type": "string"},
        "processing:software": {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 1},
        "processing:datetime": {"type": "string", "pattern": "Z$"},
    },
    "projection": {
        "proj:code": {"type": ["string", "null"]},
        "proj:wkt2": {"type": "string"},
        "proj:shape": {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "integer"}},
        "proj:transform": {"type": "array", "minItems": 6, "maxItems": 9, "items": {"type": "number"}},
    },
}
ASSET_FIELDS = {
    "file": {
        "file:size": {"type": "integer", "minimum": 0},
        "file:checksum": {"type": "string", "pattern": "^1220[0-9a-f]{64}$"},
    },
    "classification": {
        "classification:classes": {
            "type": "array",
            "items": {
                "required": ["value", "name"],
                "properties": {
                    "value": {"type": "integer"},
                    "name": {"type": "string", "pattern": "^[0-9A-Za-z_-]+$"},
                    "color_hint": {"type": "string", "pattern": "^[0-9A-F]{6}$"},
                },
            },
        }
    },
}


def offline() -> JsonSchemaSTACValidator:
    """PySTAC's bundled core schemas, and our words for the extensions: nothing is fetched."""
    validator = JsonSchemaSTACValidator()
    for name, address in EXTENSIONS.items():
        fields = {"properties": {"properties": {"properties": FIELDS.get(name, {})}}}
        assets = {"additionalProperties": {"properties": ASSET_FIELDS.get(name, {})}}
        fields["properties"]["assets"] = assets
        validator.schema_cache[address] = {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "$id": address,
            **fields,
        }
    return validator


def made(folder: Path, on: Grid, lineage: Lineage = LINEAGE) -> dict:
    for name in ("change.tif", "change.gpkg", "quicklook.png"):
        (folder / name).write_bytes(name.encode())
    files = [
        ProductFile(
            path=folder / "change.tif",
            title="change",
            classes={0: "no change", 1: "built up"},
            colours={1: (255, 0, 16)},
        ),
        ProductFile(path=folder / "change.gpkg", title="polygons"),
        ProductFile(path=folder / "quicklook.png", title="picture", roles=("thumbnail",)),
    ]
    write_item(folder / "item.json", product_item("pair", on, files, lineage))
    return json.loads((folder / "item.json").read_text())


def check(item: dict) -> list:
    return offline().validate(item, pystac.STACObjectType.ITEM, item["stac_version"], item["stac_extensions"])


def test_item_is_valid_and_says_where_it_comes_from(tmp_path: Path) -> None:
    item = made(tmp_path, grid((100, 200)))
    assert len(check(item)) == 1 + len(EXTENSIONS)
    assert [link["href"] for link in item["links"] if link["rel"] == "derived_from"] == list(LINEAGE.inputs)
    told = item["properties"]
    assert (told["datetime"], told["start_datetime"][:10], told["end_datetime"][:10]) == (
        None,
        "2020-06-01",
        "2024-06-01",
    )
    assert told["medmamba:model"] == LINEAGE.model
    assert told["proj:code"] == "EPSG:32633"
    change = item["assets"]["change.tif"]
    assert change["file:checksum"] == "1220" + hash_file(tmp_path / "change.tif")
    assert change["classification:classes"][1] == {
        **{"value": 1, "name": "built-up", "title": "built up", "color_hint": "FF0010"}
    }
    again = pystac.Item.from_file(str(tmp_path / "item.json"))
    assert Path(again.assets["change.gpkg"].get_absolute_href()) == tmp_path / "change.gpkg"
    west, south, east, north = item["bbox"]
    assert 13.7 < west < east < 13.8
    assert 45.1 < south < north < 45.2


def test_a_broken_item_is_found(tmp_path: Path) -> None:
    item = made(tmp_path, grid((100, 200)))
    item["assets"]["change.tif"]["file:checksum"] = "ff"
    with pytest.raises(pystac.STACValidationError):
        check(item)


def test_odd_crs_and_no_crs(tmp_path: Path) -> None:
    odd = grid((10, 10), 1000.0, "+proj=laea +lat_0=12 +lon_0=34 +ellps=WGS84")
    item = made(tmp_path, odd)
    check(item)
    assert item["properties"]["proj:code"] is None
    assert item["properties"]["proj:wkt2"].startswith("PROJCRS")
    nowhere = Grid((5, 5), np.eye(3))
    undated = Lineage(**{**{f: getattr(LINEAGE, f) for f in LINEAGE.__slots__}, "start": None, "end": None})
    item = made(tmp_path, nowhere, undated)
    check(item)
    assert item["geometry"] is None
    assert item["properties"]["datetime"].startswith("2026-11-21")
    assert footprint(nowhere) == (None, None)


def test_pairs_of_a_csv(tmp_path: Path) -> None:
    for name in ("a.tif", "b.tif"):
        (tmp_path / name).touch()
    table = tmp_path / "pairs.csv"
    table.write_text("id,before,after,date_before\nfield 7/x,a.tif,b.tif,2020-01-01\n")
    (pair,) = find_pairs(table)
    assert (pair.id, pair.before, pair.date_before, pair.date_after) == (
        "field_7_x",
        tmp_path / "a.tif",
        "2020-01-01",
        "",
    )
    table.write_text("id,before,after\n1,a.tif,c.tif\n2,,b.tif\n")
    with pytest.raises(ConfigError, match=r"line 2: .*c\.tif does not exist|line 3: before is empty"):
        find_pairs(table)
    table.write_text("id,before\n1,a.tif\n")
    with pytest.raises(ConfigError, match="after"):
        find_pairs(table)
    table.write_text("id,before,after\n1,a.tif,b.tif\n1,b.tif,a.tif\n")
    with pytest.raises(ConfigError, match="named twice"):
        find_pairs(table)


def test_a_series_is_compared_date_by_date(tmp_path: Path) -> None:
    for name in ("a.tif", "b.tif", "c.tif", "d.tif"):
        (tmp_path / name).touch()
    table = tmp_path / "series.csv"
    rows = ["south,2024-05-01,c.tif", "south,2020-05-01,a.tif", "north,2021-01-01,d.tif", "south,2022-05-01,b.tif"]
    table.write_text("\n".join(["place,date,scene", *rows]))
    told = [(p.id, p.before.name, p.after.name, p.date_after) for p in find_pairs(table)]
    assert told == [
        ("south_2020-05-01_2022-05-01", "a.tif", "b.tif", "2022-05-01"),
        ("south_2022-05-01_2024-05-01", "b.tif", "c.tif", "2024-05-01"),
    ]
    table.write_text("\n".join(["place,date,scene", *rows, "south,2020-05-01,d.tif"]))
    with pytest.raises(ConfigError, match="two scenes of one date at south"):
        find_pairs(table)
    table.write_text("place,date,scene\nsouth,,x.tif")
    with pytest.raises(ConfigError, match=r"line 2: date is empty; line 2: .*x\.tif does not exist"):
        find_pairs(table)


def test_pairs_of_a_folder(tmp_path: Path) -> None:
    for room in ("A", "B"):
        (tmp_path / room).mkdir()
        for name in ("x.png", "y.png"):
            (tmp_path / room / name).touch()
    assert [(p.id, p.before.parent.name, p.after.parent.name) for p in find_pairs(tmp_path)] == [
        ("x", "A", "B"),
        ("y", "A", "B"),
    ]
    (tmp_path / "B" / "y.png").unlink()
    with pytest.raises(ConfigError, match=r"y\.png"):
        find_pairs(tmp_path)
    with pytest.raises(ConfigError, match="CSV"):
        find_pairs(tmp_path / "A")


def test_pairs_of_a_catalogue(tmp_path: Path) -> None:
    """Three dates of one tile and one of another: consecutive dates pair up, a single one has no partner."""
    catalogue = pystac.Catalog("c", "scenes")
    for name, tile, month in (("late", "33U", 9), ("early", "33U", 1), ("middle", "33U", 5), ("alone", "34U", 5)):
        item = pystac.Item(name, None, None, datetime(2024, month, 1, tzinfo=UTC), {"grid:code": tile})
        item.add_asset("data", pystac.Asset(f"./{name}.tif", roles=["data"]))
        item.add_asset("thumb", pystac.Asset(f"./{name}.png", roles=["thumbnail"]))
        catalogue.add_item(item)
    catalogue.normalize_and_save(str(tmp_path), pystac.CatalogType.SELF_CONTAINED)
    found = find_pairs(tmp_path)
    assert [p.id for p in found] == ["early_middle", "middle_late"]
    assert found[0].before == tmp_path / "early" / "early.tif"
    assert found[0].date_before.startswith("2024-01-01")
    (tmp_path / "catalog.json").write_text("{}")
    with pytest.raises(ConfigError, match="STAC"):
        find_pairs(tmp_path / "catalog.json")
