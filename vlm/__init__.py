"""vlm learns vision-language dual encoders; `serving` answers with them."""

from vlm.torchvision_shim import install

__all__ = ["__version__"]

__version__ = "0.1.0"

# The one act at import: torchvision's wheels need CUDA operators that a CPU build of torch lacks,
# and every import of open_clip or timm, in any process, comes after an import of this package.
install()
