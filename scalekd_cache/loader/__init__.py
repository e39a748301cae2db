"""The room loader."""
