"""Sentinel-2 and Landsat folders as reflectance, with the offset of their own metadata; folders of bands."""

from pathlib import Path

import numpy as np
import pytest

from geo.formats import FORMATS, format_of, landsat, open_scene, sentinel2
from geo.formats.bands import open_bands
from medmamba.errors import InputError
from medmamba.source import read_all
from tests.geo.maker import texture, transform, write_tif

DN = (texture((24, 24), 3) * 4000 + 1000).astype("uint16")


def safe(folder: Path, *, level: str, baseline: str, offset: float | None, name: str = "S2A_X.SAFE") -> Path:
    """One tile: B02, B03 at 10 m, B11 at 20 m, SCL for level 2A; those elements of ESA's metadata that we read."""
    product = folder / name
    two = level == "2A"
    images = {"B02": ("R10m", "_10m", 10.0), "B03": ("R10m", "_10m", 10.0), "B11": ("R20m", "_20m", 20.0)}
    if two:
        images["SCL"] = ("R20m", "_20m", 20.0)
    listed = []
    for i, (band, (room, ending, side)) in enumerate(images.items()):
        place = (
            f"GRANULE/L{level}_T33/IMG_DATA/{room}/T33_2022_{band}{ending}"
            if two
            else f"GRANULE/L1C/IMG_DATA/T33_{band}"
        )
        values = DN[[i]] if band != "SCL" else np.full((1, 24, 24), 9, dtype="uint8")
        values = values[:, :12, :12] if side == 20 else values.copy()
        values[:, 0, 0] = 0
        write_tif(
            product / f"{place}.jp2",
            values,
            **{"driver": "JP2OpenJPEG", "QUALITY": "100", "REVERSIBLE": "YES", "transform": transform(side)},
        )
        listed.append(f"<IMAGE_FILE>{place}</IMAGE_FILE>")
    unit = "BOA" if two else "RADIO"
    offsets = (
        ""
        if offset is None
        else "".join(f'<{unit}_ADD_OFFSET band_id="{b}">{offset:g}</{unit}_ADD_OFFSET>' for b in range(13))
    )
    quantity = "BOA_QUANTIFICATION_VALUE" if two else "QUANTIFICATION_VALUE"
    (product / f"MTD_MSIL{level}.xml").write_text(
        f'<n1:Level xmlns:n1="urn:x"><n1:General_Info><PRODUCT_START_TIME>2022-06-01T10:00:31.024Z</PRODUCT_START_TIME>'
        f"<PROCESSING_BASELINE>{baseline}</PROCESSING_BASELINE>{''.join(listed)}"
        f'<{quantity} unit="none">10000</{quantity}>{offsets}</n1:General_Info></n1:Level>'
    )
    return product


@pytest.mark.parametrize(
    ("level", "baseline", "offset", "expected"),
    [
        ("1C", "02.09", None, 0.0),  # before January 2022: DN / 10000
        ("2A", "03.01", None, 0.0),
        ("1C", "04.00", -1000.0, -0.1),
        ("2A", "05.09", -1000.0, -0.1),  # an old date made again
        ("2A", "05.11", -500.0, -0.05),  # the metadata decide, not the baseline
        ("2A", "04.00", None, -0.1),  # no list: the rule, and it is said
    ],
)
def test_reflectance_by_baseline(tmp_path: Path, level: str, baseline: str, offset: float, expected: float) -> None:
    path = safe(tmp_path, level=level, baseline=baseline, offset=offset)
    scene = sentinel2.open_sentinel2(path, bands=("B02", "B03"))
    image = read_all(scene)
    np.testing.assert_allclose(image.array[:, 1:], DN[:2, 1:] / 1e4 + expected, atol=1e-6)
    assert (scene.units, scene.channels, scene.dtype) == ("reflectance", ("B02", "B03"), np.dtype("float32"))
    np.testing.assert_array_equal(~image.valid, np.arange(576).reshape(24, 24) == 0)  # DN 0 is no data
    assert f"baseline {baseline}" in scene.notes[0]
    assert any("without a list" in n for n in scene.notes) == (offset is None and baseline >= "04")
    assert sentinel2.acquired(path).startswith("2022-06-01T10:00:31")


def test_two_dates_of_two_baselines_agree(tmp_path: Path) -> None:
    """The fault of many series: +1000 in one date only. The same ground must give the same reflectance."""
    old = safe(tmp_path, level="2A", baseline="03.01", offset=None, name="old.SAFE")
    new = safe(tmp_path, level="2A", baseline="05.09", offset=-1000.0, name="new.SAFE")
    for file in new.rglob("*B02*.jp2"):
        values = DN[[0]] + 1000
        values[:, 0, 0] = 0
        write_tif(file, values, driver="JP2OpenJPEG", QUALITY="100", REVERSIBLE="YES")
    both = [read_all(sentinel2.open_sentinel2(p, bands=("B02",))).array[:, 1:] for p in (old, new)]
    np.testing.assert_allclose(both[0], both[1], atol=1e-6)


