"""Images as uint8 tensors, and the sources they come from (one file each)."""

from undistill.data.digits import Digits
from undistill.data.files import ImageFiles, fetched
from undistill.data.folder import Folder
from undistill.data.npz import Npz
from undistill.data.source import Source
from undistill.data.split import Data, Samples, Split

__all__ = ["Data", "Digits", "Folder", "ImageFiles", "Npz", "Samples", "Source", "Split", "fetched"]
