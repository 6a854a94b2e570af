"""
One behavioural model of an Ollama node, and that model over real sockets.

``model`` is pure: the clock comes in as an argument, so a replay drives the same code with a
virtual one. ``server`` puts it behind HTTP. What a real Ollama does is written down beside the
recordings the contract test compares both with.
"""
