"""The version of core, which plugins are checked against."""

__version__ = "0.1.0"