def test_coarser_bands_come_onto_the_finest_grid(tmp_path: Path) -> None:
    path = safe(tmp_path, level="2A", baseline="05.09", offset=-1000.0)
    scene = sentinel2.open_sentinel2(path, bands=("B11", "B02"))
    assert scene.grid.shape == (24, 24)
    assert scene.channels == ("B11", "B02")
    assert read_all(scene).valid.mean() > 0.9
    classes = sentinel2.scene_classes(path)
    assert classes.grid.spacing == (20, 20)
    assert sentinel2.scene_classes(safe(tmp_path, level="1C", baseline="02.09", offset=None, name="c.SAFE")) is None
    scene.close()


def test_sentinel_refusals(tmp_path: Path) -> None:
    path = safe(tmp_path, level="1C", baseline="04.00", offset=-1000.0)
    metadata = path / "MTD_MSIL1C.xml"
    text = metadata.read_text()
    cases = {
        "corrupt_file": text[:100],
        "bad_header": text.replace("PROCESSING_BASELINE", "OTHER"),
        "missing_file": text.replace("T33_B02", "T34_B02"),
    }
    for code, changed in cases.items():
        metadata.write_text(changed)
        with pytest.raises(InputError) as error:
            sentinel2.open_sentinel2(path, bands=("B02",))
        assert error.value.code == code
    metadata.unlink()
    with pytest.raises(InputError, match="MTD_MSIL1C"):
        open_scene(path)
    metadata.write_text(text)
    with pytest.raises(InputError, match="known"):
        sentinel2.open_sentinel2(path, bands=("B99",))


def mtl(folder: Path, *, level: int) -> Path:
    scene = folder / f"LC09_L{level}"
    surface = (
        "GROUP = LEVEL2_SURFACE_REFLECTANCE_PARAMETERS\nREFLECTANCE_MULT_BAND_2 = 2.75e-05\n"
        "REFLECTANCE_ADD_BAND_2 = -0.2\nEND_GROUP = LEVEL2_SURFACE_REFLECTANCE_PARAMETERS\n"
    )
    write_tif(scene / "x_B2.TIF", DN[[0]])
    write_tif(scene / "x_QA_PIXEL.TIF", np.full((1, 24, 24), 21824, dtype="uint16"))
    (scene / "x_MTL.txt").write_text(
        "GROUP = LANDSAT_METADATA_FILE\nGROUP = PRODUCT_CONTENTS\n"
        'FILE_NAME_BAND_2 = "x_B2.TIF"\nFILE_NAME_QUALITY_L1_PIXEL = "x_QA_PIXEL.TIF"\nEND_GROUP = PRODUCT_CONTENTS\n'
        'GROUP = IMAGE_ATTRIBUTES\nSPACECRAFT_ID = "LANDSAT_9"\nDATE_ACQUIRED = 2023-05-04\nSUN_ELEVATION = 30.0\n'
        'SCENE_CENTER_TIME = "10:11:12.5Z"\nEND_GROUP = IMAGE_ATTRIBUTES\n'
        f"{surface if level == 2 else ''}GROUP = LEVEL1_RADIOMETRIC_RESCALING\nREFLECTANCE_MULT_BAND_2 = 2.0e-05\n"
        "REFLECTANCE_ADD_BAND_2 = -0.1\nEND_GROUP = LEVEL1_RADIOMETRIC_RESCALING\n"
        "END_GROUP = LANDSAT_METADATA_FILE\nEND\n"
    )
    return scene


def test_landsat_levels(tmp_path: Path) -> None:
    for level, expected in ((2, DN[0] * 2.75e-5 - 0.2), (1, (DN[0] * 2e-5 - 0.1) / 0.5)):  # sine of 30 degrees
        path = mtl(tmp_path, level=level)
        scene = landsat.open_landsat(path, bands=("B2",))
        np.testing.assert_allclose(read_all(scene).array[0], expected, rtol=1e-5)
        assert scene.units == "reflectance"
        assert read_all(landsat.pixel_quality(path)).array.max() == 21824
        assert landsat.acquired(path) == "2023-05-04T10:11:12.5Z"
        assert format_of(path).title.startswith("Landsat")
        with pytest.raises(InputError) as error:
            open_scene(path)  # wants B2 to B5
        assert error.value.code == "bad_header"


def test_bands_in_several_files(tmp_path: Path) -> None:
    for i, name in enumerate(("a_blue", "b_green")):
        write_tif(tmp_path / "scene" / f"{name}.tif", DN[[i]])
    scene = open_scene(tmp_path / "scene")
    np.testing.assert_array_equal(read_all(scene).array, DN[:2])
    assert scene.channels == ("a_blue", "b_green")
    write_tif(tmp_path / "scene" / "c.tif", DN[[2]].astype("float32"))
    with pytest.raises(InputError) as error:
        open_bands(tmp_path / "scene")
    assert error.value.code == "wrong_units"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as error:
        open_scene(tmp_path / "empty")
    assert error.value.code == "missing_file"


def test_each_format_finds_its_own(tmp_path: Path) -> None:
    safe(tmp_path, level="2A", baseline="05.09", offset=-1000.0)
    mtl(tmp_path, level=2)
    write_tif(tmp_path / "a.tif", DN)
    found = {name: [p.name for p in reader.find(tmp_path)] for name, reader in FORMATS.items()}
    assert found["sentinel2"] == ["S2A_X.SAFE"]
    assert found["landsat"] == ["LC09_L2"]
    assert "a.tif" in found["geotiff"]
    assert not any("T33" in name for name in found["geotiff"])
