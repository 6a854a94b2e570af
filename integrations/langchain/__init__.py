"""
LangChain over several Ollama nodes: `ChatOllama` and `OllamaEmbeddings`, routed.

::

    from hydra_llm.integrations.langchain import ChatHydra

    model = ChatHydra(model="llama3.2", nodes=["http://rig:11434", "http://gaming:11434"])
    answer = model.invoke("Why is the sky blue?")
    print(answer.content, "-", answer.response_metadata["routing_decision"]["reason"])

Needs the extra `[langchain]`.
"""

try:
    from hydra_llm.integrations.langchain.chat_models import ChatHydra
    from hydra_llm.integrations.langchain.embeddings import HydraEmbeddings
except ModuleNotFoundError as exc:
    if (exc.name or "").partition(".")[0] not in {"langchain_core", "langchain_ollama"}:
        raise
    raise ModuleNotFoundError(
        f"hydra_llm.integrations.langchain needs {exc.name}: "
        'install it with pip install "hydra-llm[langchain]"',
        name=exc.name,
    ) from exc

__all__ = ["ChatHydra", "HydraEmbeddings"]
