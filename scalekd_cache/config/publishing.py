"""Options for `publish`.

In: values from the command line or a Python call. Out: a checked, immutable dataclass.
Invariant: the user gives the licenses; they are never guessed.
"""

from scalekd_cache.config.base import require
from scalekd_cache.config.options import options_class
from scalekd_cache.errors import UserError


@options_class()
class PublishConfig:
    """Options for `publish`."""

    cache: str
    """Folder of a finished cache."""
    to: str
    """Destination: hf://datasets/USER/NAME, s3://bucket/folder, gs://bucket/folder, or a folder."""
    data_license: str = ""
    """Image license, such as cc-by-4.0; required."""
    teacher_license: str = ""
    """License of the teacher's weights, such as apache-2.0; required."""
    without_pixels: bool = False
    """Leave out the pixels, for example if the image license forbids redistribution. Users then need the
    images: `pull --data` regenerates the pixels."""
    pixels_from: str | None = None
    """For a cache that shares another cache's pixels: the folder or URL where that other cache is published (default:
    next to the destination, in a folder with that cache's local name)."""
    private: bool = False
    """With an hf:// destination: create the repository as private (an existing one is not changed)."""
    connections: int = 4
    """Number of units uploaded in parallel."""

    def __post_init__(self) -> None:
        for place, option in ((self.cache, "--cache"), (self.to, "--to")):
            if not place.strip():
                raise UserError(f"{option} is empty")
        names = {"--data-license": self.data_license, "--teacher-license": self.teacher_license}
        missing = [option for option, name in names.items() if not name.strip()]
        if missing:
            raise UserError(
                f"set {' and '.join(missing)}: a published cache must state the licenses of its images and its "
                "teacher (for example --data-license cc-by-4.0 --teacher-license apache-2.0)"
            )
        for option, name in names.items():
            fits = len(name) <= 200 and name.isprintable()
            require(fits, option.lstrip("-"), name[:50], "one line of at most 200 characters")
        require(1 <= self.connections <= 64, "connections", self.connections, "1 to 64")
