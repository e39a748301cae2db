"""Images and their labels, one file for each kind of source."""
