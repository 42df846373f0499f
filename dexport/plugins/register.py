"""Importing this module registers every plugin with TensorRT; the engine worker does so before it parses."""

from __future__ import annotations

from dexport.plugins.tensorrt_plugin import register_all

register_all()
