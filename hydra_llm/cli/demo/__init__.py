"""``hydra-llm demo``: stories that are played, shown and checked.

``stage`` is what stories play on, ``simulated`` and ``own`` are the stories for three
simulated nodes and for the user's own ones.
"""
