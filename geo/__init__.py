"""The earth: CRS, rasters, mosaics. The only room that imports rasterio, pyproj, shapely and pystac."""
