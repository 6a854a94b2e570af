"""
LiteLLM over several Ollama nodes: requests go where they will be answered soonest.

In a program::

    import litellm
    from hydra_llm.integrations.litellm import install

    router = litellm.Router(model_list=[...])
    install(router)

In the proxy's ``config.yaml``::

    litellm_settings:
      callbacks: ["hydra_llm.integrations.litellm.instance"]

Needs the extra `[litellm]`.
"""

try:
    from hydra_llm.integrations.litellm.installing import decision_of, install, uninstall
    from hydra_llm.integrations.litellm.provider import register_provider
    from hydra_llm.integrations.litellm.strategy import HydraRoutingStrategy
except ModuleNotFoundError as exc:
    if (exc.name or "").partition(".")[0] != "litellm":
        raise
    raise ModuleNotFoundError(
        f"hydra_llm.integrations.litellm needs {exc.name}: "
        'install it with pip install "hydra-llm[litellm]"',
        name=exc.name,
    ) from exc

__all__ = [
    "HydraRoutingStrategy",
    "decision_of",
    "install",
    "instance",
    "register_provider",
    "uninstall",
]

instance = HydraRoutingStrategy()
"""For the proxy's ``config.yaml``, which wants an instance."""
