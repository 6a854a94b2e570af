"""
The doors to LangChain and LiteLLM, imported as `hydra_llm.integrations`.

Nothing here is loaded by `import hydra_llm`, and nothing here uses a private name of it.
"""
