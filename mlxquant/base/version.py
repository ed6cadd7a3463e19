"""The package's version, for records and reports."""

__version__ = "0.1.0"
