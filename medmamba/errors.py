"""Error families, chosen for the one who catches: a bad case is set aside, a wrong set-up stops the run."""

REASON_CODES = {
    "unsupported_format": "no reader knows this file",
    "corrupt_file": "the file is damaged, truncated or empty",
    "missing_file": "a file named by the manifest or the case does not exist",
    "permission": "the file may not be read",
    "bad_header": "the header contradicts itself or the data",
    "bad_geometry": "the affine or grid cannot be used",
    "missing_slice": "a series lacks a slice: the message says after which one and at what mm",
    "duplicate_slice": "two slices of a series lie at one place",
    "uneven_slices": "the slices of a series are not evenly spaced, or not in line",
    "gantry_tilt": "the slices lean more than any gantry tilts (a smaller tilt is kept as a sheared grid and noted)",
    "mixed_orientations": "slices of one series are turned against each other",
    "mixed_series": "several series, or slices of several sizes, where one image was expected",
    "localizer": "a localizer (scout) lies among the slices of a series",
    "grid_mismatch": "files of one case do not lie on the same grid",
    "no_overlap": "the dates of one case show no common ground",
    "misregistered": "the dates of one case are shifted against each other by more than may be corrected",
    "missing_channel": "the bundle wants a role that the case lacks",
    "wrong_channels": "the file has another number of channels or dimensions than the bundle wants",
    "non_finite": "too large a share of the voxels is NaN or infinite",
    "wrong_units": "the value range does not fit what the bundle was trained on",
    "empty_image": "no voxel, or no voxel that differs from background",
    "too_large": "the case does not fit in the memory that may be used",
    "no_space": "too little free disk for the products of this case",
    "output_mismatch": "what was read back from disk is not what was written",
    "killed": "the process died twice on this case",
    "internal_error": "an error nobody foresaw; its traceback is in the log",
}


class MedMambaError(Exception):
    """Root of all errors raised on purpose."""


class InputError(MedMambaError):
    """This case is bad: set it aside under `code` and go on. `code` is one of REASON_CODES."""

    def __init__(self, code: str, message: str) -> None:
        if code not in REASON_CODES:
            raise ValueError(f"unknown reason code {code!r}; known: {', '.join(REASON_CODES)}")
        super().__init__(message)
        self.code = code


class GeometryError(MedMambaError):
    """Two grids or an affine do not fit what was asked."""


class ShapeError(MedMambaError):
    """Tensor shapes do not fit."""


class ConfigError(MedMambaError):
    """A setting is wrong: fix the run file or the call."""


class BundleError(MedMambaError):
    """A bundle cannot be read or contradicts itself."""
