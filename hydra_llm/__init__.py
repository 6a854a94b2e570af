"""Routes requests over several Ollama nodes, to the one that will answer soonest."""

__version__ = "0.1.0"
