"""The room convert."""
