"""Models that leave or enter: timm exports, other formats, upstream checkpoints."""
