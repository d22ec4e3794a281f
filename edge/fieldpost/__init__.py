"""Fieldpost: the way a reading takes from a sensor to the cloud without getting lost."""

__version__ = "0.1.0"
