"""Library versions, and imports of optional packages.

In: a module name. Out: the module, or an error that says how to install its package.
Invariant: a missing or broken optional package affects only the feature that needs it.
"""

import importlib
import importlib.metadata
from types import ModuleType

from scalekd_cache.errors import UserError

__version__ = "0.1.0"


def library_versions() -> dict[str, str]:
    """Versions of the libraries that can affect the cached bytes, recorded for diagnosis and never compared."""
    names = ("scalekd-cache", "torch", "torchvision", "timm", "pillow", "numpy", "webdataset", "zarr", "numcodecs")
    return {name: importlib.metadata.version(name) for name in names if _installed(name)}


def _installed(name: str) -> bool:
    return any(importlib.metadata.distributions(name=name))


def import_optional(module: str, need: str, extra: str) -> ModuleType:
    """Import a module from an optional package.

    Args:
        module: the module's name.
        need: the start of the error message, such as "parquet files need pyarrow".
        extra: the scalekd-cache extra that installs the package.

    Raises:
        UserError: the package is not installed or cannot be imported.
    """
    install = f"pip install 'scalekd-cache[{extra}]'"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{need}, which is not installed", got=error, fix=install) from error
    except Exception as error:  # a broken package can raise anything
        package = module.partition(".")[0]
        raise UserError(
            f"{need}, which is installed but cannot be imported",
            got=f"{type(error).__name__}: {error}",
            where=_installed_as(package),
            fix=f"reinstall a version of {package} that is compatible with the other packages: {install}",
        ) from error


def _installed_as(package: str) -> str:
    """A package name with the installed version, if known."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package
