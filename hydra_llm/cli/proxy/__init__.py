"""``hydra-llm proxy``: LiteLLM's proxy, from a config that may say ``routing_strategy: hydra``.

LiteLLM's list of strategies is closed, and a name that is not on it ends the proxy. So the
config is read (``includes``), what it says of us is taken out and our callback put in
(``translation``), and LiteLLM's own command runs on a private copy (``running``, ``launch``).
"""
