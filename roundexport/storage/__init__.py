"""Bytes on disk: whole folders or none, strict JSON, safetensors.  Knows no model."""
