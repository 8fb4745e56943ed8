"""The earth: rasters as Sources and Sinks, dates on one grid, what can be seen, areas, polygons, STAC.

The only room that imports rasterio, pyproj, shapely, geopandas, pyogrio and pystac.
"""
