"""Ollama's JSON, its streams, its errors."""
