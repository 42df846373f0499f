"""Version of the package; read by pyproject.toml and written into every bundle."""

__version__ = "0.1.0"
